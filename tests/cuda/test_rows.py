"""The CUDA kernels between matmuls: rows of any width, what they move, bank conflicts, any schedule, bad calls."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from tests.support import media_kv_cases
from tests.support.linear_cases import Case, check, run_op
from tests.support.media_kv_cases import MediaCase
from tests.support.process import EMULATED

if not EMULATED:
    pytest.skip("runs on the emulated kernels (pytest -p tests.cusim.plugin)", allow_module_level=True)

from flamingo_kernels.cuda import _kernels as kernels
from flamingo_kernels.cuda._module import module

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
EMULATOR = module().emulator

# ---- widths ---------------------------------------------------------------------------------------------------------
# A team of 32 has up to 512 columns in registers, one of 512 up to 8192; wider and odd rows are read again.
WIDTHS = {8: 40, 136: 70, 520: 12, 1023: 5, 8192: 3, 8200: 3, 9001: 2}


@pytest.mark.parametrize(("norm", "dtype", "streams"), [("layer", BF16, None), ("rms", FP16, FP32)])
@pytest.mark.parametrize("width", WIDTHS)
def test_norms_of_any_width(backend, width, norm, dtype, streams):
    """Rows enough for several to each block."""
    case = Case("norm_linear", dtype, streams, rows=(WIDTHS[width],), C=width, N=3, norm=norm, mean=3.0)
    check(case, backend.device)


@pytest.mark.parametrize("gate", [None, 0.7])
@pytest.mark.parametrize(("dtype", "stream"), [(BF16, BF16), (FP16, FP32), (FP32, FP32)], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_sum_and_its_norm_in_one_pass(poison, width, dtype, stream, gate):
    """The bits of two passes."""
    residual, branch = _numbers(2, WIDTHS[width], width, dtype=stream)
    gate, parameters = None if gate is None else torch.tensor(gate), _numbers(2, width, dtype=stream)
    y, z, copy = kernels.add_normalize(residual, branch, gate, *parameters, "layer", 1e-5, dtype, copy=True)
    expected = kernels.add(residual, branch, gate)
    assert torch.equal(y, expected)
    assert torch.equal(copy, expected)
    assert torch.equal(z, kernels.normalize(expected, *parameters, "layer", 1e-5, dtype)[0])


@pytest.mark.parametrize("width", [64, 33])
def test_parts_of_a_norms_backward(width):
    """Each alone is what it is among the others, and of no other's type."""
    dz, x, residual = _numbers(3, 9, width)
    given = dz, x, *_numbers(2, width), "layer", 1e-5
    dx, z, parts = kernels.norm_backward(*given, residual=residual, dx=True, z=BF16, sums=True)
    nothing = {"residual": residual, "dx": False, "z": None, "sums": False}
    assert torch.equal(kernels.norm_backward(*given, **nothing | {"dx": True})[0], dx)
    assert torch.equal(kernels.norm_backward(*given, **nothing | {"z": BF16})[1], z)
    for alone, part in zip(kernels.norm_backward(*given, **nothing | {"sums": True})[2], parts, strict=True):
        assert torch.equal(alone, part)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_media_wider_than_registers(backend, dtype):
    inputs = MediaCase(dtype=dtype, rows=(3,), V=8200, dims=(4,)).inputs(backend.device)
    media_kv_cases.assert_right(media_kv_cases.run_op(inputs), inputs)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("width", [4096, 5003])
def test_activations_of_several_blocks(backend, width, activation):
    check(Case("gated_mlp", BF16, rows=(5,), C=16, N=width, activation=activation, gate="scalar"), backend.device)


# ---- bytes and bank conflicts ---------------------------------------------------------------------------------------


def _numbers(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(math.prod(shape))).to(dtype)


def _norm_forward(rows: int, C: int, stream: torch.dtype, copy: bool) -> list[Tensor]:
    x, parameters = _numbers(rows, C, dtype=stream), _numbers(2, C)
    return [x, parameters, *kernels.normalize(x, *parameters, "layer", 1e-5, BF16, copy)]


def _sum_and_norm(rows: int, C: int, stream: torch.dtype, copy: bool) -> list[Tensor]:
    (residual, branch), parameters, gate = _numbers(2, rows, C, dtype=stream), _numbers(2, C), _numbers(1)
    results = kernels.add_normalize(residual, branch, gate, *parameters, "layer", 1e-5, BF16, copy)
    return [residual, branch, parameters, gate, *results]


def _norm_backward(C: int, stream: torch.dtype, rows: int) -> list[Tensor]:
    dz, x, residual = (_numbers(rows, C, dtype=stream) for _ in range(3))
    parameters = _numbers(2, C)
    dx, z, parts = kernels.norm_backward(
        dz, x, *parameters, "layer", 1e-5, residual=residual, dx=True, z=BF16, sums=True
    )
    return [dz, x, residual, parameters, dx, z, *parts]


def _activate(activation: str, F: int) -> list[Tensor]:
    h, gate = _numbers(32, F), _numbers(1)
    return [h, gate, kernels.activate(activation, h, gate)]


