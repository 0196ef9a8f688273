"""The whole gated cross-attention block: norm, projections, attention, output and gate, feed-forward and gate.

Training: x, media and all weights take gradients. Decoding: one token with the keys and values of its media projected
once before, outside the timing, where a provider can keep them.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flamingo_kernels as fk
from benchmarks import bench_masked_cross_attention as attention
from benchmarks import packages
from benchmarks.harness import FORWARD, TRAINING, Case, Prepared, Provider, Unavailable, Work, compiled, on_backend
from benchmarks.shapes import LATENTS, SHAPES, Shape
from flamingo_kernels import _backends

OP = "gated_block"
MEASURED = SHAPES
QUICK = ("decode32", "mini")

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v, each [B, T or K, H, D] -> [B, T, H, D]

_SMALL_TOKENS, _SMALL_MEDIA = 32, 3
_PACKAGE_NAMES = {
    "attn_norm.weight": "attn.norm.weight",
    "attn_norm.bias": "attn.norm.bias",
    "to_q.weight": "attn.to_q.weight",
    "to_kv.weight": "attn.to_kv.weight",
    "to_out.weight": "attn.to_out.weight",
    "attn_gate": "attn_gate",
    "ff_norm.weight": "ff.0.weight",
    "ff_norm.bias": "ff.0.bias",
    "w_in.weight": "ff.1.weight",
    "w_out.weight": "ff.3.weight",
    "ff_gate": "ff_gate",
}


def case(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    generator = torch.Generator().manual_seed(0)
    C, V, inner = shape.width, shape.visual_width, shape.heads * shape.head_dim

    def normal(*size: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
        return torch.empty(size).normal_(mean, std, generator=generator).to(device, dtype)

    def weight(rows: int, columns: int) -> Tensor:
        return normal(rows, columns, std=columns**-0.5)

    weights = {
        "attn_norm.weight": normal(C, mean=1, std=0.1),
        "attn_norm.bias": normal(C, std=0.1),
        "to_q.weight": weight(inner, C),
        "to_kv.weight": weight(2 * inner, V),
        "to_out.weight": weight(C, inner),
        "attn_gate": torch.tensor([0.5], device=device, dtype=dtype),  # open, so that every gradient says something
        "ff_norm.weight": normal(C, mean=1, std=0.1),
        "ff_norm.bias": normal(C, std=0.1),
        "w_in.weight": weight((2 if shape.activation == "swiglu" else 1) * shape.F, C),
        "w_out.weight": weight(C, shape.F),
        "ff_gate": torch.tensor([-0.3], device=device, dtype=dtype),
    }

    def of(shape: Shape) -> Case:
        x = normal(shape.rows, shape.tokens, C)
        media = normal(shape.rows // shape.beams, shape.media, LATENTS, V)
        where = attention.setting(shape, device)
        inputs = {"x": x, "media": media, **weights}
        made = Case(OP, shape.name, _describe(shape), inputs, normal(*x.shape), work(inputs, where, dtype), where)
        return _with_loss(made) if shape.trains else made

    return replace(of(shape), small=of(_small(shape)) if shape.trains else None)


def _with_loss(case: Case) -> Case:
    """With the gradient of ½·|y|² + ⟨y, normal⟩: under noise alone the terms of a scalar gate's gradient cancel."""
    with torch.no_grad():
        return replace(case, grad_out=case.grad_out + eager(case).run(*case.inputs.values()))


