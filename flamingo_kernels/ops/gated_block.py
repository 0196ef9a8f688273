"""gated_block: both halves of the gated block as one op; what `fk.nn` calls where nothing stands between them.

It is gated_cross_attention, then gated_mlp, and saves what they save. On a GPU, the pass that ends the residual of the
first is the norm of the second. Backward is theirs, one after the other.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from flamingo_kernels import _backends
from flamingo_kernels.ops import gated_cross_attention, gated_mlp
from flamingo_kernels.ops._linear_args import only_wanted
from flamingo_kernels.ops._register import register, register_autocast, register_autograd

_ATTENTION, _MLP = "gated_cross_attention", "gated_mlp"
_FUSED = ("triton", "cuda")
_HALF = 13  # arguments of the first half: ten tensors and three options


def gated_block(x: Tensor, attention: Mapping[str, object], mlp: Mapping[str, object]) -> Tensor:
    """gated_mlp(gated_cross_attention(x, **attention), **mlp).

    Args:
        x: [B, T, C].
        attention, mlp: the other arguments of the two by name; all but softmax_scale, and no recompute.

    Returns:
        [B, T, C] in x's dtype, contiguous.

    Saved for backward: what the two save, which is, besides what came in, the text between them, what attention gives
    and its log-sum-exp, on the triton and cuda backends the queries, and what the activation takes.

    Raises:
        TypeError, ValueError: as the two, under their names.
    """
    first = gated_cross_attention.checked(x, **attention)
    gated_mlp.check_arguments(x, **mlp)
    second = [mlp[name] for name in ("norm_weight", "norm_bias", "w_in", "w_out", "gate", "activation", "norm")]
    tensors = [t for t in (*first, *second) if isinstance(t, Tensor)]
    save = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    backend = _backends.select(x.device.type, _ATTENTION, attention["k"].shape[3])
    z, *_ = _forward(*first, *second, float(mlp["eps"]), save, backend)
    return z


def _forward_kernel(x: Tensor, *arguments: Tensor | str | float | bool | None) -> tuple[Tensor, ...]:
    *arguments, save, backend = x, *arguments
    if backend in _FUSED:
        return _backends.kernels(backend, "gated_block").forward(*arguments, save)
    y, *attended = _backends.kernels(backend, _ATTENTION).forward(*arguments[:_HALF])
    z, hidden = _backends.kernels(backend, _MLP).forward(y, *arguments[_HALF:], save)
    return z, *attended, y if save else y.new_empty(0), hidden


def _forward_fake(x: Tensor, *arguments: Tensor | str | float | bool | None) -> tuple[Tensor, ...]:
    *arguments, save, backend = x, *arguments
    _, *attended = gated_cross_attention.forward_fake(*arguments[:_HALF], backend)
    z, hidden = gated_mlp.forward_fake(x, *arguments[_HALF:], save, backend)
    return z, *attended, x.new_empty(x.shape if save else 0), hidden


def _setup_context(ctx, inputs, output) -> None:
    *inputs, _, ctx.backend = inputs
    _, *attended, y, hidden = output
    ctx.of_attention, ctx.of_mlp = inputs[_HALF - 3 : _HALF], inputs[-3:]
    ctx.set_materialize_grads(False)  # for those of what nobody has but this op
    ctx.save_for_backward(*inputs[: _HALF - 3], *attended, y, hidden, *inputs[_HALF:-3])


def _backward_formula(ctx, dz: Tensor | None, *_: None):
    if dz is None:
        return (None,) * 23
    saved, needed = ctx.saved_tensors, ctx.needs_input_grad
    wanted = (*needed[:6], *needed[8:10])  # not those of the intervals
    of_mlp = (any(wanted), *needed[_HALF : _HALF + 5])
    gradients = gated_mlp.backward_op(dz, *saved[-7:], *ctx.of_mlp, list(of_mlp), ctx.backend)
    dy, *second = only_wanted(gradients, of_mlp)
    first = (None,) * len(wanted)
    if dy is not None:
        gradients = gated_cross_attention.backward_op(dy, *saved[:-7], *ctx.of_attention, list(wanted), ctx.backend)
        first = only_wanted(gradients, wanted)
    return *first[:6], None, None, *first[6:], None, None, None, *second, None, None, None, None, None


_forward = register(
    "gated_block(Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor w_q, Tensor k, Tensor v, Tensor start, "
    "Tensor end, Tensor w_out, Tensor? gate, str norm, float eps, float softmax_scale, Tensor? ff_norm_weight, "
    "Tensor? ff_norm_bias, Tensor w_in, Tensor w_back, Tensor? ff_gate, str activation, str ff_norm, float ff_eps, "
    "bool save, str backend) -> (Tensor z, Tensor q, Tensor o, Tensor lse, Tensor y, Tensor hidden)",
    _forward_kernel,
    _forward_fake,
)
register_autograd(_forward, _backward_formula, _setup_context)
register_autocast(_forward, ("w_q", "k", "v", "w_out", "w_in", "w_back"))
