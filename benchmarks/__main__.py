"""Run every benchmark: a table on screen, and JSON, PNG and SVG in the output folder.

Or, with --roofline, compute what a GPU's limits allow; that needs no GPU and measures nothing.
"""

import argparse
import importlib
import os
import pathlib
import sys
import time
import warnings
from types import ModuleType

import torch
from tqdm import tqdm

from benchmarks import machine, plots, report, roofline
from benchmarks.harness import run_case

_HERE = pathlib.Path(__file__).parent
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_QUICK_DTYPE = {"cpu": "fp32", "cuda": "bf16"}
_SECONDS, _QUICK_SECONDS = 3.0, 1.0  # of timed rounds per case and pass
# Whether glibc gives a freed output of some MB back to the kernel, so that the next call pays its page faults again,
# depends on what ran before. Every provider is timed without that.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}


def main() -> int:
    modules = [importlib.import_module(f"benchmarks.{path.stem}") for path in sorted(_HERE.glob("bench_*.py"))]
    args = _arguments(modules)
    if args.roofline:
        return roofline.run(args.roofline, args.shapes, args.dtypes)
    if not _MALLOC.keys() <= os.environ.keys():  # glibc reads them when the process starts
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks", *sys.argv[1:]], {**os.environ, **_MALLOC})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about, limits = machine.describe(device), machine.Limits(device)
    work = _work(modules, args, device)

    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    print(f"{about['device']}, {about['threads']} threads, {about['cpu_capability']}\n{versions}\n{report.LEGEND}\n")
    stem = args.output / about["name"]
    rows, start = [], time.perf_counter()
    with tqdm(total=len(work), file=sys.stderr, unit="case") as bar:
        for module, shape, dtype in work:
            torch.compiler.reset()
            seconds = _QUICK_SECONDS if args.quick else _SECONDS
            providers = [p for p in module.PROVIDERS if not (args.quick and p.compiles)]
            case = module.case(shape, dtype, device)
            of_case = run_case(case, providers, limits, seconds, bar.set_description_str)
            rows += of_case
            report.save(stem.with_suffix(".json"), about, limits.to_json(), rows)  # what is done survives an interrupt
            bar.update()
            with tqdm.external_write_mode(file=sys.stdout):
                print(report.table(of_case), end="\n\n", flush=True)

    remarks = [line for module in modules if hasattr(module, "remarks") for line in module.remarks(rows)]
    print("\n".join(report.summary(rows) + remarks))
    written = [stem.with_suffix(".json"), *plots.plot(rows, about, stem)]
    print(f"\n{time.perf_counter() - start:.0f} s; wrote", *written)
    return int(any(row.ours and row.status in ("WRONG", "failed") for row in rows))


def _work(modules: list[ModuleType], args: argparse.Namespace, device: torch.device) -> list[tuple]:
    """(module, shape, dtype) of every case."""
    dtypes = args.dtypes or ([_QUICK_DTYPE[device.type]] if args.quick else ["fp32", "bf16"])
    return [
        (module, module.MEASURED[name], _DTYPES[dtype])
        for module in modules
        if module.OP in (args.ops or [module.OP])
        for name in args.shapes or (module.QUICK if args.quick else module.MEASURED)
        if name in module.MEASURED
        for dtype in dtypes
    ]


def _arguments(modules: list[ModuleType]) -> argparse.Namespace:
    ops = [module.OP for module in modules]
    shapes = list(dict.fromkeys(name for module in modules for name in module.MEASURED))
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few shapes in one dtype, without torch.compile")
    parser.add_argument("--ops", nargs="+", choices=ops, metavar="OP", help=f"any of {', '.join(ops)}")
    parser.add_argument("--shapes", nargs="+", choices=shapes, metavar="SHAPE", help=f"any of {', '.join(shapes)}")
    parser.add_argument("--dtypes", nargs="+", choices=_DTYPES, help="default: fp32 bf16")
    parser.add_argument(
        "--roofline",
        choices=roofline.CHIPS,
        metavar="CHIP",
        help="compute, and not measure, bytes and operations of every op and what they cost at least on a GPU, any of "
        f"{', '.join(roofline.CHIPS)}, next to plain PyTorch's; default: {' '.join(roofline.DEFAULT_SHAPES)} in bf16",
    )
    parser.add_argument("--output", type=pathlib.Path, default=_HERE / "results" / "local", metavar="DIR")
    return parser.parse_args()


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    raise SystemExit(main())
