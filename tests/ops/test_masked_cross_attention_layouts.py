"""masked_cross_attention takes any strides: transposed, sliced, expanded, misaligned, and offsets past 2³¹ elements."""

import pytest
import torch

import flamingo_kernels as fk
from tests.support.attention_cases import Case, run_op
from tests.support.dense_attention import assert_right
from tests.support.layouts import LAYOUTS
from tests.support.process import DTYPES, normal_process, pick, require


@pytest.mark.parametrize("dtype", pick(DTYPES, DTYPES[:1]), ids=str)
@pytest.mark.parametrize("name", ["q", "k", "v", "do"])
@pytest.mark.parametrize("layout", pick(list(LAYOUTS), ["head dim first", "inside of more", "expanded dim 1"]))
def test_strides(backend, layout, name, dtype):
    shape = pick(({"T": 33, "D": 40},), ({"T": 7, "D": 16},))[0]
    inputs = Case(dtype=dtype, B=4, beams=2, H=4, G=2, M=3, kind="random", **shape).inputs(backend.device)
    inputs = inputs._replace(**{name: LAYOUTS[layout](getattr(inputs, name))})
    before = getattr(inputs, name).clone()
    results = run_op(inputs)
    assert_right(results, inputs)
    assert all(x.is_contiguous() for x in results)
    assert torch.equal(getattr(inputs, name), before)


@pytest.mark.parametrize("dtype", pick(DTYPES, DTYPES[:1]), ids=str)
def test_keys_and_values_of_one_matmul(backend, dtype):
    """k and v as two halves of one buffer, as media_kv gives them, and the gradient of a sum."""
    inputs = Case(dtype=dtype, T=9, D=16, G=2, H=4, kind="random").inputs(backend.device)
    kv = torch.cat([inputs.k.flatten(2), inputs.v.flatten(2)], -1)
    k, v = (x.unflatten(-1, (2, 16)) for x in kv.chunk(2, -1))
    inputs = inputs._replace(k=k, v=v, do=torch.ones((), dtype=dtype, device=kv.device).expand_as(inputs.q))
    assert_right(run_op(inputs), inputs)


def test_one_tensor_as_queries_keys_and_values(backend):
    x = torch.randn(2, 24, 2, 16, device=backend.device, requires_grad=True)
    start = torch.arange(24, dtype=torch.int32, device=backend.device).expand(2, 24) // 3
    o = fk.masked_cross_attention(x, x, x, (start, start + 5))
    (gradient,) = torch.autograd.grad(o.sum(), x)
    copies = [x.detach().clone().requires_grad_() for _ in range(3)]
    apart = fk.masked_cross_attention(*copies, (start, start + 5))
    torch.testing.assert_close(gradient, sum(torch.autograd.grad(apart.sum(), copies)))


INTERVAL_LAYOUTS = {
    "int64": lambda x: x.long(),
    "transposed": lambda x: x.t().contiguous().t(),
    "every second": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "int64 transposed": lambda x: x.long().t().contiguous().t(),
    "offset": lambda x: torch.cat([torch.full_like(x, 10**6)[:, :3], x], 1)[:, 3:],
}


@pytest.mark.parametrize("layout", INTERVAL_LAYOUTS.values(), ids=INTERVAL_LAYOUTS.keys())
def test_strides_and_dtype_of_the_intervals(backend, layout):
    inputs = Case(T=9, D=16, kind="random").inputs(backend.device)
    expected = run_op(inputs)
    for start, end in (
        (layout(inputs.start), layout(inputs.end)),
        (layout(inputs.start), inputs.end),
        (inputs.start, layout(inputs.end)),
    ):
        got = run_op(inputs._replace(start=start, end=end))
        assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


def test_expanded_intervals(backend):
    """One interval for all rows, for all tokens, or for everything, and a list in place of a tuple."""
    inputs = Case(T=9, D=16, kind="random").inputs(backend.device)
    for first in (slice(0, 1), slice(None)):
        for second in (slice(0, 1), slice(None)):
            start, end = (x[first, second].expand(2, 9) for x in (inputs.start, inputs.end))
            got = run_op(inputs._replace(start=start, end=end))
            expected = run_op(inputs._replace(start=start.contiguous(), end=end.contiguous()))
            assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
            o = fk.masked_cross_attention(*inputs[:3], [start, end], softmax_scale=inputs.scale)
            assert torch.equal(o, expected.o)


def test_backward_takes_any_strides_of_what_was_saved(backend):
    """Hooks on saved tensors, or a compiler, may give o and lse back with other strides."""
    inputs = Case(T=9, D=16, kind="random").inputs(backend.device)
    expected = run_op(inputs)
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda x: x, lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0)
    )
    with hooks:
        got = run_op(inputs)
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


@pytest.mark.slow
@normal_process
@pytest.mark.parametrize("name", ["q", "k", "v", "do"])
@pytest.mark.parametrize(("dim", "distance"), [(0, 2**31), (1, 2**31), (2, 2**31), (1, 2**27), (1, 2**29)])
def test_offsets_past_two_to_the_31_elements(name, dim, distance):
    """Rows, tokens or heads that lie far apart, to 2³¹ elements and more; only the few pages in use are touched."""
    require("cpu")
    steps = {2**31: 2, 2**29: 5, 2**27: 17}[distance]
    inputs = Case(dtype=torch.bfloat16, T=steps, M=1, L=steps, D=16, kind="full").inputs("cpu")
    x = getattr(inputs, name)
    memory = torch.empty((steps - 1) * distance + 4096, dtype=x.dtype)  # not poisoned, which would touch every page
    strides = list(x.stride())
    strides[dim] = distance
    inputs = inputs._replace(**{name: memory.as_strided(x.shape, strides).copy_(x)})
    with fk.use_backend("cpu"):
        assert_right(run_op(inputs), inputs)
