"""Own small data: a held-out share for the monitor, defaults that shrink, and what a dry run reads."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from scripts import probe as probe_script
from shared.calls import one_line, script_caller
from shared.checkpoints import save_lut
from util.config.classifier import FinetuneConfig, LinprobeConfig
from util.config.pretrain import PretrainConfig
from util.runtime.errors import UserError


def metrics_of(run):
    return json.loads((run / "results.jsonl").read_text().splitlines()[-1])["metrics"]


def test_the_monitor_evaluates_training_images_that_are_held_out(pretrain, class_folders, tmp_path, capsys):
    (class_folders / "val").rename(tmp_path / "elsewhere")
    pretrain("--data_path", class_folders, "--holdout .25 --monitor_freq 1 --epochs 1")
    assert "24 images, 3 updates of 8 per epoch" in capsys.readouterr().out
    assert {"knn", "linear"} <= metrics_of(tmp_path / "run").keys()


def test_a_held_out_share_needs_labels(pretrain, flat_folder, capsys):
    with pytest.raises(SystemExit) as stop:
        pretrain("--data_path", flat_folder, "--holdout .25 --dataset")
    assert stop.value.code == 2


@pytest.mark.parametrize(
    ("settings", "epochs", "warmup"),
    [
        (PretrainConfig, 400, 40),
        (PretrainConfig, 40, 40),
        (PretrainConfig, 20, 2),
        (FinetuneConfig, 100, 5),
        (FinetuneConfig, 1, 0.05),
        (LinprobeConfig, 90, 10),
        (LinprobeConfig, 5, 0.5),
    ],
)
def test_a_default_warm_up_that_does_not_fit_shrinks_with_the_epochs(settings, epochs, warmup):
    assert settings(epochs=epochs).resolved_warmup_epochs == pytest.approx(warmup)


def test_a_warm_up_that_is_given_does_not_shrink():
    with pytest.raises(UserError) as error:
        PretrainConfig(epochs=20, warmup_epochs=40.0)
    assert "--warmup_epochs 40.0: must lie in 0..--epochs 20" in one_line(error)


def test_a_dry_run_reads_the_weights_and_the_validation_images(pretrain, class_folders, tmp_path, capsys):
    save_lut(tmp_path / "grey.pth")  # one channel
    pretrain(
        "--data_path", class_folders, "--monitor_freq 1 --dry_run --head_mlp_dim 16 --init_from", tmp_path / "grey.pth"
    )
    out = capsys.readouterr().out
    assert "NOTE: the checkpoint has another patch, image size or number of channels: " in out
    assert "1 to 3 channels" in out
    assert "validation       16 images" in out


@pytest.mark.parametrize("flags", ["--init_from nothing.pth", "--val_path nowhere"])
def test_a_dry_run_refuses_what_the_run_would(pretrain, class_folders, capsys, flags):
    with pytest.raises(SystemExit) as stop:
        pretrain("--data_path", class_folders, "--monitor_freq 1 --dry_run", flags)
    assert stop.value.code == 2
    assert flags in capsys.readouterr().err


@pytest.mark.parametrize("more", ["", "--attentive_queries 2 --no_attentive_projections"])
def test_an_attentive_probe_trains_its_head_alone_and_is_evaluated(linprobe, class_folders, tmp_path, capsys, more):
    flags = f"--pool attentive {more} --epochs 2"
    linprobe("--data_path", class_folders, flags)
    checkpoint = torch.load(tmp_path / "run" / "checkpoint-1.pth", weights_only=True)
    assert any(name.startswith("head.query") for name in checkpoint["model"])
    trained = metrics_of(tmp_path / "run")["top1"]
    capsys.readouterr()
    linprobe("--eval --resume", tmp_path / "run" / "checkpoint-1.pth", "--data_path", class_folders)
    assert f"top-1 {trained:.2f} %" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(attentive_queries=2), "--attentive_queries 2: add --pool attentive"),
        (dict(attentive_queries=0, pool="attentive"), "--attentive_queries 0: must be 1 or more"),
        (dict(attentive_projections=False), "--no_attentive_projections: add --pool attentive"),
        (dict(pool="avg", global_pool=True), "--pool avg: leave out --global_pool"),
    ],
)
def test_wrong_settings_of_a_probe_are_one_line(settings, message):
    with pytest.raises(UserError) as error:
        LinprobeConfig(**settings)
    assert message in one_line(error)


def test_segmentation_evaluates_training_images_that_are_held_out(segment, scenes, tmp_path, capsys):
    shutil.rmtree(scenes / "images" / "val")
    shutil.rmtree(scenes / "masks" / "val")
    segment("--data_path", scenes, "--holdout .2 --max_updates 2 --warmup_updates 1")
    out = capsys.readouterr().out
    assert "training: 8 masks" in out
    assert "validation: 2 masks" in out
    assert "miou" in metrics_of(tmp_path / "run")


def test_a_probe_holds_out_a_share_of_each_class(class_folders, tmp_path, monkeypatch, capsys):
    shutil.rmtree(class_folders / "val")
    probe = script_caller(monkeypatch, capsys, tmp_path, probe_script)
    checkpoint = save_lut(tmp_path / "checkpoint-1.pth")
    status, out, error = probe(
        f"{checkpoint} --data_path {class_folders} --holdout .25 --labels_per_class 0 --device cpu"
    )
    assert status == 0, error
    assert "24 training and 8 validation images" in out
