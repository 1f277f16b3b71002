"""Submit jobs with submitit, to SLURM or as background processes of this machine, and follow them to their end."""

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
UNKNOWN_SECONDS = 60.0  # a job that the cluster does not know for longer counts as lost


class Refused(Exception):
    """sbatch refused the job; the message is its own."""


@dataclass(frozen=True)
class Resources:
    """The resources that a job requests."""

    name: str
    nodes: int
    gpus_per_node: int
    tasks_per_node: int
    cpus_per_task: int
    mem_gb: float | None  # per node; None: the cluster's default
    minutes: int  # time limit, after which it is requeued
    signal_delay: int  # seconds before the time limit at which it is told to save
    max_requeues: int
    array_parallelism: int
    queue: dict[str, str]  # partition, account, ...: flags of sbatch
    dependency: str  # value of sbatch --dependency; empty: none
    prologue: tuple[str, ...]  # shell lines before Python
    interpreter: str
    srun: tuple[str, ...]  # flags of srun


# --------------------------------------------------------------------------------------------------------
# SLURM
# --------------------------------------------------------------------------------------------------------


class BatchExecutor(SlurmExecutor):
    """submitit's executor, which can also show its batch script on a machine without SLURM."""

    @classmethod
    def affinity(cls) -> int:
        """Return that this executor is always available."""
        return 2


def submit_slurm(resources: Resources, jobs: Sequence[StageJob], folder: Path, code: Path) -> list[Job]:
    """Submit a job, or an array of several.

    Raises:
        Refused: sbatch refused it.
    """
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit prints the error of sbatch and raises it too
            return slurm_executor(resources, folder, code).submit_array(jobs)
    except (FailedJobError, FailedSubmissionError) as error:
        lines = str(error).splitlines()
        raise Refused("; ".join(line.removeprefix("sbatch: ").removeprefix("error: ") for line in lines)) from error


def batch_script(resources: Resources, folder: Path, code: Path, jobs: int) -> str:
    """Return the batch script of a job, or of an array of several."""
    executor = slurm_executor(resources, folder, code)
    if jobs > 1:
        executor.parameters["map_count"] = jobs
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def slurm_executor(resources: Resources, folder: Path, code: Path) -> SlurmExecutor:
    """Return submitit's executor for these resources."""
    executor = BatchExecutor(folder, python=launcher(resources.interpreter, code))
    optional = {"gpus_per_node": resources.gpus_per_node or None}
    additional: dict[str, object] = {"requeue": True}  # after the loss of a node
    if resources.dependency:  # a job that can never start is cancelled
        additional |= {"dependency": resources.dependency, "kill_on_invalid_dep": "yes"}
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
        additional_parameters=additional,
        srun_args=resources.srun,
        setup=stop_on_error(resources.prologue),
        teardown=requeue_lines(resources.max_requeues),
        **resources.queue,
        **optional,
    )
    return executor


def requeue_lines(max_requeues: int) -> list[str]:
    """Return the end of the batch script: requeue the job if rank 0 asked for it and nothing else has ended it.

    The batch script does this and not a task, because a container has no scontrol, and because every rank has ended.
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
    """Return SLURM's name of a job's state (empty: unknown to SLURM) and the exit status of its batch script."""
    show = ["scontrol", "-o", "show", "job", job_id]
    account = ["sacct", "-X", "-n", "-P", "-o", "State,ExitCode", "-j", job_id]  # knows jobs that scontrol forgot
    for command, pattern in ((show, r" JobState=(\w+) .* ExitCode=(\d+):(\d+)"), (account, r"(\w+)[^|]*\|(\d+):(\d+)")):
        try:
            output = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
        except (OSError, subprocess.SubprocessError):
            continue
        if match := re.search(pattern, output):
            status, killed_by = int(match[2]), int(match[3])
            return match[1], 128 + killed_by if killed_by else status
    return "", 0


# --------------------------------------------------------------------------------------------------------
# This machine
# --------------------------------------------------------------------------------------------------------


def submit_local(resources: Resources, job: StageJob, folder: Path, code: Path) -> Job:
    """Start a background process, which starts the processes of the run."""
    python = launcher(resources.interpreter, code, stop_on_error(resources.prologue))
    executor = LocalExecutor(folder, python=python)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    chosen = {"visible_gpus": tuple(map(int, visible.split(",")))} if re.fullmatch(r"\d+(,\d+)*", visible) else {}
    gpus = {"gpus_per_node": resources.gpus_per_node, **(chosen if resources.gpus_per_node else {})}
    executor.update_parameters(timeout_min=ONE_YEAR, stderr_to_stdout=True, **gpus)
    with terminal_signals_ignored():
        return executor.submit(job)


@contextlib.contextmanager
def terminal_signals_ignored() -> Iterator[None]:
    """Let processes that start in the context survive Ctrl-C and the end of the terminal."""
    numbers = (signal.SIGINT, signal.SIGHUP)
    before = [signal.signal(number, signal.SIG_IGN) for number in numbers]  # a new process inherits this
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def local_outcome(job: LocalJob) -> tuple[str, int]:
    """Return the state of a local job under SLURM's name, and its exit status."""
    if not job.done():
        return "RUNNING", 0
    try:
        status = job.result()
    except UncompletedJobError:
        status = RUN_ERROR_STATUS
    return ("FAILED" if status else "COMPLETED"), status


# --------------------------------------------------------------------------------------------------------
# Both
# --------------------------------------------------------------------------------------------------------


def launcher(interpreter: str, code: Path, prologue: Sequence[str] = ()) -> str:
    """Return the shell command that runs Python in a job, from the copied code and with signals ignored at first.

    Without that, a signal in the first second, before Python installs its handlers, would silently kill a rank.
    """
    lines = [*prologue, 'trap "" TERM USR1 USR2', f'cd {shlex.quote(str(code))} && exec {interpreter} "$@"']
    return shlex.join(["bash", "-c", "\n".join(lines), "launch"])


def stop_on_error(prologue: Sequence[str]) -> list[str]:
    """Return shell lines of which the first that fails ends the job."""
    return ["set -e", *prologue, "set +e"] if prologue else []


def follow(jobs: Sequence[Job], names: Sequence[str], interval: float = 2.0) -> int:
    """Print the logs of the jobs as they grow until all have ended; return the first exit status other than 0, or 0."""
    offsets, statuses = [0] * len(jobs), [None] * len(jobs)
    last_known = [time.monotonic()] * len(jobs)
    while None in statuses:
        for i, job in enumerate(jobs):
            if statuses[i] is None:
                state, status = local_outcome(job) if isinstance(job, LocalJob) else slurm_outcome(job.job_id)
                offsets[i] = print_from(job.paths.stdout, offsets[i], f"[{names[i]}] " if names[i] else "")
                if state:
                    last_known[i] = time.monotonic()
                lost = time.monotonic() > last_known[i] + UNKNOWN_SECONDS
                if state in ENDED or lost:
                    print(f"job {job.job_id}: {state if state in ENDED else 'lost'}", file=sys.stderr)
                    statuses[i] = 0 if state == "COMPLETED" else status or RUN_ERROR_STATUS
        if None in statuses:
            time.sleep(interval)
    return next((status for status in statuses if status), 0)


def print_from(path: Path, offset: int, prefix: str) -> int:
    """Print the complete lines after the offset, and return the offset of their end."""
    if not path.exists():
        return offset
    with path.open("rb") as file:
        file.seek(offset)
        text = file.read()
    text = text[: text.rfind(b"\n") + 1]
    for line in text.decode(errors="replace").splitlines():
        print(prefix + line, flush=True)
    return offset + len(text)
