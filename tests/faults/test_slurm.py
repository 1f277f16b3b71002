"""Jobs on a real SLURM of two nodes on this machine: they end, and survive what schedulers do to jobs, bit by bit.

A run is caught at an early update and held (SIGSTOP) until the signal under test has come, so that it does not matter
how fast this machine is.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from scripts.submit import main as submit_main
from shared.flags import TINY
from shared.images import write_images
from util.runtime.files import ROOT
from util.weights.checkpoint import load_checkpoint

HERE = Path(__file__).resolve().parent / "slurm"
NEEDED = ("slurmctld", "slurmd", "sbatch", "munged")
MISSING = [name for name in NEEDED if shutil.which(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"no SLURM here: {', '.join(MISSING)} not found"),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can start SLURM's daemons"),
]
UPDATES = 40  # of a run: 10 epochs of 4


def run(*command: object, check: bool = True) -> subprocess.CompletedProcess:
    return subprocess.run([*map(str, command)], check=check, capture_output=True, text=True, timeout=120)


def wait_until(condition: Callable[[], object], seconds: float = 60.0, every: float = 0.2) -> object:
    """Return the first true value of `condition`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, condition
        time.sleep(every)
    return value


@pytest.fixture(scope="session")
def slurm(tmp_path_factory) -> Iterator[Path]:
    """Start a SLURM, which SLURM_CONF names; return its folder."""
    folder = tmp_path_factory.mktemp("slurm")
    patch = pytest.MonkeyPatch()
    patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    patch.setenv("OMP_NUM_THREADS", "1")
    try:
        run("bash", HERE / "up.sh", folder)
        yield folder
    finally:
        run("bash", HERE / "up.sh", folder, "--stop")
        patch.undo()


class Submitted:
    """A job that scripts/submit.py has submitted."""

    def __init__(self, folder: Path, launcher_flags: str, stage_flags: str):
        flags = f"--ngpus 0 --timeout 60 {launcher_flags} --job_dir {folder} -- {stage_flags}"
        printed = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
            patch.setattr(sys, "argv", ["submit.py", "pretrain", *flags.split()])
            submit_main()
        self.folder, self.number = folder, re.search(r"^job +(\d+):", printed.getvalue(), re.M)[1]
        self.element = ""  # of an array: "_1"

    def field(self, name: str) -> str:
        """Return a field of `scontrol show job`."""
        shown = run("scontrol", "-o", "show", "job", self.number + self.element).stdout
        return re.search(rf"\b{name}=(\S*)", shown)[1]

    def update(self, *settings: str) -> None:
        run("scontrol", "update", f"jobid={self.number}{self.element}", *settings)

    def log(self, rank: int = 0) -> str:
        path = self.folder / f"{self.number}{self.element}_{rank}_log.out"
        return path.read_text() if path.exists() else ""

    def ranks(self) -> dict[int, int]:
        """Process id of each rank of the stage."""
        processes = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                arguments = (path / "cmdline").read_bytes().split(b"\0")
                environment = (path / "environ").read_bytes().split(b"\0")
            except OSError:  # it has just ended
                continue
            if str(self.folder / "code" / "main_pretrain.py").encode() in arguments:
                values = dict(entry.split(b"=", 1) for entry in environment if b"=" in entry)
                processes[int(values[b"RANK"])] = int(path.name)
        return processes

    def hold(self, update: int = 6) -> dict[int, int]:
        """Wait until the run has logged that update and stop its processes there."""
        log = self.folder / "log.jsonl"
        wait_until(lambda: log.exists() and len(log.read_text().splitlines()) >= update, every=0.01)
        return self.send(signal.SIGSTOP)

    def send(self, number: int) -> dict[int, int]:
        """Send the signal to all ranks."""
        ranks = self.ranks()
        for process in ranks.values():
            os.kill(process, number)
        return ranks

    def heard(self, name: str) -> None:
        """Wait until the launchers of both ranks have got this signal."""
        line = f"launch: forwarded {name}"
        wait_until(lambda: line in self.log(0) and line in self.log(1))

    def end(self, seconds: float = 60.0) -> str:
        """Return the state in which the job ends; one that is queued again need not wait the usual two minutes."""

        def ended() -> str:
            state = self.field("JobState")
            if state == "PENDING" and self.field("Reason") == "BeginTime":
                time.sleep(2)  # the node refuses the same job again within the same second
                self.update("StartTime=now")
            return state if state in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL") else ""

        return wait_until(ended, seconds)

    def weights(self, folder: str = ".") -> dict[str, dict[str, torch.Tensor]]:
        """`model` and `model_ema` of the last checkpoint."""
        checkpoint = load_checkpoint(self.folder / folder / "checkpoint-9.pth")
        assert checkpoint["updates"] == UPDATES
        return {part: checkpoint[part] for part in ("model", "model_ema")}

    def resumed_at(self) -> list[int]:
        """Return the updates after which the run resumed."""
        return [int(n) for n in re.findall(r"resumed after update (\d+)", self.log())]


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, 64)
    return folder


