"""Images, masks and folders that the tests make."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from util.weights.checkpoint import LOCK


def encode(image, image_format="PNG", **options):
    """Bytes of a PIL image."""
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def colours(height=30, width=45, seed=0):
    """Return an RGB picture that compresses badly."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([5 * x, 8 * y, 3 * (x + y)], -1) + rng.integers(0, 25, (height, width, 3))
    return Image.fromarray((pixels % 256).astype(np.uint8))


def plain(number):
    """Return a PNG of one colour that tells which image it is."""
    return encode(Image.new("RGB", (6, 5), (number, number, number)))


def write_plain(path: Path, names: list[str]) -> Path:
    """Write a folder, or a .tar by its ending, of files that hold images of one colour each, whatever their names."""
    for number, name in enumerate(names):
        content = plain(number % 256)
        if path.suffix != ".tar":
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
            continue
        with tarfile.open(path, "a") as tar:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_images(folder: Path, number: int, size: tuple[int, int] = (40, 36), seed: int = 0) -> list[Path]:
    """Small PNGs of random blobs, `size` = height, width."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"image-{i:03d}.png" for i in range(number)]
    for path in paths:
        blobs = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(blobs).resize((size[1], size[0]), Image.Resampling.BICUBIC).save(path)
    return paths


MASK_COLOURS = np.array([[200, 60, 40], [60, 180, 70], [50, 80, 220], [20, 20, 20]], dtype=np.uint8)


def write_masked(images: Path, masks: Path, number: int, seed: int = 0, offset: int = 0) -> list[Path]:
    """Pictures of four colours, of different sizes, and masks that say which: `offset` to `offset` + 3, each occurs."""
    rng = np.random.default_rng(seed)
    for folder in (images, masks):
        folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for i in range(number):
        size = tuple(rng.integers(40, 60, 2).tolist())
        tiles = rng.permutation(np.r_[np.arange(4), rng.integers(0, 4, 8)]).astype(np.uint8).reshape(3, 4)
        mask = np.asarray(Image.fromarray(tiles).resize(size, Image.Resampling.NEAREST))
        noise = rng.integers(-20, 20, (*mask.shape, 3))
        pixels = (MASK_COLOURS[mask] + noise).clip(0, 255).astype(np.uint8)
        paths.append(images / f"scene-{i:03d}.png")
        Image.fromarray(pixels).save(paths[-1])
        Image.fromarray(mask + np.uint8(offset)).save(masks / paths[-1].name)
    return paths


def tree(folder):
    """Path -> bytes of all that was written."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != LOCK]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def noise_png(seed, size=(60, 50)):
    """Return a picture that no format makes small."""
    return encode(Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)))
