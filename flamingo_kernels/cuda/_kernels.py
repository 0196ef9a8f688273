"""What CUDA C++ brings to the ops of `_gpu`: the names of `_gpu/kernels.py`."""

from flamingo_kernels.cuda import masked_cross_attention as attention
from flamingo_kernels.cuda._activation import activate
from flamingo_kernels.cuda._activation import backward as activation_backward
from flamingo_kernels.cuda._fold import fold, unfold
from flamingo_kernels.cuda._gate import add, scale, weight_gradients
from flamingo_kernels.cuda._norm import backward as norm_backward
from flamingo_kernels.cuda._norm import normalize
from flamingo_kernels.cuda._rows import sum_rows

__all__ = [
    "BACKEND",
    "MAX_WIDTH",
    "activate",
    "activation_backward",
    "add",
    "attention",
    "fold",
    "norm_backward",
    "normalize",
    "scale",
    "sum_rows",
    "unfold",
    "weight_gradients",
]
BACKEND = "cuda"
MAX_WIDTH = None
