"""Masked cross-attention in Triton: one kernel forward, two backward (dQ; dK with dV). No atomics, no host sync.

A program owns a tile of query rows and reads only the keys between the smallest start and the largest end of its rows,
the tile's hull. The R query heads that share a key head lie side by side in the tile and so share its key tiles.
Backward recomputes the probabilities from lse. Its first kernel gives dQ, the row sums δ = Σ_d do·o and each tile's
hull. Its second owns a block of keys and walks the query tiles from the first to the last whose hull meets the block:
a short run where intervals are monotone, a longer one elsewhere, and right for both, because every score is masked by
its own row's interval.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_OP = "masked_cross_attention"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_HEAD_DIM = 256
# (bytes per element, padded head dim) -> query rows, keys, warps and stages of a tile. Small tiles waste few scores on
# keys that their rows do not see; these keep accumulators in registers (no spills, but for 32 bytes on sm_80 in the
# last kernel at D 128 in full fp32) and inputs in the 99 KiB of shared memory that every chip from sm_80 on has. The
# two backward kernels have the same tiles, for they share the hulls.
_FORWARD = {
    (2, 64): (64, 32, 4, 3),
    (2, 128): (64, 32, 4, 2),
    (2, 256): (32, 32, 4, 2),
    (4, 64): (32, 32, 4, 2),
    (4, 128): (32, 16, 4, 2),
    (4, 256): (16, 16, 4, 2),
}
_BACKWARD = {
    (2, 64): (32, 64, 4, 2),
    (2, 128): (32, 32, 4, 2),
    (2, 256): (32, 32, 8, 1),
    (4, 64): (32, 32, 4, 2),
    (4, 128): (16, 32, 4, 2),
    (4, 256): (16, 16, 4, 2),
}
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_SCAN = tl.constexpr(256)  # hulls looked at together


def forward(q: Tensor, k: Tensor, v: Tensor, start: Tensor, end: Tensor, softmax_scale: float) -> tuple[Tensor, Tensor]:
    """o [B, T, H, D] contiguous in q's dtype, lse fp32 [B, H, T]. Shapes as in the public op.

    Raises:
        TypeError: fp64, which these kernels do not have.
        ValueError: D > 256, or intervals of CPU tensors outside 0..K; on a GPU they are clamped.
    """
    _check(q, k, start, end)
    B, T, H, D = q.shape
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, T), dtype=torch.float32, device=q.device)
    if lse.numel() == 0:
        return o, lse
    K, G = k.shape[1:3]
    q, k, v = _rowwise(q), _rowwise(k), _rowwise(v)
    tile = _tile(_FORWARD, q, T * (H // G))
    tiles = triton.cdiv(T * (H // G), tile["BM"])
    with torch.cuda.device_of(q):
        masked_cross_attention_fwd_kernel[(tiles * G * B,)](
            *(q, k, v, start.contiguous(), end.contiguous(), o, lse),
            *(softmax_scale, T, K, G, B // k.shape[0]),
            *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3]),
            R=H // G,
            D=D,
            **tile,
        )
    return o, lse


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    end: Tensor,
    o: Tensor,
    lse: Tensor,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, contiguous in the inputs' dtypes; dk and dv sum over the heads and rows that share keys.

    Raises: as forward.
    """
    _check(q, k, start, end)
    B, T, H, D = q.shape
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if lse.numel() == 0:
        return dq, dk.zero_(), dv.zero_()
    K, G = k.shape[1:3]
    do, q, k, v = _rowwise(do), _rowwise(q), _rowwise(k), _rowwise(v)
    start, end, o, lse = start.contiguous(), end.contiguous(), o.contiguous(), lse.contiguous()
    tile = _tile(_BACKWARD, q, T * (H // G))
    tiles = triton.cdiv(T * (H // G), tile["BM"])
    delta = torch.empty_like(lse)
    hull = torch.empty((B, tiles, 2), dtype=torch.int32, device=q.device)
    scalars = (softmax_scale, T, K, G, B // k.shape[0])
    strides = (*do.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    with torch.cuda.device_of(q):
        masked_cross_attention_bwd_dq_kernel[(tiles * G * B,)](
            *(do, q, k, v, start, end, o, lse, delta, hull, dq), *scalars, *strides, R=H // G, D=D, **tile
        )
        if dk.numel():
            masked_cross_attention_bwd_dkdv_kernel[(triton.cdiv(K, tile["BK"]) * G * k.shape[0],)](
                *(do, q, k, v, start, end, lse, delta, hull, dk, dv), *scalars, *strides, R=H // G, D=D, **tile
            )
    return dq, dk, dv


def _check(q: Tensor, k: Tensor, start: Tensor, end: Tensor) -> None:
    if q.dtype not in _DTYPES:
        raise TypeError(
            f"{_OP}: q must be of dtype float32, bfloat16 or float16 on the triton backend, got {q.dtype}: use the "
            "reference or the cpu backend"
        )
    if q.shape[3] > _MAX_HEAD_DIM:
        raise ValueError(
            f"{_OP}: q must have a head dim of at most {_MAX_HEAD_DIM} on the triton backend, got {q.shape[3]}"
        )
    K = k.shape[1]
    if (
        start.device.type == "cpu"
        and start.numel()
        and not bool(((start >= 0) & (end >= 0) & (start <= K) & (end <= K)).all())
    ):
        raise ValueError(
            f"{_OP}: intervals must lie within 0..{K}, the key axis, got start in [{start.min()}, {start.max()}] and "
            f"end in [{end.min()}, {end.max()}]"
        )


def _rowwise(x: Tensor) -> Tensor:
    """x with its rows of D elements in one piece; copied only if they are not."""
    return x if x.stride(3) == 1 else x.contiguous()


def _tile(table: dict, q: Tensor, rows: int) -> dict[str, int | str]:
    """Tile sizes and launch options for `rows` query rows per key head."""
    BD = max(16, triton.next_power_of_2(q.shape[3]))
    BM, BK, warps, stages = table[q.element_size(), max(64, BD)]
    return {
        "BM": min(BM, max(32, triton.next_power_of_2(rows))),  # decoding: no tile of 64 rows for one token
        "BK": BK,
        "BD": BD,
        "PRECISION": "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee",
        "num_warps": warps,
        "num_stages": stages,
    }


@triton.jit
def _place(tiles, G):
    """A program's tile, head and row. Tiles that read the same keys run next to each other, while L2 holds those."""
    program = tl.program_id(0)
    return program % tiles, program // tiles % G, (program // tiles // G).to(tl.int64)


@triton.jit
def _intervals(start, end, row, rows, K, R: tl.constexpr):
    """The keys that query rows of one batch row see, clamped to 0..K; rows outside 0..rows see none."""
    exists = (row >= 0) & (row < rows)
    lo = tl.load(start + row // R, mask=exists, other=0)  # [BM]
    hi = tl.load(end + row // R, mask=exists, other=0)  # [BM]
    return tl.maximum(lo, 0), tl.minimum(hi, K)


@triton.jit
def _hull(lo, hi, K):
    """The smallest start and the largest end over the rows that see something; (K, 0) where none does."""
    return tl.min(tl.where(lo < hi, lo, K), 0), tl.max(tl.where(lo < hi, hi, 0), 0)


@triton.jit
def _may_have_gaps(lo, hi, start, end, row, rows, K, R: tl.constexpr, BM: tl.constexpr):
    """Whether a tile's hull may hold keys that none of its rows sees.

    It holds none if the keys of every row that sees something, the first such row apart, touch those of the row before.
    """
    lo_before, hi_before = _intervals(start, end, row - 1, rows, K, R)
    touches = (row % BM > 0) & (lo_before < hi_before) & (lo <= hi_before) & (lo_before <= hi)
    return tl.sum(((lo < hi) & ~touches).to(tl.int32), 0) > 1


@triton.jit
def _safe(keys, visible, gaps):
    """The keys of a block to load. One that no row sees stays out, since 0 times its NaN would be NaN."""
    if gaps:
        keys = keys & (tl.max(visible.to(tl.int32), 0) > 0)
    return keys


@triton.jit
def _weights(s, lse):
    """A softmax's weights, at most 1: where scores are huge, the rounding of lse alone would bring more."""
    return tl.exp2(tl.minimum((s - lse) * _LOG2E, 0.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def _exp(x):
    """Of differences of scores. Only these go to base 2: scores in base 2 would be rounded once more, and by another
    factor than the one that backward computes them with.
    """
    return tl.exp2(x * _LOG2E)


@triton.jit
def _load(rows, keep, D: tl.constexpr, BD: tl.constexpr):
    """A tile [rows, BD] from pointers to rows of D elements; 0 behind D and where a row is not kept."""
    d = tl.arange(0, BD)
    return tl.load(rows[:, None] + d[None, :], mask=keep[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _store(rows, tile, keep, D: tl.constexpr, BD: tl.constexpr):
    d = tl.arange(0, BD)
    tl.store(rows[:, None] + d[None, :], tile.to(rows.dtype.element_ty), mask=keep[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["T", "K"])  # lengths vary from call to call
def masked_cross_attention_fwd_kernel(
    q,
    k,
    v,
    start,
    end,
    o,
    lse,
    softmax_scale,
    T,
    K,
    G,
    ROWS,
    q_b,
    q_t,
    q_h,
    k_b,
    k_j,
    k_h,
    v_b,
    v_j,
    v_h,
    R: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """o and lse, by an online softmax. Batch row b reads the keys of row b // ROWS.

    x_b, x_t or x_j, and x_h are the strides of x, in elements, over rows, tokens or keys, and heads.
    """
    tile, g, b = _place(tl.cdiv(T * R, BM), G)
    row = tile * BM + tl.arange(0, BM)  # [BM], token by token, the R query heads of a token side by side
    t, h = row // R, g * R + row % R
    start, end = start + b * T, end + b * T
    lo, hi = _intervals(start, end, row, T * R, K, R)
    gaps = _may_have_gaps(lo, hi, start, end, row, T * R, K, R, BM)
    q_tile = _load(q + b * q_b + t.to(tl.int64) * q_t + h.to(tl.int64) * q_h, lo < hi, D, BD)  # [BM, BD]
    k += b // ROWS * k_b + g.to(tl.int64) * k_h
    v += b // ROWS * v_b + g.to(tl.int64) * v_h
    scale = tl.cast(softmax_scale, tl.float32)

    acc = tl.zeros([BM, BD], tl.float32)
    top = tl.full([BM], float("-inf"), tl.float32)  # the largest score so far
    total = tl.zeros([BM], tl.float32)
    first, last = _hull(lo, hi, K)
    for j0 in range(first, last, BK):
        j = j0 + tl.arange(0, BK)  # [BK]
        visible = (j[None, :] >= lo[:, None]) & (j[None, :] < hi[:, None])  # [BM, BK]
        keys = _safe(j < last, visible, gaps)
        k_tile = _load(k + j.to(tl.int64) * k_j, keys, D, BD)  # [BK, BD]
        v_tile = _load(v + j.to(tl.int64) * v_j, keys, D, BD)  # [BK, BD]
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale
        s = tl.where(visible, s, float("-inf"))  # [BM, BK]
        new_top = tl.maximum(top, tl.max(s, 1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # rows that have seen nothing yet
        p = _exp(s - shift[:, None])  # [BM, BK]
        shrink = _exp(top - shift)
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision=PRECISION)
        top = new_top

    nothing = total == 0
    total = tl.where(nothing, 1.0, total)
    _store(o + ((b * T + t) * (G * R) + h) * D, acc / total[:, None], row < T * R, D, BD)
    log_sum = tl.where(nothing, float("-inf"), top + tl.log2(total) * _LN2)
    tl.store(lse + (b * (G * R) + h) * T + t, log_sum, mask=row < T * R)


@triton.jit(do_not_specialize=["T", "K"])
def masked_cross_attention_bwd_dq_kernel(
    do,
    q,
    k,
    v,
    start,
    end,
    o,
    lse,
    delta,
    hull,
    dq,
    softmax_scale,
    T,
    K,
    G,
    ROWS,
    do_b,
    do_t,
    do_h,
    q_b,
    q_t,
    q_h,
    k_b,
    k_j,
    k_h,
    v_b,
    v_j,
    v_h,
    R: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq; and for the other kernel delta [B, H, T] and hull [B, tiles, 2], the first and last key of each tile."""
    tiles = tl.cdiv(T * R, BM)
    tile, g, b = _place(tiles, G)
    row = tile * BM + tl.arange(0, BM)  # [BM]
    t, h = row // R, g * R + row % R
    start, end = start + b * T, end + b * T
    lo, hi = _intervals(start, end, row, T * R, K, R)
    gaps = _may_have_gaps(lo, hi, start, end, row, T * R, K, R, BM)
    first, last = _hull(lo, hi, K)
    if g == 0:
        tl.store(hull + (b * tiles + tile) * 2, first)
        tl.store(hull + (b * tiles + tile) * 2 + 1, last)

    sees = lo < hi
    do_tile = _load(do + b * do_b + t.to(tl.int64) * do_t + h.to(tl.int64) * do_h, sees, D, BD)  # [BM, BD]
    o_tile = _load(o + ((b * T + t) * (G * R) + h) * D, sees, D, BD)  # [BM, BD]
    stat = (b * (G * R) + h) * T + t
    delta_row = tl.sum(do_tile.to(tl.float32) * o_tile.to(tl.float32), 1)  # [BM]
    tl.store(delta + stat, delta_row, mask=row < T * R)
    lse_row = tl.load(lse + stat, mask=sees, other=0.0)  # [BM]
    q_tile = _load(q + b * q_b + t.to(tl.int64) * q_t + h.to(tl.int64) * q_h, sees, D, BD)  # [BM, BD]
    k += b // ROWS * k_b + g.to(tl.int64) * k_h
    v += b // ROWS * v_b + g.to(tl.int64) * v_h
    scale = tl.cast(softmax_scale, tl.float32)

    acc = tl.zeros([BM, BD], tl.float32)
    for j0 in range(first, last, BK):
        j = j0 + tl.arange(0, BK)  # [BK]
        visible = (j[None, :] >= lo[:, None]) & (j[None, :] < hi[:, None])  # [BM, BK]
        keys = _safe(j < last, visible, gaps)
        k_tile = _load(k + j.to(tl.int64) * k_j, keys, D, BD)  # [BK, BD]
        v_tile = _load(v + j.to(tl.int64) * v_j, keys, D, BD)  # [BK, BD]
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale  # [BM, BK]
        p = _weights(s, lse_row[:, None])
        dp = tl.dot(do_tile, tl.trans(v_tile), input_precision=PRECISION)  # [BM, BK]
        ds = tl.where(visible, p * (dp - delta_row[:, None]), 0.0)
        acc = tl.dot(ds.to(k_tile.dtype), k_tile, acc, input_precision=PRECISION)
    _store(dq + ((b * T + t) * (G * R) + h) * D, acc * scale, row < T * R, D, BD)


@triton.jit(do_not_specialize=["T", "K"])
def masked_cross_attention_bwd_dkdv_kernel(
    do,
    q,
    k,
    v,
    start,
    end,
    lse,
    delta,
    hull,
    dk,
    dv,
    softmax_scale,
    T,
    K,
    G,
    ROWS,
    do_b,
    do_t,
    do_h,
    q_b,
    q_t,
    q_h,
    k_b,
    k_j,
    k_h,
    v_b,
    v_j,
    v_h,
    R: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk and dv of one block of keys, summed over the batch rows and query heads that read it."""
    block, g, kv_b = _place(tl.cdiv(K, BK), G)
    tiles = tl.cdiv(T * R, BM)
    j = block * BK + tl.arange(0, BK)  # [BK]
    k_tile = _load(k + kv_b * k_b + g.to(tl.int64) * k_h + j.to(tl.int64) * k_j, j < K, D, BD)  # [BK, BD]
    v_tile = _load(v + kv_b * v_b + g.to(tl.int64) * v_h + j.to(tl.int64) * v_j, j < K, D, BD)  # [BK, BD]
    scale = tl.cast(softmax_scale, tl.float32)

    dk_acc = tl.zeros([BK, BD], tl.float32)
    dv_acc = tl.zeros([BK, BD], tl.float32)
    for b in range(kv_b * ROWS, kv_b * ROWS + ROWS):
        first, last = _run(hull + b * tiles * 2, tiles, block * BK, block * BK + BK)
        for tile in range(first, last):
            row = tile * BM + tl.arange(0, BM)  # [BM]
            t, h = row // R, g * R + row % R
            lo, hi = _intervals(start + b * T, end + b * T, row, T * R, K, R)
            exists = row < T * R  # masked by existence, not by sight, so that these loads wait for no other
            stat = (b * (G * R) + h) * T + t
            lse_row = tl.load(lse + stat, mask=exists, other=0.0)  # [BM]
            delta_row = tl.load(delta + stat, mask=exists, other=0.0)  # [BM]
            q_tile = _load(q + b * q_b + t.to(tl.int64) * q_t + h.to(tl.int64) * q_h, exists, D, BD)  # [BM, BD]
            do_tile = _load(do + b * do_b + t.to(tl.int64) * do_t + h.to(tl.int64) * do_h, exists, D, BD)  # [BM, BD]
            visible = (j[:, None] >= lo[None, :]) & (j[:, None] < hi[None, :])  # [BK, BM]
            s = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION) * scale  # [BK, BM]
            p = tl.where(visible, _weights(s, lse_row[None, :]), 0.0)
            dv_acc = tl.dot(p.to(do_tile.dtype), do_tile, dv_acc, input_precision=PRECISION)
            dp = tl.dot(v_tile, tl.trans(do_tile), input_precision=PRECISION)  # [BK, BM]
            ds = tl.where(visible, p * (dp - delta_row[None, :]), 0.0)
            dk_acc = tl.dot(ds.to(q_tile.dtype), q_tile, dk_acc, input_precision=PRECISION)
    row = (kv_b * K + j) * G + g
    _store(dk + row * D, dk_acc * scale, j < K, D, BD)
    _store(dv + row * D, dv_acc, j < K, D, BD)


@triton.jit
def _run(hull, tiles, j0, j1):
    """The first of the query tiles whose hull meets the keys j0 <= j < j1, and the last of them plus 1."""
    first, last = tiles, 0
    for i0 in range(0, tiles, _SCAN):
        i = i0 + tl.arange(0, _SCAN)  # [SCAN]
        lo = tl.load(hull + i * 2, mask=i < tiles, other=0)
        hi = tl.load(hull + i * 2 + 1, mask=i < tiles, other=0)
        meets = (lo < j1) & (hi > j0)
        first = tl.minimum(first, tl.min(tl.where(meets, i, tiles), 0))
        last = tl.maximum(last, tl.max(tl.where(meets, i + 1, 0), 0))
    return first, last
