"""Reconstructions: numbers against the loss, masks from seeds, files of other programs, animations, errors."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models_lut import mask_from_noise
from models_simmim import SimMIM
from scripts import visualize
from shared.checkpoints import save_lut, shaken
from shared.images import write_images
from util.analysis.images import find_images
from util.analysis.reconstruction import (
    hidden_error,
    open_autoencoder,
    reconstruct,
    reconstruction_figure,
    reconstructions,
)
from util.config.groups import as_dict
from util.config.pretrain import PretrainConfig
from util.runtime.errors import UserError, run_main
from util.runtime.files import ROOT

DATA = ROOT / "tests" / "files"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return save_lut(tmp_path_factory.mktemp("lut") / "checkpoint-7.pth")


def opened(path, target="run", size=(), heads=(None, None)):
    return open_autoencoder(Path(path), target, size, heads, CPU)


@pytest.mark.parametrize("target", ["normalised", "pixels"])
def test_the_error_is_the_loss_of_training(run, target):
    vit = opened(run, target)
    images, noise = torch.randn(3, 1, 32, 32), torch.rand(3, 16)
    mask, prediction = reconstruct(vit.model, images, noise, 0.5)
    errors = hidden_error(vit.model, images, mask, prediction)
    vit.model.mask_ratio = 0.5
    for i in range(3):
        loss = vit.model(images[None, i : i + 1], noise[i : i + 1]).mim.item()
        assert errors[i] == pytest.approx(loss, rel=1e-4)


def save_simmim(path: Path, **changes) -> Path:
    """Save a checkpoint of SimMIM, hidden in squares of two by two patches, as pre-training writes it."""
    settings = PretrainConfig(model="lut_vit_nano_patch4", method="simmim", alpha=0, in_chans=1, **changes)
    student = shaken(SimMIM(**settings.model_arguments))
    torch.save({"model": student.state_dict(), "config": as_dict(settings)}, path)
    return path


def test_simmim_reconstructs_too_by_its_own_loss_and_squares(tmp_path):
    vit = opened(save_simmim(tmp_path / "checkpoint-0.pth"))
    images, noise = torch.randn(2, 1, 32, 32), torch.rand(2, 64)
    mask, prediction = reconstruct(vit.model, images, noise, 0.6)
    assert {int(square.sum()) for square in mask.view(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 4)} == {0, 4}
    errors = hidden_error(vit.model, images, mask, prediction)
    vit.model.mask_ratio = 0.6
    for i in range(2):
        loss = vit.model(images[None, i : i + 1], noise[i : i + 1]).mim.item()
        assert errors[i] == pytest.approx(loss, rel=1e-4)
    digits = find_images((), "", "digits", "val", most=1, show=1, seed=0)
    figure = reconstruction_figure(vit, digits, reconstructions(vit, digits, (0.6,), (0,)), "title")
    assert "mean absolute error" in " ".join(figure.get_supxlabel().split())
    with pytest.raises(UserError, match=r"--mask_ratio 0\.97: leaves 0 of 16 squares visible"):
        reconstructions(vit, digits, (0.97,), (0,))
    with pytest.raises(UserError, match="--input_size 36: patches are hidden in squares of 8 pixels"):
        opened(tmp_path / "checkpoint-0.pth", size=(36,))


def test_masks_follow_from_seed_and_ratio_and_the_model_keeps_its_own(run):
    vit = opened(run)
    images = find_images((), "", "digits", "val", most=2, show=2, seed=0)
    own = vit.model.mask_ratio
    pictures = reconstructions(vit, images, (0.5, 0.75), (0, 1))
    assert vit.model.mask_ratio == own
    assert [(e.image, e.mask_ratio, e.seed) for e in pictures] == [
        (i, ratio, seed) for i in (0, 1) for ratio in (0.5, 0.75) for seed in (0, 1)
    ]
    again = reconstructions(vit, images, (0.75,), (1,))
    assert np.array_equal(again[1].cells, pictures[7].cells)
    noise = torch.rand(2, 16, generator=torch.Generator().manual_seed(1))
    hidden = mask_from_noise(noise, 0.75).mask[1].reshape(4, 4).bool()
    for row in range(4):
        for column in range(4):
            patch = (slice(8 * row, 8 * row + 8), slice(8 * column, 8 * column + 8))
            original, masked, _, pasted = (cell[patch] for cell in pictures[7].cells)
            if hidden[row, column]:
                assert set(masked.ravel().tolist()) == {128}
            else:
                assert np.array_equal(masked, original)
                assert np.array_equal(pasted, original)


def test_the_caption_says_whose_brightness_is_shown(run):
    images = find_images((), "", "digits", "val", most=1, show=1, seed=0)
    for target, caption in (
        ("normalised", "are therefore true, only its pattern is the model's"),
        ("pixels", "predicts pixels"),
    ):
        vit = opened(run, target)
        figure = reconstruction_figure(vit, images, reconstructions(vit, images, (0.75,), (0,)), "title")
        assert caption in " ".join(figure.get_supxlabel().split())


@pytest.mark.parametrize("name", ["mae_full_tiny", "release_lut_tiny"])
def test_files_of_other_programs(name):
    vit = opened(DATA / f"{name}.pth", "pixels", heads=(3, 2))
    state = torch.load(DATA / f"{name}.pth", weights_only=False)["model"]
    for tensor_name, tensor in vit.model.state_dict().items():
        assert torch.equal(tensor, state[tensor_name])
    assert not vit.model.norm_pix_loss


def test_positions_of_encoder_and_decoder_fit_another_size(run):
    vit = opened(run, size=(48, 32))
    assert (vit.size, vit.model.num_patches) == ((48, 32), 24)
    images = find_images((), "", "digits", "val", most=1, show=1, seed=0)
    assert reconstructions(vit, images, (0.75,), (0,))[0].cells.shape == (4, 48, 32, 3)


# ---- the script --------------------------------------------------------------------------------------------


@pytest.fixture
def run_visualize(monkeypatch, capsys):
    """Call scripts/visualize.py: exit status and stderr."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["visualize.py", *map(str, arguments)])
        try:
            run_main("visualize.py", visualize.main)
        except SystemExit as stop:
            return stop.code, capsys.readouterr().err
        return 0, capsys.readouterr().err

    return call


