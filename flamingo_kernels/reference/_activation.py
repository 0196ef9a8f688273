"""The activations of the feed-forward and their backward, on tensors of the accumulation dtype.

| name         | act(h)                                          | act'(h)                                   |
|--------------|-------------------------------------------------|-------------------------------------------|
| squared_relu | relu(h)²                                        | 2 relu(h)                                 |
| gelu         | h Φ(h), Φ the normal distribution's             | Φ(h) + h φ(h), φ its density              |
| gelu_tanh    | h (1 + t) / 2, t = tanh(β (h + 0.044715 h³))    | (1 + t + h (1 - t²) β (1 + 0.134145 h²)) / 2 |
| relu         | max(h, 0)                                       | 1 where h > 0, else 0                     |
| silu         | h σ(h)                                          | σ(h) (1 + h (1 - σ(h)))                   |
| swiglu       | silu(gate) · up, h = [gate, up]                 |                                           |

with β = √(2/π).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_BETA = math.sqrt(2 / math.pi)


def activate(activation: str, hidden: Tensor) -> Tensor:
    """act(hidden); of half hidden's width for swiglu."""
    if activation == "swiglu":
        gate, up = hidden.chunk(2, dim=-1)
        return F.silu(gate) * up
    if activation == "squared_relu":
        return F.relu(hidden).square()
    if activation == "gelu_tanh":
        return F.gelu(hidden, approximate="tanh")
    return {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}[activation](hidden)


def backward(activation: str, hidden: Tensor, d_out: Tensor) -> Tensor:
    """The gradient of hidden from that of act(hidden)."""
    if activation == "swiglu":
        gate, up = hidden.chunk(2, dim=-1)
        return torch.cat([d_out * up * _slope("silu", gate), d_out * F.silu(gate)], dim=-1)
    return d_out * _slope(activation, hidden)


def _slope(activation: str, h: Tensor) -> Tensor:
    """act'(h)."""
    if activation == "squared_relu":
        return 2 * F.relu(h)
    if activation == "relu":
        return torch.where(h > 0, 1, h.clamp(min=0))  # a NaN stays one
    if activation == "silu":
        return h.sigmoid() * (1 + h * (1 - h.sigmoid()))
    if activation == "gelu":
        return (1 + torch.erf(h * math.sqrt(0.5))) / 2 + h * torch.exp(-h.square() / 2) / math.sqrt(2 * math.pi)
    h = h.clamp(-10, 10)  # beyond, the slope is 0 or 1 to the last bit of fp64, and h³ may overflow
    t = torch.tanh(_BETA * (h + 0.044715 * h**3))
    return (1 + t + h * (1 - t.square()) * _BETA * (1 + 0.134145 * h.square())) / 2
