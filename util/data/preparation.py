"""A data set made small: shards are written, checked against what an earlier call has left, and shown once complete.

An interrupted call, however it ended, is continued by the next one from its last complete shard. The shards are the
same byte for byte, for any number of workers. train/ appears when all is done: nobody trains on half of it.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from util.data.loader import Loader
from util.data.prepared import BadImages, Encoder, Samples, Split
from util.data.shards import (
    Sample,
    Shard,
    bytes_in_tar,
    delete_leftovers,
    is_intact,
    read_shard,
    shard_path,
    write_shard,
)
from util.data.sources import TarSource
from util.runtime.errors import RunError, UserError
from util.runtime.files import TEMPORARY, fsync_folder, write_durably
from util.runtime.logs import ERASE_TO_END_OF_LINE, format_duration

BAD_IMAGES_FILE = "bad_images.txt"
IMAGES_AT_ONCE = 16  # that a worker hands over
IMAGES_TO_ESTIMATE = 32  # of each split, before anything is written
TIMMS_NAMES = {"train": "train", "val": "validation"}


@dataclass(frozen=True)
class Preparation:
    """The splits of a data set, and the settings by which their images are made small."""

    splits: list[Split]
    output: Path
    encoder: Encoder
    shard_bytes: int  # a shard ends with the image that makes it so large
    webdataset: bool  # with the label of each image in a .cls file, and _info.json
    skip_bad: bool
    num_workers: int
    loader_timeout: float  # seconds to wait for images, 0: for ever

    def write(self) -> None:
        """Write what is missing, show it once all of it is complete, and print a summary.

        Raises:
            UserError: it would not fit on the disk, or an image is bad.
            RunError: no image is good.
            OSError: it cannot be written.
        """
        shards = {split.name: self.write_split(split) for split in self.splits}
        self.write_reports(shards)
        for split in reversed(self.splits):  # train/ last: without it no main finds images in the folder
            if not (self.output / split.name).is_dir():
                os.rename(self.unfinished(split), self.output / split.name)
                fsync_folder(self.output)
        self.show_summary(shards)

    def unfinished(self, split: Split) -> Path:
        """Return the folder of a split until all splits are complete."""
        return self.output / f"{TEMPORARY}{split.name}"

    def folder(self, split: Split) -> Path:
        """Return the folder in which the shards of a split are now."""
        return self.output / split.name if (self.output / split.name).is_dir() else self.unfinished(split)

    def samples(self, split: Split) -> Samples:
        """Return the samples of a split."""
        return Samples(split, self.encoder, with_label_file=self.webdataset)

    def in_order(self, dataset: Dataset, begin: int, end: int, progress: Progress) -> Iterator[Any]:
        """Yield items `begin` to `end` of the data set, made by all workers at once."""
        loader = Loader(
            dataset,
            loader_timeout=self.loader_timeout,
            sampler=range(begin, end),
            batch_size=IMAGES_AT_ONCE,
            collate_fn=list,
            num_workers=self.num_workers,
        )
        for batch in loader:
            yield from batch
            progress.advance(len(batch))

    def check_space(self) -> None:
        """Raise UserError if what is still to be written would not fit, judged by some images of each split."""
        needed = 0.0
        for split in self.splits:
            tars = self.folder(split).glob("*.tar")
            left = len(split.source) - sum(shard.end - shard.begin for shard in map(read_shard, tars) if shard)
            if left > 0:
                samples = self.samples(split)
                step = -(-len(split.source) // IMAGES_TO_ESTIMATE)
                sampled = [samples[index] for index in range(0, len(split.source), step)]
                sizes = [bytes_in_tar(sample) for sample in sampled if not sample.bad]
                needed += left * sum(sizes) / max(len(sizes), 1)
        free = shutil.disk_usage(self.output).free
        if needed > free:
            sizes = f"{in_words(needed)} are needed but {in_words(free)} free"
            fix = "make room, choose another folder or a smaller --short_side"
            raise UserError(f"--output_dir {self.output}: {sizes}, {fix}")

    def write_split(self, split: Split) -> list[Shard]:
        """Write the shards that are missing or damaged, and return all shards of the split.

        Raises:
            UserError: an image is bad, and bad ones are not skipped.
            RunError: none is good.
        """
        folder = self.folder(split)
        folder.mkdir(exist_ok=True)
        shards: list[Shard] = []
        total, position, samples = len(split.source), 0, None
        with Progress(split.name, total) as progress:
            while position < total:
                path = shard_path(folder, split.name, len(shards))
                shard = finished_shard(path, position)
                if shard is not None:
                    progress.skip(shard.end - shard.begin)
                    samples = None
                else:
                    if samples is None:
                        images = self.in_order(self.samples(split), position, total, progress)
                        samples = images if self.skip_bad else all_good(images)
                    shard = write_shard(path, position, samples, self.shard_bytes, split.classes)
                shards.append(shard)
                position = shard.end
        if not any(shard.members for shard in shards):
            raise RunError(f"{split.name}: none of its {total} images can be read ({shards[0].bad[0][1]})")
        delete_leftovers(folder, split.name, len(shards))
        return shards

    def write_reports(self, shards: dict[str, list[Shard]]) -> None:
        """Write bad_images.txt if there are any, and _info.json for timm's reader of WebDataset."""
        bad = [f"{name}\t{reason}\n" for written in shards.values() for shard in written for name, reason in shard.bad]
        if bad:
            content = "".join(bad).encode("utf-8", "surrogateescape")
            write_durably(self.output / BAD_IMAGES_FILE, lambda file: file.write(content))
        if self.webdataset:
            splits = {
                TIMMS_NAMES[split]: {
                    "name": TIMMS_NAMES[split],
                    "num_samples": sum(len(shard.members) for shard in written),
                    "filenames": [str(shard_path(Path(split), split, number)) for number in range(len(written))],
                    "shard_lengths": [len(shard.members) for shard in written],
                }
                for split, written in shards.items()
            }
            write_json(self.output / "_info.json", {"splits": splits})

    def show_summary(self, shards: dict[str, list[Shard]]) -> None:
        """Print what was written, and how to use it."""
        for split, written in shards.items():
            images, bad = (sum(len(getattr(shard, kind)) for shard in written) for kind in ("members", "bad"))
            before, after = (sum(getattr(shard, size) for shard in written) for size in ("source_bytes", "bytes"))
            left_out = f"; {bad} bad ones left out, see {self.output / BAD_IMAGES_FILE}" if bad else ""
            sizes = f"{in_words(before)} -> {in_words(after)}"
            print(f"{split}: {images} images in {len(written)} shards, {sizes}{left_out}")
        print(f"to train on it: --data_path {self.output}")

    def check(self) -> None:
        """Decode every image and print what is bad, one per line: name, tab, reason. Nothing is written.

        Raises:
            RunError: something is bad.
        """
        bad = 0
        for split in self.splits:
            total = len(split.source)
            with Progress(f"checking {split.name}", total) as progress:
                images = BadImages(split.source, self.encoder.in_chans, self.encoder.exif)
                reasons = self.in_order(images, 0, total, progress)
                for name_and_reason in chain(damaged_shards(split), filter(None, reasons)):
                    progress.clear()
                    line = "\t".join(name_and_reason)  # file names may be no text
                    print(line.encode("utf-8", "backslashreplace").decode(), flush=True)
                    bad += 1
        if bad:
            raise RunError(f"--check: {bad} bad, listed above")
        print("all images can be read")


