"""Name the settings that a resumed run must share with its checkpoint, and those that may change."""

from __future__ import annotations

import dataclasses
import re

import pytest

from shared.calls import one_line
from util.config.pretrain import PretrainConfig
from util.config.same_run import check_same_run
from util.runtime.errors import UserError


@pytest.fixture(autouse=True)
def _one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def resume(saved: PretrainConfig, images: int, now: PretrainConfig, images_now: int) -> None:
    check_same_run(now.resume_settings(images_now), {"binding_settings": saved.resume_settings(images)}, now.elastic)


def test_a_resumed_run_may_be_cut_and_spelt_in_another_way():
    saved = PretrainConfig(data_path="a")
    resume(saved, 9, saved, 9)
    resume(saved, 9, PretrainConfig(data_path="b", output_dir="c", device="cpu", num_workers=2, save_freq=3), 9)
    cut = PretrainConfig(data_path="a", batch_size=16, accum_iter=4, lr=1.5e-4 / 4, alpha=0.25)
    resume(saved, 9, dataclasses.replace(cut, elastic=True), 9)
    with pytest.raises(UserError, match=r"batch_size is 16 here but 64 in the checkpoint, .* or add --elastic"):
        resume(saved, 9, cut, 9)
    same = dict(input_size=(224,), patch_size=16, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    resume(saved, 9, PretrainConfig(data_path="a", **same), 9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(batch_size=32), "effective batch is 32 here but 64"),
        (dict(blr=1e-3), "peak lr is 0.00025 here but 3.75e-05"),
        (dict(alpha=1.0), "alpha is 1.0 here but 0.25"),
        (dict(input_size=(192,)), "input_size is [192, 192] here but [224, 224]"),
        (dict(std=(1.0, 1.0, 1.0)), "std is [1.0, 1.0, 1.0] here but [0.229, 0.224, 0.225]"),
        (dict(dataset="torch/cifar10"), "data set is torch/cifar10 here but files"),
        (dict(epochs=500), "epochs is 500 here but 400"),
        (dict(betas=(0.9, 0.999)), "betas is [0.9, 0.999] here but [0.9, 0.95]"),
        (dict(amp="fp32"), "amp is fp32 here but auto"),
    ],
)
def test_another_run_is_refused_with_both_values(settings, message):
    with pytest.raises(UserError, match=re.escape(f"--resume: {message} in the checkpoint")) as error:
        resume(PretrainConfig(data_path="a"), 9, PretrainConfig(**dict(data_path="a") | settings), 9)
    one_line(error)


def test_other_data_or_no_run_at_all_is_refused():
    with pytest.raises(UserError, match="number of images is 8 here but 9 in the checkpoint"):
        resume(PretrainConfig(), 9, PretrainConfig(), 8)
    with pytest.raises(UserError, match="--resume: the file holds weights but not the state of a run"):
        check_same_run(PretrainConfig().resume_settings(9), {"model": {}}, elastic=False)


def test_checkpoints_from_before_a_flag_existed_did_as_its_default():
    saved = PretrainConfig().resume_settings(9)
    del saved["exif"]
    check_same_run(PretrainConfig().resume_settings(9), {"binding_settings": saved}, elastic=False)
    with pytest.raises(UserError, match="--resume: exif is apply here but ignore in the checkpoint"):
        check_same_run(PretrainConfig(exif="apply").resume_settings(9), {"binding_settings": saved}, elastic=False)