@pytest.fixture(scope="session")
def submit(slurm, images, tmp_path_factory) -> Iterator[Callable[..., Submitted]]:
    """Submit a pre-training of two processes, one per node, of `UPDATES` updates."""
    jobs = []

    def call(launcher_flags: str = "--nodes 2", stage_flags: str = "") -> Submitted:
        flags = f"{TINY} --epochs 10 --data_path {images} {stage_flags}"
        jobs.append(Submitted(tmp_path_factory.mktemp("job"), launcher_flags, flags))
        return jobs[-1]

    yield call
    for job in jobs:
        run("scancel", job.number, check=False)


@pytest.fixture(scope="session")
def undisturbed(submit) -> dict[str, dict[str, torch.Tensor]]:
    """Weights after a run that nothing interrupts."""
    job = submit()
    assert job.end() == "COMPLETED", job.log()
    assert job.field("Restarts") == "0"
    assert len(job.log(1)) > 0  # each rank has its log
    return job.weights()


@pytest.fixture
def same(undisturbed) -> Callable[[Submitted], None]:
    """Check that a job was queued again once, and ends as the undisturbed one, bit by bit."""

    def check(job: Submitted, earliest: int) -> None:
        assert job.end() == "COMPLETED", job.log()
        assert job.field("Restarts") == "1"
        assert len(job.resumed_at()) == 1
        assert earliest <= job.resumed_at()[0] < UPDATES
        for part, tensors in job.weights().items():
            assert tensors.keys() == undisturbed[part].keys()
            for name, tensor in tensors.items():
                assert torch.equal(tensor, undisturbed[part][name]), (part, name)
        steps = [json.loads(line)["step"] for line in (job.folder / "log.jsonl").read_text().splitlines()]
        assert steps == sorted(set(steps))

    return check


# ---- what ends well --------------------------------------------------------------------------------------


def test_the_time_limit(submit, same):
    job = submit()
    job.hold()
    job.update("TimeLimit=1")  # less than --signal_delay is left
    job.heard("SIGUSR2")
    job.send(signal.SIGCONT)
    wait_until(lambda: job.field("JobState") == "PENDING")
    job.update("TimeLimit=60")
    same(job, earliest=6)
    assert "requeue: after 0 restarts" in job.log()


