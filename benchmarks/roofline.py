"""What a chip's limits allow: launches, bytes and operations of every op, ours and plain PyTorch's, computed.

`python -m benchmarks --roofline h100`. Nothing is timed and no GPU is needed. Triton kernels run in Triton's
interpreter, in a process of their own: `python -m benchmarks.roofline` with TRITON_INTERPRET=1. A launch takes at least
the longer of the times that HBM needs for its bytes and the tensor cores for its operations; what launching costs, and
what a kernel reaches of these limits, is not in it.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from tqdm import tqdm

import flamingo_kernels as fk
from benchmarks import accounted_ops, minima
from benchmarks.accounting import Launch, forward_alone, forward_and_backward
from benchmarks.shapes import RESAMPLER_SHAPES, SHAPES

DEFAULT_SHAPES = ("of3b", "shots32", "img")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Chip(NamedTuple):
    """bytes_per_s of HBM; FLOP/s of dense matrix products in 16 bits and in full fp32, which is not on tensor cores."""

    name: str
    processors: int
    bytes_per_s: float
    flops_16: float
    flops_32: float

    def flops_per_s(self, dtype: torch.dtype) -> float:
        return self.flops_32 if dtype == torch.float32 else self.flops_16

    def seconds(self, launches: Iterable[Launch], dtype: torch.dtype) -> float:
        peak = self.flops_per_s(dtype)
        return sum(max(each.unique / self.bytes_per_s, each.flops / peak) for each in launches)


CHIPS = {
    # NVIDIA H100 Tensor Core GPU datasheet, column H100 SXM; its dense rates are half of those given with sparsity
    "h100": Chip("H100 SXM", 132, 3.35e12, 989.4e12, 66.9e12),
    # NVIDIA A100 Tensor Core GPU datasheet, column A100 80GB SXM
    "a100": Chip("A100 80GB SXM", 108, 2.039e12, 312e12, 19.5e12),
}

LEGEND = """\
MB asked  read and written, each byte as often as a kernel asks for it; of matmuls and plain PyTorch each tensor once
MB moved  each byte that a launch touches once: what HBM moves if caches keep what is asked for again
MB least  inputs once and outputs once, as if all that is between stayed on the chip (benchmarks/minima.py)
GFLOP     of matrix products, with what pads a tile
us        what HBM bandwidth (for MB moved) and the matmul peak allow at least, summed over launches
eager     the same for plain PyTorch, an operator counted as one launch"""


class Line(NamedTuple):
    """One op, one pass."""

    op: str
    pass_: str
    ours: list[Launch]
    eager: list[Launch]
    least: int


def lines(shape: str, dtype: torch.dtype, chip: Chip) -> list[Line]:
    """Every op at a shape; in a process that interprets."""
    kind, shapes = ("resampler", RESAMPLER_SHAPES) if shape in RESAMPLER_SHAPES else ("block", SHAPES)
    found = []
    for op in tqdm(getattr(accounted_ops, f"of_{kind}")(shapes[shape], dtype), shape, file=sys.stderr, unit="op"):
        if op.trains:
            of_ours, of_eager = (forward_and_backward(*run, chip.processors) for run in (op.ours, op.eager))
        else:
            of_ours, of_eager = ([forward_alone(*run, chip.processors)] for run in (op.ours, op.eager))
        passes = zip(("forward", "backward"), of_ours, of_eager, minima.of_op(op.name, op.bytes, op.read), strict=False)
        found += [Line(op.name, *of_pass) for of_pass in passes]
    return found


def table(found: Sequence[Line], chip: Chip, dtype: torch.dtype) -> list[str]:
    head = ("op", "pass", "launches", "matmuls", "MB asked", "MB moved", "MB least", "asked/least", "moved/least")
    head += ("GFLOP", "us", "eager: launches", "matmuls", "MB", "GFLOP", "us", "us, eager/ours")
    rows = [head]
    for line in found:
        ours, eager = _Sum.of(line.ours, chip, dtype), _Sum.of(line.eager, chip, dtype)
        ratios = (f"{size / line.least:.2f}" for size in (ours.requested, ours.unique))
        rows.append(
            (
                *(line.op, line.pass_, f"{ours.launches}", f"{ours.matmuls}", _mb(ours.requested), _mb(ours.unique)),
                *(_mb(line.least), *ratios, _g(ours.flops), _us(ours.seconds)),
                *(f"{eager.launches}", f"{eager.matmuls}", _mb(eager.unique), _g(eager.flops), _us(eager.seconds)),
                f"{eager.seconds / ours.seconds:.2f}",
            )
        )
    return _aligned(rows, left=2)


def kernel_table(found: Sequence[Line]) -> list[str]:
    """Every Triton kernel of the whole module, with the least of those that stand between matmuls."""
    rows = [
        ("kernel", "launches", "MB read", "MB written", "MB moved", "MB least", "asked/least", "moved/least", "GFLOP")
    ]
    module = [line for line in found if line.op == found[-1].op]
    launches = [launch for launch in chain.from_iterable(line.ours for line in module) if launch.is_triton]
    for name in dict.fromkeys(launch.name for launch in launches):
        of_kernel = [launch for launch in launches if launch.name == name]
        read, written, moved, flops = (
            sum(getattr(launch, what) for launch in of_kernel) for what in ("read", "written", "unique", "flops")
        )
        least, ratios = "", ("", "")
        if name in minima.ELEMENTWISE:
            size = sum(map(minima.of_kernel, of_kernel))
            least, ratios = _mb(size), (f"{(read + written) / size:.2f}", f"{moved / size:.2f}")
        rows.append((name, f"{len(of_kernel)}", _mb(read), _mb(written), _mb(moved), least, *ratios, _g(flops)))
    return _aligned(rows, left=1)


class _Sum(NamedTuple):
    launches: int
    matmuls: int
    requested: int
    unique: int
    flops: int
    seconds: float

    @classmethod
    def of(cls, launches: Sequence[Launch], chip: Chip, dtype: torch.dtype) -> "_Sum":
        counts = (
            sum(getattr(each, name) for each in launches) for name in ("is_matmul", "requested", "unique", "flops")
        )
        return cls(len(launches), *counts, chip.seconds(launches, dtype))


def _mb(size: int) -> str:
    return f"{size / 1e6:.2f}"


def _g(flops: int) -> str:
    return f"{flops / 1e9:.2f}"


def _us(seconds: float) -> str:
    return f"{1e6 * seconds:.1f}"


def _aligned(rows: Sequence[Sequence[str]], left: int) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def run(chip: str, shapes: Sequence[str] | None, dtypes: Sequence[str] | None) -> int:
    """Prints it from a process that interprets; returns its exit status."""
    command = [sys.executable, "-m", "benchmarks.roofline", chip]
    command += ["--shapes", *(shapes or DEFAULT_SHAPES), "--dtypes", *(dtypes or ["bf16"])]
    return subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}).returncode


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__)
    parser.add_argument("chip", choices=CHIPS)
    parser.add_argument("--shapes", nargs="+", choices=[*SHAPES, *RESAMPLER_SHAPES], default=DEFAULT_SHAPES)
    parser.add_argument("--dtypes", nargs="+", choices=_DTYPES, default=["bf16"])
    args = parser.parse_args()
    chip = CHIPS[args.chip]
    print(f"computed, not measured: {chip.name}, {chip.bytes_per_s / 1e12:g} TB/s\n\n{LEGEND}")
    for name in args.shapes:
        for dtype in args.dtypes:
            with fk.use_backend("triton"):
                found = lines(name, _DTYPES[dtype], chip)
            peak = chip.flops_per_s(_DTYPES[dtype]) / 1e12
            print(f"\n{ {**SHAPES, **RESAMPLER_SHAPES}[name] }  {dtype}, {peak:g} TFLOP/s; computed, not measured\n")
            print("\n".join([*table(found, chip, _DTYPES[dtype]), "", *kernel_table(found)]), flush=True)


if __name__ == "__main__":
    _main()
