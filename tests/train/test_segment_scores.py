"""Segmentation by windows and its scores against slow versions; colours and pictures of masks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from engine_segment import (
    SegmentScores,
    classes_at,
    confusion_of,
    evaluate,
    image_logits,
    slide,
    window_starts,
)
from shared.segment import config_of
from util.data.masks import IGNORED
from util.data.views import Normalise
from util.figures.segment_pictures import Predicted, as_array, oklab, overlay, palette, segmentation_figure

CPU = torch.device("cpu")
NO_AMP = torch.autocast("cpu", enabled=False)
quick = settings(max_examples=60, deadline=None)


# ---- windows -----------------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(0, 60), st.data())
@quick
def test_windows_cover_everything_and_stay_inside(window, more, data):
    stride, length = data.draw(st.integers(1, window)), window + more
    starts = window_starts(length, window, stride)
    assert starts[0] == 0
    assert starts[-1] == length - window
    assert all(0 < b - a <= stride for a, b in itertools.pairwise(starts))
    assert len(starts) == -(-more // stride) + 1  # no window too many


@pytest.mark.parametrize("batch_size", [1, 4, 100])
@pytest.mark.parametrize(("size", "stride"), [((20, 33), (5, 6)), ((8, 9), (8, 9)), ((8, 30), (3, 9))])
def test_sliding_against_a_loop_over_pixels(size, stride, batch_size):
    """Each pixel's logits are the mean over all windows in which it lies; they depend on the window here."""
    window = (8, 9)
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, *size, generator=generator)
    place = torch.randn(3, *window, generator=generator)

    def predict(images):  # of the window's mean, of the pixel, and of the pixel's place in the window
        mean = images.mean(dim=(1, 2, 3), keepdim=True)
        return mean * place + images[:, :1] * place.square()

    logits = slide(predict, image, window, stride, batch_size)
    tops = sorted({min(i * stride[0], size[0] - window[0]) for i in range(size[0])})
    lefts = sorted({min(i * stride[1], size[1] - window[1]) for i in range(size[1])})
    for y, x in np.ndindex(*size):
        votes = []
        for top in tops:
            for left in lefts:
                if top <= y < top + window[0] and left <= x < left + window[1]:
                    crop = image[:, top : top + window[0], left : left + window[1]]
                    votes.append(predict(crop[None])[0, :, y - top, x - left])
        torch.testing.assert_close(logits[:, y, x], torch.stack(votes).mean(0), rtol=1e-4, atol=1e-5)


class Brightness(nn.Module):
    """Logits that say how bright a pixel is, by its first channel; notes the sizes it was asked for."""

    def __init__(self):
        super().__init__()
        self.sizes = set()

    def predict(self, images):
        self.sizes.add(tuple(images.shape[2:]))
        levels = torch.linspace(-1.5, 1.5, 4).view(1, 4, 1, 1)
        return -(images[:, :1] - levels).square()


