"""The ops among threads and processes: forked workers run them, and callers in several threads."""

import concurrent.futures
import importlib
import pkgutil
import sys

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from flamingo_kernels import ops
from tests.support import every_op
from tests.support.process import DTYPES, normal_process, require

pytestmark = normal_process
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux has /proc, and forks a DataLoader's workers")


@pytest.fixture
def three_threads():
    """The C++ kernels with three threads, whatever the machine has; sets the number back."""
    require("cpu")
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_every_op_is_run() -> None:
    modules = [
        importlib.import_module(f"{ops.__name__}.{module.name}") for module in pkgutil.iter_modules(ops.__path__)
    ]
    names = [module.__name__.rpartition(".")[2] for module in modules]
    public = {name for name, module in zip(names, modules, strict=True) if hasattr(module, name)}
    assert {name.split()[0] for name in every_op.runs()} == public


class Results(Dataset):
    """Item i: outputs and gradients of every op in the i-th dtype."""

    def __len__(self) -> int:
        return len(DTYPES)

    def __getitem__(self, i: int) -> list[Tensor]:
        assert torch.get_num_threads() == 1
        return [x.detach() for run in every_op.runs(DTYPES[i]).values() for x in run()]


@on_linux
def test_forked_workers_give_the_same_bits(three_threads) -> None:
    """In a child whose parent had threads, libgomp hangs when it is asked for a second one."""
    torch.set_num_threads(1)
    expected = [Results()[i] for i in range(len(DTYPES))]
    torch.set_num_threads(3)
    for run in every_op.runs().values():
        run()
    workers = DataLoader(Results(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=120)
    for got, wanted in zip(workers, expected, strict=True):
        assert len(got) == len(wanted)
        assert all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_callers_in_several_threads_do_not_disturb_each_other(three_threads, dtype) -> None:
    runs = list(every_op.runs(dtype).values())
    expected = [run() for run in runs]
    with concurrent.futures.ThreadPoolExecutor(4) as callers:
        got = list(callers.map(lambda i: runs[i % len(runs)](), range(4 * len(runs))))
    for i, results in enumerate(got):
        assert all(torch.equal(x, y) for x, y in zip(results, expected[i % len(runs)], strict=True))
