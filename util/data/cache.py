"""A data set that fits is decoded once and kept as uint8 (--cache ram, --cache device).

The pixels lie in one file in memory (/dev/shm where it is large enough), which all processes of a machine map; its
name is gone before training begins, so that nothing is left behind however the run ends.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset

from util.data.decode import MAY_BE_SKIPPED, decode
from util.data.device_views import StoredImages
from util.data.formats import Exif
from util.data.loader import Loader
from util.data.sources import BadImage, ImageSource
from util.runtime.distributed import barrier, from_all_ranks, is_main, patient_group, rank
from util.runtime.errors import RunError, UserError
from util.runtime.logs import format_duration
from util.runtime.progress import progress

_SHARED_MEMORY = Path("/dev/shm")
_ESTIMATE_AFTER = (32, 512)  # images after which the size of all is estimated; the first ones fit into any memory


@dataclass
class CachedImages:
    """An image source whose images are decoded already: [C, h, w] each, in one long uint8 tensor."""

    source: ImageSource
    pixels: Tensor  # [bytes of all images]
    starts: Tensor  # [N] int64, where each image begins
    sizes: Tensor  # [N, 2] int64, its height and width; 0 where it could not be read
    in_chans: int
    bad: dict[int, str]  # why

    @property
    def labels(self) -> list[int] | None:
        """Return those of the source."""
        return self.source.labels

    @property
    def class_names(self) -> list[str] | None:
        """Return those of the source."""
        return self.source.class_names

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        """Return what the source calls it."""
        return self.source.name(index)

    def read(self, index: int) -> Tensor:
        """Return pixels [C, h, w].

        Raises:
            BadImage: it could not be read when the cache was filled.
        """
        if index in self.bad:
            raise BadImage(self.bad[index])
        h, w = self.sizes[index].tolist()
        start = int(self.starts[index])
        return self.pixels[start : start + self.in_chans * h * w].view(self.in_chans, h, w)

    def at(self, index: Tensor) -> StoredImages:
        """Return the images `index` [B], on the device that holds the pixels."""
        return StoredImages(self.pixels, self.starts[index], self.sizes[index], self.in_chans)

    def to(self, device: torch.device) -> CachedImages:
        """Return the same images with their pixels on the device.

        Raises:
            UserError: they do not fit.
        """
        try:
            tensors = {name: getattr(self, name).to(device) for name in ("pixels", "starts", "sizes")}
        except torch.OutOfMemoryError as error:
            gib = self.pixels.numel() / 2**30
            raise UserError(f"--cache device: {gib:.1f} GiB of images do not fit on {device}; use ram") from error
        return replace(self, **tensors)


@dataclass
class _Decoded(Dataset):
    """Image number -> its pixels, or why there are none; read by workers."""

    source: ImageSource
    in_chans: int
    crop: Callable[[Tensor], Tensor] | None
    exif: Exif

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Tensor | str:
        try:
            image = decode(self.source.read(index), self.in_chans, self.exif)
            return (self.crop(image) if self.crop else image).contiguous()
        except BadImage as error:
            return str(error)


def cache_images(
    source: ImageSource,
    in_chans: int,
    num_workers: int,
    loader_timeout: float,
    skip_bad: bool,
    crop: Callable[[Tensor], Tensor] | None = None,
    exif: Exif = "ignore",
) -> CachedImages:
    """Decode all images, once per machine; a collective of all ranks.

    Args:
        num_workers: processes that decode.
        loader_timeout: seconds to wait for some images, 0: for ever.
        skip_bad: record unreadable images instead of raising.
        crop: returns the part of an image [C, h, w] that is kept; None: all of it.
        exif: see `util.data.decode.decode`.

    Raises:
        UserError: an image cannot be read, or they do not fit into memory.
    """
    waiting = patient_group()  # made by all at once, before some decode and others wait for them
    if "LOCAL_RANK" in os.environ and os.environ["LOCAL_RANK"] != "0":
        written = None
    else:
        written = write_pixels(_Decoded(source, in_chans, crop, exif), num_workers, loader_timeout, skip_bad)
    path, sizes, bad = of_this_machine(written, waiting)
    lengths = sizes.prod(dim=1) * in_chans
    starts = lengths.cumsum(0) - lengths
    total = int(lengths.sum())
    pixels = torch.from_file(path, shared=True, size=total, dtype=torch.uint8) if total else torch.empty(0)
    barrier()
    if written is not None:
        os.unlink(path)
    return CachedImages(source, pixels, starts, sizes, in_chans, bad)


Written = tuple[str, Tensor, dict[int, str]]  # path of the pixels, sizes, bad images


def of_this_machine(written: Written | None, group: dist.ProcessGroup | None) -> Written:
    """Return what the first process of this machine has written."""
    return from_all_ranks(written, group)[rank() - int(os.environ.get("LOCAL_RANK", 0))]


def write_pixels(images: _Decoded, num_workers: int, loader_timeout: float, skip_bad: bool) -> Written:
    """Decode all images into a file in memory."""
    loader = Loader(images, batch_size=32, num_workers=num_workers, collate_fn=list, loader_timeout=loader_timeout)
    sizes = torch.zeros(len(images), 2, dtype=torch.int64)
    bad: dict[int, str] = {}
    begin = time.monotonic()
    file = in_memory(_SHARED_MEMORY)
    try:
        done = 0
        for batch in progress(loader, len(images), "decoding", "images", len):
            for image in batch:
                if isinstance(image, str):
                    if not skip_bad:
                        name = images.source.name(done)
                        raise UserError(f"{name}: cannot be read ({image}); {MAY_BE_SKIPPED}")
                    bad[done] = image
                else:
                    sizes[done] = torch.tensor(image.shape[-2:])
                    file.write(memoryview(image.numpy()).cast("B"))
                done += 1
            if done == len(images) or any(done - len(batch) < number <= done for number in _ESTIMATE_AFTER):
                file = with_room(file, file.tell() * len(images) // done)
        file.flush()
    except OSError as error:
        os.unlink(file.name)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RunError(f"--cache: the decoded images do not fit into {file.name} ({error.strerror})") from error
    except BaseException:
        os.unlink(file.name)
        raise
    if len(bad) == len(images):
        raise UserError(f"--cache: none of the {len(images)} images can be read, the first: {bad[0]}")
    if is_main():
        seconds = format_duration(time.monotonic() - begin)
        print(f"cached {len(images)} images, {file.tell() / 2**30:.2f} GiB, in {seconds}", file=sys.stderr)
    file.close()
    return file.name, sizes, bad


def in_memory(folder: Path) -> BinaryIO:
    """Open a new file in `folder`, or in the temporary folder where there is no such memory."""
    return tempfile.NamedTemporaryFile(
        prefix="lut-cache-", dir=folder if folder.is_dir() else None, delete=False
    )  # mapped by others


def with_room(file: BinaryIO, needed: int) -> BinaryIO:
    """Return the file, moved to the temporary folder if its own cannot hold `needed` bytes.

    Raises:
        UserError: neither memory nor that folder can.
    """
    missing = needed - file.tell()
    free = available_memory()
    if missing > free:
        raise UserError(
            f"--cache: the decoded images take {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free;"
            " use --cache none, or smaller images (scripts/prepare_data.py)"
        )
    folder = Path(file.name).parent
    if missing <= shutil.disk_usage(folder).free or folder != _SHARED_MEMORY:
        return file
    print(f"{folder} is too small for {needed / 2**30:.1f} GiB: cached in {tempfile.gettempdir()}", file=sys.stderr)
    moved = in_memory(Path(tempfile.gettempdir()))
    file.flush()
    with open(file.name, "rb") as before:
        shutil.copyfileobj(before, moved)
    os.unlink(file.name)
    return moved


def available_memory() -> int:
    """Return the bytes that this machine can still give, by the kernel's own estimate; unknown: no bound."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return sys.maxsize
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


# --------------------------------------------------------------------------------------------------------
# Which sample takes the place of a bad one
# --------------------------------------------------------------------------------------------------------


def readable(images: CachedImages) -> np.ndarray:
    """Return the sample that --on_bad_image skip reads for each, [N]: itself, or the next readable one."""
    good = images.sizes.cpu().numpy()[:, 0] > 0
    following = np.where(np.concatenate([good, good]), np.arange(2 * len(good)), 2 * len(good))
    following = np.minimum.accumulate(following[::-1])[::-1][: len(good)]
    return following % len(good)
