"""Views made on the training's device, a batch at a time (--augment_on device, --cache device).

The numbers are drawn per sample as ever, by util/data/views.py; here they are applied to a whole batch at once.
SRC's windows are equal to the bit, RRC's and photometry up to rounding, which is done after each step as there.

Letters: B images, C channels (1 or 3), H x W pixels of a view.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from util.data.views import BLUR_RADIUS, REFLECT_PAD, SOLARISE_THRESHOLD, Photometry, Size, ViewParams

BRANCHES = ("grey", "solarise", "blur")
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4)  # places in a row, and numbers of the steps
_UNCHANGED = (1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 2.0, 3.0)
_ORDER, _BRANCH, _RADIUS = slice(4, 8), 8, 9
ROW_LENGTH = 10


def photometry_row(photometry: Photometry) -> list[float]:
    """Return one sample's draw as numbers: four factors, the order of the four steps, branch, blur radius."""
    jitter = photometry.jitter
    steps = _UNCHANGED if jitter is None else (*jitter[:4], *jitter.order)
    return [*map(float, steps), float(BRANCHES.index(photometry.branch)), photometry.radius]


def apply_photometry_rows(images: Tensor, rows: Tensor) -> Tensor:
    """Apply the draws in `rows` [B, ROW_LENGTH] to uint8 images; `rows` lies on the CPU, so that nobody waits."""
    x = images.float()
    for place in range(4):
        x = jitter_step(x, rows, rows[:, _ORDER][:, place].long())
    on_device = x.device
    for branch, apply in enumerate((greyscale, solarise, blur)):
        chosen = (rows[:, _BRANCH] == branch).nonzero().flatten()
        if len(chosen):
            radius = rows[chosen, _RADIUS].to(on_device, non_blocking=True)
            chosen = chosen.to(on_device, non_blocking=True)
            x[chosen] = apply(x[chosen], radius)
    return x.to(torch.uint8)


def jitter_step(x: Tensor, rows: Tensor, step: Tensor) -> Tensor:
    """Change brightness, contrast, saturation or hue of each image [B, C, H, W]; `step` [B] says which.

    The first three blend the image with black, with its mean grey and with its grey.
    """
    hue = step == _HUE
    factor = torch.where(hue, 1.0, rows.gather(1, step[:, None]).squeeze(1))
    if x.shape[1] == 1:
        factor = torch.where(step == _SATURATION, 1.0, factor)
    weights = torch.stack([factor, 1 - factor, (step == _CONTRAST).float(), (step == _SATURATION).float()])
    factor, rest, contrast, saturation = weights.to(x.device, non_blocking=True).view(4, -1, 1, 1, 1)
    grey = grey_of(x).floor()
    reference = saturation * grey + contrast * grey.mean(dim=(2, 3), keepdim=True)
    x = (factor * x + rest * reference).clamp_(0, 255).floor_()
    turned = hue.nonzero().flatten()
    if len(turned) and x.shape[1] == 3:
        shift = rows[turned, _HUE].to(x.device, non_blocking=True)
        turned = turned.to(x.device, non_blocking=True)
        x[turned] = shift_hue(x[turned], shift)
    return x


def grey_of(x: Tensor) -> Tensor:
    """Return the luma [B, 1, H, W] of [B, C, H, W], with torchvision's weights."""
    if x.shape[1] == 1:
        return x
    return (x[:, 0] * 0.2989).add_(x[:, 1], alpha=0.587).add_(x[:, 2], alpha=0.114).unsqueeze(1)


def greyscale(x: Tensor, radius: Tensor) -> Tensor:
    """Set all channels to the luma."""
    return grey_of(x).floor().expand_as(x)


def solarise(x: Tensor, radius: Tensor) -> Tensor:
    """Invert bright values."""
    return torch.where(x >= SOLARISE_THRESHOLD, 255 - x, x)