def damaged_shards(split: Split) -> Iterator[tuple[str, str]]:
    """Yield prepared shards that are not what was written, and the reason."""
    tars = {tar for tar, *_ in split.source.members} if isinstance(split.source, TarSource) else set()
    for tar in sorted(tars):
        shard = read_shard(Path(tar))
        if shard is not None and not is_intact(Path(tar), shard):
            yield tar, "its SHA-256 is not the one that was written"


def finished_shard(path: Path, begin: int) -> Shard | None:
    """Return the shard of an earlier call that begins with image `begin`, if it is still what was written."""
    shard = read_shard(path)
    if shard is None or shard.begin != begin:
        return None
    if not is_intact(path, shard):
        print(f"WARNING: {path} is damaged and made again", file=sys.stderr)
        return None
    return shard


def all_good(samples: Iterable[Sample]) -> Iterator[Sample]:
    """Yield the samples; raise UserError at a bad one."""
    for sample in samples:
        if sample.bad:
            raise UserError(
                f"{sample.source_name}: cannot be read ({sample.bad}); mend it or add --on_bad_image skip"
                " (--check lists all such images)"
            )
        yield sample


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON durably, one key per line."""
    write_durably(path, lambda file: file.write(json.dumps(content, indent=1).encode()))


def in_words(size: float) -> str:
    """Return a number of bytes as GB or MB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


class Progress:
    """The progress of a split on stderr: one line that rewrites itself on a terminal, a line now and then in a file."""

    def __init__(self, title: str, total: int):
        self.title, self.total, self.done, self.skipped = title, total, 0, 0
        self.live = sys.stderr.isatty()
        self.interval = 0.1 if self.live else 30.0  # seconds
        self.begin = self.shown = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def clear(self) -> None:
        """Remove the line, so that another one can be printed."""
        if self.live:
            print(f"\r{ERASE_TO_END_OF_LINE}", end="", file=sys.stderr, flush=True)

    def advance(self, images: int) -> None:
        """Count images that were done just now."""
        self.done += images
        now = time.monotonic()
        if now - self.shown < self.interval:
            return
        self.shown = now
        rate = (self.done - self.skipped) / (now - self.begin)
        left = format_duration((self.total - self.done) / rate)
        line = f"{self.title}: {self.done}/{self.total} images, {rate:.0f} images/s, left {left}"
        start, end = ("\r", ERASE_TO_END_OF_LINE) if self.live else ("", "\n")
        print(start + line, end=end, file=sys.stderr, flush=True)

    def skip(self, images: int) -> None:
        """Count images that an earlier call has done."""
        self.done += images
        self.skipped += images
