"""Make the images of a data set small once, so that training does not decode them at full size in every epoch.

    python scripts/prepare_data.py --data_path IMAGENET --output_dir IMAGENET256
    python main_pretrain.py --data_path IMAGENET256 ...
    python scripts/prepare_data.py --data_path IMAGENET --check     # decodes all images, names the bad, writes nothing

The output is .tar shards below train/ and val/ (see util/data/shards.py), with the classes and labels of the input.
Images are reduced by the filter of training until their shorter side has --short_side pixels, and never enlarged; a
JPEG that is small enough keeps its bytes. EXIF orientation is left alone, as in training.

An interrupted call, however it ended, goes on with the same command from its last whole shard. The output is the same
byte for byte, for any --num_workers. train/ appears when all is done: nobody trains on half of it.

Why JPEG of quality 95 and chroma 4:2:0: of 60 of ImageNet's pictures (102 KB each), reduced to 256 pixels, the size,
the mean difference in grey levels to the pixels before encoding, and the time to decode on one core:

    90, 4:2:0   29 KB   2.6   0.44 ms
    95, 4:2:0   41 KB   2.0   0.50 ms
    95, 4:4:4   52 KB   1.5   0.67 ms
    98, 4:2:0   57 KB   1.5   0.62 ms       --quality 98 is as close as 4:4:4 and no slower
    PNG        158 KB   0     3 ms          --image_format png
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TextIO

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from torch.utils.data import Dataset, IterableDataset

from util.config.command_line import parse_config
from util.config.groups import check, processors
from util.data.datasets import find_validation, open_images, published_names
from util.data.loader import Loader
from util.data.prepared import Decoded, Encoder, Samples, Split, name_images
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
from util.runtime.errors import RunError, UserError, run_main
from util.runtime.files import TEMPORARY, fsync_folder, write_durably
from util.runtime.logs import ERASE_TO_END_OF_LINE, format_duration
from util.weights.checkpoint import LOCK, lock_folder

SETTINGS_FILE = "prepare.json"
BAD_IMAGES_FILE = "bad_images.txt"
IMAGES_AT_ONCE = 16  # that a process hands over
IMAGES_TO_ESTIMATE = 32  # of each split, before anything is written
TIMMS_NAMES = {"train": "train", "val": "validation"}


@dataclass(frozen=True)
class PrepareConfig:
    """Make the images of a data set small once, into .tar shards that the mains read with --data_path."""

    output_dir: str = ""
    """new folder, or that of an interrupted call"""
    data_path: str = ""
    """images, as for main_pretrain.py; val/ beside the training images is prepared too"""
    dataset: str = ""
    """a reader's name as for main_pretrain.py, no stream"""
    val_path: str = ""
    """labelled validation images; default: beside the training images"""
    short_side: int = 256
    """pixels; the usual is 8/7 of the --input_size to train with"""
    format: Literal["tar", "webdataset"] = "tar"
    """webdataset: the same, with the label of each image in a .cls file and _info.json for timm's wds/"""
    image_format: Literal["jpeg", "png"] = "jpeg"
    """png: without loss; a PNG or JPEG that is small enough keeps its bytes"""
    quality: int = 95
    """of JPEG, 1 to 100"""
    in_chans: int = 3
    """channels: 1 (grey), 3 (RGB) or 4 (RGBA, PNG only) of all images but those that keep their bytes"""
    shard_mb: float = 512
    """a shard ends with the image that makes it so many megabytes"""
    on_bad_image: Literal["error", "skip"] = "error"
    """an unreadable image stops the call, or is left out and listed in bad_images.txt"""
    num_workers: int | None = None
    """processes that decode and encode, 0: only the one that writes; default: as many as processors"""
    loader_timeout: float = 600.0
    """seconds to wait for images before a hung or dead process ends the call"""
    check: bool = False
    """only decode every image and name the bad ones, and shards that are not what was written"""

    def __post_init__(self) -> None:
        check(bool(self.data_path or self.dataset), "data_path", "", "say where the images are, or give --dataset")
        check(bool(self.output_dir) or self.check, "output_dir", "", "say where to write")
        check(self.short_side >= 8, "short_side", self.short_side, "must be 8 or more")
        check(1 <= self.quality <= 100, "quality", self.quality, "must lie in 1 to 100")
        check(self.in_chans in (1, 3, 4), "in_chans", self.in_chans, "images have 1, 3 or 4 channels")
        fits = self.in_chans != 4 or self.image_format == "png" or self.check
        check(fits, "in_chans", self.in_chans, "JPEG has no transparency, add --image_format png")
        check(self.shard_mb > 0, "shard_mb", self.shard_mb, "must be above 0")
        check(self.workers >= 0, "num_workers", self.workers, "must be 0 or more")
        timeout = self.loader_timeout
        check(0 <= timeout < math.inf, "loader_timeout", timeout, "must be 0 (never) or more, and finite")

    @property
    def workers(self) -> int:
        """Processes that decode and encode, the default filled in."""
        return processors() if self.num_workers is None else self.num_workers


