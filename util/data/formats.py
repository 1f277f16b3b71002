"""Which files are images: formats, endings, hidden names and sizes. Pillow opens image files here and nowhere else."""

from __future__ import annotations

import re
import warnings
from typing import BinaryIO, Literal

from PIL import EpsImagePlugin, Image, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError, features

from util.data.sources import BadImage
from util.runtime.files import IS_LFS_POINTER, LFS_POINTER

Exif = Literal["ignore", "apply"]  # what --exif says about the EXIF orientation of an image

_ENDINGS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "AVIF": (".avif", ".avifs"),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
}
_OPTIONAL = {"WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000"}  # formats that not every build of Pillow reads

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # older Pillows do not know the feature "avif"
    FORMATS = tuple(name for name in _ENDINGS if name not in _OPTIONAL or features.check(_OPTIONAL[name]))
IMAGE_ENDINGS = frozenset(ending for name in FORMATS for ending in _ENDINGS[name])
ENDINGS_SHOWN = ".jpg .png .webp .tif ..."  # for messages

MAX_PIXELS = 178_956_970  # Pillow's bound against decompression bombs; of more than 8 bits half as many
MAX_ELONGATION = 1000  # longer side over shorter one: resized to cover a view, 1 x 65535 would take 10 GB
ORIENTATION = 0x0112  # tag in EXIF and TIFF; 1 is upright

Image.init()  # plugins are files: none is left to be imported once the run is out of descriptors
EpsImagePlugin.gs_binary = False  # an EPS file is a program; no library in this process starts Ghostscript for one
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**26  # a valid file may hold more than 1 MB of text
# layouts of TIFF that Pillow lacks: big-endian WhiteIsZero of 16 bits, and 12 bits but for little-endian BlackIsZero
for _order, _white_is_zero, _bits, _modes in (
    (TiffImagePlugin.MM, 0, 16, ("I;16B", "I;16B")),
    (TiffImagePlugin.II, 0, 12, ("I;16", "I;12")),
    (TiffImagePlugin.MM, 0, 12, ("I;16", "I;12")),
    (TiffImagePlugin.MM, 1, 12, ("I;16", "I;12")),
):
    TiffImagePlugin.OPEN_INFO.setdefault((_order, _white_is_zero, (1,), 1, (_bits,), ()), _modes)


# --------------------------------------------------------------------------------------------------------
# Names
# --------------------------------------------------------------------------------------------------------

_SYSTEM_NAMES = frozenset(
    (
        *("__macosx", "__pycache__", "lost+found", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"),
        *("$recycle.bin", "system volume information", "#recycle", "#snapshot", "@eadir", "@recycle", "@tmp"),
        *("@recently-snapshot", "@__thumb"),
    )
)


def is_hidden(name: str) -> bool:
    """Return True for names of files and folders that operating systems and programs leave behind: no data."""
    return name.startswith((".", "PaxHeaders.")) or name.lower() in _SYSTEM_NAMES


def ending_of(name: str) -> str:
    """Return the ending of a file name in lower case with its dot, or nothing."""
    stem, dot, ending = name.rpartition(".")
    return f".{ending.lower()}" if dot and stem else ""


def is_image(name: str) -> bool:
    """Return True for the name of an image file, by its ending."""
    return ending_of(name) in IMAGE_ENDINGS and not is_hidden(name)


# --------------------------------------------------------------------------------------------------------
# Headers
# --------------------------------------------------------------------------------------------------------


def open_image(file: BinaryIO) -> Image.Image:
    """Read the header of an image; its pixels are not decoded yet.

    Raises:
        BadImage: it is none of FORMATS, damaged, or larger than `check_size` allows.
    """
    try:
        image = Image.open(file, formats=FORMATS)
        check_size(*image.size, deep=is_deep(image))
    except UnidentifiedImageError as error:
        file.seek(0)
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise BadImage(IS_LFS_POINTER) from error
        raise BadImage("no image, or of an unknown format") from error
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # on corrupt bytes decoders raise whatever they stumble over
        raise BadImage(f"{type(error).__name__}: {error}") from error
    return image


def check_size(width: int, height: int, deep: bool = False) -> None:
    """Raise BadImage if the header announces more than a decoder, or `resize`, should be asked for.

    Args:
        deep: samples have more than 8 bits.
    """
    most = MAX_PIXELS // 2 if deep else MAX_PIXELS
    if not 0 < width * height <= most:
        bits = " of more than 8 bits" * deep
        raise BadImage(f"{width} x {height} pixels{bits}, at most {most} are decoded")
    if max(width, height) > MAX_ELONGATION * min(width, height):
        raise BadImage(f"{width} x {height} pixels, a side may be at most {MAX_ELONGATION} times the other")


def is_deep(header: Image.Image) -> bool:
    """Return True if samples have more than 8 bits; Pillow's modes tell it of grey images only."""
    return header.mode[0] in "IF" or any(re.search(";1[26]", str(tile[3])) for tile in getattr(header, "tile", ()))


def orientation_of(header: Image.Image) -> int:
    """Return the EXIF orientation, 1 (upright) to 8; 1 where there is none or it makes no sense."""
    try:
        if header.format == "PNG":
            exif = header.info.get("exif") or png_exif(header)
            if exif:
                header.info["exif"] = exif
        orientation = Image.Image.getexif(header).get(ORIENTATION, 1)  # PNG's own method would decode the pixels
    except Exception:  # EXIF of other programs is often damaged, and the pixels are not
        return 1
    return orientation if orientation in range(1, 9) else 1


def png_exif(header: Image.Image) -> bytes:
    """Return the EXIF of a PNG that lies behind its pixels, or nothing."""
    begin, exif = header.fp.tell(), b""
    header.fp.seek(8)
    while len(chunk := header.fp.read(8)) == 8 and chunk[4:] != b"IEND":
        length = int.from_bytes(chunk[:4], "big")
        if chunk[4:] == b"eXIf":
            exif = b"Exif\0\0" + header.fp.read(length)
            break
        header.fp.seek(length + 4, 1)
    header.fp.seek(begin)
    return exif


def size_of(header: Image.Image, exif: Exif) -> tuple[int, int]:
    """Return width and height of the pixels that `decode` gives, before any is decoded."""
    width, height = header.size
    orientation = orientation_of(header)
    if header.format == "TIFF":  # newer Pillows announce the size of the upright picture
        width, height = (header.tag_v2[tag] for tag in (256, 257))
    return (height, width) if exif == "apply" and orientation >= 5 else (width, height)
