"""Keys and values of all layers in Triton and cuBLAS: norms folded into the weights, then one matmul.

With x̂ the normalised media, which is the same for all layers, and W_l, w_l, b_l a layer's weight and its norm's

    out_l = (x̂ · w_l + b_l) W_lᵀ = x̂ (W_l · w_l)ᵀ + W_l b_l

so a layer's norm costs a pass over its weight, not one over the media. Backward, with P_l = dout_lᵀ x̂ and
s_l = Σ dout_l over all rows, needs no more of the media than x̂:

    dW_l = P_l · w_l + s_l b_lᵀ,   dx̂ = Σ_l dout_l (W_l · w_l)
    dw_l = Σ W_l ∘ P_l,   db_l = Σ W_l · s_l   over the rows of W_l
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from flamingo_kernels.triton import _norm
from flamingo_kernels.triton._rows import check_dtype, gradients, matmul, rows_of

_OP = "media_kv"
# 8 rows share what is read of scale and bias
_FOLD_TILE = {"BR": 8, "BV": 256, "num_warps": 4}
# 16 columns of bf16 are one sector of memory, and few enough that the width of a media makes some 64 programs
_UNFOLD_TILE = {"BR": 128, "BV": 16, "num_warps": 4}


def forward(
    media: Tensor,
    weights: Sequence[Tensor],
    norm_weights: Sequence[Tensor],
    norm_biases: Sequence[Tensor],
    eps: float,
) -> Tensor:
    """out [..., Σ 2·G·D] in the weights' dtype. Shapes as in the public op.

    Raises:
        TypeError: fp64, which these kernels do not have.
    """
    check_dtype(_OP, "weights[0]", weights[0])
    if norm_weights:
        x_hat, _ = _norm.normalize(rows_of(media), None, None, "layer", eps, weights[0].dtype)
        folded, offset = _fold(weights, norm_weights, norm_biases)
        out = torch.addmm(offset, x_hat, folded.T)
    else:
        out = rows_of(media.to(weights[0].dtype)) @ _joined(weights).T
    return out.view(*media.shape[:-1], out.shape[1])


def backward(
    dout: Tensor,
    media: Tensor,
    weights: Sequence[Tensor],
    norm_weights: Sequence[Tensor],
    norm_biases: Sequence[Tensor],
    eps: float,
    wanted: Sequence[bool],
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """dmedia, dweights, dnorm_weights, dnorm_biases; empty where not wanted. `wanted`: in the order of the results."""
    check_dtype(_OP, "weights[0]", weights[0])
    layers, of_media = len(weights), wanted[0]
    of_layer = [any(wanted[1 + i :: layers]) for i in range(layers)]  # its weight or norm
    d, flat, dtype = rows_of(dout), rows_of(media), weights[0].dtype
    x, dmedia = flat, None
    if norm_weights and of_media:
        dx_hat = matmul(d, _fold(weights, norm_weights, norm_biases)[0], media.dtype)
        z = dtype if any(of_layer) else None
        dmedia, x, _ = _norm.backward(dx_hat, flat, None, None, "layer", eps, residual=None, dx=True, z=z, sums=False)
    elif norm_weights and any(of_layer):
        x, _ = _norm.normalize(flat, None, None, "layer", eps, dtype)
    elif of_media:
        dmedia = matmul(d, _joined(weights), media.dtype)

    found = [None] * len(wanted[1:])
    parts = d.split([weight.shape[0] for weight in weights], 1)
    for i, part in enumerate(parts):
        if of_layer[i] and norm_weights:
            layer = (weights[i], norm_weights[i], norm_biases[i])
            found[i::layers] = _unfold(part, x, *layer, wanted[1 + i :: layers])
        elif of_layer[i]:
            found[i] = part.T @ x.to(dtype)
    inputs = (media, *weights, *norm_weights, *norm_biases)
    dmedia, *lists = gradients(inputs, (None if dmedia is None else dmedia.view(media.shape), *found))
    return dmedia, lists[:layers], lists[layers : 2 * layers], lists[2 * layers :]


def _joined(weights: Sequence[Tensor]) -> Tensor:
    return weights[0] if len(weights) == 1 else torch.cat(list(weights))


def _fold(
    weights: Sequence[Tensor], norm_weights: Sequence[Tensor], norm_biases: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """W_l · w_l and W_l b_l of all layers: [Σ 2·G·D, V] and [Σ 2·G·D]."""
    rows, V = sum(weight.shape[0] for weight in weights), weights[0].shape[1]
    folded, offset = weights[0].new_empty((rows, V)), weights[0].new_empty(rows)
    sizes = [weight.shape[0] for weight in weights]
    for weight, *norm, out, out_offset in zip(
        weights, norm_weights, norm_biases, folded.split(sizes), offset.split(sizes), strict=True
    ):
        if weight.shape[0]:
            with torch.cuda.device_of(weight):
                media_kv_fwd_kernel[(triton.cdiv(weight.shape[0], _FOLD_TILE["BR"]),)](
                    *(weight, *_norm.parameters(*norm), out, out_offset, weight.shape[0], V, *weight.stride()),
                    **_FOLD_TILE,
                )
    return folded, offset


def _unfold(
    d: Tensor, x_hat: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dweight, dscale and dbias of a layer; None where not wanted. d [rows, 2·G·D], x_hat [rows, V]."""
    (N, V), (of_weight, of_scale, of_bias) = weight.shape, wanted
    p = matmul(d.T, x_hat, scale.dtype)
    dweight = p if p.dtype == weight.dtype else weight.new_empty((N, V))
    dscale, dbias = (x.new_empty(V) for x in (scale, bias))
    if V:
        with torch.cuda.device_of(d):
            media_kv_bwd_kernel[(triton.cdiv(V, _UNFOLD_TILE["BV"]),)](
                *(p, d.sum(0, dtype=torch.float32), weight, *_norm.parameters(scale, bias)),
                *(dweight, dscale, dbias, N, V, *weight.stride()),
                DWEIGHT=of_weight,
                DSCALE=of_scale,
                DBIAS=of_bias,
                **_UNFOLD_TILE,
            )
    return tuple(dx if of else None for dx, of in zip((dweight, dscale, dbias), wanted, strict=True))


