"""Masked cross-attention in Triton: one kernel forward, two backward. No atomics, no host sync.

Forward: a program owns some query rows and reads, tile by tile, only the keys between the smallest start and the
largest end of a tile's rows, the tile's hull. Tiles are cut where one run of rows that share keys ends and the next
begins, so that neighbours do not read the same media.

Backward: a small first kernel finds, for each batch row and block of keys, the run of tokens that see any of it, takes
δ = Σ_d do·o, and gives dQ = 0 of rows that see nothing. In the second, a program of the first kind owns a block of keys
and walks its run: that gives dK and dV, and dQ of the rows whose keys all lie in this block, from one reading of q, k,
v and do. A program of the second kind owns a tile of query rows and gives dQ of those that see several blocks, over the
hull of these alone. With "latest" intervals and blocks that divide the media there are none, and it returns at once.
Runs are short where intervals are monotone, longer elsewhere, and right for both: every score is masked by its own
row's interval.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flamingo_kernels._gpu.positions import check_intervals
from flamingo_kernels._gpu.sizes import cdiv
from flamingo_kernels.triton._attention import (
    add_to_keys,
    add_to_queries,
    at,
    check,
    load,
    nothing_seen,
    place,
    result,
    row_sums,
    rowwise,
    see,
    store,
    tile_of,
)
from flamingo_kernels.triton._tuning import launch

_OP = "masked_cross_attention"
# (bytes per element, padded head dim) -> query rows, keys, warps and stages of a tile. None spills registers
# on any chip from sm_80 to sm_120, and inputs fit in the 99 KiB of shared memory each has. Forward: small tiles
# waste few scores on keys that their rows do not see. Backward: 64 keys wherever they fit, since the blocks of a media
# of 64 latents are then whole media and "latest" needs one pass; runs of a few dozen rows ask for few rows in a tile.
_FORWARD = {
    (2, 64): (64, 32, 4, 3),
    (2, 128): (64, 32, 8, 2),
    (2, 256): (32, 32, 4, 2),
    (4, 64): (32, 32, 4, 2),
    (4, 64, "ieee"): (32, 32, 8, 2),
    (4, 128): (32, 16, 4, 2),
    (4, 128, "ieee"): (32, 16, 8, 2),
    (4, 256): (16, 16, 4, 2),
}
_BACKWARD = {
    (2, 64): (32, 64, 4, 2),
    (2, 128): (32, 64, 8, 2),
    (2, 256): (32, 32, 8, 1),
    (4, 64): (16, 64, 8, 1),
    (4, 128): (16, 32, 8, 2),
    (4, 128, "ieee"): (16, 16, 8, 2),
    (4, 256): (16, 16, 4, 2),
}
# Of a program that finds runs: its tokens, whose intervals it reads once, its key blocks, and how many of these at a
# time. 64 key blocks are 64 media: only longer prompts have their intervals read again.
_RUNS = {"BT": 256, "BP": 64, "BB": 4}


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
    q, k, v = rowwise(q), rowwise(k), rowwise(v)
    tile = tile_of(_FORWARD, q, T * (H // G))
    tiles = cdiv(T * (H // G), tile["BM"])
    with torch.cuda.device_of(q):
        launch(
            masked_cross_attention_fwd_kernel,
            tiles * G * B,
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
    do, q, k, v = rowwise(do), rowwise(q), rowwise(k), rowwise(v)
    start, end, o, lse = start.contiguous(), end.contiguous(), o.contiguous(), lse.contiguous()
    tile = tile_of(_BACKWARD, q, T * (H // G))
    blocks = cdiv(K, tile["BK"])
    tiles = cdiv(T * (H // G), tile["BM"])
    chunks = cdiv(T, _RUNS["BT"])
    runs = torch.empty((B, blocks, 3, chunks), dtype=torch.int32, device=q.device)
    spanning = torch.empty((B, chunks), dtype=torch.int32, device=q.device)
    delta = torch.empty_like(lse)
    with torch.cuda.device_of(q):
        of_runs = cdiv(blocks, _RUNS["BP"]) * chunks * B
        masked_cross_attention_bwd_prepare_kernel[(of_runs + tiles * G * B,)](
            *(do, o, lse, start, end, runs, spanning, delta, dq, of_runs, T, K, G, *do.stride()[:3]),
            R=H // G,
            D=D,
            **{name: tile[name] for name in ("BD", "BM", "BK", "num_warps", "num_stages")},
            **_RUNS,
        )
        of_keys = blocks * G * k.shape[0]
        launch(
            masked_cross_attention_bwd_kernel,
            of_keys + tiles * G * B,
            *(do, q, k, v, start, end, lse, runs, spanning, delta, dq, dk, dv),
            *(softmax_scale, of_keys, T, K, G, B // k.shape[0]),
            *(*do.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3]),
            R=H // G,
            D=D,
            BT=_RUNS["BT"],
            **tile,
        )
    return dq, dk, dv


def _check(q: Tensor, k: Tensor, start: Tensor, end: Tensor) -> None:
    check(_OP, q)
    check_intervals(_OP, start, end, k.shape[1])


@triton.jit
def _intervals(start, end, row, rows, K, R: tl.constexpr):
    """The keys that query rows of one batch row see, clamped to 0..K; rows outside 0..rows see none."""
    exists = (row >= 0) & (row < rows)
    lo = tl.load(start + row // R, mask=exists, other=0)  # [BM]
    hi = tl.load(end + row // R, mask=exists, other=0)  # [BM]
    return tl.maximum(lo, 0), tl.minimum(hi, K)


@triton.jit
def _spanning(lo, hi, BK: tl.constexpr):
    """The intervals that reach over a border between key blocks; empty, 0 and 0, in place of the others."""
    spans = (lo < hi) & (lo // BK != (hi - 1) // BK)
    return tl.where(spans, lo, 0), tl.where(spans, hi, 0)


@triton.jit
def _hull(lo, hi, K):
    """The smallest start and the largest end over the rows that see something; (K, 0) where none does."""
    return tl.min(tl.where(lo < hi, lo, K), 0), tl.max(tl.where(lo < hi, hi, 0), 0)


@triton.jit
def _cut(start, end, row, rows, R: tl.constexpr, BM: tl.constexpr):
    """Where the query rows before `row` end: at the last of the BM rows up to it that sees none of the keys before.

    More exactly, whose token starts at or behind the end of the token before. Where none does: at `row`. What decides
    lies beside the cut, so cuts of increasing rows increase, whatever the intervals.
    """
    near = row - tl.arange(0, BM)  # [BM]
    inside = (near > 0) & (row < rows) & (near % R == 0)
    ended = tl.load(end + near // R - 1, mask=inside, other=1)  # [BM]
    starts = tl.load(start + near // R, mask=inside, other=0)  # [BM]
    cut = tl.max(tl.where(ended <= starts, near, 0), 0)
    return tl.where(cut > 0, cut, tl.minimum(row, rows))


@triton.jit
def _may_have_gaps(lo, hi, lo_before, hi_before, row, BM: tl.constexpr):
    """Whether a tile's hull may hold keys that none of its rows sees. lo_before, hi_before: of the rows before.

    It holds none if the keys of every row that sees something, the first such row apart, touch those of the row before.
    """
    touches = (row % BM > 0) & (lo_before < hi_before) & (lo <= hi_before) & (lo_before <= hi)
    return tl.sum(((lo < hi) & ~touches).to(tl.int32), 0) > 1


@triton.jit
def _safe(keys, visible, gaps):
    """The keys of a block to load. One that no row sees stays out, since 0 times its NaN would be NaN."""
    if gaps:
        keys = keys & (tl.max(visible.to(tl.int32), 0) > 0)
    return keys


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

    There is a program for every BM query rows, as many as without cuts, and 256 at of3b and at shots32. One that has
    more than BM rows because the cut in front of it is early (two runs of 42, say) takes them in two tiles or three,
    each with fewer keys than one tile across the runs would have.

    Occupancy: 4 warps on a multiprocessor, or more.
    """
    tile, g, b = place(tl.program_id(0), tl.cdiv(T * R, BM), G)
    start, end = start + b * T, end + b * T
    k += b // ROWS * k_b + g.to(tl.int64) * k_h
    v += b // ROWS * v_b + g.to(tl.int64) * v_h
    scale = tl.cast(softmax_scale, tl.float32)
    row0, stop = _cut(start, end, tile * BM, T * R, R, BM), _cut(start, end, tile * BM + BM, T * R, R, BM)
    while row0 < stop:
        until = _cut(start, end, row0 + BM, stop, R, BM)
        row = row0 + tl.arange(0, BM)  # [BM]
        t, h = row // R, g * R + row % R
        lo, hi = _intervals(start, end, row, until, K, R)
        gaps = tl.max(tl.where(lo < hi, lo, 0), 0) > tl.min(tl.where(lo < hi, hi, K), 0)
        if gaps:  # else all touch
            lo_before, hi_before = _intervals(start, end, row - 1, until, K, R)
            gaps = _may_have_gaps(lo, hi, lo_before, hi_before, row - row0, BM)
        q_tile = load(at(q, b, t, h, q_b, q_t, q_h), lo < hi, D, BD)  # [BM, BD]

        acc, top, total = nothing_seen(BM, BD)
        first, last = _hull(lo, hi, K)
        for j0 in range(first, last, BK):
            j = j0 + tl.arange(0, BK)  # [BK]
            visible = (j[None, :] >= lo[:, None]) & (j[None, :] < hi[:, None])  # [BM, BK]
            keys = _safe(j < last, visible, gaps)
            k_tile = load(k + j.to(tl.int64) * k_j, keys, D, BD)  # [BK, BD]
            v_tile = load(v + j.to(tl.int64) * v_j, keys, D, BD)  # [BK, BD]
            acc, top, total = see(q_tile, k_tile, v_tile, visible, scale, acc, top, total, PRECISION)

        o_tile, log_sum = result(acc, top, total)
        store(o + ((b * T + t) * (G * R) + h) * D, o_tile, row < until, D, BD)
        tl.store(lse + (b * (G * R) + h) * T + t, log_sum, mask=row < until)
        row0 = until


