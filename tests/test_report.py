"""Runs read back, curves thinned, tables filled, and the report's page without a browser."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from conftest import TINY_SEGMENTER, one_line, script_caller
from models_upernet import UperNet
from runs import complete, pretraining_lines, write_run
from scripts import report as script
from test_analyze import save_lut
from util import report as report_module
from util.classifier_config import FinetuneConfig, LinprobeConfig
from util.command_line import parse_config
from util.config import as_dict
from util.curves import METRICS, Thinned, curves_of, metrics_of, points_per_curve, thin
from util.errors import UserError
from util.figures import HEAT_ALPHA, HEAT_GROUND, heat_over
from util.logs import RunLog
from util.paper_rows import paper_tables
from util.pretrain_config import PretrainConfig
from util.report import report
from util.report_parts import card, commands, differing_settings, environment_rows, speed_rows, summary_rows
from util.run_folder import Curve, open_runs, read_run
from util.segment_config import SegmentConfig
from util.thumbnails import evenly, film

# ---- folders -----------------------------------------------------------------------------------------------


def test_a_run_is_read_as_it_was_written(tmp_path):
    lines = pretraining_lines(epochs=2, updates_per_epoch=5, every=2)
    run = read_run(write_run(tmp_path / "a", lines, pictures=(0, 2), finished={"knn": 21.0}), "a")
    assert (run.stage, run.updates, run.updates_per_epoch, run.total_updates, run.finished) == (
        "pretrain",
        10,
        5,
        10,
        True,
    )
    assert run.curves["knn"].steps.tolist() == [0, 5, 10]
    assert run.curves["knn"].values.tolist() == [11, 20, 21]
    assert run.curves["mim"].steps.tolist() == [2, 4, 5, 6, 8, 10]
    assert "epoch" not in run.curves
    assert run.clock.steps.tolist() == [0, 2, 4, 5, 6, 8, 10]
    assert run.clock.last == 21.0
    assert [(epoch, path.name) for epoch, path in run.pictures["reconstruction"]] == [
        (0, "reconstruction-0000.png"), (2, "reconstruction-0002.png")
    ]  # fmt: skip
    assert run.remarks == ()


def test_a_run_under_way_a_cut_line_and_lines_that_are_none(tmp_path):
    folder = write_run(tmp_path / "a", pretraining_lines(2, 5)[:8])
    with (folder / "log.jsonl").open("a") as file:
        file.write('[1]\n{"step": 7, "loss": "nan", "epoch": 1, "lr": 1}\n{"step": 8, "lo')
    run = read_run(folder, "a")
    assert (run.updates, run.updates_per_epoch, run.total_updates, run.finished) == (7, 5, 10, False)
    assert np.isnan(run.curves["loss"].last)
    assert run.remarks == (
        "line 9 of log.jsonl is damaged and left out",
        "line 11 of log.jsonl is cut short (it may be being written) and left out",
        "1 lines of the log have a loss that is not finite",
    )


def test_the_first_epoch_does_not_tell_how_long_it_is(tmp_path):
    lines = [line for line in pretraining_lines(1, 5) if line["step"] in (1, 2, 3)]
    run = read_run(write_run(tmp_path / "a", lines), "a")
    assert (run.updates_per_epoch, run.total_updates) == (None, None)
    done = read_run(write_run(tmp_path / "b", pretraining_lines(1, 5)), "b")
    assert done.updates_per_epoch == 5  # the monitor's line tells


def test_max_steps_cuts_an_epoch_short(tmp_path):
    config = as_dict(PretrainConfig(epochs=3, warmup_epochs=1, max_steps=3))
    lines = [*pretraining_lines(1, 5)[:4], {"step": 3, "epoch": 1, "rankme": 2.0}]
    run = read_run(write_run(tmp_path / "a", lines, config, finished={}), "a")
    assert (run.updates_per_epoch, run.total_updates, run.finished) == (None, 3, True)


def segmenting_lines(updates: int, per_epoch: int) -> list[dict]:
    """As a segmentation of so many updates logs them."""
    lines = []
    for step in range(1, updates + 1):
        epoch = (step - 1) // per_epoch
        about = {"step": step, "epoch": epoch, "seconds": 2.0 * step}
        lines.append(about | {"loss": 1.4, "main": 1.0, "auxiliary": 1.0, "lr": 1e-4})
        if step % per_epoch == 0 or step == updates:
            lines.append(about | {"epoch": epoch + 1, "miou": 40.0 + epoch, "aacc": 80.0, "macc": 50.0})
    return lines


@pytest.mark.parametrize(
    ("most", "done", "expected"),
    [
        (12, 7, (5, 12, False)),  # under way in its second epoch
        (7, 7, (5, 7, True)),  # the end is in the middle of an epoch
        (3, 3, (None, 3, True)),  # of the first one, of which nobody knows how long it is
        (5, 3, (None, 5, False)),
    ],
)
def test_max_updates_end_a_segmentation(tmp_path, most, done, expected):
    config = as_dict(SegmentConfig(data_path="scenes", max_updates=most, warmup_updates=0))
    lines = [line for line in segmenting_lines(most, 5) if line["step"] <= done]
    folder = write_run(tmp_path / "a", lines, config, stage="segment", finished={} if done == most else None)
    run = read_run(folder, "a")
    assert (run.updates_per_epoch, run.total_updates, run.finished) == expected
    shown = card(run, metrics_of([run]))
    if expected[2]:
        assert (shown.status, shown.done) == ("finished", None)
    else:
        assert f"{done} of {most} updates, left 0:00:{2 * (most - done):02}" in shown.status
        assert shown.done == pytest.approx(done / most)


def test_a_finished_run_that_was_prolonged_is_under_way(tmp_path):
    config = as_dict(PretrainConfig(epochs=4, warmup_epochs=1))
    assert not read_run(write_run(tmp_path / "a", pretraining_lines(2, 5), config, finished={}), "a").finished


@pytest.mark.parametrize(
    ("command", "results", "config", "stage"),
    [
        ("python main_segment.py", [], {}, "segment"),
        ("/code/main_pretrain.py --x", [], {}, "pretrain"),
        ("", ["linprobe-eval"], {}, "linprobe"),
        ("", [], {"mask_ratio": 0.75}, "pretrain"),
        ("", [], {"max_updates": 5}, "segment"),
        ("", [], {}, ""),
    ],
)
def test_the_stage_is_found_where_it_can_be(tmp_path, command, results, config, stage):
    folder = write_run(tmp_path / "a", [{"step": 1, "loss": 1.0}], config, command=command)
    lines = [json.dumps({"stage": name, "metrics": {}, "config": {}}) for name in results]
    (folder / "results.jsonl").write_text("\n".join(lines))
    assert read_run(folder, "a").stage == stage


def test_a_bare_log_is_enough(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 3, "loss": 2.0}\n')
    run = read_run(tmp_path, "a")
    assert run.remarks == ("config.yaml is missing", "run.json is missing")
    assert (run.clock, run.pictures, run.newest_checkpoint) == (None, {}, None)
    assert "Loss" in report([run], "a", None)


def test_what_resume_leaves_is_one_curve(tmp_path):
    for last in (4, 6):
        log = RunLog(tmp_path, None, enabled=True, resume_step=2 if last == 6 else 0)
        for step in range(1 if last == 4 else 3, last + 1):
            log.scalars(step, {"loss": 10 * last + step}, epoch=0)
        log.close()
    curve = read_run(tmp_path, "a").curves["loss"]
    assert curve.steps.tolist() == [1, 2, 3, 4, 5, 6]
    assert curve.values.tolist() == [41, 42, 63, 64, 65, 66]


def test_a_folder_stands_for_the_runs_below_it_and_names_tell_them_apart(tmp_path):
    for name in ("x/seed_0/pretrain", "x/seed_1/pretrain", "y"):
        write_run(tmp_path / name, [{"step": 1, "loss": 1.0}])
    runs = open_runs([str(tmp_path / "x"), str(tmp_path / "y"), str(tmp_path / "x" / "seed_0")])
    assert [run.label for run in runs] == ["seed_0/pretrain", "seed_1/pretrain", "y"]
    assert [run.label for run in open_runs([str(tmp_path / "y")], ["mine"])] == ["mine"]


# ---- curves ------------------------------------------------------------------------------------------------


def slow_thin(curve: Curve, most: int) -> list[tuple[float, float, float, float]]:
    """One group after the other."""
    n, found = len(curve.steps), []
    for group in range(most):
        inside = range(int(group * n / most), int((group + 1) * n / most) if group + 1 < most else n)
        values = [curve.values[i] for i in inside if np.isfinite(curve.values[i])]
        three = (np.mean(values), min(values), max(values)) if values else (np.nan,) * 3
        found.append((float(np.mean([curve.steps[i] for i in inside])), *three))
    return found


@given(
    st.lists(st.one_of(st.floats(-100, 100), st.sampled_from([np.nan, np.inf, -np.inf])), min_size=1, max_size=80),
    st.integers(1, 40),
)
def test_thinning_keeps_means_and_extremes(values, most):
    curve = Curve(np.arange(len(values)) * 3, np.array(values))
    thinned = thin(curve, most)
    if len(values) <= most:
        assert thinned == Thinned(curve.steps, curve.values)
        return
    expected = np.array(slow_thin(curve, most)).T
    for found, want in zip(dataclasses.astuple(thinned), expected, strict=True):
        np.testing.assert_allclose(found, want, rtol=1e-12, atol=1e-9)
    finite = curve.values[np.isfinite(curve.values)]
    if len(finite):
        assert np.nanmax(thinned.high) == finite.max()
        assert np.nanmin(thinned.low) == finite.min()


def test_best_values_ignore_what_is_not_finite():
    curve = Curve(np.array([1, 2, 3, 4]), np.array([np.inf, 2.0, 1.0, np.nan]))
    assert curve.best("lower") == (1.0, 3)
    assert curve.best("higher") == (2.0, 2)
    assert Curve(np.array([1]), np.array([np.nan])).best("lower") is None


def test_numbers_of_other_stages_are_shown_under_their_own_name(tmp_path):
    lines = [
        {"step": 1, "epoch": 0, "loss": 1.0, "aux_loss": 0.5},
        {"step": 1, "epoch": 1, "miou": 40.0, "road_iou": 9.0},
    ]
    run = read_run(write_run(tmp_path / "a", lines, {}, stage="segment"), "a")
    found = {name: (metric.title, metric.group) for name, metric in metrics_of([run]).items()}
    assert found["aux_loss"] == ("aux loss", "Training")
    assert found["road_iou"] == ("road iou", "What it has learned")
    assert found["miou"][0] == "Mean IoU"
    assert ["Mean IoU, best", "40.00 % (epoch 1)"] in summary_rows([run], metrics_of([run]))


def test_all_numbers_of_a_segmentation_are_known(tmp_path):
    config = as_dict(SegmentConfig(data_path="scenes", max_updates=5, warmup_updates=0))
    run = read_run(write_run(tmp_path / "a", segmenting_lines(5, 2), config, stage="segment"), "a")
    metrics = metrics_of([run])
    assert metrics.keys() - METRICS.keys() == set()
    assert {metrics[name].better for name in ("loss", "main", "auxiliary")} == {"lower"}
    assert ["Mean accuracy of the classes, best", "50.00 % (epoch 1)"] in summary_rows([run], metrics)
    assert differing_settings([run]) == [
        ["", "a", "default"], ["data_path", "scenes", "–"], ["max_updates", "5", "160000"],
        ["warmup_updates", "0", "1500"],
    ]  # fmt: skip


def test_what_the_page_draws_is_valid_json_in_the_units_it_names(tmp_path):
    lines = pretraining_lines(2, 5)
    lines[3]["loss"] = "nan"
    run = read_run(write_run(tmp_path / "a", lines), "a")
    data = json.loads(json.dumps(curves_of(run, metrics_of([run]), 100), allow_nan=False))
    assert data["curves"]["data_wait"]["y"][0] == 25
    assert data["curves"]["memory_bytes"]["y"][0] == 1
    assert data["curves"]["loss"]["y"][2] is None
    assert data["updatesPerEpoch"] == 5
    assert data["clock"]["seconds"][-1] == 21
    assert "low" not in data["curves"]["loss"]
    assert len(curves_of(run, metrics_of([run]), 4)["curves"]["loss"]["low"]) == 4


# ---- pictures ----------------------------------------------------------------------------------------------


def test_pictures_are_left_out_evenly():
    assert evenly(3, 5) == [0, 1, 2]
    assert evenly(101, 5) == [0, 25, 50, 75, 100]
    assert evenly(9, 1) == [8]


def test_a_film_fits_its_budget_and_skips_what_is_broken(tmp_path):
    rng = np.random.default_rng(0)
    paths = []
    for epoch in range(30):
        path = tmp_path / f"reconstruction-{epoch:04d}.png"
        Image.fromarray(rng.integers(0, 256, (8, 700, 3), dtype=np.uint8)).save(path)
        paths.append((epoch, path))
    (tmp_path / "reconstruction-0029.png").write_bytes(b"\x89PNG half of it")
    whole, broken = film(paths, 10**9)
    assert (len(whole), broken) == (23, ["reconstruction-0029.png"])
    assert whole[0][0] == 0
    for budget in (15_000, 3_000, 600):
        frames, _ = film(paths, budget)
        assert 0 < sum(len(data) for _, data in frames) <= budget
        assert {frames[-1][0], whole[-1][0]} == {whole[-1][0]}
    assert film(paths, 10)[0] == []


def test_heat_lies_over_the_grey_image_patch_by_patch():
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    image[..., 0] = 90
    found = heat_over(image, np.array([[0.0, 1.0], [2.0, 4.0]]))
    assert found.shape == (8, 8, 3)
    for rows in (slice(0, 4), slice(4, 8)):
        for columns in (slice(0, 4), slice(4, 8)):
            assert len(np.unique(found[rows, columns].reshape(-1, 3), axis=0)) == 1
    grey = (1 - HEAT_ALPHA) * HEAT_GROUND * 30
    assert np.allclose(found[0, 0], np.array([0, 0, 3]) * HEAT_ALPHA + grey, atol=3)  # inferno begins black
    assert found[7, 7].astype(int).sum() > found[7, 0].astype(int).sum() > found[0, 7].astype(int).sum()


# ---- words -------------------------------------------------------------------------------------------------


def test_only_settings_that_differ_are_rows(tmp_path):
    base = as_dict(PretrainConfig(epochs=2, warmup_epochs=1))
    a = read_run(write_run(tmp_path / "a", [{"step": 1, "loss": 1}], base), "a")
    other = base | {"alpha": 0.5, "input_size": [32, 64], "norm_pix_loss": True}
    b = read_run(write_run(tmp_path / "b", [{"step": 1, "loss": 1}], other), "b")
    assert differing_settings([a, b]) == [
        ["", "a", "b"], ["input_size", "–", "32 64"], ["norm_pix_loss", "no", "yes"], ["alpha", "–", "0.5"]
    ]  # fmt: skip
    assert differing_settings([a, a]) == []
    assert differing_settings([a]) == [["", "a", "default"], ["epochs", "2", "400"], ["warmup_epochs", "1", "40.0"]]
    tuned = as_dict(FinetuneConfig(epochs=3, warmup_epochs=1))  # of another stage: what only it has is no difference
    c = read_run(write_run(tmp_path / "c", [{"step": 1, "loss": 1}], tuned, stage="finetune"), "c")
    keys = [row[0] for row in differing_settings([a, c])]
    assert "epochs" in keys
    assert "drop_path" not in keys
    assert "mask_ratio" not in keys


def test_speed_and_environment(tmp_path):
    run = read_run(write_run(tmp_path / "a", pretraining_lines(2, 5)), "a")
    assert speed_rows([run])[1][:2] == ["a", "102.5"]
    assert speed_rows([run])[1][3:] == ["25 %", "1 GiB", "0:00:21"]
    rows = dict(environment_rows([run])[1:])
    assert {"commit", "torch", "Python", "CPU", "processes"} <= rows.keys()
    assert rows["processes"] == "1"
    assert "command" not in rows


def test_commands_repeat_the_run(tmp_path):
    config = as_dict(
        PretrainConfig(model="lut_vit_nano_patch4", patch_size=8, epochs=2, warmup_epochs=1, betas=(0.8, 0.9))
    )
    command = "/opt/python /home/me/main_pretrain.py --data_path 'two words'"
    run = read_run(write_run(tmp_path / "a b", [{"step": 1, "loss": 1}], config, command=command), "a")
    found = dict(commands(run))
    assert found["As it was last started"] == "python main_pretrain.py --data_path 'two words'"
    again = found["From its settings, whatever has become of the recipe"]
    assert again == f"python main_pretrain.py --recipe '{run.path}/config.yaml' --output_dir AGAIN"
    settings = parse_config(PretrainConfig, ["--recipe", str(run.path / "config.yaml"), "--output_dir", "AGAIN"], "x")
    assert as_dict(settings) == config | {"recipe": str(run.path / "config.yaml"), "output_dir": "AGAIN"}
    many = dataclasses.replace(run, info=run.info | {"processes": 8})
    assert dict(commands(many))["As it was last started"].startswith("torchrun --nproc_per_node=8 main_pretrain.py")


# ---- the paper's tables ------------------------------------------------------------------------------------


def paper_run(folder: Path, settings: type, flags: list[str], stage: str, finished: dict | None) -> Path:
    config = as_dict(parse_config(settings, flags, f"main_{stage}.py"))
    epochs = config.get("epochs", 1)
    lines = [{"step": config.get("max_updates", 5 * epochs), "epoch": epochs, "loss": 1.0}]
    return write_run(folder, lines, config, stage=stage, finished=finished)


def test_a_fine_tuned_run_stands_in_the_row_of_its_pre_training(tmp_path):
    before = paper_run(tmp_path / "lut", PretrainConfig, ["--recipe", "ablation_lut"], "pretrain", {})
    start = ["--finetune", str(before / "checkpoint-399.pth")]
    tuned = paper_run(
        tmp_path / "tuned", FinetuneConfig, ["--recipe", "finetune_vit_base", *start, "--epochs", "50"], "finetune",
        {"top1": 83.1},
    )  # fmt: skip
    probed = paper_run(
        tmp_path / "probed", LinprobeConfig, ["--recipe", "linprobe_vit_base", *start], "linprobe", {"top1": 60.0}
    )
    shown, homeless = paper_tables(open_runs([str(tuned), str(probed)]))
    assert homeless == []
    assert {each.heading.split(":")[0] for each in shown} == {
        f"Table {name}" for name in ("4a", "4b", "4c", "4d", "4e", "4f", "B")
    }
    first = next(each for each in shown if each.heading.startswith("Table 4a"))
    titles, row = first.rows[0], first.rows[3]
    cells = dict(zip(titles, row, strict=True))
    assert (cells["ft, paper"], cells["ft, ours"], cells["ft, diff."]) == ("83.5", "83.1", "-0.4")
    assert (cells["lin, paper"], cells["lin, ours"], cells["lin, pooled, ours"]) == ("67.9", "60.0", "–")
    assert first.marked == [2]
    assert "tuned, finetune with other settings than finetune_vit_base: epochs 50 (planned: 100)" in first.remarks
    assert any("was measured on digits" in remark for remark in first.remarks)


def test_transfer_learning_is_not_the_number_on_imagenet(tmp_path):
    before = paper_run(tmp_path / "lut", PretrainConfig, ["--recipe", "paper_vit_base"], "pretrain", {})
    start = ["--finetune", str(before / "checkpoint-1599.pth")]
    birds = ["--recipe", "transfer_vit_base", *start, "--dataset", "cub200", "--data_path", "/birds"]
    grid = [
        paper_run(tmp_path / f"cell_{blr}", FinetuneConfig, [*birds, "--blr", blr], "finetune", {"top1": 80.0})
        for blr in ("1e-3", "2e-3")
    ]
    others = {
        "by_recipe": ["--recipe", "transfer_vit_base", "--data_path", "/mine"],
        "by_data": ["--recipe", "finetune_vit_base", "--dataset", "dogs", "--data_path", "/dogs"],
        "held_out": ["--recipe", "finetune_vit_base", "--holdout", "0.1", "--data_path", "/imagenet"],
    }
    others = [
        paper_run(tmp_path / name, FinetuneConfig, [*flags, *start], "finetune", {"top1": 80.0})
        for name, flags in others.items()
    ]
    tuned = paper_run(
        tmp_path / "tuned", FinetuneConfig, ["--recipe", "finetune_vit_base", *start], "finetune", {"top1": 84.0}
    )
    assert paper_tables(open_runs([str(each) for each in grid]))[0] == []
    shown, homeless = paper_tables(open_runs([str(each) for each in (*grid, *others, tuned)]))
    assert homeless == [
        "cell_1e-3 (transfer to cub200 /birds)",
        "cell_2e-3 (transfer to cub200 /birds)",
        "by_recipe (transfer to /mine)",
        "by_data (transfer to dogs /dogs)",
        "held_out (judged by a share of 0.1 of the training images of /imagenet)",
    ]
    table = next(each for each in shown if each.heading.startswith("Table 1"))
    (cells,) = (dict(zip(table.rows[0], table.rows[1:][row], strict=True)) for row in table.marked)
    assert (cells["method"], cells["ViT-B, ours"]) == ("LUT", "84.0")


def test_a_segmentation_fills_the_column_of_its_own(tmp_path):
    before = paper_run(tmp_path / "lut", PretrainConfig, ["--recipe", "paper_vit_base"], "pretrain", {})
    flags = ["--finetune", str(before / "checkpoint-1599.pth"), "--data_path", "/ADE20K"]
    recipe = ["--recipe", "segment_vit_base", "--pictures", "0", "--drop_path", "0.2"]
    ours = paper_run(tmp_path / "ours", SegmentConfig, [*recipe, *flags], "segment", {"miou": 48.0})
    streets = ["--recipe", "camvid_segment", *flags]
    camvid = paper_run(tmp_path / "camvid", SegmentConfig, streets, "segment", {"miou": 70.0})
    shown, homeless = paper_tables(open_runs([str(ours), str(camvid)]))
    assert homeless == ["camvid (segmentation of /ADE20K, recipe camvid_segment)"]
    (table,) = shown
    assert table.heading.startswith("Table 1")
    (cells,) = (dict(zip(table.rows[0], table.rows[1:][row], strict=True)) for row in table.marked)
    found = [cells[f"ADE20K mIoU, {part}"] for part in ("paper", "ours", "diff.")]
    assert (cells["method"], *found) == ("LUT", "49.5", "48.0", "-1.5")
    assert cells["ViT-B, ours"] == "–"
    assert [remark for remark in table.remarks if "pre-training" not in remark] == [
        "ours, segment with other settings than segment_vit_base: drop_path 0.2 (planned: 0.1)",
        "ours was measured on /ADE20K",
    ]


def test_a_pre_training_marks_its_rows_and_other_recipes_have_none(tmp_path):
    lut = paper_run(tmp_path / "lut", PretrainConfig, ["--recipe", "mae_vit_large"], "pretrain", None)
    other = paper_run(tmp_path / "other", PretrainConfig, ["--recipe", "quickstart"], "pretrain", None)
    (table,), homeless = paper_tables(open_runs([str(lut), str(other)]))
    assert table.heading.startswith("Table 1")
    assert [table.rows[1:][row][0] for row in table.marked] == ["MAE"]
    assert homeless == ["other (recipe quickstart)"]


def test_runs_of_a_table_are_shown_with_all_of_its_rows(tmp_path):
    for work, accuracy in (("ablation_lut", 50.0), ("ablation_mae", 40.0)):
        folder = tmp_path / "tables" / "tiny" / work / "seed_0" / "finetune"
        paper_run(folder, FinetuneConfig, ["--recipe", "digits_finetune"], "finetune", {"top1": accuracy})
    run = tmp_path / "tables" / "tiny" / "ablation_lut" / "seed_0" / "finetune"
    shown, homeless = paper_tables(open_runs([str(run)]))
    assert homeless == []
    first = next(each for each in shown if each.heading.startswith("Table 4a"))
    assert first.heading.endswith(", scale tiny")
    cells = [dict(zip(first.rows[0], row, strict=True)) for row in first.rows[1:]]
    assert [row["ft, ours"] for row in cells] == ["40.0", "–", "50.0"]
    assert cells[2]["ft, Δ ours"] == "+10.0"
    assert first.marked == [2]


# ---- the page ----------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a page would load or lead to, its scripts, and its words."""

    VOID = ("meta", "link", "img", "input", "br")

    def __init__(self):
        super().__init__()
        self.addresses, self.open, self.words, self.ids = [], [], [], []
        self.scripts: dict[str, str] = {}

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        assert not any(name.startswith("on") for name in attrs), attrs
        assert tag not in ("iframe", "object", "embed", "base", "form", "link")
        self.addresses += [attrs[name] for name in ("src", "href", "srcset", "action", "poster") if name in attrs]
        if "id" in attrs:
            self.ids.append(attrs["id"])
        if tag not in self.VOID:
            self.open.append((tag, attrs))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        tag, attrs = self.open[-1] if self.open else ("", {})
        if tag == "script":
            self.scripts[attrs.get("id", str(len(self.scripts)))] = data
        elif tag != "style":
            self.words.append(data)


