"""MAE's distribution of random resized crops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation

from util.config.classifier import FinetuneConfig, LinprobeConfig
from util.data.clamped_crop import ClampedResizedCrop
from util.data.datasets import digits
from util.train.classification import train_dataset

SCALE, RATIO, DRAWS = (0.08, 1.0), (3 / 4, 4 / 3), 40_000


@pytest.mark.parametrize(
    ("crop", "mean", "large"),
    [(ClampedResizedCrop, 0.518, 0.126), (RandomResizedCropAndInterpolation, 0.433, 0.057)],
)
def test_areas_of_40_000_windows(crop, mean, large):
    """MAE's util/crop.py and timm's crop, on 500 x 375 pixels, each measured with 40,000 draws of its own code."""
    torch.manual_seed(0)
    image = Image.new("L", (500, 375))
    windows = np.array([crop.get_params(image, SCALE, RATIO) for _ in range(DRAWS)])
    share = windows[:, 2] * windows[:, 3] / (500 * 375)
    deviation = share.std() / math.sqrt(DRAWS)
    assert abs(share.mean() - mean) < 0.0005 + 4 * deviation
    assert abs((share > 0.8).mean() - large) < 0.0005 + 4 * math.sqrt(large * (1 - large) / DRAWS)
    assert (windows[:, :2] >= 0).all()
    assert (windows[:, 0] + windows[:, 2] <= 375).all()
    assert (windows[:, 1] + windows[:, 3] <= 500).all()


def test_a_window_of_the_whole_image_and_of_one_pixel():
    top, left, height, width = ClampedResizedCrop.get_params(Image.new("L", (7, 3)), (1.0, 1.0), (1.0, 1.0))
    assert (top, height, width) == (0, 3, 5)
    assert 0 <= left <= 2
    assert ClampedResizedCrop.get_params(Image.new("L", (1, 1)), SCALE, RATIO) == (0, 0, 1, 1)


@pytest.mark.parametrize(
    ("config", "crop"), [(LinprobeConfig, ClampedResizedCrop), (FinetuneConfig, RandomResizedCropAndInterpolation)]
)
def test_linear_probes_crop_as_mae_and_fine_tuning_as_timm(config, crop):
    transform = train_dataset(config(dataset="digits", input_size=(32,)), digits("train")).transform
    assert type(transform.transforms[0]) is crop
    assert transform(Image.new("RGB", (50, 40))).shape == (3, 32, 32)
