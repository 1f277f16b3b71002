"""Augmentation of an image together with its mask, and what an evaluation makes of an image.

As in util/data/views.py every random number comes from the sample's own generator, and sizes are (height, width).
Letters: C channels, h x w pixels of the original, H x W of the crop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.tv_tensors import Image, Mask

from util.data.masks import IGNORED
from util.data.views import Size, shift_hue

MOST_CROPS = 10  # drawn for one sample
LONGEST = 4  # a longer side is at most so many times the crop's: the field's (2048, 512)
# SSD's photometric distortion, as the field trains segmentation with it
DISTORTED = 0.5  # probability of each of the four
BRIGHTNESS = 32.0  # levels of 255, up or down
CONTRAST = SATURATION = (0.5, 1.5)  # factors
HUE = 0.1  # of the circle, to either side


def scaled_size(image_size: Size, size: Size, factor: float = 1.0) -> Size:
    """Return an image's size once it covers `size` (a square: its shorter side has that length), times `factor`.

    Images longer than `LONGEST` crops become smaller than that.
    """
    (h, w), (H, W) = image_size, size
    scale = factor * min(max(H / h, W / w), LONGEST * max(size) / max(h, w))
    return max(1, round(h * scale)), max(1, round(w * scale))


def resized_image(image: Tensor, size: Size) -> Tensor:
    """Resize an image [C, h, w] uint8, bilinear with antialiasing."""
    return TF.resize_image(image, list(size), interpolation=InterpolationMode.BILINEAR, antialias=True)


def resized_mask(mask: Tensor, size: Size) -> Tensor:
    """Take the class at each new pixel's centre, [h, w]; torchvision's own for masks, NEAREST, is half a pixel off."""
    return TF.resize_image(mask.unsqueeze(0), list(size), interpolation=InterpolationMode.NEAREST_EXACT)[0]


def padded(image: Tensor, size: Size, fill: tuple[int, ...]) -> Tensor:
    """Add a border of `fill` (a number per channel) to an image [C, h, w] below and to the right, up to `size`."""
    bottom, right = (max(0, want - have) for want, have in zip(size, image.shape[-2:], strict=True))
    return TF.pad(image, [0, 0, right, bottom], fill=list(fill)) if bottom or right else image


# --------------------------------------------------------------------------------------------------------
# Colours
# --------------------------------------------------------------------------------------------------------


class Distortion(NamedTuple):
    """The changes to the colours of an image; a step that is left out has its neutral number."""

    brightness: float  # added
    contrast: float  # factor
    contrast_last: bool
    saturation: float  # factor
    hue: float  # of the circle


def draw_distortion(rng: np.random.Generator) -> Distortion:
    """Draw each of the four with probability `DISTORTED`, contrast before or after saturation and hue."""
    low, high = zip(*((-BRIGHTNESS, BRIGHTNESS), CONTRAST, SATURATION, (-HUE, HUE)), strict=True)
    drawn = rng.uniform(low, high)
    brightness, contrast, saturation, hue = np.where(rng.random(4) < DISTORTED, drawn, (0, 1, 1, 0)).tolist()
    return Distortion(brightness, contrast, bool(rng.random() < 0.5), saturation, hue)


def distort(image: Tensor, drawn: Distortion) -> Tensor:
    """Change an image's colours, uint8 [C, H, W] with C = 1 or 3; saturation and hue leave one channel as it is."""
    early, late = (1.0, drawn.contrast) if drawn.contrast_last else (drawn.contrast, 1.0)
    image = shift_levels(image, early, early * drawn.brightness)
    if image.shape[0] == 3 and drawn.saturation != 1:
        image = TF.adjust_saturation(image, drawn.saturation)
    if drawn.hue:
        image = shift_hue(image, drawn.hue)
    return shift_levels(image, late, 0.0)


def shift_levels(image: Tensor, factor: float, summand: float) -> Tensor:
    """Return factor * image + summand, in uint8."""
    if (factor, summand) == (1.0, 0.0):
        return image
    return image.float().mul_(factor).add_(summand).round_().clamp_(0, 255).to(torch.uint8)


# --------------------------------------------------------------------------------------------------------
# From an image and its mask to a sample
# --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class JointView:
    """An image and its mask resized by a random factor, cropped, flipped, padded; then the image's colours changed.

    Args:
        scale_range: of the factor on the size that covers the crop.
        most_of_a_class: a crop is drawn again where one class has a larger share of what is not ignored in it, or
            there is nothing else; the last of ten is taken whatever it shows.
        fill: of padded pixels, a number per channel; in the mask they are ignored.
    """

    size: Size
    scale_range: tuple[float, float]
    most_of_a_class: float
    hflip: float
    photometric: bool
    fill: tuple[int, ...]

    def __call__(self, image: Tensor, mask: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Turn image [C, h, w] uint8 and mask [h, w] into views [C, H, W] and [H, W]."""
        size = scaled_size(tuple(mask.shape), self.size, rng.uniform(*self.scale_range))
        pair = Image(resized_image(image, size)), Mask(resized_mask(mask, size))
        window = self.draw_window(pair[1], rng)
        pair = tuple(TF.crop(x, *window) for x in pair)
        if rng.random() < self.hflip:
            pair = tuple(TF.horizontal_flip(x) for x in pair)
        view, mask = (x.as_subclass(Tensor) for x in pair)
        if self.photometric:
            view = distort(view, draw_distortion(rng))
        return padded(view, self.size, self.fill), padded(mask.unsqueeze(0), self.size, (IGNORED,))[0]

    def draw_window(self, mask: Mask, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """Draw top, left, height and width of a window; it is smaller than the crop where the image is."""
        h, w = mask.shape
        height, width = min(h, self.size[0]), min(w, self.size[1])
        for _ in range(MOST_CROPS):
            top, left = int(rng.integers(0, h - height + 1)), int(rng.integers(0, w - width + 1))
            if self.is_varied(mask[top : top + height, left : left + width]):
                break
        return top, left, height, width

    def is_varied(self, mask: Tensor) -> bool:
        """True if there are two classes or more, and none has more than its share."""
        if self.most_of_a_class == 1:
            return True
        count = torch.bincount(mask.flatten(), minlength=IGNORED + 1)[:IGNORED]
        largest, total = int(count.max()), int(count.sum())
        return largest < total and largest <= self.most_of_a_class * total
