"""Views made on the training's device, a batch at a time (--augment_on device, --cache device).

The numbers are drawn per sample as ever, by util/views.py; here they are applied to all images of a batch together.
Geometry is equal to the bit, photometry up to rounding (util/views.py rounds after each step, and so does this).

Letters: B images, C channels (1 or 3), H x W pixels of a view.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from util.views import BLUR_RADIUS, REFLECT_PAD, SOLARISE_THRESHOLD, Photometry, Plan

# --------------------------------------------------------------------------------------------------------
# Photometry
# --------------------------------------------------------------------------------------------------------

BRANCHES = ("grey", "solarise", "blur")
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4)  # places in a row, and numbers of the steps
_UNCHANGED = (1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 2.0, 3.0)
_ORDER, _BRANCH, _RADIUS = slice(4, 8), 8, 9
ROW_LENGTH = 10


def photometry_row(photometry: Photometry) -> list[float]:
    """The draw of one sample as numbers: four factors, the order of the four steps, the branch, the blur's radius."""
    jitter = photometry.jitter
    steps = _UNCHANGED if jitter is None else (*jitter[:4], *jitter.order)
    return [*map(float, steps), float(BRANCHES.index(photometry.branch)), photometry.radius]


def apply_photometry_rows(images: Tensor, rows: Tensor) -> Tensor:
    """uint8 [B, C, H, W] with the draws in `rows` [B, ROW_LENGTH], which lie on the CPU, so that nobody waits."""
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
    """One of brightness, contrast, saturation and hue for each image [B, C, H, W]; `step` [B] says which.

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
    """Luma [B, 1, H, W] of [B, C, H, W], with torchvision's weights."""
    if x.shape[1] == 1:
        return x
    return (x[:, 0] * 0.2989).add_(x[:, 1], alpha=0.587).add_(x[:, 2], alpha=0.114).unsqueeze(1)


def greyscale(x: Tensor, radius: Tensor) -> Tensor:
    """All channels become the luma."""
    return grey_of(x).floor().expand_as(x)


def solarise(x: Tensor, radius: Tensor) -> Tensor:
    """Bright values are inverted."""
    return torch.where(x >= SOLARISE_THRESHOLD, 255 - x, x)


def shift_hue(x: Tensor, shift: Tensor) -> Tensor:
    """[B, 3, H, W] with the hue turned by `shift` [B] of a circle: `util.views.shift_hue` for many images."""
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
    """Gaussian blur [B, C, H, W] with standard deviations `radius` [B], cut off beyond three of them."""
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


# --------------------------------------------------------------------------------------------------------
# Geometry, of images that lie on the device already
# --------------------------------------------------------------------------------------------------------

CROP_LENGTH = 3


def crop_rows(plan: Plan) -> np.ndarray:
    """int64 [views, CROP_LENGTH]: top, left and flip of each SRC window."""
    return np.array([(crop.top, crop.left, crop.flip) for crop in plan.crops], dtype=np.int64)


def cut_views(pixels: Tensor, starts: Tensor, sizes: Tensor, crops: Tensor, size: tuple[int, int], C: int) -> Tensor:
    """SRC windows of images in one long tensor, with a reflected border: uint8 [B, views, C, H, W].

    Args:
        pixels: uint8, the images [C, h, w] one after the other.
        starts: [B] where each begins.
        sizes: [B, 2] its h and w.
        crops: [B, views, CROP_LENGTH] of `crop_rows`.
        size: (H, W) of a view.
        C: channels.
    """
    H, W = size
    top, left, flip = crops.unbind(-1)  # each [B, views]
    rows = torch.arange(H, device=crops.device) + top[..., None] - REFLECT_PAD  # [B, views, H]
    columns = torch.arange(W, device=crops.device)
    columns = torch.where(flip[..., None] == 1, W - 1 - columns, columns) + left[..., None] - REFLECT_PAD
    h, w = sizes[:, None, None, 0], sizes[:, None, None, 1]
    rows, columns = reflect(rows, h), reflect(columns, w)
    within = (rows * w).unsqueeze(-1) + columns.unsqueeze(-2)  # [B, views, H, W]
    channel = torch.arange(C, device=crops.device).view(1, 1, -1, 1, 1) * (h * w)[..., None, None]
    return pixels[within.unsqueeze(2) + channel + starts.view(-1, 1, 1, 1, 1)]


def reflect(place: Tensor, length: Tensor) -> Tensor:
    """Places beyond 0..length - 1 mirrored at the edge, which is not repeated."""
    place = place.abs()
    return torch.where(place >= length, 2 * (length - 1) - place, place)
