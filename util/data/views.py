"""Two views of one image (Section 3 and 5.1 of the paper), uint8 in, uint8 out.

Every random number of a sample comes from a generator made of (seed, epoch, index): a view depends neither on
the worker that makes it nor on where a run was interrupted. What is drawn and what is done are apart: `draw_*`
returns plain numbers, `apply_*` uses them.

Sizes are (height, width) in pixels; images are uint8 tensors [C, H, W].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from torch import Tensor
from torchvision.transforms import InterpolationMode

Size = tuple[int, int]

REFLECT_PAD = 4  # pixels around the resized image, for SRC (DeiT III, Touvron et al. 2022)
RRC_SCALE = (0.2, 1.0)  # share of the area, as MAE
RRC_RATIO = (3 / 4, 4 / 3)  # width / height
JITTER_PROBABILITY = 0.8
BRIGHTNESS, CONTRAST, SATURATION, HUE = 0.4, 0.4, 0.2, 0.1
SOLARISE_THRESHOLD = 128
BLUR_RADIUS = (0.1, 2.0)  # standard deviation in pixels


def sample_generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    """Return the generator of one sample in one epoch; Philox keys give independent streams at no cost.

    `seed` and `epoch` lie in [0, 2^32), `index` in [0, 2^64).
    """
    key = np.array([(seed << 32) | epoch, index], dtype=np.uint64)  # of a list NumPy would make floats
    return np.random.Generator(np.random.Philox(key=key))


# --------------------------------------------------------------------------------------------------------
# Geometry
# --------------------------------------------------------------------------------------------------------


class Crop(NamedTuple):
    """A window of an image, in its pixels, and whether it is mirrored."""

    top: int
    left: int
    height: int
    width: int
    flip: bool


def cover_size(image_size: Size, size: Size) -> Size:
    """Return the smallest size of the image's shape that covers `size`; for a square, the shorter side equals it.

    The longer side is truncated, as torchvision's Resize does.
    """
    (h, w), (H, W) = image_size, size
    if h * W <= w * H:  # the height is what limits
        return H, max(W, int(H * w / h))
    return max(H, int(W * h / w)), W


def resize(image: Tensor, size: Size) -> Tensor:
    """Resize an image: bicubic with antialiasing, in uint8."""
    if image.shape[-2:] == size:
        return image
    return TF.resize_image(image, list(size), interpolation=InterpolationMode.BICUBIC, antialias=True)


def reflect_border(image: Tensor) -> Tensor:
    """Add `REFLECT_PAD` pixels on each side, mirrored without repeating the edge."""
    n = REFLECT_PAD  # torchvision's pad takes three times as long: it goes by way of floats
    image = torch.cat([image[:, 1 : n + 1].flip(1), image, image[:, -n - 1 : -1].flip(1)], dim=1)
    return torch.cat([image[..., 1 : n + 1].flip(2), image, image[..., -n - 1 : -1].flip(2)], dim=2)


def draw_simple_crop(rng: np.random.Generator, padded: Size, size: Size, hflip: float) -> Crop:
    """Draw SRC's window: of `size` in the resized image with its reflected border, each place as likely."""
    top, left = (int(rng.integers(0, have - want + 1)) for have, want in zip(padded, size, strict=True))
    return Crop(top, left, *size, flip=rng.random() < hflip)


def draw_resized_crop(rng: np.random.Generator, image_size: Size, hflip: float) -> Crop:
    """Draw RRC's window: of random area and shape in the original image; after ten misfits the central one."""
    h, w = image_size
    for _ in range(10):
        area = h * w * rng.uniform(*RRC_SCALE)
        ratio = math.exp(rng.uniform(math.log(RRC_RATIO[0]), math.log(RRC_RATIO[1])))
        width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < width <= w and 0 < height <= h:
            top, left = int(rng.integers(0, h - height + 1)), int(rng.integers(0, w - width + 1))
            return Crop(top, left, height, width, flip=rng.random() < hflip)
    width, height = min(w, max(1, round(h * RRC_RATIO[1]))), min(h, max(1, round(w / RRC_RATIO[0])))
    return Crop((h - height) // 2, (w - width) // 2, height, width, flip=rng.random() < hflip)


def apply_crop(image: Tensor, crop: Crop, size: Size) -> Tensor:
    """Cut the window out of an image [C, h, w], and resize it if its size is not `size`."""
    window = image[:, crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
    view = resize(window, size)
    return view.flip(-1) if crop.flip else view


# --------------------------------------------------------------------------------------------------------
# Photometry, for view v
# --------------------------------------------------------------------------------------------------------


class Jitter(NamedTuple):
    """Colour jitter: factors around 1, a shift of hue around 0, and the order in which they are applied."""

    brightness: float
    contrast: float
    saturation: float
    hue: float
    order: tuple[int, ...]


class Photometry(NamedTuple):
    """The changes to the colours of a view: jitter or none, then exactly one of three."""

    jitter: Jitter | None
    branch: Literal["grey", "solarise", "blur"]
    radius: float  # of the blur


def draw_photometry(rng: np.random.Generator) -> Photometry:
    """Draw jitter with probability .8, then greyscale, solarise or blur with a third each (3-Augment)."""
    jitter = None
    if rng.random() < JITTER_PROBABILITY:
        factors = (rng.uniform(1 - x, 1 + x) for x in (BRIGHTNESS, CONTRAST, SATURATION))
        jitter = Jitter(*factors, hue=rng.uniform(-HUE, HUE), order=tuple(rng.permutation(4).tolist()))
    branch = ("grey", "solarise", "blur")[rng.integers(3)]
    return Photometry(jitter, branch, rng.uniform(*BLUR_RADIUS))


def apply_photometry(image: Tensor, photometry: Photometry) -> Tensor:
    """Change the colours [C, H, W] with C = 1 or 3; saturation, hue and greyscale leave one channel as it is."""
    if photometry.jitter is not None:
        steps = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, shift_hue)
        for step in photometry.jitter.order:
            image = steps[step](image, photometry.jitter[step])
    if photometry.branch == "grey":
        return TF.rgb_to_grayscale(image, num_output_channels=image.shape[0])
    if photometry.branch == "solarise":
        return TF.solarize(image, SOLARISE_THRESHOLD)
    return blur(image, photometry.radius)


def shift_hue(image: Tensor, shift: float) -> Tensor:
    """Turn the hue by `shift` of a circle, as torchvision's adjust_hue does in three times the time."""
    if image.shape[0] == 1:
        return image
    red, green, blue = rgb = image.float()
    value = rgb.amax(0)
    chroma = value - rgb.amin(0)
    divisor = chroma.clamp(min=1)  # grey has no hue, and keeps none
    sextant = torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor)
    sextant = torch.where(value == red, (green - blue) / divisor, sextant)  # [H, W] hue, six to the circle
    distance = (torch.tensor([5.0, 3.0, 1.0]).view(3, 1, 1) + (sextant + 6 * shift)).remainder_(6)
    fall = torch.minimum(distance, 4 - distance).clamp_(0, 1)
    return (value - chroma * fall).round_().to(torch.uint8)


