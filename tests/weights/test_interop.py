"""Other programs' checkpoints: each loads whole, and is refused by name when a tensor is renamed, gone or reshaped."""

from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import save_file

from models_lut import LUT, MomentumEncoder, fixed_positions, patchify
from shared.reference import tiny_student
from util.runtime.errors import UserError
from util.runtime.files import ROOT
from util.weights.checkpoint import load_checkpoint
from util.weights.interop import load_weights
from util.weights.layouts import part_of

DATA = ROOT / "tests" / "files"
FILES = {
    "mae_encoder_only_tiny.pth": ("MAE encoder", {"decoder", "head", "predictor"}),
    "mae_full_tiny.pth": ("MAE with decoder", {"head", "predictor"}),
    "release_lut_tiny.pth": ("LUT, student", set()),
}


@pytest.mark.parametrize("name", FILES)
def test_published_layouts_load_whole(name):
    layout, missing_parts = FILES[name]
    student = tiny_student()
    report = load_weights(student, DATA / name)
    saved = load_checkpoint(DATA / name)["model"]
    assert report.layout == layout
    assert not report.unexpected
    assert not report.resampled
    assert {part_of(name) for name in report.missing} == missing_parts
    own = student.state_dict()
    assert set(report.loaded) == set(saved)
    assert all(torch.equal(own[n], saved[n]) for n in saved)


def test_the_momentum_encoder_of_the_release():
    momentum_encoder = MomentumEncoder(tiny_student())
    report = load_weights(momentum_encoder, DATA / "release_lut_tiny.pth", "momentum")
    saved = load_checkpoint(DATA / "release_lut_tiny.pth")["model_ema"]
    assert set(report.loaded) == set(momentum_encoder.state_dict())
    assert all(torch.equal(momentum_encoder.state_dict()[n], saved[f"ema.{n}"]) for n in report.loaded)
    with pytest.raises(UserError, match="holds no momentum encoder"):
        load_weights(momentum_encoder, DATA / "mae_full_tiny.pth", "momentum")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_stripped(tmp_path, prefix):
    saved = load_checkpoint(DATA / "mae_full_tiny.pth")["model"]
    torch.save({"model": {prefix + name: x for name, x in saved.items()}}, tmp_path / "wrapped.pth")
    assert set(load_weights(tiny_student(), tmp_path / "wrapped.pth").loaded) == set(saved)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["renamed", "missing", "reshaped"])
def test_a_damaged_encoder_is_refused_by_name(tmp_path, name, damage):
    checkpoint = load_checkpoint(DATA / name)
    model, victim = checkpoint["model"], "blocks.1.mlp.fc1.weight"
    tensor = model.pop(victim)
    if damage == "renamed":
        model["blocks.1.mlp.fc9.weight"] = tensor
    elif damage == "reshaped":
        model[victim] = tensor.T.contiguous()
    torch.save(checkpoint, tmp_path / name)
    student = tiny_student()
    before = {n: x.clone() for n, x in student.state_dict().items()}
    with pytest.raises(UserError) as refusal:
        load_weights(student, tmp_path / name)
    message = str(refusal.value)
    assert victim in message
    assert {"renamed": "blocks.1.mlp.fc9.weight", "missing": "(missing)", "reshaped": "[24, 96] instead of [96, 24]"}[
        damage
    ] in message
    assert all(torch.equal(x, before[n]) for n, x in student.state_dict().items())  # nothing was loaded


def timm_vit(img_size: int = 32, patch_size: int = 8, in_chans: int = 3):
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=img_size, patch_size=patch_size, in_chans=in_chans, embed_dim=24, depth=2,
        num_heads=3, num_classes=5,
    )  # fmt: skip


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_timm_weights_give_timm_s_tokens(tmp_path, suffix):
    vit, path = timm_vit().eval(), tmp_path / f"vit{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(vit.state_dict(), path)
    student = tiny_student().eval()
    report = load_weights(student, path)
    assert set(report.unexpected) == {"head.weight", "head.bias"}  # the classifier is no projector
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(student.encode(patchify(images, 8)), vit.forward_features(images), rtol=1e-4, atol=1e-5)