def main() -> None:
    """Check, or write."""
    config = parse_config(PrepareConfig, sys.argv[1:], Path(__file__).name)
    splits = open_splits(config)
    for split in splits:
        classes = "without labels" if split.classes is None else f"of {len(split.classes)} classes"
        print(f"{split.name}: {len(split.source)} images {classes}", flush=True)
    try:
        if config.check:
            check_images(config, splits)
        else:
            prepare(config, splits)
    except KeyboardInterrupt:
        raise RunError("stopped; the same command goes on from the last whole shard") from None


def open_splits(config: PrepareConfig) -> list[Split]:
    """The training images, and the validation images that the mains would find.

    Raises:
        UserError: there are none, or they are a stream.
    """
    train = open_images(config.data_path, config.dataset, "train")
    if isinstance(train, IterableDataset):
        raise UserError(f"--dataset {config.dataset}: is a stream without numbered images, give one that is on disk")
    if config.dataset and not config.val_path:
        try:  # not by find_validation, which does not know the labels that only a reader has
            val = open_images(config.data_path, config.dataset, "val")
        except UserError:
            if config.dataset in published_names():  # theirs are known: what cannot be read is an error
                raise
            val = None
    else:
        val = find_validation(config.data_path, config.dataset, config.val_path)
    sources = {"train": train} if val is None else {"train": train, "val": val}
    return [name_images(name, source, config.format == "webdataset") for name, source in sources.items()]


def in_order(config: PrepareConfig, dataset: Dataset, begin: int, end: int, progress: Progress) -> Iterator[Any]:
    """Items `begin` to `end` of the data set, made by all processes at once."""
    loader = Loader(
        dataset,
        loader_timeout=config.loader_timeout,
        sampler=range(begin, end),
        batch_size=IMAGES_AT_ONCE,
        collate_fn=list,
        num_workers=config.workers,
    )
    for batch in loader:
        yield from batch
        progress.advance(len(batch))


class Progress:
    """How far a split is, on stderr: one line that rewrites itself on a terminal, a line now and then in a file."""

    def __init__(self, title: str, total: int):
        self.title, self.total, self.done, self.found = title, total, 0, 0
        self.live = sys.stderr.isatty()
        self.interval = 0.1 if self.live else 30.0  # seconds
        self.begin = self.shown = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def clear(self) -> None:
        """Make way for another line."""
        if self.live:
            print(f"\r{ERASE_TO_END_OF_LINE}", end="", file=sys.stderr, flush=True)

    def advance(self, images: int) -> None:
        """So many more are done."""
        self.done += images
        now = time.monotonic()
        if now - self.shown < self.interval:
            return
        self.shown = now
        rate = (self.done - self.found) / (now - self.begin)
        left = format_duration((self.total - self.done) / rate)
        line = f"{self.title}: {self.done}/{self.total} images, {rate:.0f} images/s, left {left}"
        start, end = ("\r", ERASE_TO_END_OF_LINE) if self.live else ("", "\n")
        print(start + line, end=end, file=sys.stderr, flush=True)

    def find(self, images: int) -> None:
        """So many were done by an earlier call."""
        self.done += images
        self.found += images


# --------------------------------------------------------------------------------------------------------
# --check
# --------------------------------------------------------------------------------------------------------


def check_images(config: PrepareConfig, splits: list[Split]) -> None:
    """Print what is bad, one per line: name, tab, reason.

    Raises:
        RunError: something is.
    """
    bad = 0
    for split in splits:
        total = len(split.source)
        with Progress(f"checking {split.name}", total) as progress:
            images = in_order(config, Decoded(split.source, config.in_chans), 0, total, progress)
            for found in chain(damaged_shards(split), filter(None, images)):
                progress.clear()
                line = "\t".join(found)  # file names may be no text
                print(line.encode("utf-8", "backslashreplace").decode(), flush=True)
                bad += 1
    if bad:
        raise RunError(f"--check: {bad} bad, listed above")
    print("all images can be read")


