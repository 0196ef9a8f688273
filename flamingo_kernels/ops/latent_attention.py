"""latent_attention: the latents of a resampler attend to the tokens of their media and to themselves."""

from torch import Tensor

from flamingo_kernels import _backends
from flamingo_kernels._checks import expect
from flamingo_kernels.ops._attention import check_keys, check_positions, check_tensors, empty_forward, scale_of
from flamingo_kernels.ops._register import forbid_double_backward, register, register_autocast, register_autograd

_OP = "latent_attention"


def latent_attention(
    q: Tensor,
    k_media: Tensor,
    v_media: Tensor,
    k_latents: Tensor,
    v_latents: Tensor,
    *,
    media_lengths: Tensor | None = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of latents on two sets of keys, without putting them into one tensor.

        o[r] = Σ_j softmax_j(softmax_scale · ⟨q[r], k[j]⟩) v[j]     over all latent keys and the first media_lengths[n]
                                                                    keys of media n (arXiv 2204.14198, 3.1.1)

    Args:
        q: [N, R, H, D], fp32, bf16, fp16 (or fp64 on the cpu and reference backends); any strides.
        k_media, v_media: [N, S, G, D] of q's dtype. H % G == 0: query head h reads key head h // (H // G).
        k_latents, v_latents: [N, R', G, D] of q's dtype, commonly with R' = R. Latents that are the same for all media
            may be expanded over N.
        media_lengths: int32 (int64 is cast) [N], the tokens of each media that are visible: the first ones; the others
            may hold anything, even NaN. None: all S. Outside 0..S: ValueError on the CPU, clamped on a GPU.
        softmax_scale: default D ** -0.5.
        return_lse: also return the log-sum-exp.

    Returns:
        o [N, R, H, D] in q's dtype, contiguous; with return_lse also lse [N, H, R] in fp32 (fp64 for fp64): the natural
        log of the sum of exp over what is visible, scale included, not differentiable. Without any visible key o is
        exactly 0, lse -inf, and there is no gradient.

    Saved for backward: q, the four keys and values (views as they are), o, lse, media_lengths, that is
        e·N·(2·R·H·D + 2·(S + R')·G·D) + 4·N·H·R + 4·N bytes with e bytes per element (lse: 8·N·H·R for fp64; without
        media_lengths not the 4·N).

    Under autocast, q, keys and values are cast to the autocast dtype. Deterministic, forward and backward.

    Raises:
        TypeError: an argument that is no tensor, or of an unsupported dtype.
        ValueError: shapes, devices or head counts that do not fit, or lengths outside 0..S on the CPU.
    """
    check_tensors(_OP, q=q, k_media=k_media, v_media=v_media, k_latents=k_latents, v_latents=v_latents)
    check_keys(_OP, *q.shape[2:], k_media=k_media, v_media=v_media)
    check_keys(_OP, *q.shape[2:], k_latents=k_latents, v_latents=v_latents)
    for name, x in (("k_media", k_media), ("k_latents", k_latents)):
        expect(x.shape[0] == q.shape[0], _OP, name, "of q's number of rows", x.shape)
    expect(k_latents.shape[2] == k_media.shape[2], _OP, "k_latents", "of k_media's number of heads", k_latents.shape)
    if media_lengths is not None:
        media_lengths = check_positions(_OP, q, "media_lengths", media_lengths, q.shape[:1], "[N]")
    softmax_scale = scale_of(_OP, q, softmax_scale)
    backend = _backends.select(q.device.type, _OP, q.shape[3])
    o, lse = _forward(q, k_media, v_media, k_latents, v_latents, media_lengths, softmax_scale, backend)
    return (o, lse.detach()) if return_lse else o


def _forward_kernel(
    q: Tensor,
    k_media: Tensor,
    v_media: Tensor,
    k_latents: Tensor,
    v_latents: Tensor,
    media_lengths: Tensor | None,
    softmax_scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    kernels = _backends.kernels(backend, _OP)
    return kernels.forward(q, k_media, v_media, k_latents, v_latents, media_lengths, softmax_scale)


def _forward_fake(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return empty_forward(q)


def _backward_kernel(
    do: Tensor,
    q: Tensor,
    k_media: Tensor,
    v_media: Tensor,
    k_latents: Tensor,
    v_latents: Tensor,
    media_lengths: Tensor | None,
    o: Tensor,
    lse: Tensor,
    softmax_scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    kernels = _backends.kernels(backend, _OP)
    return kernels.backward(do, q, k_media, v_media, k_latents, v_latents, media_lengths, o, lse, softmax_scale)


def _backward_fake(
    do: Tensor, q: Tensor, k_media: Tensor, v_media: Tensor, k_latents: Tensor, v_latents: Tensor, *_: object
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (q, k_media, v_media, k_latents, v_latents))


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.softmax_scale, ctx.backend = inputs
    ctx.set_materialize_grads(False)  # for lse's, which has none, that would be a tensor of zeros
    ctx.save_for_backward(*tensors, *output)


def _backward_formula(ctx, do: Tensor | None, dlse: None):
    if do is None:
        return (None,) * 8
    gradients = _backward(do, *ctx.saved_tensors, ctx.softmax_scale, ctx.backend)
    return *gradients, None, None, None


_forward = register(
    "latent_attention(Tensor q, Tensor k_media, Tensor v_media, Tensor k_latents, Tensor v_latents, "
    "Tensor? media_lengths, float softmax_scale, str backend) -> (Tensor o, Tensor lse)",
    _forward_kernel,
    _forward_fake,
)
_backward = register(
    "latent_attention_backward(Tensor do, Tensor q, Tensor k_media, Tensor v_media, Tensor k_latents, "
    "Tensor v_latents, Tensor? media_lengths, Tensor o, Tensor lse, float softmax_scale, str backend) "
    "-> (Tensor dq, Tensor dk_media, Tensor dv_media, Tensor dk_latents, Tensor dv_latents)",
    _backward_kernel,
    _backward_fake,
)
register_autograd(_forward, _backward_formula, _setup_context)
register_autocast(_forward, ("q", "k_media", "v_media", "k_latents", "v_latents"))
forbid_double_backward(_backward)
