"""Films of a report: the pictures that a run saved over its epochs, made small enough to lie in the page."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from util.report.page import PICTURE_FORMATS, Embedded, embed
from util.results.run_folder import RunFolder
from util.runtime.reading import Unreadable, read_bytes

MOST_BYTES = 2_200_000  # of all films together, before base64
MOST_FILE_BYTES = 2**26  # of one picture
MOST_PIXELS = 2**25  # of one picture; a small file can announce gigabytes
MOST_FRAMES = 24
WIDTH = 640  # pixels
NARROWEST = 160
QUALITY = 80


@dataclass(frozen=True)
class Film:
    """The pictures of one kind that a run has saved."""

    label: str
    name: str
    frames: list[tuple[int, Embedded]]  # by epoch
    remark: str  # what was left out
    norm_pix_loss: bool


def films_of(runs: Sequence[RunFolder]) -> list[Film]:
    """Return a film for each kind of pictures of each run."""
    kinds = [(run, name, pictures) for run in runs for name, pictures in run.pictures.items()]
    films = []
    for run, name, pictures in kinds:
        frames, unreadable = encode_frames(pictures, MOST_BYTES // len(kinds))
        remarks = [f"{len(frames)} of {len(pictures)} pictures are shown."] if len(frames) < len(pictures) else []
        remarks += [f"Cannot be read: {', '.join(unreadable)}."] if unreadable else []
        embedded = [(epoch, embed(data)) for epoch, data in frames]
        films.append(Film(run.label, name, embedded, " ".join(remarks), bool(run.config.get("norm_pix_loss"))))
    return films


def encode_frames(pictures: Sequence[tuple[int, Path]], budget: int) -> tuple[list[tuple[int, bytes]], list[str]]:
    """Return (epoch, WebP) of pictures over the epochs in at most `budget` bytes, and the names of unreadable ones.

    First and last stay; those between are left out evenly, and all are made smaller if that is not enough.
    """
    frames, unreadable = [], []
    for index in evenly(len(pictures), MOST_FRAMES):
        epoch, path = pictures[index]
        try:
            frames.append((epoch, open_picture(path)))
        except (Unreadable, OSError, SyntaxError, ValueError):  # Pillow's; the run may be writing it
            unreadable.append(path.name)
    width = WIDTH
    while True:
        encoded = [(epoch, webp(image, width)) for epoch, image in frames]
        if sum(len(data) for _, data in encoded) <= budget or not frames:
            return encoded, unreadable
        if width > NARROWEST:
            width = max(NARROWEST, int(width * 0.7))
        elif len(frames) > 1:
            frames = [frames[index] for index in evenly(len(frames), max(1, len(frames) // 2))]
        else:
            return [], unreadable


def open_picture(path: Path) -> Image.Image:
    """Return a picture in RGB.

    Raises:
        Unreadable: it is no regular file, or is too large.
        OSError, SyntaxError, ValueError: Pillow cannot read it in one of PICTURE_FORMATS.
    """
    with Image.open(io.BytesIO(read_bytes(path, MOST_FILE_BYTES)), formats=PICTURE_FORMATS) as image:
        if image.width * image.height > MOST_PIXELS:
            raise Unreadable(f"has {image.width} x {image.height} pixels")
        return image.convert("RGB")


def webp(picture: np.ndarray | Image.Image, width: int = WIDTH) -> bytes:
    """Return a picture, uint8 [H, W, 3] or Pillow's, as WebP of at most `width` pixels."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image = image.convert("RGB")
    if image.width > width:
        image = image.resize((width, max(1, round(image.height * width / image.width))), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=QUALITY)
    return buffer.getvalue()


def evenly(count: int, most: int) -> list[int]:
    """Return at most `most` of the indices 0 to count - 1, first and last among them; if it is one, the last."""
    if count <= most:
        return list(range(count))
    return [count - 1] if most == 1 else sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})