@pytest.mark.parametrize("size", [(32, 32), (32, 70), (37, 32), (9, 128)])
@pytest.mark.parametrize("mode", ["slide", "whole"])
def test_images_of_any_size_are_seen_whole(size, mode):
    """A prediction from the pixel alone is the same by windows, at once, and without padding."""
    config = config_of("--data_path anywhere --eval_mode", mode)
    image = torch.randn(3, *size, generator=torch.Generator().manual_seed(0))
    model = Brightness()
    logits = image_logits(model, image, config)
    torch.testing.assert_close(logits, model.predict(image[None])[0])
    model.sizes.clear()
    image_logits(model, image, config)
    assert model.sizes == {(32, 32)} if mode == "slide" else {tuple(-(-side // 8) * 8 for side in size)}


@pytest.mark.parametrize("most", [1, 500, 10**9])
def test_classes_of_enlarged_logits(monkeypatch, most):
    monkeypatch.setattr("engine_segment.MAX_LOGITS", most)  # one class at a time; two; all
    logits = torch.randn(7, 5, 6, generator=torch.Generator().manual_seed(0))
    enlarged = F.interpolate(logits[None], (15, 16), mode="bilinear", align_corners=False)[0]
    assert torch.equal(classes_at(logits, (15, 16)), enlarged.argmax(0))


# ---- scores ------------------------------------------------------------------------------------------------


def slow_scores(pairs: list[tuple[np.ndarray, np.ndarray]], classes: int) -> dict[str, float]:
    """Sets of pixels, class by class."""
    counted = [
        (i, t, s)
        for truth, predicted in pairs
        for i, (t, s) in enumerate(zip(truth.flat, predicted.flat, strict=True))
        if t != IGNORED
    ]
    ious, accuracies = [], []
    for k in range(classes):
        both = sum(t == k and s == k for _, t, s in counted)
        either = sum(t == k or s == k for _, t, s in counted)
        present = sum(t == k for _, t, _ in counted)
        if either:
            ious.append(100 * both / either)
        if present:
            accuracies.append(100 * both / present)
    right = sum(t == s for _, t, s in counted)
    return dict(miou=np.mean(ious), aacc=100 * right / len(counted), macc=np.mean(accuracies))


@given(st.integers(0, 10**6), st.integers(2, 6))
@quick
def test_scores_against_sets_of_pixels(seed, classes):
    """Random masks of different sizes, with ignored pixels and classes that are not there, not said, or neither."""
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(3):
        shape = rng.integers(2, 9, 2)
        truth = rng.integers(0, max(1, classes - 1), shape).astype(np.uint8)
        truth[rng.random(shape) < 0.3] = IGNORED
        pairs.append((truth, rng.integers(0, max(1, classes - rng.integers(0, 2)), shape)))
    pairs[0][0][0, 0] = 0  # one pixel counts at least
    confusion = sum(confusion_of(torch.from_numpy(t), torch.from_numpy(s), classes) for t, s in pairs)
    scores = SegmentScores(confusion, len(pairs))
    assert scores.values == pytest.approx(slow_scores(pairs, classes))


def test_absent_classes_by_hand():
    truth = torch.tensor([[0, 0, 0, 1], [1, IGNORED, IGNORED, 1]], dtype=torch.uint8)
    predicted = torch.tensor([[0, 0, 3, 1], [1, 2, 0, 0]])  # 3 is said and not there, 2 only where it is ignored
    scores = SegmentScores(confusion_of(truth, predicted, 5), 1)
    assert scores.iou.nan_to_num(-1).tolist() == pytest.approx([50, 200 / 3, -1, 0, -1])
    assert scores.accuracy.nan_to_num(-1).tolist() == pytest.approx([200 / 3, 200 / 3, -1, -1, -1])
    assert scores.values == pytest.approx({"miou": (50 + 200 / 3 + 0) / 3, "aacc": 400 / 6, "macc": 200 / 3})


def test_the_mean_iou_is_torchmetrics_s():
    classification = pytest.importorskip("torchmetrics.classification")
    generator = torch.Generator().manual_seed(0)
    truth, prediction = (torch.randint(0, 7, (3, 20, 30), generator=generator) for _ in range(2))
    prediction[0] = truth[0]
    truth[:, :4] = IGNORED
    scores = SegmentScores(confusion_of(truth, prediction, 7), 3)
    jaccard = classification.MulticlassJaccardIndex(7, average="none", ignore_index=IGNORED)
    torch.testing.assert_close(scores.iou.float() / 100, jaccard(prediction, truth))
    mean = classification.MulticlassJaccardIndex(7, average="macro", ignore_index=IGNORED)
    assert scores.values["miou"] == pytest.approx(100 * mean(prediction, truth).item(), rel=1e-6)


def test_evaluation_scores_at_the_mask_s_own_size():
    """A prediction from brightness alone, on images of half the masks' size, against the loop."""
    config, model = config_of("--data_path anywhere"), Brightness()
    model.train()
    normalise = Normalise((0.5,) * 3, (0.25,) * 3, CPU)
    rng = np.random.default_rng(0)
    loader, pairs = [], []
    for size in ((32, 40), (50, 32), (32, 32)):
        pixels = torch.from_numpy(rng.integers(0, 256, (3, *size), dtype=np.uint8))
        mask = rng.integers(0, 4, (2 * size[0], 2 * size[1])).astype(np.uint8)
        mask[:5] = IGNORED
        loader.append((pixels, torch.from_numpy(mask)))
        logits = model.predict(normalise(pixels)[None])
        predicted = F.interpolate(logits, mask.shape, mode="bilinear", align_corners=False)[0].argmax(0)
        pairs.append((mask, predicted.numpy()))
    scores = evaluate(model, loader, 4, normalise, config, CPU, NO_AMP)
    assert scores.images == 3
    assert scores.values == pytest.approx(slow_scores(pairs, 4))
    assert model.training


# ---- pictures ----------------------------------------------------------------------------------------------


def test_colours_can_be_told_apart():
    for number, apart in ((11, 0.2), (150, 0.055)):
        colours = oklab(palette(number))
        distance = np.linalg.norm(colours[:, None] - colours[None], axis=2) + 9 * np.eye(number)
        assert distance.min() > apart
        assert np.linalg.norm(colours - oklab(np.zeros(3)), axis=1).min() > apart  # black is for ignored pixels
    assert np.array_equal(palette(150)[:11], palette(11))
    assert oklab(np.array([255, 255, 255])) == pytest.approx([1, 0, 0], abs=1e-6)
    assert oklab(np.array([255, 0, 0])) == pytest.approx([0.628, 0.225, 0.126], abs=1e-3)


def test_a_mask_over_its_image():
    image = np.full((2, 3, 3), 100, dtype=np.uint8)
    mask = np.array([[0, 1, 2], [0, 1, IGNORED]], dtype=np.uint8)
    drawn = overlay(image, mask, palette(3))
    assert drawn[1, 2].tolist() == [0, 0, 0]
    for y, x in ((0, 0), (0, 1), (0, 2)):
        assert drawn[y, x] == pytest.approx(0.65 * palette(3)[mask[y, x]] + 35, abs=1)


def test_the_legend_names_what_occurs():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
    truth = np.where(rng.random((40, 50)) < 0.2, IGNORED, 3).astype(np.uint8)
    predicted = np.where(rng.random((40, 50)) < 0.5, 3, 7).astype(np.uint8)
    shown = Predicted("a.jpg", image, truth, predicted)
    counted = [(t, s) for t, s in zip(truth.flat, predicted.flat, strict=True) if t != IGNORED]
    assert shown.accuracy == pytest.approx(sum(t == s for t, s in counted) / len(counted))
    figure = segmentation_figure([shown], [f"thing {i}" for i in range(60)], "title")
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["thing 3", "thing 7", "(ignored)"]
    picture = as_array(figure)
    assert picture.shape[2] == 3
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 50
    crowded = Predicted("b.jpg", image, (np.arange(2000) % 60).reshape(40, 50).astype(np.uint8), predicted)
    legend = segmentation_figure([crowded], [f"thing {i}" for i in range(60)], "title").legends[0]
    assert len(legend.get_texts()) == 40
    assert "The 40 most frequent of 60 classes are named." in legend.get_title().get_text()
