"""Images with masks -> samples of training and evaluation, and the counts that a fresh run makes beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from util.data.decode import MAY_BE_SKIPPED, MOST_BAD_IN_A_ROW, MUST_BE_READ, decode
from util.data.formats import Exif
from util.data.joint_views import JointView, resized_image, scaled_size
from util.data.masks import ORIENTED, MaskedSource
from util.data.sources import BadImage
from util.data.views import Size, sample_generator
from util.runtime.errors import UserError


class MaskedBatch(NamedTuple):
    """One batch, or one sample of it without the first dimension."""

    images: Tensor  # [B, C, H, W] uint8; float32 and normalised once on the device
    masks: Tensor  # [B, H, W] uint8: class of each pixel, or IGNORED
    index: Tensor  # [B] the samples asked for
    read_index: Tensor  # [B] the samples read: other ones where an image was bad


def load_pair(
    source: MaskedSource,
    index: int,
    in_chans: int,
    skip_bad: bool,
    fix: str = MAY_BE_SKIPPED,
    exif: Exif = "ignore",
) -> tuple[Tensor, Tensor, int]:
    """Return image [C, h, w], mask [h, w] and index of sample `index`, or with `skip_bad` of the next readable one.

    Args:
        fix: what the user can do about an unreadable one.
        exif: see `util.data.decode.decode`.

    Raises:
        UserError: one cannot be read (with `skip_bad` none of the next hundred), or the mask is none for the image.
    """
    most = min(MOST_BAD_IN_A_ROW, len(source))
    for attempt in range(most):
        read_index = (index + attempt) % len(source)
        try:
            try:
                image = decode(source.read(read_index), in_chans, exif)
            except BadImage as error:
                raise BadImage(f"{source.name(read_index)}: {error}") from error
            return image, source.read_mask(read_index, tuple(image.shape[-2:]), exif), read_index
        except BadImage as error:
            if not skip_bad:
                raise unreadable(error, fix) from error
    raise UserError(f"--on_bad_image skip: {most} unreadable images in a row from {source.name(index)} on")


def unreadable(error: BadImage, fix: str) -> UserError:
    """Return the error for an image or mask whose name is in `error`."""
    name, _, why = str(error).partition(": ")
    return UserError(f"{name}: cannot be read ({why}); {fix}")


@dataclass
class MaskedDataset(Dataset):
    """Sample (epoch, index) -> augmented crop and its mask, determined by seed, epoch and index."""

    source: MaskedSource
    view: JointView
    in_chans: int
    seed: int
    skip_bad: bool
    exif: Exif = "ignore"

    def __getitem__(self, key: tuple[int, int]) -> MaskedBatch:
        epoch, index = key
        image, mask, read_index = load_pair(self.source, index, self.in_chans, self.skip_bad, exif=self.exif)
        image, mask = self.view(image, mask, sample_generator(self.seed, epoch, index))
        return MaskedBatch(image, mask, torch.tensor(index), torch.tensor(read_index))


@dataclass
class WholeImages(Dataset):
    """Images, uint8 [C, h, w], resized to cover `size`, with their masks at the original size."""

    source: MaskedSource
    indices: Sequence[int]
    size: Size
    in_chans: int
    exif: Exif = "ignore"

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor]:
        index = self.indices[place]
        image, mask, _ = load_pair(self.source, index, self.in_chans, False, MUST_BE_READ, self.exif)
        return resized_image(image, scaled_size(tuple(mask.shape), self.size)), mask


@dataclass
class PixelCount(Dataset):
    """Pixels of each class, [257] int64 as `MaskedSource.count` gives them, of one mask after the other."""

    source: MaskedSource
    indices: Sequence[int]
    skip_bad: bool
    fix: str  # what the user can do about one that is not skipped
    exif: Exif = "ignore"

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> np.ndarray:
        try:
            return self.source.count(self.indices[place], self.exif)
        except BadImage as error:
            if self.skip_bad:
                return np.zeros(ORIENTED + 1, dtype=np.int64)
            raise unreadable(error, self.fix) from error
