"""Which foreign classes have a fused forward: by the names of class and module, so that nothing need be imported."""

from torch import nn

from flamingo_kernels.patch import flamingo_mini, open_flamingo, transformers
from flamingo_kernels.patch.fused import Fused

_FAMILY = ("GatedCrossAttentionBlock", "MaskedCrossAttention", "PerceiverResampler")
_IDEFICS = ("IdeficsGatedCrossAttentionLayer", "IdeficsPerceiverResampler")

# package, as it stands somewhere in the name of the module -> name of the class -> its forward
_KNOWN: dict[str, dict[str, type[Fused]]] = {
    "flamingo_mini": {name: getattr(flamingo_mini, name) for name in _FAMILY},
    "flamingo_pytorch": {name: getattr(open_flamingo, name) for name in _FAMILY},
    "open_flamingo": {name: getattr(open_flamingo, name) for name in _FAMILY},
    # its copy of OpenFlamingo, too, whose classes begin with Flamingo
    "otter": {f"{prefix}{name}": getattr(open_flamingo, name) for prefix in ("Otter", "Flamingo") for name in _FAMILY},
    "transformers.models.idefics": {name: getattr(transformers, name) for name in _IDEFICS},
    "transformers.models.mllama": {
        "MllamaCrossAttentionDecoderLayer": transformers.MllamaCrossAttentionDecoderLayer,
    },
}


def lookup(module: nn.Module) -> tuple[str, type, type[Fused]] | None:
    """Package, foreign class and forward of an instance of it or of a subclass; None where it is no known one."""
    for kind in type(module).__mro__:
        for package, classes in _KNOWN.items():
            if kind.__name__ in classes and package in kind.__module__.lower():
                return package, kind, classes[kind.__name__]
    return None


def supported() -> str:
    """All that `lookup` knows, for messages."""
    return "; ".join(f"{package}: {', '.join(classes)}" for package, classes in _KNOWN.items())