@triton.jit(do_not_specialize=["of_runs", "T", "K"])
def masked_cross_attention_bwd_prepare_kernel(
    do,
    o,
    lse,
    start,
    end,
    runs,
    spanning,
    delta,
    dq,
    of_runs,
    T,
    K,
    G,
    do_b,
    do_t,
    do_h,
    R: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BT: tl.constexpr,
    BP: tl.constexpr,
    BB: tl.constexpr,
):
    """The first `of_runs` programs look at the intervals of BT tokens, the others at a tile of query rows.

    runs [B, blocks, 3, chunks]: of each chunk of BT tokens the first and the last (plus 1) that see any key of a block,
    and 1 if one sees all of it. spanning [B, chunks]: 1 if one sees keys of several blocks.
    delta [B, H, T]: Σ_d do·o, without reading rows that see nothing; their dq is 0.

    Occupancy: 24 warps on a multiprocessor, or more.
    """
    program = tl.program_id(0)
    if program < of_runs:
        blocks, chunks = tl.cdiv(K, BK), tl.cdiv(T, BT)
        part, chunk, b = place(program, tl.cdiv(blocks, BP), chunks)
        token = chunk * BT + tl.arange(0, BT)  # [BT]
        lo, hi = _intervals(start + b * T, end + b * T, token, T, K, 1)
        span_lo, span_hi = _spanning(lo, hi, BK)
        tl.store(spanning + b * chunks + chunk, tl.max((span_lo < span_hi).to(tl.int32), 0), mask=part == 0)
        for block0 in range(part * BP, tl.minimum(part * BP + BP, blocks), BB):
            block = block0 + tl.arange(0, BB)  # [BB]
            j0, j1 = block * BK, tl.minimum(block * BK + BK, K)
            sees = (lo < hi)[:, None] & (lo[:, None] < j1[None, :]) & (hi[:, None] > j0[None, :])  # [BT, BB]
            all_of_it = (lo[:, None] <= j0[None, :]) & (hi[:, None] >= j1[None, :])  # [BT, BB]
            out = runs + (b * blocks + block) * 3 * chunks + chunk  # [BB]
            tl.store(out, tl.min(tl.where(sees, token[:, None], T), 0), mask=block < blocks)
            tl.store(out + chunks, tl.max(tl.where(sees, token[:, None] + 1, 0), 0), mask=block < blocks)
            tl.store(out + 2 * chunks, tl.max(all_of_it.to(tl.int32), 0), mask=block < blocks)
    else:
        tile, g, b = place(program - of_runs, tl.cdiv(T * R, BM), G)
        row = tile * BM + tl.arange(0, BM)  # [BM]
        t, h = row // R, g * R + row % R
        stat = (b * (G * R) + h) * T + t
        sees = tl.load(lse + stat, mask=row < T * R, other=float("-inf")) != float("-inf")
        of_row = ((b * T + t) * (G * R) + h) * D
        delta_row, _do_tile = row_sums(at(do, b, t, h, do_b, do_t, do_h), o + of_row, sees, D, BD)
        tl.store(delta + stat, delta_row, mask=row < T * R)
        store(dq + of_row, tl.zeros([BM, BD], tl.float32), ~sees & (row < T * R), D, BD)