def test_other_grid_patch_and_channels_are_resampled_and_reported(tmp_path):
    torch.save(timm_vit(img_size=64, patch_size=16, in_chans=3).state_dict(), tmp_path / "vit.pth")
    shape = dict(patch_size=8, embed_dim=24, depth=2, num_heads=3)
    decoder = dict(decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
    student = LUT(img_size=(48, 48), in_chans=1, **shape, **decoder)
    report = load_weights(student, tmp_path / "vit.pth")
    assert len(report.resampled) == 2
    assert "pos_embed: 4 x 4 to 6 x 6 patches, interpolated" in report.resampled
    assert student.pos_embed.shape == (1, 37, 24)


def test_mae_s_positions_are_computed_anew_for_another_grid():
    c = dict(patch_size=8, embed_dim=24, depth=2, num_heads=3, in_chans=3)
    student = LUT(img_size=(32, 64), **c, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
    load_weights(student, DATA / "mae_full_tiny.pth")
    assert torch.equal(student.pos_embed, fixed_positions(24, (4, 8)))
    assert torch.equal(student.decoder_pos_embed, fixed_positions(16, (4, 8)))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((96, 160), (160, 96)),
        ((32, 128), (64, 64)),
        ((32, 72), (48, 48)),
        ((32, 72), (96, 96)),
        ((96, 160), (192, 320)),
    ],
)
@pytest.mark.parametrize("learned", [False, True])
def test_positions_of_any_grid_for_any_other(tmp_path, old, new, learned):
    shape = dict(patch_size=8, embed_dim=24, depth=2, num_heads=3, in_chans=3)
    decoder = dict(decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
    source, target = LUT(img_size=old, **shape, **decoder), LUT(img_size=new, **shape, **decoder)
    if learned:
        torch.nn.init.normal_(source.pos_embed)
    # a run of ours says how large its images were; sines say it themselves
    config = {"config": {"input_size": list(old)}} if learned else {}
    torch.save({"model": source.state_dict(), **config}, tmp_path / "source.pth")
    report = load_weights(target, tmp_path / "source.pth")
    rows, columns = old[0] // 8, old[1] // 8
    grid = (new[0] // 8, new[1] // 8)
    assert len(report.resampled) == 2
    assert report.resampled[0].startswith(f"pos_embed: {rows} x {columns} to {grid[0]} x {grid[1]} patches, ")
    if learned:
        of_patches = source.pos_embed[:, 1:].unflatten(1, (rows, columns)).permute(0, 3, 1, 2)
        resized = torch.nn.functional.interpolate(of_patches, grid, mode="bicubic", antialias=True)
        torch.testing.assert_close(target.pos_embed[0, 1:], resized[0].flatten(1).T)
    else:
        assert torch.equal(target.pos_embed, fixed_positions(24, grid))


@pytest.mark.parametrize("config", [{}, {"config": {"input_size": 224}}])
def test_learned_positions_that_fit_are_left_alone(tmp_path, config):
    shape = dict(img_size=(16, 64), patch_size=8, embed_dim=24, depth=2, num_heads=3, in_chans=3)  # 2 x 8 patches
    decoder = dict(decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
    source, target = LUT(**shape, **decoder), LUT(**shape, **decoder)
    torch.nn.init.normal_(source.pos_embed)
    torch.save({"model": source.state_dict(), **config}, tmp_path / "source.pth")
    assert not load_weights(target, tmp_path / "source.pth").resampled
    assert torch.equal(target.pos_embed, source.pos_embed)


@pytest.mark.parametrize("more", [{"init_values": 0.1}, {"qk_norm": True}, {"depth": 3}])
def test_an_encoder_with_layers_that_ours_has_not_is_refused(tmp_path, more):
    shape = dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=0) | more
    torch.save(timm.create_model("vit_tiny_patch16_224", **shape).state_dict(), tmp_path / "vit.pth")
    with pytest.raises(UserError, match=r"another encoder \(timm ViT\), \d+ of its tensors have no place"):
        load_weights(tiny_student(), tmp_path / "vit.pth")


def test_the_report_is_readable():
    report = str(load_weights(tiny_student(), DATA / "mae_full_tiny.pth"))
    assert "MAE with decoder, 50 tensors loaded" in report
    assert "left as initialised: head (7 tensors), predictor (7 tensors)" in report
