"""Find the largest batch that fits into memory."""

from __future__ import annotations

import dataclasses
import math
import os
import threading
from collections.abc import Callable

import torch

from util.bench.step import Stepper
from util.bench.timing import Died, run_alone
from util.bench.variant import Variant
from util.runtime.logs import peak_memory_bytes

OVER_THE_LIMIT = 77  # exit status of a process that exceeded its memory limit


def largest_batch(variant: Variant, report: Callable[[int, bool], None]) -> int:
    """Return the largest --batch_size that fits: exact up to 64, then to within 8; 0 if two images do not fit.

    Args:
        report: called with each batch size that was tried, each in a process of its own, and whether it fits.
    """
    limit = math.inf if variant.config.memory_gib is None else variant.config.memory_gib * 2**30

    def fits(batch_size: int) -> bool:
        config = dataclasses.replace(variant.config, batch_size=batch_size)
        try:
            succeeded = run_alone(fits_here, dataclasses.replace(variant, config=config), limit)
        except (Died, MemoryError):
            succeeded = False
        report(batch_size, succeeded)
        return succeeded

    return largest(fits, max(2, variant.config.batch_size), lambda n: 1 if n < 64 else 8)


def fits_here(variant: Variant, limit: float) -> bool:
    """Return True if two updates fit into the GPU, or on a CPU into `limit` bytes of this process.

    A process that exceeds the limit exits at once, before other programs run out of memory.
    """
    cpu, finished = torch.device("cpu"), threading.Event()

    def watch() -> None:
        while not finished.wait(0.02):
            if peak_memory_bytes(cpu) > limit:
                os._exit(OVER_THE_LIMIT)

    threading.Thread(target=watch, daemon=True).start()
    try:
        Stepper(variant).updates(2)
    except torch.cuda.OutOfMemoryError:
        return False
    finally:
        finished.set()
    return peak_memory_bytes(cpu) <= limit


def largest(fits: Callable[[int], bool], start: int, step_of: Callable[[int], int]) -> int:
    """Return the largest n >= 2 that fits, to within `step_of(n)`; 0 if 2 does not fit.

    The search doubles or halves `start`, then bisects. If n fits, every smaller number must fit too.
    """
    low, high = start, 2 * start
    if fits(start):
        while fits(high):
            low, high = high, 2 * high
    else:
        while low > 2 and not fits(max(2, low // 2)):
            low = max(2, low // 2)
        if low == 2:
            return 0
        low, high = max(2, low // 2), low
    while high - low > (step := step_of(low)):
        middle = (low + high) // 2
        rounded = -(-middle // step) * step
        middle = rounded if rounded < high else middle
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
