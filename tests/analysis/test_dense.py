"""Dense probes: pixels of patches and mIoU against loops, and the script on images with masks."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

import scripts.probe
from util.analysis.dense import Patches, dense_probe, dense_score, patch_pixels
from util.data.masks import IGNORED
from util.results.results import read_results
from util.runtime.errors import UserError, run_main


def test_pixels_of_patches_equal_loops():
    masks = torch.from_numpy(np.random.default_rng(0).choice([0, 1, 2, IGNORED], (2, 8, 12)).astype(np.uint8))
    counts = patch_pixels(masks, 4, 3)
    assert counts.shape == (2 * 2 * 3, 3)
    for b in range(2):
        for row in range(2):
            for column in range(3):
                patch = masks[b, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].flatten().tolist()
                assert counts[6 * b + 3 * row + column].tolist() == [patch.count(k) for k in range(3)]


def test_scores_equal_loops_over_pixels():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 5, (20, 4), generator=generator, dtype=torch.int32)
    pixels[:, 3] = 0  # a class that no mask holds
    predicted = torch.randint(0, 3, (20,), generator=generator)
    pairs = [
        (k, int(p)) for counts, p in zip(pixels, predicted, strict=True) for k in range(4) for _ in range(counts[k])
    ]
    ious = []
    for k in range(3):
        either = sum(k in pair for pair in pairs)
        ious.append(sum(pair == (k, k) for pair in pairs) / either)
    score = dense_score(pixels, predicted)
    assert score.miou == pytest.approx(100 * np.mean(ious))
    assert score.accuracy == pytest.approx(100 * np.mean([a == b for a, b in pairs]))


def test_patches_that_tell_their_class_are_named():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (200,), generator=generator)
    pixels = 16 * torch.nn.functional.one_hot(labels, 3).int()
    pixels[::10] = 0  # ignored
    tokens = torch.randn(200, 6, generator=generator) * 0.1 + torch.nn.functional.one_hot(labels, 6)
    train, val = Patches(tokens[:150], pixels[:150]), Patches(tokens[150:], pixels[150:])
    assert all(len(each) == 60 for each in train.labelled(60, seed=0))
    assert all(len(each) == 135 for each in train.labelled(1000, seed=0))
    scores = dense_probe(train, val, 100, 5, 0.07, seed=0)
    assert scores["dense_knn"] == scores["dense_logistic"] == (100.0, 100.0)
    with pytest.raises(UserError, match="--dense: all pixels of a split are ignored"):
        dense_probe(train, Patches(tokens, 0 * pixels), 100, 5, 0.07, seed=0)


def test_the_script_probes_masks(tmp_path, pretrain, class_folders, scenes, monkeypatch, capsys):
    pretrain("--data_path", class_folders, "--max_steps 1")
    command = ["probe.py", tmp_path / "run" / "checkpoint-0-step1.pth", "--dense", "--output_dir", tmp_path / "probed"]
    monkeypatch.setattr(sys, "argv", [*map(str, command), "--data_path", str(scenes)])
    run_main("probe.py", scripts.probe.main)
    (result,) = read_results(tmp_path / "probed")
    names = [f"{row}/{probe}" for row in ("random", "student", "momentum") for probe in ("dense_knn", "dense_logistic")]
    assert list(result["metrics"]) == names
    assert all(0 < value <= 100 for value in result["metrics"].values())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--dense", "--dense: add --data_path with the images and masks"),
        ("--dense --data_path . --attentive", "--dense: leave out --sweep and --attentive"),
        ("--dense --data_path . --dense_patches 0", "--dense_patches 0: must be 1 or more"),
    ],
)
def test_a_wrong_value_is_one_line(monkeypatch, capsys, flags, message):
    monkeypatch.setattr(sys, "argv", ["probe.py", "checkpoint.pth", *flags.split()])
    with pytest.raises(SystemExit):
        run_main("probe.py", scripts.probe.main)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