@triton.jit
def _run(runs, block, b, T, K, BK: tl.constexpr, BT: tl.constexpr):
    """The run of tokens of a batch row that see any key of a block, and whether one sees all of it."""
    chunks = tl.cdiv(T, BT)
    run = runs + (b * tl.cdiv(K, BK) + block) * 3 * chunks
    first, last, whole = T, 0, 0
    for chunk0 in range(0, chunks, 16):
        chunk = chunk0 + tl.arange(0, 16)  # [16]
        first = tl.minimum(first, tl.min(tl.load(run + chunk, mask=chunk < chunks, other=T), 0))
        last = tl.maximum(last, tl.max(tl.load(run + chunks + chunk, mask=chunk < chunks, other=0), 0))
        whole = tl.maximum(whole, tl.max(tl.load(run + 2 * chunks + chunk, mask=chunk < chunks, other=0), 0))
    return first, last, whole


@triton.jit
def _seen(j, start, end, runs, block, kv_b, T, K, ROWS, BK: tl.constexpr, BT: tl.constexpr):
    """Which keys of a block any token sees, [BK]. Each is looked at only where no token sees them all."""
    whole = 0
    for b in range(kv_b * ROWS, kv_b * ROWS + ROWS):
        _, _, sees_all = _run(runs, block, b, T, K, BK, BT)
        whole = tl.maximum(whole, sees_all)
    keys = j < K
    if whole == 0:
        seen = tl.zeros([BK], tl.int32)
        for b in range(kv_b * ROWS, kv_b * ROWS + ROWS):
            first, last, _ = _run(runs, block, b, T, K, BK, BT)
            for t0 in range(first, last, 32):
                lo, hi = _intervals(start + b * T, end + b * T, t0 + tl.arange(0, 32), last, K, 1)
                visible = (j[:, None] >= lo[None, :]) & (j[:, None] < hi[None, :])  # [BK, 32]
                seen = tl.maximum(seen, tl.max(visible.to(tl.int32), 1))
        keys = keys & (seen > 0)
    return keys


