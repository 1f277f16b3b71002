"""The images that are analysed: named files, or some of a data set."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from util.data.datasets import open_images
from util.data.decode import decode
from util.data.formats import Exif
from util.data.labelled import LabelledDataset
from util.data.loader import Loader
from util.data.sources import BadImage, FileSource, ImageSource, labelled_or_none
from util.figures.pictures import drawable
from util.runtime.errors import UserError
from util.runtime.progress import with_progress
from util.weights.vit import NamedViT


@dataclass(frozen=True)
class Images:
    """The images that are analysed, and how they are read."""

    source: ImageSource
    order: Sequence[int]  # indices of all images that are analysed; pictures show the first `num_shown`
    num_shown: int
    batch_size: int
    num_workers: int
    exif: Exif = "ignore"

    def loader(self, vit: NamedViT) -> Loader:
        """Return a loader of uint8 centre views for this model and labels (-1: none) of all images, in order."""
        dataset = LabelledDataset(self.source, self.order, vit.size, vit.in_chans, exif=self.exif)
        return Loader(dataset, batch_size=self.batch_size, num_workers=self.num_workers)

    def batches(self, vit: NamedViT, title: str) -> Iterator[Tensor]:
        """Yield all images as the model takes them, with progress on stderr."""
        return (vit.images(pixels) for pixels, _ in with_progress(self.loader(vit), f"{title}, {vit.label}"))

    def shown(self, vit: NamedViT) -> tuple[Tensor, np.ndarray]:
        """Return the images of the pictures as the model takes them, and as uint8 [n, H, W, 3] for drawing."""
        dataset = LabelledDataset(self.source, self.order[: self.num_shown], vit.size, vit.in_chans, exif=self.exif)
        pixels = torch.stack([dataset[position][0] for position in range(len(dataset))])
        return vit.images(pixels), drawable(pixels / 255)

    def title(self, position: int) -> str:
        """Return a short name, in lines, of the image at a position of `order`."""
        name = self.source.name(self.order[position])
        return wrap_name(Path(name).name if "/" in name else name)

    @property
    def shown_names(self) -> list[str]:
        """The full names of the images of the pictures."""
        return [self.source.name(index) for index in self.order[: self.num_shown]]

    @property
    def labelled(self) -> bool:
        """True if the images have labels of at least two classes."""
        return labelled_or_none(self.source) is not None

    def class_of(self, position: int) -> str:
        """Return the class of the image at a position of `order`; empty without labels."""
        if not self.labelled:
            return ""
        label = self.source.labels[self.order[position]]
        return self.source.class_names[label] if self.source.class_names else str(label)


def find_images(
    files: Sequence[str],
    data_path: str,
    dataset: str,
    split: str,
    *,
    most: int,
    show: int,
    seed: int,
    batch_size: int = 32,
    num_workers: int = 0,
    exif: Exif = "ignore",
) -> Images:
    """Open image files in their order, or at most `most` images of a data set in an order drawn with `seed`.

    Args:
        files: paths of images; empty: the data set of --data_path and --dataset, by default digits.
        exif: see `util.data.decode.decode`.
        show: number of a data set's images in pictures; files are all shown.

    Raises:
        UserError: a file is no image, or the data set cannot be opened or is a stream.
    """
    if files:
        source = image_files(files)
        return Images(source, range(len(source)), len(source), batch_size, num_workers, exif)
    name = dataset or ("" if data_path else "digits")
    source = open_images(data_path, name, split)
    if isinstance(source, IterableDataset):
        raise UserError(f"--dataset {name}: is a stream, analysis needs a data set whose images can be read by index")
    order = np.random.default_rng(seed).permutation(len(source))[:most].tolist()
    return Images(source, order, min(show, len(order)), batch_size, num_workers, exif)


def image_files(paths: Sequence[str]) -> FileSource:
    """Open image files without labels; raise UserError for the first that cannot be read."""
    source = FileSource(list(paths), None, None)
    for index, path in enumerate(paths):
        if Path(path).is_dir():
            raise UserError(f"--image {path}: is a folder, give it to --data_path")
        try:
            decode(source.read(index), 3)
        except BadImage as error:
            raise UserError(f"--image {path}: cannot be read ({error}), give an image file") from error
    return source


def wrap_name(text: str, width: int = 18) -> str:
    """Break a name into lines of about `width` characters; lines may also break after _ and /."""
    lines = [""]
    for word in re.findall(r"[^\s_/]+[\s_/]*|[\s_/]+", text):
        if lines[-1] and len(lines[-1] + word) > width:
            lines.append("")
        lines[-1] += word
    return "\n".join(line.strip() for line in lines)
