"""Pixels that decoders get wrong unasked: depths and signs of TIFF, 12 of 16 bits, long texts, orientation, EPS."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from test_decode import chunk, png

from shared.calls import one_line
from shared.images import colours, encode, write_masked
from shared.segment import config_of
from util.data.datasets import open_images
from util.data.decode import decode, upright
from util.data.masked_samples import WholeImages, load_pair
from util.data.sources import BadImage
from util.runtime.errors import UserError
from util.runtime.logs import warn_once
from util.train.segmentation import open_masked

VALUES = (np.arange(40 * 30).reshape(30, 40) * 54).astype(np.uint16)  # 0 to 64,746


@pytest.fixture(autouse=True)
def _each_test_is_warned_anew():
    warn_once.cache_clear()


def tiff(rows, bits, order="<", white_is_zero=False, sample_format=1):
    """Return a TIFF of one strip, one channel; `rows` are its encoded bytes, 40 x 30 pixels."""
    tags = [(256, 40), (257, 30), (258, bits), (259, 1), (262, 0 if white_is_zero else 1), (273, 0), (277, 1)]
    tags += [(278, 30), (279, len(rows)), (339, sample_format)]
    begin = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(
        struct.pack(f"{order}HHI", tag, 4, 1) + struct.pack(f"{order}I", begin if tag == 273 else value)
        for tag, value in tags
    )
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8)
    return head + struct.pack(f"{order}H", len(tags)) + entries + bytes(4) + rows


def packed(values, bits):
    """Values packed from the highest bit on, rows padded to bytes."""
    shifts = np.arange(bits - 1, -1, -1)
    return np.packbits((values[..., None] >> shifts & 1).reshape(30, -1).astype(np.uint8), axis=1).tobytes()


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 12, 16])
@pytest.mark.parametrize("white_is_zero", [False, True])
def test_grey_tiff_of_all_depths_and_byte_orders(bits, order, white_is_zero):
    numbers = (VALUES >> (16 - bits)).astype(np.uint16)
    stored = 2**bits - 1 - numbers if white_is_zero else numbers
    rows = stored.astype(f"{order}u2").tobytes() if bits == 16 else packed(stored, bits)
    decoded = decode(tiff(rows, bits, order, white_is_zero), 1)[0].numpy()
    expected = numbers >> (bits - 8) if bits >= 8 else numbers * (255 // (2**bits - 1))
    np.testing.assert_array_equal(decoded, expected)


@pytest.mark.parametrize(("bits", "kind"), [(8, "i1"), (16, "i2"), (32, "i4")])
@pytest.mark.parametrize("order", "<>")
def test_signed_integers_are_refused_by_their_name(bits, kind, order):
    rows = (VALUES.astype(np.int64) % 100 - 50).astype(f"{order}{kind}").tobytes()
    with pytest.raises(BadImage, match=f"its pixels are signed integers of {bits} bits, whose range it does not tell"):
        decode(tiff(rows, bits, order, sample_format=2), 3)


def test_pgm_of_16_bits_is_scaled():
    raw = b"P5 40 30 65535\n" + VALUES.astype(">u2").tobytes()
    np.testing.assert_array_equal(decode(raw, 1)[0], VALUES >> 8)
    raw = b"P5 40 30 4095\n" + (VALUES >> 4).astype(">u2").tobytes()  # of 12 bits, as its header says
    assert np.abs(decode(raw, 1)[0].numpy().astype(int) - (VALUES >> 8)).max() <= 1


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "colour"])
def test_12_bits_in_16_are_read_as_the_bytes_say_and_told(tmp_path, capsys, kind):
    def write(name, values):
        if kind == "colour":
            rows = [np.repeat(row, 3).astype(">u2").tobytes() for row in values]
            (tmp_path / f"{name}.png").write_bytes(png(40, 30, 16, 2, rows))
        else:
            (tmp_path / f"{name}.{kind.lower()}").write_bytes(encode(Image.fromarray(values), kind))

    write("a", VALUES >> 4)
    write("b", VALUES >> 5)
    for _ in range(2):
        source = open_images(str(tmp_path), "", "train")
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path}: images of 16 bits use 12 of them, and are read as their bytes say: 0 to 15 of 255" in line
    np.testing.assert_array_equal(decode(source.read(0), 1)[0], VALUES >> 12)
    write("c", VALUES)
    warn_once.cache_clear()
    open_images(str(tmp_path), "", "train")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", [b"zTXt", b"tEXt", b"iTXt", b"iCCP"])
def test_png_with_long_texts_or_profiles_is_read(kind):
    text = bytes(range(65, 91)) * (2**21 // 26)
    content = {
        b"zTXt": b"key\0\0" + zlib.compress(text),
        b"tEXt": b"key\0" + text,
        b"iTXt": b"key\0\1\0\0\0" + zlib.compress(text),
        b"iCCP": b"key\0\0" + zlib.compress(text),
    }[kind]
    raw = encode(colours())
    decoded = decode(raw[:33] + chunk(kind, content) + raw[33:], 3)  # after IHDR
    assert torch.equal(decoded, decode(raw, 3))


def test_deep_images_count_twice_against_the_most_pixels():
    for depth, colour_type in ((16, 0), (16, 2)):
        with pytest.raises(BadImage, match="13000 x 13000 pixels of more than 8 bits, at most 89478485 are decoded"):
            decode(png(13_000, 13_000, depth, colour_type, []), 3)


# ---- programs under the name of an image --------------------------------------------------------------------

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n0 0 8 8 rectfill\nshowpage\n%%EOF\n"


@pytest.fixture
def ghostscript(tmp_path, monkeypatch):
    """Put a program called gs on the PATH that leaves a file."""
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return tmp_path / "started"


@pytest.mark.parametrize("dataset", ["", "torch/image_folder"])
def test_eps_under_the_name_of_an_image_starts_nothing(tmp_path, ghostscript, dataset):
    for split in ("train", "validation"):
        (tmp_path / "x" / split / "cat").mkdir(parents=True)
        (tmp_path / "x" / split / "cat" / "1.jpg").write_bytes(EPS)
    source = open_images(str(tmp_path / "x"), dataset, "train")
    with pytest.raises(BadImage, match="no image, or of an unknown format"):
        decode(source.read(0), 3)
    with pytest.raises(OSError, match="Ghostscript"):  # whatever other library of this process opens it
        Image.open(io.BytesIO(EPS)).load()
    assert not ghostscript.exists()


# ---- orientation --------------------------------------------------------------------------------------------


def oriented(image_format, orientation, picture):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = dict(quality=100, subsampling=0) if image_format == "JPEG" else {}
    if image_format == "WEBP":
        options["lossless"] = True
    return encode(picture, image_format, exif=exif, **options)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_is_ignored_or_applied(image_format, orientation):
    from PIL import ImageOps

    picture = colours(30, 45)
    raw = oriented(image_format, orientation, picture)
    stored = decode(encode(picture, image_format, **(dict(quality=100, subsampling=0) if image_format == "JPEG" else
                    dict(lossless=True) if image_format == "WEBP" else {})), 3)  # fmt: skip
    assert torch.equal(decode(raw, 3), stored)
    picture.getexif()[0x0112] = orientation
    expected = torch.from_numpy(np.asarray(ImageOps.exif_transpose(picture)).copy()).permute(2, 0, 1)
    decoded = decode(raw, 3, "apply")
    assert decoded.shape == expected.shape
    assert (decoded.int() - expected.int()).abs().max() <= (6 if image_format == "JPEG" else 0)
    assert torch.equal(decoded, upright(stored, orientation))


def test_exif_of_a_png_may_lie_behind_its_pixels():
    exif = Image.Exif()
    exif[0x0112] = 6
    raw = encode(colours())
    late = raw[:-12] + chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")) + raw[-12:]
    assert torch.equal(decode(late, 3), decode(raw, 3))
    assert torch.equal(decode(late, 3, "apply"), upright(decode(raw, 3), 6))


def test_damaged_exif_is_no_orientation():
    raw = encode(colours(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert torch.equal(decode(raw, 3, "apply"), decode(raw, 3))


def turn_images(folder, orientation):
    for path in folder.iterdir():
        exif = Image.Exif()
        exif[0x0112] = orientation
        with Image.open(path) as image:
            image.load()
        image.save(path, exif=exif)


@pytest.mark.parametrize("orientation", [3, 6])
def test_masks_of_upright_images_fit_with_apply(scenes, orientation):
    """Masks drawn on the upright picture, as every viewer shows it."""
    before = [load_pair(open_masked(config_of("--data_path", scenes)).val, i, 3, False)[:2] for i in range(5)]
    for path in (scenes / "images" / "val").iterdir():
        with Image.open(path) as image:
            image.load()
        turned = image.transpose(Image.Transpose.ROTATE_180 if orientation == 3 else Image.Transpose.ROTATE_90)
        turned.save(path)
    turn_images(scenes / "images" / "val", orientation)
    applied = open_masked(config_of("--data_path", scenes, "--exif", "apply")).val
    for index, (image, mask) in enumerate(before):
        for actual, expected in zip(load_pair(applied, index, 3, False, exif="apply"), (image, mask), strict=False):
            assert torch.equal(actual, expected)
    pixels, _ = WholeImages(applied, [0], (24, 32), 3, "apply")[0]
    assert torch.equal(pixels, WholeImages(applied, [0], (24, 32), 3, "apply")[0][0])
    if orientation == 6:
        with pytest.raises(UserError, match="make the mask again in the image's size"):
            load_pair(applied, 0, 3, False)


@pytest.mark.parametrize(("exif", "message"), [("ignore", "read as stored"), ("apply", "turned upright")])
def test_a_segmentation_counts_oriented_images_before_it_begins(scenes, capsys, exif, message):
    from util.runtime.distributed import start_processes
    from util.train.segmentation import open_checked

    turn_images(scenes / "images" / "train", 3)
    config = config_of("--data_path", scenes, "--exif", exif, "--num_workers", 0)
    open_checked(config, start_processes("cpu", "auto"))
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert "training: 10 of 10 images have an EXIF orientation: they " in line
    assert message in line


def test_a_tiff_mask_is_read_as_it_is_stored(tmp_path):
    """Pillow turns a TIFF while it decodes it; image and mask have to be treated alike."""
    paths = write_masked(tmp_path / "images" / "val", tmp_path / "masks" / "val", 1)
    mask_path = tmp_path / "masks" / "val" / paths[0].name
    numbers = np.asarray(Image.open(mask_path)).copy()
    mask_path.unlink()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(numbers).save(mask_path.with_suffix(".tif"), exif=exif)
    (tmp_path / "classes.txt").write_text("a\nb\nc\nd\n")
    val = open_masked(config_of("--data_path", tmp_path, "--eval", "--resume", "x")).val
    assert np.array_equal(load_pair(val, 0, 3, False)[1], numbers)


# ---- masks --------------------------------------------------------------------------------------------------


def test_hidden_masks_and_folders_are_left_out_and_two_of_one_name_refused(scenes):
    masks = scenes / "masks" / "val"
    (masks / "._scene-000.png").write_bytes(b"finder")
    (masks / ".ipynb_checkpoints").mkdir()
    (masks / ".ipynb_checkpoints" / "scene-000.png").write_bytes(b"x")
    (scenes / "images" / "val" / "._scene-000.png").write_bytes(b"finder")
    assert len(open_masked(config_of("--data_path", scenes)).val) == 5
    Image.open(masks / "scene-000.png").save(masks / "scene-000.tif")
    with pytest.raises(UserError) as error:
        open_masked(config_of("--data_path", scenes))
    assert "holds scene-000.png and scene-000.tif, remove one of the two" in one_line(error)


@pytest.mark.parametrize(("train", "val"), [("Training", "Testing"), ("TRAIN", "validation_set")])
def test_splits_of_masks_in_any_case(scenes, train, val):
    for kind in ("images", "masks"):
        (scenes / kind / "train").rename(scenes / kind / train)
        (scenes / kind / "val").rename(scenes / kind / val)
    (scenes / "masks" / train).rename(scenes / "masks" / "train")  # the two need not be called alike
    data = open_masked(config_of("--data_path", scenes))
    assert (len(data.train), len(data.val)) == (10, 5)


@pytest.mark.timeout(60)
def test_a_mask_that_is_a_pipe_is_not_waited_for(scenes):
    path = scenes / "masks" / "val" / "scene-000.png"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match=r"scene-000\.png: cannot be read \(is a pipe"):
        load_pair(open_masked(config_of("--data_path", scenes)).val, 0, 3, skip_bad=False)


def test_negative_numbers_in_a_mask_are_named(scenes):
    path = scenes / "masks" / "val" / "scene-000.png"
    numbers = np.asarray(Image.open(path)).astype(np.int32)
    path.unlink()
    numbers[0, 0] = -1
    Image.fromarray(numbers).save(path.with_suffix(".tif"))
    with pytest.raises(UserError, match="holds the number -1, but"):
        load_pair(open_masked(config_of("--data_path", scenes)).val, 0, 3, skip_bad=False)
