"""Images decoded once: the same views as without, in memory and on the device."""

from __future__ import annotations

import multiprocessing
import sys

import numpy as np
import pytest
import torch

from engine_pretrain import build_trainer
from shared.images import write_images
from shared.ranks import Ranks, command
from util.config.pretrain import PretrainConfig
from util.data import cache
from util.data.cache import cache_images, readable
from util.data.datasets import open_images
from util.data.decode import decode
from util.data.device_views import photometry_row
from util.data.samples import Batch
from util.data.sources import BadImage
from util.data.views import draw_photometry
from util.runtime.errors import UserError
from util.train.pretraining import build_state
from util.weights.checkpoint import load_checkpoint

losses = ("loss", "mim", "bc")


def curve(log: list[dict]) -> list[list[float]]:
    return [[line[name] for name in losses] for line in log]


@pytest.mark.parametrize("flags", ["", "--crop rrc", "--num_workers 2", "--in_chans 1 --input_size 32 48"])
def test_a_run_from_memory_is_the_run_from_files(pretrain, flat_folder, tmp_path, flags):
    expected = pretrain("--data_path", flat_folder, flags, output=tmp_path / "files")
    cached = pretrain("--data_path", flat_folder, flags, "--cache ram", output=tmp_path / "memory")
    assert curve(cached) == curve(expected)


@pytest.mark.parametrize("flags", ["", "--num_workers 2", "--shared_crop", "--input_size 32 48", "--in_chans 1"])
def test_a_run_from_the_device_is_the_run_from_files(pretrain, flat_folder, tmp_path, flags):
    shared = ("--data_path", flat_folder, "--augment_on device", flags)
    expected = pretrain(*shared, output=tmp_path / "files")
    cached = pretrain(*shared, "--cache device", output=tmp_path / "device")
    assert curve(cached) == curve(expected)


def test_resized_crops_cut_on_the_device_make_little_difference(pretrain, flat_folder, tmp_path):
    shared = ("--data_path", flat_folder, "--augment_on device --crop rrc")
    expected = pretrain(*shared, output=tmp_path / "files")
    cached = pretrain(*shared, "--cache device", output=tmp_path / "device")
    for name in ("mim", "bc"):  # rounding alone
        assert cached[0][name] == pytest.approx(expected[0][name], abs=2e-3)


def test_where_colours_are_changed_makes_little_difference(pretrain, flat_folder, tmp_path):
    worker = pretrain("--data_path", flat_folder, output=tmp_path / "worker")
    device = pretrain("--data_path", flat_folder, "--augment_on device", output=tmp_path / "device")
    assert device[0]["mim"] == worker[0]["mim"]  # view u
    assert device[0]["bc"] == pytest.approx(worker[0]["bc"], abs=1e-3)  # view v, up to rounding
    assert device[0]["bc"] != pytest.approx(0, abs=0.1)


