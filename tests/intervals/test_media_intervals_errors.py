"""Every wrong argument of media_intervals: the error's type, and that it names the argument, the wish and what came."""

import pytest
import torch

import flamingo_kernels as fk
from tests.support.process import normal_process

pytestmark = normal_process

LOCATIONS = torch.tensor([[True, False, True], [False, True, False]])

WRONG = [
    ({"media_locations": [[True]]}, TypeError, "media_locations must be a bool tensor, got list"),
    ({"media_locations": LOCATIONS.int()}, TypeError, "media_locations must be .*bool.*, got .*int32"),
    ({"media_locations": LOCATIONS[0]}, ValueError, r"media_locations must be .*\[B, T\].*, got .*\[3\]"),
    ({"media_locations": LOCATIONS[None]}, ValueError, r"media_locations must be .*\[B, T\].*, got .*\[1, 2, 3\]"),
    ({"tokens_per_media": 64.0}, TypeError, "tokens_per_media must be an int, got float"),
    ({"tokens_per_media": True}, TypeError, "tokens_per_media must be an int, got bool"),
    ({"tokens_per_media": torch.tensor(4)}, TypeError, "tokens_per_media must be an int, got .*tensor"),
    ({"tokens_per_media": 0}, ValueError, "tokens_per_media must be at least 1, got 0"),
    ({"tokens_per_media": -64}, ValueError, "tokens_per_media must be at least 1, got -64"),
    ({"attend": "previous"}, ValueError, "attend must be one of latest, all, next, group, got 'previous'"),
    ({"attend": None}, ValueError, "attend must be one of .*, got None"),
    ({"num_media": 2.0}, TypeError, "num_media must be an int.*, got float"),
    ({"num_media": True}, TypeError, "num_media must be an int.*, got bool"),
    ({"num_media": -1}, ValueError, "num_media must be at least 0, got -1"),
    ({"num_media": torch.tensor([2.0, 2.0])}, TypeError, "num_media must be .*integer.*, got .*float32"),
    ({"num_media": torch.tensor([True, True])}, TypeError, "num_media must be .*integer.*, got .*bool"),
    ({"num_media": torch.tensor([2, 2, 2])}, ValueError, r"num_media must be .*\[2\].*, got .*\[3\]"),
    ({"num_media": torch.tensor([[2], [2]])}, ValueError, r"num_media must be .*\[2\].*, got .*\[2, 1\]"),
    ({"num_media": [2, 2]}, TypeError, "num_media must be an int.*, got list"),
    ({"media_seen": 1.0}, TypeError, "media_seen must be an int.*, got float"),
    ({"media_seen": -1}, ValueError, "media_seen must be at least 0, got -1"),
    ({"media_seen": torch.tensor([1])}, ValueError, r"media_seen must be .*\[2\].*, got .*\[1\]"),
    ({"media_seen": torch.tensor([1.0, 1.0])}, TypeError, "media_seen must be .*integer.*, got .*float32"),
    ({"document_start": True}, TypeError, "document_start must be a bool tensor, got bool"),
    ({"document_start": LOCATIONS.long()}, TypeError, "document_start must be .*bool.*, got .*int64"),
    ({"document_start": LOCATIONS[:, :2]}, ValueError, r"document_start must be .*\[2, 3\].*, got .*\[2, 2\]"),
    ({"document_start": LOCATIONS.to("meta")}, ValueError, "document_start must be .*cpu.*, got meta"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), WRONG, ids=lambda x: str(x)[:60])
def test_wrong_argument(wrong, error, message):
    with pytest.raises(error, match=f"media_intervals: {message}"):
        fk.media_intervals(**{"media_locations": LOCATIONS, "tokens_per_media": 4, **wrong})


@pytest.mark.parametrize("num_media", [1, torch.tensor([1, 5]), torch.tensor(1)], ids=str)
def test_more_media_tokens_than_media(num_media):
    with pytest.raises(ValueError, match=r"num_media .*row 0 has 2 .*num_media 1"):
        fk.media_intervals(LOCATIONS, 4, num_media)
    with pytest.raises(ValueError, match=r"num_media .*row 1 has 4 .*num_media 3"):
        fk.media_intervals(LOCATIONS, 4, torch.tensor([5, 3]), media_seen=torch.tensor([0, 3]))


@pytest.mark.parametrize("attend", ["latest", "all", "next", "group"])
def test_without_validation_tokens_past_the_last_media_see_nothing(attend):
    start, end = fk.media_intervals(LOCATIONS, 4, torch.tensor([1, 0]), attend=attend, validate=False)
    assert (start[0, 0], end[0, 0]) == (0, 4)
    assert (start[0, 2], end[0, 2]) == (0, 0)
    assert (end[1, 1:] == 0).all()
