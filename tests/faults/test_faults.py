"""Faults that a run must survive, made to happen: signals, dead and hung processes, NaN, two runs in one folder.

docs/FAULTS.md says which test belongs to which fault.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from shared.images import write_images
from shared.ranks import (
    PATIENCE,
    Ranks,
    children,
    command,
    newest_step,
    same_end,
    send,
    updates,
    wait_until,
    with_preface,
)
from util.runtime.errors import REQUEUE_STATUS, run_main
from util.runtime.files import writable_folder
from util.runtime.logs import RunLog
from util.runtime.stop import SCHEDULER_SIGNALS, StopRequest
from util.train.monitor import Monitor, MonitorScores
from util.train.trainer import TrainState
from util.weights.checkpoint import CheckpointStore, load_checkpoint

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")


@pytest.fixture(autouse=True)
def _signals_as_before():
    before = {number: signal.getsignal(number) for number in (*SCHEDULER_SIGNALS, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def uninterrupted_run(tmp_path_factory) -> tuple[Path, Path]:
    """Images, and the run of one process that nothing interrupts."""
    root = tmp_path_factory.mktemp("one")
    write_images(root / "images", 32)
    with Ranks(command(root / "images", root / "run")) as ranks:
        assert ranks.finish()[0][0] == 0
    return root / "images", root / "run"


# ---- signals -------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize(
    "numbers", [["SIGTERM"], ["SIGUSR1"], ["SIGUSR2"], ["SIGTERM", "SIGUSR2", "SIGUSR2", "SIGTERM"]]
)
def test_a_signal_saves_once_and_asks_for_a_requeue(uninterrupted_run, tmp_path, numbers):
    images, expected = uninterrupted_run
    run = tmp_path / "run"
    with Ranks(command(images, run)) as ranks:
        wait_until(lambda: updates(run) >= 6)
        for number in numbers:
            ranks.signal(signal.Signals[number])
        ((status, output),) = ranks.finish()
    assert status == REQUEUE_STATUS
    # of signals that came together any may be the first that Python looks at
    assert any(f"stopped by {number} and saved after update {newest_step(run)};" in output for number in numbers)
    assert len(output.splitlines()) == 1
    assert len(list(run.glob("checkpoint-*-step*.pth"))) <= 1  # none where the signal came at an epoch's end
    with Ranks(command(images, run)) as ranks:
        assert ranks.finish()[0][0] == 0
    same_end(run, expected)


@pytest.fixture(scope="module")
def two_whole(tmp_path_factory) -> tuple[Path, Path]:
    """Images, and the run of two processes that nothing interrupts."""
    root = tmp_path_factory.mktemp("two")
    write_images(root / "images", 32)
    with Ranks(command(root / "images", root / "run", "--batch_size", "4"), 2) as ranks:
        assert [status for status, _ in ranks.finish()] == [0, 0]
    return root / "images", root / "run"


@pytest.mark.slow
@pytest.mark.parametrize("asleep", [False, True], ids=["", "while the other rank sleeps"])
def test_a_signal_to_one_rank_stops_both_at_one_update(two_whole, tmp_path, asleep):
    images, expected = two_whole
    run = tmp_path / "run"
    flags = command(images, run, "--batch_size", "4")
    with Ranks(flags, 2) as ranks:
        wait_until(lambda: updates(run) >= 6)
        if asleep:  # rank 1 is then inside a collective, or soon will be
            ranks.signal(signal.SIGSTOP, rank=0)
            time.sleep(1)
        ranks.signal(signal.SIGUSR2, rank=1)
        if asleep:
            time.sleep(1)
            ranks.signal(signal.SIGCONT, rank=0)
        ends = ranks.finish()
    assert [status for status, _ in ends] == 2 * [REQUEUE_STATUS]
    assert "stopped by another rank" in ends[0][1]
    assert "stopped by SIGUSR2" in ends[1][1]
    with Ranks(flags, 2) as ranks:
        assert [status for status, _ in ranks.finish()] == [0, 0]
    same_end(run, expected)


@pytest.mark.parametrize("during", ["save", "look"])
def test_a_signal_during_a_save_or_an_evaluation_waits_for_its_end(
    pretrain, flat_folder, tmp_path, monkeypatch, during
):
    flags = ("--data_path", flat_folder, "--epochs 3 --monitor_freq 1")
    expected = tmp_path / "expected"
    pretrain(*flags, output=expected)

    def signalling(original, times=[0]):  # noqa: B006 - counts over both runs
        def call(*arguments, **keywords):
            times[0] += 1
            if times[0] == 2:
                os.kill(os.getpid(), signal.SIGUSR2)
            return original(*arguments, **keywords)

        return call

    owner, name = (torch, "save") if during == "save" else (Monitor, "evaluate")
    monkeypatch.setattr(owner, name, signalling(getattr(owner, name)))
    with pytest.raises(SystemExit) as stop:
        pretrain(*flags)
    assert stop.value.code == REQUEUE_STATUS
    run = tmp_path / "run"
    assert not list(run.glob(".unfinished-*"))
    checkpoints = CheckpointStore(run, 9, None, keep_best=False).list()
    assert all(load_checkpoint(path)["updates"] == manifest.step for path, manifest in checkpoints)  # hashes hold
    pretrain(*flags, "--auto_resume")
    same_end(run, expected)


def test_a_stop_at_an_epoch_s_end_keeps_what_was_saved_there(pretrain, flat_folder, tmp_path, monkeypatch):
    calls = itertools.count()  # the first one comes before the first epoch

    def evaluate(monitor):
        if next(calls) == 1:
            os.kill(os.getpid(), signal.SIGUSR2)
        return MonitorScores({"knn": 5.0})

    monkeypatch.setattr(Monitor, "evaluate", evaluate)
    with pytest.raises(SystemExit) as stop:
        pretrain("--data_path", flat_folder, "--monitor_freq 1")
    assert stop.value.code == REQUEUE_STATUS
    ((path, manifest),) = CheckpointStore(tmp_path / "run", 9, None, keep_best=True).list()
    assert (path.name, manifest.step, manifest.metric) == ("checkpoint-0.pth", 4, 5.0)


def test_a_stop_before_the_first_update_saves_nothing(pretrain, flat_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(StopRequest, "agreed", lambda self: True)
    with pytest.raises(SystemExit) as stop:
        pretrain("--data_path", flat_folder)
    assert stop.value.code == REQUEUE_STATUS
    assert "before the first update; run the same command with --auto_resume" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("checkpoint*"))


@pytest.mark.slow
def test_sigterm_to_the_whole_group_with_loader_workers(uninterrupted_run, tmp_path):
    """torchrun, SLURM and systemd end a run like this: every process gets the signal."""
    images, expected = uninterrupted_run
    run = tmp_path / "run"
    with Ranks(command(images, run, "--num_workers", "2"), own_group=True) as ranks:
        wait_until(lambda: updates(run) >= 6)
        os.killpg(ranks.processes[0].pid, signal.SIGTERM)
        ((status, output),) = ranks.finish()
    assert status == REQUEUE_STATUS
    assert f"stopped by SIGTERM and saved after update {newest_step(run)};" in output
    with Ranks(command(images, run, "--num_workers", "2")) as ranks:
        assert ranks.finish()[0][0] == 0
    same_end(run, expected)


def test_the_best_is_saved_whatever_save_freq_says(pretrain, flat_folder, tmp_path, monkeypatch):
    accuracies = iter([1.0, 2.0, 9.0, 3.0, 4.0])  # before the first epoch and after each of four
    monkeypatch.setattr(Monitor, "evaluate", lambda _: MonitorScores({"knn": next(accuracies)}))
    pretrain("--data_path", flat_folder, "--epochs 4 --monitor_freq 1 --save_freq 4 --keep_last 1")
    store = CheckpointStore(tmp_path / "run", 9, None, keep_best=True)
    assert store.best_metric == 9.0
    assert load_checkpoint(tmp_path / "run" / "checkpoint-best.pth")["updates"] == 8
    assert [path.name for path, _ in store.list()] == ["checkpoint-3.pth"]


def test_a_full_disk_at_the_log_is_one_line(small_disk, capsys):
    log = RunLog(small_disk, None, enabled=True)
    (small_disk / "other").write_bytes(bytes(900_000))

    def write() -> None:
        for step in range(10_000):
            log.scalars(step, {"loss": 0.0})

    with pytest.raises(SystemExit) as stop:
        run_main("x", write)
    with contextlib.suppress(OSError):  # of what it still holds
        log.close()
    assert stop.value.code == 1
    assert capsys.readouterr().err == (
        "x: error: the disk is full: free some space and run the same command again; checkpoints that were written"
        " before are intact (OSError: [Errno 28] No space left on device)\n"
    )


@pytest.mark.parametrize(("before", "now"), [(False, True), (True, False)])
def test_fp16_and_another_precision_may_follow_each_other(capsys, before, now):
    def made(fp16: bool) -> TrainState:
        model = torch.nn.Linear(2, 2)
        scaler = torch.amp.GradScaler("cpu", enabled=fp16)
        return TrainState(model, None, torch.optim.AdamW(model.parameters()), scaler, updates=int(fp16 == before))

    saved, state = made(before), made(now)
    state.load_state_dict(saved.state_dict())
    assert state.updates == 1
    assert torch.equal(state.model.weight, saved.model.weight)
    assert state.scaler.is_enabled() == now
    assert "WARNING: --amp: " in capsys.readouterr().err


def test_the_clock_stops_a_run_too(pretrain, flat_folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        pretrain("--data_path", flat_folder, "--epochs 500 --max_minutes 0.01")
    assert stop.value.code == REQUEUE_STATUS
    assert "stopped by --max_minutes 0.01 and saved after update" in capsys.readouterr().err
    assert newest_step(tmp_path / "run") > 0


SLOW_DISK = "import os, time; fsync = os.fsync; os.fsync = lambda file: (time.sleep(1), fsync(file))"


@pytest.mark.slow
def test_no_rank_ends_while_another_saves(flat_folder, tmp_path):
    """torchrun kills those that are left half a minute after the first end."""
    run = tmp_path / "run"
    flags = command(flat_folder, run, "--batch_size", "4", "--max_minutes", "0.05", "--epochs", "5000")
    with Ranks(with_preface(SLOW_DISK, flags), 2) as ranks:
        ranks.processes[1].wait(timeout=PATIENCE)
        saved = newest_step(run)
        ends = ranks.finish()
    assert [status for status, _ in ends] == 2 * [REQUEUE_STATUS]
    assert f"saved after update {saved};" in ends[1][1]


@pytest.mark.slow
def test_bad_images_of_all_ranks_are_counted_and_named(flat_folder, tmp_path):
    bad = sorted(flat_folder.glob("*.*"))[:6]
    for path in bad:
        path.write_bytes(b"")
    flags = command(flat_folder, tmp_path / "run", "--batch_size", "4", "--max_steps", "4", "--on_bad_image", "skip")
    with Ranks(flags, 2) as ranks:
        ends = ranks.finish()
    assert [status for status, _ in ends] == [0, 0]
    line = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert line["bad_images"] == len(bad)  # of an epoch
    named = ends[1][1].count("skipped a bad image: ")  # rank 0 says it on stdout
    assert 0 < named < len(bad)


FAILING = """
import os, sys, time, torch
import torch.distributed as dist
from util.runtime.distributed import start_processes
from util.runtime.errors import UserError, run_main

