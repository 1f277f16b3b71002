"""scripts/probe.py: its table, its files, its errors, and the names of its metrics."""

from __future__ import annotations

import json
import sys

import pytest
import torch

import scripts.probe
from util.analysis.head_sweep import KINDS
from util.results.results import read_results
from util.runtime.errors import run_main
from util.runtime.files import ROOT
from util.weights.checkpoint import load_checkpoint


@pytest.fixture
def run_probe(monkeypatch, capsys):
    def call(*arguments) -> str:
        monkeypatch.setattr(sys, "argv", ["probe.py", *map(str, arguments)])
        run_main("probe.py", scripts.probe.main)
        return capsys.readouterr().out

    return call


def test_the_table_of_a_run(tmp_path, pretrain, class_folders, run_probe):
    pretrain("--data_path", class_folders, "--max_steps 1")
    checkpoint = tmp_path / "run" / "checkpoint-0-step1.pth"
    folder = tmp_path / "new" / "probed"
    flags = ["--knn_k", 5, "--labels_per_class", 4, "--sweep", "--sweep_epochs", 2]
    run_probe(checkpoint, *flags, "--output_dir", folder)
    (result,) = read_results(folder)
    columns = ("knn", "logistic_4_per_class", "logistic", "linear_sweep")
    assert result["stage"] == "probe"
    assert list(result["metrics"]) == [f"{row}/{name}" for row in ("random", "student", "momentum") for name in columns]
    assert all(0 <= value <= 100 for value in result["metrics"].values())


def test_a_file_of_another_program_tells_its_patches_and_channels(tmp_path, pretrain, class_folders, run_probe):
    pretrain("--data_path", class_folders, "--max_steps 1 --in_chans 1 --mean 0.3 --std 0.2")  # patches of 8
    checkpoint, bare = tmp_path / "run" / "checkpoint-0-step1.pth", tmp_path / "bare.pth"
    torch.save({"model": load_checkpoint(checkpoint)["model"]}, bare)
    flags = ("--labels_per_class", 0, "--encoders", "student", "--output_dir", tmp_path / "probed")
    run_probe(checkpoint, *flags)
    of_another = ("--model", "mae_vit_nano_patch4", "--data_path", class_folders, "--mean", 0.3, "--std", 0.2)
    run_probe(bare, *flags, *of_another)
    of_run, of_file = read_results(tmp_path / "probed")
    assert of_file["metrics"] == of_run["metrics"]


def test_a_file_of_another_program_needs_a_model_and_images(tmp_path, pretrain, class_folders, run_probe, capsys):
    pretrain("--data_path", class_folders, "--max_steps 1 --patch_size 4")
    bare = tmp_path / "bare.pth"
    torch.save({"model": load_checkpoint(tmp_path / "run" / "checkpoint-0-step1.pth")["model"]}, bare)
    capsys.readouterr()
    flags = ("--model", "mae_vit_nano_patch4", "--data_path", class_folders, "--labels_per_class", 0, "--no_logistic")
    of_run = run_probe(tmp_path / "run" / "checkpoint-0-step1.pth", *flags).splitlines()
    of_file = run_probe(bare, *flags).splitlines()
    assert [line.split()[0] for line in of_run[2:]] == ["random", "student", "momentum"]
    assert [line.split()[0] for line in of_file[2:]] == ["random", "student"]  # there is no momentum encoder in it
    assert of_file[3] == of_run[3]
    assert len(run_probe(bare, *flags, "--pool", "token").splitlines()) == 4
    with pytest.raises(SystemExit):
        run_probe(bare, "--data_path", class_folders)
    assert "add --model with its name" in capsys.readouterr().err


def test_how_many_images_are_looked_at_is_said(tmp_path, pretrain, class_folders, run_probe, capsys):
    pretrain("--data_path", class_folders, "--max_steps 1")
    checkpoint = tmp_path / "run" / "checkpoint-0-step1.pth"
    capsys.readouterr()
    flags = ("--most_images", 8, "--no_logistic", "--encoders", "student")
    printed = run_probe(checkpoint, *flags, "--labels_per_class", 0)
    assert "8 of 32 training and 8 of 16 validation images" in printed
    assert "--most_images 8: the other images are not used" in printed
    for flag in ("--sweep", "--attentive"):
        with pytest.raises(SystemExit):
            run_probe(checkpoint, "--most_images", 3, *flags[2:], "--labels_per_class", 0, flag)
        printed = capsys.readouterr()
        assert f"{flag}: a class has a single training image" in printed.err
        assert printed.err.strip().endswith("; or raise --most_images 3")
        assert not printed.out  # nothing was computed for it


def test_few_labels_shrink_to_the_smallest_class(tmp_path, pretrain, class_folders, run_probe):
    pretrain("--data_path", class_folders, "--max_steps 1")
    checkpoint, folder = tmp_path / "run" / "checkpoint-0-step1.pth", tmp_path / "probed"
    flags = ("--no_logistic", "--encoders", "student", "--repeats", 2, "--output_dir", folder)
    printed = run_probe(checkpoint, *flags, "--labels_per_class", 500)
    assert "--labels_per_class 500: the smallest class has 16 training images, so 16 of each class are used" in printed
    assert "logistic, 16 labels/class" in printed
    assert "no row of a random encoder" in printed
    run_probe(checkpoint, *flags, "--labels_per_class", 16)
    asked, exact = read_results(folder)
    assert asked["metrics"] == exact["metrics"]
    assert set(exact["metrics"]) == {"student/knn", "student/logistic_16_per_class"}


