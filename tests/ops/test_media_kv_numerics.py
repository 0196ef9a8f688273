"""media_kv: every number of forward and backward within the error budget, over shapes, layers and strides."""

import math
import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.support.layouts import LAYOUTS
from tests.support.media_kv_cases import MediaCase, assert_identical, assert_right, run_op
from tests.support.process import DTYPES, only_cpp

pytestmark = pytest.mark.ops("media_kv")
SWEEP = [
    *(MediaCase(norms=norms, rows=(rows,)) for norms in (True, False) for rows in (1, 3, 63, 65, 127, 300)),
    *(MediaCase(rows=rows) for rows in ((), (1,), (2, 1, 3, 5))),
    *(MediaCase(norms=norms, V=V) for norms in (True, False) for V in (2, 65, 128, 200)),
    MediaCase(norms=False, V=1),
    *(
        MediaCase(norms=norms, dims=dims)
        for norms in (True, False)
        for dims in ((16,), (1, 33), (8, 40, 24, 8, 16, 64))
    ),
    *(MediaCase(G=G, dims=(5, 8)) for G in (1, 3, 8)),
    *(MediaCase(mean=mean) for mean in (100.0, -30.0)),
    MediaCase(rows=(300,), V=200, dims=(64, 64)),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SWEEP, ids=str)
def test_within_the_error_budget(backend, case, dtype):
    inputs = replace(case, dtype=dtype).inputs(backend.device)
    assert_right(run_op(inputs), inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", SWEEP[::3], ids=str)
def test_wide_streams_beside_narrow_weights(backend, case, dtype):
    inputs = replace(case, dtype=dtype, streams=torch.float32).inputs(backend.device)
    assert_right(run_op(inputs), inputs)


def _random_case(seed: int) -> MediaCase:
    draw = random.Random(seed)
    dtype = draw.choice(DTYPES)
    return MediaCase(
        dtype=dtype,
        streams=torch.float32 if dtype.itemsize == 2 and draw.random() < 0.3 else None,
        rows=draw.choice(((draw.randint(2, 200),), (draw.randint(1, 4), draw.randint(2, 80)))),
        V=draw.choice((8, 64, draw.randint(3, 200))),
        G=draw.choice((1, 2, 3)),
        dims=tuple(draw.choice((1, 16, 40)) for _ in range(draw.randint(1, 4))),
        norms=draw.random() < 0.7,
        mean=draw.choice((0.0, 0.0, 10.0)),
        seed=seed,
    )


@pytest.mark.parametrize("case", [_random_case(seed) for seed in range(25)], ids=str)
def test_random_cases(backend, case):
    inputs = case.inputs(backend.device)
    assert_right(run_op(inputs), inputs)


@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize(
    "sizes", [{"rows": (0,)}, {"rows": (2, 0, 3)}, {"dims": (0,)}, {"dims": (0, 8)}, {"rows": (0,), "dims": (0,)}]
)
def test_zero_sizes(backend, sizes, norms):
    inputs = MediaCase(norms=norms, **sizes).inputs(backend.device)
    results = run_op(inputs)
    assert_right(results, inputs)
    if math.prod(inputs.media.shape) == 0:
        assert all((x == 0).all() for x in results.values())


@pytest.mark.parametrize("norms", [True, False])
def test_zero_width(backend, norms):
    """A sum over nothing is 0; and so is everything that the gradients could hold."""
    inputs = MediaCase(V=0, norms=norms).inputs(backend.device)
    results = run_op(inputs)
    for i, dout in enumerate(inputs.dout):
        assert results[f"out[{i}]"].shape == dout.shape
        assert (results[f"out[{i}]"] == 0).all()
    for name, x in inputs.named().items():
        assert results[name].shape == x.shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_of_a_norm_over_one_number_the_bias_is_left(backend, dtype):
    inputs = MediaCase(dtype=dtype, V=1).inputs(backend.device)
    results = run_op(inputs)
    for i, (weight, (scale, bias)) in enumerate(zip(inputs.weights, inputs.norms, strict=True)):
        assert torch.equal(results[f"out[{i}]"], (weight @ bias).expand_as(inputs.dout[i]))
        assert (results[f"norms[{i}].weight"] == torch.zeros_like(scale)).all()
    assert (results["media"] == 0).all()


@pytest.mark.parametrize("norms", [True, False])
def test_same_inputs_same_bits(backend, norms):
    inputs = MediaCase(rows=(3, 70), V=65, norms=norms).inputs(backend.device)
    first = run_op(inputs)
    for _ in range(4):
        assert_identical(run_op(inputs), first)


@only_cpp
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [(300,), (7,)], ids=str)
def test_same_bits_for_any_number_of_threads(backend, rows, dtype):
    inputs = MediaCase(dtype=dtype, rows=rows, V=130, dims=(40, 64)).inputs("cpu")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = run_op(inputs)
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            assert_identical(run_op(inputs), first)
    finally:
        torch.set_num_threads(before)


# ---- strides --------------------------------------------------------------------------------------------------------


def _misaligned(x: Tensor) -> Tensor:
    return torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].view(x.shape).copy_(x)


def _last_dim_apart(x: Tensor) -> Tensor:
    return torch.empty((*x.shape, 2), dtype=x.dtype, device=x.device)[..., 1].copy_(x)


def _columns_first(x: Tensor) -> Tensor:
    return x.movedim(-1, 0).contiguous().movedim(0, -1)


def _rows_apart(x: Tensor) -> Tensor:
    return torch.full((*x.shape[:-1], x.shape[-1] + 3), math.nan, dtype=x.dtype, device=x.device)[..., 2:-1].copy_(x)


def _one_number(x: Tensor) -> Tensor:
    return torch.tensor(0.25, dtype=x.dtype, device=x.device).expand(x.shape)


ANY_RANK = {f.__name__.strip("_"): f for f in (_misaligned, _last_dim_apart, _columns_first, _rows_apart, _one_number)}


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_of_media(backend, layout, dtype):
    norms = layout != "expanded dim 3"  # equal numbers have no variance
    inputs = MediaCase(dtype=dtype, rows=(2, 3, 5), norms=norms).inputs(backend.device)
    inputs = inputs._replace(media=LAYOUTS[layout](inputs.media))
    assert_right(run_op(inputs), inputs)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("layout", ANY_RANK)
def test_strides_of_parameters_and_gradients(backend, layout, norms, dtype):
    inputs = MediaCase(dtype=dtype, norms=norms).inputs(backend.device)
    before = inputs.map(Tensor.clone)
    inputs = inputs.map(ANY_RANK[layout])._replace(dout=[ANY_RANK[layout](x) for x in inputs.dout])
    assert_right(run_op(inputs), inputs)
    if layout != "one_number":
        assert_identical(inputs.named(), before.named())
