"""Tools of every benchmark: variants that take turns, medians with quartiles, tables, and a reproducible report."""

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
    """Median and quartiles of repeated measurements: half of the values lie between `lower` and `upper`."""

    median: float
    lower: float
    upper: float

    def text(self, digits: int = 3) -> str:
        """Return `median (lower–upper)` with this many significant digits."""
        return f"{short(self.median, digits)} ({short(self.lower, digits)}–{short(self.upper, digits)})"


def spread(values: Sequence[float]) -> Spread:
    """Return the median and the quartiles of the values."""
    return Spread(*np.quantile(values, (0.5, 0.25, 0.75)).tolist())


def short(value: float | None, digits: int = 3) -> str:
    """Return the value with this many significant digits and without an exponent; None becomes a dash."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    places = digits - 1 - int(np.floor(np.log10(abs(value))))
    return f"{value:.{max(places, 0)}f}"


def percent(share: float) -> str:
    """Return a share between 0 and 1 as a percentage with three significant digits."""
    return f"{short(100 * share)} %"


def in_turn(runs: Mapping[str, Callable[[], Result]], rounds: int, title: str) -> dict[str, list[Result]]:
    """Call every run once per round and return the results of each run by its name.

    Each round starts with another run, so that other work on the machine affects all runs alike.
    """
    names, results = list(runs), {name: [] for name in runs}
    turns = [(number, place) for number in range(rounds) for place in range(len(names))]
    for number, place in progress(turns, len(turns), title, "turns"):
        name = names[(number + place) % len(names)]
        results[name].append(runs[name]())
    return results


def ratios(values: Sequence[float], reference: Sequence[float]) -> Spread:
    """Return the spread of value / reference, where both numbers of a pair come from the same round."""
    return spread([x / y for x, y in zip(values, reference, strict=True)])


# --------------------------------------------------------------------------------------------------------
# Time, and processes of their own
# --------------------------------------------------------------------------------------------------------


def synchronise(device: torch.device) -> None:
    """Wait until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compiled_graphs() -> int:
    """Return how many graphs torch.compile has compiled so far in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")  # slow to import; it is loaded if anything was compiled
    return 0 if dynamo is None else dynamo.counters["stats"]["unique_graphs"]


class PartTimer:
    """Time the parts of a step between one `mark` and the next; on CUDA with events, without waiting."""

    def __init__(self, device: torch.device):
        self.device = device
        self.marks: list[tuple[str, Any]] = []

    def mark(self, part: str) -> None:
        """Count the time since the last mark for `part`."""
        if self.device.type == "cuda":
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self.marks.append((part, now))

    def start(self) -> None:
        """Begin a step."""
        self.marks = []
        self.mark("")

    def milliseconds(self) -> dict[str, float]:
        """Wait for the device and return the milliseconds of each part, in the order of their first marks."""
        synchronise(self.device)
        total: dict[str, float] = {}
        for (_, begin), (part, end) in itertools.pairwise(self.marks):
            elapsed = begin.elapsed_time(end) if self.device.type == "cuda" else 1000 * (end - begin)
            total[part] = total.get(part, 0.0) + elapsed
        return total


@contextmanager
def patched(owner: Any, name: str, wrap: Callable[[Callable], Callable]) -> Iterator[None]:
    """Replace `owner.name` by `wrap(owner.name)` in the context, to time code that has no hooks for it."""
    is_own, before = name in vars(owner), getattr(owner, name)
    setattr(owner, name, wrap(before))
    try:
        yield
    finally:
        setattr(owner, name, before) if is_own else delattr(owner, name)


class Died(Exception):
    """The process of `run_alone` was killed, for example by the kernel because memory ran out."""


def run_alone(function: Callable[..., Result], *arguments: Any) -> Result:
    """Call the function in a fresh process, whose memory holds nothing else, and return its result.

    Raises:
        Died: the process was killed. An exception of the function is raised here unchanged.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            raise Died from error


# --------------------------------------------------------------------------------------------------------
# Tables and reports
# --------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Return rows with the same keys as aligned text; the first column is aligned to the left."""
    titles = list(rows[0])
    return aligned([titles, *([row[title] for title in titles] for row in rows)])


def write_report(path: str, kind: str, device: torch.device, settings: Mapping[str, Any], **results: Any) -> None:
    """Write the results of a benchmark as JSON, with command, commit, versions and machine; an empty path writes none.

    Raises:
        UserError: the file cannot be written.
    """
    if not path:
        return
    report = {"benchmark": kind, **run_info(), **machine(device), "settings": dict(settings), **results}
    partial = Path(f"{path}.partial")
    try:
        partial.write_text(json.dumps(named_spreads(report), indent=2, default=str) + "\n", encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"--json {path}: cannot be written ({error.strerror}), choose another") from error


def named_spreads(tree: Any) -> Any:
    """Return the tree with each Spread as {"median", "lower", "upper"}: JSON would write a plain list."""
    if isinstance(tree, Spread):
        return tree._asdict()
    if isinstance(tree, Mapping):
        return {key: named_spreads(value) for key, value in tree.items()}
    return [named_spreads(value) for value in tree] if isinstance(tree, list | tuple) else tree
