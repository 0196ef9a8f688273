"""The fused linear ops on modules.

Adapters and quantisers put their own module where a linear or a norm stood, or hang hooks on it. What is no longer a
plain one is called as the module that it is, with plain PyTorch around it.
"""

from torch import Tensor, nn

from flamingo_kernels.nn._norms import describe
from flamingo_kernels.ops.linear_gate_residual import linear_gate_residual
from flamingo_kernels.ops.norm_linear import norm_linear


def is_plain(linear: nn.Module) -> bool:
    """Whether calling it is nothing but a product with its weight."""
    return type(linear) is nn.Linear and linear.bias is None and not is_watched(linear)


def norm_arguments(norm: nn.Module) -> dict[str, object] | None:
    """What the ops want to know of a norm; None where it is none that they know, or more than that."""
    described = None if is_watched(norm) else describe(norm)
    if described is None:
        return None
    kind, eps = described
    bias = norm.bias if kind == "layer" else None
    return {"norm_weight": norm.weight, "norm_bias": bias, "norm": kind, "eps": eps}


def project(x: Tensor, norm: nn.Module, linear: nn.Module) -> Tensor:
    """linear(norm(x))."""
    normed = norm_arguments(norm)
    if normed is None or not is_plain(linear):
        return linear(norm(x))
    return norm_linear(x, weight=linear.weight, **normed)


def add(residual: Tensor, gate: Tensor | None, linear: nn.Module, x: Tensor) -> Tensor:
    """residual + tanh(gate)·linear(x), in the residual's dtype; without a gate its tanh is 1."""
    if is_plain(linear):
        return linear_gate_residual(x, linear.weight, residual, gate)
    branch = linear(x)
    # an fp32 gate under autocast must not widen a bf16 language model
    return (residual + (branch if gate is None else gate.tanh() * branch)).to(residual.dtype)


def is_watched(module: nn.Module) -> bool:
    """Whether somebody relies on it being called: by a hook, or by a forward put in the place of its class's."""
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return any(map(len, hooks)) or "forward" in vars(module)
