"""Foreign models: the fused ops inside their instances, and their states under other names."""

from flamingo_kernels.patch.convert import convert_state_dict
from flamingo_kernels.patch.handle import Handle, patch

__all__ = ["Handle", "convert_state_dict", "patch"]
