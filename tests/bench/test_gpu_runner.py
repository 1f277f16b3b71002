"""A stage of the GPU check that fails, hangs or is killed leaves its rows and stops no other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from util.bench.gpu_runner import Recorder, Stage, run_stages
from util.runtime.files import ROOT

RECORD = (
    "import os, pathlib, sys, time; from util.bench.gpu_runner import Recorder;"
    "r = Recorder(pathlib.Path(sys.argv[1]), sys.argv[2]); r.row('first', value=1.5);"
)


def stage(name: str, code: str, folder, seconds: float = 30) -> Stage:
    return Stage(name, f"title <{name}>", seconds, (sys.executable, "-c", RECORD + code, str(folder), name))


def test_a_failed_a_hanging_and_a_killed_stage_stop_no_other(tmp_path):
    child = "os.fork() or time.sleep(600); open(sys.argv[1] + '/child', 'w').write(str(os.getpid())); time.sleep(600)"
    stages = [
        stage("good", "r.row('second', passed=True)", tmp_path),
        stage("broken", "raise ValueError('<planted>')", tmp_path),
        stage("hanging", child, tmp_path, seconds=6),
        stage("killed", "os.kill(os.getpid(), 9)", tmp_path),
        stage("last", "", tmp_path),
    ]
    begin = time.monotonic()
    results = run_stages(stages, tmp_path, minutes=2)
    assert time.monotonic() - begin < 100
    states = [result["state"] for result in results]
    assert states == ["passed", "failed with status 1", "stopped after 6 s", "failed with status -9", "passed"]
    assert [row["name"] for row in results[0]["rows"]] == ["first", "second"]
    assert all(result["rows"][0] == {"name": "first", "value": 1.5} for result in results)
    assert "ValueError: <planted>" in results[1]["log"][-1]
    assert json.loads((tmp_path / "results.json").read_text()) == results
    page = (tmp_path / "index.html").read_text()
    assert "ValueError: &lt;planted&gt;" in page
    assert page.count("<h2>") == 5
    with pytest.raises(ProcessLookupError):  # no process of the hanging stage is left
        os.kill(int((tmp_path / "child").read_text()), 0)


def test_a_stage_without_time_is_not_started(tmp_path):
    (result,) = run_stages([stage("late", "", tmp_path)], tmp_path, minutes=0.01)
    assert result["state"] == "not started"
    assert not (tmp_path / "late.log").exists()


def test_a_row_that_fails_does_not_stop_the_next(tmp_path):
    recorder = Recorder(tmp_path, "stage")
    recorder.attempt("broken", lambda: {"ratio": 1 / 0})
    recorder.attempt("good", lambda: {"ratio": 2.0})
    rows = [json.loads(line) for line in (tmp_path / "stage.jsonl").read_text().splitlines()]
    assert rows[0] == {"name": "broken", "passed": False, "error": "ZeroDivisionError: division by zero"}
    assert rows[1] == {"name": "good", "ratio": 2.0}
    assert recorder.failed == ["broken"]


@pytest.mark.slow
def test_updates_on_the_cpu_equal_themselves(tmp_path):
    """The rehearsal of a stage by its command."""
    flags = ["--device", "cpu", "--stages", "equality", "--minutes", "30", "--output", tmp_path / "out"]
    status = subprocess.run([sys.executable, ROOT / "scripts" / "check_gpu.py", *flags], cwd=tmp_path).returncode
    (result,) = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row for row in result["rows"] if row.get("passed") is False] == []
    assert (status, result["state"]) == (0, "passed")
    exact = [row["difference"] for row in result["rows"] if row["name"].endswith("fp32")]
    assert exact == [0.0] * 9
    assert sum(row.get("masks_equal", False) for row in result["rows"]) == 6
