"""Layouts of Table 5's sets, classifiers of all programs, and wrong inputs of scripts/robustness.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

from models_lut import LUT
from scripts import robustness as script
from shared.calls import script_caller
from shared.images import colours
from shared.made_sets import (
    CPU,
    FLAGS,
    OBJECTNET,
    OURS,
    REAL,
    SUBSETS,
    VAL_LABELS,
    WNIDS,
    Made,
)
from util.config.groups import as_dict
from util.config.pretrain import PretrainConfig
from util.data.sources import FileSource, JoinedSource
from util.results.results import read_results
from util.robustness.sets import find_sets, open_set
from util.weights.classifiers import open_classifier, without_border
from util.weights.vit import open_vit


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return Made(tmp_path_factory.mktemp("robustness"))


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Call scripts/robustness.py from an empty folder: exit status, stdout, stderr."""
    return script_caller(monkeypatch, capsys, tmp_path, script)


# ---- layouts ----------------------------------------------------------------------------------------------


def test_validation_images_in_one_folder(made, call, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in (made.root / "data" / "imagenet" / "val").rglob("*.png"):
        shutil.copy(path, flat)
    status, _, _ = call(f"{made.checkpoint} --imagenet {flat} --columns in1k real --partial {FLAGS}")
    assert status == 0
    for line in read_results("output/robustness"):
        assert line["metrics"] == pytest.approx(made.expected(line["config"]["column"]))


def test_validation_images_without_numbers_have_no_real_labels(made, call, tmp_path):
    for i, path in enumerate(sorted((made.root / "data" / "imagenet" / "val").rglob("*.png"))):
        target = tmp_path / "named" / path.parent.name / f"{i}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    _, shown, _ = call(f"{made.checkpoint} --imagenet {tmp_path}/named --columns in1k real --partial {FLAGS}")
    (line,) = read_results("output/robustness")
    assert line["metrics"] == pytest.approx(made.expected("in1k"))
    assert "missing: IN-Real, the names of --imagenet's images have no number" in shown


def test_known_labels():
    assert (WNIDS[VAL_LABELS[0]], WNIDS[VAL_LABELS[1]]) == ("n01751748", "n09193705")  # sea snake, alp
    assert set(map(VAL_LABELS.count, range(1000))) == {50}
    agree = [VAL_LABELS[n] in REAL[n] for n in range(50_000) if REAL[n]]
    assert len(agree) == 46_837
    assert 0.89 < np.mean(agree) < 0.91
    assert [len(SUBSETS[key]) for key in "aro"] == [200] * 3
    assert (len(OBJECTNET), sum(map(len, OBJECTNET.values()))) == (113, 125)


def complete(folder: Path, names, each: int, ending=".JPEG") -> Path:
    """Empty files: only names are looked at."""
    for name in names:
        (folder / name).mkdir(parents=True)
        for i in range(each):
            (folder / name / f"{i}{ending}").touch()
    return folder


def test_complete_sets_need_no_leave(tmp_path):
    images = open_set("imagenet_o", str(complete(tmp_path / "o", [WNIDS[c] for c in SUBSETS["o"]], 10)), partial=False)
    assert (len(images.indices), images.lacking) == (2000, "")
    v2 = open_set("imagenet_v2", str(complete(tmp_path / "v2", map(str, range(1000)), 10)), partial=False)
    assert (len(v2.indices), v2.lacking) == (10_000, "")
    by_folder = {
        v2.source.class_names[label]: answer for label, answer in zip(v2.source.labels, v2.answers, strict=True)
    }
    assert all(answer == (int(name),) for name, answer in by_folder.items())
    released = (OURS / "si_score_released.txt").read_text().split()
    assert open_set("si_size", str(complete(tmp_path / "area", released, 1)), partial=False).lacking == ""


def test_sets_are_found_under_their_usual_names(tmp_path):
    names = "ImageNet imagenet-v2 ImageNet-Sketch objectnet-1.0 SI-Score/object_size si-score/location20_area02_min0pc"
    for name in (*names.split(), "other"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
    (tmp_path / "si-score" / "location20_area02_min0pc").rename(tmp_path / "SI-Score" / "location20_area02_min0pc")
    (tmp_path / "si-score").rmdir()
    folder_names = {flag: Path(path).name for flag, path in find_sets(tmp_path).items()}
    assert folder_names == {
        "imagenet": "ImageNet", "imagenet_v2": "imagenet-v2", "sketch": "ImageNet-Sketch", "objectnet": "objectnet-1.0",
        "si_size": "object_size", "si_location": "location20_area02_min0pc",
    }  # fmt: skip


def test_joined_sources(tmp_path):
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.write_bytes(path.name.encode())
    joined = JoinedSource(
        [FileSource([str(p)], None, None) for p in paths[:1]] + [FileSource([*map(str, paths[1:])], None, None)]
    )
    assert [joined.read(i) for i in range(len(joined))] == [b"a", b"b", b"c"]
    assert joined.name(2) == str(paths[2])


def test_a_border_is_cut_off():
    image = torch.arange(3 * 7 * 6).view(3, 7, 6)
    assert torch.equal(without_border(image, lambda x: x, 2), image[:, 2:5, 2:4])
    with pytest.raises(ValueError, match="6 x 4 pixels are all border"):
        without_border(image[:, :4], lambda x: x, 2)


# ---- models -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_timms_models_see_what_timm_shows_them(tmp_path, name):
    torch.manual_seed(1)
    model = timm.create_model(name).eval()
    torch.save({"state_dict": {f"module.{n}": x for n, x in model.state_dict().items()}}, tmp_path / "timm.pth")
    opened = open_classifier(f"timm:{name}={tmp_path}/timm.pth", "student", "", (), None, CPU, 1000, "CHECKPOINT")
    picture = colours(200, 300)
    config = resolve_data_config(model=model, use_test_size=True)
    with torch.no_grad():
        expected = model(create_transform(**config, is_training=False)(picture)[None])
        pixels = opened.view(torch.tensor(np.asarray(picture)).permute(2, 0, 1))
        logits = opened.model(opened.normalise(pixels[None]))
    assert torch.allclose(logits, expected, atol=1e-4)
    assert opened.label == name


def test_timms_models_take_another_size():
    common = (None, CPU, 1000, "CHECKPOINT")
    opened = open_classifier("timm:test_vit", "student", "tiny", (96, 64), *common)
    assert opened.model(torch.zeros(1, 3, 96, 64)).shape == (1, 1000)
    assert opened.view(torch.zeros(3, 50, 50, dtype=torch.uint8)).shape == (3, 96, 64)
    assert opened.origin == "timm:test_vit: random weights"


def test_an_exported_file_is_seen_as_it_was_trained(tmp_path):
    state = timm.create_model("test_vit").state_dict()
    torch.save(state, tmp_path / "vit.pth")
    overlay = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5], "crop_pct": 1.0, "classifier": "no business of it"}
    (tmp_path / "vit.json").write_text(json.dumps({"model_args": {"pretrained_cfg_overlay": overlay}}))
    name = f"timm:test_vit={tmp_path}/vit.pth"
    opened = open_classifier(name, None, "", (), None, CPU, 1000, "CHECKPOINT")
    assert opened.normalise.mean == open_vit(name, None, "", (), None, CPU).normalise.mean == (0.1, 0.2, 0.3)
    (tmp_path / "vit.json").write_text("no json")
    assert (
        open_vit(name, None, "", (), None, CPU).normalise.mean == timm.create_model("test_vit").pretrained_cfg["mean"]
    )


