"""How one instance of a foreign module gets another forward: its class becomes a subclass made for it.

Parameters, buffers, hooks, submodules and all attributes stay as they are, and `isinstance` and the class's name too.
The subclass has the forward of the original above its own, which it calls where a call is not as it expects.
"""

import contextlib
import functools
import inspect
import warnings

from torch import nn

from flamingo_kernels.nn._linears import is_watched

_STATE = "_flamingo_kernels"  # the one attribute that a patched instance has more, and the one of its class
_ORIGIN = "_flamingo_kernels_origin"


class NotFused(Exception):
    """This module, or this call of it, is left to the original; the message says why."""


class Watched(NotFused):
    """A module has hooks, as it may have in one call and not in the next."""


class Fused:
    """Base of the forwards, each written for the modules of one package."""

    SIGNATURES: tuple[tuple[str, ...], ...]  # what the original's forward may take; "..." stands for anything more

    def fused_forward(self, *args: object, **kwargs: object) -> object:
        """What the original's forward gives; raises NotFused, before it has changed anything, where it cannot."""
        raise NotImplementedError

    def original_arguments(self) -> tuple[str, ...]:
        """The names of the arguments of the original's forward."""
        return _takes(getattr(type(self), _ORIGIN)[1])

    def check_structure(self) -> None:
        """Raise NotFused where the modules inside are not the ones that `fused_forward` stands for."""
        raise NotImplementedError

    def forward(self, *args: object, **kwargs: object) -> object:
        try:
            return self.fused_forward(*args, **kwargs)
        except NotFused as error:
            reason = str(error)
        name, warned = getattr(self, _STATE)
        if reason not in warned:
            warned.add(reason)
            where = f"{name} ({type(self).__name__})" if name else type(self).__name__
            warnings.warn(
                f"flamingo_kernels.patch: {where} runs its original forward: {reason}. This is said once a model.",
                RuntimeWarning,
                stacklevel=2,
            )
        return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol: int) -> tuple:
        """Copies and pickles name the original class, since nobody could import the one that was made."""
        function, arguments, *state = super().__reduce_ex__(protocol)
        fused, original = getattr(type(self), _ORIGIN)
        return (_rebuild, (function, fused, original, *arguments[1:]), *state)


def check(module: nn.Module, fused: type[Fused], known: type) -> None:
    """Raise NotFused where an instance of the class `known` cannot have the forward of `fused`."""
    if type(module).forward is not known.forward and not _wraps(type(module).forward, known.forward):
        raise NotFused("its class has a forward of its own")
    if "forward" in vars(module):
        raise NotFused("its forward has been replaced already, by hooks of accelerate for example; patch before that")
    takes = _takes(known)
    if not any(_fits(takes, names) for names in fused.SIGNATURES):
        expected = " or ".join(f"({', '.join(names)})" for names in fused.SIGNATURES)
        raise NotFused(f"its forward takes ({', '.join(takes)}), where {expected} is supported")
    with contextlib.suppress(Watched):
        fused.check_structure(module)


def swap(module: nn.Module, fused: type[Fused], name: str, warned: set[str]) -> None:
    """Give a module that `check` lets pass the forward of `fused`.

    name: for warnings. warned: the reasons that one was given for, which the modules of a model share.
    """
    setattr(module, _STATE, (name, warned))
    module.__class__ = _subclass(fused, type(module))


def unswap(module: nn.Module) -> None:
    """Undo `swap`."""
    _, module.__class__ = vars(type(module))[_ORIGIN]
    delattr(module, _STATE)


def is_swapped(module: nn.Module) -> bool:
    """Whether it is as `swap` left it: nobody has put another class or forward on top."""
    return _ORIGIN in vars(type(module)) and "forward" not in vars(module)


def expect_modules(module: nn.Module, *names: str) -> None:
    """Raise NotFused where it lacks one of these submodules."""
    for name in names:
        if not isinstance(getattr(module, name, None), nn.Module):
            raise NotFused(f"{type(module).__name__} has no module {name}")


def expect_unwatched(**modules: nn.Module) -> None:
    """Raise NotFused where one that the fused forward would not call has hooks."""
    for name, module in modules.items():
        if is_watched(module):
            raise Watched(f"{name} has hooks, or a forward of its own, that would not be called")


@functools.cache
def _subclass(fused: type[Fused], original: type) -> type:
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    return type(original.__name__, (fused, original), {**names, _ORIGIN: (fused, original)})


@functools.cache
def _takes(original: type) -> tuple[str, ...]:
    return tuple(inspect.signature(original.forward).parameters)[1:]


def _fits(takes: tuple[str, ...], names: tuple[str, ...]) -> bool:
    return takes[: len(names) - 1] == names[:-1] if names[-1] == "..." else takes == names


def _rebuild(function: object, fused: type[Fused], original: type, *arguments: object) -> nn.Module:
    return function(_subclass(fused, original), *arguments)


def _wraps(forward: object, known: object) -> bool:
    """transformers wraps the forward of each subclass of its layers, to checkpoint it."""
    while forward is not known:
        if not hasattr(forward, "__wrapped__"):
            return False
        forward = forward.__wrapped__
    return True
