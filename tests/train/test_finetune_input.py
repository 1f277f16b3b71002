"""What goes into fine-tuning and linear probing: augmentation, and wrong input, each in one line."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from PIL import Image
from timm.data.auto_augment import NAME_TO_OP, RandAugment

from shared.finetune import config_of
from shared.images import write_images
from util.config.classifier import FinetuneConfig, LinprobeConfig
from util.config.command_line import parse_config
from util.data.datasets import open_images
from util.runtime.files import ROOT
from util.train.classification import posterize, train_dataset

# ---- augmentation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("bits", [0, 1, 4, 8])
def test_posterize_of_any_strength(mode, bits):
    image = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert(mode)
    posterized = np.asarray(posterize(image, bits))
    assert (posterized == np.asarray(image) >> (8 - bits) << (8 - bits)).all()


def test_the_paper_s_policy_bears_every_strength(class_folders):
    """rand-m9-mstd0.5-inc1 draws all of them, in time."""
    before = dict(NAME_TO_OP)
    config = config_of("--data_path", str(class_folders))
    transform = train_dataset(config, open_images(str(class_folders), "", "train")).transform
    assert before == NAME_TO_OP
    (policy,) = [part for part in transform.transforms if isinstance(part, RandAugment)]
    image = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    for operation in policy.ops:
        operation.prob, operation.magnitude_std = 1, 0
        for magnitude in range(11):
            operation.magnitude = magnitude
            assert operation(image).size == (8, 8)


# ---- wrong input -------------------------------------------------------------------------------------------

WRONG = {
    "--nb_classes 1000": "--nb_classes 1000: the data has 2 classes",
    "--finetune JUNK": "--finetune JUNK: cannot be read as a checkpoint",
    "--finetune ABSENT": "ABSENT",
    "--mixup -1": "--mixup -1.0: must be 0 or more",
    "--mixup 0.8 --batch_size 7": "--batch_size 7: must be even",
    "--smoothing 1": "--smoothing 1.0: must lie in [0, 1)",
    "--crop_scale 0.5 0.2": "--crop_scale 0.5 0.2",
    "--eval": "--eval",
    "--aa nonsense-m9": "--aa nonsense-m9",
    "--model vit_base_patch61": "did you mean vit_base_patch16?",
    "--input_size 33": "--input_size 33 33: must be a multiple of the patch",
    "--batch_size 64": "--batch_size 64",
    "--layer_decay 0": "--layer_decay 0.0",
    "--finetun X": "did you mean --finetune?",
    "--weights teacher": "teacher",
}


@pytest.mark.parametrize("flags", WRONG)
def test_wrong_input_is_one_line(finetune, class_folders, tmp_path, capsys, flags):
    (tmp_path / "junk").write_text("no checkpoint")
    places = {"JUNK": str(tmp_path / "junk"), "ABSENT": str(tmp_path / "absent")}
    filled = [places.get(word, word) for word in flags.split()]
    with pytest.raises(SystemExit) as stop:
        finetune("--data_path", class_folders, *filled)
    assert stop.value.code == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    message = WRONG[flags].replace("JUNK", places["JUNK"]).replace("ABSENT", places["ABSENT"])
    assert message in error[0]


@pytest.mark.parametrize("which", ["finetune", "linprobe"])
@pytest.mark.parametrize("damage", ["empty val", "no val", "other classes", "no classes", "one class"])
def test_data_that_no_classifier_can_use_is_one_line(request, class_folders, tmp_path, capsys, which, damage):
    message = {
        "empty val": "val: holds no images",
        "no val": "no validation images of two classes",
        "other classes": "1 classes are in train but not in val (dog); 1 classes are in val but not in train (wolf)",
        "no classes": "no labels of two classes",
        "one class": "no labels of two classes",
    }[damage]
    if damage in ("empty val", "no val"):
        shutil.rmtree(class_folders / "val")
    if damage == "empty val":
        (class_folders / "val").mkdir()
    if damage == "other classes":
        (class_folders / "val" / "dog").rename(class_folders / "val" / "wolf")
    if damage == "one class":
        shutil.rmtree(class_folders / "train" / "dog")
    path = write_images(tmp_path / "flat", 16)[0].parent if damage == "no classes" else class_folders
    with pytest.raises(SystemExit) as stop:
        request.getfixturevalue(which)("--data_path", path)
    assert stop.value.code == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert message in error[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_image_beside_the_class_folders_is_no_class(finetune, class_folders, tmp_path, capsys, split):
    data = shutil.copytree(class_folders, tmp_path / "data")
    write_images(data / split, 1, seed=0)
    with pytest.raises(SystemExit):
        finetune("--data_path", data)
    (message,) = capsys.readouterr().err.splitlines()
    assert f"{data / split}/" in message
    assert "lies in no class folder; move such images into one, or away" in message


@pytest.mark.parametrize("flags", ["", "--compile block --checkpoint_activations"])
@pytest.mark.parametrize("which", ["finetune", "linprobe"])
def test_dry_run_trains_nothing(request, class_folders, tmp_path, capsys, which, flags):
    request.getfixturevalue(which)("--data_path", class_folders, "--dry_run", flags)
    printed = capsys.readouterr().out
    assert "GFLOP" in printed
    assert "one batch        (8, 3, 32, 32)" in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("recipe", "kind"),
    [(path.stem, LinprobeConfig if "linprobe" in path.stem else FinetuneConfig)
     for path in sorted((ROOT / "recipes").glob("*.yaml")) if "finetune" in path.stem or "linprobe" in path.stem],
)  # fmt: skip
def test_recipes_have_the_batch_of_their_table(recipe, kind, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    config = parse_config(kind, ["--recipe", recipe], "main.py")
    small = recipe.startswith(("digits", "cifar"))
    if not small:
        assert config.effective_batch == (16384 if kind is LinprobeConfig else 2048 if "simmim" in recipe else 1024)
    if kind is LinprobeConfig and not small:
        assert (config.epochs, config.blr, config.weight_decay, config.warmup_epochs) == (90, 0.1, 0.0, 10)


@pytest.mark.parametrize("which", ["pretrain", "linprobe"])
def test_eval_of_a_run_of_another_stage_is_one_line(request, finetune, class_folders, tmp_path, capsys, which):
    request.getfixturevalue(which)("--data_path", class_folders, "--max_steps 1", output=tmp_path / "other")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        finetune("--data_path", class_folders, "--eval --resume", tmp_path / "other" / "checkpoint-0-step1.pth")
    fix = "train one from it first" if which == "pretrain" else "evaluate it by main_linprobe.py"
    assert f"is of {which}, and --eval here wants a model of finetune; {fix}" in capsys.readouterr().err
