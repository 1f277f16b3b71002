"""What every benchmark needs: runs in turn, spreads, tables, a report that says how to get it again."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from util.runtime.errors import UserError
from util.runtime.logs import aligned, machine, run_info
from util.runtime.progress import progress

Result = TypeVar("Result")


# --------------------------------------------------------------------------------------------------------
# Numbers with a spread
# --------------------------------------------------------------------------------------------------------


class Spread(NamedTuple):
    """What repeated measurements say: half of them lie between `lower` and `upper`."""

    median: float
    lower: float
    upper: float

    def said(self, digits: int = 3) -> str:
        """`median (lower–upper)` to so many significant digits."""
        return f"{short(self.median, digits)} ({short(self.lower, digits)}–{short(self.upper, digits)})"


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles."""
    return Spread(*np.quantile(values, (0.5, 0.25, 0.75)).tolist())


def short(value: float | None, digits: int = 3) -> str:
    """`value` to so many significant digits, without an exponent; a dash for None."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    places = digits - 1 - int(np.floor(np.log10(abs(value))))
    return f"{value:.{max(places, 0)}f}"


def percent(share: float) -> str:
    """A share, 1 = all, to three digits."""
    return f"{short(100 * share)} %"


def in_turn(runs: Mapping[str, Callable[[], Result]], rounds: int, title: str) -> dict[str, list[Result]]:
    """What each run returned in each of the rounds, with a line of progress.

    All take their turn in a round, each time from another one on: what else the machine does meanwhile meets all alike.
    """
    names, found = list(runs), {name: [] for name in runs}
    turns = [(number, place) for number in range(rounds) for place in range(len(names))]
    for number, place in progress(turns, len(turns), title, "turns"):
        name = names[(number + place) % len(names)]
        found[name].append(runs[name]())
    return found


def ratios(values: Sequence[float], reference: Sequence[float]) -> Spread:
    """value / reference, each pair from one round."""
    return spread([x / y for x, y in zip(values, reference, strict=True)])


# --------------------------------------------------------------------------------------------------------
# Time, and processes of their own
# --------------------------------------------------------------------------------------------------------


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compiled_graphs() -> int:
    """How many graphs torch.compile has made so far in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")  # slow to import, and not there where nothing was compiled
    return 0 if dynamo is None else dynamo.counters["stats"]["unique_graphs"]


class PartTimer:
    """Milliseconds of the parts of a step, between one `mark` and the next; on CUDA by events, without waiting."""

    def __init__(self, device: torch.device):
        self.device = device
        self.marks: list[tuple[str, Any]] = []

    def mark(self, part: str) -> None:
        """What came since the last mark belongs to `part`."""
        if self.device.type == "cuda":
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self.marks.append((part, now))

    def start(self) -> None:
        """Begin a step: what came since the last mark belongs to none."""
        self.marks = []
        self.mark("")

    def milliseconds(self) -> dict[str, float]:
        """Of each part of the step, in the order of their first marks; waits for the device."""
        synchronise(self.device)
        found: dict[str, float] = {}
        for (_, begin), (part, end) in itertools.pairwise(self.marks):
            passed = begin.elapsed_time(end) if self.device.type == "cuda" else 1000 * (end - begin)
            found[part] = found.get(part, 0.0) + passed
        return found


@contextmanager
def patched(owner: Any, name: str, wrap: Callable[[Callable], Callable]) -> Iterator[None]:
    """`owner.name` replaced by `wrap` of it: how the bench looks into code that knows nothing of it."""
    is_own, before = name in vars(owner), getattr(owner, name)
    setattr(owner, name, wrap(before))
    try:
        yield
    finally:
        setattr(owner, name, before) if is_own else delattr(owner, name)


class Died(Exception):
    """The process of `run_alone` was killed, as by the kernel where memory runs out."""


def run_alone(function: Callable[..., Result], *arguments: Any) -> Result:
    """What the function returns in a fresh process, whose memory holds nothing else.

    Raises:
        Died: it was killed. What the function raises comes back as it is.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            raise Died from error


# --------------------------------------------------------------------------------------------------------
# What is shown and kept
# --------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows with the same keys as aligned text, the first column to the left."""
    titles = list(rows[0])
    return aligned([titles, *([row[title] for title in titles] for row in rows)])


def write_report(path: str, kind: str, device: torch.device, settings: Mapping[str, Any], **found: Any) -> None:
    """The JSON file of a benchmark: command, source, versions and machine beside what was found; nothing without path.

    Raises:
        UserError: the file cannot be written.
    """
    if not path:
        return
    report = {"benchmark": kind, **run_info(), **machine(device), "settings": dict(settings), **found}
    partial = Path(f"{path}.partial")
    try:
        partial.write_text(json.dumps(named_spreads(report), indent=2, default=str) + "\n", encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"--json {path}: cannot be written ({error.strerror}), choose another") from error


def named_spreads(tree: Any) -> Any:
    """The tree with each Spread as {"median", "lower", "upper"}: JSON would make it a list."""
    if isinstance(tree, Spread):
        return tree._asdict()
    if isinstance(tree, Mapping):
        return {key: named_spreads(value) for key, value in tree.items()}
    return [named_spreads(value) for value in tree] if isinstance(tree, list | tuple) else tree
