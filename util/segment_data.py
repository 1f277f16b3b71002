"""Images with masks -> samples: what training and evaluation read, and a look at all of it beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from util.data import MAY_BE_SKIPPED, MOST_BAD_IN_A_ROW, MUST_BE_READ, Loader, decode
from util.distributed import is_main
from util.errors import UserError
from util.joint_views import JointView, resized_image, scaled_size
from util.progress import progress
from util.segment_config import SegmentConfig
from util.segment_masks import MaskedSource, find_classes, find_layout, pair_up
from util.sources import BadImage
from util.views import Size, sample_generator

# --------------------------------------------------------------------------------------------------------
# Opening
# --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MaskedImages:
    """The two splits that a segmenter needs; `train` is None for --eval."""

    train: MaskedSource | None
    val: MaskedSource

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.val.classes.names)


def open_masked(config: SegmentConfig) -> MaskedImages:
    """The images and masks that the settings name.

    Raises:
        UserError: a split is missing or empty, an image has no mask, or nothing says what the classes are.
    """
    layout = find_layout(config.data_path) if config.data_path else None
    classes = find_classes(layout, config.classes, config.first_label, config.ignore_index)

    def split(name: str) -> MaskedSource:
        images, masks = (getattr(config, f"{name}_{kind}") for kind in ("images", "masks"))
        if images:
            folders, flags = (Path(images), Path(masks)), (f"--{name}_images", f"--{name}_masks")
        else:
            folders, flags = layout.folders(name), ("--data_path", "--data_path")
        return pair_up(*folders, classes, config.image_suffix, config.mask_suffix, flags)

    return MaskedImages(None if config.eval else split("train"), split("val"))


# --------------------------------------------------------------------------------------------------------
# Samples
# --------------------------------------------------------------------------------------------------------


class MaskedBatch(NamedTuple):
    """One batch, or one sample of it without the first dimension."""

    images: Tensor  # [B, C, H, W] uint8; float32 and normalised once on the device
    masks: Tensor  # [B, H, W] uint8: class of each pixel, or IGNORED
    index: Tensor  # [B] the samples asked for
    read_index: Tensor  # [B] the samples read: other ones where an image was bad


def load_pair(
    source: MaskedSource, index: int, in_chans: int, skip_bad: bool, fix: str = MAY_BE_SKIPPED
) -> tuple[Tensor, Tensor, int]:
    """Image [C, h, w] and mask [h, w] of sample `index`, or with `skip_bad` of the next readable one, and its index.

    Args:
        fix: what to do about an unreadable one.

    Raises:
        UserError: one cannot be read (with `skip_bad` none of the next hundred), or the mask is none for the image.
    """
    most = min(MOST_BAD_IN_A_ROW, len(source))
    for attempt in range(most):
        place = (index + attempt) % len(source)
        try:
            try:
                image = decode(source.read(place), in_chans)
            except (BadImage, OSError) as error:
                raise BadImage(f"{source.name(place)}: {error}") from error
            return image, source.read_mask(place, tuple(image.shape[-2:])), place
        except BadImage as error:
            if not skip_bad:
                raise unreadable(error, fix) from error
    raise UserError(f"--on_bad_image skip: {most} unreadable images in a row from {source.name(index)} on")


def unreadable(error: BadImage, fix: str) -> UserError:
    """For an image or mask whose name is in the error."""
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

    def __getitem__(self, key: tuple[int, int]) -> MaskedBatch:
        epoch, index = key
        image, mask, read_index = load_pair(self.source, index, self.in_chans, self.skip_bad)
        image, mask = self.view(image, mask, sample_generator(self.seed, epoch, index))
        return MaskedBatch(image, mask, torch.tensor(index), torch.tensor(read_index))


def train_dataset(config: SegmentConfig, source: MaskedSource) -> MaskedDataset:
    """Augmented training samples."""
    view = JointView(
        size=config.image_size,
        scale_range=config.scale_range,
        most_of_a_class=config.most_of_a_class,
        hflip=config.hflip,
        photometric=config.photometric,
        fill=tuple(round(255 * mean) for mean in config.pixel_mean),
    )
    return MaskedDataset(source, view, config.in_chans, config.seed, config.on_bad_image == "skip")


@dataclass
class WholeImages(Dataset):
    """Images, uint8 [C, h, w], resized to cover `size`, with their masks at the original size."""

    source: MaskedSource
    indices: Sequence[int]
    size: Size
    in_chans: int

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor]:
        image, mask, _ = load_pair(self.source, self.indices[place], self.in_chans, skip_bad=False, fix=MUST_BE_READ)
        return resized_image(image, scaled_size(tuple(mask.shape), self.size)), mask


# --------------------------------------------------------------------------------------------------------
# Looking at all of it
# --------------------------------------------------------------------------------------------------------


@dataclass
class PixelCount(Dataset):
    """Pixels of each class, [256] int64 with IGNORED at its own place, of one mask after the other."""

    source: MaskedSource
    indices: Sequence[int]
    skip_bad: bool
    fix: str  # of one that is not skipped

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> np.ndarray:
        try:
            return self.source.count(self.indices[place])
        except (BadImage, OSError) as error:
            if self.skip_bad:
                return np.zeros(256, dtype=np.int64)
            raise unreadable(error, self.fix) from error


def count_pixels(source: MaskedSource, config: SegmentConfig, split: str, indices: Sequence[int]) -> np.ndarray:
    """Pixels of each class, [256], in some samples of a split: all of their masks are looked at.

    Raises:
        UserError: a mask cannot be read, has another size than its image, or holds a number that is no class.
    """
    trained = split == "training"
    skip_bad, fix = config.on_bad_image == "skip" and trained, MAY_BE_SKIPPED if trained else MUST_BE_READ
    dataset = PixelCount(source, indices, skip_bad, fix)
    loader = Loader(dataset, batch_size=None, num_workers=config.loader_workers, patience=config.loader_timeout)
    counts = progress(loader, len(indices), f"looking at {split} masks", "masks") if is_main() else loader
    return sum((np.asarray(count) for count in counts), start=np.zeros(256, dtype=np.int64))
