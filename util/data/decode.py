"""Encoded images to pixels."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from util.data.sources import BadImage, ImageSource
from util.runtime.errors import UserError

MAX_PIXELS = 178_956_970  # Pillow's bound against decompression bombs
MAX_ELONGATION = 1000  # longer side over shorter one: resized to cover a view, 1 x 65535 would take 10 GB
_PILLOW_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_JPEG_MODES = {1: ImageReadMode.GRAY, 3: ImageReadMode.RGB}


def decode(raw: bytes | Image.Image | Tensor, in_chans: int) -> Tensor:
    """Pixels uint8 [in_chans, h, w] of encoded bytes, a PIL image or pixels; EXIF orientation is left alone, as MAE.

    torchvision decodes JPEG, in 60 % of Pillow's time and without letting zeros at a file's end pass for pixels;
    Pillow whatever else it knows (torchvision's decoder of PNG may crash the process on a corrupt file).

    Raises:
        BadImage: empty, truncated, no image, or larger than `check_size` allows. A JPEG that was cut and then
            ended properly cannot be told from a whole one: libjpeg fills it up with grey and only warns.
    """
    if isinstance(raw, Tensor):
        return raw if raw.shape[0] == in_chans else pil_pixels(to_pil_image(raw), in_chans)
    try:
        if isinstance(raw, Image.Image):
            return pil_pixels(raw, in_chans)
        if not raw:
            raise BadImage("the file is empty")
        with Image.open(io.BytesIO(raw)) as header:
            check_size(*header.size)
            header.verify()  # PNG's checksums, at which decoding does not look
        if header.format in ("JPEG", "MPO") and in_chans in _JPEG_MODES:
            try:
                return decode_jpeg(torch.frombuffer(bytearray(raw), dtype=torch.uint8), _JPEG_MODES[in_chans])
            except RuntimeError as error:  # "decode_jpeg, FILE:LINE, what is wrong"
                raise BadImage(str(error).splitlines()[0].rpartition(", ")[2]) from error
        with Image.open(io.BytesIO(raw)) as image:
            return pil_pixels(image, in_chans)
    except (BadImage, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise BadImage("no image, or of an unknown format") from error
    except Exception as error:  # on corrupt bytes decoders raise whatever they stumble over
        raise BadImage(f"{type(error).__name__}: {error}") from error


def check_size(width: int, height: int) -> None:
    """BadImage if the header announces more than a decoder, or `resize`, should be asked for."""
    if not 0 < width * height <= MAX_PIXELS:
        raise BadImage(f"{width} x {height} pixels, at most {MAX_PIXELS} are decoded")
    if max(width, height) > MAX_ELONGATION * min(width, height):
        raise BadImage(f"{width} x {height} pixels, a side may be at most {MAX_ELONGATION} times the other")


def pil_pixels(image: Image.Image, in_chans: int) -> Tensor:
    """Pixels uint8 [in_chans, h, w]; 16-bit greys are scaled, not clipped as Pillow's `convert` does.

    Raises:
        BadImage: it is too large, or of floats, which Pillow would cut to 0 ... 255: mostly they lie in 0 ... 1; or of
            integers of 32 bits.
    """
    check_size(*image.size)
    long = image.mode == "I" and image.format != "PNG"  # older Pillows read 16-bit PNGs so
    if image.mode == "F" or long:
        kind = "integers of 32 bits" if long else "floats"
        raise BadImage(f"its pixels are {kind}, whose range it does not tell; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image, dtype=np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode == "P":
        image = image.convert("RGBA")  # a palette may hold transparency
    return pil_to_tensor(image.convert(_PILLOW_MODES[in_chans]))


MOST_BAD_IN_A_ROW = 100
MAY_BE_SKIPPED, MUST_BE_READ = "mend it or add --on_bad_image skip", "mend it or take it out"  # what to do about one


def load_image(
    source: ImageSource, index: int, in_chans: int, skip_bad: bool, fix: str = MAY_BE_SKIPPED
) -> tuple[Tensor, int]:
    """Pixels of sample `index`, or with `skip_bad` of the next readable one, and the index of what was read.

    Args:
        fix: what the user can do about a bad image.

    Raises:
        UserError: it cannot be read, or with `skip_bad` none of the next hundred.
    """
    most = min(MOST_BAD_IN_A_ROW, len(source))
    for attempt in range(most):
        place = (index + attempt) % len(source)
        try:
            return decode(source.read(place), in_chans), place
        except (BadImage, OSError) as error:
            if not skip_bad:
                name = source.name(place)
                raise UserError(f"{name}: cannot be read ({error}); {fix}") from error
    raise UserError(f"--on_bad_image skip: {most} unreadable images in a row from {source.name(index)} on")