def parsed(html: str) -> Page:
    page = Page()
    page.feed(html)
    page.close()
    assert page.open == []
    return page


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Call scripts/report.py from a folder of its own: exit status, stdout, stderr."""
    (tmp_path / "here").mkdir()
    return script_caller(monkeypatch, capsys, tmp_path / "here", script)


def test_a_page_of_two_runs_needs_nothing_else(call, tmp_path):
    lines = pretraining_lines(2, 5)
    write_run(tmp_path / "lut", lines, pictures=(0, 1, 2), finished={"knn": 21.0})
    write_run(tmp_path / "mae", lines[:8])
    status, said, error = call(f"{tmp_path}/lut {tmp_path}/mae --no_attention --output new/page.html")
    assert (status, error) == (0, "")
    assert said.startswith("new/page.html: 2 runs, ")
    html = Path("new/page.html").read_text()
    page = parsed(html)
    assert all(address.startswith(("data:image/webp;base64,", "#")) for address in page.addresses)
    assert {address[1:] for address in page.addresses if address[0] == "#"} <= set(page.ids)
    assert sum(address.startswith("data:") for address in page.addresses) == 3
    assert "url(" not in html.partition("</style>")[0]
    assert "default-src 'none'" in html
    words = " ".join(" ".join(page.words).split())
    for expected in (
        "Settings that differ",
        "kNN accuracy",
        "21.00 %",
        "finished",
        "6 of 10 updates, left 0:00:08",
        "git checkout",
    ):
        assert expected in words, expected
    assert "No pictures were saved by mae." in words
    data = json.loads(page.scripts["data"])
    assert [run["label"] for run in data["runs"]] == ["lut", "mae"]
    assert len(data["runs"][0]["curves"]["loss"]["x"]) == 10


HOSTILE = "</script><script>alert(1)</script><img src=https://evil.example/x onerror=alert(2)>\"'&{{ 7*7 }}"


def test_hostile_names_and_settings_stay_text(call, tmp_path):
    folder = tmp_path / "<b>run&amp;"
    config = as_dict(PretrainConfig(epochs=2, warmup_epochs=1)) | {
        "model": HOSTILE,
        "data_path": HOSTILE,
        HOSTILE: HOSTILE,
    }
    lines = [{"step": 1, "epoch": 0, "loss": 1.0, HOSTILE: 2.0}]
    write_run(folder, lines, config, command=f"python main_pretrain.py '{HOSTILE}", finished={})
    shutil.copytree(folder, tmp_path / "other")
    label = HOSTILE.replace('"', '\\"').replace("'", "'\"'\"'").replace('\\"', '"')
    status, _, error = call(f"'{folder}' '{tmp_path}/other' --label '{label}' b --no_attention --output page.html")
    assert status == 0, error
    page = parsed(Path("page.html").read_text())
    assert set(page.scripts) == {"0", "data", "2", "3"}  # the theme, the numbers, plotly, and ours
    assert all(address.startswith("#") for address in page.addresses)
    assert json.loads(page.scripts["data"])["runs"][0]["label"] == HOSTILE
    assert HOSTILE in json.loads(page.scripts["data"])["runs"][0]["curves"]
    assert "".join(page.words).count(HOSTILE) > 4
    assert "49" not in "".join(page.words).replace(HOSTILE, "").partition("Environment")[0]


def test_long_runs_stay_within_the_size(call, tmp_path):
    lines = pretraining_lines(10, 100)
    for number in range(6):
        write_run(tmp_path / "runs" / str(number), lines)
    runs = open_runs([str(tmp_path / "runs")])
    html = report(runs, "long", None)
    assert len(html.encode()) < report_module.MOST_BYTES
    curve = json.loads(parsed(html).scripts["data"])["runs"][0]["curves"]["loss"]
    most = points_per_curve(runs)
    assert len(curve["x"]) == len(curve["low"]) == most < 1000
    assert f"Curves of more than {most} points (the longest has 1000)" in html


def test_too_large_a_page_is_refused(call, tmp_path, monkeypatch):
    write_run(tmp_path / "a", pretraining_lines(1, 3))
    monkeypatch.setattr(report_module, "MOST_BYTES", 10**6)
    status, _, error = call(f"{tmp_path}/a --no_attention")
    assert (status, error.count("\n")) == (2, 1)
    assert "over 10 MB: give fewer at once" in error
    assert not Path("output").exists()


def test_attention_of_a_checkpoint_on_images_of_its_data_set(tmp_path, monkeypatch):
    config = as_dict(PretrainConfig(epochs=2, warmup_epochs=1, dataset="digits"))
    folder = write_run(tmp_path / "a", pretraining_lines(1, 3), config)
    complete(save_lut(folder / "checkpoint-0.pth"), epoch=0, step=3)
    runs = open_runs([str(folder)])
    seen = report_module.attention(runs, (), torch.device("cpu"))
    assert seen.said == []
    assert len(seen.images) == 3
    assert [name for name, _ in seen.images[0].rows[0].cells] == ["mean", "head 0", "head 1", "head 2"]
    assert seen.images[0].mark == (62.5, 62.5)  # the patch after the middle of 4 x 4
    words = " ".join(" ".join(parsed(report(runs, "a", seen)).words).split())
    assert "a, checkpoint-0.pth" in words
    monkeypatch.setattr(report_module, "ATTENTION_CELLS", 11)
    few = report_module.attention(runs, (), torch.device("cpu"))
    assert [name for name, _ in few.images[2].rows[0].cells] == ["mean"]
    assert few.said == ["So many runs: only the means over heads are shown."]


@pytest.mark.parametrize("layout", ["data_path", "folders"])
def test_attention_of_a_segmenter_on_its_validation_images(tmp_path, scenes, layout):
    given = {"data_path": ["--data_path", str(scenes)]}
    given["folders"] = [
        word for split in ("train", "val") for kind in ("images", "masks")
        for word in (f"--{split}_{kind}", str(scenes / kind / split))
    ] + ["--classes", str(scenes / "classes.json")]  # fmt: skip
    settings = parse_config(SegmentConfig, [*TINY_SEGMENTER.split(), *given[layout]], "main_segment.py")
    folder = write_run(tmp_path / "a", segmenting_lines(5, 2), as_dict(settings), stage="segment")
    model = UperNet(**settings.model_arguments(3))
    torch.save({"model": model.state_dict(), "config": as_dict(settings)}, folder / "checkpoint-0.pth")
    complete(folder / "checkpoint-0.pth", epoch=0, step=2)
    runs = open_runs([str(folder)])
    seen = report_module.attention(runs, (), torch.device("cpu"))
    assert seen.said == []
    names = {path.name for path in (scenes / "images" / "val").iterdir()}
    assert {image.title for image in seen.images} <= names
    assert len({image.title for image in seen.images}) == 3
    assert [name for name, _ in seen.images[0].rows[0].cells] == ["mean", "head 0", "head 1", "head 2"]
    shutil.rmtree(scenes / "images" / "val")
    seen = report_module.attention(runs, (), torch.device("cpu"))
    assert seen.images == []
    assert "No images to look at" in seen.said[0]


@pytest.mark.slow
def test_real_runs_of_every_stage_with_their_attention(call, pretrain, finetune, linprobe, tmp_path):
    digits = "--dataset digits --in_chans 1 --max_steps 3"
    pretrain(digits, "--monitor_freq 1 --monitor_images 20 --norm_pix_loss", output=tmp_path / "lut")
    (checkpoint,) = (tmp_path / "lut").glob("checkpoint-*step*.pth")
    finetune(digits, "--finetune", checkpoint, "--aa none --reprob 0", output=tmp_path / "tuned")
    linprobe(digits, "--finetune", checkpoint, output=tmp_path / "probed")
    status, _, error = call(f"{tmp_path}/lut {tmp_path}/tuned {tmp_path}/probed --output page.html")
    assert (status, error) == (0, "")
    html = Path("page.html").read_text()
    page = parsed(html)
    words = " ".join(" ".join(page.words).split())
    for expected in ("pre-training", "fine-tuning", "linear probing", "Top-1 accuracy", "RankMe", "head 2", "digits["):
        assert expected in words, expected
    pictures = [address for address in page.addresses if address.startswith("data:")]
    films, looks = 2, 3 * (1 + 3 * (1 + 3))  # before and after; three images, each with three maps of mean and heads
    assert len(pictures) == films + looks
    assert len(set(pictures)) > 12  # the probe's encoder is the pre-trained one
    repeated = re.search(r"python main_finetune.py --recipe \S+config.yaml", words)
    assert repeated
    again = yaml.safe_load(Path(repeated.group().split()[-1]).read_text())
    assert again["finetune"] == str(checkpoint)


def test_checkpoints_and_images_that_cannot_be_opened_are_said(call, tmp_path):
    config = as_dict(PretrainConfig(epochs=2, warmup_epochs=1)) | {"data_path": "gone"}
    folder = write_run(tmp_path / "a", pretraining_lines(1, 3), config)
    (folder / "checkpoint-0.pth").write_bytes(b"junk")
    manifest = {"sha256": "0" * 64, "bytes": 4, "epoch": 0, "step": 3, "metric": None, "time": 0.0}
    (folder / "checkpoint-0.pth.json").write_text(json.dumps(manifest))
    write_run(tmp_path / "b", pretraining_lines(1, 3), config)
    status, _, error = call(f"{tmp_path}/a {tmp_path}/b --output page.html")
    assert (status, error) == (0, "")
    words = " ".join(" ".join(parsed(Path("page.html").read_text()).words).split())
    assert "is damaged, its SHA-256 is not the one that was written" in words
    assert "b has no complete checkpoint" in words


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("nowhere", "RUN nowhere: there is no such folder"),
        ("none", "RUN none: is no run, neither it nor a folder below has a log.jsonl"),
        ("empty", "RUN empty: its log.jsonl holds no complete line yet"),
        ("cut", "RUN cut: its log.jsonl holds no complete line yet"),
        ("", "RUN: give the folder of a run"),
        ("run --output page.pdf", "--output page.pdf: is written as .html"),
        ("run --output /proc/none/page.html", "--output /proc/none/page.html: cannot be written"),
        ("run --label a b", "--label a b: give one for each of 1 runs, or none"),
        ("run --lable a", "did you mean --label?"),
        ("run --device cuda:99", "--device cuda:99"),
    ],
)
def test_wrong_input_is_one_line(call, flags, said):
    write_run(Path("run"), [{"step": 1, "loss": 1.0}])
    Path("none").mkdir()
    for name, text in (("empty", ""), ("cut", '{"step": 1, "lo')):
        Path(name).mkdir()
        (Path(name) / "log.jsonl").write_text(text)
    before = sorted(Path().rglob("*"))
    status, _, error = call(flags if "label a b" in flags or "--output" in flags else f"{flags} --no_attention")
    assert (status, error.count("\n")) == (2, 1), error
    assert said in error
    assert sorted(Path().rglob("*")) == before


def test_an_image_that_is_none_is_one_line(call, pretrain, tmp_path):
    pretrain("--dataset digits --in_chans 1 --max_steps 1", output=tmp_path / "lut")
    Path("fake.png").write_text("words")
    status, _, error = call(f"{tmp_path}/lut --image fake.png")
    assert (status, error.count("\n")) == (2, 1)
    assert "--image fake.png: cannot be read" in error


def test_labels_must_fit_the_runs(tmp_path):
    write_run(tmp_path / "a", [{"step": 1, "loss": 1.0}])
    with pytest.raises(UserError, match="give one for each of 1 runs") as error:
        open_runs([str(tmp_path)], ["a", "b"])
    assert "--label a b" in one_line(error)
