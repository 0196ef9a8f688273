"""What is accounted for at a shape: each op, the gated block and the resampler, ours and in plain PyTorch.

Tensors are zeros, for only their shapes matter; intervals are those of the benchmarks, media spread evenly. Plain
PyTorch gets meta tensors.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

import flamingo_kernels as fk
from benchmarks import bench_gated_block as gated_block
from benchmarks import bench_masked_cross_attention as masked
from benchmarks import bench_resampler as resampler
from benchmarks.accounting import total_bytes
from benchmarks.harness import Case
from benchmarks.shapes import LATENTS, ResamplerShape, Shape
from flamingo_kernels.ops.gated_cross_attention import gated_cross_attention

Run = Callable[..., Tensor | tuple[Tensor, ...]]


@dataclass
class Accounted:
    """One op at one shape: what to run on which leaves, and the bytes of all that goes in and comes out, by name."""

    name: str
    ours: tuple[Run, Sequence[Tensor]]
    eager: tuple[Run, Sequence[Tensor]]
    bytes: dict[str, int]
    trains: bool
    read: dict[str, int] = field(default_factory=dict)  # bytes of inputs that need not be read whole


def of_block(shape: Shape, dtype: torch.dtype) -> Iterator[Accounted]:
    """The ops of a gated block, each alone, then the block."""
    B, T, H, D, C = shape.rows, shape.tokens, shape.heads, shape.head_dim, shape.width
    where = masked.setting(shape, torch.device("cpu"))
    intervals = where.intervals()
    seen = intervals._asdict()
    mask, blind = masked.dense_masks(where)
    keys_seen = int(mask[:, 0].any(1).unflatten(0, (-1, shape.beams)).any(1).sum())
    mask, blind = mask.to("meta"), blind.to("meta")

    def zeros(*size: int) -> Tensor:
        return torch.zeros(size, dtype=dtype)

    def op(name: str, ours: Run, eager: Run, leaves: dict[str, Tensor], **more: Tensor) -> Accounted:
        return _op(name, ours, eager, leaves, more, shape.trains, read)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        return masked.flamingo_attention(*heads_first, mask, blind).transpose(1, 2)

    def attention_half(
        x: Tensor, weight: Tensor, bias: Tensor, w_q: Tensor, k: Tensor, v: Tensor, *out: Tensor
    ) -> Tensor:
        q = _norm_linear(x, weight, bias, w_q).unflatten(-1, (H, D))
        return _gate_residual(attend(q, k, v).flatten(2), out[0], x, out[1])

    def mlp(x: Tensor, weight: Tensor, bias: Tensor, w_in: Tensor, w_out: Tensor, gate: Tensor) -> Tensor:
        return _gate_residual(_activate(_norm_linear(x, weight, bias, w_in), shape.activation), w_out, x, gate)

    x, gate, norm = zeros(B, T, C), zeros(1), {"norm_weight": zeros(C), "norm_bias": zeros(C)}
    k, v = zeros(B // shape.beams, shape.keys, 2, H, D).unbind(2)  # as one matmul gives them
    kv = {"k": k, "v": v}
    read = dict.fromkeys(kv, keys_seen * H * D * dtype.itemsize)
    w_q, w_out = zeros(H * D, C), zeros(C, H * D)
    w_in, w_back = zeros((2 if shape.activation == "swiglu" else 1) * shape.F, C), zeros(C, shape.F)
    media = zeros(B // shape.beams, shape.media, LATENTS, shape.visual_width)

    yield op(
        *("masked_cross_attention", lambda q, k, v: fk.masked_cross_attention(q, k, v, intervals), attend),
        {"q": zeros(B, T, H, D), **kv},
        **seen,
        lse=torch.zeros(B, H, T),
    )
    yield op("norm_linear", fk.norm_linear, _norm_linear, {"x": x, **norm, "weight": w_q})
    yield op(
        *("linear_gate_residual", fk.linear_gate_residual, _gate_residual),
        {"x": zeros(B, T, H * D), "weight": w_out, "residual": x, "gate": gate},
    )
    yield op(
        "gated_cross_attention",
        lambda *leaves: gated_cross_attention(*leaves[:-2], intervals, *leaves[-2:]),
        attention_half,
        {"x": x, **norm, "w_q": w_q, **kv, "w_out": w_out, "gate": gate},
        **seen,
    )
    yield op(
        *("gated_mlp", lambda *leaves: fk.gated_mlp(*leaves, activation=shape.activation), mlp),
        {"x": x, **norm, "w_in": w_in, "w_out": w_back, "gate": gate},
    )
    if shape.trains:  # else keys and values are there already
        yield op(
            "media_kv",
            lambda media, weight: fk.media_kv(media.flatten(1, 2), [weight], H)[0],
            lambda media, weight: gated_block.project(media, weight, H),
            {"media": media, "weight": zeros(2 * H * D, shape.visual_width)},
        )
    with torch.device("meta"):
        parameters = dict(gated_block.fused_block(shape).named_parameters())
    weights = {name: zeros(*parameters[name].shape) for name in gated_block._PACKAGE_NAMES}  # in the order of its case
    case = Case(gated_block.OP, shape.name, "", {"x": x, "media": media, **weights}, x, {}, where)
    block = _module(gated_block, case, replace(where, locations=where.locations.to("meta")), shape.trains)
    block.bytes |= {name: total_bytes([x]) for name, x in seen.items()}
    if not shape.trains:
        block.bytes |= {name: total_bytes([x]) for name, x in kv.items()}
        block.read = {"media": 0, "to_kv.weight": 0, **read}
    yield block


def of_resampler(shape: ResamplerShape, dtype: torch.dtype) -> Iterator[Accounted]:
    """Latent attention, then the whole resampler."""
    N, S, H, D, V = shape.media, shape.tokens, shape.heads, shape.head_dim, shape.width
    valid = resampler._valid(shape, torch.device("cpu"))
    lengths = torch.tensor(shape.lengths, dtype=torch.int32) if shape.lengths else None
    hidden = None if valid is None else F.pad(~valid, (0, LATENTS))[:, None, None].to("meta")

    def zeros(*size: int) -> Tensor:
        return torch.zeros(size, dtype=dtype)

    def eager(q: Tensor, k_media: Tensor, v_media: Tensor, k_latents: Tensor, v_latents: Tensor) -> Tensor:
        k, v = torch.cat([k_media, k_latents], 1), torch.cat([v_media, v_latents], 1)
        scores = torch.einsum("nrhd,nshd->nhrs", q * D**-0.5, k)
        if hidden is not None:
            scores = scores.masked_fill(hidden, -torch.finfo(dtype).max)
        return torch.einsum("nhrs,nshd->nrhd", scores.softmax(-1), v)

    latents, media = ((N, n, H, D) for n in (LATENTS, S))
    sizes = {"q": latents, "k_media": media, "v_media": media, "k_latents": latents, "v_latents": latents}
    yield _op(
        "latent_attention",
        lambda *leaves: fk.latent_attention(*leaves, media_lengths=lengths),
        eager,
        {name: zeros(*size) for name, size in sizes.items()},
        {"lse": torch.zeros(N, H, LATENTS)},
        trains=True,
        read=dict.fromkeys(("k_media", "v_media"), sum(shape.valid) * H * D * dtype.itemsize),
    )
    with torch.device("meta"):
        parameters = fk.nn.PerceiverResampler(V, depth=shape.depth, heads=H, dim_head=D).named_parameters()
    weights = {name: zeros(*parameter.shape) for name, parameter in parameters}
    where = resampler.Setting(shape, valid)
    on_meta = replace(where, valid=None if valid is None else valid.to("meta"))
    case = Case(resampler.OP, shape.name, "", {"x": zeros(N, S, V), **weights}, zeros(N, LATENTS, V), {}, where)
    yield _module(resampler, case, on_meta, trains=True)


def _op(
    name: str,
    ours: Run,
    eager: Run,
    leaves: dict[str, Tensor],
    more: dict[str, Tensor],
    trains: bool,
    read: dict[str, int],
) -> Accounted:
    """more: what goes in or comes out and is no leaf; but for y, which the eager function tells."""
    on_meta = _on_meta(leaves)
    y = eager(*on_meta.values())
    y = (y,) if isinstance(y, Tensor) else y
    sizes = {name: total_bytes([x]) for name, x in {**leaves, **more}.items()} | {"y": total_bytes(y)}
    return Accounted(name, (ours, tuple(leaves.values())), (eager, tuple(on_meta.values())), sizes, trains, read)


def _module(bench: ModuleType, case: Case, on_meta: object, trains: bool) -> Accounted:
    """As the benchmark runs it."""
    ours = bench.ours(case)
    eager = bench.eager(replace(case, inputs=_on_meta(case.inputs), setting=on_meta))
    sizes = {name: total_bytes([x]) for name, x in {**case.inputs, "y": case.grad_out}.items()}
    return Accounted(bench.OP, (ours.run, ours.leaves), (eager.run, eager.leaves), sizes, trains)


def _on_meta(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.to("meta") for name, x in leaves.items()}


def _norm_linear(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor) -> Tensor:
    return F.linear(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias), weight)


def _gate_residual(x: Tensor, weight: Tensor, residual: Tensor, gate: Tensor) -> Tensor:
    return residual + gate.tanh() * F.linear(x, weight)


def _activate(hidden: Tensor, activation: str) -> Tensor:
    if activation == "swiglu":
        gate, up = hidden.chunk(2, -1)
        return F.silu(gate) * up
    return F.gelu(hidden)
