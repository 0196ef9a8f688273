"""norm_linear: a linear map without a bias, of normalised rows."""

from torch import Tensor

from flamingo_kernels import _backends
from flamingo_kernels._checks import expect
from flamingo_kernels.ops._linear_args import (
    check_floating,
    check_norm,
    check_stream,
    check_weight,
    gradients_fake,
    of_given,
    only_wanted,
)
from flamingo_kernels.ops._register import forbid_double_backward, register, register_autocast, register_autograd

_OP = "norm_linear"


def norm_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    *,
    norm: str = "layer",
    eps: float = 1e-5,
) -> Tensor:
    """A norm over the last dimension and the linear map behind it; what stands between them is never stored.

        y = z weightᵀ,   z = (x - mean(x)) / sqrt(var(x) + eps) · norm_weight + norm_bias   with norm="layer"
                         z = x / sqrt(mean(x²) + eps) · norm_weight                         with norm="rms"

    Args:
        x: [..., C]; any strides. Of weight's dtype, or fp32 beside bf16 or fp16 weights: the statistics are then those
            of the wide x.
        norm_weight: [C], of a dtype that x may have; None: no affine.
        norm_bias: [C], likewise; None: none. Only with norm="layer" and a norm_weight.
        weight: [N, C], fp32, bf16, fp16 (or fp64 on the cpu and reference backends).
        norm: "layer" | "rms".
        eps: added to the variance, or to the mean square.

    Returns:
        y [..., N] in weight's dtype, contiguous.

    Saved for backward: x, norm_weight, norm_bias and weight, that is, for n rows,
        e_x·n·C + e_w·N·C + 2·e_n·C bytes with e bytes per element of x, weight and the norm's parameters.

    Under autocast, weight is cast to the autocast dtype, and y is of it; x and the norm's parameters stay as they are.
    Statistics and sums are in fp32 (fp64 for fp64). Deterministic, forward and backward.

    Raises:
        TypeError: an argument that is no tensor, or of an unsupported dtype.
        ValueError: shapes or devices that do not fit, an unknown norm, a norm_bias that has no place, eps below 0.
    """
    check_floating(_OP, "x", x)
    expect(x.ndim >= 1, _OP, "x", "of shape [..., C]", x.shape)
    compute = check_weight(_OP, "weight", weight, x, x.shape[-1], "x")
    check_stream(_OP, "x", x, compute)
    check_norm(_OP, x, norm_weight, norm_bias, norm, eps, compute)
    return _forward(x, norm_weight, norm_bias, weight, norm, float(eps), _backends.select(x.device.type, _OP))


def _forward_kernel(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    norm: str,
    eps: float,
    backend: str,
) -> Tensor:
    return _backends.kernels(backend, _OP).forward(x, norm_weight, norm_bias, weight, norm, eps)


def _forward_fake(
    x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, weight: Tensor, *_: object
) -> Tensor:
    return weight.new_empty((*x.shape[:-1], weight.shape[0]))


def _backward_kernel(
    dy: Tensor,
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    norm: str,
    eps: float,
    wanted: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kernels = _backends.kernels(backend, _OP)
    inputs = (x, norm_weight, norm_bias, weight)
    return kernels.backward(dy, *inputs, norm, eps, of_given(inputs, wanted))


def _backward_fake(
    dy: Tensor,
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    norm: str,
    eps: float,
    wanted: list[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    return gradients_fake((x, norm_weight, norm_bias, weight), wanted)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.norm, ctx.eps, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward_formula(ctx, dy: Tensor):
    wanted = ctx.needs_input_grad[:4]
    gradients = _backward(dy, *ctx.saved_tensors, ctx.norm, ctx.eps, list(wanted), ctx.backend)
    return *only_wanted(gradients, wanted), None, None, None


_forward = register(
    "norm_linear(Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor weight, str norm, float eps, str backend) "
    "-> Tensor",
    _forward_kernel,
    _forward_fake,
)
_backward = register(
    "norm_linear_backward(Tensor dy, Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor weight, str norm, "
    "float eps, bool[] wanted, str backend) -> (Tensor dx, Tensor dnorm_weight, Tensor dnorm_bias, Tensor dweight)",
    _backward_kernel,
    _backward_fake,
)
register_autograd(_forward, _backward_formula, _setup_context)
register_autocast(_forward, ("weight",))
forbid_double_backward(_backward)
