"""What segmentation is trained on: images with masks, checked before a run, and their augmentation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from util.config.segment import SegmentConfig
from util.data.decode import MAY_BE_SKIPPED, MUST_BE_READ
from util.data.joint_views import JointView
from util.data.loader import Loader
from util.data.masked_samples import MaskedDataset, PixelCount
from util.data.masks import IGNORED, ORIENTED, MaskedSource, find_classes, find_layout, pair_up
from util.runtime.distributed import Processes, is_main, sum_over_ranks
from util.runtime.errors import UserError
from util.runtime.logs import warn_once
from util.runtime.progress import progress
from util.train.evaluation import share_of_images
from util.train.resume import resumes


def open_checked(config: SegmentConfig, processes: Processes) -> MaskedImages:
    """Open the images and masks of the settings; read all masks once where a fresh run has --check_data."""
    data = open_masked(config)
    if config.check_data and not config.eval and not resumes(config):  # an earlier run has checked the data
        for split, source in (("training", data.train), ("validation", data.val)):
            check_masks(source, split, config, processes)
    return data


def check_masks(source: MaskedSource, split: str, config: SegmentConfig, processes: Processes) -> None:
    """Read every mask of a split, each rank its share, and print what the split holds.

    Raises:
        UserError: something is wrong with a mask, or all pixels are ignored.
    """
    counts = count_pixels(source, config, split, share_of_images(len(source), processes, dist_eval=True))
    *counts, oriented = sum_over_ranks(torch.from_numpy(counts).to(processes.device)).tolist()
    names, total = source.classes.names, sum(counts)
    if counts[IGNORED] == total:
        raise UserError(f"{source.masks[0]}, ...: all pixels of the {split} masks are ignored, see --ignore_index")
    absent = [name for name, count in zip(names, counts, strict=False) if count == 0]
    if split == "training" and len(names) - len(absent) == 1 < len(names):
        only = next(name for name in names if name not in absent)
        raise UserError(
            f"{source.masks[0]}, ...: the {split} masks hold one class only, {only}, and"
            f" {100 * counts[IGNORED] / total:.1f} % ignored pixels; save the numbers of classes (0, 1, ...) in them,"
            " or see --ignore_index"
        )
    missing = f"; without {', '.join(absent[:6])}{', ...' * (len(absent) > 6)}" if absent else ""
    if is_main():
        have = f"{len(names) - len(absent)} of {len(names)} classes"
        print(
            f"{split}: {len(source)} masks, {have}{missing}; {100 * counts[IGNORED] / total:.1f} % ignored", flush=True
        )
    if oriented:
        done = {
            "ignore": "they and their masks are read as stored; if masks are of upright images, add --exif apply",
            "apply": "they are turned upright, and their masks must be of the upright images",
        }
        warn_once(f"{split}: {oriented} of {len(source)} images have an EXIF orientation: {done[config.exif]}")


@dataclass(frozen=True)
class MaskedImages:
    """The two splits that a segmenter needs; `train` is None with --eval."""

    train: MaskedSource | None
    val: MaskedSource

    @property
    def num_classes(self) -> int:
        """Number of classes, K."""
        return len(self.val.classes.names)

    @property
    def class_names(self) -> list[str]:
        """The names of the classes in the order of their numbers."""
        return list(self.val.classes.names)


def open_masked(config: SegmentConfig) -> MaskedImages:
    """Open the images and masks that the settings name.

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

    if not config.holdout:
        return MaskedImages(None if config.eval else split("train"), split("val"))
    train, val = hold_out_masked(split("train"), config.holdout)
    return MaskedImages(None if config.eval else train, val)


def hold_out_masked(source: MaskedSource, share: float) -> tuple[MaskedSource, MaskedSource]:
    """Divide training images into those to train on and a random share to evaluate on, the same in every run.

    Raises:
        UserError: there is a single image.
    """
    number = len(source)
    if number < 2:
        raise UserError(f"--holdout {share}: there is one training image alone, leave it out")
    held_out = max(1, min(round(share * number), number - 1))
    order = np.random.default_rng(0).permutation(number)
    train, val = sorted(order[held_out:].tolist()), sorted(order[:held_out].tolist())
    return source.subset(train), source.subset(val)


def train_dataset(config: SegmentConfig, source: MaskedSource) -> MaskedDataset:
    """Return the augmented training samples."""
    view = JointView(
        size=config.resolved_input_size,
        scale_range=config.scale_range,
        most_of_a_class=config.most_of_a_class,
        hflip=config.hflip,
        photometric=config.photometric,
        fill=tuple(round(255 * mean) for mean in config.resolved_mean),
    )
    return MaskedDataset(source, view, config.in_chans, config.seed, config.on_bad_image == "skip", config.exif)


def count_pixels(source: MaskedSource, config: SegmentConfig, split: str, indices: Sequence[int]) -> np.ndarray:
    """Count the pixels of each class, and images with an EXIF orientation, [257] int64, in some samples of a split.

    Raises:
        UserError: a mask cannot be read, has another size than its image, or holds a number that is no class.
    """
    training = split == "training"
    skip_bad = config.on_bad_image == "skip" and training
    fix = MAY_BE_SKIPPED if training else MUST_BE_READ
    dataset = PixelCount(source, indices, skip_bad, fix, config.exif)
    loader = Loader(
        dataset, batch_size=None, num_workers=config.resolved_num_workers, loader_timeout=config.loader_timeout
    )
    counts = progress(loader, len(indices), f"checking {split} masks", "masks") if is_main() else loader
    return sum((np.asarray(count) for count in counts), start=np.zeros(ORIENTED + 1, dtype=np.int64))
