"""Runs with a relative position bias: resume, --eval, another input size, processes, older checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from models_position_bias import TABLE
from shared.flags import TINY_CLASSIFIER, TINY_SEGMENTER
from shared.ranks import Ranks
from util.results.results import read_results
from util.weights.checkpoint import load_checkpoint

ADDED = ["--drop_path 0 --rel_pos_bias per_block --layer_scale 1 --auxiliary_width 6"]


def values(log: list[dict], name: str) -> list[float]:
    return [line[name] for line in log if name in line]


def newest(run: Path) -> dict:
    return load_checkpoint(max(run.glob("checkpoint-*.pth"), key=lambda path: path.stat().st_mtime))


def tables(checkpoint: dict) -> dict[str, torch.Tensor]:
    return {name: x for name, x in checkpoint["model"].items() if name.endswith(TABLE)}


def test_a_trained_bias_survives_resume_eval_and_another_size(segment, scenes, tmp_path, capsys):
    data = ["--data_path", scenes]
    expected = segment(*data, *ADDED, output=tmp_path / "whole")
    segment(*data, *ADDED, "--max_steps 3", output=tmp_path / "parts")
    log = segment(*data, *ADDED, "--auto_resume", output=tmp_path / "parts")
    assert values(log, "loss") == values(expected, "loss")
    uninterrupted, parts = (newest(tmp_path / run) for run in ("whole", "parts"))
    assert len(tables(uninterrupted)) == 6
    assert all(x.abs().sum() > 0 for x in tables(uninterrupted).values())
    assert all(torch.equal(x, parts["model"][name]) for name, x in uninterrupted["model"].items())

    trained = next((tmp_path / "whole").glob("checkpoint-*-step5.pth"))
    segment(*data, "--eval --resume", trained, output=tmp_path / "evaluated")  # the settings are the checkpoint's
    (result,) = read_results(tmp_path / "evaluated")
    assert result["metrics"]["miou"] == pytest.approx(values(expected, "miou")[-1], abs=1e-3)
    capsys.readouterr()
    segment(*data, "--eval --input_size 48 --resume", trained, output=tmp_path / "larger")
    printed = capsys.readouterr().out
    assert f"blocks.5.attn.{TABLE}: interpolated" in printed
    (larger,) = read_results(tmp_path / "larger")
    assert larger["metrics"]["miou"] != result["metrics"]["miou"]


def test_fine_tuning_with_a_shared_bias_is_evaluated_with_it(finetune, class_folders, tmp_path):
    log = finetune("--data_path", class_folders, "--rel_pos_bias shared --blr 1e-2", output=tmp_path / "tuned")
    checkpoint = newest(tmp_path / "tuned")
    assert [*tables(checkpoint)] == [f"rel_pos_bias.{TABLE}"]
    assert tables(checkpoint)[f"rel_pos_bias.{TABLE}"].abs().sum() > 0
    last = next((tmp_path / "tuned").glob("checkpoint-1.pth"))
    finetune("--data_path", class_folders, "--eval --resume", last, output=tmp_path / "evaluated")
    (result,) = read_results(tmp_path / "evaluated")
    assert result["metrics"]["val_loss"] == pytest.approx(values(log, "val_loss")[-1], rel=1e-5)


def test_a_run_from_before_the_setting_existed_goes_on_without_it(segment, scenes, tmp_path, capsys):
    segment("--data_path", scenes, "--max_steps 3")
    (path,) = (tmp_path / "run").glob("checkpoint-*-step3.pth")
    checkpoint = load_checkpoint(path)
    for name in ("rel_pos_bias", "layer_scale", "auxiliary_width"):
        del checkpoint["binding_settings"][name]
    torch.save(checkpoint, tmp_path / "old.pth")
    resumed = ["--data_path", scenes, "--resume", tmp_path / "old.pth"]
    assert len(values(segment(*resumed, output=tmp_path / "new"), "loss")) == 2
    with pytest.raises(SystemExit):
        segment(*resumed, "--rel_pos_bias shared", output=tmp_path / "other")
    assert "rel_pos_bias is shared here but none in the checkpoint" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("kind", ["per_block", "shared"])
def test_two_processes_train_as_one_does(segment, scenes, tmp_path, parallel, kind):
    flags = ["--data_path", scenes, "--drop_path 0 --dropout 0 --layer_scale 1 --rel_pos_bias", kind]
    expected = values(segment(*flags, output=tmp_path / "one"), "loss")
    arguments = ["main_segment.py", *TINY_SEGMENTER.split(), *" ".join(map(str, flags)).split(), "--batch_size", "2"]
    with Ranks([*arguments, "--parallel", parallel, "--output_dir", tmp_path / "two"], 2) as ranks:
        assert [status for status, _ in ranks.finish()] == [0, 0]
    log = [json.loads(line) for line in (tmp_path / "two" / "log.jsonl").read_text().splitlines()]
    assert values(log, "loss") == pytest.approx(expected, abs=2e-5)
    one, two = (tables(newest(tmp_path / run)) for run in ("one", "two"))
    for name, table in one.items():
        torch.testing.assert_close(two[name], table, atol=2e-4, rtol=0)


@pytest.mark.slow
def test_compiled_blocks_train_as_eager_ones_do(finetune, class_folders, tmp_path):
    assert "--amp fp32" in TINY_CLASSIFIER
    flags = ["--data_path", class_folders, "--drop_path 0 --rel_pos_bias per_block --epochs 1 --warmup_epochs 0"]
    logs = [finetune(*flags, *more, output=tmp_path / str(len(more))) for more in ([], ["--compile block"])]
    assert values(logs[1], "loss") == pytest.approx(values(logs[0], "loss"), rel=1e-3)
