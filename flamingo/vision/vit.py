"""A small vision transformer (arXiv 2010.11929), and position embeddings for other resolutions."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ViT(nn.Module):
    """Pre-norm layers of torch over patches, behind a class token where `cls`; called as timm's models are.

    Args:
        dim: V; the feed-forward is 4 V wide.
        resolution: side of the images in pixels, a multiple of patch.
    """

    def __init__(
        self, dim: int, layers: int, heads: int, patch: int, resolution: int, channels: int = 3, cls: bool = False
    ) -> None:
        super().__init__()
        self.num_features, self.num_prefix_tokens = dim, int(cls)
        self.patch, self.resolution = patch, resolution
        self.patches = nn.Conv2d(channels, dim, patch, stride=patch)
        self.prefix = nn.Parameter(0.02 * torch.randn(1, dim)) if cls else None  # FSDP takes no empty parameter
        self.positions = nn.Parameter(0.02 * torch.randn(int(cls) + (resolution // patch) ** 2, dim))
        layer = nn.TransformerEncoderLayer(dim, heads, 4 * dim, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, nn.LayerNorm(dim), enable_nested_tensor=False)

    def forward_features(self, images: Tensor) -> Tensor:
        """[N, channels, resolution, resolution] -> [N, cls + patches, V].

        Raises:
            ValueError: images of another size.
        """
        if images.shape[-2:] != (self.resolution, self.resolution):
            raise ValueError(f"ViT: images must be {self.resolution} pixels wide and high, got {list(images.shape)}")
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        if self.prefix is not None:
            tokens = torch.cat([self.prefix.expand(len(images), -1, -1), tokens], dim=1)
        return self.layers(tokens + self.positions)

    def set_input_size(self, img_size: int) -> None:
        """Take images of another resolution from now on."""
        resized = resize_positions(self.positions, self.resolution // self.patch, img_size // self.patch)
        self.positions = nn.Parameter(resized, requires_grad=self.positions.requires_grad)
        self.resolution = img_size


@torch.no_grad()
def resize_positions(table: Tensor, old: int, new: int) -> Tensor:
    """Embeddings [..., prefix + old², V] for a grid of new x new patches: bicubic, the prefix as it is."""
    prefix, grid = table.split([table.shape[-2] - old**2, old**2], dim=-2)
    grid = grid.reshape(-1, old, old, table.shape[-1]).permute(0, 3, 1, 2)
    grid = F.interpolate(grid.float(), size=(new, new), mode="bicubic", antialias=new < old, align_corners=False)
    grid = grid.permute(0, 2, 3, 1).reshape(*table.shape[:-2], new**2, table.shape[-1])
    return torch.cat([prefix, grid.to(table.dtype)], dim=-2)
