"""Real processes of the mains, to be signalled, stopped and killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from shared.flags import TINY
from util.runtime.files import ROOT
from util.weights.checkpoint import CheckpointStore, load_checkpoint

PATIENCE = 400  # seconds that anything may take on a busy machine


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def with_preface(code: str, command: list) -> list:
    """Return a command that runs some Python before its program."""
    return [
        "-c",
        f"import runpy, sys\nsys.argv = sys.argv[1:]\n{code}\nrunpy.run_path(sys.argv[0], run_name='__main__')",
        *command,
    ]


class Ranks:
    """`number` processes of one run, as a launcher would start them; each with one thread, so that sums repeat.

    Args:
        command: what stands behind `python`.
        own_group: each process leads a group of its own, to be signalled with those that it starts.
    """

    def __init__(self, command: list, number: int = 1, own_group: bool = False):
        port = free_port()
        self.processes = []
        for rank in range(number):
            env = os.environ | {"OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank)}
            env |= {"WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, *map(str, command)],
                    cwd=ROOT,
                    env=env,
                    text=True,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    start_new_session=own_group,
                )
            )

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            for pid in (process.pid, *children(process.pid)):
                send(pid, signal.SIGKILL)
            process.communicate()

    def signal(self, number: signal.Signals, rank: int = 0) -> None:
        """Send a signal to one rank."""
        self.processes[rank].send_signal(number)

    def finish(self) -> list[tuple[int, str]]:
        """Wait for all ranks; return the exit status and stderr of each."""
        errors = [process.communicate(timeout=PATIENCE)[1] for process in self.processes]
        return [(process.returncode, text) for process, text in zip(self.processes, errors, strict=True)]


def in_two_processes(work: Callable[[int], Any], folder: Path) -> list[Any]:
    """Run `work(rank)`, a function of a module, in two processes connected by gloo; return what each returned."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    mp.spawn(_one_of_two, args=(work, folder), nprocs=2)
    return [torch.load(folder / f"{rank}.pth") for rank in range(2)]


def _one_of_two(rank: int, work: Callable[[int], Any], folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(work(rank), folder / f"{rank}.pth")
    dist.destroy_process_group()


def children(pid: int) -> list[int]:
    """Return the processes that a process has started, and those that these have started."""
    try:
        lists = [task.joinpath("children").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    except OSError:
        return []
    direct = [int(child) for text in lists for child in text.split()]
    return direct + [grandchild for child in direct for grandchild in children(child)]


def send(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process that may have ended already."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def wait_until(holds: Callable[[], bool], seconds: float = PATIENCE) -> None:
    """Check ten times a second until the condition holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def updates(run: Path) -> int:
    """Return the last update in a run's log, 0 if there is none."""
    try:
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    except (OSError, ValueError):
        return 0
    return max((line["step"] for line in lines), default=0)


def newest_step(run: Path) -> int:
    """Return the update of the newest complete checkpoint, 0 if there is none."""
    checkpoints = CheckpointStore(run, 1, None, keep_best=False).list() if run.exists() else []
    return checkpoints[-1][1].step if checkpoints else 0


def same_end(a: Path, b: Path) -> None:
    """Assert that the newest checkpoints of two runs are bit-equal: weights, momentum encoder, optimiser."""
    ends = [load_checkpoint(CheckpointStore(run, 1, None, keep_best=False).list()[-1][0]) for run in (a, b)]
    assert ends[0]["updates"] == ends[1]["updates"]
    for part in ("model", "model_ema"):
        assert ends[0][part].keys() == ends[1][part].keys()
        different = [name for name, x in ends[0][part].items() if not torch.equal(x, ends[1][part][name])]
        assert not different, f"{part} differs in {different[:3]}"
    moments = [checkpoint["optimizer"]["state"] for checkpoint in ends]
    assert all(torch.equal(moments[0][p]["exp_avg_sq"], moments[1][p]["exp_avg_sq"]) for p in moments[0])


def command(images: Path, output: Path, *flags: str) -> list[str]:
    """Return the command of a pre-training with 4 updates of 8 images per epoch, for any number of ranks."""
    shared = f"{TINY} --head_norm_layer LN --epochs 60 --auto_resume"
    return ["main_pretrain.py", *shared.split(), "--data_path", str(images), "--output_dir", str(output), *flags]