@triton.jit
def media_kv_fwd_kernel(
    weight, scale, bias, folded, offset, rows, V, w_row, w_column, BR: tl.constexpr, BV: tl.constexpr
):
    """folded [rows, V] and offset [rows]. w_row, w_column: the strides of weight.

    Occupancy: 24 warps on a multiprocessor, or more.
    """
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)  # [BR]
    dots = tl.zeros([BR, BV], tl.float32)
    for v0 in range(0, V, BV):
        v = v0 + tl.arange(0, BV)  # [BV]
        keep = (row < rows)[:, None] & (v < V)[None, :]
        at = weight + row[:, None] * w_row + v[None, :].to(tl.int64) * w_column
        w = tl.load(at, mask=keep, other=0.0).to(tl.float32)  # [BR, BV]
        dots += w * tl.load(bias + v, mask=v < V, other=0.0).to(tl.float32)[None, :]
        w *= tl.load(scale + v, mask=v < V, other=0.0).to(tl.float32)[None, :]
        tl.store(folded + row[:, None] * V + v[None, :], w.to(folded.dtype.element_ty), mask=keep)
    tl.store(offset + row, tl.sum(dots, 1).to(offset.dtype.element_ty), mask=row < rows)


@triton.jit
def media_kv_bwd_kernel(
    p,
    s,
    weight,
    scale,
    bias,
    dweight,
    dscale,
    dbias,
    rows,
    V,
    w_row,
    w_column,
    DWEIGHT: tl.constexpr,
    DSCALE: tl.constexpr,
    DBIAS: tl.constexpr,
    BR: tl.constexpr,
    BV: tl.constexpr,
):
    """dweight [rows, V], which may be p, dscale and dbias [V], of a layer. A program owns BV columns.

    p [rows, V] is doutᵀ x̂, s [rows] the sum of dout, fp32. w_row, w_column: the strides of weight.

    Occupancy: 16 warps on a multiprocessor, or more.
    """
    v = tl.program_id(0) * BV + tl.arange(0, BV)  # [BV]
    scale_row = tl.load(scale + v, mask=v < V, other=0.0).to(tl.float32)  # [BV]
    bias_row = tl.load(bias + v, mask=v < V, other=0.0).to(tl.float32)  # [BV]
    sum_scale = tl.zeros([BR, BV], tl.float32)
    sum_bias = tl.zeros([BR, BV], tl.float32)
    for r0 in range(0, rows, BR):
        r = (r0 + tl.arange(0, BR)).to(tl.int64)  # [BR]
        keep = (r < rows)[:, None] & (v < V)[None, :]
        at = r[:, None] * V + v[None, :]
        p_tile = tl.load(p + at, mask=keep, other=0.0).to(tl.float32)  # [BR, BV]
        w = tl.load(weight + r[:, None] * w_row + v[None, :].to(tl.int64) * w_column, mask=keep, other=0.0)
        s_tile = tl.load(s + r, mask=r < rows, other=0.0)  # [BR]
        sum_scale += w.to(tl.float32) * p_tile
        sum_bias += w.to(tl.float32) * s_tile[:, None]
        if DWEIGHT:
            out = p_tile * scale_row[None, :] + s_tile[:, None] * bias_row[None, :]
            tl.store(dweight + at, out.to(dweight.dtype.element_ty), mask=keep)
    if DSCALE:
        tl.store(dscale + v, tl.sum(sum_scale, 0).to(dscale.dtype.element_ty), mask=v < V)
    if DBIAS:
        tl.store(dbias + v, tl.sum(sum_bias, 0).to(dbias.dtype.element_ty), mask=v < V)
