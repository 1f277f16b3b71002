"""Checkpoints that travel: MAE's layout, timm's, the Hub's and ONNX, loaded by the programs that they are for."""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.data import resolve_data_config

import scripts.convert as convert
from models_architectures import MODELS
from models_lut import LUT, MomentumEncoder
from models_vit import Classifier
from shared.calls import one_line
from shared.reference import tiny_student
from util.runtime.errors import UserError, run_main
from util.runtime.files import ROOT
from util.weights.checkpoint import load_checkpoint
from util.weights.classifiers import open_classifier
from util.weights.export import overlay_beside
from util.weights.interop import load_weights, read_weights
from util.weights.layouts import part_of
from util.weights.vit import open_vit

DATA = ROOT / "tests" / "files"
RELEASE = DATA / "release_lut_tiny.pth"
TINY = dict(embed_dim=24, depth=2, num_heads=3)  # of the files in tests/files
TINY_HEADS = ("--num_heads", "3")


@pytest.fixture
def run_convert(monkeypatch, capsys):
    """Call scripts/convert.py: what it prints."""

    def call(*arguments) -> str:
        monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, arguments)])
        run_main("convert.py", convert.main)
        return capsys.readouterr().out

    return call


def timm_from(printed: str):
    """Return the model that the printed call makes."""
    call = printed.splitlines()[-1]
    assert call.startswith("timm.create_model(")
    return eval(call, {"timm": timm}).eval()


def nano_classifier(pool: str, in_chans: int = 3, img_size: tuple[int, int] = (32, 32)) -> Classifier:
    torch.manual_seed(0)
    classifier = Classifier(
        MODELS["lut_vit_nano_patch4"], img_size=img_size, patch_size=8, in_chans=in_chans, num_classes=7, pool=pool,
        head_std=0.5,
    )  # fmt: skip
    for p in classifier.parameters():  # so that no norm is trivial
        p.data += 0.02 * torch.randn_like(p)
    return classifier.eval()


def test_a_round_trip_is_bit_equal(tmp_path, run_convert):
    run_convert(RELEASE, "--to", "mae", "--output", tmp_path / "mae.pth")
    run_convert(tmp_path / "mae.pth", "--to", "timm", "--output", tmp_path / "vit.safetensors", *TINY_HEADS)
    run_convert(tmp_path / "vit.safetensors", "--to", "mae", "--output", tmp_path / "back.pth")
    first = load_checkpoint(RELEASE)["model"]
    mae = load_checkpoint(tmp_path / "mae.pth")["model"]
    back = load_checkpoint(tmp_path / "back.pth")["model"]
    assert set(mae) == {name for name in first if part_of(name) in ("encoder", "decoder")}
    assert set(back) == set(load_file(tmp_path / "vit.safetensors")) == {n for n in first if part_of(n) == "encoder"}
    assert all(torch.equal(x, first[name]) for layout in (mae, back) for name, x in layout.items())
    student = tiny_student()
    load_weights(student, tmp_path / "back.pth")
    assert all(torch.equal(x, first[n]) for n, x in student.state_dict().items() if part_of(n) == "encoder")


@pytest.mark.parametrize("weights", ["student", "momentum"])
@pytest.mark.parametrize("to", ["timm", "hf"])
def test_features_are_those_of_our_encoder(tmp_path, run_convert, to, weights):
    output = tmp_path / ("vit.safetensors" if to == "timm" else "hub")
    printed = run_convert(RELEASE, "--to", to, "--output", output, "--weights", weights, *TINY_HEADS)
    encoder = tiny_student() if weights == "student" else MomentumEncoder(tiny_student())
    load_weights(encoder, RELEASE, weights)
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(timm_from(printed)(images), encoder.eval().features(images), rtol=1e-5, atol=1e-5)