@triton.jit(do_not_specialize=["of_keys", "T", "K"])
def masked_cross_attention_bwd_kernel(
    do,
    q,
    k,
    v,
    start,
    end,
    lse,
    runs,
    spanning,
    delta,
    dq,
    dk,
    dv,
    softmax_scale,
    of_keys,
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
    BT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The first `of_keys` programs own a block of keys, the others a tile of query rows.

    The former give dk and dv, over all rows and heads that read the block, and dq of the rows that read nothing else;
    the latter dq of the rows that read several blocks.

    Occupancy: 8 warps on a multiprocessor, or more.
    """
    program = tl.program_id(0)
    scale = tl.cast(softmax_scale, tl.float32)
    if program < of_keys:
        block, g, kv_b = place(program, tl.cdiv(K, BK), G)
        j = block * BK + tl.arange(0, BK)  # [BK]
        keys = _seen(
            j, start, end, runs, block, kv_b, T, K, ROWS, BK, BT
        )  # 0 times the NaN of a key unseen would be NaN
        k_tile = load(at(k, kv_b, j, g, k_b, k_j, k_h), keys, D, BD)  # [BK, BD]
        v_tile = load(at(v, kv_b, j, g, v_b, v_j, v_h), keys, D, BD)  # [BK, BD]
        dk_acc = tl.zeros([BK, BD], tl.float32)
        dv_acc = tl.zeros([BK, BD], tl.float32)
        for b in range(kv_b * ROWS, kv_b * ROWS + ROWS):
            first, last, _ = _run(runs, block, b, T, K, BK, BT)
            for row0 in range(first * R, last * R, BM):
                row = row0 + tl.arange(0, BM)  # [BM]
                t, h = row // R, g * R + row % R
                keep = row < last * R  # not each row's own sight, so that these loads wait for no other
                lo, hi = _intervals(start + b * T, end + b * T, row, last * R, K, R)
                stat = (b * (G * R) + h) * T + t
                lse_row = tl.load(lse + stat, mask=keep, other=0.0)  # [BM]
                delta_row = tl.load(delta + stat, mask=keep, other=0.0)  # [BM]
                q_tile = load(at(q, b, t, h, q_b, q_t, q_h), keep, D, BD)  # [BM, BD]
                do_tile = load(at(do, b, t, h, do_b, do_t, do_h), keep, D, BD)  # [BM, BD]
                visible = (j[:, None] >= lo[None, :]) & (j[:, None] < hi[None, :])  # [BK, BM]
                dk_acc, dv_acc, ds = add_to_keys(
                    k_tile, v_tile, q_tile, do_tile, lse_row, delta_row, visible, scale, dk_acc, dv_acc, PRECISION
                )
                inside = (lo < hi) & (lo >= block * BK) & (hi <= block * BK + BK)
                if tl.max(inside.to(tl.int32), 0) > 0:
                    dq_tile = tl.dot(tl.trans(ds), k_tile, input_precision=PRECISION)  # [BM, BD]
                    store(dq + ((b * T + t) * (G * R) + h) * D, dq_tile * scale, inside, D, BD)
        out = ((kv_b * K + j) * G + g) * D
        store(dk + out, dk_acc * scale, j < K, D, BD)
        store(dv + out, dv_acc, j < K, D, BD)
    else:
        tile, g, b = place(program - of_keys, tl.cdiv(T * R, BM), G)
        row = tile * BM + tl.arange(0, BM)  # [BM]
        t, h = row // R, g * R + row % R
        start, end = start + b * T, end + b * T
        chunks = spanning + b * tl.cdiv(T, BT)
        last_row = tl.minimum(tile * BM + BM, T * R) - 1
        if (tl.load(chunks + tile * BM // R // BT) | tl.load(chunks + last_row // R // BT)) != 0:
            lo, hi = _intervals(start, end, row, T * R, K, R)
            lo, hi = _spanning(lo, hi, BK)
            spans = lo < hi
            lo_before, hi_before = _intervals(start, end, row - 1, T * R, K, R)
            lo_before, hi_before = _spanning(lo_before, hi_before, BK)
            gaps = _may_have_gaps(lo, hi, lo_before, hi_before, row, BM)
            stat = (b * (G * R) + h) * T + t
            lse_row = tl.load(lse + stat, mask=spans, other=0.0)  # [BM]
            delta_row = tl.load(delta + stat, mask=spans, other=0.0)  # [BM]
            q_tile = load(at(q, b, t, h, q_b, q_t, q_h), spans, D, BD)  # [BM, BD]
            do_tile = load(at(do, b, t, h, do_b, do_t, do_h), spans, D, BD)  # [BM, BD]
            acc = tl.zeros([BM, BD], tl.float32)
            first, last = _hull(lo, hi, K)
            for j0 in range(first, last, BK):
                j = j0 + tl.arange(0, BK)  # [BK]
                visible = (j[None, :] >= lo[:, None]) & (j[None, :] < hi[:, None])  # [BM, BK]
                keys = _safe(j < last, visible, gaps)
                k_tile = load(at(k, b // ROWS, j, g, k_b, k_j, k_h), keys, D, BD)  # [BK, BD]
                v_tile = load(at(v, b // ROWS, j, g, v_b, v_j, v_h), keys, D, BD)  # [BK, BD]
                acc = add_to_queries(
                    q_tile, do_tile, k_tile, v_tile, lse_row, delta_row, visible, scale, acc, PRECISION
                )
            store(dq + ((b * T + t) * (G * R) + h) * D, acc * scale, spans, D, BD)