class Slow:
    def __del__(self):
        time.sleep(4)

slow = Slow()  # which Python lets go while it shuts down

def main():
    rank = start_processes("cpu").rank
    dist.barrier()
    time.sleep(2 * rank)  # rank 0's exchange is answered while it ends
    dist.all_reduce(torch.zeros(1), async_op=True)
    raise {error}

run_main("main_pretrain.py", main)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        ("UserError('--this: is wrong')", 2, "main_pretrain.py: error: --this: is wrong"),
        ("ValueError('a bug')", 1, "the command, and the run's config.yaml and run.json"),
        ("SystemExit('words')", 1, "words"),
    ],
)
def test_a_rank_s_error_is_its_exit_status_whatever_gloo_still_does(error, expected, message):
    """A thread of gloo that gives back a tensor while Python shuts down would end the process by SIGABRT."""
    with Ranks(["-c", FAILING.format(error=error)], 2) as ranks:
        ends = ranks.finish()
    for status, output in ends:
        assert status == expected
        assert output.strip().endswith(message)


# ---- resume --------------------------------------------------------------------------------------------------
ELSEWHERE = "import os; sys.argv = [part.replace('RANK', os.environ['RANK']) for part in sys.argv]"


@pytest.mark.slow
@pytest.mark.parametrize("older", [False, True])
def test_ranks_that_find_different_checkpoints_do_not_train(two_whole, tmp_path, older):
    """The ranks find different files where --output_dir lies on a disk of each node."""
    images, expected = two_whole
    shutil.copytree(expected, tmp_path / "0")
    if older:
        shutil.copytree(expected, tmp_path / "1")
        (tmp_path / "1" / "checkpoint-59.pth").unlink()
    flags = command(images, tmp_path / "RANK", "--batch_size", "4")
    with Ranks(with_preface(ELSEWHERE, flags), 2) as ranks:
        ends = ranks.finish()
    other = "a checkpoint after update 236" if older else "nothing"
    for rank, (status, output) in enumerate(ends):
        assert status == 2
        message = f"the processes find a checkpoint after update 240 and {other};"
        assert f"--output_dir {tmp_path / str(rank)}: {message}" in output


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0)])
def test_a_resume_in_mid_epoch_does_not_depend_on_loader_workers(pretrain, flat_folder, tmp_path, before, after):
    flags, uninterrupted, parts = ("--data_path", flat_folder), tmp_path / "whole", tmp_path / "parts"
    expected = pretrain(*flags, output=uninterrupted)
    pretrain(*flags, f"--max_steps 6 --num_workers {before}", output=parts)
    log = pretrain(*flags, f"--auto_resume --num_workers {after}", output=parts)
    assert [line["loss"] for line in log] == [line["loss"] for line in expected]
    same_end(parts, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_processes_needs_elastic(two_whole, tmp_path, before, after):
    images, expected = two_whole
    run = tmp_path / "run"
    batch = {1: "8", 2: "4"}
    with Ranks(command(images, run, "--batch_size", batch[before], "--max_steps", "6"), before) as ranks:
        assert {status for status, _ in ranks.finish()} == {0}
    with Ranks(command(images, run, "--batch_size", batch[after]), after) as ranks:
        for status, output in ranks.finish():
            assert status == 2
            assert (
                f"processes is {after} here but {before} in the checkpoint, make them equal, or add --elastic" in output
            )
    # the same flags as before the change: the batch follows
    with Ranks(command(images, run, "--batch_size", batch[before], "--elastic"), after) as ranks:
        assert {status for status, _ in ranks.finish()} == {0}
    logs = [
        [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] for folder in (run, expected)
    ]
    assert [line["step"] for line in logs[0]] == [line["step"] for line in logs[1]]
    curves = [[line["loss"] for line in log] for log in logs]
    assert curves[0] == pytest.approx(curves[1], rel=2e-3)  # another order of sums, over 240 updates
    assert curves[0][:12] == pytest.approx(curves[1][:12], abs=1e-5)


# ---- dead and hung processes -----------------------------------------------------------------------------------
def torchrun(*arguments: str) -> list[str]:
    """torchrun for two workers on this machine."""
    return ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *arguments]


