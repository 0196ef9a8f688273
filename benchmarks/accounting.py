"""Which launches a piece of PyTorch makes, and the bytes and operations of each, counted and not timed.

A launch is an operator of PyTorch that does work, or a Triton kernel. A Triton kernel runs in Triton's interpreter, so
that what it loads, stores and multiplies is what is counted (`interpreted.py`); for an operator of PyTorch each tensor
that goes in or out counts once, and matrix products by the formulas of torch's own flop counter. Operators that only
make views are free, and an operator that is in no list below raises, so that nothing is free by oversight.

Only shapes, dtypes, strides and integers are right in here: matrix products give zeros, and floating point arithmetic
is left out of kernels. Plain PyTorch can be counted on the meta device, where nothing runs at all.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks import interpreted

_aten = torch.ops.aten
_MATMULS = {"mm": _aten.mm, "bmm": _aten.bmm, "addmm": _aten.addmm, "addmm_": _aten.addmm, "baddbmm": _aten.baddbmm}
_FREE = {
    "alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand", "lift_fresh", "new_empty",
    "new_empty_strided", "permute", "select", "set_", "slice", "split", "split_with_sizes", "squeeze", "t",
    "transpose", "unbind", "unfold", "unsqueeze", "view", "_reshape_alias", "_unsafe_view",
}  # fmt: skip
_ONE_LAUNCH = {
    "add", "add_", "amax", "bitwise_and", "bitwise_not", "cat", "clone", "copy_", "div", "div_", "embedding",
    "fill_", "full", "full_like", "gather", "ge", "gelu", "gelu_backward", "le", "lt", "masked_fill", "mean", "mul",
    "mul_", "native_layer_norm", "native_layer_norm_backward", "neg", "new_zeros", "ones", "ones_like", "rsqrt",
    "rsub", "scatter_add", "silu", "silu_backward", "sort", "stack", "sub", "sum", "tanh", "tanh_backward", "where",
    "zero_", "zeros", "zeros_like", "_softmax", "_softmax_backward_data", "_to_copy",
}  # fmt: skip
_NOT_READ = {"copy_": 1, "fill_": 1, "zero_": 1, "zeros_like": 1, "ones_like": 1, "full_like": 1, "new_zeros": 1}


@dataclass(frozen=True)
class Launch:
    """One launch. `read` and `written` are bytes asked for, each as often as it is; `unique_` ones count a byte once.

    HBM has to move the unique ones at least, and no more where the caches keep what is asked for again.
    """

    name: str
    read: int
    written: int
    unique_read: int
    unique_written: int
    flops: int = 0  # of matrix products, with what pads a tile
    is_matmul: bool = False
    arguments: dict[str, Any] = field(default_factory=dict, repr=False)  # of a Triton kernel
    specialization: tuple = ()  # and what Triton compiles it for: another value is another compilation

    @property
    def is_triton(self) -> bool:
        return bool(self.specialization)

    @property
    def requested(self) -> int:
        return self.read + self.written

    @property
    def unique(self) -> int:
        return self.unique_read + self.unique_written


class Accounting(TorchDispatchMode):
    """Lists every launch inside, in order, those of autograd's backward included.

    Triton kernels need a process with TRITON_INTERPRET=1 set before Triton was imported, and are launched as on a GPU
    with so many multiprocessors.

    Raises (inside): NotImplementedError for an operator that is neither known to be free nor to launch.
    """

    def __init__(self, processors: int = 132) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self._processors = processors
        self._depth, self._hooks = 0, None

    def __enter__(self) -> "Accounting":
        if not self._depth:
            self._hooks = interpreted.hooks(self._add_kernel, self._processors)
            self._hooks.__enter__()
        self._depth += 1
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._depth -= 1
        if not self._depth:
            self._hooks.__exit__(*error)

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = func.name().partition("::")[2].partition(".")[0]
        if func.namespace == "flamingo_kernels":
            with self:  # to see what it is made of
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
        if name in _FREE:
            out = func(*args, **kwargs)
            if "empty" in name and not out.is_floating_point() and not out.is_meta:
                out.zero_()  # not to be counted: launches are told apart by the integers that they find
            return out
        if name in _MATMULS:
            out = _product(name, *args)
            flops = flop_registry[_MATMULS[name]](*args, **kwargs, out_val=out)
            self._add_operator(name, args, out, flops)
            return out
        if name in _ONE_LAUNCH:
            out = func(*args, **kwargs)
            self._add_operator(name, (args[_NOT_READ.get(name, 0) :], kwargs), out, 0)
            return out
        with self:  # as autograd would have called it: `to`, `reshape`, `matmul` and the like are made of others
            out = func.decompose(*args, **kwargs)
        if out is NotImplemented:
            raise NotImplementedError(f"accounting: {func.name()} is in no list of benchmarks/accounting.py")
        return out

    def _add_operator(self, name: str, inputs: object, outputs: object, flops: int) -> None:
        read, written = total_bytes(tree_leaves(inputs)), total_bytes(tree_leaves(outputs))
        self.launches.append(Launch(name, read, written, read, written, flops, name in _MATMULS))

    def _add_kernel(self, name: str, counts: interpreted.Counts, arguments: dict, specialization: tuple) -> None:
        self.launches.append(Launch(name, *counts, arguments=arguments, specialization=specialization))


def total_bytes(tensors: Iterable[object]) -> int:
    """Of different elements: what is expanded counts once. Whatever is no tensor is left out."""
    return sum(_bytes(x) for x in tensors if isinstance(x, Tensor))


def _bytes(x: Tensor) -> int:
    return x.element_size() * math.prod(n for n, step in zip(x.shape, x.stride(), strict=True) if step or not n)


def _product(name: str, *args: Tensor) -> Tensor:
    """Zeros in place of a matrix product."""
    if name == "addmm_":
        return args[0]
    a, b = args[-2:] if name in ("mm", "bmm") else args[1:3]
    return a.new_zeros((*a.shape[:-1], b.shape[-1]))


def forward_and_backward(
    run: Callable[..., Tensor | tuple[Tensor, ...]], leaves: Sequence[Tensor], processors: int = 132
) -> tuple[list[Launch], list[Launch]]:
    """The launches of `run(*leaves)`, and of its backward to all leaves."""
    for leaf in leaves:
        leaf.requires_grad_()
    with Accounting(processors) as forward:
        y = run(*leaves)
    y = (y,) if isinstance(y, Tensor) else tuple(y)
    dy = [torch.zeros_like(each) for each in y]
    with Accounting(processors) as backward:
        torch.autograd.grad(y, leaves, dy, allow_unused=True)
    return forward.launches, backward.launches


def forward_alone(
    run: Callable[..., Tensor | tuple[Tensor, ...]], leaves: Sequence[Tensor], processors: int = 132
) -> list[Launch]:
    """The launches of `run(*leaves)` without gradients."""
    with torch.no_grad(), Accounting(processors) as forward:
        run(*leaves)
    return forward.launches
