"""Measure the data loader: ours and a plain Pillow pipeline, on the same files."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset
from torchvision.transforms.v2.functional import to_pil_image

from util.bench.config import LoaderConfig
from util.bench.pil_pipeline import PilDataset, jpeg
from util.data.datasets import open_images
from util.data.decode import load_image
from util.data.loader import training_loader
from util.data.samples import BatchOrder
from util.data.sources import ImageSource
from util.runtime.errors import UserError
from util.runtime.progress import progress
from util.train.pretraining import build_loader, cached

# Flags that change the Pillow pipeline; it ignores all others.
PIL_KNOWS = ("crop", "photometric", "hflip", "mean", "std", "in_chans", "input_size", "model", "alpha", "batch_size",
             "num_workers", "data_path", "dataset", "seed")  # fmt: skip


@dataclass
class Sample:
    """A subset of the images of a source; `files` holds them re-encoded in memory if --scale_to asks for it."""

    source: ImageSource
    chosen: list[int]
    files: list[bytes] | None = None
    labels: list[int] | None = None
    class_names: list[str] | None = None

    def __len__(self) -> int:
        return len(self.chosen)

    def read(self, index: int) -> Any:
        """Return the image as its source does, or the bytes of the re-encoded image."""
        return self.files[index] if self.files is not None else self.source.read(self.chosen[index])

    def name(self, index: int) -> str:
        """Return the name that its source gives the image."""
        return self.source.name(self.chosen[index])


def bench_images(config: LoaderConfig) -> Sample:
    """Choose the images of a turn at random, as many as fill whole batches, and re-encode them if asked.

    Raises:
        UserError: the data set is a stream, or smaller than a batch.
    """
    source = open_images(config.data_path, config.dataset, "train")
    if isinstance(source, IterableDataset):
        raise UserError(f"--dataset {config.dataset}: a stream cannot be read twice the same, use --data_path")
    batch = config.batch_size
    if len(source) < batch:
        raise UserError(f"--batch_size {batch}: the data set has {len(source)} images, make the batch smaller")
    number = min(config.images, len(source)) // batch * batch
    sample = Sample(source, np.random.default_rng(config.seed).permutation(len(source))[:number].tolist())
    if config.scaled_size is not None:
        places = progress(range(number), number, "re-encoding", "images")
        pixels = (load_image(sample, index, config.in_chans, skip_bad=False)[0] for index in places)
        sample.files = [jpeg(to_pil_image(image), config.scaled_size) for image in pixels]
    return sample


def pipeline(kind: str, config: LoaderConfig, images: Sample) -> Callable[[], float]:
    """Return a function that reads all images once and returns the seconds per image and core."""
    order = BatchOrder(len(images), config.batch_size, 1, 0, 1, config.seed)
    if kind == "ours":
        loader = build_loader(config, cached(config, images), order, torch.device("cpu"))
    else:
        dataset = PilDataset(images, config)
        loader = training_loader(dataset, order, config.resolved_num_workers, False, config.loader_timeout)

    def turn() -> float:
        begin = time.perf_counter()
        batches = sum(1 for _ in loader)
        seconds = time.perf_counter() - begin
        order.epoch += 1
        return seconds * max(1, config.resolved_num_workers) / (batches * config.batch_size)

    return turn
