"""Latent attention in Triton: two sources of keys, media and latents, in one loop. No atomics, no host sync.

Forward: a program owns a tile of query rows and walks the blocks of media that are within media_lengths, then those of
the latents. Few media with many tokens make few such programs, so then several share the blocks of a tile evenly, each
writes its own o and lse in fp32, and a small kernel merges these.

Backward, where one tile holds all query rows of a key head, as it does the 64 latents of a resampler: a program walks
the keys as forward does, and of each block writes dK and dV, and adds to dQ, from one reading of everything. Where
several share the keys, dQ comes in fp32 parts, added up in a fixed order.

Backward of more query rows: one kernel, of two kinds of programs. The first own a block of keys and walk all tiles of
query rows: dK and dV. The others own a tile of query rows and walk the keys: dQ, in parts as above.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flamingo_kernels._gpu.positions import check_lengths
from flamingo_kernels._gpu.sizes import cdiv
from flamingo_kernels._gpu.splits import parts_of, splits_of
from flamingo_kernels.triton._attention import (
    add_to_keys,
    add_to_queries,
    at,
    check,
    exp,
    load,
    nothing_seen,
    place,
    probabilities,
    result,
    row_sums,
    rowwise,
    see,
    store,
    tile_of,
)
from flamingo_kernels.triton._tuning import launch

_OP = "latent_attention"
# (bytes per element, padded head dim) -> query rows, keys, warps and stages of a tile. Every row sees every key, so
# tiles are as large as accumulators in registers allow without a spill, up to 128, on any chip from sm_80 to sm_120;
# inputs fit in the 99 KiB of shared memory that each of them has. 64 rows are the 64 latents.
_FORWARD = {
    (2, 64): (64, 64, 4, 3),
    (2, 128): (64, 64, 8, 2),
    (2, 256): (32, 32, 4, 2),
    (4, 64): (32, 32, 8, 2),
    (4, 128): (32, 16, 4, 2),
    (4, 256): (16, 16, 4, 2),
}
# Backward in one pass: all query rows, the 64 latents, and as many keys as five products leave registers for. Where
# groups of warps multiply ("wgmma"), operands stay in shared memory, of which these chips have 227 KiB, and 64 keys are
# the fewest that they take; elsewhere operands cost registers, up to 224 in all. With three stages a block is loaded
# while another is computed. What has no line here does not fit: in 99 KiB, 64 rows of q and do, of 512 bytes or more.
_BACKWARD = {
    (2, 64): (64, 32, 4, 3),
    (2, 64, "wgmma"): (64, 64, 4, 3),
    (2, 128): (64, 32, 8, 3),
    (2, 128, "wgmma"): (64, 64, 8, 3),
    (4, 64): (64, 16, 8, 3),
    (4, 64, "ieee"): (64, 16, 8, 1),
}
# of several tiles of query rows, which are walked, too: accumulators of dk and dv leave less for the rows
_BACKWARD_TILES = {
    (2, 64): (32, 64, 4, 2),
    (2, 128): (32, 32, 4, 2),
    (2, 256): (32, 32, 8, 1),
    (4, 64): (32, 32, 4, 2),
    (4, 128): (16, 32, 8, 1),
    (4, 256): (16, 16, 4, 2),
}
_MERGED = 512  # elements of o that a program merges


def forward(
    q: Tensor,
    k_media: Tensor,
    v_media: Tensor,
    k_latents: Tensor,
    v_latents: Tensor,
    media_lengths: Tensor | None,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    """o [N, R, H, D] contiguous in q's dtype, lse fp32 [N, H, R]. Shapes as in the public op.

    Raises:
        TypeError: fp64, which these kernels do not have.
        ValueError: D > 256, or lengths on the CPU outside 0..S; on a GPU they are clamped.
    """
    _check(q, k_media, media_lengths)
    N, R, H, D = q.shape
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((N, H, R), dtype=torch.float32, device=q.device)
    if lse.numel() == 0:
        return o, lse
    S, G = k_media.shape[1:3]
    inputs = [rowwise(x) for x in (q, k_media, v_media, k_latents, v_latents)]
    tile = tile_of(_FORWARD, q, R * (H // G))
    tiles = cdiv(R * (H // G), tile["BM"])
    splits = splits_of(q, tiles * G * N, _blocks(S, tile) + _blocks(k_latents.shape[1], tile))
    parts, part_lse = parts_of(o, splits), parts_of(lse, splits)
    with torch.cuda.device_of(q):
        launch(
            latent_attention_fwd_kernel,
            tiles * splits * G * N,
            *(*inputs, _lengths(media_lengths), parts, part_lse),
            *(softmax_scale, N, R, S, k_latents.shape[1], G),
            *(stride for x in inputs for stride in x.stride()[:3]),
            GROUP=H // G,
            D=D,
            SPLITS=splits,
            **tile,
        )
        if splits > 1:
            _merge(parts, part_lse, o, lse, tile["BD"])
    return o, lse


def backward(
    do: Tensor,
    q: Tensor,
    k_media: Tensor,
    v_media: Tensor,
    k_latents: Tensor,
    v_latents: Tensor,
    media_lengths: Tensor | None,
    o: Tensor,
    lse: Tensor,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk_media, dv_media, dk_latents, dv_latents, contiguous in the inputs' dtypes.

    Raises: as forward.
    """
    _check(q, k_media, media_lengths)
    N, R, H, D = q.shape
    gradients = [
        torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k_media, v_media, k_latents, v_latents)
    ]
    dq, *of_keys = gradients
    if lse.numel() == 0:
        return dq, *(x.zero_() for x in of_keys)
    S, G = k_media.shape[1:3]
    inputs = [rowwise(x) for x in (do, q, k_media, v_media, k_latents, v_latents)]
    with torch.cuda.device_of(q):
        kernel, tile = _backward_form(q, R * (H // G))
        tiles, blocks = cdiv(R * (H // G), tile["BM"]), _blocks(S, tile) + _blocks(k_latents.shape[1], tile)
        splits = splits_of(q, tiles * G * N, blocks)
        parts = parts_of(dq, splits)
        launch(
            kernel,
            (tiles * splits + (blocks if kernel is latent_attention_bwd_tiles_kernel else 0)) * G * N,
            *(*inputs, _lengths(media_lengths), o.contiguous(), lse.contiguous(), parts, *of_keys),
            *(softmax_scale, N, R, S, k_latents.shape[1], G),
            *(stride for x in inputs for stride in x.stride()[:3]),
            GROUP=H // G,
            D=D,
            SPLITS=splits,
            **tile,
        )
        if splits > 1:
            _merge(parts, None, dq, None, tile["BD"])
    return tuple(gradients)


def _check(q: Tensor, k_media: Tensor, media_lengths: Tensor | None) -> None:
    check(_OP, q)
    check_lengths(_OP, media_lengths, k_media.shape[1])


def _lengths(media_lengths: Tensor | None) -> Tensor | None:
    return None if media_lengths is None else media_lengths.contiguous()


def _backward_form(q: Tensor, rows: int) -> tuple[Any, dict[str, int | str]]:
    """The kernel for backward of `rows` query rows per key head, and its tile: in one pass where they fit in one."""
    tile = tile_of(_BACKWARD, q, rows)
    if tile is not None and rows <= tile["BM"]:
        return latent_attention_bwd_kernel, tile
    return latent_attention_bwd_tiles_kernel, tile_of(_BACKWARD_TILES, q, rows)


def _blocks(keys: int, tile: dict) -> int:
    return cdiv(keys, tile["BK"])


def _merge(parts: Tensor, part_lse: Tensor | None, out: Tensor, lse: Tensor | None, BD: int) -> None:
    """out = Σ parts, or, with the lse of the parts, the attention over all their keys."""
    _, R, H, D = out.shape
    rows, BM = out.shape[:3].numel(), max(1, _MERGED // BD)
    latent_attention_merge_kernel[(cdiv(rows, BM),)](
        *(parts, part_lse, out, lse, rows, R, H), D=D, BD=BD, BM=BM, SPLITS=parts.shape[0], num_warps=2
    )


@triton.jit
def _length(media_lengths, n, S):
    """How many tokens of media n are visible."""
    return S if media_lengths is None else tl.minimum(tl.maximum(tl.load(media_lengths + n), 0), S)


@triton.jit
def _load_keys(block, of_media, length, LATENTS, media, latents, D: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr):
    """Of a block of keys: which exist [BK], k and v [BK, BD]. The first `of_media` blocks are media's.

    media, latents: k, its stride of a key, v, its stride of a key. A scalar chooses between them, not a branch, so that
    the loads of a loop over both are pipelined.
    """
    in_media = block < of_media
    j = tl.where(in_media, block, block - of_media) * BK + tl.arange(0, BK)  # [BK]
    keys = j < tl.where(in_media, length, LATENTS)
    k = tl.where(in_media, media[0], latents[0]) + j.to(tl.int64) * tl.where(in_media, media[1], latents[1])
    v = tl.where(in_media, media[2], latents[2]) + j.to(tl.int64) * tl.where(in_media, media[3], latents[3])
    return keys, load(k, keys, D, BD), load(v, keys, D, BD)


@triton.jit(do_not_specialize=["N", "R", "S", "LATENTS"])  # sizes vary from call to call
def latent_attention_fwd_kernel(
    q,
    k_media,
    v_media,
    k_latents,
    v_latents,
    media_lengths,
    o,
    lse,
    softmax_scale,
    N,
    R,
    S,
    LATENTS,
    G,
    q_n,
    q_t,
    q_h,
    k_media_n,
    k_media_j,
    k_media_h,
    v_media_n,
    v_media_j,
    v_media_h,
    k_latents_n,
    k_latents_j,
    k_latents_h,
    v_latents_n,
    v_latents_j,
    v_latents_h,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """o and lse of each of the SPLITS shares of the keys: [SPLITS, N, R, H, D] and [SPLITS, N, H, R].

    x_n, x_t or x_j, and x_h are the strides of x, in elements, over media, queries or keys, and heads.

    Occupancy: 4 warps on a multiprocessor, or more.
    """
    tiles = tl.cdiv(R * GROUP, BM)
    tile, g, n = place(tl.program_id(0), tiles * SPLITS, G)
    split, tile = tile // tiles, tile % tiles
    row = tile * BM + tl.arange(0, BM)  # [BM]
    t, h = row // GROUP, g * GROUP + row % GROUP
    q_tile = load(at(q, n, t, h, q_n, q_t, q_h), row < R * GROUP, D, BD)  # [BM, BD]
    g = g.to(tl.int64)
    k_media, v_media = k_media + n * k_media_n + g * k_media_h, v_media + n * v_media_n + g * v_media_h
    k_latents, v_latents = k_latents + n * k_latents_n + g * k_latents_h, v_latents + n * v_latents_n + g * v_latents_h
    media, latents = (k_media, k_media_j, v_media, v_media_j), (k_latents, k_latents_j, v_latents, v_latents_j)
    scale = tl.cast(softmax_scale, tl.float32)

    acc, top, total = nothing_seen(BM, BD)
    length = _length(media_lengths, n, S)
    of_media, blocks = tl.cdiv(length, BK), tl.cdiv(length, BK) + tl.cdiv(LATENTS, BK)
    for block in range(blocks * split // SPLITS, blocks * (split + 1) // SPLITS):
        keys, k_tile, v_tile = _load_keys(block, of_media, length, LATENTS, media, latents, D, BD, BK)
        acc, top, total = see(q_tile, k_tile, v_tile, keys[None, :], scale, acc, top, total, PRECISION)

    o_tile, log_sum = result(acc, top, total)
    part = split * N + n
    store(o + ((part * R + t) * (G * GROUP) + h) * D, o_tile, row < R * GROUP, D, BD)
    tl.store(lse + (part * (G * GROUP) + h) * R + t, log_sum, mask=row < R * GROUP)


@triton.jit(do_not_specialize=["rows", "R"])
def latent_attention_merge_kernel(
    parts,
    part_lse,
    out,
    lse,
    rows,
    R,
    H,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """out [N, R, H, D] = Σ parts [SPLITS, N, R, H, D] in their order.

    With part_lse [SPLITS, N, H, R], each weighs as much as the keys it saw, and lse [N, H, R] is that of all of them.

    Occupancy: 10 warps on a multiprocessor, or more.
    """
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)  # [BM]
    keep = row < rows
    rows = tl.cast(rows, tl.int64)
    acc, top, total = nothing_seen(BM, BD)
    if part_lse is None:
        for split in tl.static_range(SPLITS):
            acc += load(parts + (split * rows + row) * D, keep, D, BD)  # [BM, BD]
    else:
        stat = (row // (R * H) * H + row % H) * R + row // H % R
        for split in tl.static_range(SPLITS):
            top = tl.maximum(top, tl.load(part_lse + split * rows + stat, mask=keep, other=0.0))
        shift = tl.where(top == float("-inf"), 0.0, top)
        for split in tl.static_range(SPLITS):
            weight = exp(tl.load(part_lse + split * rows + stat, mask=keep, other=0.0) - shift)  # [BM]
            acc += load(parts + (split * rows + row) * D, keep, D, BD) * weight[:, None]  # [BM, BD]
            total += weight
        acc, log_sum = result(acc, top, total)
        tl.store(lse + stat, log_sum, mask=keep)
    store(out + row * D, acc, keep, D, BD)


@triton.jit
def _load_rows(
    row, n, g, do, q, o, lse, do_strides, q_strides, R, G, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr
):
    """Of query rows [BM] of a key head: q and do [BM, BD], lse and δ [BM]; 0 behind the last row."""
    t, h = row // GROUP, g * GROUP + row % GROUP
    keep = row < R * GROUP
    o_row = o + ((n * R + t) * (G * GROUP) + h) * D
    delta, do_tile = row_sums(at(do, n, t, h, do_strides[0], do_strides[1], do_strides[2]), o_row, keep, D, BD)
    q_tile = load(at(q, n, t, h, q_strides[0], q_strides[1], q_strides[2]), keep, D, BD)
    lse_row = tl.load(lse + (n * (G * GROUP) + h) * R + t, mask=keep, other=0.0)
    return q_tile, do_tile, lse_row, delta


@triton.jit
def _store_rows(dq, row, tile, split, n, g, N, R, G, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """dq of query rows, into the part of this share of the keys."""
    t, h = row // GROUP, g * GROUP + row % GROUP
    store(dq + (((split * N + n) * R + t) * (G * GROUP) + h) * D, tile, row < R * GROUP, D, BD)


@triton.jit
def _store_keys(
    block, of_media, n, g, S, LATENTS, G, media, latents, tile, D: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr
):
    """dk or dv [BK, BD] of a block of keys into that of its source. of_media as in _load_keys."""
    in_media = block < of_media
    j = tl.where(in_media, block, block - of_media) * BK + tl.arange(0, BK)  # [BK]
    count = tl.where(in_media, S, LATENTS)
    store(tl.where(in_media, media, latents) + ((n * count + j) * G + g) * D, tile, j < count, D, BD)


@triton.jit(do_not_specialize=["N", "R", "S", "LATENTS"])
def latent_attention_bwd_kernel(
    do,
    q,
    k_media,
    v_media,
    k_latents,
    v_latents,
    media_lengths,
    o,
    lse,
    dq,
    dk_media,
    dv_media,
    dk_latents,
    dv_latents,
    softmax_scale,
    N,
    R,
    S,
    LATENTS,
    G,
    do_n,
    do_t,
    do_h,
    q_n,
    q_t,
    q_h,
    k_media_n,
    k_media_j,
    k_media_h,
    v_media_n,
    v_media_j,
    v_media_h,
    k_latents_n,
    k_latents_j,
    k_latents_h,
    v_latents_n,
    v_latents_j,
    v_latents_h,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk and dv, and dq of each share of the keys, [SPLITS, N, R, H, D]. BM >= R · GROUP.

    Occupancy: 8 warps on a multiprocessor, or more.
    """
    split, g, n = place(tl.program_id(0), SPLITS, G)
    g = g.to(tl.int64)
    scale = tl.cast(softmax_scale, tl.float32)
    k_media, v_media = k_media + n * k_media_n + g * k_media_h, v_media + n * v_media_n + g * v_media_h
    k_latents, v_latents = k_latents + n * k_latents_n + g * k_latents_h, v_latents + n * v_latents_n + g * v_latents_h
    media, latents = (k_media, k_media_j, v_media, v_media_j), (k_latents, k_latents_j, v_latents, v_latents_j)
    row = tl.arange(0, BM)  # [BM]
    q_tile, do_tile, lse_row, delta = _load_rows(
        row, n, g, do, q, o, lse, (do_n, do_t, do_h), (q_n, q_t, q_h), R, G, GROUP, D, BD
    )
    acc = tl.zeros([BM, BD], tl.float32)
    nothing = tl.zeros([BK, BD], tl.float32)
    length = _length(media_lengths, n, S)
    of_media, blocks = tl.cdiv(length, BK), tl.cdiv(length, BK) + tl.cdiv(LATENTS, BK)
    for block in range(blocks * split // SPLITS, blocks * (split + 1) // SPLITS):
        keys, k_tile, v_tile = _load_keys(block, of_media, length, LATENTS, media, latents, D, BD, BK)
        # rows behind the last are 0, and add nothing
        p = probabilities(q_tile, k_tile, lse_row[:, None], keys[None, :], scale, PRECISION)  # [BM, BK]
        dv = tl.dot(tl.trans(p.to(do_tile.dtype)), do_tile, input_precision=PRECISION)  # [BK, BD]
        _store_keys(block, of_media, n, g, S, LATENTS, G, dv_media, dv_latents, dv, D, BD, BK)
        dp = tl.dot(do_tile, tl.trans(v_tile), input_precision=PRECISION)  # [BM, BK]
        ds = tl.where(keys[None, :], p * (dp - delta[:, None]), 0.0).to(k_tile.dtype)
        acc = tl.dot(ds, k_tile, acc, input_precision=PRECISION)
        dk = tl.dot(tl.trans(ds), q_tile, input_precision=PRECISION)  # [BK, BD]
        _store_keys(block, of_media, n, g, S, LATENTS, G, dk_media, dk_latents, dk * scale, D, BD, BK)
    _store_rows(dq, row, acc * scale, split, n, g, N, R, G, GROUP, D, BD)
    hidden = tl.cdiv(S, BK) - of_media
    for block in range(of_media + hidden * split // SPLITS, of_media + hidden * (split + 1) // SPLITS):
        _store_keys(block, tl.cdiv(S, BK), n, g, S, LATENTS, G, dk_media, dk_latents, nothing, D, BD, BK)
        _store_keys(block, tl.cdiv(S, BK), n, g, S, LATENTS, G, dv_media, dv_latents, nothing, D, BD, BK)


@triton.jit(do_not_specialize=["N", "R", "S", "LATENTS"])
def latent_attention_bwd_tiles_kernel(
    do,
    q,
    k_media,
    v_media,
    k_latents,
    v_latents,
    media_lengths,
    o,
    lse,
    dq,
    dk_media,
    dv_media,
    dk_latents,
    dv_latents,
    softmax_scale,
    N,
    R,
    S,
    LATENTS,
    G,
    do_n,
    do_t,
    do_h,
    q_n,
    q_t,
    q_h,
    k_media_n,
    k_media_j,
    k_media_h,
    v_media_n,
    v_media_j,
    v_media_h,
    k_latents_n,
    k_latents_j,
    k_latents_h,
    v_latents_n,
    v_latents_j,
    v_latents_h,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk and dv from the first programs; from the others dq of each share of the keys, [SPLITS, N, R, H, D].

    Occupancy: 8 warps on a multiprocessor, or more.
    """
    program = tl.program_id(0)
    scale = tl.cast(softmax_scale, tl.float32)
    of_media, of_latents, tiles = tl.cdiv(S, BK), tl.cdiv(LATENTS, BK), tl.cdiv(R * GROUP, BM)
    of_keys = (of_media + of_latents) * G * N
    if program < of_keys:
        unit, g, n = place(program, of_media + of_latents, G)
    else:
        unit, g, n = place(program - of_keys, tiles * SPLITS, G)
    g = g.to(tl.int64)
    length = _length(media_lengths, n, S)
    k_media, v_media = k_media + n * k_media_n + g * k_media_h, v_media + n * v_media_n + g * v_media_h
    k_latents, v_latents = k_latents + n * k_latents_n + g * k_latents_h, v_latents + n * v_latents_n + g * v_latents_h
    media, latents = (k_media, k_media_j, v_media, v_media_j), (k_latents, k_latents_j, v_latents, v_latents_j)
    if program < of_keys:
        keys, k_tile, v_tile = _load_keys(unit, of_media, length, LATENTS, media, latents, D, BD, BK)
        dk_acc = tl.zeros([BK, BD], tl.float32)
        dv_acc = tl.zeros([BK, BD], tl.float32)
        rows = tl.max(keys.to(tl.int32), 0) * R * GROUP  # none for keys behind the length
        # One or a few tiles, so not pipelined: that would leave do, which has two uses, unswizzled in shared memory.
        for row0 in tl.range(0, rows, BM, num_stages=1):
            row = row0 + tl.arange(0, BM)  # [BM]
            q_tile, do_tile, lse_row, delta = _load_rows(
                row, n, g, do, q, o, lse, (do_n, do_t, do_h), (q_n, q_t, q_h), R, G, GROUP, D, BD
            )
            visible = keys[:, None] & (row < R * GROUP)[None, :]  # [BK, BM]
            dk_acc, dv_acc, _ = add_to_keys(
                k_tile, v_tile, q_tile, do_tile, lse_row, delta, visible, scale, dk_acc, dv_acc, PRECISION
            )
        _store_keys(unit, of_media, n, g, S, LATENTS, G, dk_media, dk_latents, dk_acc * scale, D, BD, BK)
        _store_keys(unit, of_media, n, g, S, LATENTS, G, dv_media, dv_latents, dv_acc, D, BD, BK)
    else:
        split, row = unit // tiles, unit % tiles * BM + tl.arange(0, BM)  # [BM]
        q_tile, do_tile, lse_row, delta = _load_rows(
            row, n, g, do, q, o, lse, (do_n, do_t, do_h), (q_n, q_t, q_h), R, G, GROUP, D, BD
        )
        acc = tl.zeros([BM, BD], tl.float32)
        of_media, blocks = tl.cdiv(length, BK), tl.cdiv(length, BK) + of_latents
        for block in range(blocks * split // SPLITS, blocks * (split + 1) // SPLITS):
            keys, k_tile, v_tile = _load_keys(block, of_media, length, LATENTS, media, latents, D, BD, BK)
            acc = add_to_queries(q_tile, do_tile, k_tile, v_tile, lse_row, delta, keys[None, :], scale, acc, PRECISION)
        _store_rows(dq, row, acc * scale, split, n, g, N, R, G, GROUP, D, BD)
