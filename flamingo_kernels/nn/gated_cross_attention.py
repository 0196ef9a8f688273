"""The gated cross-attention block between the layers of a frozen language model (arXiv 2204.14198, 3.1.2)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flamingo_kernels._checks import expect, expect_type, got
from flamingo_kernels.intervals import Intervals
from flamingo_kernels.nn._heads import split_heads, split_keys_values
from flamingo_kernels.nn._linears import add, is_plain, norm_arguments, project
from flamingo_kernels.nn._norms import NORMS, RMSNorm
from flamingo_kernels.nn.feed_forward import ACTIVATIONS, feed_forward, feed_forward_linears, mlp_arguments
from flamingo_kernels.ops.gated_block import gated_block
from flamingo_kernels.ops.gated_cross_attention import gated_cross_attention
from flamingo_kernels.ops.masked_cross_attention import masked_cross_attention
from flamingo_kernels.ops.media_kv import media_kv

_NAME = "GatedCrossAttentionBlock"


class GatedCrossAttentionBlock(nn.Module):
    """Text attends to the media it may see, then a feed-forward, each behind a tanh gate that starts closed.

        x = x + tanh(attn_gate) · to_out(attention(to_q(attn_norm(x)), k, v, intervals))
        x = x + tanh(ff_gate) · w_out(act(w_in(ff_norm(x))))            k, v = to_kv(media), with no norm before it

    Gates start at 0, so a fresh block is exactly the identity. No linear has a bias.

    Args:
        dim: C, width of the text.
        dim_visual: V, width of the media.
        heads: H, query heads.
        dim_head: D.
        kv_heads: G, key/value heads, which divides H; query head h reads key head h // (H // G). Default H.
        ff_mult: F = int(C · ff_mult), unless `ff_dim` gives F itself.
        ff_dim: F.
        activation: "squared_relu" (the paper's) | "gelu" | "gelu_tanh" | "relu" | "silu" | "swiglu".
        norm: "layer" | "rms", of both norms; eps 1e-5.
        qk_norm: RMS norm over D on queries and keys, one weight [D] each (Llama 3.2).
        gate: "scalar", gates of shape [1], or "vector", of shape [C].
        skip_mlp_without_media: a token that sees no media passes the block unchanged; without media all do. As in
            Llama 3.2, which multiplies the feed-forward of such tokens by 0 and leaves out the layer where no media
            came. Otherwise their feed-forward runs like any other's.

    Parameters: attn_norm, to_q.weight [H·D, C], to_kv.weight [2·G·D, V] (K rows first), to_out.weight [C, H·D],
    attn_gate, ff_norm, w_in.weight [F, C] ([2F, C] for swiglu, gate half first), w_out.weight [C, F], ff_gate; with
    qk_norm also q_norm.weight and k_norm.weight [D].

    Saved for backward besides inputs and parameters, for n = B·T tokens of text and m = B'·K of media:
        e_x·n·C + e·(n·H·D + 2·m·G·D + n·F') + 4·n·H + 8·n bytes
    which are the text between the two lines above; what attention gives, k and v, and what the activation takes; the
    log-sum-exp (8·n·H for fp64) and the intervals. The triton backend keeps the queries too, e·n·H·D. e and e_x are
    bytes per element of the parameters and of x, F' the rows of w_in. With kv, k and v are inputs; without media,
    e·n·F' is all. skip_mlp_without_media adds n, qk_norm the queries and what torch keeps of its norms, autocast (e is
    then of its dtype) the weights and media that it casts.

    Raises:
        ValueError: a size below 1, kv_heads that does not divide heads, an unknown activation, norm or gate.
    """

    def __init__(
        self,
        dim: int,
        dim_visual: int,
        *,
        heads: int = 8,
        dim_head: int = 64,
        kv_heads: int | None = None,
        ff_mult: float = 4,
        ff_dim: int | None = None,
        activation: str = "squared_relu",
        norm: str = "layer",
        qk_norm: bool = False,
        gate: str = "scalar",
        skip_mlp_without_media: bool = False,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        for name, size in (
            ("dim", dim),
            ("dim_visual", dim_visual),
            ("heads", heads),
            ("dim_head", dim_head),
            ("kv_heads", kv_heads),
            ("ff_dim", ff_dim),
        ):
            expect(size is None or size >= 1, _NAME, name, "at least 1", size)
        if ff_dim is None:
            ff_dim = int(dim * ff_mult)
            expect(ff_dim >= 1, _NAME, "ff_mult", "large enough for dim · ff_mult >= 1", ff_mult)
        expect(heads % kv_heads == 0, _NAME, "kv_heads", f"a divisor of heads, {heads}", kv_heads)
        expect(activation in ACTIVATIONS, _NAME, "activation", f"one of {', '.join(ACTIVATIONS)}", repr(activation))
        expect(norm in NORMS, _NAME, "norm", f"one of {', '.join(NORMS)}", repr(norm))
        expect(gate in ("scalar", "vector"), _NAME, "gate", "one of scalar, vector", repr(gate))
        self.dim, self.dim_visual = dim, dim_visual
        self.heads, self.dim_head, self.kv_heads = heads, dim_head, kv_heads
        self.activation = activation
        self.skip_mlp_without_media = skip_mlp_without_media

        gate_size = 1 if gate == "scalar" else dim
        self.attn_norm = NORMS[norm](dim)
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim_visual, 2 * kv_heads * dim_head, bias=False)
        self.q_norm = RMSNorm(dim_head) if qk_norm else None
        self.k_norm = RMSNorm(dim_head) if qk_norm else None
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)
        self.attn_gate = nn.Parameter(torch.zeros(gate_size))
        self.ff_norm = NORMS[norm](dim)
        self.w_in, self.w_out = feed_forward_linears(dim, ff_dim, activation)
        self.ff_gate = nn.Parameter(torch.zeros(gate_size))

    def reset_parameters(self) -> None:
        """Close the gates; the submodules reset their own. For a block that was built on the meta device."""
        nn.init.zeros_(self.attn_gate)
        nn.init.zeros_(self.ff_gate)

    def project_media(self, media: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the media, which depend on no text: compute them once per prompt.

        Args:
            media: [B, M, L, V], or [B, K, V] with K = M·L.

        Returns:
            k, v, each [B, K, G, D]; k with its qk_norm applied.

        Raises:
            ValueError: another rank or width.
        """
        return project_media([self], media)[0]

    def forward(
        self,
        x: Tensor,
        media: Tensor | None = None,
        intervals: Intervals | None = None,
        *,
        kv: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """The block applied to text.

        Args:
            x: [B, T, C].
            media: [B', M, L, V] or [B', K, V].
            intervals: `fk.media_intervals(...)` of the text, int32 [B, T] each; needed with media or kv, else unused.
            kv: what `project_media` gave, instead of media. B % B' == 0: row b reads the media of row b // (B // B'),
                so beams share keys.

        Returns:
            [B, T, C] in x's dtype. With neither media nor kv the attention adds nothing, and the feed-forward runs
            unless `skip_mlp_without_media`.

        Raises:
            TypeError: kv is no pair.
            ValueError: media and kv together, either without intervals, or shapes that do not fit.
        """
        expect(x.ndim == 3 and x.shape[2] == self.dim, _NAME, "x", f"of shape [B, T, {self.dim}]", list(x.shape))
        expect(media is None or kv is None, _NAME, "kv", "None where media is given", "both")
        is_pair = isinstance(kv, tuple | list) and len(kv) == 2
        expect_type(kv is None or is_pair, _NAME, "kv", "two tensors (k, v)", got(kv))
        if media is None and kv is None:
            return x if self.skip_mlp_without_media else self._feed_forward(x)
        expect(intervals is not None, _NAME, "intervals", "given where media or kv is", None)

        k, v = self.project_media(media) if kv is None else kv
        y = self._attend_and_feed_forward(x, k, v, intervals)
        if self.skip_mlp_without_media:  # attention has added nothing there
            start, end = intervals
            sees = start.clamp(min=0) < end.clamp(max=k.shape[1])  # as the op reads them on a GPU
            y = torch.where(sees.unsqueeze(-1), y, x)
        return y

    def _attend_and_feed_forward(self, x: Tensor, k: Tensor, v: Tensor, intervals: Intervals) -> Tensor:
        modules = (self.attn_norm, self.to_q, self.q_norm, self.to_out, self.attn_gate)
        attention, mlp = attention_arguments(k, v, intervals, *modules), self._feed_forward_arguments()
        if attention is None or mlp is None:
            return self._feed_forward(attend(x, k, v, intervals, *modules, self.heads))
        return gated_block(x, attention, mlp)

    def _feed_forward(self, x: Tensor) -> Tensor:
        return feed_forward(x, *self._feed_forward_parts())

    def _feed_forward_arguments(self) -> dict[str, object] | None:
        return mlp_arguments(*self._feed_forward_parts())

    def _feed_forward_parts(self) -> tuple[nn.Module, nn.Module, nn.Module, Tensor, str]:
        return self.ff_norm, self.w_in, self.w_out, self.ff_gate, self.activation


def project_media(blocks: Sequence[GatedCrossAttentionBlock], media: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What each block's own `project_media` gives, from one matmul for all that are alike, as in a model they are."""
    expect(media.ndim in (3, 4), _NAME, "media", "of shape [B, M, L, V] or [B, K, V]", list(media.shape))
    for block in blocks:
        expect(media.shape[-1] == block.dim_visual, _NAME, "media", f"of width {block.dim_visual}", list(media.shape))
    if media.ndim == 4:
        media = media.flatten(1, 2)
    heads = blocks[0].kv_heads
    plain = [block for block in blocks if is_plain(block.to_kv) and block.kv_heads == heads]
    together = iter(media_kv(media, [block.to_kv.weight for block in plain], heads))
    projected = []
    for block in blocks:
        k, v = next(together) if block in plain else split_keys_values(block.to_kv(media), block.kv_heads)
        projected.append((k if block.k_norm is None else block.k_norm(k), v))
    return projected


def attend(
    x: Tensor,
    k: Tensor,
    v: Tensor,
    intervals: Intervals,
    norm: nn.Module,
    to_q: nn.Module,
    q_norm: nn.Module | None,
    to_out: nn.Module,
    gate: Tensor,
    heads: int,
) -> Tensor:
    """x + tanh(gate)·to_out(attention(to_q(norm(x)), k, v)): x [B, T, C], k and v [B', K, G, D] -> [B, T, C]."""
    arguments = attention_arguments(k, v, intervals, norm, to_q, q_norm, to_out, gate)
    if arguments is not None:
        return gated_cross_attention(x, **arguments)
    q = queries(x, norm, to_q, q_norm, heads)
    return add(x, gate, to_out, masked_cross_attention(q, k, v, intervals).flatten(2))


def attention_arguments(
    k: Tensor,
    v: Tensor,
    intervals: Intervals,
    norm: nn.Module,
    to_q: nn.Module,
    q_norm: nn.Module | None,
    to_out: nn.Module,
    gate: Tensor,
) -> dict[str, object] | None:
    """What `gated_cross_attention` takes behind x; None where a module has to be called."""
    normed = norm_arguments(norm)
    if normed is None or q_norm is not None or not (is_plain(to_q) and is_plain(to_out)):
        return None
    weights = {"w_q": to_q.weight, "w_out": to_out.weight, "gate": gate}
    return {"k": k, "v": v, "intervals": intervals, **weights, **normed}


def queries(x: Tensor, norm: nn.Module, to_q: nn.Module, q_norm: nn.Module | None, heads: int) -> Tensor:
    """[B, T, H, D] of text x [B, T, C]."""
    q = split_heads(project(x, norm, to_q), heads)
    return q if q_norm is None else q_norm(q)
