"""Ctrl-C, once and twice, at start-up, in an epoch, in a save and in an evaluation."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from shared.images import write_images
from shared.ranks import Ranks, command, newest_step, same_end, updates, wait_until, with_preface
from util.runtime.errors import INTERRUPT_STATUS, REQUEUE_STATUS
from util.runtime.stop import StopRequest, how_to_continue
from util.weights.checkpoint import CheckpointStore

pytestmark = pytest.mark.slow
ADVICE = "run the same command with --auto_resume to continue"
# the save, or what follows it, says in a file that it is under way, and takes its time
SLOW_SAVE = (
    "import os, pathlib, time; fsync = os.fsync; "
    "os.fsync = lambda file: (pathlib.Path({mark!r}).touch(), time.sleep(1), fsync(file))"
)
SLOW_EVALUATION = (
    "import pathlib, time, util.train.monitor as m; evaluate = m.Monitor.evaluate; "
    "m.Monitor.evaluate = lambda *a: (pathlib.Path({mark!r}).touch(), time.sleep(1), evaluate(*a))[2]"
)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    write_images(folder := tmp_path_factory.mktemp("images"), 32)
    return folder


@pytest.fixture(scope="module")
def uninterrupted_run(images, tmp_path_factory) -> Path:
    """Return a run that nothing interrupts."""
    run = tmp_path_factory.mktemp("whole") / "run"
    with Ranks(command(images, run)) as ranks:
        assert ranks.finish()[0][0] == 0
    return run


def interrupt(ranks: Ranks) -> None:
    """Ctrl-C as a terminal sends it: to the whole group, data loader workers too."""
    os.killpg(ranks.processes[0].pid, signal.SIGINT)


def quiet(text: str) -> str:
    """stderr without the line about what is being finished; no traceback of any process."""
    assert "Traceback" not in text, text
    return "".join(line for line in text.splitlines(True) if line.strip() and not line.startswith("stopping: "))


def test_at_start_up(images, tmp_path):
    for seconds in (0.3, 2.0, 5.0):  # interpreter, imports of torch, of our own
        with Ranks(command(images, tmp_path / "run"), own_group=True) as ranks:
            time.sleep(seconds)
            interrupt(ranks)
            ((status, text),) = ranks.finish()
        assert status in (-signal.SIGINT, INTERRUPT_STATUS, REQUEUE_STATUS)
        if seconds > 1:
            assert len(quiet(text).splitlines()) <= 1


@pytest.mark.parametrize("workers", ["0", "2"])
def test_in_an_epoch_it_saves_and_says_the_command(images, uninterrupted_run, tmp_path, workers):
    run = tmp_path / "run"
    flags = ["--num_workers", workers]
    with Ranks(command(images, run, *flags), own_group=True) as ranks:
        wait_until(lambda: updates(run) >= 6)
        interrupt(ranks)
        ((status, text),) = ranks.finish()
    assert status == REQUEUE_STATUS
    step = newest_step(run)
    assert quiet(text) == f"main_pretrain.py: stopped by Ctrl-C and saved after update {step}; {ADVICE}\n"
    with Ranks(command(images, run, *flags)) as ranks:
        assert ranks.finish()[0][0] == 0
    same_end(run, uninterrupted_run)


@pytest.mark.parametrize("during", [SLOW_SAVE, SLOW_EVALUATION], ids=["save", "evaluation"])
@pytest.mark.parametrize("times", [1, 2])
def test_in_a_save_or_an_evaluation(images, tmp_path, during, times):
    run, mark = tmp_path / "run", tmp_path / "mark"
    flags = command(images, run, "--monitor_freq", "1", "--epochs", "2000")
    with Ranks(with_preface(during.format(mark=str(mark)), flags), own_group=True) as ranks:
        wait_until(lambda: newest_step(run) > 0)
        mark.unlink(missing_ok=True)
        wait_until(mark.exists)
        interrupt(ranks)
        if times == 2:
            time.sleep(0.2)
            begin = time.monotonic()
            interrupt(ranks)
        ((status, text),) = ranks.finish()
    assert status == (REQUEUE_STATUS if times == 1 else -signal.SIGINT)
    assert times == 1 or time.monotonic() - begin < 2
    assert (ADVICE in text) == (times == 1)
    assert len(quiet(text).splitlines()) == (1 if times == 1 else 0)
    assert CheckpointStore(run, 9, None, keep_best=False).load_latest() is not None
    with Ranks(command(images, run, "--monitor_freq", "1", "--epochs", "2000", "--max_steps", "1")) as ranks:
        assert ranks.finish()[0][0] == 0


def test_two_ranks_stop_at_one_update(images, tmp_path):
    run = tmp_path / "run"
    with Ranks(command(images, run, "--batch_size", "4"), 2) as ranks:
        wait_until(lambda: updates(run) >= 6)
        ranks.signal(signal.SIGINT, rank=1)
        ends = ranks.finish()
    assert [status for status, _ in ends] == [REQUEUE_STATUS] * 2
    assert all(f"saved after update {newest_step(run)}; {ADVICE}" in text for _, text in ends)


@pytest.mark.parametrize("variable", ["", "SLURM_JOB_ID", "SUBMITIT_EXECUTOR"])
def test_a_scheduler_queues_the_command_again_by_itself(monkeypatch, variable):
    for name in ("SLURM_JOB_ID", "SUBMITIT_EXECUTOR"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, "1")
    assert how_to_continue() == ("to be requeued" if variable else ADVICE)


def test_the_second_one_is_left_to_the_kernel(capfd):
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, *range(10, 13), signal.SIGINT)}
    try:
        stop = StopRequest().listen()
        os.kill(os.getpid(), signal.SIGINT)
        assert (stop.reason, stop.agreed()) == ("Ctrl-C", True)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert "Ctrl-C again ends without saving" in capfd.readouterr().err
