"""What runs under a sanitizer: `python -m tests.sanitizers.inside LIBRARY planted NAME|tests ARGUMENT...|stress`."""

import concurrent.futures
import ctypes
import importlib.util
import sys

import pytest
import torch

import flamingo_kernels as fk
from tests.support import every_op

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def main() -> int:
    library, task, *arguments = sys.argv[1:]
    _load(library)
    if task == "planted":
        torch.set_num_threads(4)
        getattr(ctypes.CDLL(library), *arguments)()
        return 0
    return pytest.main(arguments) if task == "tests" else stress()


def _load(library: str) -> None:
    """Put the library in the place of the extension."""
    name = "flamingo_kernels._cpu"
    spec = importlib.util.spec_from_file_location(name, library)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    assert fk.backends()["cpu"] == "available", fk.backends()["cpu"]


def stress() -> int:
    """Every op, forward and backward: with 2 to 4 threads each, then from three callers at once with 2 threads each."""
    for dtype in DTYPES:
        for threads in (2, 3, 4):
            torch.set_num_threads(threads)
            for name, run in every_op.runs(dtype).items():
                print(f"{name}, {threads} threads", flush=True)
                run()
        torch.set_num_threads(2)
        runs = list(every_op.runs(dtype).values())
        with concurrent.futures.ThreadPoolExecutor(3) as callers:
            list(callers.map(lambda run: run(), runs * 2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
