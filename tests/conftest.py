"""Images that the tests make, and the pre-training main called in this process."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from hypothesis import settings

import main_finetune
import main_linprobe
import main_pretrain
import main_segment
from scripts import prepare_data
from shared.calls import caller
from shared.flags import SMALL, TINY, TINY_CLASSIFIER, TINY_SEGMENTER
from shared.images import write_images, write_masked
from util.runtime.errors import run_main

settings.register_profile("fixed", derandomize=True)  # a test that passes once passes for ever
settings.load_profile("fixed")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell, and its children, ignore it
torch.set_num_threads(1)  # tiny models gain nothing from more, and lose much where cores are shared


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
    """Write the training images of `class_folders` into a tar."""
    path = tmp_path / "images.tar"
    with tarfile.open(path, "w") as tar:
        tar.add(class_folders / "train", arcname=".")
    return path


@pytest.fixture
def small_disk(tmp_path):
    """Mount a file system of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("may not mount a tmpfs here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


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
