"""Encoded images to pixels."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from util.data.formats import ORIENTATION, Exif, check_size, is_deep, open_image, orientation_of
from util.data.sources import BadImage, ImageSource
from util.runtime.errors import UserError
from util.runtime.logs import warn_once

_PILLOW_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_JPEG_MODES = {1: ImageReadMode.GRAY, 3: ImageReadMode.RGB}
_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF
_SIGNED = 2  # a sample format


def decode(raw: bytes | Image.Image | Tensor, in_chans: int, exif: Exif = "ignore") -> Tensor:
    """Return pixels uint8 [in_chans, h, w] of encoded bytes, a PIL image or pixels.

    torchvision decodes JPEG, in 60 % of Pillow's time and without letting zeros at a file's end pass for pixels;
    Pillow whatever else is read (torchvision's decoder of PNG may crash the process on a corrupt file).

    Args:
        exif: "ignore" reads the pixels as they are stored, as MAE does; "apply" turns them as EXIF says.

    Raises:
        BadImage: empty, truncated, no image, or larger than `check_size` allows. A JPEG that was cut and then
            ended properly cannot be told from a complete one: libjpeg fills it up with grey and only warns.
    """
    if isinstance(raw, Tensor):
        return raw if raw.shape[0] == in_chans else pil_pixels(to_pil_image(raw), in_chans)
    try:
        if isinstance(raw, Image.Image):
            return pil_pixels(raw, in_chans, exif)
        if not raw:
            raise BadImage("the file is empty")
        with open_image(io.BytesIO(raw)) as header:
            orientation = orientation_of(header) if exif == "apply" else 1
            header.verify()  # PNG's checksums, at which decoding does not look
        if header.format in ("JPEG", "MPO") and in_chans in _JPEG_MODES:
            return upright(jpeg_pixels(raw, in_chans), orientation)
        with open_image(io.BytesIO(raw)) as image:
            return pil_pixels(image, in_chans, exif)
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # on corrupt bytes decoders raise whatever they stumble over
        raise BadImage(f"{type(error).__name__}: {error}") from error


def jpeg_pixels(raw: bytes, in_chans: int) -> Tensor:
    """Return the pixels of a JPEG in 1 or 3 channels."""
    try:
        return decode_jpeg(torch.frombuffer(bytearray(raw), dtype=torch.uint8), _JPEG_MODES[in_chans])
    except RuntimeError as error:  # "decode_jpeg, FILE:LINE, what is wrong"
        raise BadImage(str(error).splitlines()[0].rpartition(", ")[2]) from error


def pil_pixels(image: Image.Image, in_chans: int, exif: Exif = "ignore") -> Tensor:
    """Return pixels uint8 [in_chans, h, w]; more than 8 bits are scaled, not clipped as by Pillow.

    Raises:
        BadImage: it is too large, or its numbers do not tell what is black and white: floats (which Pillow would cut
            to 0 ... 255, and mostly they lie in 0 ... 1), signed integers, integers of 32 bits.
    """
    check_size(*image.size, deep=is_deep(image))
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(_BITS_PER_SAMPLE, (16,))[0]
    kind = ""
    if _SIGNED in tags.get(_SAMPLE_FORMAT, ()):
        kind = f"signed integers of {bits} bits"
    elif image.mode == "F":
        kind = "floats"
    elif image.mode == "I" and image.format not in ("PNG", "PPM"):  # Pillow reads 16 bits of these two so
        kind = "integers of 32 bits"
    if kind:
        raise BadImage(f"its pixels are {kind}, whose range it does not tell; save it with 8 or 16 bits, unsigned")
    orientation = orientation_of(image) if exif == "apply" or image.format == "TIFF" else 1
    image.load()
    loaded = image
    if image.mode.startswith("I"):
        bits = bits if bits == 12 else 16
        values = np.asarray(image)
        if tags.get(_PHOTOMETRIC) == 0:  # WhiteIsZero, which Pillow knows up to 8 bits
            values = 2**bits - 1 - values
        image = Image.fromarray((values >> (bits - 8)).clip(0, 255).astype(np.uint8))
    if image.mode == "P":
        image = image.convert("RGBA")  # a palette may hold transparency
    return turned(pil_to_tensor(image.convert(_PILLOW_MODES[in_chans])), loaded, orientation, exif)


def turned(pixels: Tensor, image: Image.Image, orientation: int, exif: Exif) -> Tensor:
    """Return pixels [..., h, w] of a decoded image as `exif` asks for.

    Args:
        orientation: what `orientation_of` gave before it was decoded: Pillow turns a TIFF meanwhile, and no other.
    """
    is_upright = image.format == "TIFF" and ORIENTATION not in image.tag_v2
    if exif == "apply":
        return pixels if is_upright else upright(pixels, orientation)
    return upright(pixels, {6: 8, 8: 6}.get(orientation, orientation)) if is_upright else pixels


def upright(pixels: Tensor, orientation: int) -> Tensor:
    """Return pixels [..., h, w] turned and flipped as an EXIF orientation of 1 to 8 says."""
    if orientation == 1:
        return pixels
    if orientation >= 5:
        pixels = pixels.transpose(-2, -1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels.flip(-1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels.flip(-2)
    return pixels.contiguous()


_SAMPLED = 8  # images, spread over the source


def warn_of_unused_bits(source: ImageSource, where: str) -> None:
    """Say once that images of 16 bits use fewer, 12 mostly: they are read as their bytes say, nearly black."""
    largest = 0
    for index in range(0, len(source), -(-len(source) // _SAMPLED)):
        try:
            raw = source.read(index)
            with open_image(io.BytesIO(raw)) as header:
                if not is_deep(header):
                    return
            largest = max(largest, int(decode(raw, 3).max()))
        except BadImage:
            continue
    if 0 < largest < 64:  # a picture that is that dark in all of its 16 bits is rare
        bits = 8 + largest.bit_length()
        warn_once(
            f"{where}: images of 16 bits use {bits} of them, and are read as their bytes say: 0 to {largest} of 255"
        )


MOST_BAD_IN_A_ROW = 100
MAY_BE_SKIPPED, MUST_BE_READ = "mend it or add --on_bad_image skip", "mend it or take it out"  # what to do about one


def load_image(
    source: ImageSource, index: int, in_chans: int, skip_bad: bool, fix: str = MAY_BE_SKIPPED, exif: Exif = "ignore"
) -> tuple[Tensor, int]:
    """Return the pixels of sample `index`, or with `skip_bad` of the next readable one, and the index of what was read.

    Args:
        fix: what the user can do about a bad image.
        exif: see `decode`.

    Raises:
        UserError: it cannot be read, or with `skip_bad` none of the next hundred.
    """
    most = min(MOST_BAD_IN_A_ROW, len(source))
    for attempt in range(most):
        read_index = (index + attempt) % len(source)
        try:
            return decode(source.read(read_index), in_chans, exif), read_index
        except BadImage as error:
            if not skip_bad:
                raise UserError(f"{source.name(read_index)}: cannot be read ({error}); {fix}") from error
    raise UserError(f"--on_bad_image skip: {most} unreadable images in a row from {source.name(index)} on")
