"""Samples of a prepared data set: the name of each image in a shard, and its encoded bytes.

`name_images` names the images of a source, `Samples` makes them small; util/data/preparation.py writes them.
"""

from __future__ import annotations

import io
import posixpath
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import to_pil_image

from util.data.decode import decode
from util.data.formats import ORIENTATION, Exif, is_hidden, open_image, orientation_of
from util.data.shards import Sample
from util.data.sources import BadImage, FileSource, ImageSource, TarSource
from util.data.views import cover_size, resize

EXTENSIONS = {"JPEG": "jpg", "PNG": "png"}

# --------------------------------------------------------------------------------------------------------
# Names
# --------------------------------------------------------------------------------------------------------


@dataclass
class Split:
    """The images of train or val, and their names in shards."""

    name: str
    source: ImageSource
    labels: list[int] | None
    classes: list[str] | None  # names of class folders, by label
    keys: list[str]  # path of each image below the split, without its extension


def name_images(split: str, source: ImageSource, webdataset: bool) -> Split:
    """Give each image the key CLASS/STEM; where several would have the same, a number is added."""
    labels, classes = labels_of(source)
    used: dict[str, int] = {}
    for index in range(len(source)):
        stem = stem_of(source, index)
        if webdataset:
            stem = stem.replace(".", "_")  # a key ends at the first dot
        first = key = posixpath.join("" if labels is None else classes[labels[index]], stem)
        while key in used:
            used[first] += 1
            key = f"{first}-{used[first]}"
        used[key] = 1
    return Split(split, source, labels, classes, list(used))


def labels_of(source: ImageSource) -> tuple[list[int], list[str]] | tuple[None, None]:
    """Return the label of each image and the name of each label's folder; None, None where there are no labels."""
    labels, names = source.labels, source.class_names
    reader = getattr(source, "dataset", None)
    if labels is None and hasattr(reader, "iter_targets"):  # timm's for Hugging Face data sets
        labels = [int(label) for label in reader.iter_targets()]
        names = sorted(reader.class_to_idx, key=reader.class_to_idx.get) or None
    if not labels or min(labels) < 0:
        return None, None
    number = max(labels) + 1
    if names is None or len(names) < number:
        return labels, numbered([""] * number)
    # readers may call classes what no folder can be called, or what is passed over as hidden
    folders = [re.sub(r"[/\x00-\x1f]", "_", str(name)) for name in names]
    usable = len(set(folders)) == len(folders) and not any(map(is_hidden, folders))
    return labels, folders if usable else numbered(folders)


def numbered(names: list[str]) -> list[str]:
    """Return the names with their number in front."""
    width = len(str(len(names) - 1))
    return [f"{number:0{width}d} {name}".rstrip() for number, name in enumerate(names)]


def stem_of(source: ImageSource, index: int) -> str:
    """Return the name of the image's file without its extension, or its number."""
    if isinstance(source, FileSource):
        return Path(source.paths[index]).stem
    if isinstance(source, TarSource):
        return PurePosixPath(source.members[index][1]).stem
    return f"{index:08d}"


# --------------------------------------------------------------------------------------------------------
# Bytes
# --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoder:
    """An image of any kind -> encoded, with the shorter side at most `short_side` pixels."""

    short_side: int
    image_format: Literal["jpeg", "png"]
    quality: int
    in_chans: int
    exif: Exif = "ignore"

    def __call__(self, raw: bytes | Image.Image | Tensor) -> tuple[bytes, str]:
        """Return encoded bytes and their extension.

        An orientation that is ignored is passed on with the pixels as they are stored, so that --exif apply does in
        training what it would have done before.

        Raises:
            BadImage: see `util.data.decode.decode`; or too long for a JPEG (65,500 pixels).
        """
        pixels = decode(raw, self.in_chans, self.exif)  # [C, h, w]; images whose bytes are kept are checked so
        size = tuple(pixels.shape[-2:])
        image_format, orientation = "", 1
        if isinstance(raw, bytes):
            with open_image(io.BytesIO(raw)) as header:
                image_format, orientation = header.format, orientation_of(header)
        is_turned = self.exif == "apply" and orientation != 1
        if min(size) > self.short_side:
            pixels = resize(pixels, cover_size(size, (self.short_side,) * 2))
        elif not is_turned and image_format in {"JPEG", self.image_format.upper()}:
            return raw, EXTENSIONS[image_format]
        return self.encode(pixels, 1 if is_turned else orientation)

    def encode(self, pixels: Tensor, orientation: int) -> tuple[bytes, str]:
        """Encode uint8 pixels [C, h, w]; return bytes and extension."""
        name = self.image_format.upper()
        options = dict(quality=self.quality, subsampling="4:2:0") if name == "JPEG" else dict(compress_level=3)
        if orientation != 1:
            options["exif"] = exif = Image.Exif()
            exif[ORIENTATION] = orientation
        buffer = io.BytesIO()
        try:
            to_pil_image(pixels).save(buffer, name, **options)
        except OSError as error:
            raise BadImage(str(error)) from error
        return buffer.getvalue(), EXTENSIONS[name]


@dataclass
class Samples(Dataset):
    """Image number -> the files that a shard gets of it, or why it is bad."""

    split: Split
    encoder: Encoder
    with_label_file: bool

    def __getitem__(self, index: int) -> Sample:
        source, key, labels = self.split.source, self.split.keys[index], self.split.labels
        try:
            raw = source.read(index)
            content, extension = self.encoder(raw)
        except BadImage as error:
            return Sample(source.name(index), 0, (), reason_of(error))
        files = [(f"{key}.{extension}", content)]
        if self.with_label_file:
            files.append((f"{key}.cls", str(0 if labels is None else labels[index]).encode()))
        return Sample(source.name(index), size_of(raw), files)


def size_of(raw: bytes | Image.Image | Tensor) -> int:
    """Return the bytes of an image, encoded or not."""
    if isinstance(raw, Image.Image):
        return raw.width * raw.height * len(raw.getbands())
    return len(raw) if isinstance(raw, bytes) else raw.numel()


@dataclass
class BadImages(Dataset):
    """Image number -> its name and why it is bad, None for a good one."""

    source: ImageSource
    in_chans: int
    exif: Exif = "ignore"

    def __getitem__(self, index: int) -> tuple[str, str] | None:
        try:
            decode(self.source.read(index), self.in_chans, self.exif)
        except BadImage as error:
            return self.source.name(index), reason_of(error)
        return None


def reason_of(error: Exception) -> str:
    """Return the message in one line, never empty."""
    return " ".join(str(error).split()) or type(error).__name__