def blur(image: Tensor, radius: float) -> Tensor:
    """Blur by a Gaussian with standard deviation `radius`, cut off beyond three of them."""
    reach = min(math.ceil(3 * radius), *(side - 1 for side in image.shape[-2:]))
    return TF.gaussian_blur(image, [2 * reach + 1] * 2, [radius] * 2)


# --------------------------------------------------------------------------------------------------------
# From an image to its views
# --------------------------------------------------------------------------------------------------------


class ViewParams(NamedTuple):
    """The random parameters of the views of one image."""

    crops: tuple[Crop, ...]  # of each view
    photometry: Photometry | None  # of view v


@dataclass(frozen=True)
class TwoViews:
    """uint8 image [C, h, w] to views [num_views, C, H, W]: view u, and view v where two are asked for."""

    size: Size
    num_views: int = 2
    crop: Literal["src", "rrc"] = "src"
    shared_crop: bool = False
    hflip: float = 0.5
    photometric: bool = True

    def __call__(self, image: Tensor, rng: np.random.Generator) -> Tensor:
        """Make both views of an image, photometry included."""
        plan = self.draw(tuple(image.shape[-2:]), rng)
        views = self.cut(image, plan)
        if plan.photometry is not None:
            views[1] = apply_photometry(views[1], plan.photometry)
        return views

    def draw(self, image_size: Size, rng: np.random.Generator) -> ViewParams:
        """Draw view u first, so that it is the same whether or not there is a view v."""
        crops = [self.draw_crop(image_size, rng)]
        photometry = None
        if self.num_views == 2:
            crops.append(crops[0] if self.shared_crop else self.draw_crop(image_size, rng))
            photometry = draw_photometry(rng) if self.photometric else None
        return ViewParams(tuple(crops), photometry)

    def draw_crop(self, image_size: Size, rng: np.random.Generator) -> Crop:
        """Draw a window in the original image for RRC, and for SRC in the resized one with its reflected border."""
        if self.crop == "rrc":
            return draw_resized_crop(rng, image_size, self.hflip)
        h, w = cover_size(image_size, self.size)
        return draw_simple_crop(rng, (h + 2 * REFLECT_PAD, w + 2 * REFLECT_PAD), self.size, self.hflip)

    def cut(self, image: Tensor, plan: ViewParams) -> Tensor:
        """Cut the windows out of an image [C, h, w], and resize them to the size of a view: [num_views, C, H, W]."""
        if self.crop == "src":  # once, for both views
            image = reflect_border(self.shrink(image))
        return torch.stack([apply_crop(image, crop, self.size) for crop in plan.crops])

    def shrink(self, image: Tensor) -> Tensor:
        """Return all of an image that its views depend on: SRC resizes first, and a second time has no effect."""
        return resize(image, cover_size(tuple(image.shape[-2:]), self.size)) if self.crop == "src" else image


def crop_share(size: Size) -> float:
    """Return the share of an image's shorter side that an evaluation at `size` sees (timm's crop_pct)."""
    return 7 / 8 if 96 <= min(size) <= 224 else 1.0


def centre_view(image: Tensor, size: Size) -> Tensor:
    """Resize an image [C, h, w] uint8 so that it covers `size`, and cut out its centre, [C, H, W]; for evaluation.

    From 96 to 224 pixels the image is first made 8/7 larger (256 for 224), as is usual. Smaller images are seen whole,
    since their borders carry the object, and larger ones as MAE does.
    """
    larger = tuple(int(n / crop_share(size)) for n in size)  # as MAE and timm: 160 gives 182
    image = resize(image, cover_size(tuple(image.shape[-2:]), larger))
    return TF.center_crop_image(image, list(size))


class Normalise:
    """uint8 [..., C, H, W] to float32 with the mean and deviation of pixels in [0, 1], on `device`."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device):
        self.mean, self.std = mean, std
        # made once: a tensor made of Python numbers in each step would wait for the GPU
        self.shift = torch.tensor(mean, device=device).view(-1, 1, 1) * 255
        self.scale = torch.tensor(std, device=device).view(-1, 1, 1) * 255

    def __call__(self, pixels: Tensor) -> Tensor:
        return (pixels.float() - self.shift) / self.scale
