"""Data sets made small, interrupted: kill -9, damaged shards, full disks; the same command goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shared.flags import SMALL
from shared.images import noise_png, plain, tree
from util.data.datasets import open_images
from util.data.shards import read_shard
from util.runtime.errors import UserError
from util.runtime.files import ROOT, TEMPORARY


def noisy_folder(root, number=41):
    """PNGs that a small --shard_mb makes many shards of."""
    (root / "cat").mkdir(parents=True)
    for i in range(number):
        (root / "cat" / f"{i:03d}.png").write_bytes(noise_png(i))
    return root


NOISY = ("--shard_mb", "0.02")


def start(*flags):
    """Start the script in a process of its own."""
    command = [sys.executable, str(ROOT / "scripts/prepare_data.py"), *SMALL, *map(str, flags)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def test_kill_9_in_the_middle_and_a_second_call_meanwhile(prepare, tmp_path):
    images, out = noisy_folder(tmp_path / "in", 300), tmp_path / "out"
    prepare("--data_path", images, "--output_dir", tmp_path / "whole", *NOISY)
    process = start("--data_path", images, "--output_dir", out, *NOISY, "--num_workers", "2")
    partial = out / f"{TEMPORARY}train"
    while not list(partial.glob("*-00003.tar")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.001)
    process.send_signal(signal.SIGSTOP)
    assert partial.is_dir()  # it has not finished
    code, _, message = prepare("--data_path", images, "--output_dir", out, *NOISY, fails=True)
    assert (code, "another run writes there" in message) == (2, True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {path: path.stat() for path in partial.glob("[!.]*.tar") if read_shard(path)}
    assert len(finished) >= 3
    with pytest.raises(UserError, match="holds no images"):  # half a data set is none
        open_images(str(out), "", "train")

    prepare("--data_path", images, "--output_dir", out, *NOISY)
    assert tree(out) == tree(tmp_path / "whole")
    for path, before in finished.items():
        assert (out / "train" / path.name).stat().st_ino == before.st_ino  # not made again


def number_of_shards(folder: Path) -> int:
    """Below a folder in which another process renames folders while they are looked through."""
    return sum(name.endswith(".tar") for _, _, names in os.walk(folder) for name in names)


@pytest.mark.slow
def test_killed_again_and_again(prepare, tmp_path):
    flags = ("--data_path", noisy_folder(tmp_path / "in", 200), "--shard_mb", "0.005")
    prepare(*flags, "--output_dir", tmp_path / "whole")
    out, kills = tmp_path / "out", 0
    while True:
        process = start(*flags, "--output_dir", out, "--num_workers", "2")
        enough = number_of_shards(out) + 30
        while process.poll() is None and number_of_shards(out) < enough:
            time.sleep(0.001)
        if process.poll() is not None:
            break
        process.kill()
        process.wait()
        kills += 1
    assert process.returncode == 0, process.stderr.read()
    assert kills >= 2
    assert tree(out) == tree(tmp_path / "whole")


def test_the_bytes_do_not_depend_on_processes_and_nothing_is_made_twice(prepare, class_folders, tmp_path):
    flags = ("--data_path", class_folders, "--shard_mb", "0.005")
    first = prepare(*flags, "--output_dir", tmp_path / "0")
    for workers in (1, 2):
        prepare(*flags, "--output_dir", tmp_path / str(workers), "--num_workers", workers)
        assert tree(tmp_path / str(workers)) == tree(tmp_path / "0")
    written = {path: path.stat().st_ino for path in (tmp_path / "0").rglob("*.tar")}
    assert prepare(*flags, "--output_dir", tmp_path / "0") == first
    assert {path: path.stat().st_ino for path in (tmp_path / "0").rglob("*.tar")} == written


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "manifest"])
def test_a_damaged_shard_is_made_again(prepare, class_folders, tmp_path, damage):
    flags = ("--data_path", class_folders, "--shard_mb", "0.005", "--output_dir", tmp_path / "out")
    prepare(*flags)
    intact = tree(tmp_path / "out")
    path = tmp_path / "out/train/train-00002.tar"
    if damage == "flip":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "truncate":
        os.truncate(path, 100)
    else:
        (path if damage == "delete" else path.with_name(f"{path.name}.json")).unlink()
    (path.parent / "train-00099.tar").write_bytes(b"left over")
    (path.parent / "mine.txt").write_bytes(b"not ours to delete")
    prepare(*flags)
    assert tree(tmp_path / "out") == intact | {"train/mine.txt": b"not ours to delete"}


def test_other_settings_or_images_are_refused_with_both_values(prepare, class_folders, tmp_path):
    flags = ("--data_path", class_folders, "--output_dir", tmp_path / "out")
    prepare(*flags)
    for flag, value, before in (("short_side", 32, 24), ("quality", 90, 95), ("format", "webdataset", "tar")):
        code, _, message = prepare(*flags, f"--{flag}", value, fails=True)
        assert code == 2
        assert f"--{flag} is {value} here but {before} in the call that began it" in message
    extra = class_folders / "train/cat/new.png"
    extra.write_bytes(plain(1))
    assert "number of train images is 33 here but 32" in prepare(*flags, fails=True)[2]
    (class_folders / "train/cat/image-000.png").unlink()
    assert "hash of the names of the train images" in prepare(*flags, fails=True)[2]


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(prepare, small_disk, tmp_path):
    images = tmp_path / "in/cat"
    images.mkdir(parents=True)
    for i in range(65):  # the estimate looks at each third
        (images / f"{i:03d}.png").write_bytes(noise_png(i, (96, 96)) if i % 3 else plain(0))
    flags = ("--data_path", images.parent, "--shard_mb", "0.2", "--image_format", "png", "--short_side", "96")
    prepare(*flags, "--output_dir", tmp_path / "whole")
    code, _, message = prepare(*flags, "--output_dir", small_disk / "out", fails=True)
    assert code == 1
    assert "could not be written (No space left on device); what is finished stays" in message
    finished = len(list(small_disk.rglob("*.tar.json")))
    assert finished >= 1
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    prepare(*flags, "--output_dir", small_disk / "out")
    assert tree(small_disk / "out") == tree(tmp_path / "whole")


def test_too_little_space_is_seen_before_anything_is_written(prepare, small_disk, tmp_path):
    images = noisy_folder(tmp_path / "in", 200)
    flags = ("--data_path", images, "--image_format", "png", "--short_side", "50")
    code, _, message = prepare(*flags, "--output_dir", small_disk / "out", fails=True)
    assert code == 2
    assert "1.9 MB are needed but 1.0 MB free" in message
    assert tree(small_disk) == {}
