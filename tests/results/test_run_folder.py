"""Folders of runs read back, and their curves thinned."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.runs import pretraining_lines, segmenting_lines, write_run
from util.config.groups import as_dict
from util.config.pretrain import PretrainConfig
from util.config.segment import SegmentConfig
from util.report.report import report
from util.report.settings import differing_settings
from util.report.summary import card, summary_rows
from util.results.curves import METRICS, Thinned, curves_of, metrics_of, thin
from util.results.run_folder import Curve, open_runs, read_run
from util.runtime.logs import RunLog

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
        "log.jsonl, lines 9 and 11: cut short or damaged, left out",
        "log.jsonl: the loss is not finite in 1 lines",
    )


def test_the_first_epoch_does_not_tell_how_long_it_is(tmp_path):
    lines = [line for line in pretraining_lines(1, 5) if line["step"] in (1, 2, 3)]
    run = read_run(write_run(tmp_path / "a", lines), "a")
    assert (run.updates_per_epoch, run.total_updates) == (None, None)
    done = read_run(write_run(tmp_path / "b", pretraining_lines(1, 5)), "b")
    assert done.updates_per_epoch is None  # an old run of one epoch; now run.json tells


def test_run_json_tells_updates_and_recipe(tmp_path):
    facts = {"updates_per_epoch": 7, "total_updates": 21, "recipe": "mine"}
    folder = write_run(tmp_path / "a", [{"step": 1, "loss": 1.0, "lr": 1.0, "epoch": 0}], **facts)
    run = read_run(folder, "a")
    assert (run.updates_per_epoch, run.total_updates, run.recipe) == (7, 21, "mine")
    (folder / "run.json").write_text("{}")  # as runs wrote it before
    old = read_run(folder, "a")
    assert (old.updates_per_epoch, old.total_updates, old.recipe) == (None, None, old.config["recipe"])


def test_max_steps_cuts_an_epoch_short(tmp_path):
    config = as_dict(PretrainConfig(epochs=3, warmup_epochs=1, max_steps=3))
    lines = [*pretraining_lines(1, 5)[:4], {"step": 3, "epoch": 1, "rankme": 2.0}]
    run = read_run(write_run(tmp_path / "a", lines, config, finished={}), "a")
    assert (run.updates_per_epoch, run.total_updates, run.finished) == (None, 3, True)


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
    ("facts", "results", "config", "stage"),
    [
        ({"stage": "finetune"}, ["pretrain"], {"mask_ratio": 0.75}, "finetune"),
        ({}, ["linprobe-eval"], {}, "linprobe"),  # the rest: folders without a stage in run.json
        ({}, [], {"mask_ratio": 0.75}, "pretrain"),
        ({}, [], {"max_updates": 5}, "segment"),
        ({}, [], {"mixup": 0.8}, "finetune"),
        ({"stage": ["segment"]}, [], {}, ""),
    ],
)
def test_the_stage_is_read_from_run_json_or_else_the_results_or_settings(tmp_path, facts, results, config, stage):
    folder = write_run(tmp_path / "a", [{"step": 1, "loss": 1.0}], config)
    (folder / "run.json").write_text(json.dumps(facts))
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
    """Merge one group of points after the other."""
    n, points = len(curve.steps), []
    for group in range(most):
        inside = range(int(group * n / most), int((group + 1) * n / most) if group + 1 < most else n)
        values = [curve.values[i] for i in inside if np.isfinite(curve.values[i])]
        three = (np.mean(values), min(values), max(values)) if values else (np.nan,) * 3
        points.append((float(np.mean([curve.steps[i] for i in inside])), *three))
    return points


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
    for actual, want in zip(dataclasses.astuple(thinned), expected, strict=True):
        np.testing.assert_allclose(actual, want, rtol=1e-12, atol=1e-9)
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
    run = read_run(write_run(tmp_path / "a", lines, {}, stage="segment", updates_per_epoch=1), "a")
    titles = {name: (metric.title, metric.group) for name, metric in metrics_of([run]).items()}
    assert titles["aux_loss"] == ("aux loss", "Training")
    assert titles["road_iou"] == ("road iou", "Evaluation")
    assert titles["miou"][0] == "Mean IoU"
    assert ["Mean IoU, best", "40.00 % (epoch 1)"] in summary_rows([run], metrics_of([run]))


def test_all_numbers_of_a_segmentation_are_known(tmp_path):
    config = as_dict(SegmentConfig(data_path="scenes", max_updates=5, warmup_updates=0))
    run = read_run(write_run(tmp_path / "a", segmenting_lines(5, 2), config, stage="segment"), "a")
    metrics = metrics_of([run])
    assert metrics.keys() - METRICS.keys() == set()
    assert {metrics[name].better for name in ("loss", "main", "auxiliary")} == {"lower"}
    assert ["Mean class accuracy, best", "50.00 % (epoch 1)"] in summary_rows([run], metrics)
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
