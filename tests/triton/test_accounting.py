"""The accounting of launches counts right, and no kernel moves much more than it must at the shapes of3b and shots32.

Both have 2048 rows of text, so kernels on rows do the same at either. Of these rows a sixteenth is counted, on a
sixteenth of a GPU's multiprocessors; of attention one row of the batch or one head, for all are alike.
"""

import pkgutil
from importlib import import_module
from itertools import chain

import pytest
import torch

from tests.support.process import INTERPRETED

pytest.importorskip("triton")
if not INTERPRETED:
    pytest.skip("kernels are counted in the interpreter (TRITON_INTERPRET=1)", allow_module_level=True)

import triton
import triton.language as tl

import flamingo_kernels as fk
import flamingo_kernels.triton
from benchmarks import accounted_ops, minima
from benchmarks.accounting import Accounting, Launch, forward_and_backward
from benchmarks.roofline import CHIPS, kernel_table, lines, table
from benchmarks.shapes import RESAMPLER_SHAPES, SHAPES, Shape

MOST = 1.15  # bytes over the least that there are
WIDE = {"wide_norm_fwd_kernel": 3.5, "wide_norm_bwd_kernel": 3.0}  # rows beyond 8192 are read again, from a cache
PROCESSORS = 132 // 16
BF16 = torch.bfloat16


# --- the accounting itself


@triton.jit
def _toy_kernel(x, y, out, n, B: tl.constexpr):
    """out = x y for the first n of B rows of x; every program does the same."""
    i = tl.arange(0, B)
    at = i[:, None] * B + i[None, :]
    rows = (i < n)[:, None] & (i < B)[None, :]
    tl.store(out + at, tl.dot(tl.load(x + at, mask=rows, other=0.0), tl.load(y + at)), mask=rows)


@triton.jit
def _first_kernel(count, x, out, B: tl.constexpr):
    """Copies as many elements as an integer in memory says."""
    i = tl.arange(0, B)
    keep = i < tl.load(count)
    tl.store(out + i, tl.load(x + i, mask=keep), mask=keep)


@triton.jit
def gate_residual_fwd_kernel(x, residual, gate, y, n, GATE: tl.constexpr, RESIDUAL: tl.constexpr, B: tl.constexpr):
    """A careless kernel under the name of a good one: reads x twice."""
    i = tl.program_id(0) * B + tl.arange(0, B)
    keep = i < n
    once, again = tl.load(x + i, mask=keep), tl.load(x + i, mask=keep)
    tl.store(y + i, (once + again) * 0.5 + tl.load(residual + i, mask=keep), mask=keep)


def _launches(kernel, programs: int, *args, **constexprs) -> list[Launch]:
    with Accounting() as accounting:
        kernel[(programs,)](*args, **constexprs)
    return accounting.launches


def test_masked_loads_a_dot_and_repeated_reads():
    x, y, out = torch.zeros(3, 16, 16, dtype=BF16).unbind()
    (launch,) = _launches(_toy_kernel, 3, x, y, out.float(), 5, B=16)
    assert launch.name == "_toy_kernel"
    assert launch.is_triton
    assert not launch.is_matmul
    assert (launch.unique_read, launch.unique_written) == ((5 + 16) * 16 * 2, 5 * 16 * 4)
    assert (launch.read, launch.written) == (3 * launch.unique_read, 3 * launch.unique_written)
    assert launch.flops == 3 * 2 * 16**3  # padded rows cost as much


def test_integers_in_memory_decide():
    """A launch that looks like one before is counted anew if its integers differ, and they alone."""
    x, out = torch.zeros(2, 16)
    counted = [_launches(_first_kernel, 1, torch.tensor([n]), x, out, B=16)[0].written for n in (3, 7, 3)]
    assert counted == [12, 28, 12]


def test_nothing_is_reached_outside_of_the_arguments():
    x, y = torch.zeros(2, 16)
    with pytest.raises(Exception, match="in none of its tensors"):
        _launches(_first_kernel, 1, torch.tensor([16]), x[4:].clone(), y, B=16)


def test_operators_of_pytorch():
    x, weight = torch.zeros(8, 4, device="meta"), torch.zeros(6, 4, device="meta")
    with Accounting() as accounting:
        y = torch.nn.functional.linear(x.view(2, 4, 4), weight)  # views are free
        y.add_(y[:1].expand(2, 4, 6))  # what is expanded is read once
        y.zero_()
    matmul, add, zero = accounting.launches
    assert (matmul.is_matmul, matmul.flops) == (True, 2 * 8 * 4 * 6)
    assert (matmul.read, matmul.written) == (4 * (8 * 4 + 6 * 4), 4 * 8 * 6)
    assert (add.read, add.written) == (4 * (48 + 24), 4 * 48)
    assert (zero.read, zero.written) == (0, 4 * 48)
    assert [launch.name for launch in accounting.launches] == ["mm", "add_", "zero_"]


def test_an_unknown_operator_is_not_free():
    with pytest.raises(NotImplementedError, match="aten::erfinv is in no list"), Accounting():
        torch.zeros(4).erfinv()


