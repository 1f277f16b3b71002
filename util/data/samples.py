"""Samples and batches of pre-training: views and masking noise of an image, in the order of seed and epoch."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Sampler

from util.data.decode import MAY_BE_SKIPPED, MOST_BAD_IN_A_ROW, decode, load_image
from util.data.device_views import crop_rows, photometry_row
from util.data.formats import Exif
from util.data.sources import BadImage, ImageSource
from util.data.views import TwoViews, ViewParams, sample_generator
from util.runtime.errors import UserError


class Batch(NamedTuple):
    """One batch, or one sample of it without the first dimension."""

    views: Tensor  # [B, num_views, C, H, W] uint8
    noise: Tensor  # [B, L] float32: its order decides which patches are masked
    index: Tensor  # [B] the samples asked for
    read_index: Tensor  # [B] the samples read: another one where an image was bad; see `PretrainStream`
    photometry: Tensor = torch.empty(0)  # [B, ROW_LENGTH] what the device still has to do to view v; empty: nothing


class DrawnBatch(NamedTuple):
    """A batch of images that lie on the device: the numbers that were drawn for them, no pixels."""

    crops: Tensor  # [B, num_views, CROP_LENGTH] int64
    noise: Tensor  # the rest as in `Batch`
    index: Tensor
    read_index: Tensor
    photometry: Tensor


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
    exif: Exif = "ignore"

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        epoch, index = key
        image, read_index = load_image(self.source, index, self.in_chans, self.skip_bad, exif=self.exif)
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
    """Return masking noise and views of an image [C, h, w], as one sample without the first dimension."""
    noise = torch.from_numpy(rng.random(num_patches, dtype=np.float32))
    numbers = (torch.tensor(index), torch.tensor(read_index))
    if not photometry_later:
        return Batch(views(image, rng), noise, *numbers, torch.empty(0))
    params = views.draw(tuple(image.shape[-2:]), rng)
    return Batch(views.cut(image, params), noise, *numbers, torch.tensor(photometry_of(params)))


def photometry_of(params: ViewParams) -> list[float]:
    """Return the row for util/data/device_views.py, empty where there is no photometry."""
    return [] if params.photometry is None else photometry_row(params.photometry)


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
        params = []
        for place, (epoch, sample) in enumerate(keys):
            rng = sample_generator(self.seed, epoch, sample)
            rng.random(out=noise[place], dtype=np.float32)
            params.append(self.views.draw(tuple(self.sizes[read_index[place]].tolist()), rng))
        crops = torch.from_numpy(np.stack([crop_rows(each) for each in params]))
        photometry = torch.tensor([photometry_of(each) for each in params])
        return DrawnBatch(
            crops, torch.from_numpy(noise), torch.from_numpy(index), torch.from_numpy(read_index), photometry
        )


@dataclass
class PretrainStream(IterableDataset):
    """The samples of `PretrainDataset` from a stream, numbered in the order in which a worker reads them.

    `read_index` is larger than `index` by the number of unreadable samples that were skipped just before. The stream's
    reader decides the order: timm's readers shuffle wds/ by the seeds that PyTorch gives the data loader workers, which
    `Loader` derives from seed and epoch. To resume within an epoch, the samples that were used already are skipped;
    they are decoded only where unreadable ones must be told from good ones. This is exact with the same number of ranks
    and of workers, among which the reader shares the stream.
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
    exif: Exif = "ignore"

    def __iter__(self) -> Iterator[Batch]:
        worker = torch.utils.data.get_worker_info()
        number = (self.rank << 48) | ((worker.id if worker else 0) << 32)
        # without workers the reader's generator would carry on from the last epoch, so the stream is copied
        stream = self.stream if worker else copy.deepcopy(self.stream)
        if hasattr(stream, "set_epoch"):
            stream.set_epoch(self.epoch)
        bad_in_a_row = 0
        # every worker skips as many whole batches; `Loader` skips the rest, less than one batch per worker
        start = number + self.start_batch // (worker.num_workers if worker else 1) * self.batch_size
        while True:  # the order of batches ends the epoch, at the same step on every rank
            begin = number
            for raw, *_ in stream:
                if number < start and not self.skip_bad:
                    number += 1
                    continue
                try:
                    image = decode(raw, self.in_chans, self.exif)
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
                raise UserError("--dataset: the stream holds no samples, or fewer parts than data loader workers")


@dataclass
class BatchOrder(Sampler):
    """The samples of each batch of one rank; each sample occurs at most once in an epoch.

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
        """Return the number of optimiser steps in an epoch."""
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