def test_the_cls_token_can_be_exported(tmp_path, run_convert):
    printed = run_convert(RELEASE, "--to", "hf", "--output", tmp_path / "hub", "--pool", "token", *TINY_HEADS)
    student = tiny_student()
    load_weights(student, RELEASE)
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        from models_lut import patchify

        expected = student.eval().encode(patchify(images, 8))[:, 0]
        torch.testing.assert_close(timm_from(printed)(images), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pool", ["avg", "token"])
@pytest.mark.parametrize("to", ["timm", "hf"])
@pytest.mark.parametrize(("in_chans", "img_size"), [(3, (32, 32)), (1, (32, 48))])
def test_logits_are_those_of_our_classifier(tmp_path, run_convert, pool, to, in_chans, img_size):
    classifier = nano_classifier(pool, in_chans, img_size)
    config = {"model": "vit_nano_patch4", "input_size": list(img_size), "mean": [0.4] * in_chans, "std": []}
    torch.save({"model": classifier.state_dict(), "config": config}, tmp_path / "tuned.pth")
    output = tmp_path / ("vit.safetensors" if to == "timm" else "hub")
    model = timm_from(run_convert(tmp_path / "tuned.pth", "--to", to, "--output", output))
    images = torch.randn(5, in_chans, *img_size)
    with torch.no_grad():
        torch.testing.assert_close(model(images), classifier(images), rtol=1e-5, atol=1e-5)
    data_config = resolve_data_config(model=model)
    assert (tuple(data_config["mean"]), data_config["crop_pct"], tuple(data_config["input_size"])) == (
        (0.4,) * in_chans,
        1.0,
        (in_chans, *img_size),
    )
    if to == "timm":
        assert overlay_beside(output, in_chans)["mean"] == (0.4,) * in_chans
    else:
        saved = json.loads((output / "config.json").read_text())
        assert saved["pretrained_cfg"]["mean"] == [0.4] * in_chans
        assert saved["num_classes"] == 7


def test_a_fine_tuned_vit_base_loads_in_timm_by_its_own_name(tmp_path, run_convert):
    torch.manual_seed(0)
    shape = MODELS["lut_vit_base_patch16"] | dict(depth=12)
    classifier = Classifier(
        shape, img_size=(224, 224), patch_size=16, in_chans=3, num_classes=1000, head_std=0.02
    ).eval()  # fmt: skip
    torch.save({"model": classifier.state_dict()}, tmp_path / "tuned.pth")
    printed = run_convert(tmp_path / "tuned.pth", "--to", "timm", "--output", tmp_path / "vit.safetensors")
    assert 'create_model("vit_base_patch16_224", num_classes=1000, global_pool=' in printed
    model = timm.create_model(
        "vit_base_patch16_224", global_pool="avg", checkpoint_path=str(tmp_path / "vit.safetensors")
    ).eval()
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(model(images), classifier(images), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("output", ["classifier", "encoder"])
def test_onnx_runs_elsewhere_for_any_batch(tmp_path, run_convert, output):
    onnxruntime = pytest.importorskip("onnxruntime")
    if output == "classifier":
        model = nano_classifier("avg")
        torch.save({"model": model.state_dict(), "config": {"model": "vit_nano_patch4"}}, tmp_path / "in.pth")
        run_convert(tmp_path / "in.pth", "--to", "onnx", "--output", tmp_path / "vit.onnx")
    else:
        model = tiny_student().eval()
        load_weights(model, RELEASE)
        model.forward = model.features
        run_convert(RELEASE, "--to", "onnx", "--output", tmp_path / "vit.onnx", *TINY_HEADS)
    session = onnxruntime.InferenceSession(tmp_path / "vit.onnx", providers=["CPUExecutionProvider"])
    for batch in (1, 5):
        images = torch.randn(batch, 3, 32, 32)
        with torch.no_grad():
            exported = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
            torch.testing.assert_close(exported, model(images), rtol=1e-4, atol=1e-5)


def test_our_own_checkpoint_needs_no_more_flags(tmp_path, run_convert, pretrain, flat_folder):
    pretrain("--data_path", flat_folder, "--max_steps 1 --in_chans 1 --input_size 32 48")
    checkpoint = tmp_path / "run" / "checkpoint-0-step1.pth"
    model = timm_from(run_convert(checkpoint, "--to", "hf", "--output", tmp_path / "hub", "--weights", "momentum"))
    file = read_weights(checkpoint, "momentum")
    torch.manual_seed(0)
    images = torch.randn(2, 1, 32, 48)
    shape = MODELS["lut_vit_nano_patch4"] | dict(img_size=(32, 48), patch_size=8)
    student = LUT(**shape, in_chans=1)
    load_weights(student, checkpoint, "momentum")
    assert file.config["model"] == "lut_vit_nano_patch4"
    with torch.no_grad():
        torch.testing.assert_close(model(images), student.eval().features(images), rtol=1e-5, atol=1e-5)


WRONG = {
    "README --to mae --output OUT.pth": "README: cannot be read as a checkpoint",
    "RELEASE --to timm --output OUT.pth --num_heads 3": "--to timm writes a .safetensors file",
    "RELEASE --to timm --output OUT.safetensors": "IN does not tell its attention heads (LUT, student, 24 wide)",
    "RELEASE --to timm --output OUT.safetensors --num_heads 5": "--num_heads 5: does not divide the width 24",
    "RELEASE --to timm --output OUT.safetensors --num_heads 0": "--num_heads 0: does not divide the width 24",
    "RELEASE --to timm --output OUT.safetensors --input_size 32 64 96": "--input_size 32 64 96: give one number",
    "RELEASE --to timm --output OUT.safetensors --num_heads 3 --input_size 32 64": "does not give the 16 patches",
    "MAE --to timm --output OUT.safetensors --num_heads 3 --weights momentum": "holds no momentum encoder",
    "RELEASE --to keras --output OUT.h5": "keras",
    "RELEASE --to mae --output RELEASE": "would overwrite IN",
    "EMPTY --to timm --output OUT.safetensors": "holds no tensors",
    "HALF --to timm --output OUT.safetensors --num_heads 3": "blocks.1.attn.qkv.weight",
}


@pytest.mark.parametrize("arguments", WRONG)
def test_wrong_input_is_one_line(tmp_path, run_convert, capsys, arguments):
    (tmp_path / "README").write_text("no checkpoint")
    torch.save({}, tmp_path / "EMPTY")
    half = load_checkpoint(RELEASE)["model"]
    del half["blocks.1.attn.qkv.weight"]
    torch.save({"model": half}, tmp_path / "HALF")
    places = {"RELEASE": str(RELEASE), "MAE": str(DATA / "mae_full_tiny.pth")}
    places |= {name: str(tmp_path / name) for name in ("README", "EMPTY", "HALF")}
    call = [places.get(word, word).replace("OUT", str(tmp_path / "out")) for word in arguments.split()]
    with pytest.raises(SystemExit) as stop:
        run_convert(*call)
    assert stop.value.code == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert WRONG[arguments] in error[0]
    assert not (tmp_path / "out.safetensors").exists()


# ---- where an export may not go, and a disk that is full -------------------------------------------------------


def test_an_export_never_replaces_a_checkpoint(tmp_path, run_convert, capsys, pretrain, flat_folder):
    pretrain("--data_path", flat_folder, "--max_steps 1")
    run = tmp_path / "run"
    (checkpoint,) = run.glob("checkpoint-*.pth")
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    (tmp_path / "hard.pth").hardlink_to(checkpoint)
    (tmp_path / "soft.pth").symlink_to(checkpoint)
    (tmp_path / "folder").symlink_to(run)
    outputs = {
        "--to mae --output": (checkpoint, tmp_path / "hard.pth", tmp_path / "soft.pth", run / "new.pth"),
        "--to timm --output": (run / "vit.safetensors", tmp_path / "folder" / "vit.safetensors"),
        "--to hf --output": (run, run / "hub", tmp_path / "folder"),
        "--to mae --output ": (run / "exports" / "deep" / "mae.pth",),
    }
    for flags, paths in outputs.items():
        for path in paths:
            capsys.readouterr()
            with pytest.raises(SystemExit) as stop:
                run_convert(checkpoint, *flags.split(), path)
            assert stop.value.code == 2
            message = capsys.readouterr().err
            assert "would overwrite IN" in message or "lies in the folder of a run" in message
            assert len(message.splitlines()) == 1
    assert {path: path.read_bytes() for path in run.iterdir() if path.is_file()} == before
    with pytest.raises(SystemExit):  # nor another run's, by a link
        run_convert(RELEASE, "--to", "mae", "--output", tmp_path / "soft.pth")
    assert checkpoint.read_bytes() == before[checkpoint]


@pytest.mark.parametrize(("to", "name"), [("mae", "out.pth"), ("timm", "out.safetensors"), ("hf", "out")])
def test_a_full_disk_leaves_the_earlier_export_whole(small_disk, run_convert, capsys, to, name):
    run_convert(RELEASE, "--to", to, "--output", small_disk / name, *TINY_HEADS)
    files = {path: path.read_bytes() for path in small_disk.rglob("*") if path.is_file()}
    (small_disk / "ballast").write_bytes(bytes(2**20 - sum(-(-len(x) // 4096) * 4096 for x in files.values()) - 30_000))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_convert(RELEASE, "--to", to, "--output", small_disk / name, *TINY_HEADS)
    message = capsys.readouterr().err
    assert stop.value.code == 1
    assert "cannot be written" in message
    assert len(message.splitlines()) == 1
    (small_disk / "ballast").unlink()
    assert {path: path.read_bytes() for path in small_disk.rglob("*") if path.is_file()} == files


# ---- names of classes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["mae", "timm", "hf", pytest.param("onnx", marks=pytest.mark.slow)])
def test_names_of_classes_go_into_every_export(tmp_path, run_convert, to):
    classes = [f"class {number}" for number in range(7)]
    config = {"model": "vit_nano_patch4"}
    checkpoint = {"model": nano_classifier("avg").state_dict(), "config": config, "class_names": classes}
    torch.save(checkpoint, tmp_path / "tuned.pth")
    output = tmp_path / {"mae": "out.pth", "timm": "out.safetensors", "hf": "out", "onnx": "out.onnx"}[to]
    printed = run_convert(tmp_path / "tuned.pth", "--to", to, "--output", output)
    if to == "mae":
        assert read_weights(output).class_names == classes
    elif to == "onnx":
        onnx = pytest.importorskip("onnx")
        metadata = {entry.key: entry.value for entry in onnx.load(output).metadata_props}
        assert json.loads(metadata["label_names"]) == classes
    else:
        assert list(timm_from(printed).pretrained_cfg["label_names"]) == classes
    if to == "timm":
        assert list(overlay_beside(output, 3)["label_names"]) == classes
    if to == "hf":
        assert json.loads((output / "config.json").read_text())["label_names"] == classes


# ---- a damaged .json beside an export ------------------------------------------------------------------------

OVERLAY = dict(
    input_size=[3, 224, 224], interpolation="bicubic", crop_pct=0.9, mean=[0.5] * 3, std=[0.5] * 3, label_names=["cat"]
)
JUNK = ("x", -1, 10**30, float("nan"), None, True, [], [1, [2]], [5], ["a"] * 3, [float("inf")] * 3, {"a": {}})


def write_overlay(folder, **changed) -> Path:
    """Write the .json of an export with these values changed, and return the path of the weights beside it."""
    config = {"model_args": {"pretrained_cfg_overlay": OVERLAY | changed}}
    (folder / "x.json").write_text(json.dumps(config))
    return folder / "x.safetensors"


@pytest.mark.parametrize("key", OVERLAY)
def test_wrong_image_settings_beside_an_export_are_one_line(tmp_path, key):
    allowed = [["a"] * 3, []] if key == "label_names" else []
    for value in (each for each in JUNK if each not in allowed):
        with pytest.raises(UserError, match=rf"x\.json: unusable for a model of 3 channels: {key} ") as error:
            overlay_beside(write_overlay(tmp_path, **{key: value}), 3)
        one_line(error)


@pytest.mark.parametrize(
    "changed",
    [
        dict(input_size=[1, 224, 224]),
        dict(input_size=[3, 0, 224]),
        dict(input_size=[3, 10**6, 10**6]),
        dict(mean=[0.5]),
        dict(std=[0.5, 0.0, 0.5]),
        dict(crop_pct=1.5),
        dict(crop_pct=0),
    ],
)
def test_image_settings_out_of_range_are_refused(tmp_path, changed):
    with pytest.raises(UserError, match=next(iter(changed))):
        overlay_beside(write_overlay(tmp_path, **changed), 3)


@pytest.mark.parametrize("opener", [open_vit, partial(open_classifier, num_classes=1000, flag="CHECKPOINT")])
def test_wrong_image_settings_stop_every_opener(tmp_path, opener):
    path = write_overlay(tmp_path, std=-1)
    save_file(timm.create_model("vit_tiny_patch16_224").state_dict(), path)
    with pytest.raises(UserError, match=r"x\.json: unusable .* std -1"):
        opener(f"timm:vit_tiny_patch16_224={path}", None, "", (), None, device=torch.device("cpu"))


@pytest.mark.parametrize("opener", [open_vit, partial(open_classifier, num_classes=1000, flag="CHECKPOINT")])
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((192, 3, 0, 0), "patch_embed.proj.weight has the shape"),
        ((1, 1, 1000, 1000), "patch_embed.proj.weight has the shape"),  # resampling it would take hours
        ((1, 3, 16, 16), "does not fit|lacks"),
    ],
)
def test_patches_that_no_vit_has_reach_no_resampling_of_timm_s(tmp_path, opener, shape, message):
    path = tmp_path / "x.safetensors"
    state = timm.create_model("vit_tiny_patch16_224").state_dict()
    save_file(state | {"patch_embed.proj.weight": torch.zeros(shape)}, path)
    with pytest.raises(UserError, match=message) as error:
        opener(f"timm:vit_tiny_patch16_224={path}", None, "", (), None, device=torch.device("cpu"))
    one_line(error)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_pipe_beside_an_export_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.json")
    assert overlay_beside(tmp_path / "x.safetensors", 3) == {}
