"""Views made a batch at a time on the device, against those that the loader makes one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms.v2.functional import pil_to_tensor

from shared.images import colours
from util.data.device_views import (
    StoredImages,
    apply_photometry_rows,
    blur,
    crop_rows,
    cut_resized,
    cut_simple,
    photometry_row,
)
from util.data.views import Photometry, TwoViews, apply_photometry, draw_photometry


def pictures(number: int, channels: int = 3, side: int = 40) -> torch.Tensor:
    """Smooth pictures with noise, uint8 [B, C, side, side]."""
    generator = torch.Generator().manual_seed(0)
    blobs = torch.rand(number, channels, 5, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(blobs, (side, side), mode="bicubic").clamp(0, 1)
    return (255 * smooth + 4 * torch.rand(smooth.shape, generator=generator)).clamp(0, 255).to(torch.uint8)


def draws(number: int, seed: int = 0) -> list[Photometry]:
    rng = np.random.default_rng(seed)
    return [draw_photometry(rng) for _ in range(number)]


@pytest.mark.parametrize("channels", [1, 3])
def test_photometry_of_a_batch_is_that_of_each_image(channels):
    images, photometry = pictures(96, channels), draws(96)
    assert {p.branch for p in photometry} == {"grey", "solarise", "blur"}
    actual = apply_photometry_rows(images, torch.tensor([photometry_row(p) for p in photometry]))
    expected = torch.stack([apply_photometry(x, p) for x, p in zip(images, photometry, strict=True)])
    assert actual.dtype == torch.uint8
    difference = (actual.int() - expected.int()).abs()
    solarised = torch.tensor([p.branch == "solarise" for p in photometry])  # there 127 and 128 are far apart
    assert difference[~solarised].max() <= 3  # a rounding of one step may move the next one's
    assert (difference > 1).float().mean() < 0.001
    assert difference.float().mean() < 0.05


@pytest.mark.parametrize("branch", ["grey", "solarise", "blur"])
def test_each_branch_alone_is_within_one_grey_level(branch):
    images = pictures(8)
    photometry = [Photometry(None, branch, radius) for radius in np.linspace(0.1, 2.0, 8)]
    actual = apply_photometry_rows(images, torch.tensor([photometry_row(p) for p in photometry]))
    expected = torch.stack([apply_photometry(x, p) for x, p in zip(images, photometry, strict=True)])
    assert (actual.int() - expected.int()).abs().max() <= 1


def test_the_images_given_stay_as_they_are():
    images = pictures(6)
    before = images.clone()
    apply_photometry_rows(images, torch.tensor([photometry_row(p) for p in draws(6)]))
    assert torch.equal(images, before)


def test_statistics_of_the_branches_are_those_of_the_worker():
    """Mean and deviation over many draws, by branch: what a network sees is the same."""
    images, photometry = pictures(300, side=16), draws(300, seed=1)
    actual = apply_photometry_rows(images, torch.tensor([photometry_row(p) for p in photometry])).float()
    expected = torch.stack([apply_photometry(x, p) for x, p in zip(images, photometry, strict=True)]).float()
    for branch in ("grey", "solarise", "blur"):
        chosen = torch.tensor([p.branch == branch for p in photometry])
        assert actual[chosen].mean().item() == pytest.approx(expected[chosen].mean().item(), abs=0.1)
        assert actual[chosen].std().item() == pytest.approx(expected[chosen].std().item(), abs=0.1)


def test_blur_on_small_images_stays_inside():
    x = pictures(2, side=4).float()
    assert torch.isfinite(blur(x, torch.tensor([0.1, 2.0]))).all()


def stored(images: list[torch.Tensor]) -> StoredImages:
    """Return the images stored one after the other."""
    lengths = torch.tensor([x.numel() for x in images])
    sizes = torch.tensor([x.shape[-2:] for x in images])
    return StoredImages(torch.cat([x.flatten() for x in images]), lengths.cumsum(0) - lengths, sizes, len(images[0]))


def windows(make: TwoViews, sides: list[tuple[int, int]], channels: int, seed: int):
    """Images, the crops drawn for them, and their views by the loader's way."""
    images = [make.shrink(pil_to_tensor(colours(h, w, seed + i))[:channels]) for i, (h, w) in enumerate(sides)]
    rngs = [np.random.default_rng([seed, i]) for i in range(len(images))]
    plans = [make.draw(tuple(x.shape[-2:]), rng) for x, rng in zip(images, rngs, strict=True)]
    views = torch.stack([make.cut(x, plan) for x, plan in zip(images, plans, strict=True)])
    return stored(images), torch.from_numpy(np.stack([crop_rows(plan) for plan in plans])), views


WINDOWS = dict(
    sides=st.lists(st.tuples(st.integers(16, 60), st.integers(16, 60)), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
    size=st.sampled_from([(16, 16), (16, 24), (32, 16)]),
    channels=st.sampled_from([1, 3]),
    shared=st.booleans(),
)


@given(**WINDOWS)
def test_simple_windows_are_those_of_the_loader_to_the_bit(sides, seed, size, channels, shared):
    make = TwoViews(size, shared_crop=shared, photometric=False)
    images, crops, expected = windows(make, sides, channels, seed)
    assert torch.equal(cut_simple(images, crops, size), expected)


@given(**WINDOWS)
def test_resized_windows_are_those_of_the_loader_up_to_rounding(sides, seed, size, channels, shared):
    make = TwoViews(size, crop="rrc", shared_crop=shared, photometric=False)
    images, crops, expected = windows(make, sides, channels, seed)
    largest = tuple(crops[..., 2:4].amax(dim=(0, 1)).tolist())
    difference = cut_resized(images, crops, size, largest).int() - expected.int()
    assert difference.abs().max() <= 1
    assert difference.float().mean().abs() < 0.02  # no shift of brightness