def _small(shape: Shape) -> Shape:
    rows, media = min(shape.rows, 2), min(shape.media, _SMALL_MEDIA)
    return shape._replace(rows=rows, tokens=_SMALL_TOKENS // rows, media=media)


def _describe(shape: Shape) -> str:
    return f"{shape} F={shape.F} {shape.activation}"


def work(inputs: dict[str, Tensor], where: attention.Setting, dtype: torch.dtype) -> dict[str, Work]:
    """Matmuls with the weights, twice that in backward, and the attention; each tensor moved once, in training thrice.

    Decoding leaves out the projection of the media, and reads the visible keys and values instead.
    """
    shape, inside = where.shape, attention.work(where, dtype)
    text, keys = shape.rows * shape.tokens, shape.rows // shape.beams * shape.keys
    of_text = sum(inputs[f"{name}.weight"].numel() for name in ("to_q", "to_out", "w_in", "w_out"))
    moved = dtype.itemsize * (2 * inputs["x"].numel() + sum(x.numel() for name, x in inputs.items() if name != "x"))
    if not shape.trains:
        not_read = dtype.itemsize * (inputs["media"].numel() + inputs["to_kv.weight"].numel())
        return {FORWARD: Work(2 * text * of_text + inside[FORWARD].flops, moved - not_read + inside[FORWARD].bytes)}
    matmuls = 2 * (text * of_text + keys * inputs["to_kv.weight"].numel())
    return {
        FORWARD: Work(matmuls + inside[FORWARD].flops, moved),
        TRAINING: Work(3 * matmuls + inside[TRAINING].flops, 3 * moved),
    }


# --- ours


def fused_block(shape: Shape) -> fk.nn.GatedCrossAttentionBlock:
    return fk.nn.GatedCrossAttentionBlock(
        shape.width,
        shape.visual_width,
        heads=shape.heads,
        dim_head=shape.head_dim,
        ff_dim=shape.F,
        activation=shape.activation,
    )


def ours(case: Case) -> Prepared:
    shape, names = case.setting.shape, list(case.inputs)[2:]
    block = packages.module_of(
        lambda: fused_block(shape),
        {name: case.inputs[name] for name in names},
    )
    intervals = case.setting.intervals()
    if shape.trains:

        def run(x: Tensor, media: Tensor, *_: Tensor) -> Tensor:
            return block(x, media, intervals)

    else:
        with torch.no_grad():
            kv = block.project_media(case.inputs["media"])

        def run(x: Tensor, media: Tensor, *_: Tensor) -> Tensor:
            return block(x, intervals=intervals, kv=kv)

    return Prepared(
        run,
        _leaves(case, packages.parameters_of(block, names)),
        case.grad_out,
        setup=case.setting.intervals,
        note=_note(case, f"backend {_backends.select(case.device.type, attention.OP)}"),
    )


def _leaves(case: Case, parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (case.inputs["x"], case.inputs["media"], *parameters)


def _note(case: Case, note: str = "") -> str:
    """Everyone but the packages keeps keys and values while decoding."""
    kept = "" if case.setting.shape.trains else "K/V kept"
    return "; ".join(filter(None, (note, kept)))


# --- the block in plain PyTorch


def eager(case: Case) -> Prepared:
    mask, blind = attention.dense_masks(case.setting)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention.flamingo_attention(*(x.transpose(1, 2) for x in (q, k, v)), mask, blind).transpose(1, 2)

    return _plain(case, attend, lambda: attention.dense_masks(case.setting))


def per_image(case: Case) -> Prepared:
    return _plain(case, attention.per_image_attention(F.scaled_dot_product_attention, case.setting))


def _plain(case: Case, attend: Attend, setup: Callable[[], object] | None = None) -> Prepared:
    shape = case.setting.shape
    run = partial(plain_block, attend, shape.heads, shape.activation)
    if not shape.trains:
        kv = project(case.inputs["media"], case.inputs["to_kv.weight"], shape.heads)
        run = partial(run, kv=kv)
    return Prepared(run, tuple(case.inputs.values()), case.grad_out, setup=setup, note=_note(case))


def plain_block(
    attend: Attend,
    heads: int,
    activation: str,
    x: Tensor,
    media: Tensor,
    attn_norm_weight: Tensor,
    attn_norm_bias: Tensor,
    to_q: Tensor,
    to_kv: Tensor,
    to_out: Tensor,
    attn_gate: Tensor,
    ff_norm_weight: Tensor,
    ff_norm_bias: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    ff_gate: Tensor,
    kv: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    q = F.linear(F.layer_norm(x, x.shape[-1:], attn_norm_weight, attn_norm_bias), to_q).unflatten(-1, (heads, -1))
    k, v = project(media, to_kv, heads) if kv is None else kv
    x = x + attn_gate.tanh() * F.linear(attend(q, k, v).flatten(2), to_out)
    hidden = F.linear(F.layer_norm(x, x.shape[-1:], ff_norm_weight, ff_norm_bias), w_in)
    if activation == "swiglu":
        gate, up = hidden.chunk(2, -1)
        hidden = F.silu(gate) * up
    else:
        hidden = F.gelu(hidden)
    return x + ff_gate.tanh() * F.linear(hidden, w_out)


def project(media: Tensor, to_kv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    k, v = F.linear(media.flatten(1, 2), to_kv).unflatten(-1, (2, heads, -1)).unbind(2)
    return k, v


# --- the packages, whose feed-forward is gelu with F = 4·C, and which build their mask in every call


def open_flamingo(case: Case) -> Prepared:
    shape = case.setting.shape
    block = _package_block(case, packages.open_flamingo(), dim_visual=shape.visual_width)
    if shape.trains:
        locations = case.setting.locations
        return _package(case, block, lambda x, media: block(x, media, media_locations=locations))
    # decoding: every beam has a media of its own, and the last of the media seen counts
    locations = torch.ones(shape.rows, shape.media, dtype=torch.bool, device=case.device)
    media = case.inputs["media"].repeat_interleave(shape.beams, 0)
    prepared = _package(case, block, lambda x, _: block(x, media, media_locations=locations, use_cached_media=True))
    prepared.note = "projects K/V in every call"
    return prepared


def flamingo_pytorch(case: Case) -> Prepared:
    package = packages.flamingo_pytorch()
    shape = case.setting.shape
    if shape.width != shape.visual_width:
        raise Unavailable("needs C == V")
    if not shape.trains:
        raise Unavailable("cannot decode: reads no media before the chunk")
    locations = case.setting.locations
    block = _package_block(case, package)
    return _package(case, block, lambda x, media: block(x, media, media_locations=locations))


def _package_block(case: Case, package: object, **widths: int) -> nn.Module:
    shape = case.setting.shape
    if (shape.activation, shape.F) != ("gelu", 4 * shape.width):
        raise Unavailable("its feed-forward is gelu with F = 4·C")
    return packages.module_of(
        lambda: package.GatedCrossAttentionBlock(dim=shape.width, dim_head=shape.head_dim, heads=shape.heads, **widths),
        {their: case.inputs[name] for name, their in _PACKAGE_NAMES.items()},
    )


def _package(case: Case, block: nn.Module, run: Callable[[Tensor, Tensor], Tensor]) -> Prepared:
    parameters = packages.parameters_of(block, _PACKAGE_NAMES.values())
    return Prepared(
        lambda x, media, *_: run(x, media), _leaves(case, parameters), case.grad_out, note="mask built in every call"
    )


PROVIDERS = (
    Provider("eager", eager),
    Provider("flamingo_kernels", ours, ours=True),
    Provider("flamingo_kernels, CUDA C++", on_backend("cuda", ours), ours=True),
    Provider("torch.compile(eager)", compiled(eager), compiles=True),
    Provider("SDPA per image", per_image),
    Provider("torch.compile(SDPA per image)", compiled(per_image), compiles=True),
    Provider("open-flamingo", open_flamingo),
    Provider("torch.compile(open-flamingo)", compiled(open_flamingo), compiles=True),
    Provider("flamingo-pytorch", flamingo_pytorch),
)
