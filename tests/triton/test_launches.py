"""How many launches a block makes, and for how many of them Triton has to compile."""

from collections.abc import Iterator
from itertools import chain

import pytest
import torch
from torch import Tensor, nn

from tests.support.process import INTERPRETED

pytest.importorskip("triton")
if not INTERPRETED:
    pytest.skip("launches are counted in the interpreter (TRITON_INTERPRET=1)", allow_module_level=True)

import flamingo_kernels as fk
from benchmarks.accounted_ops import of_block
from benchmarks.accounting import Accounting, Launch, forward_and_backward
from benchmarks.shapes import Shape

C, V, HEADS = 128, 64, 2
FORWARD, BACKWARD = (9, 5), (19, 10)  # launches, and how many of them are matmuls


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    with fk.use_backend("triton"):
        yield


def _block(**options: object) -> nn.Module:
    return fk.nn.GatedCrossAttentionBlock(C, V, heads=HEADS, **options).bfloat16()


def _block_arguments(rows: int, tokens: int, media: int) -> tuple[tuple[Tensor, Tensor], dict[str, object]]:
    locations = torch.zeros(rows, tokens, dtype=torch.bool)
    locations[:, 1 :: tokens // media] = True
    x = torch.zeros(rows, tokens, C, dtype=torch.bfloat16)
    features = torch.zeros(rows, int(locations[0].sum()), 64, V, dtype=torch.bfloat16)
    return (x, features), {"intervals": fk.media_intervals(locations, 64)}


def _resampler(depth: int) -> nn.Module:
    return fk.nn.PerceiverResampler(V, depth=depth, heads=HEADS).bfloat16()


def _step(module: nn.Module, inputs: tuple[Tensor, ...], others: dict) -> tuple[list[Launch], list[Launch]]:
    """The launches of a step of training: forward, and backward into parameters and inputs."""
    module.zero_grad(set_to_none=True)
    inputs = [x.clone().requires_grad_() for x in inputs]
    with Accounting() as forward:
        y = module(*inputs, **others)
    dy = torch.zeros_like(y)
    with Accounting() as backward:
        y.backward(dy)
    assert all(x.grad is not None for x in (*inputs, *module.parameters()))
    return forward.launches, backward.launches


def _counts(launches: list[Launch]) -> tuple[int, int]:
    return len(launches), sum(launch.is_matmul for launch in launches)


def _names(launches: list[Launch]) -> list[str]:
    return [launch.name for launch in launches]


def test_block():
    """With all that autograd adds."""
    inputs, intervals = _block_arguments(2, 48, 2)
    forward, backward = _step(_block(), inputs, intervals)
    assert _counts(forward) == FORWARD, _names(forward)
    assert _counts(backward) == BACKWARD, _names(backward)


def test_plain_pytorch_makes_more():
    """The same block in plain PyTorch, with an operator counted as one launch, whatever kernels it has."""
    shape = Shape("small", 2, 48, 2, HEADS, 64, C, V)
    block = next(op for op in of_block(shape, torch.bfloat16) if op.name == "gated_block")
    eager = [_counts(launches)[0] for launches in forward_and_backward(*block.eager)]
    ours = [_counts(launches)[0] for launches in forward_and_backward(*block.ours)]
    assert ours == [FORWARD[0], BACKWARD[0]]
    assert eager[0] >= 2.5 * ours[0]
    assert eager[1] >= 1.7 * ours[1]


STEPS = {
    "block": (_block, [_block_arguments(2, 48, 2), _block_arguments(2, 77, 3), _block_arguments(1, 96, 2)]),
    "vector gate, swiglu": (
        lambda: _block(gate="vector", activation="swiglu"),
        [_block_arguments(2, 48, 2), _block_arguments(2, 77, 3)],
    ),
    "resampler": (
        lambda: _resampler(2),
        [((torch.zeros(1, n, 1, patches, V, dtype=torch.bfloat16),), {}) for n, patches in ((2, 48), (3, 77))],
    ),
}


@pytest.mark.parametrize("name", STEPS)
def test_compilations(name):
    """A first step compiles no more often than it launches Triton kernels; steps with other lengths compile nothing."""
    build, batches = STEPS[name]
    module, compiled = build(), []
    for inputs, others in batches:
        launches = [launch for launch in chain(*_step(module, inputs, others)) if launch.is_triton]
        compiled.append({launch.specialization for launch in launches})
        assert len(compiled[0]) <= len(launches)
    for later in compiled[1:]:
        assert later <= compiled[0], later - compiled[0]
