"""Runs of a table one after the other, each a process of its main; whatever stops them, the same command goes on."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

from util.runtime.errors import REQUEUE_STATUS, Requeue, RunError
from util.runtime.files import ROOT
from util.runtime.logs import ERASE_TO_END_OF_LINE, format_duration
from util.tables.plan import Clock, Run, flops, outcome_in, share_done
from util.tables.tables import STAGES

OUTPUT_FILE = "output.txt"  # in the folder of a run: all that it says
STEP = re.compile(r"epoch \d+/\d+ +step (\d+)/(\d+)")  # of the progress line (util/runtime/logs.py)
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
INTERRUPTED_STATUS = 128 + signal.SIGINT


def print_plan(runs: Sequence[Run], clock: Clock) -> None:
    """The commands in their order, as a shell script whose comments say the rest."""
    shares = {run.folder: share_done(run) for run in runs}
    for number, run in enumerate(runs, start=1):
        share = shares[run.folder]
        state = "done" if share == 1 else f"{share:.0%} done, " if share else ""
        if share < 1:
            left = format_duration(clock.seconds(run, 1 - share))
            state += f"{(1 - share) * flops(run, clock.images):.1e} FLOP, about {left}"
        print(f"\n# [{number}/{len(runs)}] {run.title}: {state}\n{shlex.join(run.command)}")
    if not runs:
        return
    work = sum((1 - shares[run.folder]) * flops(run, clock.images) for run in runs)
    seconds = sum(clock.seconds(run, 1 - shares[run.folder]) for run in runs)
    done = sum(share == 1 for share in shares.values())
    print(f"\n# {len(runs)} runs, {done} done; left {work:.1e} FLOP, about {format_duration(seconds)}")
    images = sorted({run.images or clock.images for run in runs})
    measured = [f"{main} {len(speeds)}" for main, speeds in clock.seen.items()]
    print(
        f"# {', '.join(map(str, images))} images per epoch, matrix products forward and backward, evaluations not"
        " counted; time by "
        + (f"the logs of runs here ({', '.join(measured)}), else " if measured else "")
        + f"{clock.assumed / 1e12:g} TFLOP/s (assumed, --tflops)"
    )


def run_all(
    runs: Sequence[Run], clock: Clock, keep_going: bool, after_each: Callable[[Run], None] = lambda run: None
) -> None:
    """Do what is not done yet.

    Args:
        keep_going: after a failure go on with what does not depend on it.
        after_each: called with each run that has just finished.

    Raises:
        RunError: a run failed; the message says what it said last.
        Requeue: something asked for an end, and what was under way has been saved.
        SystemExit: Ctrl-C did.
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
            later = [other for other in runs[number:] if shares[other.folder] < 1]
            print(f"\n[{number}/{len(runs)}] {run.title}\n{shlex.join(run.command)}", flush=True)
            begin = time.monotonic()
            status, last = call(run, f"{number}/{len(runs)}", shares[run.folder], later, shares, clock, interruption)
            if interruption.number or status == REQUEUE_STATUS:
                interruption.end(f"{run.title}: stopped, the same command goes on from its newest checkpoint")
            outcome = outcome_in(run.folder, run.stage)
            if status == 0 and outcome is not None:
                seconds = time.monotonic() - begin
                clock.learn(run, 1 - shares[run.folder], seconds)
                shares[run.folder] = 1.0
                metric = STAGES[run.stage].metric
                found = f", {metric} {outcome.metrics[metric]:.2f} %" if metric in outcome.metrics else ""
                print(f"done in {format_duration(seconds)}{found}", flush=True)
                after_each(run)
                continue
            failures[run.folder] = f"{run.title}: exit status {status}, {last}; see {run.folder / OUTPUT_FILE}"
            if not keep_going:
                raise RunError(failures[run.folder])
            print(f"FAILED: {failures[run.folder]}", file=sys.stderr, flush=True)
    if failures:
        raise RunError(f"{len(failures)} of {len(runs)} runs failed: {'; '.join(failures.values())}")


class Interruption:
    """Signals that ask for an end: the run under way gets SIGTERM, by which it saves; a second one kills it."""

    def __init__(self) -> None:
        self.number = 0  # of the first signal that came; 0: none did
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> Interruption:
        self._before = [(number, signal.signal(number, self._on_signal)) for number in STOPS]
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before:
            signal.signal(number, handler)

    def watch(self, process: subprocess.Popen) -> None:
        """Of which process group the signals are; one may have come before it was there."""
        self._process = process
        if self.number:
            self._send(signal.SIGTERM)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._send(signal.SIGKILL if self.number else signal.SIGTERM)
        if not self.number:
            os.write(2, b"\nsaving; once more to stop at once\n")
        self.number = self.number or number

    def _send(self, number: int) -> None:
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, number)

    def end(self, said: str) -> None:
        """Leave the program as the signal wants it."""
        if self.number == signal.SIGINT:
            print(said, file=sys.stderr)
            raise SystemExit(INTERRUPTED_STATUS)
        raise Requeue(said)


# --------------------------------------------------------------------------------------------------------
# One run
# --------------------------------------------------------------------------------------------------------


def call(
    run: Run,
    place: str,
    share: float,
    later: Sequence[Run],
    shares: dict[Path, float],
    clock: Clock,
    interruption: Interruption,
) -> tuple[int, str]:
    """Exit status and last line of a run, whose progress is shown with the time left for all.

    Args:
        place: the run's number of all.
        share: of the run that is done already.
        later: what comes after it, of which `shares` are done.
    """
    afterwards = sum(clock.seconds(other, 1 - shares[other.folder]) for other in later)
    begin, last, live = time.monotonic(), "it said nothing", False
    with start(run) as process:
        interruption.watch(process)
        for line in recorded(process, run.folder / OUTPUT_FILE):
            last = line.strip() or last
            if match := STEP.match(line):
                done = int(match[1]) / int(match[2])
                pace = (time.monotonic() - begin) / (done - share) if done > share else 0.0
                here = pace * (1 - done) if pace else clock.seconds(run, 1 - done)
                live = show(f"[{place}, all left {format_duration(here + afterwards)}] {line.rstrip()}")
    if live:
        print(flush=True)
    return process.returncode, last


def start(run: Run) -> subprocess.Popen:
    """Start the main, in a session of its own: Ctrl-C is ours, and it shall save and not break off."""
    run.folder.mkdir(parents=True, exist_ok=True)
    main = [str(ROOT / STAGES[run.stage].program), *run.flags]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={run.processes}"]
    environment = dict(os.environ)
    if run.processes == 1:
        torchrun = []
        environment |= {"LOCAL_WORLD_SIZE": "1"}  # it ends when we are killed (util/runtime/stop.py)
    return subprocess.Popen(
        [sys.executable, "-u", *torchrun, *main],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        text=True,
        errors="replace",
    )


def recorded(process: subprocess.Popen, path: Path) -> Iterator[str]:
    """The lines that a process prints, each written to the file too."""
    with path.open("a", encoding="utf-8") as file:
        for line in process.stdout:
            file.write(line)
            file.flush()
            yield line


def show(line: str) -> bool:
    """Print a line that the next one replaces on a terminal; whether the cursor stays in it."""
    if not sys.stdout.isatty():
        print(line, flush=True)
        return False
    width = shutil.get_terminal_size().columns
    print("\r" + line[: width - 1] + ERASE_TO_END_OF_LINE, end="", flush=True)
    return True