def test_the_moving_average_of_a_run(made, tmp_path):
    average = {n: x + 1 for n, x in made.model.state_dict().items()}
    torch.save({"model": made.model.state_dict(), "model_ema": average}, tmp_path / "tuned.pth")
    for weights, state in (("student", made.model.state_dict()), ("momentum", average)):
        opened = open_classifier(f"{tmp_path}/tuned.pth", weights, "", (), None, CPU, 1000, "CHECKPOINT")
        assert torch.equal(opened.model.head.bias, state["head.bias"])


# ---- wrong inputs -----------------------------------------------------------------------------------------


def wrong_sets(made, tmp_path):
    """Return flags with wrong sets -> what the line has to say."""
    data, tuned = made.root / "data", made.checkpoint
    v2 = data / "imagenetv2-matched-frequency-format-val"
    val = data / "imagenet" / "val"
    a = complete(tmp_path / "some", [WNIDS[c] for c in SUBSETS["a"]], 1)
    train = complete(tmp_path / "train", WNIDS[:2], 3)
    misplaced = tmp_path / "misplaced" / WNIDS[7]
    misplaced.mkdir(parents=True)
    (misplaced / "ILSVRC2012_val_00000001.JPEG").touch()
    twice = complete(tmp_path / "twice", ["x", "y"], 0)
    for name in "xy":
        (twice / name / "ILSVRC2012_val_00000009.JPEG").touch()
    si = data / "si-score" / "object_location"
    return {
        f"{tuned} --imagenet_v2 {val}": "ImageNet-1k's validation images (ILSVRC2012_val_...), not ImageNet-V2",
        f"{tuned} --imagenet_v2 {data}/sketch": "folders are unknown there (n0",
        f"{tuned} --imagenet {v2}": "is not ImageNet-1k's validation images; ",
        f"{tuned} --imagenet_r {a} --partial": "is not ImageNet-R; ",
        f"{tuned} --imagenet_r {a}": "it looks like ImageNet-A",
        f"{tuned} --sketch {a}": "holds 200 of 1000 classes and 200 of 50889 images of ImageNet-Sketch",
        f"{tuned} --imagenet_v2 {v2}": "--partial scores what is there",
        f"{tuned} --imagenet {a}": "it looks like ImageNet-A",
        f"{tuned} --imagenet {train}": "holds 2 of 1000 classes and 6 of 50000 images",
        f"{tuned} --imagenet {tmp_path}/misplaced --partial": "1 of 1 images lie in another folder than their class's",
        f"{tuned} --imagenet {twice} --partial": "holds 1 images twice",
        f"{tuned} --objectnet {a}": "is not ObjectNet; 200 of its 200 folders are unknown there",
        f"{tuned} --si_size {si}": "object_location: is named like the images of --si_location",
        f"{tuned} --si_size {a}": "is not SI-Score, size; ",
        f"{tuned} --sketch {tmp_path}/nowhere": "nowhere: there is no such file or folder",
        f"{tuned} --data_root {tmp_path}/nowhere": "--data_root",
        f"{tuned} --data_root {val}": "holds none of the sets under its usual name",
        f"{tuned}": "--data_root: is missing, give it or one of --imagenet",
        f"{tuned} --imagenet_o {data}/imagenet-o": "its inliers are images of ImageNet, add --imagenet",
        f"{tuned} --imagenet_v2 {v2} --columns si_lok": "--columns si_lok: unknown, did you mean si_loc?",
        f"{tuned} --imagenet_v2 {v2} --occlusion 0": "--occlusion 0.0: must lie in (0, 1]",
        f"{tuned} --imagenet_v2 {v2} --picture out.txt": "--picture out.txt: give the name of a .png",
        f"{tuned} --imagenet_v2 {v2} --weights momentum": "holds no momentum encoder",
    }


