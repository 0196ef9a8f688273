"""A Flamingo block and resampler in plain PyTorch: dense masks, concatenated latents, autograd.

Written apart from the modules: from a dict of parameters under the names that their docstrings promise.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.budget import assert_within_budget

Parameters = dict[str, Tensor]
LOSSES = 8


def gated_block(
    p: Parameters,
    x: Tensor,
    media: Tensor | None,
    visible: Tensor | None,
    *,
    heads: int,
    activation: str = "squared_relu",
    skip_mlp_without_media: bool = False,
) -> Tensor:
    """x [B, T, C]; media [B', K, V]; visible bool [B, T, K]."""
    if media is not None:
        q = _heads(_norm(p, "attn_norm", x) @ p["to_q.weight"].T, heads)
        dim_head = q.shape[-1]
        inner = p["to_kv.weight"].shape[0] // 2
        k = _heads(media @ p["to_kv.weight"][:inner].T, inner // dim_head)
        v = _heads(media @ p["to_kv.weight"][inner:].T, inner // dim_head)
        q, k = _norm(p, "q_norm", q), _norm(p, "k_norm", k)
        k, v = (t.repeat_interleave(x.shape[0] // media.shape[0], 0) for t in (k, v))
        attended = _attention(q, k, v, visible)
        x = x + torch.tanh(p["attn_gate"]) * (attended @ p["to_out.weight"].T)
    ff = torch.tanh(p["ff_gate"]) * _feed_forward(p, "", x, activation)
    if skip_mlp_without_media:
        ff = torch.zeros_like(ff) if media is None else ff * visible.any(-1, keepdim=True)
    return x + ff


def resampler(
    p: Parameters, x: Tensor, token_mask: Tensor, frame_counts: Tensor, *, heads: int, activation: str = "squared_relu"
) -> Tensor:
    """x [B, M, frames, patches, V], bool token_mask of its shape without V, int frame_counts [B, M] -> [B, M, R, V]."""
    B, M, frames, patches, V = x.shape
    if "frame_embeddings" in p:
        x = x + torch.stack(
            [frame_embeddings(p["frame_embeddings"], count, frames) for count in frame_counts.flatten().tolist()]
        ).reshape(B, M, frames, 1, V)
    if "media_embeddings" in p:
        x = x + p["media_embeddings"][:M].reshape(M, 1, 1, V)
    counted = torch.arange(frames).expand(B, M, frames) < frame_counts[..., None]
    valid = (token_mask & counted[..., None]).to(x.device).reshape(B * M, 1, frames * patches)
    media = x.reshape(B * M, frames * patches, V)
    latents = p["latents"].expand(B * M, *p["latents"].shape)
    visible = torch.cat([valid, torch.ones_like(valid[..., :1]).expand(-1, 1, latents.shape[1])], -1)
    visible = visible.expand(-1, latents.shape[1], -1)
    depth = len({name.split(".")[1] for name in p if name.startswith("layers.")})
    for layer in (f"layers.{i}." for i in range(depth)):
        z = _norm(p, layer + "latent_norm", latents)
        keys = torch.cat([_norm(p, layer + "media_norm", media), z], 1)
        q = _heads(z @ p[layer + "to_q.weight"].T, heads)
        k, v = (_heads(keys @ weight.T, heads) for weight in p[layer + "to_kv.weight"].chunk(2))
        q, k = _norm(p, layer + "q_norm", q), _norm(p, layer + "k_norm", k)
        latents = latents + _attention(q, k, v, visible) @ p[layer + "to_out.weight"].T
        latents = latents + _feed_forward(p, layer, latents, activation)
    return _norm(p, "norm", latents).reshape(B, M, -1, V)


def frame_embeddings(table: Tensor, count: int, frames: int) -> Tensor:
    """[frames, V], of which `count` are real: the first ones of the table, or all of it stretched; then zeros."""
    if count <= table.shape[0]:
        real = table[:count]
    else:  # torch interpolates the last dimension
        real = F.interpolate(table.T[None], size=count, mode="linear", align_corners=True)[0].T
    return F.pad(real, (0, 0, 0, frames - count))


def randomize(module: nn.Module, seed: int = 0) -> None:
    """Move every parameter away from its start, where gates hide the branches and norms do nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            if name.endswith("norm.weight"):
                parameter.copy_(1 + 0.3 * noise)
            elif parameter.ndim == 1:  # gates and the biases of norms
                parameter.copy_(0.7 * noise)
            elif name.endswith(".weight"):
                parameter.copy_(noise * parameter.shape[1] ** -0.5)
            else:  # latents and embeddings
                parameter.copy_(noise)


def assert_module_right(
    module: nn.Module,
    run: Callable[[nn.Module, dict[str, Tensor]], Tensor],
    dense: Callable[[Parameters, dict[str, Tensor]], Tensor],
    inputs: dict[str, Tensor],
) -> None:
    """Output and every gradient (parameters and inputs) within the error budget of the module's dtype.

    run(module, inputs) and dense(parameters, inputs) compute the same from the same floating inputs.
    """
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}

    def run_with(p: Parameters, i: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(_Call(module, run), {f"module.{name}": p[name] for name in p}, (i,))

    actual = _results(run_with, parameters, inputs, inputs["x"].dtype)
    eager = _results(dense, parameters, inputs, inputs["x"].dtype)
    exact = _results(dense, parameters, inputs, torch.float64)
    for name, value in exact.items():
        assert_within_budget(name, actual[name], value, [eager[name]])


class _Call(nn.Module):
    def __init__(self, module: nn.Module, run: Callable) -> None:
        super().__init__()
        self.module, self.run = module, run

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.run(self.module, inputs)


def _results(function: Callable, parameters: Parameters, inputs: dict[str, Tensor], dtype: torch.dtype) -> Parameters:
    """The output, and for a few losses the gradients, stacked: one loss says little of how a scalar's gradient errs."""
    p = {name: value.to(dtype).clone().requires_grad_() for name, value in parameters.items()}
    i = {name: value.to(dtype).clone().requires_grad_() for name, value in inputs.items()}
    out = function(p, i)
    leaves = p | i
    generator = torch.Generator().manual_seed(99)
    gradients = []
    for _ in range(LOSSES):
        do = torch.randn(out.shape, generator=generator).to(inputs["x"]).to(dtype)  # the same values in every dtype
        gradients.append(torch.autograd.grad(out, list(leaves.values()), do, retain_graph=True, materialize_grads=True))
    stacked = (torch.stack(each) for each in zip(*gradients, strict=True))
    return {"out": out.detach()} | dict(zip(leaves, stacked, strict=True))


def _attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """[B, T, H·D]; zeros where nothing is visible."""
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bthd,bkhd->bhtk", q, k) / q.shape[-1] ** 0.5
    hidden = ~visible[:, None]
    p = scores.masked_fill(hidden, float("-inf")).softmax(-1).masked_fill(hidden, 0)
    return torch.einsum("bhtk,bkhd->bthd", p, v).flatten(2)


def _feed_forward(p: Parameters, prefix: str, x: Tensor, activation: str) -> Tensor:
    hidden = _norm(p, prefix + "ff_norm", x) @ p[prefix + "w_in.weight"].T
    if activation == "swiglu":
        gate, up = hidden.tensor_split(2, dim=-1)
        hidden = gate * gate.sigmoid() * up
    elif activation == "squared_relu":
        hidden = hidden.clamp(min=0) ** 2
    elif activation == "gelu":
        hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
    elif activation == "gelu_tanh":
        hidden = hidden * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (hidden + 0.044715 * hidden**3))) / 2
    elif activation == "relu":
        hidden = hidden.clamp(min=0)
    else:
        hidden = hidden * hidden.sigmoid()
    return hidden @ p[prefix + "w_out.weight"].T


def _norm(p: Parameters, name: str, x: Tensor) -> Tensor:
    """The norm of that name: LayerNorm where it has a bias, RMSNorm where it has a weight alone, else nothing.

    Written out in fp64. Elsewhere torch's, which is what eager code calls, and whose weight gradients err more.
    """
    weight, bias = p.get(name + ".weight"), p.get(name + ".bias")
    if weight is None:
        return x
    if x.dtype == torch.float64:
        if bias is not None:
            x = x - x.mean(-1, keepdim=True)
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight
        return x if bias is None else x + bias
    if bias is not None:
        return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)
    return F.rms_norm(x, x.shape[-1:], weight, 1e-5)


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)
