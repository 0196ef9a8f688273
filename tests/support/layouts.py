"""Layouts of a tensor in memory: functions that give the same numbers, or expanded ones, with other strides."""

import torch
from torch import Tensor


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _tokens_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def _head_dim_first(x: Tensor) -> Tensor:
    return x.movedim(3, 0).contiguous().movedim(0, 3)


def _every_second(dim: int):
    def layout(x: Tensor) -> Tensor:
        wide = x.repeat_interleave(2, dim).add(1)
        sliced = wide[(slice(None),) * dim + (slice(0, None, 2),)]
        return sliced.copy_(x)

    return layout


def _inside_of_more(x: Tensor) -> Tensor:
    wide = torch.full([n + 3 for n in x.shape], float("nan"), dtype=x.dtype, device=x.device)
    return wide[tuple(slice(1, 1 + n) for n in x.shape)].copy_(x)


def _off_by_one_element(x: Tensor) -> Tensor:
    return torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].view(x.shape).copy_(x)


def _expanded(dim: int):
    def layout(x: Tensor) -> Tensor:
        return x.narrow(dim, 0, 1).expand(x.shape)

    return layout


def _one_number(x: Tensor) -> Tensor:
    return torch.tensor(0.25, dtype=x.dtype, device=x.device).expand(x.shape)


LAYOUTS = {
    "heads first": _heads_first,
    "tokens first": _tokens_first,
    "head dim first": _head_dim_first,
    **{f"every second of dim {dim}": _every_second(dim) for dim in range(4)},
    "inside of more": _inside_of_more,
    "off by one element": _off_by_one_element,
    **{f"expanded dim {dim}": _expanded(dim) for dim in range(4)},
    "one number": _one_number,
}
