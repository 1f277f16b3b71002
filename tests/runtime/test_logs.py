"""RunLog: JSON lines, resume, TensorBoard, the progress line; run info."""

import io
import json
import math
import os
import subprocess

import numpy as np
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from util.runtime import logs
from util.runtime.logs import RunLog, format_duration, format_progress, peak_memory_bytes, write_run_info

FIELDS = {
    "epoch": 3,
    "epochs": 100,
    "step": 250,
    "total_steps": 8000,
    "losses": {"loss": 0.61239, "mim": 0.5, "bc": 0.11239},
    "lr": 1.5e-4,
    "images_per_second": 1234.5,
    "data_wait": 0.034,
    "memory_bytes": 3 * 2**29,
    "seconds_left": 3723,
}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def read_lines(folder):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    text = (folder / "log.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_scalars_are_valid_json_lines_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(logs.time, "monotonic", iter([100.0, 101.25, 103.5]).__next__)
    log = RunLog(tmp_path / "new", None, enabled=True)
    log.scalars(1, {"loss": 0.123456789, "lr": 1.23456789e-7, "count": 12}, epoch=2, by="me")
    log.scalars(2, {"loss": math.nan, "a": math.inf, "b": -math.inf})
    assert read_lines(tmp_path / "new") == [  # before close: it was flushed
        {"step": 1, "epoch": 2, "by": "me", "seconds": 1.2, "loss": 0.123456789, "lr": 1.23456789e-7, "count": 12},
        {"step": 2, "seconds": 3.5, "loss": "nan", "a": "inf", "b": "-inf"},
    ]
    log.close()


def test_resume_removes_the_lines_of_a_dead_run(tmp_path):
    log = RunLog(tmp_path, None, enabled=True)
    for step in (10, 20, 30, 40):
        log.scalars(step, {"loss": step})
    log.close()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # cut short by the crash

    log = RunLog(tmp_path, None, enabled=True, resume_step=20)
    assert [line["step"] for line in read_lines(tmp_path)] == [10, 20]
    log.scalars(30, {"loss": -1})
    log.close()
    assert [(line["step"], line["loss"]) for line in read_lines(tmp_path)] == [(10, 10), (20, 20), (30, -1)]
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def test_a_fresh_start_keeps_no_line_of_a_run_that_died_before_its_first_checkpoint(tmp_path):
    for _ in range(2):
        log = RunLog(tmp_path, None, enabled=True, resume_step=0)
        for step in (0, 10):
            log.scalars(step, {"loss": step})
        log.close()
    assert [line["step"] for line in read_lines(tmp_path)] == [0, 10]


def test_seconds_go_on_from_the_last_line_that_a_resume_keeps(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(logs.time, "monotonic", lambda: now[0])
    log = RunLog(tmp_path, None, enabled=True, resume_step=0)
    for step in (10, 20):
        now[0] += 7
        log.scalars(step, {"loss": 1})
    log.close()
    now[0] = 5000.0  # another machine, another day
    log = RunLog(tmp_path, None, enabled=True, resume_step=10)
    now[0] += 3
    log.scalars(20, {"loss": 1})
    log.close()
    assert [(line["step"], line["seconds"]) for line in read_lines(tmp_path)] == [(10, 7.0), (20, 10.0)]


def test_without_resume_step_lines_are_kept(tmp_path):
    for _ in range(2):
        log = RunLog(tmp_path, None, enabled=True)
        log.scalars(7, {"loss": 1})
        log.close()
    assert len(read_lines(tmp_path)) == 2


def test_crash_while_truncating_leaves_the_old_file(tmp_path, monkeypatch):
    log = RunLog(tmp_path, None, enabled=True)
    log.scalars(1, {"loss": 1})
    log.scalars(2, {"loss": 2})
    log.close()

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(logs.os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        RunLog(tmp_path, None, enabled=True, resume_step=1)
    assert len(read_lines(tmp_path)) == 2


def test_tensorboard_has_each_step_once_after_a_resume(tmp_path):
    log = RunLog(tmp_path, tmp_path / "tb", enabled=True, resume_step=0)
    for step in (1, 2, 3):
        log.scalars(step, {"loss": step}, epoch=1)
    log.image(3, "reconstruction", np.zeros((4, 6, 3), np.uint8))
    log.close()
    log = RunLog(tmp_path, tmp_path / "tb", enabled=True, resume_step=2)
    log.scalars(3, {"loss": 30})
    log.close()

    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss/loss")] == [(1, 1), (2, 2), (3, 30)]
    assert events.Tags()["scalars"] == ["loss/loss"]
    assert [line["step"] for line in read_lines(tmp_path)] == [1, 2, 3]


def test_image_reaches_tensorboard(tmp_path):
    log = RunLog(tmp_path, tmp_path / "tb", enabled=True)
    log.image(5, "reconstruction", np.zeros((4, 6, 3), np.uint8))
    log.close()
    (image,) = EventAccumulator(str(tmp_path / "tb")).Reload().Images("reconstruction")
    assert (image.step, image.height, image.width) == (5, 4, 6)


def test_disabled_log_touches_nothing(tmp_path, capsys):
    folder = tmp_path / "rank1"
    log = RunLog(folder, folder / "tb", enabled=False, resume_step=3)
    log.scalars(1, {"loss": 1.0})
    log.image(1, "picture", np.zeros((2, 2, 3), np.uint8))
    log.text("hello")
    log.progress(**FIELDS)
    log.close()
    assert not folder.exists()
    assert capsys.readouterr().out == ""


def test_progress_in_a_file_is_plain_lines(tmp_path, capsys):
    log = RunLog(tmp_path, None, enabled=True)
    log.progress(**FIELDS)
    log.text("saved")
    log.close()
    assert capsys.readouterr().out == format_progress(**FIELDS) + "\nsaved\n"


def test_progress_on_a_terminal_rewrites_one_line(tmp_path, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setenv("COLUMNS", "40")
    log = RunLog(tmp_path, None, enabled=True)
    log.text("start")
    log.progress(**FIELDS)
    log.progress(**FIELDS)
    log.text("saved")
    log.progress(**FIELDS)
    log.close()
    log.close()
    shown = format_progress(**FIELDS, width=39)  # never as wide as the terminal, or it would wrap
    live = f"\r{shown}\x1b[K"
    assert terminal.getvalue() == f"start\n{live}{live}\r\x1b[Ksaved\n{live}\n"


def test_format_progress():
    assert format_progress(**FIELDS) == ("epoch 3/100  left 1:02:03  1234 images/s  loss 0.6124  data wait 3%")
    assert format_progress(**FIELDS, width=200) == (
        "epoch 3/100  left 1:02:03  1234 images/s  loss 0.6124  data wait 3%  step 250/8000  mim 0.5000  bc 0.1124"
        "  lr 1.50e-04  memory 1.5 GiB"
    )
    assert "  loss 0.5000  data wait" in format_progress(**FIELDS | {"losses": {"bc": 0.1, "loss": 0.5}})
    week = FIELDS | {"epoch": 1600, "epochs": 1600, "seconds_left": 12 * 86400, "images_per_second": 10234}
    assert len(format_progress(**week)) < 80
    slow = FIELDS | {"images_per_second": 3.14, "seconds_left": math.inf, "losses": {"loss": math.nan}}
    line = format_progress(**slow)
    assert "loss nan" in line
    assert " 3.1 images/s " in line
    assert "  left ?  " in line


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00:00"),
        (59.6, "0:01:00"),
        (3723, "1:02:03"),
        (86399.4, "23:59:59"),
        (86399.6, "1d00h"),
        (3 * 86400 + 4 * 3600 + 3599, "3d04h"),
        (-1, "?"),
        (math.inf, "?"),
        (math.nan, "?"),
    ],
)
def test_format_duration(seconds, text):
    assert format_duration(seconds) == text


def test_peak_memory_of_a_process_with_torch_is_plausible():
    assert 50 * 2**20 < peak_memory_bytes(torch.device("cpu")) < 2**40


def test_run_info(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["main_pretrain.py", "--data_path", "two words"])
    write_run_info(tmp_path / "run", {"lr": 1e-5, "size": (32, 32), "data": {"path": tmp_path}, "none": None})
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config == {"lr": 1e-5, "size": [32, 32], "data": {"path": str(tmp_path)}, "none": None}
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert torch.__version__.startswith(facts["torch"].split("+")[0])
    assert facts["numpy"] == np.__version__
    assert facts["command"].endswith(" main_pretrain.py --data_path 'two words'")
    assert facts["started"].endswith("+00:00")
    assert (facts["processes"], facts["cores"]) == (1, os.cpu_count())
    assert facts["cpu"]


def test_git_state_of_a_checkout(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    assert logs.git_state(tmp_path) == (None, None)
    git("init")
    (tmp_path / "a.py").write_text("1")
    git("add", ".")
    git("commit", "-m", "a")
    commit, dirty = logs.git_state(tmp_path)
    assert len(commit) == 40
    assert dirty is False
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "log.jsonl").write_text("a run's own files do not make it dirty")
    assert logs.git_state(tmp_path) == (commit, False)
    (tmp_path / "a.py").write_text("2")
    assert logs.git_state(tmp_path) == (commit, True)
    assert logs.git_state(tmp_path / "output") == (None, None)  # inside another project's checkout


@pytest.mark.parametrize(
    ("written", "state"),
    [("abc123\n", ("abc123", False)), ("abc123 with changes\n", ("abc123", True)), ("unknown\n", (None, None))],
)
def test_a_copy_of_the_code_knows_its_commit(tmp_path, written, state):
    (tmp_path / "COMMIT").write_text(written)
    assert logs.git_state(tmp_path) == state


# ---- damaged files, full disks ---------------------------------------------------------------------------------
DAMAGED = [
    b'{"step": 2, "lo',
    b"[1, 2]",
    b"7",
    b'{"loss": 1}',
    b'{"step": "2"}',
    b'{"step": null}',
    b'{"step": 2, "seconds": "\xff"}',
    b"\x00\x01",
    b"[" * 100_000,
]


@pytest.mark.parametrize("line", DAMAGED)
def test_a_resume_leaves_out_damaged_lines_and_says_so(tmp_path, capsys, line):
    intact = [b'{"step": 1, "seconds": 3.0}\n', b'{"step": 2, "seconds": 5.0}\n']
    (tmp_path / "log.jsonl").write_bytes(intact[0] + line + b"\n" + intact[1] + line)
    log = RunLog(tmp_path, None, enabled=True, resume_step=2)
    log.close()
    assert (tmp_path / "log.jsonl").read_bytes() == b"".join(intact)
    assert 5 <= log.seconds < 60
    assert capsys.readouterr().err == f"WARNING: {tmp_path / 'log.jsonl'}: 2 damaged lines are left out\n"


@pytest.mark.parametrize("name", ["log.jsonl", "config.yaml", "run.json"])
def test_a_folder_in_a_file_s_place_is_renamed(tmp_path, capsys, name):
    (tmp_path / name / "x").mkdir(parents=True)
    write_run_info(tmp_path, {"epochs": 3})
    RunLog(tmp_path, None, enabled=True, resume_step=0).close()
    assert (tmp_path / name).is_file()
    assert (tmp_path / f"{name}.damaged-0" / "x").is_dir()
    where = f"{tmp_path / name}: is not a file, so it was renamed to {name}.damaged-0"
    assert capsys.readouterr().err == f"WARNING: {where}\n"


def test_settings_are_replaced_only_by_a_complete_file(tmp_path, monkeypatch):
    write_run_info(tmp_path, {"epochs": 3})
    before = (tmp_path / "config.yaml").read_bytes()

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("util.runtime.files.os.replace", crash)
    with pytest.raises(KeyboardInterrupt):
        write_run_info(tmp_path, {"epochs": 4})
    assert (tmp_path / "config.yaml").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "run.json"}


def test_tensorboard_on_a_full_disk_is_one_line_and_the_run_continues(small_disk, tmp_path, capfd):
    log = RunLog(tmp_path, small_disk, enabled=True)
    (small_disk / "other").write_bytes(bytes(1_000_000))
    for step in range(2000):
        log.scalars(step, {"loss": 1.0})
        if step % 100 == 0:
            log.image(step, "noise", np.random.default_rng(step).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    log.close()
    assert len(read_lines(tmp_path)) == 2000
    out, err = capfd.readouterr()
    assert out.count("WARNING: TensorBoard's files can no longer be written: ") == 1
    assert "No space left on device" in out
    assert "Traceback" not in out + err
