"""Both halves of the gated block on a GPU, one pass where one's residual ends and the other's norm begins.

    y = x + tanh(gate)·(attention(norm(x) w_qᵀ, k, v) w_outᵀ),  z = y + tanh(ff_gate)·(act(ff_norm(y) w_inᵀ) w_backᵀ)

Forward, eight launches of which four are matmuls: norm, matmul, attention, matmul; then the pass that reads x and what
attention adds to it, and writes y and ff_norm(y); matmul, activation, matmul. A gate per channel takes a launch more.
Backward is that of the halves.
"""

from torch import Tensor

from flamingo_kernels._gpu import gated_cross_attention, gated_mlp
from flamingo_kernels._gpu.kernels import Kernels
from flamingo_kernels._gpu.rows import contiguous, is_vector, rows_of


def forward(
    kernels: Kernels,
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    w_q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    end: Tensor,
    w_out: Tensor,
    gate: Tensor | None,
    norm: str,
    eps: float,
    softmax_scale: float,
    ff_norm_weight: Tensor | None,
    ff_norm_bias: Tensor | None,
    w_in: Tensor,
    w_back: Tensor,
    ff_gate: Tensor | None,
    activation: str,
    ff_norm: str,
    ff_eps: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """z [B, T, C] in x's dtype, the queries, o and lse; y and the activation's input, or [0] for each unless save.

    Raises: as the halves.
    """
    branch, q, o, lse = gated_cross_attention.branch(
        kernels, x, norm_weight, norm_bias, w_q, k, v, start, end, w_out, norm, eps, softmax_scale
    )
    in_place = gated_mlp.adds_in_place(x, w_in, ff_gate)
    options = (*contiguous(ff_norm_weight, ff_norm_bias), ff_norm, ff_eps, w_in.dtype, in_place and save)
    if is_vector(gate):
        y = kernels.add(rows_of(x), branch, *contiguous(gate))
        normed, copy = kernels.normalize(y, *options)
    else:
        y, normed, copy = kernels.add_normalize(rows_of(x), branch, *contiguous(gate), *options)
    into = (copy if save else y) if in_place else None
    z, hidden = gated_mlp.behind_norm(kernels, normed, y, into, w_in, w_back, ff_gate, activation)
    z = z.view(x.shape)
    if not save:
        return z, q, o, lse, x.new_empty(0), w_in.new_empty(0)
    return z, q, o, lse, y.view(x.shape), hidden.view(*x.shape[:-1], w_in.shape[0])
