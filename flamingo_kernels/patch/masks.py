"""What the tokens of a foreign model see, as intervals.

Foreign code says it as the number of the media that a token belongs to (OpenFlamingo and its kin), or as a dense
additive mask (transformers). Their softmax gives a token whose keys are all hidden the same weight on every key, unless
they zero it themselves; such tokens are told apart here, since no interval says that.
"""

import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from flamingo_kernels.intervals import Intervals
from flamingo_kernels.patch.fused import NotFused


class Seen(NamedTuple):
    """intervals: of each token. even: bool [B, T], tokens that read the mean of all values; None: no token does."""

    intervals: Intervals
    even: Tensor | None


class DenseSeen(NamedTuple):
    """seen: as above. mlp: bool [B, T], tokens that have a feed-forward; None: all have one."""

    seen: Seen
    mlp: Tensor | None


def everything(rows: int, tokens: int, keys: int, device: torch.device) -> Seen:
    """Every token sees every key."""
    start = torch.zeros(rows, tokens, dtype=torch.int32, device=device)
    return Seen(Intervals(start, torch.full_like(start, keys)), None)


def of_media(text_time: Tensor, num_media: int, tokens_per_media: int, only_latest: bool) -> Seen:
    """From the number [B, T] of the media that each token comes after, 0 before the first.

    only_latest: it sees that one alone, and nothing before the first. Otherwise all up to it.
    """
    if num_media * tokens_per_media == 0:
        raise NotFused("there are no media")
    if only_latest:
        sees, even = (text_time >= 1) & (text_time <= num_media), text_time > num_media
        first, last = text_time - 1, text_time
    else:
        sees, even = text_time >= 1, text_time < 1
        first, last = torch.zeros_like(text_time), text_time.clamp(max=num_media)
    start = torch.where(sees, first * tokens_per_media, 0).int()
    end = torch.where(sees, last * tokens_per_media, 0).int()
    return Seen(Intervals(start, end), even if _is_blind(even) or bool(even.any()) else None)


def of_dense(mask: Tensor, shape: tuple[int, int, int], zeroed: Tensor | None, mlp: Tensor | None) -> DenseSeen:
    """From a mask [B, 1, T, K] that is added to the scores: 0 where a key is visible, else the lowest value or -inf.

    shape: (B, T, K). zeroed: bool [B, T], tokens whose attention the caller sets to 0. mlp: [B, T], what their
    feed-forward is multiplied with.

    Raises:
        NotFused: it hides keys between visible ones, or does more than to hide keys. While torch.compile traces or a
            CUDA graph is recorded, where values are not known, running what came of that raises RuntimeError instead.
    """
    rows, tokens, keys = shape
    if keys == 0:
        raise NotFused("there are no media")
    if mask.shape != (rows, 1, tokens, keys):
        raise NotFused(f"a mask of shape {list(mask.shape)}, where {[rows, 1, tokens, keys]} is supported")
    if not mask.is_floating_point():
        raise NotFused(f"a mask of {mask.dtype}")
    mask = mask.squeeze(1)
    visible = mask == 0
    count = visible.sum(-1, dtype=torch.int32)
    start = visible.to(torch.uint8).argmax(-1).int()  # the first visible one
    place = torch.arange(keys, device=mask.device, dtype=torch.int32)
    run = (place >= start.unsqueeze(-1)) & (place < (start + count).unsqueeze(-1))
    even = count == 0
    if zeroed is not None:
        even, count = even & ~zeroed, torch.where(zeroed, 0, count)
    needed = {
        "a mask that hides keys between visible ones": (run == visible).all(),
        "a mask with values other than 0 and the lowest": (visible | (mask <= torch.finfo(mask.dtype).min)).all(),
        "a mask with minus infinity in a row without a visible key": (~even | ~mask.isinf().any(-1)).all(),
    }
    if mlp is not None:
        needed["a mask of rows with values other than 0 and 1"] = ((mlp == 0) | (mlp == 1)).all()
        mlp = mlp == 1
    seen = Seen(Intervals(start, start + count), even)
    if _is_blind(mask):
        for reason, holds in needed.items():
            torch._assert_async(holds, f"flamingo_kernels.patch: {reason}, where no original forward can be run")
        return DenseSeen(seen, mlp)
    none = [even.any(), torch.zeros_like(even[0, 0]) if mlp is None else ~mlp.all()]
    *holding, any_even, any_without_mlp = torch.stack([*needed.values(), *none]).tolist()  # one sync
    for reason, holds in zip(needed, holding, strict=True):
        if not holds:
            raise NotFused(reason)
    return DenseSeen(seen if any_even else Seen(seen.intervals, None), mlp if any_without_mlp else None)


_last: tuple | None = None  # what was asked for last, weakly held, and the answer


def remembered(tensors: tuple[Tensor | None, ...], options: tuple, compute: Callable[[], object]) -> object:
    """compute(), or what it gave last time if these very tensors, unchanged since, were asked about.

    All layers of a model are asked about the same tensors, so looking at them, and waiting for that on a GPU, is needed
    once. A refusal (NotFused) is remembered, too.
    """
    global _last
    given = [t for t in tensors if t is not None]
    blind = any(_is_blind(t) for t in given)
    if not given or blind or torch.is_inference_mode_enabled() or any(t.is_inference() for t in given):
        return compute()
    key = (options, [t is None for t in tensors], [t._version for t in given])
    if _last is not None and _last[0] == key and all(r() is t for r, t in zip(_last[1], given, strict=True)):
        answer = _last[2]
    else:
        try:
            answer = compute()
        except NotFused as reason:
            answer = NotFused(*reason.args)  # without the traceback, which holds tensors
        _last = (key, [weakref.ref(t) for t in given], answer)
    if isinstance(answer, NotFused):
        raise NotFused(*answer.args)
    return answer


def _is_blind(tensor: Tensor) -> bool:
    """Whether no decision can hang on the values of tensors."""
    if torch.compiler.is_compiling():
        return True
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
