"""Run every benchmark: a table on screen, and JSON, PNG and SVG in the output folder."""

import argparse
import importlib
import os
import pathlib
import sys
import time
import warnings

import torch
from tqdm import tqdm

from benchmarks import machine, plots, report
from benchmarks.harness import run_case
from benchmarks.shapes import SHAPES

_HERE = pathlib.Path(__file__).parent
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_QUICK_SHAPES = ("of3b", "decode32")
_SECONDS, _QUICK_SECONDS = 3.0, 1.5  # of timed rounds per case and pass
# Whether glibc gives a freed output of some MB back to the kernel, so that the next call pays its page faults again,
# depends on what ran before. Every provider is timed without that.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}


def main() -> int:
    args = _arguments()
    if not _MALLOC.keys() <= os.environ.keys():  # glibc reads them when the process starts
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks", *sys.argv[1:]], {**os.environ, **_MALLOC})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about, limits = machine.describe(device), machine.Limits(device)
    shapes = [SHAPES[name] for name in args.shapes or (_QUICK_SHAPES if args.quick else SHAPES)]
    dtypes = [_DTYPES[name] for name in args.dtypes]
    modules = [importlib.import_module(f"benchmarks.{path.stem}") for path in sorted(_HERE.glob("bench_*.py"))]
    work = [(module, case) for module in modules for case in module.cases(shapes, dtypes, device)]

    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    print(f"{about['device']}, {about['threads']} threads, {about['cpu_capability']}\n{versions}\n{report.LEGEND}\n")
    stem = args.output / about["name"]
    rows, start = [], time.perf_counter()
    with tqdm(total=len(work), file=sys.stderr, unit="case") as bar:
        for module, case in work:
            torch.compiler.reset()
            seconds = _QUICK_SECONDS if args.quick else _SECONDS
            of_case = run_case(case, module.PROVIDERS, limits, seconds, bar.set_description_str)
            rows += of_case
            report.save(stem.with_suffix(".json"), about, limits.to_json(), rows)  # what is done survives an interrupt
            bar.update()
            with tqdm.external_write_mode(file=sys.stdout):
                print(report.table(of_case), end="\n\n", flush=True)

    print("\n".join(report.summary(rows)))
    written = [stem.with_suffix(".json"), *plots.plot(rows, about, stem)]
    print(f"\n{time.perf_counter() - start:.0f} s; wrote", *written)
    return int(any(row.ours and row.status in ("WRONG", "failed") for row in rows))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help=f"{' and '.join(_QUICK_SHAPES)} only, in short rounds")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, metavar="SHAPE", help=f"any of {', '.join(SHAPES)}")
    parser.add_argument("--dtypes", nargs="+", choices=_DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--output", type=pathlib.Path, default=_HERE / "results" / "local", metavar="DIR")
    return parser.parse_args()


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    raise SystemExit(main())
