"""masked_cross_attention alone: q, k, v in, output out; attend="latest", media tokens spread evenly."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import flamingo_kernels as fk
from benchmarks.harness import FORWARD, TRAINING, Case, Prepared, Provider, Unavailable, Work, on_backend
from benchmarks.shapes import LATENTS, SHAPES, Shape
from flamingo_kernels import _backends

OP = "masked_cross_attention"
MEASURED = SHAPES
QUICK = ("of3b", "decode32")


@dataclass
class Setting:
    """Where the media stand in the text."""

    shape: Shape
    locations: Tensor  # bool [B, T], True at media tokens
    media_seen: int  # media before this chunk

    @property
    def media_of_token(self) -> Tensor:
        """[B, T], counted from 1; 0 for tokens before the first media."""
        return self.media_seen + self.locations.cumsum(1)

    def intervals(self) -> fk.Intervals:
        return fk.media_intervals(self.locations, LATENTS, media_seen=self.media_seen)

    def segments(self) -> list[tuple[int, int | None]]:
        """Runs of equal media over all text tokens, row after row: (tokens, media among those of all key rows)."""
        shape, runs = self.shape, []
        for row, counts in enumerate(self.media_of_token.tolist()):
            for count in counts:
                media = row // shape.beams * shape.media + count - 1 if count else None
                if runs and runs[-1][1] == media:
                    runs[-1] = (runs[-1][0] + 1, media)
                else:
                    runs.append((1, media))
        return runs


def setting(shape: Shape, device: torch.device) -> Setting:
    """A token that sees nothing (such as BOS), then a media token before each equal share of the text."""
    locations = torch.zeros(shape.rows, shape.tokens, dtype=torch.bool, device=device)
    if shape.tokens == 1:  # decoding: all media came before
        return Setting(shape, locations, shape.media)
    locations[:, [1 + m * (shape.tokens - 1) // shape.media for m in range(shape.media)]] = True
    return Setting(shape, locations, 0)


def case(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    generator = torch.Generator().manual_seed(0)

    def normal(rows: int, length: int) -> Tensor:
        x = torch.randn(rows, length, shape.heads, shape.head_dim, generator=generator)
        return x.to(device, dtype)

    key_rows = shape.rows // shape.beams
    inputs = {
        "q": normal(shape.rows, shape.tokens),
        "k": normal(key_rows, shape.keys),
        "v": normal(key_rows, shape.keys),
    }
    where = setting(shape, device)
    return Case(OP, shape.name, str(shape), inputs, normal(shape.rows, shape.tokens), work(where, dtype), where)


def work(where: Setting, dtype: torch.dtype) -> dict[str, Work]:
    """4·D FLOPs forward and 2.5 times that backward per visible pair and head; each tensor read or written once."""
    shape, segments = where.shape, where.segments()
    channels = shape.heads * shape.head_dim
    pairs = sum(tokens * LATENTS for tokens, media in segments if media is not None)
    text = shape.rows * shape.tokens * channels * dtype.itemsize
    seen = len({media for _, media in segments if media is not None}) * LATENTS * channels * dtype.itemsize
    keys = shape.rows // shape.beams * shape.keys * channels * dtype.itemsize
    forward = Work(4 * channels * pairs, 2 * text + 2 * seen)
    if not shape.trains:
        return {FORWARD: forward}
    # backward reads q, o, do, k, v and writes dq, dk, dv
    return {FORWARD: forward, TRAINING: Work(3.5 * forward.flops, forward.bytes + 4 * text + 2 * seen + 2 * keys)}


# --- ours


def ours(case: Case) -> Prepared:
    intervals = case.setting.intervals()
    return Prepared(
        run=lambda q, k, v: fk.masked_cross_attention(q, k, v, intervals),
        leaves=tuple(case.inputs.values()),
        grad_out=case.grad_out,
        setup=case.setting.intervals,
        note=f"backend {_backends.select(case.device.type, 'masked_cross_attention')}; [B, T, H, D]",
    )


# --- rivals; each in the layout it was faster with, or no slower


def eager(case: Case) -> Prepared:
    mask, blind = dense_masks(case.setting)
    return _heads_first(
        case, lambda q, k, v: flamingo_attention(q, k, v, mask, blind), lambda: dense_masks(case.setting)
    )


def compiled_eager(case: Case) -> Prepared:
    mask, blind = dense_masks(case.setting)
    compiled = torch.compile(flamingo_attention, dynamic=False)
    return _heads_first(case, lambda q, k, v: compiled(q, k, v, mask, blind), lambda: dense_masks(case.setting))


def flamingo_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, blind: Tensor) -> Tensor:
    """The public Flamingos' math. q [B, H, T, D]; k, v [B or 1, H, K, D]; mask [B, 1, T, K]; blind [B, 1, T, 1]."""
    k, v = k.expand(q.shape[0], -1, -1, -1), v.expand(q.shape[0], -1, -1, -1)
    scores = torch.einsum("bhtd,bhkd->bhtk", q * q.shape[-1] ** -0.5, k)
    scores = scores.masked_fill(~mask, -torch.finfo(scores.dtype).max)
    scores = scores - scores.amax(-1, keepdim=True).detach()
    p = scores.softmax(-1).masked_fill(blind, 0)
    return torch.einsum("bhtk,bhkd->bhtd", p, v)


def dense_masks(where: Setting) -> tuple[Tensor, Tensor]:
    media = where.media_of_token[:, None, :, None]
    of_key = 1 + torch.arange(where.shape.keys, device=media.device) // LATENTS
    return media == of_key, media == 0