def test_a_picture_of_image_files_and_the_errors_beside_it(run_visualize, run, tmp_path):
    files = write_images(tmp_path / "in", 2)
    output = tmp_path / "new" / "picture.png"
    flags = ("--image", *files, "--mask_ratio", 0.5, 0.75, "--seed", 3, "--output", output)
    assert run_visualize(run, *flags) == (0, "")
    width, height = Image.open(output).size
    assert height > width  # four rows of four, with words
    entries = json.loads(output.with_suffix(".json").read_text())["reconstructions"]
    assert [(e["image"], e["mask_ratio"], e["seed"]) for e in entries] == [
        (str(file), ratio, 3) for file in files for ratio in (0.5, 0.75)
    ]
    assert all(e["error"] > 0 for e in entries)


def test_an_animation_has_a_frame_for_each_checkpoint(run_visualize, pretrain, tmp_path, class_folders):
    pretrain("--data_path", class_folders, "--epochs 3 --save_periods last every_1_epochs")
    output = tmp_path / "growth.gif"
    assert run_visualize("--animate", tmp_path / "run", "--show", 1, "--output", output)[0] == 0
    with Image.open(output) as gif:
        assert gif.n_frames == 3
        durations = []
        for number in range(3):
            gif.seek(number)
            durations.append(gif.info["duration"])
    assert durations == [500, 500, 2500]
    entries = json.loads(output.with_suffix(".json").read_text())["reconstructions"]
    assert [e["checkpoint"] for e in entries] == [f"checkpoint-{n}.pth" for n in range(3)]


def test_wrong_input_is_one_line(run_visualize, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fake.png").write_text("words")
    (tmp_path / "empty").mkdir()
    mae = DATA / "mae_full_tiny.pth"
    for flags, message in (
        ((DATA / "mae_encoder_only_tiny.pth",), "holds no decoder"),
        ((run, "--image", "fake.png"), "--image fake.png: cannot be read"),
        ((run, "--mask_ratio", 0.99), "--mask_ratio 0.99: leaves 0 of 16 patches visible"),
        ((run, "--mask_ratio", 1.5), "must lie between 0 and 1"),
        ((mae, "--num_heads", 3, "--decoder_num_heads", 2), "--target run: the file does not say"),
        ((mae, "--num_heads", 3, "--target", "pixels"), "--decoder_num_heads: no known decoder is 16 wide"),
        ((mae, "--num_heads", 3, "--decoder_num_heads", 3, "--target", "pixels"), "does not divide"),
        ((), "give CHECKPOINT or --animate RUN"),
        ((run, "--animate", "empty"), "give CHECKPOINT or --animate RUN"),
        (("--animate", "empty"), "holds 0 complete checkpoints, two are needed"),
        ((run, "--output", "x.jpg"), "--output x.jpg: must end in .png"),
        ((run, "--output", "/proc/none/x.png"), "cannot be written"),
    ):
        status, error = run_visualize(*flags)
        assert status == 2, flags
        assert error.count("\n") == 1
        assert message in error
