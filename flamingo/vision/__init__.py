"""Vision encoders: images [..., channels, height, width] to tokens [..., S, V]."""

from flamingo.vision.adapters import HuggingFaceVision, OpenClipVision, TimmVision, VisionEncoder, build_vision
from flamingo.vision.digit_encoder import DigitEncoder, shift, train_encoder
from flamingo.vision.vit import ViT

__all__ = [
    "DigitEncoder",
    "HuggingFaceVision",
    "OpenClipVision",
    "TimmVision",
    "ViT",
    "VisionEncoder",
    "build_vision",
    "shift",
    "train_encoder",
]
