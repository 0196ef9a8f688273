"""The Perceiver resampler: any number of visual tokens per media in, R latents out (arXiv 2204.14198, 3.1.1)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flamingo_kernels._checks import expect, expect_type, got, message
from flamingo_kernels.nn._heads import split_heads, split_keys_values
from flamingo_kernels.nn._linears import add, is_plain, norm_arguments, project
from flamingo_kernels.nn._norms import LayerNorm, RMSNorm
from flamingo_kernels.nn.feed_forward import ACTIVATIONS, feed_forward, feed_forward_linears
from flamingo_kernels.ops.latent_attention import latent_attention
from flamingo_kernels.ops.media_kv import media_kv

_NAME = "PerceiverResampler"
_INIT_STD = 0.02  # of latents and embeddings


class PerceiverResampler(nn.Module):
    """Learned latents attend to the tokens of one media and to themselves, `depth` times.

        latents = latents + to_out(attention(to_q(z), to_kv([z, media_norm(x)])))         z = latent_norm(latents)
        latents = latents + w_out(act(w_in(ff_norm(latents))))                            output: norm(latents)

    Every frame has a learned embedding, added to all its patches. Of f frames the first f embeddings are used; where f
    exceeds `max_frames` they are interpolated linearly with aligned endpoints: frame i of f stands at
    i · (max_frames - 1) / (f - 1) (the paper trains on 8 frames and runs on 30). No linear has a bias.

    Args:
        dim: V, width of the media, of the latents and of the output.
        depth: layers.
        heads: H.
        dim_head: D.
        num_latents: R.
        max_frames: number of frame embeddings; None: no embeddings.
        max_media: number of embeddings for a media's place in its row; None: no embeddings.
        ff_mult: F = int(V · ff_mult).
        activation: "squared_relu" (the paper's) | "gelu" | "gelu_tanh" | "relu" | "silu" | "swiglu".
        qk_norm: RMS norm over D on queries and keys, one weight [D] each per layer.

    Parameters: latents [R, V], frame_embeddings [max_frames, V], media_embeddings [max_media, V], norm, and in each
    layers.i: media_norm, latent_norm, to_q.weight [H·D, V], to_kv.weight [2·H·D, V] (K rows first), to_out.weight
    [V, H·D], ff_norm, w_in.weight [F, V] ([2F, V] for swiglu, gate half first), w_out.weight [V, F]; with qk_norm also
    q_norm.weight and k_norm.weight [D].

    Saved for backward besides inputs and parameters, for N = B·M media of S = frames·patches tokens, by each layer:
        e·(2·N·S·H·D + 3·n·H·D + N·R·(H·D + F')) + 2·e_x·N·R·V + 4·N·R·H bytes
    which are k and v of the media; q, k and v of the latents, n = N·R of them and in the first layer R; what attention
    gives and what the activation takes; the latents after each of the two lines above; the log-sum-exp (8·N·R·H for
    fp64). e and e_x are bytes per element of the parameters and of the latents, F' the rows of w_in. The last norm
    keeps two numbers per latent. Embeddings and frame_counts add the media as they change them, e·N·S·V, and token_mask
    that twice, with up to 9 bytes per token and 4 per media. qk_norm adds what torch keeps of its norms, autocast (e is
    then of its dtype) the weights and media that it casts.

    Raises:
        ValueError: a size below 1 (depth: below 0) or an unknown activation.
    """

    def __init__(
        self,
        dim: int,
        *,
        depth: int = 6,
        heads: int = 8,
        dim_head: int = 64,
        num_latents: int = 64,
        max_frames: int | None = None,
        max_media: int | None = None,
        ff_mult: float = 4,
        activation: str = "squared_relu",
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        for name, size in (
            ("dim", dim),
            ("heads", heads),
            ("dim_head", dim_head),
            ("num_latents", num_latents),
            ("max_frames", max_frames),
            ("max_media", max_media),
        ):
            expect(size is None or size >= 1, _NAME, name, "at least 1", size)
        expect(depth >= 0, _NAME, "depth", "at least 0", depth)
        expect(int(dim * ff_mult) >= 1, _NAME, "ff_mult", "large enough for dim · ff_mult >= 1", ff_mult)
        expect(activation in ACTIVATIONS, _NAME, "activation", f"one of {', '.join(ACTIVATIONS)}", repr(activation))
        self.dim, self.heads = dim, heads
        self.latents = nn.Parameter(torch.empty(num_latents, dim))
        self.frame_embeddings = None if max_frames is None else nn.Parameter(torch.empty(max_frames, dim))
        self.media_embeddings = None if max_media is None else nn.Parameter(torch.empty(max_media, dim))
        self.layers = nn.ModuleList(
            _Layer(dim, heads, dim_head, int(dim * ff_mult), activation, qk_norm) for _ in range(depth)
        )
        self.norm = LayerNorm(dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw latents and embeddings; the submodules reset their own. For a module built on the meta device."""
        for parameter in (self.latents, self.frame_embeddings, self.media_embeddings):
            if parameter is not None:
                nn.init.normal_(parameter, std=_INIT_STD)

    def forward(self, x: Tensor, *, frame_counts: Tensor | None = None, token_mask: Tensor | None = None) -> Tensor:
        """The latents of each media.

        Args:
            x: [B, M, frames, patches, V]; an image has one frame.
            frame_counts: int [B, M], how many of a media's frames are real; the others may hold anything. Its frame
                embeddings are those of a media with that many frames, so padding changes nothing. Outside 0..frames:
                ValueError on the CPU, clamped on a GPU (no sync) and where torch.compile traces.
            token_mask: bool [B, M, frames, patches], True where a token is valid; the others may hold anything. It
                hides tokens and renumbers no frames.

        Returns:
            [B, M, R, V]. A media without a valid token gives what its latents make of themselves.

        Raises:
            TypeError: frame_counts is not of an integer dtype, or token_mask not bool.
            ValueError: a shape or device that does not fit, more media than max_media, or counts out of range.
        """
        self._check(x, frame_counts, token_mask)
        rows, num_media, frames, patches, _ = x.shape
        if frame_counts is not None:
            frame_counts = frame_counts.long().clamp(0, frames)
        if self.frame_embeddings is not None:
            x = x + self._frame_embeddings(frames, frame_counts).unsqueeze(-2)
        if self.media_embeddings is not None:
            x = x + self.media_embeddings[:num_media, None, None]

        x = x.flatten(0, 1).flatten(1, 2)  # [N, S, V]
        valid = _valid_tokens(frames, patches, frame_counts, token_mask)
        media_lengths = None
        if valid is not None:
            x = x.masked_fill(~valid.unsqueeze(-1), 0)  # also keeps what padding holds out of the weights' gradients
            media_lengths = valid.sum(1, dtype=torch.int32)
            if token_mask is not None:
                x = _valid_first(x, valid)

        latents = self.latents.unsqueeze(0)  # one set, until a layer has mixed it with the media
        for layer, (k, v) in zip(self.layers, media_keys_values(self.layers, x), strict=True):
            latents = layer(latents, k, v, media_lengths)
        latents = latents.expand(x.shape[0], -1, -1)
        return self.norm(latents).unflatten(0, (rows, num_media))

    def _frame_embeddings(self, frames: int, frame_counts: Tensor | None) -> Tensor:
        """[frames, V], or [B, M, frames, V] where each media has its own number of frames."""
        table = self.frame_embeddings
        last = table.shape[0] - 1
        frame = torch.arange(frames, device=table.device)
        count = torch.full_like(frame, frames) if frame_counts is None else frame_counts.unsqueeze(-1)
        # frame · numerator / denominator, in integers, so that both ends and whole steps are exact
        more = count > table.shape[0]
        denominator = torch.where(more, count - 1, 1)
        place = torch.where(more, frame * last, frame)
        lower = (place // denominator).clamp(max=last)  # frames past the count are padding
        upper = (lower + 1).clamp(max=last)
        wide = torch.promote_types(table.dtype, torch.float32)
        weight = ((place % denominator).to(wide) / denominator).to(table.dtype).unsqueeze(-1)
        # embedding, and not indexing, whose backward adds in no fixed order
        return torch.lerp(F.embedding(lower, table), F.embedding(upper, table), weight)

    def _check(self, x: Tensor, frame_counts: Tensor | None, token_mask: Tensor | None) -> None:
        if x.ndim != 5 or x.shape[4] != self.dim:
            raise ValueError(message(_NAME, "x", f"of shape [B, M, frames, patches, {self.dim}]", list(x.shape)))
        if self.media_embeddings is not None and x.shape[1] > (most := self.media_embeddings.shape[0]):
            raise ValueError(message(_NAME, "x", f"of at most max_media = {most} media per row", list(x.shape)))
        if frame_counts is not None:
            _check_frame_counts(frame_counts, x)
        if token_mask is not None:
            expect_type(isinstance(token_mask, Tensor), _NAME, "token_mask", "a bool tensor", got(token_mask))
            expect_type(token_mask.dtype == torch.bool, _NAME, "token_mask", "of dtype bool", token_mask.dtype)
            expect(
                token_mask.shape == x.shape[:4],
                _NAME,
                "token_mask",
                "of shape [B, M, frames, patches], as x",
                list(token_mask.shape),
            )
            expect(token_mask.device == x.device, _NAME, "token_mask", "on x's device", token_mask.device)


class _Layer(nn.Module):
    """Latents attend to media and latents, then a feed-forward; both residual."""

    def __init__(self, dim: int, heads: int, dim_head: int, ff_dim: int, activation: str, qk_norm: bool) -> None:
        super().__init__()
        self.heads, self.activation = heads, activation
        self.media_norm = LayerNorm(dim)
        self.latent_norm = LayerNorm(dim)
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim, 2 * heads * dim_head, bias=False)
        self.q_norm = RMSNorm(dim_head) if qk_norm else None
        self.k_norm = RMSNorm(dim_head) if qk_norm else None
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)
        self.ff_norm = LayerNorm(dim)
        self.w_in, self.w_out = feed_forward_linears(dim, ff_dim, activation)

    def forward(self, latents: Tensor, k_media: Tensor, v_media: Tensor, media_lengths: Tensor | None) -> Tensor:
        return resample(self, latents, k_media, v_media, media_lengths)


@dataclass(frozen=True, eq=False)
class LayerParts:
    """What `resample` and `media_keys_values` read of a layer, where it is no `_Layer`; to_kv may be K and V apart."""

    heads: int
    activation: str
    media_norm: nn.Module
    latent_norm: nn.Module
    to_q: nn.Module
    to_kv: nn.Module | tuple[nn.Module, nn.Module]
    q_norm: nn.Module | None
    k_norm: nn.Module | None
    to_out: nn.Module
    ff_norm: nn.Module
    w_in: nn.Module
    w_out: nn.Module


def resample(
    layer: _Layer | LayerParts, latents: Tensor, k_media: Tensor, v_media: Tensor, media_lengths: Tensor | None = None
) -> Tensor:
    """latents [N or 1, R, V], of 1 where they are the same for all media; media_lengths int [N] -> [N, R, V]."""
    q = split_heads(project(latents, layer.latent_norm, layer.to_q), layer.heads)
    k, v = _keys_values(layer, latents, layer.latent_norm)
    if layer.q_norm is not None:
        q, k, k_media = layer.q_norm(q), layer.k_norm(k), layer.k_norm(k_media)
    if latents.shape[0] != k_media.shape[0]:
        q, k, v, latents = (x.expand(k_media.shape[0], *x.shape[1:]) for x in (q, k, v, latents))
    attended = latent_attention(q, k_media, v_media, k, v, media_lengths=media_lengths)
    latents = add(latents, None, layer.to_out, attended.flatten(2))
    return feed_forward(latents, layer.ff_norm, layer.w_in, layer.w_out, None, layer.activation)


def media_keys_values(layers: Sequence[_Layer | LayerParts], x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """k and v [N, S, H, D] of each layer from media x [N, S, V], of all layers that are alike in one matmul."""
    plain = [layer for layer in layers if _has_plain_media(layer)]
    eps = plain[0].media_norm.eps if plain else None
    plain = [layer for layer in plain if layer.media_norm.eps == eps]
    norms = [(layer.media_norm.weight, layer.media_norm.bias) for layer in plain]
    weights = [layer.to_kv.weight for layer in plain]
    together = iter(media_kv(x, weights, plain[0].heads, norms=norms, eps=eps) if plain else ())
    return [next(together) if layer in plain else _keys_values(layer, x, layer.media_norm) for layer in layers]


def _has_plain_media(layer: _Layer | LayerParts) -> bool:
    """Whether `media_kv` may take its place."""
    if isinstance(layer.to_kv, tuple) or not is_plain(layer.to_kv):
        return False
    normed = norm_arguments(layer.media_norm)
    return normed is not None and normed["norm"] == "layer"


def _keys_values(layer: _Layer | LayerParts, x: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """k and v [N, tokens, H, D] of x [N, tokens, V]."""
    if isinstance(layer.to_kv, tuple):
        k, v = (split_heads(project(x, norm, to), layer.heads) for to in layer.to_kv)
        return k, v
    return split_keys_values(project(x, norm, layer.to_kv), layer.heads)


def _valid_tokens(frames: int, patches: int, frame_counts: Tensor | None, token_mask: Tensor | None) -> Tensor | None:
    """bool [N, S], or None where all tokens are valid."""
    valid = token_mask
    if frame_counts is not None:
        frame = torch.arange(frames, device=frame_counts.device)
        counted = (frame < frame_counts.unsqueeze(-1)).unsqueeze(-1).expand(-1, -1, -1, patches)
        valid = counted if valid is None else counted & valid
    return None if valid is None else valid.flatten(0, 1).flatten(1, 2)


def _valid_first(x: Tensor, valid: Tensor) -> Tensor:
    """The tokens [N, S, V] with the valid ones in front, in their order; attention does not ask for the order."""
    order = torch.argsort(valid.to(torch.uint8), dim=1, descending=True, stable=True)
    return x.gather(1, order.unsqueeze(-1).expand_as(x))


def _check_frame_counts(frame_counts: Tensor, x: Tensor) -> None:
    argument = "frame_counts"
    expect_type(isinstance(frame_counts, Tensor), _NAME, argument, "an integer tensor", got(frame_counts))
    is_integer = not (frame_counts.is_floating_point() or frame_counts.is_complex() or frame_counts.dtype == torch.bool)
    expect_type(is_integer, _NAME, argument, "of an integer dtype", frame_counts.dtype)
    expect(frame_counts.shape == x.shape[:2], _NAME, argument, "of shape [B, M], as x", list(frame_counts.shape))
    expect(frame_counts.device == x.device, _NAME, argument, "on x's device", frame_counts.device)
    if x.device.type == "cpu" and frame_counts.numel() and not torch.compiler.is_compiling():
        least, most = int(frame_counts.min()), int(frame_counts.max())
        expect(least >= 0 and most <= x.shape[2], _NAME, argument, f"within 0..{x.shape[2]}", f"{least}..{most}")