def test_the_loader_s_batch_stays_as_it_is():
    config = PretrainConfig(model="lut_vit_nano_patch4", augment_on="device", amp="fp32", device="cpu")
    state, _ = build_state(config, None, torch.device("cpu"))
    trainer = build_trainer(config, state, None, torch.device("cpu"), updates_per_epoch=1)
    views = torch.randint(0, 256, (3, 2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    rows = torch.tensor([photometry_row(draw_photometry(np.random.default_rng(i))) for i in range(3)])
    batch = Batch(views.clone(), torch.rand(3, config.num_patches), torch.arange(3), torch.arange(3), rows)
    (brought,) = trainer.to_device([batch])
    assert torch.equal(batch.views, views)
    assert torch.equal(brought.views[:, 0], views[:, 0])
    assert not torch.equal(brought.views[:, 1], views[:, 1])


def test_a_run_may_resume_with_another_cache_but_not_another_place_of_augmentation(
    pretrain, flat_folder, tmp_path, capsys
):
    shared = ("--data_path", flat_folder, "--augment_on device")
    expected = pretrain(*shared, output=tmp_path / "whole")
    pretrain(*shared, "--max_steps 3")
    assert curve(pretrain(*shared, "--auto_resume --cache device")) == curve(expected)
    with pytest.raises(SystemExit):
        pretrain("--data_path", flat_folder, "--auto_resume")
    assert "augment_on is worker here but device in the checkpoint" in capsys.readouterr().err


def test_bad_images_are_found_when_the_cache_is_filled(pretrain, flat_folder, tmp_path, capsys):
    for number in (3, 4, 23):  # two in a row, and the last one
        (flat_folder / f"image-{number:03d}.png").write_bytes(b"no picture")
    with pytest.raises(SystemExit) as stop:
        pretrain("--data_path", flat_folder, "--cache ram")
    assert stop.value.code == 2
    assert "image-003.png: cannot be read" in capsys.readouterr().err

    shared = ("--data_path", flat_folder, "--on_bad_image skip --augment_on device")
    expected = pretrain(*shared, output=tmp_path / "files")
    for kind in ("ram", "device"):
        cached = pretrain(*shared, f"--cache {kind}", output=tmp_path / kind)
        assert curve(cached) == curve(expected)
        assert cached[-1]["bad_images"] == expected[-1]["bad_images"] > 0


def test_what_is_read_is_what_was_decoded(tmp_path):
    write_images(tmp_path, 5)
    (tmp_path / "image-002.png").write_bytes(b"")
    source = open_images(str(tmp_path), "", "train")
    cached = cache_images(source, 3, 0, 60, skip_bad=True)
    for index in (0, 1, 3, 4):
        assert torch.equal(cached.read(index), decode(source.read(index), 3))
    with pytest.raises(BadImage, match="empty"):
        cached.read(2)
    assert readable(cached).tolist() == [0, 1, 3, 3, 4]
    assert len(cached) == 5
    assert cached.name(1) == source.name(1)


def test_the_last_bad_image_is_followed_by_the_first(tmp_path):
    write_images(tmp_path, 3)
    (tmp_path / "image-002.png").write_bytes(b"")
    cached = cache_images(open_images(str(tmp_path), "", "train"), 3, 0, 60, skip_bad=True)
    assert readable(cached).tolist() == [0, 1, 0]


def test_nothing_but_bad_images_is_an_error(tmp_path):
    write_images(tmp_path, 2)
    for path in tmp_path.iterdir():
        path.write_bytes(b"x")
    with pytest.raises(UserError, match="none of the 2 images can be read"):
        cache_images(open_images(str(tmp_path), "", "train"), 3, 0, 60, skip_bad=True)


def test_too_little_memory_is_said_before_it_is_taken(tmp_path, monkeypatch):
    write_images(tmp_path / "images", 40)
    monkeypatch.setattr(cache, "_ESTIMATE_AFTER", (32,))
    monkeypatch.setattr(cache, "available_memory", lambda: 1000)
    before = set(cache._SHARED_MEMORY.glob("lut-cache-*"))
    message = "--cache: the decoded images take 0.0 GiB, 0.0 GiB are free; use --cache none"
    with pytest.raises(UserError, match=message):
        cache_images(open_images(str(tmp_path / "images"), "", "train"), 3, 0, 60, skip_bad=False)
    assert set(cache._SHARED_MEMORY.glob("lut-cache-*")) == before


def test_a_small_shared_memory_is_left_for_the_temporary_folder(tmp_path, monkeypatch, capsys):
    write_images(tmp_path / "images", 40)
    monkeypatch.setattr(cache, "_ESTIMATE_AFTER", (32,))
    small = tmp_path / "shm"
    small.mkdir()
    monkeypatch.setattr(cache, "_SHARED_MEMORY", small)
    usage = cache.shutil.disk_usage
    monkeypatch.setattr(
        cache.shutil, "disk_usage", lambda path: usage(path)._replace(free=0) if path == small else usage(path)
    )
    source = open_images(str(tmp_path / "images"), "", "train")
    cached = cache_images(source, 3, 0, 60, skip_bad=False)
    assert torch.equal(cached.read(39), decode(source.read(39), 3))
    assert "is too small" in capsys.readouterr().err
    assert not list(small.iterdir())


def test_nothing_is_left_behind(tmp_path):
    write_images(tmp_path, 4)
    before = set(cache._SHARED_MEMORY.glob("lut-cache-*"))
    cached = cache_images(open_images(str(tmp_path), "", "train"), 3, 0, 60, skip_bad=False)
    assert set(cache._SHARED_MEMORY.glob("lut-cache-*")) == before
    assert cached.read(0).sum() > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    {
        "--cache device": "--augment_on worker: must be device with --cache device",
    }.items(),
)
def test_settings_that_do_not_fit(pretrain, flat_folder, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        pretrain("--data_path", flat_folder, flags)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_classifiers_from_memory(finetune, class_folders, tmp_path, capsys):
    expected = finetune("--data_path", class_folders, output=tmp_path / "files")
    cached = finetune("--data_path", class_folders, "--cache ram", output=tmp_path / "memory")
    assert [line["loss"] for line in cached if "loss" in line] == [line["loss"] for line in expected if "loss" in line]
    with pytest.raises(SystemExit):
        finetune("--data_path", class_folders, "--cache device")
    assert "--cache device: is for pre-training, use ram" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere Python's default stays")
def test_loader_workers_are_forked_whatever_python_starts_by_default(finetune, class_folders):
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("forkserver", force=True)
    try:
        log = finetune("--data_path", class_folders, "--cache ram --num_workers 2 --max_steps 1")
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert sum("loss" in line for line in log) == 1


@pytest.mark.slow
def test_two_processes_share_one_copy(tmp_path):
    write_images(tmp_path / "images", 32)
    ends = []
    for kind in ("none", "device"):
        run = tmp_path / kind
        flags = ("--epochs", "2", "--batch_size", "4", "--augment_on", "device", "--cache", kind)
        with Ranks(command(tmp_path / "images", run, *flags), 2) as ranks:
            assert {status for status, _ in ranks.finish()} == {0}
        ends.append(load_checkpoint(run / "checkpoint-1.pth")["model"])
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert np.isfinite(ends[0]["cls_token"].numpy()).all()
