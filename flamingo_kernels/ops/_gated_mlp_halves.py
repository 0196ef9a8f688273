"""gated_mlp with swiglu, where the two halves of w_in are tensors of their own, as in the Llama family.

They are put together for the call, and again in backward: a copy that was kept for backward would be larger than all
that is kept otherwise, unless a batch has more tokens than the text is wide.
"""

import torch
from torch import Tensor

from flamingo_kernels import _backends
from flamingo_kernels.ops._linear_args import only_wanted
from flamingo_kernels.ops.gated_mlp import backward_op, check_arguments, forward_op


def gated_mlp_of_halves(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    w_gate: Tensor,
    w_up: Tensor,
    w_out: Tensor,
    gate: Tensor | None,
    *,
    norm: str,
    eps: float,
) -> Tensor:
    """gated_mlp(x, ..., w_in=cat([w_gate, w_up]), ..., activation="swiglu"); w_gate, w_up [F, C].

    Saved for backward: what came in, and hidden, e·n·2F bytes for n rows and e bytes per element of the weights.
    """
    for half in (w_gate, w_up):  # either is what w_in is without a second half
        check_arguments(x, norm_weight, norm_bias, half, w_out, gate, "silu", norm, eps)
    backend = _backends.select(x.device.type, "gated_mlp")
    y, _ = _OfHalves.apply(x, norm_weight, norm_bias, w_gate, w_up, w_out, gate, norm, float(eps), backend)
    return y


class _OfHalves(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        w_gate: Tensor,
        w_up: Tensor,
        w_out: Tensor,
        gate: Tensor | None,
        norm: str,
        eps: float,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        w_in = torch.cat([w_gate, w_up])
        return forward_op(x, norm_weight, norm_bias, w_in, w_out, gate, "swiglu", norm, eps, True, backend)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.norm, ctx.eps, ctx.backend = inputs
        _, hidden = output
        ctx.mark_non_differentiable(hidden)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, hidden)

    @staticmethod
    def backward(ctx, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 10
        x, norm_weight, norm_bias, w_gate, w_up, w_out, gate, hidden = ctx.saved_tensors
        dtype = hidden.dtype  # of the matmuls: autocast's, if it was on
        w_in, w_out = torch.cat([w_gate, w_up]).to(dtype), w_out.to(dtype)
        needed = ctx.needs_input_grad
        wanted = (*needed[:3], needed[3] or needed[4], *needed[5:7])
        inputs, options = (norm_weight, norm_bias, w_in, w_out, gate), ("swiglu", ctx.norm, ctx.eps)
        gradients = backward_op(dy, x, hidden, *inputs, *options, list(wanted), ctx.backend)
        dx, dnorm_weight, dnorm_bias, dw_in, dw_out, dgate = only_wanted(gradients, wanted)
        halves = (None, None) if dw_in is None else dw_in.chunk(2)
        return dx, dnorm_weight, dnorm_bias, *halves, dw_out, dgate, None, None, None
