"""media_kv: the keys and values of media for all layers that attend to them, from one matmul."""

from collections.abc import Sequence

from torch import Tensor

from flamingo_kernels import _backends
from flamingo_kernels._checks import expect, expect_type, got, message
from flamingo_kernels.ops._linear_args import (
    check_eps,
    check_floating,
    check_stream,
    check_weight,
    gradients_fake,
    only_wanted,
)
from flamingo_kernels.ops._register import (
    forbid_double_backward,
    is_left_alone,
    register,
    register_autocast,
    register_autograd,
)

_OP = "media_kv"
_APART = ("cpu",)  # where the op gives all keys and values as tensors of their own, and takes their gradients so


def media_kv(
    media: Tensor,
    weights: Sequence[Tensor],
    heads: int,
    *,
    norms: Sequence[tuple[Tensor, Tensor]] | None = None,
    eps: float = 1e-5,
) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of every layer. All layers read the same media, so they are normalised and projected once.

        [k_l, v_l] = z_l W_lᵀ,   z_l = (media - mean) / sqrt(var + eps) · norm_weight_l + norm_bias_l

    or, without norms, z_l = media.

    Args:
        media: [..., V]; any strides. Of the weights' dtype, or fp32 beside bf16 or fp16 weights.
        weights: for each layer W_l [2·G·D, V], K rows first; fp32, bf16, fp16 (or fp64 on the cpu and reference
            backends), of one dtype. D may differ between layers.
        heads: G.
        norms: for each layer (norm_weight [V], norm_bias [V]) of a LayerNorm, of a dtype that media may have; None: no
            norm.
        eps: of the norms, added to the variance.

    Returns:
        For each layer (k, v), each [..., G, D] in the weights' dtype: contiguous on the cpu backend, on others views of
        one contiguous tensor [..., Σ 2·G·D].

    Saved for backward: media, the weights and the norms' parameters, that is, for n rows,
        e_m·n·V + Σ_l (e_w·2·G·D·V + 2·e_n·V) bytes with e bytes per element of media, weights and norms.

    Under autocast, media and weights are cast to the autocast dtype; the norms' parameters stay as they are. Statistics
    and sums are in fp32 (fp64 for fp64). Deterministic, forward and backward. The gradients of all keys and values are
    read where they lie on the cpu backend, on others put together once; those that are missing count as zero.

    Raises:
        TypeError: an argument that is no tensor or sequence of tensors, or of an unsupported dtype.
        ValueError: shapes or devices that do not fit, a number of rows of a weight that 2·heads does not divide, norms
            for another number of layers, eps below 0.
    """
    norm_weights, norm_biases = _checked(media, weights, heads, norms, eps)
    if not weights:
        return []
    backend = _backends.select(media.device.type, _OP)
    parts = _forward(media, list(weights), norm_weights, norm_biases, float(eps), backend)
    if backend not in _APART:
        parts = parts[0].split(_widths(weights), -1)  # of one split, whose backward concatenates the gradients, once
    parts = [x.unflatten(-1, (heads, x.shape[-1] // heads)) for x in parts]
    return list(zip(parts[::2], parts[1::2], strict=True))


def _widths(weights: Sequence[Tensor]) -> list[int]:
    """Of keys and values of each layer."""
    return [weight.shape[0] // 2 for weight in weights for _ in "kv"]


def _out_widths(weights: Sequence[Tensor], backend: str) -> list[int]:
    """Of the tensors that the op returns."""
    widths = _widths(weights)
    return widths if backend in _APART else [sum(widths)]


def _checked(
    media: Tensor,
    weights: Sequence[Tensor],
    heads: int,
    norms: Sequence[tuple[Tensor, Tensor]] | None,
    eps: float,
) -> tuple[list[Tensor], list[Tensor]]:
    """Check everything that shapes, dtypes and devices tell; returns the norms' weights and biases."""
    check_floating(_OP, "media", media)
    expect(media.ndim >= 1, _OP, "media", "of shape [..., V]", media.shape)
    if not isinstance(weights, list | tuple):
        raise TypeError(message(_OP, "weights", "a list of tensors, one per layer", got(weights)))
    if not isinstance(heads, int) or isinstance(heads, bool):
        raise TypeError(message(_OP, "heads", "an int", got(heads)))
    expect(heads >= 1, _OP, "heads", "at least 1", heads)
    for i, weight in enumerate(weights):
        name = f"weights[{i}]"
        compute = check_weight(_OP, name, weight, media, media.shape[-1], "media")
        if weight.shape[0] % (2 * heads):
            raise ValueError(message(_OP, name, f"of rows that 2·heads = {2 * heads} divides", weight.shape[0]))
        same = weight.dtype == weights[0].dtype or not (is_left_alone(weight) or is_left_alone(weights[0]))
        expect_type(same, _OP, name, "of the other weights' dtype", weight.dtype)
        if is_left_alone(media) or is_left_alone(weight):
            check_stream(_OP, "media", media, compute)
    check_eps(_OP, eps)
    if norms is None:
        return [], []
    if not isinstance(norms, list | tuple):
        raise TypeError(message(_OP, "norms", "a list of (weight, bias), one per layer", got(norms)))
    if len(norms) != len(weights):
        raise ValueError(message(_OP, "norms", f"of {len(weights)} layers, as weights", len(norms)))
    for i, norm in enumerate(norms):
        if not isinstance(norm, list | tuple) or len(norm) != 2:
            raise TypeError(message(_OP, f"norms[{i}]", "a pair of tensors (weight, bias)", got(norm)))
        for name, x in zip((f"norms[{i}].weight", f"norms[{i}].bias"), norm, strict=True):
            check_stream(_OP, name, x, compute)
            expect(x.ndim == 1 and x.shape[0] == media.shape[-1], _OP, name, "of shape [V]", x.shape)
            expect(x.device == media.device, _OP, name, "on media's device", x.device)
    return [weight for weight, _ in norms], [bias for _, bias in norms]


