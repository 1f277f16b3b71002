"""A plain Pillow data pipeline, with which scripts/bench.py compares our data loader.

Pillow decodes the file once per view, torchvision transforms the PIL image step by step, and the worker converts each
view to a normalised fp32 tensor. The augmentations and their probabilities are those of util/data/views.py; random
numbers come from the global generators. Only the benchmarks use this file.
"""

from __future__ import annotations

import io
import random
from dataclasses import dataclass

import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms as T
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import to_pil_image

from util.config.pretrain import PretrainConfig
from util.data.formats import open_image
from util.data.sources import ImageSource
from util.data.views import (
    BLUR_RADIUS,
    BRIGHTNESS,
    CONTRAST,
    HUE,
    JITTER_PROBABILITY,
    REFLECT_PAD,
    RRC_RATIO,
    RRC_SCALE,
    SATURATION,
    SOLARISE_THRESHOLD,
)


@dataclass
class PilDataset(Dataset):
    """A data set that returns the views [num_views, C, H, W] float32 of a sample (epoch, index)."""

    source: ImageSource
    config: PretrainConfig

    def __post_init__(self) -> None:
        config = self.config
        self.mode = "L" if config.in_chans == 1 else "RGB"
        finish = [T.ToTensor(), T.Normalize(config.resolved_mean, config.resolved_std)]
        photometry = colours(config.in_chans) if config.photometric else []
        self.transforms = [T.Compose([*geometry(config), *finish])]
        if config.num_views == 2:
            self.transforms.append(T.Compose([*geometry(config), *photometry, *finish]))

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        _, index = key
        return torch.stack([transform(self.open(index)) for transform in self.transforms])

    def open(self, index: int) -> Image.Image:
        """Return the image of the source as a PIL image."""
        raw = self.source.read(index)
        if isinstance(raw, Tensor):
            raw = to_pil_image(raw)
        image = raw if isinstance(raw, Image.Image) else open_image(io.BytesIO(raw))
        return image.convert(self.mode)


def geometry(config: PretrainConfig) -> list:
    """Return the transforms that resize, crop and flip."""
    size, bicubic = config.resolved_input_size, InterpolationMode.BICUBIC
    if config.resolved_crop == "rrc":
        crop = [T.RandomResizedCrop(size, RRC_SCALE, RRC_RATIO, bicubic)]
    else:
        crop = [T.Resize(max(size), bicubic), T.Pad(REFLECT_PAD, padding_mode="reflect"), T.RandomCrop(size)]
    return [*crop, T.RandomHorizontalFlip(config.hflip)]


def colours(channels: int) -> list:
    """Return the transforms that jitter colours, then apply one of greyscale, solarise and blur."""
    jitter = T.ColorJitter(BRIGHTNESS, CONTRAST, SATURATION, HUE)
    branches = [T.Grayscale(channels), T.RandomSolarize(SOLARISE_THRESHOLD, p=1), blur]
    return [T.RandomApply([jitter], JITTER_PROBABILITY), T.RandomChoice(branches)]


def blur(image: Image.Image) -> Image.Image:
    """Blur the image with a Gaussian of random radius."""
    return image.filter(ImageFilter.GaussianBlur(random.uniform(*BLUR_RADIUS)))


def jpeg(image: Image.Image, size: tuple[int, int], quality: int = 90) -> bytes:
    """Return the image as a JPEG of that width and height; both are swapped for an upright image."""
    if image.height > image.width:
        size = size[::-1]
    buffer = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
