"""The attention module around masked_cross_attention: norm, query and key/value projections, attention, output.

Rows of their own, because the public packages ship this module rather than the attention alone. Ours is the same
module in plain PyTorch with our op inside.
"""

import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flamingo_kernels as fk
from benchmarks import bench_masked_cross_attention as attention
from benchmarks.harness import FORWARD, TRAINING, Case, Prepared, Provider, Unavailable, Work
from benchmarks.shapes import LATENTS, Shape
from flamingo_kernels import _backends

OP = "masked_cross_attention_module"
_SHAPES = ("of3b", "mini")  # the projections, the same matmuls in every row, hide the attention elsewhere too


def cases(shapes: Sequence[Shape], dtypes: Sequence[torch.dtype], device: torch.device) -> Iterator[Case]:
    for shape in shapes:
        if shape.name in _SHAPES:
            for dtype in dtypes:
                yield case(shape, dtype, device)


def case(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    generator = torch.Generator().manual_seed(0)
    inner = shape.heads * shape.head_dim

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*size, generator=generator)).to(device, dtype)

    def weight(rows: int, columns: int) -> Tensor:
        return normal(rows, columns, scale=columns**-0.5)

    inputs = {
        "x": normal(shape.rows, shape.tokens, shape.width),
        "media": normal(shape.rows, shape.media, LATENTS, shape.visual_width),
        "norm.weight": 1 + normal(shape.width, scale=0.1),
        "norm.bias": normal(shape.width, scale=0.1),
        "to_q.weight": weight(inner, shape.width),
        "to_kv.weight": weight(2 * inner, shape.visual_width),
        "to_out.weight": weight(shape.width, inner),
    }
    where = attention.setting(shape, device)
    return Case(OP, shape.name, str(shape), inputs, normal(*inputs["x"].shape), _work(inputs, where, dtype), where)


def _work(inputs: dict[str, Tensor], where: attention.Setting, dtype: torch.dtype) -> dict[str, Work]:
    """The projections, twice that in backward, and the attention; inputs, weights and output moved once per pass."""
    shape, inside = where.shape, attention.work(where, dtype)
    inner, text, keys = shape.heads * shape.head_dim, shape.rows * shape.tokens, shape.rows * shape.keys
    projections = 2 * inner * (2 * text * shape.width + 2 * keys * shape.visual_width)
    moved = dtype.itemsize * (sum(x.numel() for x in inputs.values()) + inputs["x"].numel())
    return {
        FORWARD: Work(projections + inside[FORWARD].flops, moved),
        TRAINING: Work(3 * projections + inside[TRAINING].flops, 3 * moved),
    }


# --- ours and the plain module


def module(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    heads: int,
    x: Tensor,
    media: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    w_q: Tensor,
    w_kv: Tensor,
    w_out: Tensor,
) -> Tensor:
    """attend takes and gives [B, T, H, D]."""
    q = F.linear(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias), w_q).unflatten(-1, (heads, -1))
    k, v = F.linear(media.flatten(1, 2), w_kv).unflatten(-1, (2, heads, -1)).unbind(2)
    return F.linear(attend(q, k, v).flatten(2), w_out)


def ours(case: Case) -> Prepared:
    intervals = case.setting.intervals()

    def run(*leaves: Tensor) -> Tensor:
        return module(lambda q, k, v: fk.masked_cross_attention(q, k, v, intervals), case.setting.shape.heads, *leaves)

    return Prepared(
        run,
        tuple(case.inputs.values()),
        case.grad_out,
        setup=case.setting.intervals,
        note=f"backend {_backends.select(case.device.type, 'masked_cross_attention')}",
    )


def eager(case: Case) -> Prepared:
    return Prepared(_plain(case), tuple(case.inputs.values()), case.grad_out, setup=_mask_setup(case))


def compiled_eager(case: Case) -> Prepared:
    run = torch.compile(_plain(case), dynamic=False)
    return Prepared(run, tuple(case.inputs.values()), case.grad_out, setup=_mask_setup(case))


def _plain(case: Case) -> Callable[..., Tensor]:
    mask, blind = attention.dense_masks(case.setting)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        return attention.flamingo_attention(*heads_first, mask, blind).transpose(1, 2)

    return lambda *leaves: module(attend, case.setting.shape.heads, *leaves)


def _mask_setup(case: Case) -> Callable[[], object]:
    return lambda: attention.dense_masks(case.setting)


# --- the packages


def open_flamingo(case: Case) -> Prepared:
    shape = case.setting.shape
    package_module = _open_flamingo_helpers().MaskedCrossAttention(
        dim=shape.width, dim_visual=shape.visual_width, dim_head=shape.head_dim, heads=shape.heads
    )
    return _package(case, package_module)


def compiled_open_flamingo(case: Case) -> Prepared:
    prepared = open_flamingo(case)
    prepared.run = torch.compile(prepared.run, dynamic=False)
    return prepared


def flamingo_pytorch(case: Case) -> Prepared:
    try:
        package = importlib.import_module("flamingo_pytorch.flamingo_pytorch")
    except ImportError as error:
        raise Unavailable("not installed") from error
    shape = case.setting.shape
    if shape.width != shape.visual_width:
        raise Unavailable("needs C == V")
    return _package(case, package.MaskedCrossAttention(dim=shape.width, dim_head=shape.head_dim, heads=shape.heads))


def _open_flamingo_helpers() -> object:
    """open_flamingo/src/helpers.py by its path: importing the package needs much more than this module does."""
    try:
        distribution = importlib.metadata.distribution("open-flamingo")
        path = distribution.locate_file("open_flamingo/src/helpers.py")
        spec = importlib.util.spec_from_file_location("open_flamingo_helpers", path)
        helpers = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = helpers  # torch.compile looks a function's module up there
        spec.loader.exec_module(helpers)
    except ImportError as error:
        raise Unavailable("not installed") from error
    return helpers


def _package(case: Case, package_module: nn.Module) -> Prepared:
    x, media, *_ = case.inputs.values()
    names = list(case.inputs)[2:]
    package_module = package_module.to(case.device, case.dtype)
    package_module.load_state_dict({name: case.inputs[name] for name in names})
    parameters = dict(package_module.named_parameters())
    locations = case.setting.locations

    def run(x: Tensor, media: Tensor, *_: Tensor) -> Tensor:
        return package_module(x, media, media_locations=locations)

    return Prepared(
        run, (x, media, *(parameters[name] for name in names)), case.grad_out, note="mask built in every call"
    )


PROVIDERS = (
    Provider("eager", eager),
    Provider("flamingo_kernels", ours, ours=True),
    Provider("torch.compile(eager)", compiled_eager),
    Provider("open-flamingo", open_flamingo),
    Provider("torch.compile(open-flamingo)", compiled_open_flamingo),
    Provider("flamingo-pytorch", flamingo_pytorch),
)
