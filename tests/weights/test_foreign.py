"""Files in the layouts of other programs: features equal timm's own computation, and nothing is guessed silently."""

from __future__ import annotations

import argparse
import re

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

import scripts.convert as convert
import scripts.probe as probe
from models_vit import Classifier
from shared.calls import one_line, script_caller
from shared.checkpoints import save_lut
from shared.reference import tiny_student
from util.runtime.errors import UserError
from util.runtime.files import ROOT
from util.weights.checkpoint import load_checkpoint
from util.weights.interop import load_weights, read_weights
from util.weights.vit import num_heads_of, open_vit, tokens_of

CPU = torch.device("cpu")
SHAPE = dict(img_size=32, patch_size=16, depth=2)


def random_vit(width: int, heads: int, seed: int = 0, **more) -> VisionTransformer:
    """Return a ViT of timm's with attention far from uniform, so that other numbers of heads give other features."""
    torch.manual_seed(seed)
    model = VisionTransformer(**SHAPE | dict(embed_dim=width, num_heads=heads, num_classes=0) | more).eval()
    for p in model.parameters():
        p.data += (0.06 if p.ndim == 2 else 0.02) * torch.randn_like(p)
    return model


def under(prefix: str, model: VisionTransformer) -> dict[str, torch.Tensor]:
    return {prefix + name: x for name, x in model.state_dict().items()}


def within_blocks(wrapper: str, model: VisionTransformer) -> dict[str, torch.Tensor]:
    return {re.sub(r"(blocks\.\d+\.)", rf"\1{wrapper}", name): x for name, x in model.state_dict().items()}


def opened(path, weights="student", num_heads=None):
    return open_vit(str(path), weights, "", (), num_heads, CPU)


MOCO_HEAD = {"module.predictor.0.weight": torch.zeros(2, 64)}
LAYOUTS = {
    # name: (width, heads, contents of the file from the right and from another network, what is said)
    "MoCo v3": (
        (384, 12),
        lambda a, b: {
            "arch": "vit_small",
            "state_dict": under("module.base_encoder.", a) | under("module.momentum_encoder.", b) | MOCO_HEAD,
        },
        "MoCo v3",
    ),
    "MoCo v3 without arch": (
        (384, 12),
        lambda a, b: {"state_dict": under("module.base_encoder.", a) | under("module.momentum_encoder.", b)},
        "MoCo v3",
    ),
    "MoCo v3, linear": ((384, 12), lambda a, b: {"arch": "vit_small", "state_dict": under("module.", a)}, "timm ViT"),
    "MoCo v3 base": ((768, 12), lambda a, b: {"arch": "vit_base", "state_dict": under("base_encoder.", a)}, "MoCo v3"),
    "DINO": (
        (384, 6),
        lambda a, b: {
            "student": under("module.backbone.", b),
            "teacher": under("backbone.", a) | {"head.mlp.0.weight": torch.zeros(2, 384)},
            "args": argparse.Namespace(arch="vit_small", patch_size=16),
        },
        "DINO or iBOT (teacher; student not used)",
    ),
    "iBOT": ((192, 3), lambda a, b: {"teacher": under("module.backbone.", a)}, "DINO or iBOT (teacher)"),
    "timm, trained": (
        (384, 6),
        lambda a, b: {
            "arch": "vit_small_patch16_224",
            "state_dict": a.state_dict(),
            "state_dict_ema": b.state_dict(),
        },
        "timm ViT (state_dict; state_dict_ema not used)",
    ),
    "DeiT": (
        (192, 3),
        lambda a, b: {"model": a.state_dict(), "args": {"model": "deit_tiny_patch16_224"}},
        "MAE encoder",
    ),
    "timm, a tag of another version": (
        (192, 3),
        lambda a, b: {"arch": "vit_tiny_patch16_224.of_another_version", "state_dict": a.state_dict()},
        "timm ViT",
    ),
    "DeepSpeed": ((768, 12), lambda a, b: {"module": under("module.", a), "ds_version": "0.16"}, "timm ViT"),
    "compiled and wrapped": ((192, 3), lambda a, b: {"model": under("_orig_mod.module.", a)}, "MAE encoder"),
    "wrapped and compiled": ((192, 3), lambda a, b: {"model": under("module._orig_mod.", a)}, "MAE encoder"),
    "Lightning": ((192, 3), lambda a, b: {"state_dict": under("model.encoder.backbone.", a)}, "timm ViT"),
    "checkpointed": ((192, 3), lambda a, b: under("encoder._checkpoint_wrapped_module.module.", a), "timm ViT"),
    "checkpointed blocks": ((192, 3), lambda a, b: within_blocks("_checkpoint_wrapped_module.", a), "timm ViT"),
    "compiled blocks, FSDP": (
        (192, 3),
        lambda a, b: {
            f"_fsdp_wrapped_module.{name}": x for name, x in within_blocks("_fsdp_wrapped_module._orig_mod.", a).items()
        },
        "timm ViT",
    ),
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_features_are_those_of_an_independent_computation(tmp_path, kind):
    (width, heads), contents, described = LAYOUTS[kind]
    vit, other = random_vit(width, heads), random_vit(width, heads, seed=1)
    torch.save(contents(vit, other), tmp_path / "file.pth")
    ours = opened(tmp_path / "file.pth")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(tokens_of(ours.model, images), vit.forward_features(images), rtol=1e-5, atol=1e-5)
    assert num_heads_of(ours.model) == heads
    assert f"file.pth: {described}, " in ours.origin
    assert f"; {heads} attention heads" in ours.origin


@pytest.mark.parametrize("kind", ["timm, trained", "MoCo v3", "DINO"])
def test_the_moving_average_is_taken_when_asked_for(tmp_path, kind):
    (width, heads), contents, _ = LAYOUTS[kind]
    first, second = random_vit(width, heads), random_vit(width, heads, seed=1)
    torch.save(contents(first, second), tmp_path / "file.pth")
    ours = opened(tmp_path / "file.pth", "momentum")
    expected = first if kind == "DINO" else second  # DINO's teacher is its moving average
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            tokens_of(ours.model, images), expected.forward_features(images), rtol=1e-5, atol=1e-5
        )
    average = {"timm, trained": "state_dict_ema", "MoCo v3": "momentum_encoder", "DINO": "teacher"}[kind]
    assert f"({average}" in ours.origin


