"""Registration of an op with torch.library: schema, kernel, fake, autograd, autocast."""

from collections.abc import Callable, Collection

import torch

_library = torch.library.Library("flamingo_kernels", "DEF")  # lives as long as the process
_NAMESPACE = "flamingo_kernels"
_AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}  # by device


def register(schema: str, kernel: Callable, fake: Callable) -> Callable:
    """Define an op on every device and return it. `fake` gives the shapes of its outputs."""
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{_NAMESPACE}::{name}", fake, lib=_library)
    return getattr(getattr(torch.ops, _NAMESPACE), name).default


def register_autograd(op: Callable, backward: Callable, setup_context: Callable) -> None:
    """Attach the backward formula of an op."""
    torch.library.register_autograd(op.name(), backward, setup_context=setup_context, lib=_library)


def forbid_double_backward(op: Callable) -> None:
    """Differentiating a backward op raises, instead of quietly giving no gradient."""

    def backward(ctx: object, *grads: object) -> None:
        raise NotImplementedError(f"{op.name()} cannot be differentiated: these ops have no double backward")

    torch.library.register_autograd(op.name(), backward, lib=_library)


def register_autocast(op: Callable, names: Collection[str]) -> None:
    """Under autocast, these arguments (tensors or lists of them, fp64 apart) are cast to the autocast dtype."""
    for device, key in _AUTOCAST_KEYS.items():
        _library.impl(op.name().partition("::")[2], _autocast(op, names, device, key), key, with_keyset=False)


def is_left_alone(x: torch.Tensor) -> bool:
    """Whether autocast does not cast this tensor, because it is off or because of the tensor's dtype."""
    device = x.device.type
    on = device in _AUTOCAST_KEYS and torch.is_autocast_enabled(device)
    return x.dtype == torch.float64 or not on


def _autocast(op: Callable, names: Collection[str], device: str, key: str) -> Callable:
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    is_cast = [argument.name in names for argument in op._schema.arguments]

    def cast(value: object, dtype: torch.dtype) -> object:
        if isinstance(value, list | tuple):
            return [cast(each, dtype) for each in value]
        return value.to(dtype) if value.dtype != torch.float64 else value

    def autocast(*args: object) -> object:
        dtype = torch.get_autocast_dtype(device)
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return op(*(cast(value, dtype) if wanted else value for wanted, value in zip(is_cast, args, strict=True)))

    return autocast
