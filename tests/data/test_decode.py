"""Decoding of good and bad files, against Pillow."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from shared.images import colours, encode
from util.data.decode import decode
from util.data.sources import BadImage

quick = settings(max_examples=60, deadline=None)
PILLOW_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


# ---- decoding ----------------------------------------------------------------------------------------------


def chunk(kind, content):
    """Return a chunk of a PNG."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, depth, colour_type, rows):
    """Return a PNG that Pillow does not write: 16-bit colours, or more pixels than it has."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def wide_colours(image, alpha=False):
    """Return a 16-bit PNG whose higher bytes are `image`."""
    pixels = np.asarray(image).astype(np.uint16) * 256 + 17
    if alpha:
        pixels = np.concatenate([pixels, np.full((*pixels.shape[:2], 1), 40000, np.uint16)], -1)
    rows = [row.astype(">u2").tobytes() for row in pixels]
    return png(image.width, image.height, 16, 6 if alpha else 2, rows)


def formats():
    """Encoded pictures that Pillow converts as we want them."""
    rgb = colours()
    rgba = rgb.copy()
    rgba.putalpha(Image.linear_gradient("L").resize(rgb.size))
    palette = rgb.quantize(32)
    frames = [colours(seed=seed) for seed in range(3)]
    return {
        "JPEG": encode(rgb, "JPEG", quality=90),
        "progressive JPEG": encode(rgb, "JPEG", progressive=True),
        "grey JPEG": encode(rgb.convert("L"), "JPEG"),
        "CMYK JPEG": encode(rgb.convert("CMYK"), "JPEG", quality=95),
        "MPO": encode(frames[0], "MPO", save_all=True, append_images=frames[1:]),
        "PNG": encode(rgb),
        "grey PNG": encode(rgb.convert("L")),
        "RGBA PNG": encode(rgba),
        "grey PNG with alpha": encode(rgba.convert("LA")),
        "palette PNG": encode(palette),
        "palette PNG with a transparent colour": encode(palette, transparency=3),
        "palette PNG with alpha": encode(palette, transparency=bytes(range(0, 256, 8))),
        "1-bit PNG": encode(rgb.convert("1")),
        "16-bit RGB PNG": wide_colours(rgb),
        "16-bit RGBA PNG": wide_colours(rgb, alpha=True),
        "1-pixel PNG": encode(Image.new("RGB", (1, 1), (1, 2, 3))),
        "1-pixel JPEG": encode(Image.new("RGB", (1, 1), (100, 100, 100)), "JPEG"),
        "1 x 40": encode(rgb.resize((1, 40))),
        "BMP": encode(rgb, "BMP"),
        "TIFF": encode(rgb, "TIFF"),
        "LZW TIFF": encode(rgb, "TIFF", compression="tiff_lzw"),
        "CMYK TIFF": encode(rgb.convert("CMYK"), "TIFF"),
        "WebP": encode(rgb, "WEBP"),
        "RGBA WebP": encode(rgba, "WEBP", lossless=True),
        "GIF": encode(palette, "GIF"),
        "GIF of three frames": encode(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "WebP of three frames": encode(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True),
        "PNG of three frames": encode(frames[0], save_all=True, append_images=frames[1:]),
        "PPM": encode(rgb, "PPM"),
    }


FORMATS = formats()


def by_pillow(raw, in_chans):
    """[in_chans, h, w] of the first frame."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of palettes with transparency
        image = Image.open(io.BytesIO(raw)).convert(PILLOW_MODES[in_chans])
    return np.asarray(image).reshape(image.height, image.width, in_chans).transpose(2, 0, 1)


@pytest.mark.parametrize("in_chans", [1, 3, 4])
@pytest.mark.parametrize("name", FORMATS)
def test_decode_equals_pillow(name, in_chans):
    raw = FORMATS[name]
    decoded, expected = decode(raw, in_chans), by_pillow(raw, in_chans)
    assert decoded.dtype == torch.uint8
    assert decoded.shape == expected.shape
    tolerance = 3 if "JPEG" in name or name == "MPO" else 0  # two libraries, each with its own rounding
    assert np.abs(decoded.numpy().astype(int) - expected).max() <= tolerance


@pytest.mark.parametrize("in_chans", [1, 3, 4])
@pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
def test_grey_of_16_bits_is_scaled(image_format, in_chans):
    values = (np.arange(30 * 40, dtype=np.uint16) * 54).reshape(30, 40)
    decoded = decode(encode(Image.fromarray(values), image_format), in_chans)
    assert decoded.shape == (in_chans, 30, 40)
    for channel in decoded[: min(in_chans, 3)]:
        np.testing.assert_array_equal(channel, values // 256)
    if in_chans == 4:
        assert (decoded[3] == 255).all()


def test_transparency_is_left_out_or_kept():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    raw = encode(image, transparency=1)
    assert decode(raw, 3)[:, 0].T.tolist() == [[10, 20, 30], [40, 50, 60]]
    assert decode(raw, 4)[:, 0].T.tolist() == [[10, 20, 30, 255], [40, 50, 60, 0]]


@pytest.mark.parametrize("image_format", ["JPEG", "PNG"])
def test_exif_orientation_is_not_applied_as_in_mae(image_format):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter
    raw = encode(colours(30, 45), image_format, exif=exif)
    decoded = decode(raw, 3)
    assert decoded.shape == (3, 30, 45)
    assert torch.equal(decoded, decode(encode(colours(30, 45), image_format), 3))


@pytest.mark.parametrize("in_chans", [1, 3, 4])
def test_decode_of_pixels_and_of_pil_images(in_chans):
    image = colours()
    expected = by_pillow(encode(image), in_chans)
    np.testing.assert_array_equal(decode(image, in_chans), expected)
    pixels = torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())
    np.testing.assert_array_equal(decode(pixels, in_chans), expected)
    grey = decode(pixels[:1], in_chans)
    np.testing.assert_array_equal(grey, by_pillow(encode(Image.fromarray(pixels[0].numpy())), in_chans))


