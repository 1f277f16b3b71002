"""Pictures made small enough to stand in a page: fewer, smaller, compressed."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from util.data.formats import FORMATS

MOST_FRAMES = 24
WIDTH = 640  # pixels
NARROWEST = 160
QUALITY = 80


def webp(picture: np.ndarray | Image.Image, width: int = WIDTH) -> bytes:
    """A picture, uint8 [H, W, 3], as WebP of at most `width` pixels."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image = image.convert("RGB")
    if image.width > width:
        image = image.resize((width, max(1, round(image.height * width / image.width))), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=QUALITY)
    return buffer.getvalue()


def enlarged(picture: np.ndarray, side: int) -> np.ndarray:
    """By the whole factor that brings the longer side nearest below `side`, so that pixels stay sharp."""
    factor = max(1, side // max(picture.shape[:2]))
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)


def film(pictures: Sequence[tuple[int, Path]], budget: int) -> tuple[list[tuple[int, bytes]], list[str]]:
    """Pictures over the epochs of a run in at most `budget` bytes: (epoch, WebP), and names of those that are broken.

    First and last stay; those between are left out evenly, and all are made smaller where that is not enough.
    """
    frames, broken = [], []
    for place in evenly(len(pictures), MOST_FRAMES):
        epoch, path = pictures[place]
        try:
            with Image.open(path, formats=FORMATS) as image:
                frames.append((epoch, image.convert("RGB")))
        except (OSError, SyntaxError, Image.DecompressionBombError):  # a run may be writing it just now
            broken.append(path.name)
    width = WIDTH
    while True:
        encoded = [(epoch, webp(image, width)) for epoch, image in frames]
        if sum(len(data) for _, data in encoded) <= budget or not frames:
            return encoded, broken
        if width > NARROWEST:
            width = max(NARROWEST, int(width * 0.7))
        elif len(frames) > 1:
            frames = [frames[place] for place in evenly(len(frames), max(1, len(frames) // 2))]
        else:
            return [], broken


def evenly(count: int, most: int) -> list[int]:
    """At most `most` of the places 0 to count - 1, first and last among them; of one, the last."""
    if count <= most:
        return list(range(count))
    return [count - 1] if most == 1 else sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})
