"""Errors that name the argument, what was expected and what came.

A step of decoding takes little longer than its checks, so what an error says is put together only where there is one:
`expect` takes texts and values as they are, and what has to be formatted stands behind an `if`, in a `message`.
"""

from torch import Tensor


def expect(condition: bool, op: str, argument: str, expected: str, came: object) -> None:
    """Raise ValueError unless the condition holds."""
    if not condition:
        raise ValueError(message(op, argument, expected, came))


def expect_type(condition: bool, op: str, argument: str, expected: str, came: object) -> None:
    """Raise TypeError unless the condition holds."""
    if not condition:
        raise TypeError(message(op, argument, expected, came))


def got(value: object) -> str:
    """How a value of the wrong type is named in an error."""
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


def message(op: str, argument: str, expected: str, came: object) -> str:
    """What an error says."""
    return f"{op}: {argument} must be {expected}, got {came}"