def _forward_kernel(
    media: Tensor,
    weights: list[Tensor],
    norm_weights: list[Tensor],
    norm_biases: list[Tensor],
    eps: float,
    backend: str,
) -> list[Tensor]:
    out = _backends.kernels(backend, _OP).forward(media, weights, norm_weights, norm_biases, eps)
    return out if backend in _APART else [out]


def _forward_fake(media: Tensor, weights: list[Tensor], *others: object) -> list[Tensor]:
    return [weights[0].new_empty((*media.shape[:-1], width)) for width in _out_widths(weights, others[-1])]


def _backward_kernel(
    dout: list[Tensor],
    media: Tensor,
    weights: list[Tensor],
    norm_weights: list[Tensor],
    norm_biases: list[Tensor],
    eps: float,
    wanted: list[bool],
    backend: str,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    kernels = _backends.kernels(backend, _OP)
    joined = dout if backend in _APART else dout[0]
    return kernels.backward(joined, media, weights, norm_weights, norm_biases, eps, wanted)


def _backward_fake(
    dout: list[Tensor],
    media: Tensor,
    weights: list[Tensor],
    norm_weights: list[Tensor],
    norm_biases: list[Tensor],
    eps: float,
    wanted: list[bool],
    backend: str,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    dmedia, *lists = gradients_fake((media, *weights, *norm_weights, *norm_biases), wanted)
    return dmedia, *_by_argument(lists, len(weights), len(norm_weights))


def _by_argument(values: Sequence, layers: int, norms: int) -> tuple[list, list, list]:
    """What stands in one row, as weights, norm weights and norm biases."""
    return list(values[:layers]), list(values[layers : layers + norms]), list(values[layers + norms :])


def _setup_context(ctx, inputs, output) -> None:
    media, weights, norm_weights, norm_biases, ctx.eps, ctx.backend = inputs
    ctx.layers, ctx.norms = len(weights), len(norm_weights)
    ctx.set_materialize_grads(False)  # for keys and values that nobody reads, those would be large tensors of zeros
    ctx.save_for_backward(media, *weights, *norm_weights, *norm_biases)


def _backward_formula(ctx, dout: list[Tensor | None]):
    media, *saved = ctx.saved_tensors
    if all(d is None for d in dout):
        return None, *([None] * n for n in (ctx.layers, ctx.norms, ctx.norms)), None, None
    if any(d is None for d in dout):
        nothing, widths = saved[0].new_zeros(()), _out_widths(saved[: ctx.layers], ctx.backend)
        zeros = [nothing.expand(*media.shape[:-1], width) for width in widths]
        dout = [zero if d is None else d for d, zero in zip(dout, zeros, strict=True)]
    of_media, *of_lists = ctx.needs_input_grad[:4]
    wanted = [of_media, *(each for one in of_lists for each in one)]
    lists = _by_argument(saved, ctx.layers, ctx.norms)
    dmedia, *gradients = _backward(dout, media, *lists, ctx.eps, wanted, ctx.backend)
    found = (list(only_wanted(values, flags)) for values, flags in zip(gradients, of_lists, strict=True))
    return *only_wanted([dmedia], [of_media]), *found, None, None


_forward = register(
    "media_kv(Tensor media, Tensor[] weights, Tensor[] norm_weights, Tensor[] norm_biases, float eps, str backend) "
    "-> Tensor[]",
    _forward_kernel,
    _forward_fake,
)
_backward = register(
    "media_kv_backward(Tensor[] dout, Tensor media, Tensor[] weights, Tensor[] norm_weights, Tensor[] norm_biases, "
    "float eps, bool[] wanted, str backend) "
    "-> (Tensor dmedia, Tensor[] dweights, Tensor[] dnorm_weights, Tensor[] dnorm_biases)",
    _backward_kernel,
    _backward_fake,
)
register_autograd(_forward, _backward_formula, _setup_context)
register_autocast(_forward, ("media", "weights"))
forbid_double_backward(_backward)
