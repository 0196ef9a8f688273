"""The whole Perceiver resampler: `depth` layers of latents attending to the tokens of one media and to themselves."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flamingo_kernels as fk
from benchmarks import packages
from benchmarks.harness import FORWARD, TRAINING, Case, Prepared, Provider, Unavailable, Work, compiled, on_backend
from benchmarks.shapes import LATENTS, RESAMPLER_SHAPES, ResamplerShape
from flamingo_kernels import _backends

OP = "resampler"
MEASURED = RESAMPLER_SHAPES
QUICK = ("image",)

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v, each [N, R or S + R, H, D] -> [N, R, H, D]

_SMALL_TOKENS = 32
_PACKAGE_NAMES = {
    "media_norm.weight": "0.norm_media.weight",
    "media_norm.bias": "0.norm_media.bias",
    "latent_norm.weight": "0.norm_latents.weight",
    "latent_norm.bias": "0.norm_latents.bias",
    "to_q.weight": "0.to_q.weight",
    "to_kv.weight": "0.to_kv.weight",
    "to_out.weight": "0.to_out.weight",
    "ff_norm.weight": "1.0.weight",
    "ff_norm.bias": "1.0.bias",
    "w_in.weight": "1.1.weight",
    "w_out.weight": "1.3.weight",
}  # of a layer


@dataclass
class Setting:
    shape: ResamplerShape
    valid: Tensor | None  # bool [N, S], True at valid tokens; None: all


def case(shape: ResamplerShape, dtype: torch.dtype, device: torch.device) -> Case:
    generator = torch.Generator().manual_seed(0)
    V, inner = shape.width, shape.heads * shape.head_dim

    def normal(*size: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
        return torch.empty(size).normal_(mean, std, generator=generator).to(device, dtype)

    def weight(rows: int, columns: int) -> Tensor:
        return normal(rows, columns, std=columns**-0.5)

    def norm(name: str) -> dict[str, Tensor]:
        return {f"{name}.weight": normal(V, mean=1, std=0.1), f"{name}.bias": normal(V, std=0.1)}

    def layer() -> dict[str, Tensor]:
        return {
            **norm("media_norm"),
            **norm("latent_norm"),
            "to_q.weight": weight(inner, V),
            "to_kv.weight": weight(2 * inner, V),
            "to_out.weight": weight(V, inner),
            **norm("ff_norm"),
            "w_in.weight": weight(4 * V, V),
            "w_out.weight": weight(V, 4 * V),
        }

    weights = {"latents": normal(LATENTS, V), **norm("norm")}
    weights |= {f"layers.{i}.{name}": x for i in range(shape.depth) for name, x in layer().items()}

    def of(shape: ResamplerShape) -> Case:
        inputs = {"x": normal(shape.media, shape.tokens, V), **weights}
        grad_out = normal(shape.media, LATENTS, V)
        where = Setting(shape, _valid(shape, device))
        return Case(OP, shape.name, str(shape), inputs, grad_out, work(inputs, shape, dtype), where)

    return replace(of(shape), small=of(_small(shape)))


def _small(shape: ResamplerShape) -> ResamplerShape:
    lengths = shape.lengths and (_SMALL_TOKENS // 2,)
    return shape._replace(media=1, tokens=_SMALL_TOKENS, lengths=lengths)


def _valid(shape: ResamplerShape, device: torch.device) -> Tensor | None:
    if not shape.lengths:
        return None
    return (torch.arange(shape.tokens) < torch.tensor(shape.lengths)[:, None]).to(device)


def work(inputs: dict[str, Tensor], shape: ResamplerShape, dtype: torch.dtype) -> dict[str, Work]:
    """Matmuls over valid tokens, twice that in backward; attention, 2.5 times that; tensors moved once, then thrice."""

    def rows_of(name: str) -> int:
        of_latents = shape.media * LATENTS
        return of_latents + sum(shape.valid) if name.endswith("to_kv.weight") else of_latents

    linear = [(name, x) for name, x in inputs.items() if x.ndim == 2 and name != "latents"]
    matmuls = sum(2 * rows_of(name) * x.numel() for name, x in linear)
    pairs = LATENTS * sum(length + LATENTS for length in shape.valid)
    attention = shape.depth * 4 * shape.heads * shape.head_dim * pairs
    moved = dtype.itemsize * (sum(x.numel() for x in inputs.values()) + shape.media * LATENTS * shape.width)
    return {
        FORWARD: Work(matmuls + attention, moved),
        TRAINING: Work(3 * matmuls + 3.5 * attention, 3 * moved),
    }


# --- ours


def ours(case: Case) -> Prepared:
    shape, valid = case.setting.shape, case.setting.valid
    weights = dict(list(case.inputs.items())[1:])
    resampler = packages.module_of(
        lambda: fk.nn.PerceiverResampler(
            shape.width,
            depth=shape.depth,
            heads=shape.heads,
            dim_head=shape.head_dim,
            num_latents=LATENTS,
            activation="gelu",
        ),
        weights,
    )
    token_mask = None if valid is None else valid[:, None, None]

    def run(x: Tensor, *_: Tensor) -> Tensor:
        return resampler(x[:, None, None], token_mask=token_mask).squeeze(1)

    leaves = (case.inputs["x"], *packages.parameters_of(resampler, list(weights)))
    backend = _backends.select(case.device.type, "masked_cross_attention")
    return Prepared(run, leaves, case.grad_out, note=f"backend {backend}")


# --- the resampler in plain PyTorch


def eager(case: Case) -> Prepared:
    visible = _visible(case)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("nrhd,nshd->nhrs", q * q.shape[-1] ** -0.5, k)
        if visible is not None:
            scores = scores.masked_fill(~visible, -torch.finfo(scores.dtype).max)
        return torch.einsum("nhrs,nshd->nrhd", scores.softmax(-1), v)

    return _plain(case, attend)


def sdpa(case: Case) -> Prepared:
    visible = _visible(case)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*heads_first, attn_mask=visible).transpose(1, 2)

    return _plain(case, attend)


def _visible(case: Case) -> Tensor | None:
    """bool [N, 1, 1, S + R] over the keys, the tokens first; None: all."""
    valid = case.setting.valid
    return None if valid is None else F.pad(valid, (0, LATENTS), value=True)[:, None, None]


def _plain(case: Case, attend: Attend) -> Prepared:
    shape = case.setting.shape
    run = partial(plain_resampler, attend, shape.heads, list(case.inputs))
    return Prepared(run, tuple(case.inputs.values()), case.grad_out)


def plain_resampler(attend: Attend, heads: int, names: list[str], *leaves: Tensor) -> Tensor:
    p = dict(zip(names, leaves, strict=True))

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"])

    x = p["x"]
    latents = p["latents"].expand(x.shape[0], -1, -1)
    for layer in dict.fromkeys(name.rpartition(".")[0].rpartition(".")[0] for name in names if name[:6] == "layers"):
        z = norm(f"{layer}.latent_norm", latents)
        keys = torch.cat([norm(f"{layer}.media_norm", x), z], 1)
        q = F.linear(z, p[f"{layer}.to_q.weight"]).unflatten(-1, (heads, -1))
        k, v = F.linear(keys, p[f"{layer}.to_kv.weight"]).unflatten(-1, (2, heads, -1)).unbind(2)
        latents = latents + F.linear(attend(q, k, v).flatten(2), p[f"{layer}.to_out.weight"])
        hidden = F.gelu(F.linear(norm(f"{layer}.ff_norm", latents), p[f"{layer}.w_in.weight"]))
        latents = latents + F.linear(hidden, p[f"{layer}.w_out.weight"])
    return norm("norm", latents)


# --- the packages


def open_flamingo(case: Case) -> Prepared:
    resampler, names = _package_resampler(case, packages.open_flamingo())
    return _package(case, resampler, names, lambda x: resampler(x[:, None, None]).squeeze(1))


def flamingo_pytorch(case: Case) -> Prepared:
    embedding = torch.zeros(1, 1, case.setting.shape.width, dtype=case.dtype, device=case.device)
    resampler, names = _package_resampler(
        case, packages.flamingo_pytorch(), {"media_pos_emb": embedding}, num_media_embeds=1
    )
    resampler.media_pos_emb.requires_grad_(False)
    prepared = _package(case, resampler, names, lambda x: resampler(x[:, None]).squeeze(1))
    prepared.note = "adds an embedding of the media's place, here 0"
    return prepared


def _package_resampler(
    case: Case, package: object, state: dict[str, Tensor] | None = None, **options: int
) -> tuple[nn.Module, list[str]]:
    """The package's module around the case's weights, and its names for them in the case's order."""
    shape = case.setting.shape
    if case.setting.valid is not None:
        raise Unavailable("takes no mask")
    names = {name: _package_name(name) for name in list(case.inputs)[1:]}
    resampler = packages.module_of(
        lambda: package.PerceiverResampler(
            dim=shape.width,
            depth=shape.depth,
            dim_head=shape.head_dim,
            heads=shape.heads,
            num_latents=LATENTS,
            **options,
        ),
        {their: case.inputs[name] for name, their in names.items()} | (state or {}),
    )
    return resampler, list(names.values())


def _package_name(name: str) -> str:
    if not name.startswith("layers."):
        return name
    _, layer, of_layer = name.split(".", 2)
    return f"layers.{layer}.{_PACKAGE_NAMES[of_layer]}"


def _package(case: Case, resampler: nn.Module, names: list[str], run: Callable[[Tensor], Tensor]) -> Prepared:
    leaves = (case.inputs["x"], *packages.parameters_of(resampler, names))
    return Prepared(lambda x, *_: run(x), leaves, case.grad_out)


PROVIDERS = (
    Provider("eager", eager),
    Provider("flamingo_kernels", ours, ours=True),
    Provider("flamingo_kernels, CUDA C++", on_backend("cuda", ours), ours=True),
    Provider("torch.compile(eager)", compiled(eager), compiles=True),
    Provider("SDPA", sdpa),
    Provider("torch.compile(SDPA)", compiled(sdpa), compiles=True),
    Provider("open-flamingo", open_flamingo),
    Provider("torch.compile(open-flamingo)", compiled(open_flamingo), compiles=True),
    Provider("flamingo-pytorch", flamingo_pytorch),
)
