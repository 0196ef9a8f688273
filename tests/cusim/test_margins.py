"""What is written beside a tensor is noticed, and what is read there is NaN."""

import ctypes

import pytest
import torch

from tests.cusim.margins import MARGIN, margins


def _write(x: torch.Tensor, offset: int) -> None:
    ctypes.memset(x.data_ptr() + offset, 0, 1)


MAKERS = {
    "empty": lambda *shape: torch.empty(shape),
    "empty_like": lambda *shape: torch.empty_like(torch.ones(shape)),
    "new_empty": lambda *shape: torch.ones(1).new_empty(shape),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize(("offset", "said"), [(24, "behind .* 24 bytes .* at \\+0"), (-MARGIN, "before .* at -65536")])
def test_what_is_written_beside_a_tensor_is_noticed(make, offset: int, said: str) -> None:
    with pytest.raises(AssertionError, match=said), margins():
        _write(make(2, 3), offset)


def test_what_is_written_inside_is_not() -> None:
    with margins() as made:
        x = torch.empty(2, 3, dtype=torch.bfloat16)
        assert x.isnan().all()
        x.fill_(1)
        y = made.around(torch.arange(12.0).view(3, 4).t())
        assert y.stride() == (1, 4)
        assert torch.equal(y, torch.arange(12.0).view(3, 4).t())
        assert torch.empty(0, 3).shape == (0, 3)