def test_two_networks_under_one_name_are_refused(tmp_path):
    vit = random_vit(192, 3)
    torch.save({"state_dict": under("encoder.", vit) | under("backbone.", vit)}, tmp_path / "file.pth")
    with pytest.raises(UserError, match=r"holds two networks: two tensors are named cls_token"):
        opened(tmp_path / "file.pth")


# ---- heads -------------------------------------------------------------------------------------------------


def test_a_bare_vit_small_asks_for_its_heads(tmp_path):
    vit = random_vit(384, 12)
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    with pytest.raises(UserError, match=r"--num_heads: .*does not tell its attention heads .*MoCo v3's ViT-S has 12"):
        opened(tmp_path / "vit.pth")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        tokens = tokens_of(opened(tmp_path / "vit.pth", num_heads=12).model, images)
        torch.testing.assert_close(tokens, vit.forward_features(images), rtol=1e-5, atol=1e-5)


def test_other_heads_than_the_models_are_refused_unless_the_flag_says_so(tmp_path):
    torch.save(LAYOUTS["MoCo v3"][1](random_vit(384, 12), random_vit(384, 12)), tmp_path / "moco.pth")
    shape = dict(embed_dim=384, depth=2, num_heads=6)
    model = Classifier(shape, img_size=(32, 32), patch_size=16, in_chans=3, num_classes=0, pool="token")
    with pytest.raises(UserError, match=r"trained with 12 attention heads .*model has 6: add --num_heads 12") as error:
        load_weights(model, tmp_path / "moco.pth", flag="--finetune")
    one_line(error)
    report = load_weights(model, tmp_path / "moco.pth", flag="--finetune", num_heads=6)
    assert "6 attention heads, as --num_heads says; those of MoCo v3 have 12" in str(report)
    torch.save(random_vit(384, 12).state_dict(), tmp_path / "bare.pth")
    report = load_weights(model, tmp_path / "bare.pth", flag="--finetune")
    assert "the file does not tell its attention heads, 6 taken as the model has them" in str(report)


