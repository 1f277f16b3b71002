"""What a submitted job does where it runs: start processes of a stage, pass signals on to them, end as they end.

The scheduler's signals concern the training, not the launcher: whether and when to stop is agreed between all ranks
(util/runtime/stop.py), who then save and exit with REQUEUE_STATUS. So submitit's own handlers, which would requeue at
the first signal, are replaced.
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

from submitit import JobEnvironment

from util.runtime.errors import REQUEUE_STATUS

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
REPEAT_SECONDS = 2.0  # a signal is sent again until it is obeyed: the first may come before the stage listens
PEERS_SECONDS = 10.0  # what the others have to say, once one has failed, before they are killed


@dataclass(frozen=True)
class StageJob:
    """The function that submitit calls: once per rank under SLURM, once in all on this machine."""

    command: tuple[str, ...]  # interpreter, script and flags
    folder: str  # where it runs: relative paths among the flags mean what they meant on the command line
    threads: int  # per process, unless OMP_NUM_THREADS says otherwise
    local_processes: int = 0  # started by one call; 0: under SLURM, where a task is a rank
    max_requeues: int = 0  # of the local processes; under SLURM the batch script counts

    def __call__(self) -> int:
        """Run to the end; returns 0, or a local job's exit status. A task of SLURM exits with what it has to report."""
        return self.run_here() if self.local_processes else self.run_rank()

    def run_rank(self) -> int:
        """This task's rank. Only rank 0 reports that the job is to be requeued: srun ends all tasks at the first
        status that is not 0, and rank 0 may be the last to finish."""
        task = JobEnvironment()
        port = rendezvous_port(int(task.raw_job_id), int(os.environ.get("SLURM_RESTART_COUNT", 0)))
        size = (task.num_tasks, task.num_tasks // task.num_nodes)
        environment = self.environment(task.global_rank, task.local_rank, *size, task.hostnames[0], port)
        status = Children(self.command, self.folder, [environment]).wait()
        if status and not (status == REQUEUE_STATUS and task.global_rank):
            raise SystemExit(status)
        return 0

    def run_here(self) -> int:
        """All ranks, and all again as often as they ask for it, unless SIGTERM asked for an end."""
        job, size = int(JobEnvironment().raw_job_id), self.local_processes
        for restarts in itertools.count():
            port = rendezvous_port(job, restarts)
            environments = [self.environment(i, i, size, size, "127.0.0.1", port) for i in range(size)]
            children = Children(self.command, self.folder, environments)
            status = children.wait()
            if status != REQUEUE_STATUS or children.received == signal.SIGTERM:
                return status
            if restarts >= self.max_requeues:
                print(f"requeue: not again, after --max_requeues {self.max_requeues}", flush=True)
                return status
            print(f"requeue: after {restarts} restarts", flush=True)

    def environment(
        self, rank: int, local_rank: int, world_size: int, local_size: int, host: str, port: int
    ) -> dict[str, str]:
        """The variables by which a rank finds the others, under torchrun's names."""
        return {
            "OMP_NUM_THREADS": str(self.threads),
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(local_size),
            "MASTER_ADDR": host,
            "MASTER_PORT": str(port),
        }


def rendezvous_port(job: int, restarts: int) -> int:
    """A port that all ranks derive alike, another one for each start of a job.

    What is left of the last start may still hold its port. Linux hands out ports from 32768 on; these lie below.
    """
    return 10_000 + (97 * job + 1009 * restarts) % 22_000


class Children:
    """Processes that get every signal this one gets, and of which none outlives a failed one.

    Args:
        environments: all variables of each process.
    """

    def __init__(self, command: Sequence[str], folder: str, environments: Sequence[dict[str, str]]):
        self.received: int | None = None  # SIGTERM, once it has come, else the last one
        for number in SIGNALS:  # inherited: until the stage listens, a signal must not end it
            signal.signal(number, signal.SIG_IGN)
        self.processes = [subprocess.Popen(command, cwd=folder, env=one) for one in environments]
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.SIGTERM if self.received == signal.SIGTERM else number

    def wait(self) -> int:
        """Exit status of the first that failed, else REQUEUE_STATUS if any asks for it, else 0."""
        failed, deadline, signalled = 0, math.inf, 0.0
        try:
            while None in [child.poll() for child in self.processes]:
                failed = failed or self.first_failure()
                now = time.monotonic()
                deadline = min(deadline, now + PEERS_SECONDS) if failed else deadline
                if self.received is not None and now >= signalled + REPEAT_SECONDS:
                    if not signalled:
                        print(f"launch: {signal.Signals(self.received).name} passed on", flush=True)
                    self.send(self.received)
                    signalled = now
                if now >= deadline:
                    self.send(signal.SIGKILL)
                time.sleep(0.1)
        finally:  # also when we are interrupted
            self.send(signal.SIGKILL)
            for number in SIGNALS:  # Python would give them back their deadly default while it shuts down
                signal.signal(number, signal.SIG_IGN)
        statuses = [child.wait() for child in self.processes]
        return failed or self.first_failure() or (REQUEUE_STATUS if REQUEUE_STATUS in statuses else 0)

    def first_failure(self) -> int:
        """As a shell counts: 128 + n for a process ended by signal n; 0 where none has failed."""
        statuses = [child.returncode for child in self.processes]
        status = next((s for s in statuses if s not in (None, 0, REQUEUE_STATUS)), 0)
        return 128 - status if status < 0 else status

    def send(self, number: int) -> None:
        """The signal to all that still run."""
        for child in self.processes:
            if child.poll() is None:
                child.send_signal(number)
