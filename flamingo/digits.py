"""The demonstrations' data: scikit-learn's 1,797 handwritten digits (8x8 pixels, from UCI), and captions for them."""

from typing import NamedTuple

import torch
from torch import Tensor

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTIONS = tuple(f"a handwritten {word}" for word in WORDS)


class Digits(NamedTuple):
    """images: float32 [N, 1, 8, 8] in 0..1; labels: int64 [N], the digit."""

    images: Tensor
    labels: Tensor


def load_digits(seed: int, held_out: float = 0.3) -> tuple[Digits, Digits]:
    """Training and held-out digits, split by image at random."""
    import sklearn.datasets

    raw = sklearn.datasets.load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 16  # 17 grey levels
    labels = torch.tensor(raw.target, dtype=torch.int64)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    kept = len(images) - round(held_out * len(images))
    return tuple(Digits(images[part], labels[part]) for part in (order[:kept], order[kept:]))