def decode_or_reason(raw, in_chans=3):
    """Return the pixels, or the reason why there are none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of what it can mend
            return decode(raw, in_chans)
    except BadImage as error:
        return str(error)


def is_bad(raw, intact):
    """True if `raw` is refused; if it is not, it has to give the pixels of `intact`."""
    decoded = decode_or_reason(raw)
    assert decoded if isinstance(decoded, str) else torch.equal(decoded, intact)
    return isinstance(decoded, str)


CUT = ("JPEG", "progressive JPEG", "CMYK JPEG", "PNG", "palette PNG", "GIF", "BMP", "TIFF", "LZW TIFF", "WebP", "PPM")


@pytest.mark.parametrize("name", CUT)
def test_truncated_files_are_bad_wherever_they_were_cut(name):
    raw = FORMATS[name]
    intact = decode(raw, 3)
    lengths = [0, 1, 2, *np.linspace(3, len(raw) - 1, 50).astype(int).tolist()]
    bad = sum(is_bad(raw[:length], intact) for length in lengths)
    assert bad >= len(lengths) - 2  # the last bytes of a PNG hold no pixels
    assert all(isinstance(decode_or_reason(raw[: 3 * len(raw) // 4], in_chans), str) for in_chans in (1, 4))


@pytest.mark.parametrize("name", ["JPEG", "progressive JPEG", "PNG"])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_files_with_zeros_at_their_end_are_bad(name, in_chans):
    raw = FORMATS[name]
    for share in (0.5, 0.75, 0.9):
        length = int(len(raw) * share)
        with pytest.raises(BadImage):
            decode(raw[:length] + bytes(len(raw) - length), in_chans)


def test_integers_of_32_bits_are_refused_and_not_shifted_to_black():
    image = Image.fromarray(np.arange(12, dtype=np.int32).reshape(3, 4))
    with pytest.raises(BadImage, match="its pixels are signed integers of 32 bits"):
        decode(encode(image, "TIFF"), 3)


@pytest.mark.parametrize("in_chans", [1, 3, 4])
def test_floats_are_refused_and_not_cut_to_black(in_chans):
    image = Image.fromarray(np.random.default_rng(0).random((30, 40), dtype=np.float32))
    with pytest.raises(BadImage, match="its pixels are floats"):
        decode(encode(image, "TIFF"), in_chans)


@pytest.mark.parametrize("name", ["PNG", "palette PNG", "16-bit RGB PNG"])
def test_corrupt_png_is_bad(name):
    raw, rng = FORMATS[name], np.random.default_rng(0)
    intact = decode(raw, 3)
    for _ in range(100):
        corrupt = bytearray(raw)
        for place in rng.integers(len(raw), size=rng.integers(1, 4)):
            corrupt[place] ^= 1 << rng.integers(8)
        is_bad(bytes(corrupt), intact)


@quick
@given(
    st.sampled_from([name for name in FORMATS if "three" not in name]),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=6),
)
def test_corrupt_files_give_an_image_or_are_bad(name, changes):
    corrupt = bytearray(FORMATS[name])
    for place, value in changes:
        corrupt[place % min(len(corrupt), 600)] = value
    decoded = decode_or_reason(bytes(corrupt))
    assert decoded if isinstance(decoded, str) else (decoded.dtype == torch.uint8 and decoded.shape[0] == 3)


@quick
@given(
    st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"RIFF", b"II*\0", b"P6 "]),
    st.binary(),
)
@example(b"these are words, not pixels\n", b"")
@example(b"<svg></svg>", b"")
def test_what_is_no_image_is_bad(begin, rest):
    assert isinstance(decode_or_reason(begin + rest), str)


def test_reasons_are_useful():
    jpeg, reason = FORMATS["JPEG"], decode_or_reason
    assert reason(b"") == "the file is empty"
    assert reason(b"text") == "no image, or of an unknown format"
    assert reason(jpeg[: 3 * len(jpeg) // 4]) == "Image is incomplete or truncated"
    assert "Truncated" in reason(FORMATS["PNG"][:2000])
    assert "exceeds limit" in reason(png(50_000, 50_000, 8, 2, []))
    assert reason(png(1, 1001, 8, 2, [])) == "1 x 1001 pixels, a side may be at most 1000 times the other"
    assert decode(encode(Image.new("RGB", (1000, 1))), 3).shape == (3, 1, 1000)


def test_bombs_are_bad_also_where_pillow_was_told_to_let_them_pass(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(BadImage, match="50000 x 50000 pixels, at most 178956970 are decoded"):
        decode(png(50_000, 50_000, 8, 2, []), 3)
