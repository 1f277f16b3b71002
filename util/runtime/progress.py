"""How far a long pass is, and how long it will take."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from torch import Tensor
from torch.utils.data import DataLoader

from util.runtime.logs import format_duration

SECONDS_BETWEEN_LINES = 30  # where nothing can be rewritten: a file or a pipe
Item = TypeVar("Item")


def progress(
    items: Iterable[Item], total: int, title: str, unit: str, size: Callable[[Item], int] = lambda item: 1
) -> Iterator[Item]:
    """The items, and on stderr how many of `total` are done.

    A terminal shows one line that rewrites itself and goes in the end; a file gets a line now and then.
    """
    begin = shown = time.monotonic()
    done = 0
    for item in items:
        yield item
        now = time.monotonic()
        done += size(item)
        seconds = now - begin
        left = format_duration(seconds / done * (total - done))
        line = f"{title}: {done}/{total} {unit}, {done / seconds:.3g} {unit}/s, left {left}"
        if sys.stderr.isatty():
            print(f"\r{line}\x1b[K", end="\r" if done < total else "\r\x1b[K", file=sys.stderr, flush=True)
        elif now - shown >= SECONDS_BETWEEN_LINES:
            shown = now
            print(line, file=sys.stderr, flush=True)


def with_progress(loader: DataLoader, title: str) -> Iterator[tuple[Tensor, Tensor]]:
    """`progress` in images, for a loader's batches of images and labels."""
    return progress(loader, len(loader.dataset), title, "images", lambda batch: len(batch[1]))
