"""Damaged and hostile files in a run's folder: the report and the tables show the rest and say what they left out."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scripts import report as report_script
from scripts import tables as tables_script
from shared.calls import script_caller
from shared.runs import complete, pretraining_lines, write_run
from util.report.report import report
from util.report.settings import commands, differing_settings, environment_rows
from util.report.summary import card, speed_rows, summary_rows
from util.results.curves import curves_of, metrics_of
from util.results.run_folder import open_runs, read_run

MANIFEST = "checkpoint-0.pth.json"
FILES = ("log.jsonl", "config.yaml", "run.json", "results.jsonl", MANIFEST)
BOMB = "a: &a [x, x]\n" + "".join(
    f"{new}: &{new} [*{old}, *{old}]\n" for old, new in zip("abcdef", "bcdefg", strict=True)
)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "not UTF-8": lambda path: path.write_bytes(b'{"step": 1, "\xff\xfe": "\x80"}\n'),
    "zeros": lambda path: path.write_bytes(bytes(1000)),
    "a list": lambda path: path.write_text("[1, 2]\n"),
    "a text": lambda path: path.write_text('"words"\n'),
    "a number": lambda path: path.write_text("3\n"),
    "nothing": lambda path: path.write_text("null\n"),
    "a folder": replace_by_folder,
    "a pipe": replace_by_pipe,
    "a terabyte": lambda path: os.truncate(path, 2**40),
    "nested": lambda path: path.write_text('{"step": ' + "[" * 100_000 + "]" * 100_000 + "}\n"),
    "nested a little": lambda path: path.write_text('{"step": 1, "x": ' + "[" * 60 + "]" * 60 + "}\n"),
    "many digits": lambda path: path.write_text('{"step": ' + "9" * 400 + "}\n"),
    "a sexagesimal number": lambda path: path.write_text('{"step": ' + "1" + ":59" * 100_000 + "}\n"),
    "an alias bomb": lambda path: path.write_text(BOMB),
    "a tag": lambda path: path.write_text("a: !!python/object/apply:os.system [echo]\n"),
    "escape sequences": lambda path: path.write_bytes(b'{"\x1b[31m": \x1b]0;title\x07}\n'),
}


def make_run(folder: Path) -> Path:
    run = write_run(folder, pretraining_lines(2, 5), finished={"knn": 21.0}, updates_per_epoch=5, total_updates=10)
    (run / "checkpoint-0.pth").write_bytes(b"weights")
    complete(run / "checkpoint-0.pth", epoch=0, step=5)
    return run


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_report_shows_the_rest_and_names_what_it_left_out(tmp_path, damage):
    for file in FILES:
        DAMAGES[damage](make_run(tmp_path / "runs" / file.partition(".")[0]) / file)
    start = time.monotonic()
    runs = {run.label: run for run in open_runs([str(tmp_path / "runs")])}
    html = report(list(runs.values()), "damaged", None)
    assert time.monotonic() - start < 20  # no bomb is unfolded, no pipe waited for
    assert len(runs) == len(FILES)
    for file in FILES:
        run = runs[file.partition(".")[0]]
        remarks = [remark for remark in run.remarks if remark.startswith(file)]
        if not (file == "log.jsonl" and damage == "nested a little"):  # a list is no step or loss: nothing is lost
            assert remarks, file
        assert all(other.startswith((file, "log.jsonl")) for other in run.remarks), run.remarks
    for name in ("config", "run", "results", "checkpoint-0"):
        assert runs[name].curves["knn"].last == 21.0
    assert runs["log"].updates == (5 if damage == "cut" else runs["log"].updates) < 10
    assert runs["config"].stage == runs["log"].stage == "pretrain"
    assert (runs["run"].stage, runs["run"].updates_per_epoch) == ("pretrain", 5)  # by results and log
    assert "\x1b" not in html


def test_the_script_prints_what_it_left_out_without_escape_sequences(monkeypatch, capsys, tmp_path):
    folder = make_run(tmp_path / "\x1b[31mred")
    (folder / "config.yaml").write_text(BOMB)
    DAMAGES["escape sequences"](folder / "log.jsonl")
    call = script_caller(monkeypatch, capsys, tmp_path, report_script)
    status, output, error = call(f"'{folder}' --no_attention --output page.html")
    assert status == 0, error
    assert "config.yaml has a YAML alias or tag" in error
    assert "log.jsonl, line 1: cut short or damaged, left out" in error
    assert "\\x1b[31mred: " in error
    assert "\x1b" not in output + error + Path("page.html").read_text()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_table_shows_the_rest(monkeypatch, capsys, tmp_path, damage):
    call = script_caller(monkeypatch, capsys, tmp_path, tables_script)
    runs = tmp_path / "output" / "tables" / "tiny" / "ablation_lut"
    for seed in (0, 1):
        write_run(runs / f"seed_{seed}" / "finetune", [], {}, finished={"top1": 60.0 + seed}, stage="finetune")
    DAMAGES[damage](runs / "seed_1" / "finetune" / "results.jsonl")
    status, shown, error = call("show B --scale tiny")
    assert status == 0, error
    assert "60.0" in shown
    assert "WARNING: output/tables/tiny/ablation_lut/seed_1/finetune/results.jsonl" in error
    assert "\x1b" not in error


def test_files_that_are_missing_are_named(tmp_path):
    for file in FILES[:3]:
        (make_run(tmp_path / file.partition(".")[0]) / file).unlink()
    runs = {run.label: run.remarks for run in open_runs([str(tmp_path)])}
    assert runs == {file.partition(".")[0]: (f"{file} is missing",) for file in FILES[:3]}


# ---- values of other types ---------------------------------------------------------------------------------

plain = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(10**30), 10**30), st.floats(), st.text(max_size=5)),
    lambda children: st.lists(children, max_size=2) | st.dictionaries(st.text(max_size=3), children, max_size=2),
    max_leaves=4,
)


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("types") / "run")


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_values_of_any_type_are_shown_or_left_out(template, tmp_path, data):
    folder = tmp_path / "run"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(template, folder)
    damage_values(folder, data)
    run = read_run(folder, "a")
    metrics = metrics_of([run])
    json.dumps(curves_of(run, metrics, 4), allow_nan=False)
    for rows in (summary_rows([run], metrics), speed_rows([run]), differing_settings([run]), environment_rows([run])):
        assert all(isinstance(cell, str) for row in rows for cell in row)
    assert card(run, metrics).label == "a"
    assert all(isinstance(command, str) for _, command in commands(run))
    assert run.newest_checkpoint in (None, folder / "checkpoint-0.pth")
    yaml.safe_dump(run.config)


def damage_values(folder: Path, data: st.DataObject) -> None:
    """Replace some values of a file by others of any type."""
    path = folder / data.draw(st.sampled_from(FILES))
    if path.suffix == ".yaml":
        values = [yaml.safe_load(path.read_text())]
    else:
        texts = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        values = [json.loads(text) for text in texts]
    for _ in range(data.draw(st.integers(1, 4))):
        chosen = data.draw(st.sampled_from(values))
        chosen[data.draw(st.sampled_from(sorted(chosen)))] = data.draw(plain)
    path.write_text("\n".join(json.dumps(value) for value in values), encoding="utf-8")  # which is YAML too, mostly


# ---- a full disk -------------------------------------------------------------------------------------------


def test_on_a_full_disk_the_page_that_was_there_stays(monkeypatch, capsys, small_disk, tmp_path):
    call = script_caller(monkeypatch, capsys, tmp_path, report_script)
    folder = make_run(tmp_path / "run")
    (small_disk / "page.html").write_text("the page before")
    status, _, error = call(f"{folder} --no_attention --output {small_disk}/page.html")  # it would take 5 MB of 1
    assert (status, error.count("\n")) == (2, 1)
    assert f"--output {small_disk}/page.html: cannot be written (No space left on device)" in error
    assert (small_disk / "page.html").read_text() == "the page before"
    assert [path.name for path in small_disk.iterdir()] == ["page.html"]
