"""Do the runs of a plan one after the other, each in a process of its own; the same command resumes a stopped one."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from util.runtime.errors import REQUEUE_STATUS, Requeue, RunError
from util.runtime.files import ROOT
from util.runtime.logs import ERASE_TO_END_OF_LINE, format_duration
from util.runtime.stop import end_with_parent
from util.tables.cost import TimeEstimate, flops
from util.tables.outcomes import last_lines, outcome_in, read_progress, share_done
from util.tables.plan import Run
from util.tables.tables import STAGES

OUTPUT_FILE = "output.txt"  # in the folder of a run: all that its process prints
POLL_SECONDS = 0.5  # between two readings of a run's log
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
INTERRUPTED_STATUS = 128 + signal.SIGINT


def print_plan(runs: Sequence[Run], estimate: TimeEstimate) -> None:
    """Print the commands in their order, as a shell script whose comments tell cost and state."""
    shares = {run.folder: share_done(run) for run in runs}
    for number, run in enumerate(runs, start=1):
        share = shares[run.folder]
        state = "done" if share == 1 else f"{share:.0%} done, " if share else ""
        if share < 1:
            left = format_duration(estimate.seconds(run, 1 - share))
            state += f"{(1 - share) * flops(run, estimate.images):.1e} FLOP, about {left}"
        print(f"\n# [{number}/{len(runs)}] {run.title}: {state}\n{shlex.join(run.command)}")
    if not runs:
        return
    work = sum((1 - shares[run.folder]) * flops(run, estimate.images) for run in runs)
    seconds = sum(estimate.seconds(run, 1 - shares[run.folder]) for run in runs)
    done = sum(share == 1 for share in shares.values())
    print(f"\n# {len(runs)} runs, {done} done; left {work:.1e} FLOP, about {format_duration(seconds)}")
    images = sorted({run.images or estimate.images for run in runs})
    measured = [f"{main} {len(speeds)}" for main, speeds in estimate.measured.items()]
    print(
        f"# {', '.join(map(str, images))} images per epoch, matrix products forward and backward, evaluations not"
        " counted; time by "
        + (f"the logs of runs here ({', '.join(measured)}), else " if measured else "")
        + f"{estimate.assumed / 1e12:g} TFLOP/s (assumed, --tflops)"
    )


def run_all(
    runs: Sequence[Run], estimate: TimeEstimate, keep_going: bool, after_each: Callable[[Run], None] = lambda run: None
) -> None:
    """Do the runs that are not done yet.

    Args:
        keep_going: after a failure, continue with the runs that do not depend on it.
        after_each: called with each run that has just finished.

    Raises:
        RunError: a run failed; the message ends with the last line that it printed.
        Requeue: SIGTERM or SIGHUP came, or a run asked for a requeue; the run under way has saved.
        SystemExit: Ctrl-C came.
    """
    shares = {run.folder: share_done(run) for run in runs}
    print(f"{len(runs)} runs, {sum(share == 1 for share in shares.values())} done already", flush=True)
    failures: dict[Path, str] = {}
    with Interruption() as interruption:
        for number, run in enumerate(runs, start=1):
            if shares[run.folder] == 1:
                continue
            if run.after is not None and run.after.folder in failures:
                failures[run.folder] = f"{run.title}: its pre-training failed"
                continue
            later = sum(estimate.seconds(other, 1 - shares[other.folder]) for other in runs[number:])
            print(f"\n[{number}/{len(runs)}] {run.title}\n{shlex.join(run.command)}", flush=True)
            begin = time.monotonic()
            status = run_main(run, f"{number}/{len(runs)}", shares[run.folder], later, estimate, interruption)
            if interruption.signal or status == REQUEUE_STATUS:
                interruption.exit(f"{run.title}: stopped; run the same command to resume from its newest checkpoint")
            outcome = outcome_in(run.folder, run.stage)
            if status == 0 and outcome is not None:
                seconds = time.monotonic() - begin
                estimate.add_run(run, 1 - shares[run.folder], seconds)
                shares[run.folder] = 1.0
                metric = STAGES[run.stage].metric
                score = f", {metric} {outcome.metrics[metric]:.2f} %" if metric in outcome.metrics else ""
                print(f"done in {format_duration(seconds)}{score}", flush=True)
                after_each(run)
                continue
            failures[run.folder] = failure_message(run, status)
            if not keep_going:
                raise RunError(failures[run.folder])
            print(f"FAILED: {failures[run.folder]}", file=sys.stderr, flush=True)
    if failures:
        raise RunError(f"{len(failures)} of {len(runs)} runs failed: {'; '.join(failures.values())}")


def failure_message(run: Run, status: int) -> str:
    """Return the exit status of a failed run and the last line that it printed."""
    path = run.folder / OUTPUT_FILE
    printed = [line.strip() for line in last_lines(path) if line.strip()]
    return f"{run.title}: exit status {status}, {printed[-1] if printed else 'no output'}; see {path}"


class Interruption:
    """Pass signals on: the first sends SIGTERM to the run under way, which then saves; the second kills it."""

    def __init__(self) -> None:
        self.signal = 0  # the first that came; 0: none did
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> Interruption:
        self._before = [(number, signal.signal(number, self._on_signal)) for number in STOPS]
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before:
            signal.signal(number, handler)

    def watch(self, process: subprocess.Popen) -> None:
        """Send signals to the group of this process from now on, also one that came before it was started."""
        self._process = process
        if self.signal:
            self._send(signal.SIGTERM)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._send(signal.SIGKILL if self.signal else signal.SIGTERM)
        if not self.signal:
            os.write(2, b"\nsaving; press Ctrl-C again to stop at once\n")
        self.signal = self.signal or number

    def _send(self, number: int) -> None:
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, number)

    def exit(self, message: str) -> None:
        """Leave the program with the status that the signal asks for."""
        if self.signal == signal.SIGINT:
            print(message, file=sys.stderr)
            raise SystemExit(INTERRUPTED_STATUS)
        raise Requeue(message)


# --------------------------------------------------------------------------------------------------------
# One run
# --------------------------------------------------------------------------------------------------------


def run_main(
    run: Run, place: str, share: float, later: float, estimate: TimeEstimate, interruption: Interruption
) -> int:
    """Call the main of a run, show its progress with the time left for all runs, and return its exit status.

    Args:
        place: the run's number among all.
        share: of the run that is done already.
        later: seconds that the runs after it will take.
    """
    begin, shown = time.monotonic(), read_progress(run)
    run.folder.mkdir(parents=True, exist_ok=True)
    with open(run.folder / OUTPUT_FILE, "ab") as output:
        process = start(run, output)
    interruption.watch(process)
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(POLL_SECONDS)
        progress = read_progress(run)
        if progress is not None and progress != shown:
            shown = progress
            done = progress.share - share
            seconds_per_share = (time.monotonic() - begin) / done if done > 0 else estimate.seconds(run)
            left = format_duration(seconds_per_share * (1 - progress.share) + later)
            show_line(f"[{place}, all left {left}] {progress.line}")
        if process.returncode is not None:
            break
    if sys.stdout.isatty():
        print(flush=True)
    return process.returncode


def start(run: Run, output: BinaryIO) -> subprocess.Popen:
    """Start the main in a session of its own, so that Ctrl-C reaches us alone and the main can save."""
    main = [str(ROOT / STAGES[run.stage].program), *run.flags]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={run.processes}"]
    return subprocess.Popen(
        [sys.executable, "-u", *(torchrun if run.processes > 1 else ()), *main],
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=end_with_parent,  # it must not train on, and write to its folder, after we are killed
    )


def show_line(line: str) -> None:
    """Print a line; on a terminal the next one replaces it."""
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns
        print("\r" + line[: width - 1] + ERASE_TO_END_OF_LINE, end="", flush=True)
    else:
        print(line, flush=True)