def masked_sdpa(case: Case) -> Prepared:
    mask, _ = dense_masks(case.setting)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(
            q, k.expand(q.shape[0], -1, -1, -1), v.expand(q.shape[0], -1, -1, -1), attn_mask=mask
        )

    return _heads_first(case, run, lambda: dense_masks(case.setting)[0])


def flex(case: Case) -> Prepared:
    start, end = case.setting.intervals()
    shape = case.setting.shape

    def visible(b: Tensor, h: Tensor, t: Tensor, j: Tensor) -> Tensor:
        return (j >= start[b, t]) & (j < end[b, t])

    def build() -> object:
        block = LATENTS if case.device.type == "cpu" else 128
        return create_block_mask(visible, shape.rows, None, shape.tokens, shape.keys, case.device.type, block)

    block_mask, attend = build(), torch.compile(flex_attention, dynamic=False)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k.expand(q.shape[0], -1, -1, -1), v.expand(q.shape[0], -1, -1, -1), block_mask=block_mask)

    prepared = _heads_first(case, run, build)
    if case.device.type == "cpu":
        prepared.no_backward = "FlexAttention has no backward on the CPU"
    return prepared


def per_image(attend: Callable[..., Tensor], case: Case) -> Prepared:
    run = per_image_attention(attend, case.setting)
    return Prepared(run, tuple(case.inputs.values()), case.grad_out, note="[B, T, H, D]")


def per_image_attention(attend: Callable[..., Tensor], where: Setting) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """One call per row and image; works for any batch. Slices by split and unbind, whose backward is one copy."""
    segments = where.segments()
    sizes = [tokens for tokens, _ in segments]

    def one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(*(x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))).squeeze(0).transpose(0, 1)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        queries = q.flatten(0, 1).split(sizes)
        keys, values = (x.unflatten(1, (-1, LATENTS)).flatten(0, 1) for x in (k, v))
        if where.shape.trains:
            keys, values = keys.unbind(), values.unbind()
        pieces = [
            torch.zeros_like(part) if media is None else one(part, keys[media], values[media])
            for part, (_, media) in zip(queries, segments, strict=True)
        ]
        return torch.cat(pieces).view_as(q)

    return run


def per_image_aligned(attend: Callable[..., Tensor], case: Case) -> Prepared:
    """One call per image for all rows at once, which needs every row to have its media at the same places."""
    shape = case.setting.shape
    if shape.beams > 1:
        raise Unavailable("beams share their keys: the same as per image")
    tokens = [n for n, _ in case.setting.segments()]
    sizes = tokens[: shape.media + 1]  # of the first row: what sees nothing, then one run per media

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        blind, *queries = q.split(sizes, 2)
        images = zip(queries, k.split(LATENTS, 2), v.split(LATENTS, 2), strict=True)
        return torch.cat([torch.zeros_like(blind), *(attend(*qkv) for qkv in images)], 2)

    return _heads_first(case, run)


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two matmuls and a softmax: on a CPU in bf16 it trains faster than SDPA, whose backward is slow there."""
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1) @ v


def varlen(case: Case) -> Prepared:
    from torch.nn.attention.varlen import varlen_attn

    return _packed(case, varlen_attn)


def flash_attn(case: Case) -> Prepared:
    try:
        module = importlib.import_module("flash_attn")
    except ImportError as error:
        raise Unavailable("not installed") from error
    return _packed(case, module.flash_attn_varlen_func)


def _packed(case: Case, attend: Callable[..., Tensor]) -> Prepared:
    """One call over segments of different lengths: text tokens and keys are packed already, row after row."""
    if case.device.type != "cuda":
        raise Unavailable("not on this device")
    if case.dtype not in (torch.bfloat16, torch.float16):
        raise Unavailable("bf16 and fp16 only")
    queries, keys, next_media = [], [], 0
    for tokens, media in case.setting.segments():
        if media is None:
            queries.append(tokens)
            keys.append(0)
            continue
        skipped = media - next_media
        queries += [0] * skipped + [tokens]
        keys += [LATENTS] * (skipped + 1)
        next_media = media + 1

    def offsets(sizes: list[int]) -> Tensor:
        return F.pad(torch.tensor(sizes).cumsum(0), (1, 0)).to(case.device, torch.int32)

    cu_q, cu_k = offsets(queries), offsets(keys)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        packed = (x.flatten(0, 1) for x in (q, k, v))
        return attend(*packed, cu_q, cu_k, max(queries), LATENTS).view_as(q)

    return Prepared(run, tuple(case.inputs.values()), case.grad_out, note="[B, T, H, D]")


def _heads_first(case: Case, run: Callable[..., Tensor], setup: Callable[[], object] | None = None) -> Prepared:
    def swap(x: Tensor) -> Tensor:
        return x.transpose(1, 2)

    leaves = [swap(x).contiguous() for x in case.inputs.values()]
    return Prepared(run, leaves, swap(case.grad_out).contiguous(), swap, setup, note="[B, H, T, D]")


PROVIDERS = (
    Provider("eager", eager),
    Provider("flamingo_kernels", ours, ours=True),
    Provider("flamingo_kernels, CUDA C++", on_backend("cuda", ours), ours=True),
    Provider("torch.compile(eager)", compiled_eager, compiles=True),
    Provider("SDPA, masked", masked_sdpa),
    Provider("FlexAttention", flex, compiles=True),
    Provider("SDPA per image", partial(per_image, F.scaled_dot_product_attention)),
    Provider("SDPA per image, aligned", partial(per_image_aligned, F.scaled_dot_product_attention)),
    Provider("eager per image", partial(per_image, plain_attention)),
    Provider("eager per image, aligned", partial(per_image_aligned, plain_attention)),
    Provider("varlen_attn", varlen),
    Provider("flash-attn", flash_attn),
)