def test_every_main_has_the_flag(tmp_path, capsys, finetune, linprobe, segment, pretrain, class_folders, scenes):
    vit = random_vit(96, 12, img_size=32, patch_size=8, depth=6)
    moco = {"state_dict": under("base_encoder.", vit), "num_heads": 12}
    torch.save(moco, tmp_path / "moco.pth")
    calls = {
        finetune: ("--finetune", class_folders, "--max_steps 1"),
        linprobe: ("--finetune", class_folders, "--max_steps 1"),
        segment: ("--finetune", scenes, "--max_updates 1 --warmup_updates 0"),
        pretrain: ("--init_from", class_folders, "--max_steps 1"),
    }
    for number, (call, (flag, data, more)) in enumerate(calls.items()):
        flags = (flag, tmp_path / "moco.pth", "--data_path", data, more)
        with pytest.raises(SystemExit):
            call(*flags, output=tmp_path / f"refused-{number}")
        assert "add --num_heads 12" in capsys.readouterr().err
        call(*flags, "--num_heads 12", output=tmp_path / f"run-{number}")
        (checkpoint,) = (tmp_path / f"run-{number}").glob("checkpoint-[0-9]*.pth")
        assert read_weights(checkpoint).num_heads == 12  # so that an export or an analysis has it too


@pytest.mark.parametrize("to", ["mae", "timm", "hf"])
def test_an_export_tells_its_heads(tmp_path, monkeypatch, capsys, to):
    torch.save(random_vit(384, 12).state_dict(), tmp_path / "vit.pth")
    call = script_caller(monkeypatch, capsys, tmp_path, convert)
    output = {"mae": "out.pth", "timm": "out.safetensors", "hf": "out"}[to]
    status, _, message = call(f"vit.pth --to {to} --output {output} --num_heads 12")
    assert status == 0, message
    path = tmp_path / ("out/model.safetensors" if to == "hf" else output)
    assert num_heads_of(opened(path).model) == 12


# ---- what is refused, by name ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18"])
def test_an_unknown_tag_of_timm_s_is_one_line(name):
    with pytest.raises(UserError, match=f"timm:{name}.bogus: timm knows no such tag of {name}") as error:
        opened(f"timm:{name}.bogus")
    one_line(error)


@pytest.mark.parametrize(
    ("name", "registers"), [("vit_small_patch14_dinov2", False), ("vit_small_patch14_reg4_dinov2", True)]
)
def test_dinov2_is_called_by_its_name_and_opened_by_timm_s(tmp_path, name, registers):
    torch.manual_seed(0)
    vit = timm.create_model(name, img_size=28, depth=2).eval()
    published = {k.replace("reg_token", "register_tokens"): x for k, x in vit.state_dict().items()}
    published |= {"mask_token": torch.zeros(1, 384)}
    if registers:  # the published positions have one for the cls token too
        published["pos_embed"] = torch.cat([torch.zeros(1, 1, 384), published["pos_embed"]], dim=1)
    torch.save(published, tmp_path / "dinov2.pth")
    layers = "LayerScale, registers, patch 14" if registers else "LayerScale, patch 14"
    for refused in (
        lambda: opened(tmp_path / "dinov2.pth"),
        lambda: load_weights(tiny_student(), tmp_path / "dinov2.pth"),
    ):
        with pytest.raises(UserError, match=rf"is a file of DINOv2 \({layers}\)") as error:
            refused()
        assert f"timm:{'vit_small_patch14_dinov2'}=FILE" in one_line(error)


SPOILED = {
    "NaN": lambda x: x.fill_(float("nan")),
    "infinity": lambda x: x.view(-1)[0].fill_(float("inf")),
    "integers": lambda x: x.long(),
    "complex": lambda x: x.to(torch.complex64),
}