def test_a_launch_takes_as_long_as_its_nearer_limit():
    chip, bandwidth, matmul = CHIPS["h100"], Launch("", 0, 0, 3_350_000, 0), Launch("", 0, 0, 1, 1, 1_978_800_000)
    assert chip.seconds([bandwidth, matmul], BF16) == pytest.approx(1e-6 + 2e-6)


def test_roofline():
    with fk.use_backend("triton"):
        found = lines("decode32", BF16, CHIPS["h100"])
    assert [(line.op, line.pass_) for line in found][-1] == ("gated_block", "forward")
    assert len(table(found, CHIPS["h100"], BF16)) == 1 + len(found)
    assert kernel_table(found)[1].startswith("norm_fwd_kernel")
    for line in found:
        assert line.least <= sum(launch.unique for launch in line.ours) <= sum(launch.unique for launch in line.eager)


def test_the_interpreter_is_itself_again():
    x = torch.arange(16.0)
    with Accounting():
        pass
    out = torch.empty(16)
    _first_kernel[(1,)](torch.tensor([16]), x, out, B=16)
    assert torch.equal(out, x)


def test_reading_an_input_twice_is_seen():
    x, residual, y = torch.zeros(3, 4096).unbind()
    (launch,) = _launches(gate_residual_fwd_kernel, 4, x, residual, x, y, 4096, GATE="none", RESIDUAL=True, B=1024)
    assert launch.requested / minima.of_kernel(launch) == pytest.approx(4 / 3)
    assert launch.unique == minima.of_kernel(launch)


# --- the kernels


def _sixteenth_of_a_block(**others):
    return SHAPES["of3b"]._replace(rows=1, tokens=128, media=2, **others)


def _rows_kernels() -> dict[str, list[Launch]]:
    """The launches of kernels on rows by name: of a block, of a gate per channel, and of a resampler's layer."""
    ops = [op for op in accounted_ops.of_block(_sixteenth_of_a_block(), BF16) if op.name == "gated_block"]
    resampler = RESAMPLER_SHAPES["img"]._replace(media=1, depth=1)
    ops += [op for op in accounted_ops.of_resampler(resampler, BF16) if op.name == "resampler"]
    runs = [op.ours for op in ops]
    runs.append(
        (fk.linear_gate_residual, [torch.zeros(n, dtype=BF16) for n in ((128, 512), (2048, 512), (128, 2048), 2048)])
    )
    runs.append((fk.norm_linear, [torch.zeros(n, dtype=BF16) for n in ((128, 12288), 12288, 12288, (16, 12288))]))
    launches: dict[str, list[Launch]] = {}
    with fk.use_backend("triton"):
        for run in runs:
            for launch in chain(*forward_and_backward(*run, PROCESSORS)):
                if launch.is_triton and "attention" not in launch.name:
                    launches.setdefault(launch.name, []).append(launch)
    return launches


@pytest.fixture(scope="module")
def rows_kernels() -> dict[str, list[Launch]]:
    return _rows_kernels()


@pytest.mark.parametrize("name", minima.ELEMENTWISE)
def test_kernel_on_rows(rows_kernels, name):
    for launch in rows_kernels[name]:
        least = minima.of_kernel(launch)
        assert launch.unique <= MOST * least, launch
        # of the 64 latents that a resampler starts from a program has one tile, and takes the norm's parameters for it
        most = 1.24 if name == "norm_fwd_kernel" and least < 2**19 else WIDE.get(name, MOST)
        assert launch.requested <= most * least, launch
        assert launch.flops == 0


def test_no_kernel_is_left_out():
    modules = [module.name for module in pkgutil.iter_modules(flamingo_kernels.triton.__path__)]
    found = {
        name
        for module in modules
        for name in vars(import_module(f"flamingo_kernels.triton.{module}"))
        if name.endswith("_kernel") and "attention" not in name
    }
    assert found == set(minima.ELEMENTWISE)


# op and shape
ATTENTION = [
    pytest.param("masked_cross_attention", SHAPES["of3b"]._replace(rows=1), id="masked-of3b"),
    pytest.param("masked_cross_attention", SHAPES["shots32"]._replace(heads=1), id="masked-shots32"),
    pytest.param("latent_attention", RESAMPLER_SHAPES["img"]._replace(media=1), id="latent-img"),
]


@pytest.mark.parametrize(("name", "shape"), ATTENTION)
def test_attention(name, shape):
    of_shape = accounted_ops.of_block if isinstance(shape, Shape) else accounted_ops.of_resampler
    op = next(op for op in of_shape(shape, BF16) if op.name == name)
    with fk.use_backend("triton"):
        passes = forward_and_backward(*op.ours, PROCESSORS)
    for launches, least in zip(passes, minima.of_op(name, op.bytes, op.read), strict=True):
        kernels = [launch for launch in launches if launch.is_triton]
        assert sum(launch.unique for launch in kernels) <= MOST * least, kernels
        assert sum(launch.requested for launch in kernels) <= MOST * least, kernels