def damaged_shards(split: Split) -> Iterator[tuple[str, str]]:
    """Prepared shards that are not what was written, and what to say of them."""
    tars = {tar for tar, *_ in split.source.members} if isinstance(split.source, TarSource) else set()
    for tar in sorted(tars):
        shard = read_shard(Path(tar))
        if shard is not None and not is_intact(Path(tar), shard):
            yield tar, "its SHA-256 is not the one that was written"


# --------------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------------


def prepare(config: PrepareConfig, splits: list[Split]) -> None:
    """Write what is not there yet, and show it once all of it is there."""
    output = Path(config.output_dir)
    with open_output(config):
        settings = resume_settings(config, splits)
        check_settings(output, settings)
        check_space(config, splits)
        try:
            write_json(output / SETTINGS_FILE, settings)
            shards = {split.name: write_split(config, split) for split in splits}
            write_reports(config, shards)
            for split in reversed(splits):  # train/ last: without it no main finds images in the folder
                if not (output / split.name).is_dir():
                    os.rename(unfinished(output, split.name), output / split.name)
                    fsync_folder(output)
        except OSError as error:
            raise RunError(
                f"--output_dir {output}: could not be written ({error.strerror}); what is finished stays, make room"
                " and run the same command again"
            ) from error
    show_summary(output, shards)


def open_output(config: PrepareConfig) -> TextIO:
    """Make the folder and keep other calls out of it as long as the returned file is open.

    Raises:
        UserError: it is no place for the output.
    """
    output = Path(config.output_dir)
    for flag, given in (("data_path", config.data_path), ("val_path", config.val_path)):
        inside = given and not config.dataset and output.resolve().is_relative_to(Path(given).resolve())
        check(not inside, "output_dir", output, f"lies inside --{flag} {given}, choose a folder elsewhere")
    try:
        output.mkdir(parents=True, exist_ok=True)
        others = [path.name for path in output.iterdir() if path.name != LOCK and not path.name.startswith(TEMPORARY)]
        known = not others or SETTINGS_FILE in others
        check(known, "output_dir", output, f"holds something else ({min(others, default='')}), choose an empty folder")
        return lock_folder(output)
    except OSError as error:
        raise UserError(f"--output_dir {output}: cannot be written ({error.strerror}), choose another") from error


def unfinished(output: Path, split: str) -> Path:
    """Where a split lies until all is done."""
    return output / f"{TEMPORARY}{split}"


def folder_of(output: Path, split: str) -> Path:
    """Where the shards of a split are now."""
    return output / split if (output / split).is_dir() else unfinished(output, split)


def resume_settings(config: PrepareConfig, splits: list[Split]) -> dict[str, Any]:
    """What must be the same when an interrupted call goes on; folders may have moved."""
    flags = ("short_side", "format", "image_format", "quality", "in_chans", "shard_mb")
    settings: dict[str, Any] = {f"--{flag}": getattr(config, flag) for flag in flags}
    for split in splits:
        names = "\n".join([*(split.classes or ()), *split.keys]).encode("utf-8", "surrogateescape")
        settings[f"number of {split.name} images"] = len(split.source)
        settings[f"hash of the names of the {split.name} images"] = hashlib.sha256(names).hexdigest()
    return settings


def check_settings(output: Path, settings: dict[str, Any]) -> None:
    """UserError naming the first setting that differs from the first call's, with both values."""
    try:
        saved = json.loads((output / SETTINGS_FILE).read_text())
    except FileNotFoundError:
        return
    for name in [*settings, *saved]:
        if settings.get(name) != saved.get(name):
            raise UserError(
                f"--output_dir {output}: {name} is {settings.get(name)} here but {saved.get(name)} in the call that"
                " began it, make them equal or choose another folder"
            )


