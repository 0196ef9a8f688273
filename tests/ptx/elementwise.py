"""The whitelist of instructions that every lane computes for itself: whole opcodes, each with its types and a function.

`OPS[opcode, number of operands]` names the types of the result and of each operand, and a function of numpy arrays in
these types. Every modifier is part of the opcode, so what is not defined as a whole, in integers.py, floats.py or
conversions.py, is not known.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Op(NamedTuple):
    """result: a type, or "pred|pred" for two. narrow: operands and result may be smaller than their registers."""

    result: str
    operands: tuple[str, ...]
    function: Callable
    narrow: bool


OPS: dict[tuple[str, int], Op] = {}


def define(opcode: str, result: str, operands: tuple[str, ...], function: Callable, narrow: bool = False) -> None:
    OPS[opcode, len(operands)] = Op(result, operands, function, narrow)


def define_comparison(name: str, t: str, function: Callable) -> None:
    """setp, alone and joined with another predicate."""
    define(f"setp.{name}.{t}", "pred", (t, t), function)
    for join, combine in (("and", np.logical_and), ("or", np.logical_or), ("xor", np.logical_xor)):
        define(f"setp.{name}.{join}.{t}", "pred", (t, t, "pred"), lambda a, b, p, f=function, c=combine: c(f(a, b), p))


def comparisons(lt: str = "lt", le: str = "le", gt: str = "gt", ge: str = "ge") -> dict[str, Callable]:
    return {"eq": np.equal, "ne": np.not_equal, lt: np.less, le: np.less_equal, gt: np.greater, ge: np.greater_equal}
