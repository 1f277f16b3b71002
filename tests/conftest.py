"""Images that the tests make, and the pre-training main called in this process."""

from __future__ import annotations

import io
import json
import math
import shlex
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image

import main_finetune
import main_linprobe
import main_pretrain
import main_segment
from scripts import prepare_data
from util.runtime.errors import run_main
from util.weights.checkpoint import LOCK

settings.register_profile("fixed", derandomize=True)  # a test that passes once passes for ever
settings.load_profile("fixed")
signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # a shell's background job ignores it, and so would its children
torch.set_num_threads(1)  # tiny models gain nothing from more, and lose much where cores are shared

# the smallest run: nano model at patch 8, one block of decoder, narrow heads, no loader processes
TINY = (
    "--model lut_vit_nano_patch4 --patch_size 8 --decoder_depth 1 --head_mlp_dim 16 --batch_size 8 --epochs 2"
    " --warmup_epochs 1 --blr 1e-2 --num_workers 0 --print_freq 1 --monitor_freq 0 --device cpu"
    " --amp fp32"  # on some CPUs the default is bf16, and sums in another order differ much more
)


def encode(image, image_format="PNG", **options):
    """Bytes of a PIL image."""
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def colours(height=30, width=45, seed=0):
    """An RGB picture that compresses badly."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([5 * x, 8 * y, 3 * (x + y)], -1) + rng.integers(0, 25, (height, width, 3))
    return Image.fromarray((pixels % 256).astype(np.uint8))


def plain(number):
    """A PNG of one colour that tells which image it is."""
    return encode(Image.new("RGB", (6, 5), (number, number, number)))


def one_line(error):
    """The message of a UserError, which has to be one line."""
    message = str(error.value)
    assert "\n" not in message
    return message


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


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    """CamVid's layout: 10 + 5 images, three classes, and a fourth number that is ignored."""
    root = tmp_path / "scenes"
    for split, number in (("train", 10), ("val", 5)):
        write_masked(root / "images" / split, root / "masks" / split, number, seed=number)
    names = {"class_names": ["brick", "grass", "sky", "void"], "ignore_index": 3}
    (root / "classes.json").write_text(json.dumps(names))
    return root


@pytest.fixture
def class_folders(tmp_path: Path) -> Path:
    """train/ with 2 x 16 images and val/ with 2 x 8."""
    root = tmp_path / "images"
    for split, number in (("train", 16), ("val", 8)):
        for i, name in enumerate(("cat", "dog")):
            write_images(root / split / name, number, seed=10 * number + i)
    return root


@pytest.fixture
def flat_folder(tmp_path: Path) -> Path:
    """32 images without labels, some deeper than others."""
    root = tmp_path / "flat"
    write_images(root, 16, seed=1)
    write_images(root / "deep" / "er", 16, seed=2)
    return root


@pytest.fixture
def tar_file(class_folders: Path, tmp_path: Path) -> Path:
    """The training images of `class_folders` in a tar."""
    path = tmp_path / "images.tar"
    with tarfile.open(path, "w") as tar:
        tar.add(class_folders / "train", arcname=".")
    return path


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("may not mount a tmpfs here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


# a classifier of the same size; crops of a whole blob image say little, so nearly all of it is taken
TINY_CLASSIFIER = (
    "--model vit_nano_patch4 --patch_size 8 --batch_size 8 --epochs 2 --warmup_epochs 1 --num_workers 0 --print_freq 1"
    " --device cpu --amp fp32 --crop_scale 0.8 1"
)


# a segmenter of the same size: two updates per epoch of `scenes`, and an end in the middle of the third epoch
TINY_SEGMENTER = (
    "--model vit_nano_patch4 --patch_size 8 --input_size 32 --head_width 8 --batch_size 4 --max_updates 5"
    " --warmup_updates 2 --lr 2e-3 --num_workers 0 --print_freq 1 --device cpu --amp fp32 --pictures 0"
)


def script_caller(monkeypatch, capsys, folder: Path, script):
    """A function that calls a script of scripts/ from the folder: exit status, stdout, stderr."""
    program = Path(script.__file__).name
    monkeypatch.chdir(folder)
    monkeypatch.setattr(
        "util.runtime.progress.SECONDS_BETWEEN_LINES", math.inf
    )  # lines that come on slow machines only

    def call(flags: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [program, *shlex.split(flags)])
        status = 0
        try:
            run_main(program, script.main)
        except SystemExit as stop:
            status = stop.code
        return status or 0, *capsys.readouterr()

    return call


def caller(monkeypatch, tmp_path: Path, main, shared: str):
    """A function that calls a main with the `shared` flags and more: the lines of log.jsonl."""
    program = Path(main.__file__).name

    def call(*flags: str, output: Path | None = None) -> list[dict]:
        output = output or tmp_path / "run"
        arguments = [*shared.split(), "--output_dir", str(output), *" ".join(map(str, flags)).split()]
        monkeypatch.setattr(sys, "argv", [program, *arguments])
        run_main(program, main.main)
        log = output / "log.jsonl"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    return call


@pytest.fixture
def pretrain(monkeypatch, tmp_path):
    """Call main_pretrain.py with TINY and the given flags: the lines of log.jsonl."""
    return caller(monkeypatch, tmp_path, main_pretrain, TINY)


@pytest.fixture
def finetune(monkeypatch, tmp_path):
    """Call main_finetune.py with TINY_CLASSIFIER and the given flags."""
    return caller(monkeypatch, tmp_path, main_finetune, TINY_CLASSIFIER)


@pytest.fixture
def linprobe(monkeypatch, tmp_path):
    """Call main_linprobe.py with TINY_CLASSIFIER and the given flags."""
    return caller(monkeypatch, tmp_path, main_linprobe, TINY_CLASSIFIER)


@pytest.fixture
def segment(monkeypatch, tmp_path):
    """Call main_segment.py with TINY_SEGMENTER and the given flags."""
    return caller(monkeypatch, tmp_path, main_segment, TINY_SEGMENTER)


# ---- data sets made small ----------------------------------------------------------------------------------

SMALL = ["--short_side", "24", "--num_workers", "0"]


@pytest.fixture
def prepare(monkeypatch, capfd):
    """Call the script: what it printed, or with `fails` its exit status and error message."""

    def call(*flags, fails=False):
        monkeypatch.setattr(sys, "argv", ["prepare_data.py", *SMALL, *map(str, flags)])
        capfd.readouterr()
        if not fails:
            run_main("prepare_data.py", prepare_data.main)
            return capfd.readouterr().out
        with pytest.raises(SystemExit) as stop:
            run_main("prepare_data.py", prepare_data.main)
        out, err = capfd.readouterr()
        return stop.value.code, out, err.splitlines()[-1]

    return call


def tree(folder):
    """Path -> bytes of all that was written."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != LOCK]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def noise(seed, size=(60, 50)):
    """A picture that no format makes small."""
    return encode(Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)))