@linux
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_twenty_killed_workers_and_a_bit_equal_end(two_whole, tmp_path, monkeypatch):
    images, _ = two_whole
    expected, run = tmp_path / "expected", tmp_path / "run"
    long = ("--batch_size", "4", "--epochs", "200")
    with Ranks(command(images, expected, *long), 2) as ranks:
        assert [status for status, _ in ranks.finish()] == [0, 0]
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    chance, kills = random.Random(0), 0
    with Ranks([*torchrun("--max-restarts=20"), *command(images, run, *long)]) as agent:
        while kills < 20:
            step = newest_step(run)
            wait_until(lambda step=step: newest_step(run) > step)
            time.sleep(chance.uniform(0, 0.2))  # in an update, a save, between two epochs
            workers = [p for p in children(agent.processes[0].pid) if "main_pretrain" in command_of(p)]
            if workers:  # it was not the last save of a group that has just ended
                send(chance.choice(workers), signal.SIGKILL)
                kills += 1
        ((status, output),) = agent.finish()
    assert status == 0, output[-2000:]
    assert newest_step(run) == 800
    same_end(run, expected)


def command_of(pid: int) -> str:
    """Return the command line of a process; nothing for one that has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


@linux
@pytest.mark.slow
def test_workers_end_with_torchrun_s_agent(two_whole, tmp_path):
    images, _ = two_whole
    run = tmp_path / "run"
    with Ranks([*torchrun(), *command(images, run, "--batch_size", "4", "--epochs", "2000")]) as agent:
        wait_until(lambda: newest_step(run) > 0)
        workers = children(agent.processes[0].pid)
        assert len(workers) >= 2
        agent.signal(signal.SIGKILL)
        wait_until(lambda: not any(is_running(worker) for worker in workers), seconds=20)
    step = newest_step(run)
    time.sleep(2)
    assert newest_step(run) == step  # no orphan saves


def is_running(pid: int) -> bool:
    """True if there is such a process, and it is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@linux
