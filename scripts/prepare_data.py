"""Make the images of a data set small once, so that training does not decode them at full size in every epoch.

    python scripts/prepare_data.py --data_path IMAGENET --output_dir IMAGENET256
    python main_pretrain.py --data_path IMAGENET256 ...
    python scripts/prepare_data.py --data_path IMAGENET --check     # decodes all images, names the bad, writes nothing

The output is .tar shards below train/ and val/ (see util/data/shards.py), with the classes and labels of the input.
Images are reduced by the filter of training until their shorter side has --short_side pixels, and never enlarged; a
JPEG that is small enough keeps its bytes. EXIF orientation is ignored and passed on, or applied (--exif apply).

After an interruption the same command continues from the last complete shard. The output is the same
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

import errno
import hashlib
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from torch.utils.data import IterableDataset

from util.config.checks import check
from util.config.command_line import parse_config
from util.config.groups import processors
from util.data.datasets import find_validation, open_images, published_names
from util.data.preparation import Preparation, write_json
from util.data.prepared import Encoder, Split, name_images
from util.runtime.errors import RunError, UserError, run_main
from util.runtime.files import TEMPORARY
from util.weights.checkpoint import LOCK, lock_folder

SETTINGS_FILE = "prepare.json"
BEFORE = {"--exif": "ignore"}  # what calls did before a flag existed, which their settings do not name


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
    exif: Literal["ignore", "apply"] = "ignore"
    """EXIF orientation of images: ignore it and pass it on, or turn the pixels as it says"""
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
        """Return the processes that decode and encode, the default filled in."""
        return processors() if self.num_workers is None else self.num_workers


def main() -> None:
    """Check the prepared data, or write it."""
    config = parse_config(PrepareConfig, sys.argv[1:], Path(__file__).name)
    splits = open_splits(config)
    for split in splits:
        classes = "without labels" if split.classes is None else f"of {len(split.classes)} classes"
        print(f"{split.name}: {len(split.source)} images {classes}", flush=True)
    preparation = Preparation(
        splits,
        Path(config.output_dir),
        Encoder(config.short_side, config.image_format, config.quality, config.in_chans, config.exif),
        shard_bytes=int(config.shard_mb * 1e6),
        webdataset=config.format == "webdataset",
        skip_bad=config.on_bad_image == "skip",
        num_workers=config.workers,
        loader_timeout=config.loader_timeout,
    )
    try:
        if config.check:
            preparation.check()
        else:
            write(config, preparation)
    except KeyboardInterrupt:
        raise RunError("stopped; the same command continues from the last complete shard") from None


def open_splits(config: PrepareConfig) -> list[Split]:
    """Open the training images, and the validation images that the mains would find.

    Raises:
        UserError: there are none, or they are a stream.
    """
    train = open_images(config.data_path, config.dataset, "train")
    if isinstance(train, IterableDataset):
        raise UserError(f"--dataset {config.dataset}: is a stream without numbered images, give one that is on disk")
    if config.dataset and not config.val_path:
        try:  # find_validation does not know the labels that only a reader has
            val = open_images(config.data_path, config.dataset, "val")
        except UserError:
            if config.dataset in published_names():  # theirs are known: what cannot be read is an error
                raise
            val = None
    else:
        val = find_validation(config.data_path, config.dataset, config.val_path)
    sources = {"train": train} if val is None else {"train": train, "val": val}
    return [name_images(name, source, config.format == "webdataset") for name, source in sources.items()]


def write(config: PrepareConfig, preparation: Preparation) -> None:
    """Write the data set into --output_dir, or what is missing of it after an interruption."""
    output = preparation.output
    with open_output(config):
        settings = resume_settings(config, preparation.splits)
        check_settings(output, settings)
        preparation.check_space()
        try:
            write_json(output / SETTINGS_FILE, settings)
            preparation.write()
        except OSError as error:
            if error.errno in (None, errno.EMFILE, errno.ENFILE):  # reading has failed, perhaps in a worker
                raise
            raise RunError(
                f"--output_dir {output}: could not be written ({error.strerror}); what is finished stays, make room"
                " and run the same command again"
            ) from error


def open_output(config: PrepareConfig) -> TextIO:
    """Make the folder and lock it against other calls as long as the returned file is open.

    Raises:
        UserError: it cannot be the output: inside of the input, in use, not writable, or with other content.
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


def resume_settings(config: PrepareConfig, splits: list[Split]) -> dict[str, Any]:
    """Return what must be the same when an interrupted call is continued; folders may have moved."""
    flags = ("short_side", "format", "image_format", "quality", "in_chans", "shard_mb", "exif")
    settings: dict[str, Any] = {f"--{flag}": getattr(config, flag) for flag in flags}
    for split in splits:
        names = "\n".join([*(split.classes or ()), *split.keys]).encode("utf-8", "surrogateescape")
        settings[f"number of {split.name} images"] = len(split.source)
        settings[f"hash of the names of the {split.name} images"] = hashlib.sha256(names).hexdigest()
    return settings


def check_settings(output: Path, settings: dict[str, Any]) -> None:
    """Raise UserError naming the first setting that differs from the first call's, with both values."""
    try:
        saved = json.loads((output / SETTINGS_FILE).read_text())
    except FileNotFoundError:
        return
    for name in [*settings, *saved]:
        now, before = (given.get(name, BEFORE.get(name)) for given in (settings, saved))
        if now != before:
            raise UserError(
                f"--output_dir {output}: {name} is {now} here but {before} in the call that"
                " began it, make them equal or choose another folder"
            )


if __name__ == "__main__":
    run_main(Path(__file__).name, main)
