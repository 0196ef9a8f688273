"""Every wrong argument of masked_cross_attention: the error names the argument, what was expected and what came."""

import pytest
import torch

import flamingo_kernels as fk
from tests.support.attention_cases import Case, run_op
from tests.support.process import DTYPES, SLOW

Q = torch.zeros(4, 5, 6, 8)
KV = torch.zeros(2, 12, 3, 8)
START, END = torch.zeros(4, 5, dtype=torch.int32), torch.full((4, 5), 12, dtype=torch.int32)

WRONG = [
    # no tensors, ranks
    ({"q": None}, TypeError, "q must be a tensor, got NoneType"),
    ({"k": [1.0]}, TypeError, "k must be a tensor, got list"),
    ({"v": 1}, TypeError, "v must be a tensor, got int"),
    ({"q": Q[0]}, ValueError, r"q must be of rank 4.*, got .*\[5, 6, 8\]"),
    ({"q": Q.flatten(2)}, ValueError, r"q must be of rank 4.*, got .*\[4, 5, 48\]"),
    ({"k": KV[None]}, ValueError, r"k must be of rank 4.*, got .*\[1, 2, 12, 3, 8\]"),
    ({"v": KV[0, 0, 0, 0]}, ValueError, r"v must be of rank 4.*, got .*\[\]"),
    # dtypes
    ({"q": Q.int()}, TypeError, "q must be of dtype float32, bfloat16, float16.*, got torch.int32"),
    ({"k": KV.bool()}, TypeError, "k must be of dtype float32.*, got torch.bool"),
    ({"v": KV.to(torch.complex64)}, TypeError, "v must be of dtype float32.*, got torch.complex64"),
    ({"q": Q.to(torch.float8_e4m3fn)}, TypeError, "q must be of dtype float32.*, got torch.float8_e4m3fn"),
    ({"q": Q.bfloat16()}, TypeError, "k must be of q's dtype.*, got torch.float32"),
    ({"k": KV.half()}, TypeError, "k must be of q's dtype.*, got torch.float16"),
    ({"v": KV.double()}, TypeError, "v must be of q's dtype.*, got torch.float64"),
    # devices
    ({"k": KV.to("meta")}, ValueError, "k must be on q's device.*, got meta"),
    ({"v": KV.to("meta")}, ValueError, "v must be on q's device.*, got meta"),
    ({"q": Q.to("meta")}, ValueError, "k must be on q's device.*, got cpu"),
    ({"start": START.to("meta")}, ValueError, "intervals.start must be on q's device.*, got meta"),
    ({"end": END.to("meta")}, ValueError, "intervals.end must be on q's device.*, got meta"),
    # shapes of q, k and v against each other
    ({"v": KV[:, :11]}, ValueError, r"v must be of k's shape.*, got .*\[2, 11, 3, 8\]"),
    ({"v": KV[..., :4]}, ValueError, r"v must be of k's shape.*, got .*\[2, 12, 3, 4\]"),
    ({"v": KV[:, :, :1]}, ValueError, r"v must be of k's shape.*, got .*\[2, 12, 1, 8\]"),
    ({"v": KV[:1]}, ValueError, r"v must be of k's shape.*, got .*\[1, 12, 3, 8\]"),
    ({"q": Q[..., :7]}, ValueError, r"k must be of q's head dim.*, got .*\[2, 12, 3, 8\]"),
    ({"q": Q[:, :, :4]}, ValueError, r"k must be of a number of heads that divides q's.*, got .*\[2, 12, 3, 8\]"),
    ({"k": KV[:, :, :0], "v": KV[:, :, :0]}, ValueError, "k must be of a number of heads that divides q's"),
    ({"q": Q[:3], "start": START[:3], "end": END[:3]}, ValueError, "k must be of a number of rows that divides q's"),
    ({"k": KV[:0], "v": KV[:0]}, ValueError, "k must be of a number of rows that divides q's"),
    # intervals
    ({"intervals": None}, TypeError, r"intervals must be two tensors \(start, end\), got NoneType"),
    (
        {"intervals": torch.stack([START, END])},
        TypeError,
        r"intervals must be two tensors \(start, end\), got a tensor",
    ),
    ({"intervals": (START, END, END)}, TypeError, r"intervals must be two tensors \(start, end\), got .*3"),
    ({"intervals": (START,)}, TypeError, r"intervals must be two tensors \(start, end\), got .*1"),
    ({"start": 0}, TypeError, "intervals.start must be a tensor, got int"),
    ({"end": None}, TypeError, "intervals.end must be a tensor, got NoneType"),
    ({"start": START.float()}, TypeError, "intervals.start must be of dtype int32 or int64, got torch.float32"),
    ({"end": END.bool()}, TypeError, "intervals.end must be of dtype int32 or int64, got torch.bool"),
    ({"end": END.short()}, TypeError, "intervals.end must be of dtype int32 or int64, got torch.int16"),
    ({"start": START[0]}, ValueError, r"intervals.start must be of shape \[B, T\].*, got .*\[5\]"),
    ({"start": START[:2]}, ValueError, r"intervals.start must be of shape \[B, T\].*, got .*\[2, 5\]"),
    ({"end": END[:, :4]}, ValueError, r"intervals.end must be of shape \[B, T\].*, got .*\[4, 4\]"),
    ({"end": END[:, :1]}, ValueError, r"intervals.end must be of shape \[B, T\].*, got .*\[4, 1\]"),
    ({"start": START[None]}, ValueError, r"intervals.start must be of shape \[B, T\].*, got .*\[1, 4, 5\]"),
    # scale
    ({"softmax_scale": "0.5"}, TypeError, "softmax_scale must be a number, got str"),
    ({"softmax_scale": torch.tensor(0.5)}, TypeError, "softmax_scale must be a number, got a tensor"),
    ({"softmax_scale": 1j}, TypeError, "softmax_scale must be a number, got complex"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_wrong_argument(backend, wrong, error, message):
    arguments = {"q": Q, "k": KV, "v": KV, "start": START, "end": END, **wrong}
    start, end = arguments.pop("start"), arguments.pop("end")
    arguments.setdefault("intervals", (start, end))
    arguments = {name: _to(backend.device, value) for name, value in arguments.items()}
    message = message.replace("cpu", backend.device)
    with pytest.raises(error, match=f"^masked_cross_attention: {message}"):
        fk.masked_cross_attention(**arguments)


def _to(device: str, value: object) -> object:
    if isinstance(value, tuple):
        return tuple(_to(device, x) for x in value)
    return value.to(device) if isinstance(value, torch.Tensor) and value.device.type != "meta" else value


OUTSIDE = [
    ("start", -1),
    ("start", 13),
    ("start", -(2**31)),
    ("start", 2**31 - 1),
    ("end", -1),
    ("end", 13),
    ("end", 2**31 - 1),
    ("end", -(2**31)),
    ("start", 2**32),  # in int32 this would be 0
    ("end", 2**32 + 12),
    ("end", -(2**32) + 12),
]


@pytest.mark.parametrize(("which", "value"), OUTSIDE, ids=str)
@pytest.mark.parametrize("place", [(0, 0), (3, 4), (2, 1)], ids=str)
def test_intervals_outside_of_the_keys(backend, which, value, place):
    """On the CPU an error, that says which numbers; on a GPU, where looking would wait for it, clamped."""
    ends = {"start": START.clone(), "end": END.clone()}
    if abs(value) > 2**31 - 1 and value != -(2**31):
        ends = {name: x.long() for name, x in ends.items()}
    ends[which][place] = value
    q, k, v = (torch.randn_like(x).to(backend.device) for x in (Q, KV, KV))
    start, end = ends["start"].to(backend.device), ends["end"].to(backend.device)
    if backend.device == "cpu":
        with pytest.raises(ValueError, match=r"^masked_cross_attention: intervals must lie within 0\.\.12, .*got "):
            fk.masked_cross_attention(q, k, v, (start, end))
    else:
        clamped = (start.clamp(0, 12), end.clamp(0, 12))
        assert torch.equal(
            fk.masked_cross_attention(q, k, v, (start, end)), fk.masked_cross_attention(q, k, v, clamped)
        )


@pytest.mark.parametrize("M", [0, 1])
def test_intervals_outside_of_no_keys_at_all(backend, M):
    inputs = Case(T=3, M=M, L=4, D=8, kind="empty").inputs(backend.device)
    if backend.device != "cpu":
        pytest.skip("clamped on a GPU")
    with pytest.raises(ValueError, match=rf"within 0\.\.{4 * M}"):
        run_op(inputs._replace(end=inputs.end + 4 * M + 1))


def test_backward_checks_the_intervals_too(backend):
    """It reads the intervals again, and they may have been written to since."""
    if backend.device != "cpu":
        pytest.skip("clamped on a GPU")
    inputs = Case(T=3, D=8, kind="full").inputs("cpu")
    o, lse = fk.masked_cross_attention(*inputs[:3], (inputs.start, inputs.end), return_lse=True)
    backward = torch.ops.flamingo_kernels.masked_cross_attention_backward
    for start, end in ((inputs.start - 1, inputs.end), (inputs.start, inputs.end + 1)):
        with pytest.raises(ValueError, match=r"within 0\.\.48"):
            backward(inputs.do, *inputs[:3], start, end, o, lse, inputs.scale, backend.name)


def test_writing_to_the_intervals_before_backward(backend):
    """Caught by autograd, which saved them."""
    inputs = Case(T=3, D=8, kind="full").inputs(backend.device)
    q = inputs.q.requires_grad_()
    o = fk.masked_cross_attention(q, inputs.k, inputs.v, (inputs.start, inputs.end))
    inputs.end.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.sum().backward()


def test_dtypes(backend):
    """Each dtype runs or is refused by name."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        inputs = Case(dtype=dtype, T=3, D=8).inputs(backend.device)
        if backend.name in ("triton", "cuda") and dtype == torch.float64:
            with pytest.raises(TypeError, match=r"^masked_cross_attention: q must be .*float32.*, got .*float64"):
                run_op(inputs)
        else:
            assert run_op(inputs).o.dtype == dtype
    assert SLOW or torch.float64 in DTYPES


def test_on_meta_tensors():
    """Shapes and dtypes without any kernel."""
    inputs = Case(T=3, D=8, H=4, dtype=torch.bfloat16).inputs("cpu")
    q, k, v, start, end = (x.to("meta") for x in (*inputs[:3], inputs.start, inputs.end))
    o, lse = fk.masked_cross_attention(q, k, v, (start, end), return_lse=True)
    assert (o.device.type, o.shape, o.dtype) == ("meta", q.shape, torch.bfloat16)
    assert (lse.device.type, lse.shape, lse.dtype) == ("meta", (2, 4, 3), torch.float32)
