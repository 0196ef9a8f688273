"""What the two attentions share: checks and tiles on the host; loads, the online softmax and its gradient in a kernel.

A tile of query rows holds, token by token, the R query heads that share a key head, side by side: row = t · R + r. So
they share its key tiles. Scores stay in natural units; only differences of them go to base 2.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flamingo_kernels._gpu.rows import check_dtype
from flamingo_kernels._gpu.sizes import next_power_of_2

_MAX_HEAD_DIM = 256
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)


def check(op: str, q: Tensor) -> None:
    """Raises: TypeError for fp64, which these kernels do not have; ValueError for a head dim above 256."""
    check_dtype("triton", op, "q", q)
    if q.shape[3] > _MAX_HEAD_DIM:
        raise ValueError(
            f"{op}: q must have a head dim of at most {_MAX_HEAD_DIM} on the triton backend, got {q.shape[3]}"
        )


def rowwise(x: Tensor) -> Tensor:
    """x with its rows of D elements in one piece; copied only if they are not."""
    return x if x.stride(3) == 1 else x.contiguous()


def tile_of(table: dict[tuple, tuple[int, int, int, int]], q: Tensor, rows: int) -> dict[str, int | str] | None:
    """Tile sizes and launch options for `rows` query rows per key head, on the current device; None without a line.

    table: (bytes per element, padded head dim) -> query rows, keys, warps and stages. A third part of the key is for a
    tile of its own: the precision of fp32, or "wgmma" where `_multiplies_in_warp_groups`.
    """
    BD = max(16, next_power_of_2(q.shape[3]))
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32" and torch.version.hip is None  # not all of AMD's have it
    precision = "tf32" if tf32 else "ieee"
    size = q.element_size(), max(64, BD)
    own = "wgmma" if (*size, "wgmma") in table and _multiplies_in_warp_groups() else precision
    line = table.get((*size, own), table.get(size))
    if line is None:
        return None
    BM, BK, warps, stages = line
    return {
        "BM": min(BM, max(32, next_power_of_2(rows))),  # decoding: no tile of 64 rows for one token
        "BK": BK,
        "BD": BD,
        "PRECISION": precision,
        "num_warps": warps,
        "num_stages": stages,
    }


def _multiplies_in_warp_groups() -> bool:
    """Four warps together, 64 rows at a time, out of shared memory: wgmma of sm_90, and what sm_100 has for it."""
    if triton.knobs.runtime.interpret:
        return False
    target = triton.runtime.driver.active.get_current_target()
    return target.backend == "cuda" and target.arch // 10 in (9, 10)


@triton.jit
def place(program, tiles, G):
    """A program's tile, head and row. Tiles that read the same keys run next to each other, while L2 holds those."""
    return program % tiles, program // tiles % G, (program // tiles // G).to(tl.int64)