@pytest.mark.slow
@pytest.mark.parametrize("fault", ["killed", "hung"])
def test_a_dead_or_hung_loader_worker_ends_the_run(flat_folder, tmp_path, fault):
    run = tmp_path / "run"
    flags = ["--num_workers", "1", "--epochs", "2000", "--loader_timeout", "5"]
    with Ranks(command(flat_folder, run, *flags)) as ranks:
        wait_until(lambda: updates(run) >= 4)
        for loader in children(ranks.processes[0].pid):
            send(loader, signal.SIGKILL if fault == "killed" else signal.SIGSTOP)
        begin = time.monotonic()
        ((status, output),) = ranks.finish()
    assert time.monotonic() - begin < PATIENCE / 4
    assert status == 1
    assert "a data loader worker died or hung" in output.splitlines()[-1]


def test_processes_of_several_nodes_may_have_equal_ids(tmp_path):
    """Each looks whether the shared folder can be written: threads have one process id, as those of containers may."""
    folder = tmp_path / "run"
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: writable_folder(folder, "output_dir"), range(1000))) == {folder}
    assert list(folder.iterdir()) == []


@pytest.mark.slow
def test_two_runs_on_one_folder(flat_folder, tmp_path):
    run = tmp_path / "run"
    with Ranks(command(flat_folder, run, "--epochs", "2000")) as first:
        wait_until(lambda: updates(run) >= 2)
        with Ranks(command(flat_folder, run)) as second:
            ((status, output),) = second.finish()
        assert status == 2
        assert f"another run writes there (process {first.processes[0].pid} on " in output
        first.signal(signal.SIGKILL)
        first.finish()
    with Ranks(command(flat_folder, run, "--max_steps", str(newest_step(run) + 1), "--epochs", "2000")) as third:
        assert third.finish()[0][0] == 0  # the dead hold no lock