def shift_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of images [B, 3, H, W] by `shift` [B] of a circle, as `util.data.views.shift_hue` does for one."""
    red, green, blue = x.unbind(1)
    value = x.amax(1)
    chroma = value - x.amin(1)
    divisor = chroma.clamp(min=1)
    sextant = torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor)
    sextant = torch.where(value == red, (green - blue) / divisor, sextant) + 6 * shift.view(-1, 1, 1)
    channels = [(start + sextant).remainder_(6) for start in (5.0, 3.0, 1.0)]
    distance = torch.stack(channels, dim=1)
    fall = torch.minimum(distance, 4 - distance).clamp_(0, 1)
    return (value.unsqueeze(1) - chroma.unsqueeze(1) * fall).round_()


def blur(x: Tensor, radius: Tensor) -> Tensor:
    """Blur images [B, C, H, W] by Gaussians with standard deviations `radius` [B], cut off beyond three of them."""
    B, C, H, W = x.shape
    widest = min(math.ceil(3 * BLUR_RADIUS[1]), H - 1, W - 1)
    distance = torch.arange(-widest, widest + 1, device=x.device)
    kernel = torch.exp(-0.5 * (distance / radius[:, None]).square())  # [B, taps]
    kernel = kernel * (distance.abs() <= (3 * radius[:, None]).ceil())
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(C, dim=0)  # [B C, taps]
    x = F.pad(x, [widest] * 4, mode="reflect").reshape(1, B * C, H + 2 * widest, W + 2 * widest)
    x = F.conv2d(x, kernel[:, None, :, None], groups=B * C)
    x = F.conv2d(x, kernel[:, None, None, :], groups=B * C)
    return x.view(B, C, H, W).round_()


CROP_LENGTH = 5


def crop_rows(plan: ViewParams) -> np.ndarray:
    """Return top, left, height, width and flip of each window, int64 [views, CROP_LENGTH]."""
    return np.array(plan.crops, dtype=np.int64)


@dataclass
class StoredImages:
    """Images [C, h, w] one after the other in one long uint8 tensor, and where each of a batch's B images lies."""

    pixels: Tensor  # [bytes of all images]
    starts: Tensor  # [B] int64, where each begins
    sizes: Tensor  # [B, 2] int64, its h and w
    channels: int

    def gather(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return each image's pixels at `rows` [B, views, H] and `columns` [B, views, W], uint8 [B, views, C, H, W]."""
        h, w = self.sizes[:, None, None, 0], self.sizes[:, None, None, 1]
        within = (rows * w).unsqueeze(-1) + columns.unsqueeze(-2)  # [B, views, H, W]
        channel = torch.arange(self.channels, device=rows.device).view(1, 1, -1, 1, 1) * (h * w)[..., None, None]
        return self.pixels[within.unsqueeze(2) + channel + self.starts.view(-1, 1, 1, 1, 1)]


def cut_simple(images: StoredImages, crops: Tensor, size: Size) -> Tensor:
    """Cut SRC's windows with a reflected border, uint8 [B, views, C, H, W].

    Args:
        crops: [B, views, CROP_LENGTH] of `crop_rows`.
    """
    H, W = size
    top, left, _, _, flip = crops.unbind(-1)  # each [B, views]
    rows = torch.arange(H, device=crops.device) + top[..., None] - REFLECT_PAD  # [B, views, H]
    columns = mirrored(flip, W) + left[..., None] - REFLECT_PAD
    return images.gather(
        reflect(rows, images.sizes[:, None, None, 0]), reflect(columns, images.sizes[:, None, None, 1])
    )


def cut_resized(images: StoredImages, crops: Tensor, size: Size, largest: Size) -> Tensor:
    """Cut RRC's windows at `size`, uint8 [B, views, C, H, W]: bicubic, antialiased, rounded after each of two passes.

    Args:
        crops: [B, views, CROP_LENGTH] of `crop_rows`.
        largest: height and width that no window exceeds, known without asking the device.
    """
    H, W = size
    top, left, height, width, flip = (x.unsqueeze(-1) for x in crops.unbind(-1))  # each [B, views, 1]
    rows = torch.minimum(torch.arange(largest[0], device=crops.device), height - 1)
    columns = torch.minimum(torch.arange(largest[1], device=crops.device), width - 1)
    windows = images.gather(rows + top, columns + left).float()  # beyond its end a window's last pixel, of no weight
    across = bicubic_weights(width, W, largest[1]).gather(  # [B, views, W, largest width]
        2, mirrored(flip.squeeze(-1), W).unsqueeze(-1).expand(-1, -1, -1, largest[1])
    )
    down = bicubic_weights(height, H, largest[0])  # [B, views, H, largest height]
    x = (windows @ across.unsqueeze(2).mT).round_().clamp_(0, 255)
    return (down.unsqueeze(2) @ x).round_().clamp_(0, 255).to(torch.uint8)


def bicubic_weights(length: Tensor, size: int, most: int) -> Tensor:
    """Return the share [..., size, most] of each of `most` places in each of `size` places of the resized image.

    Rows sum to 1. As in Pillow and torchvision with antialiasing: Keys' cubic with a = -1/2, widened to make smaller.

    Args:
        length: [..., 1] places there are, at most `most`; those beyond give nothing.
    """
    scale = (length / size).unsqueeze(-1)  # [..., 1, 1]
    centre = scale * (torch.arange(size, device=length.device).unsqueeze(-1) + 0.5)
    place = torch.arange(most, device=length.device)
    x = ((place + 0.5 - centre) / scale.clamp(min=1)).abs()  # [..., size, most]
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0)) * (place < length.unsqueeze(-1))
    return weights / weights.sum(-1, keepdim=True)


def mirrored(flip: Tensor, length: int) -> Tensor:
    """Return places [B, views, length] from left to right, or from right to left where `flip` [B, views] is 1."""
    places = torch.arange(length, device=flip.device)
    return torch.where(flip.unsqueeze(-1) == 1, length - 1 - places, places)


def reflect(place: Tensor, length: Tensor) -> Tensor:
    """Mirror places beyond 0..length - 1 at the edge, which is not repeated."""
    place = place.abs()
    return torch.where(place >= length, 2 * (length - 1) - place, place)