@triton.jit
def weights(s, lse):
    """A softmax's weights, at most 1: where scores are huge, the rounding of lse alone would bring more."""
    return tl.exp2(tl.minimum((s - lse) * _LOG2E, 0.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def exp(x):
    """Of differences of scores. Only these go to base 2: scores in base 2 would be rounded once more, and by another
    factor than the one that backward computes them with.
    """
    return tl.exp2(x * _LOG2E)


@triton.jit
def load(rows, keep, D: tl.constexpr, BD: tl.constexpr):
    """A tile [rows, BD] from pointers to rows of D elements; 0 behind D and where a row is not kept."""
    d = tl.arange(0, BD)
    return tl.load(rows[:, None] + d[None, :], mask=keep[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def store(rows, tile, keep, D: tl.constexpr, BD: tl.constexpr):
    d = tl.arange(0, BD)
    tl.store(rows[:, None] + d[None, :], tile.to(rows.dtype.element_ty), mask=keep[:, None] & (d < D)[None, :])


@triton.jit
def at(x, b, t, h, x_b, x_t, x_h):
    """Pointers to the rows of D elements of x at row b (int64), tokens or keys t and heads h."""
    return x + b * x_b + t.to(tl.int64) * x_t + h.to(tl.int64) * x_h


@triton.jit
def nothing_seen(BM: tl.constexpr, BD: tl.constexpr):
    """An online softmax before its first key: acc [BM, BD], the largest score and the sum of weights [BM]."""
    return tl.zeros([BM, BD], tl.float32), tl.full([BM], float("-inf"), tl.float32), tl.zeros([BM], tl.float32)


@triton.jit
def see(q_tile, k_tile, v_tile, visible, scale, acc, top, total, PRECISION: tl.constexpr):
    """The online softmax after one more block of keys. visible [BM, BK], or [1, BK] where all rows see the same."""
    s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale
    s = tl.where(visible, s, float("-inf"))  # [BM, BK]
    new_top = tl.maximum(top, tl.max(s, 1))
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # rows that have seen nothing yet
    p = exp(s - shift[:, None])  # [BM, BK]
    shrink = exp(top - shift)
    total = total * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision=PRECISION)
    return acc, new_top, total


@triton.jit
def result(acc, top, total):
    """o and lse of a finished online softmax: 0 and -inf for rows that saw nothing."""
    nothing = total == 0
    total = tl.where(nothing, 1.0, total)
    return acc / total[:, None], tl.where(nothing, float("-inf"), top + tl.log2(total) * _LN2)


@triton.jit
def row_sums(do, o, keep, D: tl.constexpr, BD: tl.constexpr):
    """δ = Σ_d do·o [BM] of rows given by pointers, and do [BM, BD]."""
    do_tile = load(do, keep, D, BD)  # [BM, BD]
    o_tile = load(o, keep, D, BD)  # [BM, BD]
    return tl.sum(do_tile.to(tl.float32) * o_tile.to(tl.float32), 1), do_tile


@triton.jit
def probabilities(a, b, lse, visible, scale, PRECISION: tl.constexpr):
    """exp(s - lse) of the scores s = scale·⟨a, b⟩ of q and k, or of k and q; exactly 0 where not visible."""
    s = tl.dot(a, tl.trans(b), input_precision=PRECISION) * scale
    return tl.where(visible, weights(s, lse), 0.0)


@triton.jit
def add_to_keys(k_tile, v_tile, q_tile, do_tile, lse, delta, visible, scale, dk, dv, PRECISION: tl.constexpr):
    """dk / scale and dv [BK, BD] with what a tile of queries adds, and its ds = p ∘ (dp - δ) [BK, BM] in q's dtype.

    visible [BK, BM]. The products are in an order that frees registers early.
    """
    p = probabilities(k_tile, q_tile, lse[None, :], visible, scale, PRECISION)  # [BK, BM]
    dv = tl.dot(p.to(do_tile.dtype), do_tile, dv, input_precision=PRECISION)
    dp = tl.dot(v_tile, tl.trans(do_tile), input_precision=PRECISION)  # [BK, BM]
    ds = tl.where(visible, p * (dp - delta[None, :]), 0.0).to(q_tile.dtype)
    return tl.dot(ds, q_tile, dk, input_precision=PRECISION), dv, ds


@triton.jit
def add_to_queries(q_tile, do_tile, k_tile, v_tile, lse, delta, visible, scale, dq, PRECISION: tl.constexpr):
    """dq / scale [BM, BD] with what a block of keys adds. visible [BM, BK], or [1, BK] where all rows see the same."""
    p = probabilities(q_tile, k_tile, lse[:, None], visible, scale, PRECISION)  # [BM, BK]
    dp = tl.dot(do_tile, tl.trans(v_tile), input_precision=PRECISION)  # [BM, BK]
    ds = tl.where(visible, p * (dp - delta[:, None]), 0.0)
    return tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision=PRECISION)