def wrong_models(made, tmp_path):
    """Return flags with wrong checkpoints -> what the line has to say."""
    tuned, v2 = made.checkpoint, made.root / "data" / "imagenetv2-matched-frequency-format-val"
    other_classes = tmp_path / "ten.pth"
    state = made.model.state_dict()
    torch.save(
        {"model": state | {"head.weight": state["head.weight"][:10], "head.bias": state["head.bias"][:10]}},
        other_classes,
    )
    settings = PretrainConfig(model="lut_vit_nano_patch4", patch_size=8, decoder_depth=1, head_mlp_dim=16)
    pretrained = tmp_path / "checkpoint-3.pth"
    torch.save({"model": LUT(**settings.model_arguments).state_dict(), "config": as_dict(settings)}, pretrained)
    no_file = tmp_path / "notes.pth"
    no_file.write_text("no checkpoint")
    resnet = tmp_path / "resnet.pth"
    torch.save(timm.create_model("test_resnet", num_classes=7).state_dict(), resnet)
    return {
        f"{tuned} --imagenet_v2 {v2} --partial --output_dir {no_file}": "notes.pth: cannot be written",
        f"{other_classes} --imagenet_v2 {v2}": "has 10 classes, give a classifier of ImageNet-1k's 1000",
        f"{pretrained} --imagenet_v2 {v2}": "holds an encoder without a classifier, fine-tune it first",
        f"{no_file} --imagenet_v2 {v2}": "cannot be read as a checkpoint",
        f"{tmp_path}/nothing.pth --imagenet_v2 {v2}": "nothing.pth: there is no such file",
        f"timm:vit_bose_patch16_224 --imagenet_v2 {v2}": "did you mean vit_base_patch16_224?",
        f"timm:test_resnet={resnet} --imagenet_v2 {v2}": "has 7 classes",
        f"timm:test_resnet={tuned} --imagenet_v2 {v2}": "does not fit timm's test_resnet",
        f"timm:test_vit --imagenet_v2 {v2} --input_size 50": "--input_size 50: no multiple of the patch, 16 pixels",
        f"timm:test_vit --imagenet_v2 {v2} --weights momentum": "has one set of weights, leave the flag out",
        "": "holds no results yet, give a CHECKPOINT",
    }


def test_wrong_inputs_are_one_line(made, call, tmp_path):
    unlike = {}
    for flags, message in (wrong_sets(made, tmp_path) | wrong_models(made, tmp_path)).items():
        status, _, error = call(f"{flags} {FLAGS}")
        one_line = error.startswith("robustness.py: error: ") and error.count("\n") == 1
        if not (status == 2 and one_line and message in error):
            unlike[message] = (status, error)
    assert not unlike
    assert not Path("output").exists()


def test_an_image_that_is_all_border(made, call, tmp_path):
    path = tmp_path / "objectnet" / "banana" / "1.png"
    path.parent.mkdir(parents=True)
    Image.new("RGB", (4, 9)).save(path)
    status, _, error = call(f"{made.checkpoint} --objectnet {tmp_path}/objectnet --partial {FLAGS}")
    assert (status, "4 x 9 pixels are all border" in error, str(path) in error) == (2, True, True)
    status, _, error = call(f"{made.checkpoint} --objectnet {tmp_path}/objectnet --partial --on_bad_image skip {FLAGS}")
    assert (status, "nothing of objnet is left" in error) == (2, True)
