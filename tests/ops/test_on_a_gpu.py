"""What only a GPU can show: the same bits under load, launch after launch, and CUDA graphs.

`make test-gpu` runs these and every other test of the ops on the device.
"""

import pytest
import torch

import flamingo_kernels as fk
from tests.support import every_op
from tests.support.process import INTERPRETED

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device"),
]
RUNS = tuple(every_op.runs())  # their names in fp32
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
REPEATS = 100


@pytest.fixture(params=[name for name in ("triton", "cuda") if fk.backends()[name] == "available"] or ["triton"])
def on_backend(request: pytest.FixtureRequest):
    with fk.use_backend(request.param):
        yield request.param


def _run(name: str, dtype: torch.dtype) -> every_op.Run:
    return list(every_op.runs(dtype, "cuda").values())[RUNS.index(name)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", RUNS)
def test_same_bits_under_load(on_backend, name, dtype):
    """A race that one launch in many shows: matmuls on another stream shift the blocks of each launch in time."""
    run = _run(name, dtype)
    expected = run()
    noise, other = torch.randn(1024, 1024, device="cuda"), torch.cuda.Stream()
    for i in range(REPEATS):
        with torch.cuda.stream(other):
            for _ in range(i % 5):
                noise @ noise
        assert all(map(torch.equal, run(), expected)), f"run {i}"


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("name", RUNS)
def test_in_a_cuda_graph(on_backend, name, dtype):
    """Forward and backward are captured, which a host sync would make fail, and give the same bits when replayed."""
    run = _run(name, dtype)
    expected = run()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, and fills the caches of the libraries
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [x.clone() for x in run()]  # one of them may be an input
    for _ in range(3):
        for result in results:
            result.fill_(float("nan"))
        graph.replay()
        assert all(map(torch.equal, results, expected))
