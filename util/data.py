"""Encoded images -> samples -> batches: how images are decoded, what a sample is, in which order samples come.

`decode` makes a pixel tensor of an image of util/sources.py, `PretrainDataset` its views, `BatchOrder` says which
samples make up which batch of which epoch on which rank.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import io
import pickle
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from util.device_views import crop_rows, photometry_row
from util.errors import LOADERS_DEATH, UserError, kill_loaders
from util.sources import BadImage, ImageSource
from util.views import Plan, Size, TwoViews, centre_view, sample_generator

# --------------------------------------------------------------------------------------------------------
# Decoding
# --------------------------------------------------------------------------------------------------------


MAX_PIXELS = 178_956_970  # Pillow's bound against decompression bombs
MAX_ELONGATION = 1000  # longer side over shorter one: resized to cover a view, 1 x 65535 would take 10 GB
_PILLOW_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_JPEG_MODES = {1: ImageReadMode.GRAY, 3: ImageReadMode.RGB}


def decode(raw: bytes | Image.Image | Tensor, in_chans: int) -> Tensor:
    """Pixels uint8 [in_chans, h, w] of encoded bytes, a PIL image or pixels; EXIF orientation is left alone, as MAE.

    torchvision decodes JPEG, in 60 % of Pillow's time and without letting zeros at a file's end pass for pixels;
    Pillow whatever else it knows (torchvision's decoder of PNG may crash the process on a corrupt file).

    Raises:
        BadImage: empty, truncated, no image, or larger than `check_size` allows. A JPEG that was cut and then
            ended properly cannot be told from a whole one: libjpeg fills it up with grey and only warns.
    """
    if isinstance(raw, Tensor):
        return raw if raw.shape[0] == in_chans else pil_pixels(to_pil_image(raw), in_chans)
    try:
        if isinstance(raw, Image.Image):
            return pil_pixels(raw, in_chans)
        if not raw:
            raise BadImage("the file is empty")
        with Image.open(io.BytesIO(raw)) as header:
            check_size(*header.size)
            header.verify()  # PNG's checksums, at which decoding does not look
        if header.format in ("JPEG", "MPO") and in_chans in _JPEG_MODES:
            try:
                return decode_jpeg(torch.frombuffer(bytearray(raw), dtype=torch.uint8), _JPEG_MODES[in_chans])
            except RuntimeError as error:  # "decode_jpeg, FILE:LINE, what is wrong"
                raise BadImage(str(error).splitlines()[0].rpartition(", ")[2]) from error
        with Image.open(io.BytesIO(raw)) as image:
            return pil_pixels(image, in_chans)
    except (BadImage, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise BadImage("no image, or of an unknown format") from error
    except Exception as error:  # on corrupt bytes decoders raise whatever they stumble over
        raise BadImage(f"{type(error).__name__}: {error}") from error


def check_size(width: int, height: int) -> None:
    """BadImage if the header announces more than a decoder, or `resize`, should be asked for."""
    if not 0 < width * height <= MAX_PIXELS:
        raise BadImage(f"{width} x {height} pixels, at most {MAX_PIXELS} are decoded")
    if max(width, height) > MAX_ELONGATION * min(width, height):
        raise BadImage(f"{width} x {height} pixels, a side may be at most {MAX_ELONGATION} times the other")


def pil_pixels(image: Image.Image, in_chans: int) -> Tensor:
    """Pixels uint8 [in_chans, h, w]; 16-bit greys are scaled, not clipped as Pillow's `convert` does.

    Raises:
        BadImage: it is too large, or of floats, which Pillow would cut to 0 ... 255: mostly they lie in 0 ... 1; or of
            integers of 32 bits.
    """
    check_size(*image.size)
    long = image.mode == "I" and image.format != "PNG"  # older Pillows read 16-bit PNGs so
    if image.mode == "F" or long:
        kind = "integers of 32 bits" if long else "floats"
        raise BadImage(f"its pixels are {kind}, whose range it does not tell; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image, dtype=np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode == "P":
        image = image.convert("RGBA")  # a palette may hold transparency
    return pil_to_tensor(image.convert(_PILLOW_MODES[in_chans]))


# --------------------------------------------------------------------------------------------------------
# Samples and batches for pre-training
# --------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """One batch, or one sample of it without the first dimension."""

    views: Tensor  # [B, num_views, C, H, W] uint8
    noise: Tensor  # [B, L] float32: its order decides which patches are masked
    index: Tensor  # [B] the samples asked for
    read_index: Tensor  # [B] the samples read: another one where an image was bad; see `PretrainStream`
    photometry: Tensor = torch.empty(0)  # [B, ROW_LENGTH] what the device still has to do to view v; empty: nothing


class DrawnBatch(NamedTuple):
    """A batch of images that lie on the device: only what was drawn for them."""

    crops: Tensor  # [B, num_views, CROP_LENGTH] int64
    noise: Tensor  # the rest as in `Batch`
    index: Tensor
    read_index: Tensor
    photometry: Tensor


MOST_BAD_IN_A_ROW = 100
MAY_BE_SKIPPED, MUST_BE_READ = "mend it or add --on_bad_image skip", "mend it or take it out"  # what to do about one


def load_image(
    source: ImageSource, index: int, in_chans: int, skip_bad: bool, fix: str = MAY_BE_SKIPPED
) -> tuple[Tensor, int]:
    """Pixels of sample `index`, or with `skip_bad` of the next readable one, and the index of what was read.

    Args:
        fix: what the user can do about a bad image.

    Raises:
        UserError: it cannot be read, or with `skip_bad` none of the next hundred.
    """
    most = min(MOST_BAD_IN_A_ROW, len(source))
    for attempt in range(most):
        place = (index + attempt) % len(source)
        try:
            return decode(source.read(place), in_chans), place
        except (BadImage, OSError) as error:
            if not skip_bad:
                name = source.name(place)
                raise UserError(f"{name}: cannot be read ({error}); {fix}") from error
    raise UserError(f"--on_bad_image skip: {most} unreadable images in a row from {source.name(index)} on")


@dataclass
class PretrainDataset(Dataset):
    """Sample (epoch, index) -> views and masking noise, all of it determined by seed, epoch and index."""

    source: ImageSource
    views: TwoViews
    num_patches: int  # L
    in_chans: int
    seed: int
    skip_bad: bool
    photometry_later: bool = False  # on the device (--augment_on device)

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        epoch, index = key
        image, read_index = load_image(self.source, index, self.in_chans, self.skip_bad)
        rng = sample_generator(self.seed, epoch, index)
        return make_sample(image, self.views, self.num_patches, rng, self.photometry_later, index, read_index)


def make_sample(
    image: Tensor,
    views: TwoViews,
    num_patches: int,
    rng: np.random.Generator,
    photometry_later: bool,
    index: int,
    read_index: int,
) -> Batch:
    """Masking noise and views of an image [C, h, w], as one sample without the first dimension."""
    noise = torch.from_numpy(rng.random(num_patches, dtype=np.float32))
    numbers = (torch.tensor(index), torch.tensor(read_index))
    if not photometry_later:
        return Batch(views(image, rng), noise, *numbers, torch.empty(0))
    plan = views.draw(tuple(image.shape[-2:]), rng)
    return Batch(views.cut(image, plan), noise, *numbers, torch.tensor(photometry_of(plan)))


def photometry_of(plan: Plan) -> list[float]:
    """The row of util/device_views.py, empty where there is no photometry."""
    return [] if plan.photometry is None else photometry_row(plan.photometry)


@dataclass
class DrawnDataset(Dataset):
    """Samples (epoch, index) of images that lie on the device: crops, photometry and noise, drawn as `PretrainDataset`.

    Asked for a whole batch at a time, since there is little to do for each sample.
    """

    sizes: np.ndarray  # [N, 2] of the images
    readable: np.ndarray  # [N] which image is read for each
    views: TwoViews
    num_patches: int
    seed: int

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> DrawnBatch:
        noise = np.empty((len(keys), self.num_patches), dtype=np.float32)
        index = np.array([index for _, index in keys])
        read_index = self.readable[index]
        plans = []
        for place, (epoch, sample) in enumerate(keys):
            rng = sample_generator(self.seed, epoch, sample)
            rng.random(out=noise[place], dtype=np.float32)
            plans.append(self.views.draw(tuple(self.sizes[read_index[place]].tolist()), rng))
        crops = torch.from_numpy(np.stack([crop_rows(plan) for plan in plans]))
        photometry = torch.tensor([photometry_of(plan) for plan in plans])
        return DrawnBatch(
            crops, torch.from_numpy(noise), torch.from_numpy(index), torch.from_numpy(read_index), photometry
        )


@dataclass
class PretrainStream(IterableDataset):
    """The same from a stream: samples have no index, their number in the worker's stream takes its place.

    `read_index` is larger than `index` by the unreadable samples that were left out just before it. Which samples come
    in which order is up to the stream's reader: timm's shuffle wds/ by the seeds that PyTorch gives loader processes,
    and `Loader` has these follow from seed and epoch. An epoch is entered in the middle by passing over what its first
    batches had: undecoded, unless unreadable samples are left out. That is exact with the same number of processes and
    of loader processes, between which the reader deals its parts.
    """

    stream: IterableDataset
    views: TwoViews
    num_patches: int
    in_chans: int
    seed: int
    rank: int
    skip_bad: bool = False
    photometry_later: bool = False
    epoch: int = 0
    batch_size: int = 1
    start_batch: int = 0  # batches of this epoch that this rank had before a resume

    def __iter__(self) -> Iterator[Batch]:
        worker = torch.utils.data.get_worker_info()
        number = (self.rank << 48) | ((worker.id if worker else 0) << 32)
        # without loader processes this one would go on where the epoch before has left a reader's generator
        stream = self.stream if worker else copy.deepcopy(self.stream)
        if hasattr(stream, "set_epoch"):
            stream.set_epoch(self.epoch)
        bad_in_a_row = 0
        # of each process alike; `Loader` passes over the rest, less than one batch for each
        start = number + self.start_batch // (worker.num_workers if worker else 1) * self.batch_size
        while True:  # the order of batches ends the epoch, at the same step on every rank
            begin = number
            for raw, *_ in stream:
                if number < start and not self.skip_bad:
                    number += 1
                    continue
                try:
                    image = decode(raw, self.in_chans)
                except BadImage as error:
                    bad_in_a_row += 1
                    if not self.skip_bad or bad_in_a_row == MOST_BAD_IN_A_ROW:
                        raise UserError(
                            f"the stream's sample after {number - begin} good ones cannot be read ({error});"
                            f" {MAY_BE_SKIPPED}"
                        ) from error
                    continue
                if number >= start:
                    rng = sample_generator(self.seed, self.epoch, number)
                    numbers = (number, number + bad_in_a_row)
                    yield make_sample(image, self.views, self.num_patches, rng, self.photometry_later, *numbers)
                bad_in_a_row = 0
                number += 1
            if number == begin:
                raise UserError("--dataset: the stream holds no samples, or fewer parts than loader processes")


@dataclass
class BatchOrder(Sampler):
    """Which samples make up which batch of one rank; each sample at most once in an epoch.

    An epoch is a permutation of all samples from (seed, epoch), cut into updates of `effective_batch` samples;
    each update into `accum_iter` parts, and each part evenly over the ranks. The remainder is left out. So an
    update holds the same samples for any number of ranks and parts.
    """

    num_samples: int
    batch_size: int  # per rank
    accum_iter: int
    rank: int
    world_size: int
    seed: int
    epoch: int = 0
    start_update: int = 0  # updates of this epoch that were done before a resume

    @property
    def updates_per_epoch(self) -> int:
        """Optimiser steps in an epoch."""
        return self.num_samples // (self.batch_size * self.accum_iter * self.world_size)

    def __len__(self) -> int:
        return (self.updates_per_epoch - self.start_update) * self.accum_iter

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.num_samples, generator=generator)
        step = self.batch_size * self.world_size  # samples in a part, over all ranks
        for part in range(self.start_update * self.accum_iter, self.updates_per_epoch * self.accum_iter):
            samples = order[part * step : (part + 1) * step][self.rank :: self.world_size]
            yield [(self.epoch, index) for index in samples.tolist()]


class Loader(DataLoader):
    """A DataLoader that never waits for a batch for longer than `patience` seconds (0: for ever).

    DataLoader's own `timeout` ends once a loader process has announced a batch; one that hangs before it has handed
    over the batch's memory would be waited for without end. An alarm sees that too; only the main thread can have one.
    One that dies then leaves errors of sockets or pickle, which name no loader: they are raised as one that does.

    Loader processes outlive SIGTERM, which launchers and schedulers send to a whole group: the run still needs them for
    the update under way, and ends them itself.

    Raises:
        RuntimeError: while iterating, a loader process died or hung; see `util.errors.loaders_death`.
    """

    def __init__(self, dataset, *, patience: float = 600.0, **settings: Any):
        if settings.get("num_workers") and sys.platform == "linux":
            # others get copies of the names and cannot map cached images; from 3.14 on they are Python's default
            settings["multiprocessing_context"] = "fork"
        super().__init__(dataset, worker_init_fn=ignore_sigterm, **settings)
        self.patience = patience

    def __iter__(self) -> Iterator:
        if isinstance(self.dataset, PretrainStream):  # its reader's order follows from what this draws
            self.generator = torch.Generator().manual_seed(self.dataset.seed * 1_000_003 + self.dataset.epoch)
        return self._watched() if self.num_workers else super().__iter__()

    def _watched(self) -> Iterator:
        # a forked process blocks what is blocked here: before torch's handler is there, and before ours follows it
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            with self._watch():  # processes that live on are asked here whether they are ready
                batches = super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        atexit.unregister(kill_loaders)
        atexit.register(kill_loaders)  # before torch and Python wait for those that ignore their SIGTERM
        passed_over = self.dataset.start_batch % self.num_workers if isinstance(self.dataset, PretrainStream) else 0
        for _ in range(passed_over):
            with self._watch():
                next(batches)
        while True:
            with self._watch():
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    @contextlib.contextmanager
    def _watch(self) -> Iterator[None]:
        def on_alarm(number: int, frame: FrameType | None) -> None:
            raise RuntimeError(f"{LOADERS_DEATH}: no batch came in {self.patience:g} seconds")

        timed = self.patience and threading.current_thread() is threading.main_thread()
        if timed:
            before = signal.signal(signal.SIGALRM, on_alarm)
            signal.setitimer(signal.ITIMER_REAL, self.patience)
        try:
            yield
        except Exception as error:
            if not broke_off(error):
                raise
            raise RuntimeError(f"{LOADERS_DEATH}: a batch broke off ({type(error).__name__} {error})") from error
        finally:
            if timed:
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, before)


def ignore_sigterm(worker: int) -> None:
    """In a loader process that was not forked, after torch has set its handler, by which the signal is deadly."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def broke_off(error: Exception) -> bool:
    """Whether it is what is left of a batch whose loader process ended while handing it over."""
    of_the_data_set = "DataLoader worker process" in str(error)  # torch's words around what a loader raised
    of_the_way = isinstance(error, EOFError | OSError | pickle.UnpicklingError) or "ancdata" in str(error)
    return of_the_way and not of_the_data_set


def as_it_is(batch: DrawnBatch) -> DrawnBatch:
    """For a data set that makes whole batches."""
    return batch


def training_loader(dataset, order: BatchOrder, num_workers: int, pin_memory: bool, timeout: float) -> DataLoader:
    """Batches in the order of `order`; set `order.epoch` before each pass."""
    stream = isinstance(dataset, IterableDataset)
    return Loader(
        dataset,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0 and not stream,  # a stream's epoch reaches new workers only
        patience=timeout,
        collate_fn=as_it_is if isinstance(dataset, DrawnDataset) else None,
        **(dict(batch_size=order.batch_size, drop_last=True) if stream else dict(batch_sampler=order)),
    )


# --------------------------------------------------------------------------------------------------------
# Labelled images
# --------------------------------------------------------------------------------------------------------


class LabelledBatch(NamedTuple):
    """One batch for a classifier, or one sample of it without the first dimension."""

    images: Tensor  # [B, C, H, W] float32, augmented and normalised
    labels: Tensor  # [B]
    index: Tensor  # [B] the samples asked for
    read_index: Tensor  # [B] the samples read: other ones where an image was bad


def seed_generators(*key: int, device: torch.device | None = None) -> None:
    """Seed the global generators of Python, NumPy and torch, from which timm's augmentations draw, by `key`.

    Args:
        device: seed its generator too, for what a model draws (stochastic depth).
    """
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed notes a stack trace for each GPU not yet in use
    if device is not None and device.type == "cuda":
        torch.cuda.manual_seed(seed)


@dataclass
class ClassifierDataset(Dataset):
    """Sample (epoch, index) -> augmented image and label, determined by seed, epoch and index."""

    source: ImageSource
    transform: Callable[[Image.Image], Tensor]  # draws from the global generators
    in_chans: int
    seed: int
    skip_bad: bool

    def __getitem__(self, key: tuple[int, int]) -> LabelledBatch:
        epoch, index = key
        image, read_index = load_image(self.source, index, self.in_chans, self.skip_bad)
        seed_generators(self.seed, epoch, index)
        view = self.transform(to_pil_image(image))
        label = self.source.labels[read_index]
        return LabelledBatch(view, torch.tensor(label), torch.tensor(index), torch.tensor(read_index))


@dataclass
class LabelledDataset(Dataset):
    """uint8 centre views with labels (-1 where there are none), of the samples in `indices`.

    With `skip_bad` the next readable image and its label stand for one that cannot be read.
    """

    source: ImageSource
    indices: Sequence[int]
    size: Size
    in_chans: int
    skip_bad: bool = False

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        asked = self.indices[place]
        image, index = load_image(self.source, asked, self.in_chans, self.skip_bad, fix=MUST_BE_READ)
        label = -1 if self.source.labels is None else self.source.labels[index]
        return centre_view(image, self.size), label


class Normalise:
    """uint8 [..., C, H, W] to float32 with the mean and deviation of pixels in [0, 1], on `device`."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device):
        self.mean, self.std = mean, std
        # made once: a tensor made of Python numbers in each step would wait for the GPU
        self.shift = torch.tensor(mean, device=device).view(-1, 1, 1) * 255
        self.scale = torch.tensor(std, device=device).view(-1, 1, 1) * 255

    def __call__(self, pixels: Tensor) -> Tensor:
        return (pixels.float() - self.shift) / self.scale
