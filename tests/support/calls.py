"""Which operators a piece of code calls, on any backend."""

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Calls(TorchDispatchMode):
    """Notes (name, arguments) of every operator called inside, ours and PyTorch's, its backward's included."""

    def __init__(self) -> None:
        super().__init__()
        self._noted: list[tuple[str, tuple]] = []

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self._noted.append((func.name().partition("::")[2].partition(".")[0], args))
        return func(*args, **(kwargs or {}))

    def args(self, name: str) -> list[tuple]:
        """The arguments of each call of one operator."""
        return [args for called, args in self._noted if called == name]

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self._noted]