# ---- losses that are not finite --------------------------------------------------------------------------------

# the decoder's loss is not a number in some updates of one rank
POISONED = """
import os, sys
import main_pretrain
from models_lut import LUT
from util.runtime.errors import run_main
calls, original, rank, bad = [0], LUT.mim_loss, int(os.environ["RANK"]), {bad}
def mim_loss(self, *arguments):
    calls[0] += 1
    loss = original(self, *arguments)
    return loss * float("nan") if rank == {rank} and calls[0] in bad else loss
LUT.mim_loss = mim_loss
run_main("main_pretrain.py", main_pretrain.main)
"""


def poisoned(images: Path, output: Path, rank: int, bad: set[int], *flags: str) -> list[str]:
    return ["-c", POISONED.format(rank=rank, bad=bad), *command(images, output, "--batch_size", "4", *flags)[1:]]


@pytest.mark.slow
def test_nan_on_one_rank_stops_all_and_is_explained(two_whole, tmp_path):
    images, _ = two_whole
    run = tmp_path / "run"
    with Ranks(poisoned(images, run, 1, {6}, "--print_freq", "3", "--save_freq", "1"), 2) as ranks:
        ends = ranks.finish()
    for status, output in ends:
        assert status == 1
        assert "the loss is no longer finite: update 6 (loss nan" in output
        assert len([line for line in output.splitlines() if "error" in line]) == 1
    (report,) = [json.loads(line) for line in (run / "nonfinite.json").read_text().splitlines()]
    assert report["update"] == 6
    assert report["ranks"][1]["losses"]["mim"] == "nan"
    assert report["gradient_norms"]["decoder_blocks.0"] == "nan"
    order = torch.randperm(32, generator=torch.Generator().manual_seed(1)).tolist()  # of epoch 1, seed 0
    assert [rank["samples"] for rank in report["ranks"]] == [order[8:16][0::2], order[8:16][1::2]]
    assert newest_step(run) == 4
    assert all(torch.isfinite(x).all() for x in load_checkpoint(run / "checkpoint-0.pth")["model"].values())


@pytest.mark.slow
def test_a_bad_update_can_be_left_out(two_whole, tmp_path):
    images, _ = two_whole
    run = tmp_path / "run"
    flags = ("--on_nonfinite", "skip", "--epochs", "3", "--head_norm_layer", "BN")
    with Ranks(poisoned(images, run, 1, {6, 7}, *flags), 2) as ranks:
        ends = ranks.finish()
    assert [status for status, _ in ends] == [0, 0]
    assert ends[0][1].count("WARNING: left out update") == 2
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" not in line] == [6, 7]
    assert lines[-1]["skipped_updates"] == 2
    end = load_checkpoint(run / "checkpoint-2.pth")
    assert all(torch.isfinite(x).all() for part in ("model", "model_ema") for x in end[part].values())
    with Ranks(poisoned(images, tmp_path / "bad", 0, set(range(3, 99)), *flags), 2) as ranks:
        ends = ranks.finish()
    assert [status for status, _ in ends] == [1, 1]
    assert "10 updates in a row were not finite, last: update 12" in ends[0][1]
