"""linear_gate_residual: a linear map without a bias, behind a tanh gate, added to a residual stream."""

from torch import Tensor

from flamingo_kernels import _backends
from flamingo_kernels._checks import expect
from flamingo_kernels.ops._linear_args import (
    check_floating,
    check_gate,
    check_stream,
    check_weight,
    gradients_fake,
    of_given,
    only_wanted,
)
from flamingo_kernels.ops._register import (
    forbid_double_backward,
    is_left_alone,
    register,
    register_autocast,
    register_autograd,
)

_OP = "linear_gate_residual"


def linear_gate_residual(x: Tensor, weight: Tensor, residual: Tensor, gate: Tensor | None = None) -> Tensor:
    """What a branch ends with: its last linear map, its gate, and the sum with the stream that it left.

        y = residual + tanh(gate)·(x weightᵀ)

    Args:
        x: [..., K]; any strides, as everywhere. Of weight's dtype, or fp32 beside bf16 or fp16 weights.
        weight: [C, K], fp32, bf16, fp16 (or fp64 on the cpu and reference backends).
        residual: [..., C], of a dtype that x may have.
        gate: [], [1] or [C], likewise; None: y = residual + x weightᵀ.

    Returns:
        y [..., C] in residual's dtype, contiguous.

    Saved for backward: x, weight and gate, that is, for n rows and a gate of g numbers,
        e_x·n·K + e_w·C·K + e_g·g bytes with e bytes per element of x, weight and gate.
    Nothing of the branch is saved for the gate: with P = dyᵀ x, dweight = tanh(gate)·P and, summed over a row of weight
    or over all of it, dgate = (1 - tanh²(gate))·Σ P ∘ weight.

    Under autocast, x and weight are cast to the autocast dtype; residual and gate stay as they are. Sums are in fp32
    (fp64 for fp64). Deterministic, forward and backward.

    Raises:
        TypeError: an argument that is no tensor, or of an unsupported dtype.
        ValueError: shapes or devices that do not fit.
    """
    check_floating(_OP, "x", x)
    expect(x.ndim >= 1, _OP, "x", "of shape [..., K]", x.shape)
    compute = check_weight(_OP, "weight", weight, x, x.shape[-1], "x")
    if is_left_alone(x) or is_left_alone(weight):
        check_stream(_OP, "x", x, compute)
    check_stream(_OP, "residual", residual, compute)
    expect(residual.device == x.device, _OP, "residual", "on x's device", residual.device)
    fits = residual.ndim == x.ndim and residual.shape[:-1] == x.shape[:-1] and residual.shape[-1] == weight.shape[0]
    expect(fits, _OP, "residual", "of shape [..., C] with weight [C, K] and x's leading dimensions", residual.shape)
    check_gate(_OP, x, gate, weight.shape[0], compute)
    return _forward(x, weight, residual, gate, _backends.select(x.device.type, _OP))


def _forward_kernel(x: Tensor, weight: Tensor, residual: Tensor, gate: Tensor | None, backend: str) -> Tensor:
    return _backends.kernels(backend, _OP).forward(x, weight, residual, gate)


def _forward_fake(x: Tensor, weight: Tensor, residual: Tensor, *_: object) -> Tensor:
    return residual.new_empty(residual.shape)


def _backward_kernel(
    dy: Tensor, x: Tensor, weight: Tensor, gate: Tensor | None, wanted: list[bool], backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = (x, weight, gate)
    return _backends.kernels(backend, _OP).backward(dy, *inputs, of_given(inputs, wanted))


def _backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor, gate: Tensor | None, wanted: list[bool], backend: str
) -> tuple[Tensor, ...]:
    return gradients_fake((x, weight, gate), wanted)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, _, gate, ctx.backend = inputs
    ctx.save_for_backward(x, weight, gate)


def _backward_formula(ctx, dy: Tensor):
    x, weight, residual, gate, _ = ctx.needs_input_grad
    wanted = (x, weight, gate)
    if not any(wanted):
        return None, None, dy, None, None
    gradients = _backward(dy, *ctx.saved_tensors, list(wanted), ctx.backend)
    dx, dweight, dgate = only_wanted(gradients, wanted)
    return dx, dweight, dy if residual else None, dgate, None


_forward = register(
    "linear_gate_residual(Tensor x, Tensor weight, Tensor residual, Tensor? gate, str backend) -> Tensor",
    _forward_kernel,
    _forward_fake,
)
_backward = register(
    "linear_gate_residual_backward(Tensor dy, Tensor x, Tensor weight, Tensor? gate, bool[] wanted, str backend) "
    "-> (Tensor dx, Tensor dweight, Tensor dgate)",
    _backward_kernel,
    _backward_fake,
)
register_autograd(_forward, _backward_formula, _setup_context)
register_autocast(_forward, ("x", "weight"))
forbid_double_backward(_backward)
