"""Time on a GPU alone: calls in a CUDA graph, which the host launches at once.

Small work is bound by what the host does to launch it, which a graph pays once; what is left is the kernels' own time.
"""

import statistics
from collections.abc import Callable, Sequence

import torch

_CALLS = 5  # in a graph, whose own launch is divided by them
_ROUNDS = 25


def device_ms(calls: Sequence[Callable[[], object]]) -> list[float | None]:
    """Milliseconds of each call, medians over interleaved replays; None of what no graph can capture."""
    graphs = [_capture(call) for call in calls]
    samples: list[list[float]] = [[] for _ in graphs]
    for _ in range(_ROUNDS):
        for graph, of_graph in zip(graphs, samples, strict=True):
            if graph is not None:
                of_graph.append(_replay_ms(graph) / _CALLS)
    return [statistics.median(of_graph) if of_graph else None for of_graph in samples]


def _capture(call: Callable[[], object]) -> torch.cuda.CUDAGraph | None:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is made once, such as a library's workspace, is not captured
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(_CALLS):
                call()
    except RuntimeError:  # it waits for the device, or copies from pageable memory
        torch.cuda.synchronize()
        return None
    return graph


def _replay_ms(graph: torch.cuda.CUDAGraph) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
