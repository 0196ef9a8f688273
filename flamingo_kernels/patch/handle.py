"""fk.patch."""

from torch import nn

from flamingo_kernels._checks import expect_type, got
from flamingo_kernels.patch.fused import Fused, NotFused, check, is_swapped, swap, unswap
from flamingo_kernels.patch.known import lookup, supported


class Handle:
    """What `patch` changed.

    Attributes:
        patched: (name, class) of each patched module, names as in `model.named_modules()`.
    """

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self._modules = modules
        self.patched = [(name, type(module).__name__) for name, module in modules.items()]

    def restore(self) -> None:
        """Give every module of `patched` its own forward again, by whichever call of `patch` it lost it.

        Modules that are restored already are passed over.

        Raises:
            ValueError: a module has been wrapped since (by fully_shard or accelerate, for example), which must be
                undone first; nothing is restored then.
        """
        modules = {name: module for name, module in self._modules.items() if isinstance(module, Fused)}
        for name, module in modules.items():
            if not is_swapped(module):
                raise ValueError(f"restore: {_called(name, module)} has been wrapped since it was patched")
        for module in modules.values():
            unswap(module)

    def __repr__(self) -> str:
        return f"Handle({', '.join(f'{name}: {kind}' if name else kind for name, kind in self.patched)})"


def patch(model: nn.Module) -> Handle:
    """Run the gated blocks and resamplers inside a foreign model on the fused ops.

        handle = fk.patch(model)        # a whole model, or one block or resampler
        print(handle.patched)
        handle.restore()

    Known are OpenFlamingo, Otter and flamingo-pytorch (GatedCrossAttentionBlock, MaskedCrossAttention,
    PerceiverResampler), flamingo-mini (the same), IDEFICS (IdeficsGatedCrossAttentionLayer, IdeficsPerceiverResampler)
    and Mllama, which is Llama 3.2 Vision (MllamaCrossAttentionDecoderLayer), the last two of transformers. Tested with
    open-flamingo 2.0.1, flamingo-pytorch 0.1.2 and transformers 5.24.

    A patched module takes what it took, and returns what it returned up to rounding, with gradients, in training and
    evaluation, in any dtype, under autocast, whatever its masks say. Parameters, buffers, hooks, submodules and state
    dict stay the very same objects; linears and norms that adapters or quantisers put inside are called as they are.
    What changes is the class of the instance: to a subclass of its own class with the same name. No class is changed.

    Where a call is not as the fused forward expects (a dense mask that is no run of keys, dropout in training, hooks on
    a module that would not be called), the module runs its original forward, and one RuntimeWarning a model says why. A
    dense mask is looked at once for all layers, with one device sync. While torch.compile traces it cannot be: a
    compiled model raises RuntimeError on a mask that is no run of keys.

    Patching again changes nothing more, and the new handle restores everything that is patched in `model`. Copies
    (copy.deepcopy) and pickles of a patched model are patched, and need this package where they are loaded;
    `patch(copy).restore()` undoes it there. Patch before accelerate or FSDP wrap the model.

    Args:
        model: the module; it is changed in place.

    Raises:
        TypeError: model is no module.
        ValueError: nothing in it is known, or a known module cannot be patched: its class has a forward of its own, its
            arguments are of another version, its parts have been replaced. Nothing is patched then.
    """
    expect_type(isinstance(model, nn.Module), "patch", "model", "an nn.Module", got(model))
    known = {name: (module, lookup(module)) for name, module in model.named_modules()}
    known = {name: (module, what) for name, (module, what) in known.items() if what is not None}
    if not known:
        raise ValueError(f"patch: model holds nothing that can be patched, got {type(model).__name__}. {_SUPPORTED}")
    for name, (module, (package, kind, fused)) in known.items():
        if isinstance(module, Fused):
            continue
        try:
            check(module, fused, kind)
        except NotFused as reason:
            called = _called(name, module)
            raise ValueError(f"patch: {called} of {package} cannot be patched: {reason}. {_SUPPORTED}") from None
    warned: set[str] = set()
    for name, (module, (_, _, fused)) in known.items():
        if not isinstance(module, Fused):
            swap(module, fused, name, warned)
    return Handle({name: module for name, (module, _) in known.items()})


_SUPPORTED = f"Supported: {supported()}"


def _called(name: str, module: nn.Module) -> str:
    return f"{name} ({type(module).__name__})" if name else type(module).__name__