def test_attentive_heads_stand_beside_a_random_encoder_s(tmp_path, pretrain, class_folders, run_probe, capsys):
    pretrain("--data_path", class_folders, "--max_steps 1")
    checkpoint, folder = tmp_path / "run" / "checkpoint-0-step1.pth", tmp_path / "probed"
    flags = ("--labels_per_class", 0, "--no_logistic", "--attentive", "--attentive_epochs", 2, "--output_dir", folder)
    printed = run_probe(checkpoint, *flags)
    assert "linear on cls" in printed
    run_probe(checkpoint, *flags, "--token_memory", 0)  # encoded in each epoch
    run_probe(checkpoint, *flags, "--attentive_augment", "--attentive_queries", 2, "--no_attentive_projections")
    stored, encoded, augmented = (line["metrics"] for line in read_results(folder))
    names = {f"{row}/{kind}" for row in ("random", "student", "momentum") for kind in KINDS}
    assert names <= stored.keys()
    assert stored == encoded
    assert augmented.keys() == stored.keys()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run_probe(checkpoint, *flags, "--attentive_queries", 5, "--no_attentive_projections")
    error = capsys.readouterr().err.splitlines()[-1]
    assert "--attentive_queries 5: does not divide the width of the tokens, 96" in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--attentive_queries 0", "--attentive_queries 0: must be 1 or more"),
        ("--attentive_epochs 0", "--attentive_epochs 0: must be 1 or more"),
        ("--attentive_batch_size 1", "--attentive_batch_size 1: must be 2 or more"),
        ("--attentive_lr 0 0.1", "--attentive_lr 0.0 0.1: must be above 0"),
        ("--attentive_lr", "--attentive_lr"),
        ("--attentive_weight_decay -1", "--attentive_weight_decay -1.0: must be 0 or more"),
        ("--attentive_seed -1", "--attentive_seed -1: must lie in 0..2^32 - 1"),
        ("--token_memory -1", "--token_memory -1.0: must be 0 or more"),
        ("--token_memory much", "--token_memory"),
        ("--sweep_weight_decay -1", "--sweep_weight_decay -1.0: must be 0 or more"),
    ],
)
def test_a_wrong_value_is_one_line(run_probe, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        run_probe("checkpoint.pth", *flags.split())
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.count("\n") == 1
    assert message in error


def test_another_data_set_than_the_run_s(tmp_path, pretrain, class_folders, run_probe):
    pretrain("--data_path", class_folders, "--max_steps 1 --in_chans 1 --no_photometric")
    checkpoint = tmp_path / "run" / "checkpoint-0-step1.pth"
    flags = ("--dataset", "digits", "--labels_per_class", 0, "--no_logistic", "--encoders", "student")
    assert "1437 training and 360 validation images" in run_probe(checkpoint, *flags)


@pytest.mark.parametrize("prefix", ["mae_", "lut_"])
def test_a_classifier_may_be_named_as_its_pretraining(tmp_path, finetune, class_folders, run_probe, prefix):
    finetune("--data_path", class_folders, f"--max_steps 1 --cls_token --model {prefix}vit_nano_patch4")
    flags = ("--labels_per_class", 0, "--no_logistic", "--encoders", "student")
    assert "lut_vit_nano_patch4, 32 training" in run_probe(tmp_path / "run" / "checkpoint-0-step1.pth", *flags)


def test_a_classifier_s_run_says_what_its_encoder_is(tmp_path, finetune, class_folders, run_probe):
    finetune("--data_path", class_folders, "--max_steps 1 --cls_token --mean 0.2 0.3 0.4")
    checkpoint = tmp_path / "run" / "checkpoint-0-step1.pth"
    flags = ("--labels_per_class", 0, "--encoders", "student", "--output_dir", tmp_path / "probed")
    run_probe(checkpoint, *flags)
    given = ("--model", "mae_vit_nano_patch4", "--data_path", class_folders, "--mean", 0.2, 0.3, 0.4)
    run_probe(checkpoint, *flags, *given)
    of_run, of_flags = read_results(tmp_path / "probed")
    assert of_run["metrics"] == of_flags["metrics"]


# ---- metrics --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("random, kNN, k 5", "random/knn"),
        ("student, kNN, k 20", "student/knn"),
        ("student, logistic, all labels", "student/logistic"),
        ("student, logistic, 10 labels/class", "student/logistic_10_per_class"),
        ("momentum encoder, linear, sweep", "momentum/linear_sweep"),
        ("student/attentive", "student/attentive"),
        ("top1", "top1"),
    ],
)
def test_old_names_of_metrics_are_read_as_identifiers(tmp_path, old, new):
    line = {"stage": "probe", "metrics": {old: 12.5}, "config": {}}
    (tmp_path / "results.jsonl").write_text(json.dumps(line) + "\n")
    assert read_results(tmp_path)[0]["metrics"] == {new: 12.5}


def test_kept_results_of_probes_open_under_the_names_of_today():
    folders = [path.parent for path in (ROOT / "docs" / "results").rglob("probe/results.jsonl")]
    names = {name for folder in folders for line in read_results(folder) for name in line["metrics"]}
    assert names == {f"{encoder}/{probe}" for encoder in ("student", "momentum") for probe in ("knn", "logistic")}