@pytest.mark.parametrize("kind", SPOILED)
@pytest.mark.parametrize("where", ["load", "analysis", "convert", "probe"])
def test_unusable_numbers_are_one_line(tmp_path, monkeypatch, capsys, kind, where):
    path = save_lut(tmp_path / "lut.pth")
    checkpoint = load_checkpoint(path)
    name = "blocks.1.mlp.fc1.weight"
    checkpoint["model"][name] = SPOILED[kind](checkpoint["model"][name].clone())
    torch.save(checkpoint, path)
    if where in ("load", "analysis"):
        with pytest.raises(UserError) as error:
            load_weights(tiny_student(), path) if where == "load" else opened(path)
        message = one_line(error)
    else:
        script, flags = (convert, "--to mae --output out.pth") if where == "convert" else (probe, "--dataset digits")
        status, _, message = script_caller(monkeypatch, capsys, tmp_path, script)(f"lut.pth {flags}")
        assert status == 2
        assert len(message.splitlines()) == 1
    assert name in message
    assert "NaN or infinity" in message if kind in ("NaN", "infinity") else "no floating-point numbers" in message


def test_a_run_is_not_evaluated_or_resumed_on_nan(tmp_path, finetune, class_folders, capsys):
    finetune("--data_path", class_folders, "--max_steps 1")
    (path,) = (tmp_path / "run").glob("checkpoint-[0-9]*.pth")
    checkpoint = load_checkpoint(path)
    checkpoint["model"]["head.bias"].fill_(float("nan"))
    torch.save(checkpoint, tmp_path / "nan.pth")
    for flags in ("--eval --resume", "--resume", "--finetune"):
        with pytest.raises(SystemExit):
            finetune("--data_path", class_folders, flags, tmp_path / "nan.pth", output=tmp_path / "other")
        assert "NaN or infinity in 1 tensors: head.bias" in capsys.readouterr().err


@pytest.mark.parametrize("flags", ["--to mae", "--to timm --num_heads 3", "--to hf --num_heads 3"])
@pytest.mark.parametrize("damage", ["last block", "inner block", "norm"])
def test_an_incomplete_encoder_is_not_exported(tmp_path, monkeypatch, capsys, flags, damage):
    checkpoint = load_checkpoint(ROOT / "tests" / "files" / "mae_full_tiny.pth")
    prefix = {"last block": "blocks.1.norm2", "inner block": "blocks.0.", "norm": "norm."}[damage]
    checkpoint["model"] = {n: x for n, x in checkpoint["model"].items() if not n.startswith(prefix)}
    torch.save(checkpoint, tmp_path / "in.pth")
    suffix = {"mae": ".pth", "timm": ".safetensors", "hf": ""}[flags.split()[1]]
    status, _, message = script_caller(monkeypatch, capsys, tmp_path, convert)(f"in.pth {flags} --output out{suffix}")
    assert status == 2
    assert prefix.removesuffix(".") in message
    assert not (tmp_path / f"out{suffix}").exists()


def test_a_missing_last_block_is_refused_for_our_runs_and_said_for_others(tmp_path):
    path = save_lut(tmp_path / "lut.pth")
    checkpoint = load_checkpoint(path)
    checkpoint["model"] = {n: x for n, x in checkpoint["model"].items() if not n.startswith("blocks.5.")}
    torch.save(checkpoint, path)
    with pytest.raises(UserError, match="holds 5 blocks, but its run's --model has 6"):
        opened(path)
    torch.save({"model": checkpoint["model"]}, path)
    assert "5 blocks, but models of width 96 have 6" in opened(path, num_heads=3).origin


def test_mae_s_training_checkpoint_is_not_resumed_from(tmp_path, pretrain, class_folders, capsys):
    mae = load_checkpoint(ROOT / "tests" / "files" / "mae_full_tiny.pth")
    checkpoint = mae | {"optimizer": {"state": {}, "param_groups": []}, "epoch": 7, "scaler": {}}
    torch.save(checkpoint, tmp_path / "mae.pth")
    with pytest.raises(SystemExit):
        pretrain("--data_path", class_folders, "--resume", tmp_path / "mae.pth")
    message = capsys.readouterr().err
    assert "mae.pth: holds model, " in message
    assert " after epoch 7, but not the state of a run of this program" in message
    assert "by --init_from" in message
    assert len(message.splitlines()) == 1