def check_space(config: PrepareConfig, splits: list[Split]) -> None:
    """UserError where what is still to be written would not fit, judged by some images of each split."""
    output, needed = Path(config.output_dir), 0.0
    for split in splits:
        tars = folder_of(output, split.name).glob("*.tar")
        left = len(split.source) - sum(shard.end - shard.begin for shard in map(read_shard, tars) if shard)
        if left > 0:
            samples = samples_of(config, split)
            step = -(-len(split.source) // IMAGES_TO_ESTIMATE)
            found = [samples[index] for index in range(0, len(split.source), step)]
            sizes = [bytes_in_tar(sample) for sample in found if not sample.bad]
            needed += left * sum(sizes) / max(len(sizes), 1)
    free = shutil.disk_usage(output).free
    fix = "make room, choose another folder or a smaller --short_side"
    check(needed <= free, "output_dir", output, f"{in_words(needed)} are needed but {in_words(free)} free, {fix}")


def samples_of(config: PrepareConfig, split: Split) -> Samples:
    """The samples of a split."""
    encoder = Encoder(config.short_side, config.image_format, config.quality, config.in_chans)
    return Samples(split, encoder, with_label_file=config.format == "webdataset")


def write_split(config: PrepareConfig, split: Split) -> list[Shard]:
    """Write the shards that are missing or damaged; all shards of the split.

    Raises:
        UserError: an image is bad, and --on_bad_image error.
        RunError: none is good.
    """
    folder = folder_of(Path(config.output_dir), split.name)
    folder.mkdir(exist_ok=True)
    shards: list[Shard] = []
    total, position, samples = len(split.source), 0, None
    with Progress(split.name, total) as progress:
        while position < total:
            path = shard_path(folder, split.name, len(shards))
            shard = finished_shard(path, position)
            if shard is not None:
                progress.find(shard.end - shard.begin)
                samples = None
            else:
                if samples is None:
                    samples = wanted(config, in_order(config, samples_of(config, split), position, total, progress))
                shard = write_shard(path, position, samples, int(config.shard_mb * 1e6), split.classes)
            shards.append(shard)
            position = shard.end
    if not any(shard.members for shard in shards):
        raise RunError(f"{split.name}: none of its {total} images can be read ({shards[0].bad[0][1]})")
    delete_leftovers(folder, split.name, len(shards))
    return shards


def finished_shard(path: Path, begin: int) -> Shard | None:
    """The shard of an earlier call that begins with image `begin`, if it is still what was written."""
    shard = read_shard(path)
    if shard is None or shard.begin != begin:
        return None
    if not is_intact(path, shard):
        print(f"WARNING: {path} is damaged and made again", file=sys.stderr)
        return None
    return shard


def wanted(config: PrepareConfig, samples: Iterable[Sample]) -> Iterator[Sample]:
    """The samples; UserError at a bad one with --on_bad_image error."""
    for sample in samples:
        if sample.bad and config.on_bad_image == "error":
            raise UserError(
                f"{sample.source_name}: cannot be read ({sample.bad}); mend it or add --on_bad_image skip"
                " (--check lists all such images)"
            )
        yield sample


def write_reports(config: PrepareConfig, shards: dict[str, list[Shard]]) -> None:
    """bad_images.txt where there are any, _info.json for timm's reader of WebDataset."""
    output = Path(config.output_dir)
    bad = [f"{name}\t{reason}\n" for written in shards.values() for shard in written for name, reason in shard.bad]
    if bad:
        content = "".join(bad).encode("utf-8", "surrogateescape")
        write_durably(output / BAD_IMAGES_FILE, lambda file: file.write(content))
    if config.format == "webdataset":
        splits = {
            TIMMS_NAMES[split]: {
                "name": TIMMS_NAMES[split],
                "num_samples": sum(len(shard.members) for shard in written),
                "filenames": [str(shard_path(Path(split), split, number)) for number in range(len(written))],
                "shard_lengths": [len(shard.members) for shard in written],
            }
            for split, written in shards.items()
        }
        write_json(output / "_info.json", {"splits": splits})


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Durably, one key per line."""
    write_durably(path, lambda file: file.write(json.dumps(content, indent=1).encode()))


def show_summary(output: Path, shards: dict[str, list[Shard]]) -> None:
    """What was written, and how to use it."""
    for split, written in shards.items():
        images, bad = (sum(len(getattr(shard, kind)) for shard in written) for kind in ("members", "bad"))
        before, after = (sum(getattr(shard, size) for shard in written) for size in ("source_bytes", "bytes"))
        said = f"; {bad} bad ones left out, see {output / BAD_IMAGES_FILE}" if bad else ""
        print(f"{split}: {images} images in {len(written)} shards, {in_words(before)} -> {in_words(after)}{said}")
    print(f"to train on it: --data_path {output}")


def in_words(size: float) -> str:
    """Bytes for people."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


if __name__ == "__main__":
    run_main(Path(__file__).name, main)
