"""Images with labels: augmented samples for a classifier, centre views for evaluation."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import to_pil_image

from util.data.decode import MUST_BE_READ, load_image
from util.data.formats import Exif
from util.data.loader import Loader
from util.data.sources import ImageSource
from util.data.views import Size, centre_view


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
    exif: Exif = "ignore"

    def __getitem__(self, key: tuple[int, int]) -> LabelledBatch:
        epoch, index = key
        image, read_index = load_image(self.source, index, self.in_chans, self.skip_bad, exif=self.exif)
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
    exif: Exif = "ignore"

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        index = self.indices[place]
        image, index = load_image(self.source, index, self.in_chans, self.skip_bad, MUST_BE_READ, self.exif)
        label = -1 if self.source.labels is None else self.source.labels[index]
        return centre_view(image, self.size), label


_BATCH = 256


def labelled_loader(
    source: ImageSource,
    most: int,
    size: Size,
    in_chans: int,
    num_workers: int,
    loader_timeout: float,
    skip_bad: bool = False,
    exif: Exif = "ignore",
) -> Loader:
    """Return a loader of centre views and labels of at most `most` images, those that `drawn` names."""
    dataset = LabelledDataset(source, drawn(source, most), size, in_chans, skip_bad, exif)
    return Loader(dataset, batch_size=_BATCH, num_workers=num_workers, loader_timeout=loader_timeout)


def drawn(source: ImageSource, most: int) -> list[int]:
    """Return the numbers of at most `most` images, in an order that is always the same."""
    return np.random.default_rng(0).permutation(len(source))[:most].tolist()
