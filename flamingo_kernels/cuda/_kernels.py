"""What CUDA C++ brings to the ops of `_gpu`: the names of `_gpu/kernels.py`."""

# ruff: noqa: F401  (others use what is imported here)

from flamingo_kernels.cuda import masked_cross_attention as attention
from flamingo_kernels.cuda._activation import activate
from flamingo_kernels.cuda._activation import backward as activation_backward
from flamingo_kernels.cuda._fold import fold, unfold
from flamingo_kernels.cuda._gate import add, scale, weight_gradients
from flamingo_kernels.cuda._norm import add_normalize, normalize
from flamingo_kernels.cuda._norm import backward as norm_backward
from flamingo_kernels.cuda._rows import sum_rows

BACKEND = "cuda"
