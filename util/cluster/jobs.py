"""Jobs on SLURM or in the background of this machine, through submitit: what they ask for, their start and end."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from submitit import Job, LocalExecutor, SlurmExecutor
from submitit.core.utils import FailedJobError, FailedSubmissionError, UncompletedJobError
from submitit.local.local import LocalJob

from util.cluster.launch import StageJob
from util.runtime.errors import REQUEUE_STATUS, RUN_ERROR_STATUS

ONE_YEAR = 60 * 24 * 365  # minutes: a local job has no time limit
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")
UNKNOWN_SECONDS = 60.0  # for which a job may be unknown to the cluster before we take it for lost


class Refused(Exception):
    """sbatch took the job not; the message is its own."""


@dataclass(frozen=True)
class Resources:
    """What a job asks for."""

    name: str
    nodes: int
    gpus_per_node: int
    tasks_per_node: int
    cpus_per_task: int
    mem_gb: float | None  # per node; None: the cluster's default
    minutes: int  # until it has to be queued again
    signal_delay: int  # seconds before that in which it saves
    max_requeues: int
    array_parallelism: int
    queue: dict[str, str]  # partition, account, ...: given to sbatch as they are
    dependency: str  # what must have happened before it starts, as for sbatch --dependency; empty: nothing
    prologue: tuple[str, ...]  # shell lines before Python
    interpreter: str
    srun: tuple[str, ...]  # flags of srun


# --------------------------------------------------------------------------------------------------------
# SLURM
# --------------------------------------------------------------------------------------------------------


class BatchExecutor(SlurmExecutor):
    """submitit's, which can also show its batch script where there is no SLURM."""

    @classmethod
    def affinity(cls) -> int:
        """Always to be had."""
        return 2


def submit_slurm(resources: Resources, jobs: Sequence[StageJob], folder: Path, code: Path) -> list[Job]:
    """A job, or an array of several.

    Raises:
        Refused: by sbatch.
    """
    said = io.StringIO()  # submitit prints what sbatch says, and raises it too
    try:
        with contextlib.redirect_stderr(said):
            return slurm_executor(resources, folder, code).submit_array(jobs)
    except (FailedJobError, FailedSubmissionError) as error:
        lines = str(error).splitlines()
        raise Refused("; ".join(line.removeprefix("sbatch: ").removeprefix("error: ") for line in lines)) from error


def batch_script(resources: Resources, folder: Path, code: Path, jobs: int) -> str:
    """What sbatch would be given for a job, or for an array of several."""
    executor = slurm_executor(resources, folder, code)
    if jobs > 1:
        executor.parameters["map_count"] = jobs
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def slurm_executor(resources: Resources, folder: Path, code: Path) -> SlurmExecutor:
    """submitit's executor for these resources."""
    executor = BatchExecutor(folder, python=launcher(resources.interpreter, code))
    optional = {"gpus_per_node": resources.gpus_per_node or None}
    more: dict[str, object] = {"requeue": True}  # also after the loss of a node
    if resources.dependency:  # a job that can never start is cancelled
        more |= {"dependency": resources.dependency, "kill_on_invalid_dep": "yes"}
    if resources.mem_gb is not None:
        optional["mem"] = f"{round(1024 * resources.mem_gb)}M"
    executor.update_parameters(
        job_name=resources.name,
        nodes=resources.nodes,
        ntasks_per_node=resources.tasks_per_node,
        cpus_per_task=resources.cpus_per_task,
        time=resources.minutes,
        signal_delay_s=resources.signal_delay,
        array_parallelism=resources.array_parallelism,
        stderr_to_stdout=True,
        wckey=None,
        additional_parameters=more,
        srun_args=resources.srun,
        setup=stop_on_error(resources.prologue),
        teardown=requeue_lines(resources.max_requeues),
        **resources.queue,
        **optional,
    )
    return executor


def requeue_lines(max_requeues: int) -> list[str]:
    """The batch script's end: queue the job again if rank 0 asks for it, unless something else has ended the job.

    Here and not in a task: there is no scontrol in a container, and by now every rank has finished.
    """
    return [
        "status=$?",
        "job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}",
        "job=${job:-$SLURM_JOB_ID}",
        f'if [ "$status" = {REQUEUE_STATUS} ] && [ "$(squeue -h -j "$job" -o %T)" = RUNNING ]; then',
        f'    if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {max_requeues} ]; then',
        '        echo "requeue: after ${SLURM_RESTART_COUNT:-0} restarts"',
        '        scontrol requeue "$job"',
        "    else",
        f'        echo "requeue: not again, after --max_requeues {max_requeues}"',
        "    fi",
        "fi",
        'exit "$status"',
    ]


