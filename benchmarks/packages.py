"""The public Flamingo packages as rivals, and modules around the tensors of a case."""

import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor, nn

from benchmarks.harness import Unavailable


def open_flamingo() -> ModuleType:
    """open_flamingo/src/helpers.py by its path: importing the package needs much more than its modules do."""
    try:
        distribution = importlib.metadata.distribution("open-flamingo")
        path = distribution.locate_file("open_flamingo/src/helpers.py")
        spec = importlib.util.spec_from_file_location("open_flamingo_helpers", path)
        helpers = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = helpers  # torch.compile looks a function's module up there
        spec.loader.exec_module(helpers)
    except ImportError as error:
        raise Unavailable("not installed") from error
    return helpers


def flamingo_pytorch() -> ModuleType:
    try:
        return importlib.import_module("flamingo_pytorch.flamingo_pytorch")
    except ImportError as error:
        raise Unavailable("not installed") from error


def module_of(build: Callable[[], nn.Module], state: dict[str, Tensor]) -> nn.Module:
    """A module whose parameters are the tensors of `state` themselves, neither drawn nor copied."""
    with torch.device("meta"):
        module = build()
    module.load_state_dict(state, assign=True)
    return module


def parameters_of(module: nn.Module, names: Sequence[str]) -> list[Tensor]:
    parameters = dict(module.named_parameters())
    return [parameters[name] for name in names]