def test_preemption(submit, same):
    job = submit(stage_flags="--num_workers 1")  # a data loader worker gets the signals too
    job.hold()
    run("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    job.heard("SIGUSR2")
    job.send(signal.SIGCONT)
    same(job, earliest=6)


def test_requeued_by_hand(submit, same):
    job = submit()
    job.hold()
    run("scontrol", "requeue", job.number)
    same(job, earliest=4)  # at least what the last epoch left


def test_a_node_goes_down(submit, same):
    job = submit()
    lost = job.hold()[1]
    run("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    os.kill(lost, signal.SIGKILL)  # as it would be with a real node
    wait_until(lambda: job.field("JobState") == "PENDING")
    run("scontrol", "update", "nodename=n2", "state=resume", check=False)  # it may have come back by itself
    same(job, earliest=4)


def test_one_run_of_an_array_is_queued_again(submit):
    job = submit("--seeds 0 1", "--accum_iter 2")
    job.element = "_1"
    wait_until(lambda: (job.folder / "seed_1" / "log.jsonl").exists())
    run("scancel", "--signal=USR2", f"{job.number}_1")
    assert job.end() == "COMPLETED", job.log()
    assert job.field("Restarts") == "1"
    job.element = "_0"
    assert job.end() == "COMPLETED", job.log()
    assert job.field("Restarts") == "0"
    seeds = [job.weights(f"seed_{seed}")["model"]["patch_embed.proj.weight"] for seed in (0, 1)]
    assert not torch.equal(*seeds)


# ---- what ends badly, but ends ---------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_job(submit, rank):
    job = submit()
    os.kill(job.hold()[rank], signal.SIGKILL)
    job.send(signal.SIGCONT)
    assert job.end(60) == "FAILED"
    assert job.field("Restarts") == "0"
    wait_until(lambda: not job.ranks(), 10)


def test_a_cancelled_job_does_not_come_back(submit):
    job = submit()
    job.hold()
    run("scancel", job.number)
    assert job.end() == "CANCELLED"
    time.sleep(3)
    assert job.field("JobState") == "CANCELLED"
    wait_until(lambda: not job.ranks(), 10)


def test_no_more_than_max_requeues(submit):
    job = submit("--nodes 1 --max_requeues 0", "--max_minutes 0.001")
    assert job.end() == "FAILED"
    assert job.field("ExitCode") == "75:0"
    assert "requeue: not again, after --max_requeues 0" in job.log()


def test_sbatch_refuses(slurm, tmp_path):
    command = [sys.executable, "scripts/submit.py", "pretrain", "--partition", "nowhere", "--ngpus", "0"]
    command += ["--job_dir", str(tmp_path / "job"), "--"]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert line.startswith("submit.py: error: sbatch refuses: ")
    assert "invalid partition specified: nowhere" in line
    assert not (tmp_path / "job").exists()


def test_follow_ends_with_the_status_of_the_job(slurm, tmp_path):
    flags = f"--ngpus 0 --follow --job_dir {tmp_path / 'job'} -- {TINY} --data_path nowhere"
    command = [sys.executable, "scripts/submit.py", "pretrain", *flags.split()]
    followed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert followed.returncode == 2
    assert "--data_path nowhere: there is no such file or folder" in followed.stdout
    assert followed.stderr.splitlines()[-1].endswith(": FAILED")


# ---- a table ---------------------------------------------------------------------------------------------


def test_each_row_of_a_table_is_finetuned_once_it_is_pretrained(slurm, tmp_path):
    short = "--epochs 1 --warmup_epochs 0 --batch_size 128"
    flags = ["C", "--scale", "tiny", "--output_dir", tmp_path, f"--pretrain_flags={short} --monitor_freq 0"]
    flags += [f"--finetune_flags={short}", "--submit", "--", "--ngpus", "0", "--timeout", "60"]
    run(sys.executable, ROOT / "scripts" / "tables.py", "run", *flags)
    wait_until(lambda: len(list(tmp_path.glob("tiny/*/seed_0/finetune/results.jsonl"))) == 3, 240)
    for row in tmp_path.glob("tiny/*/seed_0"):
        pretrained = json.loads((row / "pretrain" / "results.jsonl").read_text())["finished"]
        assert json.loads((row / "finetune" / "run.json").read_text())["started"] >= pretrained
