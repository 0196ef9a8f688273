"""norm_linear, linear_gate_residual and gated_mlp take any strides: sliced, transposed, expanded, past 2³¹ elements."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import flamingo_kernels as fk
from tests.support.layouts import LAYOUTS
from tests.support.linear_cases import OPS, Case, apply, assert_right, leaves_of, run_op
from tests.support.process import DTYPES, EMULATED, INTERPRETED, require

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="too many for the interpreter; what it runs has strides, too"),
    *(pytest.mark.ops(op) for op in OPS),
]
CASES = [
    Case("norm_linear", rows=(2, 3, 5), N=33),
    Case("linear_gate_residual", rows=(2, 3, 5), N=33),
    Case("gated_mlp", rows=(2, 3, 5), N=33, activation="gelu"),
]
ANY_RANK = ("inside of more", "off by one element", "one number", "every second of dim 0", "expanded dim 0")
MATRIX = (*ANY_RANK, "every second of dim 1", "expanded dim 1")


def _transposed(x: Tensor) -> Tensor:
    return x.t().contiguous().t()


def _layouts_of(x: Tensor) -> dict:
    if x.ndim == 4:
        return LAYOUTS
    names = MATRIX if x.ndim == 2 else ANY_RANK
    return {name: LAYOUTS[name] for name in names} | ({"transposed": _transposed} if x.ndim == 2 else {})


STRIDES = [
    pytest.param(case, name, layout, id=f"{case.op}-{name}-{layout}")
    for case in CASES
    for tensors, dy in [case.inputs("cpu")]
    for name, x in [*tensors.items(), ("dy", dy)]
    for layout in _layouts_of(x)
]


@pytest.mark.parametrize(("case", "name", "layout"), STRIDES)
def test_strides(backend, case, name, layout):
    for dtype in DTYPES[:2]:
        tensors, dy = replace(case, dtype=dtype).inputs(backend.device)
        x = dy if name == "dy" else tensors[name]
        strided = _layouts_of(x)[layout](x)
        before = strided.clone()
        tensors, dy = (tensors, strided) if name == "dy" else (tensors | {name: strided}, dy)
        assert_right(replace(case, dtype=dtype), [(tensors, dy, run_op(case, tensors, dy))])
        assert torch.equal(strided, before)


def test_one_tensor_as_input_and_residual(backend):
    case = replace(CASES[1], N=40)
    tensors, dy = case.inputs(backend.device)
    leaves = leaves_of(tensors)
    y = apply(case, leaves | {"residual": leaves["x"]})
    apart = run_op(case, tensors | {"residual": tensors["x"]}, dy)
    assert torch.equal(y, apart["y"])
    (dx,) = torch.autograd.grad(y, leaves["x"], dy)
    torch.testing.assert_close(dx, apart["x"] + apart["residual"])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward_takes_any_strides_of_what_was_saved(backend, case):
    """Hooks on saved tensors, or a compiler, may give them back with other strides."""
    tensors, dy = case.inputs(backend.device)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: x, lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0) if x.ndim else x
    ):
        results = run_op(case, tensors, dy)
    assert_right(case, [(tensors, dy, results)])


FAR_APART = [
    pytest.param(case, name, id=f"{case.op}-{name}")
    for case in (replace(case, rows=(9,), C=16, N=16, dtype=torch.bfloat16) for case in CASES)
    for name in [*case.inputs("cpu")[0], "dy"]
    if name in ("x", "residual", "weight", "w_in", "w_out", "dy")
]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "name"), FAR_APART)
@pytest.mark.parametrize(("dim", "distance"), [(0, 2**28), (0, 2**29), (1, 2**28)])
def test_offsets_past_two_to_the_31_elements(case, name, dim, distance):
    """Rows or columns that lie far apart, to 2³¹ elements and more; only the few pages in use are touched."""
    backend = "cuda" if EMULATED else "cpu"
    require(backend)
    tensors, dy = case.inputs("cpu")
    x = dy if name == "dy" else tensors[name]
    strides = [1, 1]
    strides[dim] = distance
    strides[1 - dim] = 1
    memory = torch.empty((x.shape[dim] - 1) * distance + 4096, dtype=x.dtype)  # not poisoned: that touches every page
    far = memory.as_strided(x.shape, strides).copy_(x)
    tensors, dy = (tensors, far) if name == "dy" else (tensors | {name: far}, dy)
    with fk.use_backend(backend):
        assert_right(case, [(tensors, dy, run_op(case, tensors, dy))])
