"""Positions on a key axis: those of CPU tensors are checked; to look at those on a GPU would be to wait for it."""

from torch import Tensor


def check_intervals(op: str, start: Tensor, end: Tensor, K: int) -> None:
    """Raises: ValueError where intervals of CPU tensors reach outside 0..K."""
    if start.device.type != "cpu" or start.numel() == 0:
        return
    if not bool(((start >= 0) & (end >= 0) & (start <= K) & (end <= K)).all()):
        raise ValueError(
            f"{op}: intervals must lie within 0..{K}, the key axis, got start in [{start.min()}, {start.max()}] and "
            f"end in [{end.min()}, {end.max()}]"
        )


def check_lengths(op: str, media_lengths: Tensor | None, S: int) -> None:
    """Raises: ValueError where lengths of CPU tensors are outside 0..S."""
    if media_lengths is None or media_lengths.device.type != "cpu" or media_lengths.numel() == 0:
        return
    if not bool(((media_lengths >= 0) & (media_lengths <= S)).all()):
        raise ValueError(
            f"{op}: media_lengths must lie within 0..{S}, the tokens of a media, got {media_lengths.min()} to "
            f"{media_lengths.max()}"
        )
