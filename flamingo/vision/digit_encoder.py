"""The vision encoder of the demonstration: a small convolutional net, trained on labels and then frozen."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flamingo.digits import Digits
from flamingo.language import freeze


class DigitEncoder(nn.Module):
    """8x8 images to a 4x4 grid of features, standardised over the images it was trained on.

    dim: V, the width of a feature.
    """

    def __init__(self, dim: int = 128, classes: int = 10) -> None:
        super().__init__()
        self.dim = dim
        self.body = nn.Sequential(
            *_convolution(1, dim // 2),
            *_convolution(dim // 2, dim // 2),
            *_convolution(dim // 2, dim, stride=2),
            nn.Conv2d(dim, dim, 3, padding=1),
        )
        self.head = nn.Linear(dim, classes)
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))

    def forward(self, images: Tensor) -> Tensor:
        """[..., 1, 8, 8] -> [..., 16, V], each of the V features with mean 0 and variance 1 over the training set."""
        return (self._grid(images) - self.mean) / self.std

    def logits(self, images: Tensor) -> Tensor:
        """Class scores [N, classes] of images [N, 1, 8, 8], for training the encoder alone."""
        return self.head(F.relu(self._grid(images)).mean(1))

    def _grid(self, images: Tensor) -> Tensor:
        grid = self.body(images.flatten(0, -4))  # [N, V, 4, 4]
        return grid.flatten(2).transpose(1, 2).reshape(*images.shape[:-3], 16, self.dim)


def _convolution(inputs: int, outputs: int, stride: int = 1) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()


def train_encoder(digits: Digits, steps: int = 300, batch: int = 128, seed: int = 0) -> DigitEncoder:
    """A frozen encoder trained on labels, with images shifted by up to one pixel; lr follows one cosine."""
    torch.manual_seed(seed)
    encoder = DigitEncoder(classes=int(digits.labels.max()) + 1).train()
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        pick = torch.randint(len(digits.images), (batch,))
        loss = F.cross_entropy(encoder.logits(shift(digits.images[pick])), digits.labels[pick])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    freeze(encoder)
    with torch.no_grad():
        features = encoder(digits.images).flatten(0, 1)
    encoder.mean, encoder.std = features.mean(0), features.std(0) + 1e-6
    return encoder


def shift(images: Tensor) -> Tensor:
    """Images [N, 1, 8, 8], each moved at random by up to one pixel down or up and right or left."""
    windows = F.pad(images, (1, 1, 1, 1)).unfold(2, 8, 1).unfold(3, 8, 1)  # [N, 1, 3, 3, 8, 8]
    down, right = torch.randint(3, (2, len(images)))
    return windows[torch.arange(len(images)), :, down, right]
