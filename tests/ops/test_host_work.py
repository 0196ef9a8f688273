"""What a call does on the host besides launching its kernels: nothing that was done by the call before, or for nobody.

On a GPU the host has to stay ahead of kernels of a few microseconds. Times would depend on the machine, so what counts
here is which Python runs.
"""

import importlib
import pathlib
import sys
from collections.abc import Callable
from types import FrameType

import pytest
import torch

import flamingo_kernels as fk
from flamingo_kernels import _backends, _checks
from tests.support import every_op
from tests.support.process import pick

PACKAGE = str(pathlib.Path(fk.__file__).parent)
NAMES = tuple(every_op.runs())
FIRST_OF_EACH_OP = tuple({name.split()[0]: name for name in reversed(NAMES)}.values())
TEXTS = (_checks.message, _checks.got)
FORMATTING = ("str.join", "str.format", "repr")
SEARCHES = (importlib.import_module, torch.cuda.get_device_properties, _backends._usable.__wrapped__)


def _called(run: Callable[[], object]) -> set[str]:
    """The functions that a run calls, forward and backward: "file:name", and "file:builtin" by whose file calls it."""
    called = set()

    def note(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            called.add(f"{frame.f_code.co_filename}:{frame.f_code.co_name}")
        elif event == "c_call":
            called.add(f"{frame.f_code.co_filename}:{argument.__qualname__}")

    before = sys.getprofile()
    with torch.autograd.set_multithreading_enabled(False):  # backward in this thread, which is the one that is watched
        sys.setprofile(note)
        try:
            run()
        finally:
            sys.setprofile(before)
    return called


def _place(function: Callable) -> str:
    return f"{function.__code__.co_filename}:{function.__code__.co_name}"


@pytest.mark.parametrize("name", pick(NAMES, FIRST_OF_EACH_OP))
def test_a_second_call(backend, name):
    """It searches for nothing that the first one has found, and puts no text of an error together."""
    run = every_op.runs(device=backend.device)[name]
    run()
    called = _called(run)
    assert any(place.startswith(f"{PACKAGE}/ops/{name.split()[0]}.py:") for place in called)
    assert not called & {_place(function) for function in (*SEARCHES, *TEXTS)}
    assert not [place for place in called if place.startswith(PACKAGE) and place.endswith(FORMATTING)]
    if "media_kv" not in name:  # whose lists of tensors torch.library has to take apart
        assert not [place for place in called if "torch/_library/autograd.py:" in place]


def test_a_check_that_fails_is_noticed():
    """What the test above looks for."""
    x = torch.zeros(2, 3, dtype=torch.int32)

    def fail() -> None:
        with pytest.raises(TypeError, match="x must be of dtype"):
            fk.norm_linear(x, None, None, x)

    assert _place(_checks.message) in _called(fail)