def slurm_outcome(job_id: str) -> tuple[str, int]:
    """State of a job as SLURM spells it, empty where nobody knows it, and the exit status of its batch script."""
    show = ["scontrol", "-o", "show", "job", job_id]
    account = ["sacct", "-X", "-n", "-P", "-o", "State,ExitCode", "-j", job_id]  # forgotten by the controller
    for command, pattern in ((show, r" JobState=(\w+) .* ExitCode=(\d+):(\d+)"), (account, r"(\w+)[^|]*\|(\d+):(\d+)")):
        try:
            shown = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
        except (OSError, subprocess.SubprocessError):
            continue
        if found := re.search(pattern, shown):
            status, killed_by = int(found[2]), int(found[3])
            return found[1], 128 + killed_by if killed_by else status
    return "", 0


# --------------------------------------------------------------------------------------------------------
# This machine
# --------------------------------------------------------------------------------------------------------


def submit_local(resources: Resources, job: StageJob, folder: Path, code: Path) -> Job:
    """A background process, which starts those of the run."""
    python = launcher(resources.interpreter, code, stop_on_error(resources.prologue))
    executor = LocalExecutor(folder, python=python)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    chosen = {"visible_gpus": tuple(map(int, visible.split(",")))} if re.fullmatch(r"\d+(,\d+)*", visible) else {}
    gpus = {"gpus_per_node": resources.gpus_per_node, **(chosen if resources.gpus_per_node else {})}
    executor.update_parameters(timeout_min=ONE_YEAR, stderr_to_stdout=True, **gpus)
    with deaf_to_the_terminal():
        return executor.submit(job)


@contextlib.contextmanager
def deaf_to_the_terminal() -> Iterator[None]:
    """What is started here goes on when the terminal is closed, or Ctrl-C ends the look at its log."""
    numbers = (signal.SIGINT, signal.SIGHUP)
    before = [signal.signal(number, signal.SIG_IGN) for number in numbers]  # a started process inherits it
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def local_outcome(job: LocalJob) -> tuple[str, int]:
    """State and exit status, in SLURM's words."""
    if not job.done():
        return "RUNNING", 0
    try:
        status = job.result()
    except UncompletedJobError:  # it did not come to its end
        status = RUN_ERROR_STATUS
    return ("FAILED" if status else "COMPLETED"), status


# --------------------------------------------------------------------------------------------------------
# Both
# --------------------------------------------------------------------------------------------------------


def launcher(interpreter: str, code: Path, prologue: Sequence[str] = ()) -> str:
    """The shell command that stands for Python in a job: from the copied code, and deaf until it can listen.

    A signal in the first second, before a handler is there, would otherwise end a rank without a word.
    """
    lines = [*prologue, 'trap "" TERM USR1 USR2', f'cd {shlex.quote(str(code))} && exec {interpreter} "$@"']
    return shlex.join(["bash", "-c", "\n".join(lines), "launch"])


def stop_on_error(prologue: Sequence[str]) -> list[str]:
    """The lines, of which the first that fails ends the job."""
    return ["set -e", *prologue, "set +e"] if prologue else []


def follow(jobs: Sequence[Job], names: Sequence[str], interval: float = 2.0) -> int:
    """Print the jobs' logs as they grow, until all have ended; the first exit status that is not 0, else 0."""
    offsets, statuses = [0] * len(jobs), [None] * len(jobs)
    known = [time.monotonic()] * len(jobs)
    while None in statuses:
        for i, job in enumerate(jobs):
            if statuses[i] is None:
                state, status = local_outcome(job) if isinstance(job, LocalJob) else slurm_outcome(job.job_id)
                offsets[i] = print_from(job.paths.stdout, offsets[i], f"[{names[i]}] " if names[i] else "")
                if state:
                    known[i] = time.monotonic()
                lost = time.monotonic() > known[i] + UNKNOWN_SECONDS
                if state in ENDED or lost:
                    print(f"job {job.job_id}: {state if state in ENDED else 'lost'}", file=sys.stderr)
                    statuses[i] = 0 if state == "COMPLETED" else status or RUN_ERROR_STATUS
        if None in statuses:
            time.sleep(interval)
    return next((status for status in statuses if status), 0)


def print_from(path: Path, offset: int, prefix: str) -> int:
    """Print the whole lines after the offset; where they end."""
    if not path.exists():
        return offset
    with path.open("rb") as file:
        file.seek(offset)
        text = file.read()
    text = text[: text.rfind(b"\n") + 1]
    for line in text.decode(errors="replace").splitlines():
        print(prefix + line, flush=True)
    return offset + len(text)
