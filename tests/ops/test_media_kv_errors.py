"""Every wrong argument of media_kv: the error names the argument, what was expected and what came."""

import pytest
import torch

import flamingo_kernels as fk
from tests.support.media_kv_cases import MediaCase

pytestmark = pytest.mark.ops("media_kv")
MEDIA, WEIGHT, VECTOR = torch.zeros(2, 5, 6), torch.zeros(24, 6), torch.zeros(6)
NORM = (VECTOR, VECTOR)

WRONG = [
    # media
    ({"media": None}, TypeError, "media must be a tensor, got NoneType"),
    ({"media": MEDIA.int()}, TypeError, "media must be of dtype float32.*, got torch.int32"),
    ({"media": torch.tensor(1.0)}, ValueError, r"media must be of shape \[..., V\], got .*\[\]"),
    ({"media": MEDIA.bfloat16()}, TypeError, "media must be of dtype float32, .*got torch.bfloat16"),
    ({"media": MEDIA.double()}, TypeError, "media must be of dtype float32, .*got torch.float64"),
    # weights
    ({"weights": None}, TypeError, "weights must be a list of tensors, one per layer, got NoneType"),
    ({"weights": WEIGHT}, TypeError, "weights must be a list of tensors, one per layer, got a tensor"),
    ({"weights": [WEIGHT, 1]}, TypeError, r"weights\[1\] must be a tensor, got int"),
    ({"weights": [WEIGHT.int(), WEIGHT]}, TypeError, r"weights\[0\] must be of dtype float32.*, got torch.int32"),
    ({"weights": [WEIGHT[0], WEIGHT]}, ValueError, r"weights\[0\] must be of rank 2.*, got .*\[6\]"),
    ({"weights": [WEIGHT, WEIGHT[:, 1:]]}, ValueError, r"weights\[1\] must be of media's width, got .*\[24, 5\]"),
    ({"weights": [WEIGHT[1:], WEIGHT]}, ValueError, r"weights\[0\] must be of rows that 2·heads = 6 divides, got 23"),
    ({"weights": [WEIGHT, WEIGHT[:9]]}, ValueError, r"weights\[1\] must be of rows that 2·heads = 6 divides, got 9"),
    (
        {"weights": [WEIGHT, WEIGHT.half()]},
        TypeError,
        r"weights\[1\] must be of the other weights' dtype, got torch.fl",
    ),
    ({"weights": [WEIGHT, WEIGHT.to("meta")]}, ValueError, r"weights\[1\] must be on media's device, got meta"),
    # heads
    ({"heads": 2.0}, TypeError, "heads must be an int, got float"),
    ({"heads": True}, TypeError, "heads must be an int, got bool"),
    ({"heads": 0}, ValueError, "heads must be at least 1, got 0"),
    # norms
    ({"norms": VECTOR}, TypeError, r"norms must be a list of \(weight, bias\), one per layer, got a tensor"),
    ({"norms": [NORM]}, ValueError, "norms must be of 2 layers, as weights, got 1"),
    ({"norms": [NORM, VECTOR]}, TypeError, r"norms\[1\] must be a pair of tensors \(weight, bias\), got a tensor"),
    ({"norms": [(VECTOR,), NORM]}, TypeError, r"norms\[0\] must be a pair of tensors \(weight, bias\), got tuple"),
    ({"norms": [(VECTOR, None), NORM]}, TypeError, r"norms\[0\].bias must be a tensor, got NoneType"),
    ({"norms": [NORM, (VECTOR[1:], VECTOR)]}, ValueError, r"norms\[1\].weight must be of shape \[V\], got .*\[5\]"),
    ({"norms": [NORM, (VECTOR, MEDIA)]}, ValueError, r"norms\[1\].bias must be of shape \[V\], got .*\[2, 5, 6\]"),
    (
        {"norms": [NORM, (VECTOR.half(), VECTOR)]},
        TypeError,
        r"norms\[1\].weight must be of dtype float32.*, got torch.f",
    ),
    ({"norms": [NORM, (VECTOR.to("meta"), VECTOR)]}, ValueError, r"norms\[1\].weight must be on media's device, got m"),
    # eps
    ({"eps": "1"}, TypeError, "eps must be a number, got str"),
    ({"eps": -1e-5}, ValueError, "eps must be at least 0, got -1e-05"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_wrong_argument(backend, wrong, error, message):
    arguments = {"media": MEDIA, "weights": [WEIGHT, WEIGHT], "heads": 3, "norms": [NORM, NORM], "eps": 1e-5, **wrong}
    arguments = {name: _to(backend.device, value) for name, value in arguments.items()}
    with pytest.raises(error, match=f"^media_kv: {message}"):
        fk.media_kv(**arguments)


def _to(device: str, value: object) -> object:
    if isinstance(value, list | tuple):
        return type(value)(_to(device, x) for x in value)
    return value.to(device) if isinstance(value, torch.Tensor) and value.device.type != "meta" else value


@pytest.mark.parametrize("which", ["media", "weights"])
def test_autocast_cannot_mix_fp64_with_others(backend, which):
    inputs = MediaCase().inputs(backend.device)
    wide = inputs.media.double() if which == "media" else [inputs.weights[0], *(x.double() for x in inputs.weights[1:])]
    inputs = inputs._replace(**{which: wide})
    with torch.autocast(backend.device, torch.bfloat16), pytest.raises(TypeError, match="must be of"):
        fk.media_kv(inputs.media, inputs.weights, inputs.heads, norms=inputs.norms)


def test_on_meta_tensors():
    """Shapes and dtypes without any kernel."""
    inputs = MediaCase(dtype=torch.bfloat16, dims=(8, 16)).inputs("cpu").map(lambda x: x.to("meta"))
    pairs = fk.media_kv(inputs.media, inputs.weights, 2, norms=inputs.norms)
    assert [x.shape for x in pairs[1]] == [(2, 33, 2, 16)] * 2
    assert pairs[0][0].dtype == torch.bfloat16
    assert pairs[0][0].device.type == "meta"
