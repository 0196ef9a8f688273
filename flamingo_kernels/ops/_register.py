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
    """Attach the backward formula of an op.

    What torch.library.register_autograd does, without what that adds to each call: it reads the schema anew, argument
    by argument, for defaults, which these ops do not have. On the host that takes longer than all kernels of an op.
    Lists of tensors, which autograd.Function does not know, are left to it.
    """
    if _has_lists_of_tensors(op):
        torch.library.register_autograd(op.name(), backward, setup_context=setup_context, lib=_library)
    else:
        _library.impl(op.name().partition("::")[2], _differentiable(op, backward, setup_context), "Autograd")


def forbid_double_backward(op: Callable) -> None:
    """Differentiating a backward op raises, instead of quietly giving no gradient."""

    def backward(ctx: object, *grads: object) -> None:
        raise NotImplementedError(f"{op.name()} cannot be differentiated: these ops have no double backward")

    register_autograd(op, backward, lambda ctx, inputs, output: None)


def register_autocast(op: Callable, names: Collection[str]) -> None:
    """Under autocast, these arguments (tensors or lists of them, fp64 apart) are cast to the autocast dtype."""
    for device, key in _AUTOCAST_KEYS.items():
        _library.impl(op.name().partition("::")[2], _autocast(op, names, device, key), key, with_keyset=False)


def is_left_alone(x: torch.Tensor) -> bool:
    """Whether autocast does not cast this tensor, because it is off or because of the tensor's dtype."""
    device = x.device.type
    on = device in _AUTOCAST_KEYS and torch.is_autocast_enabled(device)
    return x.dtype == torch.float64 or not on


def _has_lists_of_tensors(op: Callable) -> bool:
    return any(str(value.type) == "List[Tensor]" for value in (*op._schema.arguments, *op._schema.returns))


def _differentiable(op: Callable, backward: Callable, setup_context: Callable) -> Callable:
    def below_autograd(*args: object) -> object:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    def forward(ctx: object, *args: object) -> object:
        output = below_autograd(*args)
        setup_context(ctx, args, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function = type(op.name().replace("::", "_"), (torch.autograd.Function,), methods)

    def differentiable(*args: object) -> object:
        needs_gradient = torch.is_grad_enabled() and torch._C._any_requires_grad(*args)
        return function.apply(*args) if needs_gradient else below_autograd(*args)

    return differentiable


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