def _activation_backward(activation: str, F: int, wide: torch.dtype) -> list[Tensor]:
    h, gate = _numbers(32, F), _numbers(1)
    da = _numbers(32, F // 2 if activation == "swiglu" else F, dtype=wide)
    results = kernels.activation_backward(activation, da, h, gate, dh=True, a=True, sums=True)
    return [h, da, gate, *results]


def _add(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    residual, branch, gate = _numbers(32, 2048, dtype=dtype), _numbers(32, 2048, dtype=dtype), _numbers(*shape)
    return [residual, branch, gate, kernels.add(residual, branch, gate)]


def _weight_gradients() -> list[Tensor]:
    p, weight, gate = _numbers(64, 2048), _numbers(64, 2048), _numbers(64)
    return [p, weight, gate, *kernels.weight_gradients(p, weight, gate)]


def _fold() -> list[Tensor]:
    weight, folded, offset = _numbers(64, 1024), _numbers(64, 1024), _numbers(64)
    scale, bias = _numbers(2, 1024)
    kernels.fold(weight, scale, bias, folded, offset)
    return [weight, scale, bias, folded, offset]


def _unfold(wide: torch.dtype) -> list[Tensor]:
    p, s, weight = _numbers(512, 64, dtype=wide), _numbers(512, dtype=FP32), _numbers(512, 64)
    scale, bias = _numbers(2, 64, dtype=wide)
    return [p, s, weight, scale, bias, *kernels.unfold(p, s, weight, scale, bias, (True,) * 3)]


def _sum_rows() -> list[Tensor]:
    sums = [(_numbers(132, 2048, dtype=FP32), _numbers(2048), None) for _ in range(2)]
    sums.append((_numbers(4096, 1, dtype=FP32), _numbers(1), _numbers(1)))
    kernels.sum_rows(sums)
    return [x for each in sums for x in each if x is not None]


RUNS: dict[str, Callable[[], Sequence[Tensor]]] = {
    "norm": partial(_norm_forward, 128, 2048, BF16, False),
    "norm, copy": partial(_norm_forward, 128, 2048, BF16, True),
    "norm of fp32": partial(_norm_forward, 128, 1024, FP32, False),
    "norm of narrow rows": partial(_norm_forward, 512, 256, BF16, False),
    "sum and norm": partial(_sum_and_norm, 128, 2048, BF16, False),
    "sum and norm, copy": partial(_sum_and_norm, 128, 2048, BF16, True),
    "sum and norm of fp32": partial(_sum_and_norm, 128, 1024, FP32, False),
    "norm backward": partial(_norm_backward, 2048, BF16, 64),
    "norm backward of fp32": partial(_norm_backward, 1024, FP32, 64),
    "norm backward of narrow rows": partial(_norm_backward, 256, BF16, 512),
    "activation": partial(_activate, "gelu", 2048),
    "swiglu": partial(_activate, "swiglu", 4096),
    "activation backward": partial(_activation_backward, "gelu", 2048, BF16),
    "identity backward, fp32": partial(_activation_backward, "identity", 2048, FP32),
    "swiglu backward": partial(_activation_backward, "swiglu", 4096, BF16),
    "gate": partial(_add, (1,), BF16),
    "gate per channel": partial(_add, (2048,), BF16),
    "gate per channel, fp32": partial(_add, (2048,), FP32),
    "gate backward": _weight_gradients,
    "fold": _fold,
    "unfold": partial(_unfold, BF16),
    "unfold, fp32": partial(_unfold, FP32),
    "sums": _sum_rows,
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_moves_what_it_must_and_no_more(run):
    """Sectors of 32 bytes that warps ask for, over the bytes of all that a kernel is there to read and to write."""
    EMULATOR.reset()
    tensors = run()
    counted = EMULATOR.counters()
    moved = 32 * (counted["global_sectors_read"] + counted["global_sectors_written"])
    # a gradient may stand where its output did, which is then both read and written
    least = sum(x.numel() * x.element_size() for x in tensors)
    assert least <= moved <= 1.1 * least
    assert counted["launches"] == 1
    assert counted["shared_wavefronts"] == counted["shared_least"]


# ---- schedules and bad calls ----------------------------------------------------------------------------------------


@pytest.fixture
def any_schedule():
    seed, order = EMULATOR.seed, EMULATOR.order
    yield
    EMULATOR.seed, EMULATOR.order = seed, order


@pytest.mark.parametrize(
    "case",
    [
        Case("gated_mlp", BF16, rows=(40,), C=1032, N=130, gate="scalar"),
        Case("gated_mlp", FP32, rows=(7,), C=1031, N=33, activation="swiglu", gate="vector"),
    ],
    ids=str,
)
def test_same_bits_in_any_order(backend, any_schedule, case):
    tensors, dy = case.inputs(backend.device)
    first = run_op(case, tensors, dy)
    for seed, order in ((1, "random"), (2, "random"), (0, "ascending"), (0, "descending")):
        EMULATOR.seed, EMULATOR.order = seed, order
        again = run_op(case, tensors, dy)
        assert all(torch.equal(again[name], first[name]) for name in first)


def test_types_that_do_not_go_together_are_refused():
    x, z = _numbers(2, 8, dtype=FP16), BF16
    with pytest.raises(ValueError, match="norm: rows of x may be of z's type, or fp32"):
        kernels.normalize(x, None, None, "layer", 1e-5, z)
    with pytest.raises(ValueError, match="norm: the branch must be of x's type"):
        kernels.add_normalize(x, _numbers(2, 8), None, None, None, "layer", 1e-5, FP16)
    with pytest.raises(ValueError, match="activation: da may be of h's type, or fp32"):
        kernels.activation_backward("relu", x, _numbers(2, 8), None, dh=True, a=False, sums=False)
    with pytest.raises(ValueError, match="gate: the residual must be of x's type"):
        kernels.add(x, _numbers(2, 8), None)
    with pytest.raises(ValueError, match="fold: p may be of weight's type, or fp32"):
        kernels.unfold(x, _numbers(2, dtype=FP32), _numbers(2, 8), *_numbers(2, 8), (True,) * 3)
