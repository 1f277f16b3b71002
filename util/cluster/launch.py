"""The launcher that a submitted job runs: start the processes of a stage, forward signals, return their exit status.

The ranks themselves agree whether and when to stop after a signal (util/runtime/stop.py); then they save and exit with
REQUEUE_STATUS. So this replaces submitit's own handlers, which would requeue at the first signal.
"""

from __future__ import annotations

import itertools
import math
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType

from util.cluster.rendezvous import announce, ask_for_port, host_store
from util.runtime.errors import REQUEUE_STATUS

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
REPEAT_SECONDS = 2.0  # a signal is sent again until the processes end: the first may come before they listen
PEERS_SECONDS = 10.0  # how long the other ranks may run after one has failed, to print their errors


@dataclass(frozen=True)
class StageJob:
    """The function that submitit calls: once per rank under SLURM, once for all ranks on this machine."""

    command: tuple[str, ...]  # interpreter, script and flags
    folder: str  # working folder: that of the command line, for relative paths among the flags
    threads: int  # per process; OMP_NUM_THREADS overrides it
    local_processes: int = 0  # number of processes that one call starts; 0: under SLURM, one task per rank
    max_requeues: int = 0  # for local processes; under SLURM the batch script counts

    def __call__(self) -> int:
        """Run to the end. Return 0 or a local job's exit status; a task of SLURM raises SystemExit with its status."""
        return self.run_here() if self.local_processes else self.run_rank()

    def run_rank(self) -> int:
        """Run the rank of this SLURM task.

        Only rank 0 exits with REQUEUE_STATUS: srun ends all tasks at the first status that is not 0, and rank 0 may be
        the last to finish.
        """
        from submitit import JobEnvironment

        task = JobEnvironment()
        start = int(task.raw_job_id), int(os.environ.get("SLURM_RESTART_COUNT", 0))
        children = Children()
        if task.global_rank == 0:
            store = host_store()
            port = store.port
            announce(port, *start)
        else:
            port = ask_for_port(task.hostnames[0], *start)
        size = (task.num_tasks, task.num_tasks // task.num_nodes)
        environment = self.environment(task.global_rank, task.local_rank, *size, task.hostnames[0], port)
        status = children.run(self.command, self.folder, [environment])
        if status and not (status == REQUEUE_STATUS and task.global_rank):
            raise SystemExit(status)
        return 0

    def run_here(self) -> int:
        """Run all ranks, and again after each REQUEUE_STATUS, unless SIGTERM ended them."""
        size = self.local_processes
        for restarts in itertools.count():
            children, store = Children(), host_store()
            environments = [self.environment(i, i, size, size, "127.0.0.1", store.port) for i in range(size)]
            status = children.run(self.command, self.folder, environments)
            if status != REQUEUE_STATUS or children.received == signal.SIGTERM:
                return status
            if restarts >= self.max_requeues:
                print(f"requeue: not again, after --max_requeues {self.max_requeues}", flush=True)
                return status
            print(f"requeue: after {restarts} restarts", flush=True)

    def environment(
        self, rank: int, local_rank: int, world_size: int, local_size: int, host: str, port: int
    ) -> dict[str, str]:
        """Return the variables by which a rank finds the others, under torchrun's names."""
        return {
            "OMP_NUM_THREADS": str(self.threads),
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(local_size),
            "MASTER_ADDR": host,
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is that of the launcher, as under torchrun
            "TORCHELASTIC_RESTART_COUNT": "0",
        }


class Children:
    """Processes that receive every signal this one receives, and that end if one of them fails.

    Signals are recorded from the construction on, and forwarded once the processes run.
    """

    def __init__(self) -> None:
        self.received: int | None = None  # SIGTERM if it was received, else the last signal
        self.processes: list[subprocess.Popen] = []
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.SIGTERM if self.received == signal.SIGTERM else number

    def run(self, command: Sequence[str], folder: str, environments: Sequence[dict[str, str]]) -> int:
        """Run a process per environment (all its variables) to the end.

        Return the exit status of the first that failed, else REQUEUE_STATUS if any process returned it, else 0.
        """
        failed, deadline, signalled = 0, math.inf, 0.0
        try:
            for number in SIGNALS:  # the processes inherit it: a signal must not end one that does not listen yet
                signal.signal(number, signal.SIG_IGN)
            self.processes = [subprocess.Popen(command, cwd=folder, env=one) for one in environments]
            for number in SIGNALS:
                signal.signal(number, self._on_signal)
            while None in [child.poll() for child in self.processes]:
                failed = failed or self.first_failure()
                now = time.monotonic()
                deadline = min(deadline, now + PEERS_SECONDS) if failed else deadline
                if self.received is not None and now >= signalled + REPEAT_SECONDS:
                    if not signalled:
                        print(f"launch: forwarded {signal.Signals(self.received).name}", flush=True)
                    self.send(self.received)
                    signalled = now
                if now >= deadline:
                    self.send(signal.SIGKILL)
                time.sleep(0.1)
        finally:  # after an interruption too
            self.send(signal.SIGKILL)
            for number in SIGNALS:  # Python would restore the default action, which kills, while it shuts down
                signal.signal(number, signal.SIG_IGN)
        statuses = [child.wait() for child in self.processes]
        return failed or self.first_failure() or (REQUEUE_STATUS if REQUEUE_STATUS in statuses else 0)

    def first_failure(self) -> int:
        """Return the exit status of the first failed process, 128 + n if signal n killed it, or 0 if none failed."""
        statuses = [child.returncode for child in self.processes]
        status = next((s for s in statuses if s not in (None, 0, REQUEUE_STATUS)), 0)
        return 128 - status if status < 0 else status

    def send(self, number: int) -> None:
        """Send the signal to all processes that still run."""
        for child in self.processes:
            if child.poll() is None:
                child.send_signal(number)
