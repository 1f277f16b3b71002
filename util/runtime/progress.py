"""A progress line for a long pass, with the time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from torch import Tensor
from torch.utils.data import DataLoader

from util.runtime.errors import printable
from util.runtime.logs import ERASE_TO_END_OF_LINE, format_duration

SECONDS_BETWEEN_LINES = 30  # on stderr that is a file or a pipe, where no line can be rewritten
Item = TypeVar("Item")


def progress(
    items: Iterable[Item], total: int, title: str, unit: str, size: Callable[[Item], int] = lambda item: 1
) -> Iterator[Item]:
    """Yield the items, and show on stderr how many of `total` are done.

    A terminal shows one line that is rewritten and erased at the end; a file gets a line now and then.

    Args:
        size: how many of `total` an item counts for.
    """
    begin = shown = time.monotonic()
    done = 0
    for item in items:
        yield item
        now = time.monotonic()
        done += size(item)
        seconds = now - begin
        left = format_duration(seconds / done * (total - done))
        line = f"{printable(title)}: {done}/{total} {unit}, {done / seconds:.3g} {unit}/s, left {left}"
        if sys.stderr.isatty():
            end = "\r" if done < total else f"\r{ERASE_TO_END_OF_LINE}"
            print(f"\r{line}{ERASE_TO_END_OF_LINE}", end=end, file=sys.stderr, flush=True)
        elif now - shown >= SECONDS_BETWEEN_LINES:
            shown = now
            print(line, file=sys.stderr, flush=True)


def with_progress(loader: DataLoader, title: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield a loader's batches of images and labels, and show `progress` in images."""
    return progress(loader, len(loader.dataset), title, "images", lambda batch: len(batch[1]))
