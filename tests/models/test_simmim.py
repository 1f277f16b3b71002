"""SimMIM against a slow version that keeps the image's order: masks, losses, gradients, pictures, runs, recipes."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import main_pretrain
from models_encoder import mask_squares, patchify
from models_lut import LUT, MomentumEncoder, Steering
from models_simmim import SimMIM
from shared.calls import caller
from shared.flags import TINY
from shared.models import TINY_MODEL, head_by_hand, images, noise
from util.config.classifier import FinetuneConfig
from util.config.command_line import parse_config
from util.config.pretrain import PretrainConfig
from util.optim.optimizer import build_optimizer
from util.weights.checkpoint import load_checkpoint

quick = settings(max_examples=60, deadline=None)
SHAPE = {name: value for name, value in TINY_MODEL.items() if not name.startswith("decoder")}


def tiny(**changes) -> SimMIM:
    """4 x 6 patches of 2 x 2 pixels, hidden in squares of 2 x 2 patches: 4 of 6 squares, always the same weights."""
    torch.manual_seed(0)
    return SimMIM(**SHAPE | dict(mask_ratio=0.6, mask_unit_patches=2, norm_pix_loss=False) | changes).double()


# ---- masks -------------------------------------------------------------------------------------------------


@quick
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.integers(1, 9), st.integers(0, 2**32))
def test_masks_are_of_whole_squares_and_of_the_exact_share(unit, rows, cols, tenths, seed):
    grid, ratio = (rows * unit, cols * unit), tenths / 10
    rng = np.random.default_rng(seed)
    masking = mask_squares(torch.from_numpy(rng.random((3, grid[0] * grid[1]), dtype=np.float32)), ratio, unit, grid)
    squares = masking.mask.reshape(3, rows, unit, cols, unit).transpose(2, 3).flatten(3)
    assert torch.equal(squares.amin(-1), squares.amax(-1))
    hidden = squares[..., 0].flatten(1).sum(1)
    exact = math.ceil(Fraction(tenths, 10) * rows * cols)  # as SimMIM rounds
    rounding = int(rows * cols * (1 - ratio)) != rows * cols - exact  # 1 - 0.9 is less than a tenth in binary
    assert torch.equal(hidden, torch.full((3,), float(exact + rounding)))
    assert torch.equal(masking.shuffle.sort(1).values, torch.arange(grid[0] * grid[1]).expand(3, -1))


def test_masks_of_the_paper_s_size():
    rows = torch.rand(2000, 196, generator=torch.Generator().manual_seed(0))
    masking = mask_squares(rows, 0.6, 2, (14, 14))
    assert masking.num_visible == 4 * 19  # SimMIM hides 30 of the 49 squares of 32 pixels
    share = masking.mask.mean(0)
    assert (share - 30 / 49).abs().max() < 5 * math.sqrt(0.25 / 2000)  # no place is preferred
    config = parse_config(PretrainConfig, ["--method", "simmim"], "main_pretrain.py")
    assert (config.mask_unit_pixels, config.resolved_mask_ratio) == (32, 0.6)
    assert [config.model_arguments[name] for name in ("mask_unit_patches", "mask_ratio")] == [2, 0.6]


# ---- losses ------------------------------------------------------------------------------------------------


def slow_latent(student: SimMIM, batch: Tensor, hidden: Tensor) -> Tensor:
    """[B, 1 + L, D] in the image's order: all patches are embedded, then mask tokens take the place of hidden ones."""
    x = student.patch_embed(batch)
    x = torch.where(hidden[..., None], student.mask_token, x) + student.pos_embed[:, 1:]
    cls = (student.cls_token + student.pos_embed[:, :1]).expand(len(x), -1, -1)
    x = torch.cat([cls, x], dim=1)
    for block in student.blocks:
        x = block(x)
    return student.norm(x)


def slow_mim(student: SimMIM, batch: Tensor, hidden: Tensor) -> Tensor:
    """Mean absolute error over the hidden pixels, as SimMIM writes it: errors of all, times the mask."""
    prediction = student.decoder(slow_latent(student, batch, hidden)[:, 1:])
    target = patchify(batch, 2)
    if student.norm_pix_loss:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    return ((prediction - target).abs() * hidden[..., None]).sum() / (hidden.sum() * target.shape[-1])


def hidden_of(student: SimMIM, batch: int, view: int = 0) -> Tensor:
    visible = student.mask(noise(batch)).visible_ids(view)
    return torch.ones(batch, 24).scatter_(1, visible, 0.0).bool()


@pytest.mark.parametrize("norm_pix_loss", [False, True])
@pytest.mark.parametrize("mask_unit", [1, 2])
def test_loss_and_gradients_are_those_of_the_slow_version(norm_pix_loss, mask_unit):
    student = tiny(norm_pix_loss=norm_pix_loss, mask_unit_patches=mask_unit, heads=None)
    x, gradients = 3 + 2 * images(5, 3, 8, 12), []
    for loss in (student(x[None], noise(5)).mim, slow_mim(student, x, hidden_of(student, 5))):
        student.zero_grad()
        loss.backward()
        gradients.append([loss.detach().double(), *(p.grad.clone() for p in student.parameters())])
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


def test_only_hidden_pixels_are_predicted_and_only_visible_ones_seen():
    student, x = tiny(heads=None), images(5, 3, 8, 12)
    masking, patches, hidden = student.mask(noise(5)), patchify(x, 2), hidden_of(student, 5)[..., None]
    latent = student.encode_views(patches, masking)
    assert torch.equal(student.encode_views(patches.masked_fill(hidden, math.nan), masking), latent)
    tokens = student.decode(latent, masking, hidden_only=True)
    loss = student.mim_loss(tokens, patches, masking)
    assert torch.equal(student.mim_loss(tokens, torch.where(hidden, patches, 7 + patches), masking), loss)
    assert student.mim_loss(tokens, torch.where(hidden, 7 + patches, patches), masking) != loss
    moved = torch.where(hidden[:, :, 0].reshape(5, 1, 4, 6).repeat_interleave(2, 2).repeat_interleave(2, 3), x, 7 + x)
    assert student(moved[None], noise(5)).mim != student(x[None], noise(5)).mim  # what is seen helps to predict


@pytest.mark.parametrize("kind", ["avg", "cls"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_l_bc_pulls_the_visible_tokens_of_the_full_sequence(kind, symmetric):
    student, views = tiny(steering=Steering(context_token=kind)), images(2, 5, 3, 8, 12)
    encoder = MomentumEncoder(student).double()
    targets = encoder(views.flip(0) if symmetric else views[1:], noise(5))
    expected = []
    for view in range(1 + symmetric):
        hidden = hidden_of(student, 5, view)
        latent = slow_latent(student, views[view], hidden)
        pairs = zip(latent, hidden, strict=True)
        visible_features = torch.stack([x[1:][~gone].mean(0) if kind == "avg" else x[0] for x, gone in pairs])
        prediction = head_by_hand(student.predictor, head_by_hand(student.head, visible_features)[0])[0]
        unmasked = slow_latent(student, views[1 - view], torch.zeros(5, 24, dtype=torch.bool))  # the same weights still
        target = encoder.head(unmasked[:, 1:].mean(1) if kind == "avg" else unmasked[:, 0])
        expected.append((F.normalize(prediction) - F.normalize(target)).square().sum(1).mean())
    actual = student(views if symmetric else views[:1], noise(5), targets).bc
    torch.testing.assert_close(actual.double(), torch.stack(expected).mean(), rtol=1e-5, atol=1e-8)


def test_steering_all_pulls_the_mean_of_what_mask_tokens_become():
    student, views = tiny(steering=Steering(steered_tokens="all")), images(2, 5, 3, 8, 12)
    targets = MomentumEncoder(student).double()(views[1:], noise(5))
    hidden = hidden_of(student, 5)
    latent, terms = slow_latent(student, views[0], hidden)[:, 1:], []
    visible_heads, hidden_heads = (student.head, student.predictor), (student.mask_head, student.mask_predictor)
    for selected, (projector, predictor) in ((~hidden, visible_heads), (hidden, hidden_heads)):
        x = torch.stack([tokens[keep].mean(0) for tokens, keep in zip(latent, selected, strict=True)])
        prediction = head_by_hand(predictor, head_by_hand(projector, x)[0])[0]
        terms.append((F.normalize(prediction) - F.normalize(targets.context[0])).square().sum(1).mean())
    torch.testing.assert_close(student(views[:1], noise(5), targets).bc.double(), sum(terms) / 2, rtol=1e-5, atol=1e-8)


# ---- the model ---------------------------------------------------------------------------------------------


def test_pictures_are_in_the_image_s_order():
    student, x = tiny(heads=None), images(3, 3, 8, 12)
    mask, prediction = student.reconstruct(x, noise(3))
    assert torch.equal(mask.bool(), hidden_of(student, 3))
    expected = student.decoder(slow_latent(student, x, hidden_of(student, 3))[:, 1:])
    torch.testing.assert_close(prediction, expected, rtol=0, atol=1e-12)


def test_the_encoder_is_mae_s_with_a_mask_token():
    simmim, mae = tiny().state_dict(), LUT(**TINY_MODEL).state_dict()
    encoder = [name for name in mae if not name.startswith(("decoder", "mask_token", "head", "predictor"))]
    heads = [name for name in mae if name.startswith(("head", "predictor"))]
    assert set(simmim) == {*encoder, *heads, "mask_token", "decoder.weight", "decoder.bias"}
    assert all(simmim[name].shape == mae[name].shape for name in (*encoder, *heads))
    assert simmim["mask_token"].shape == (1, 1, 12)
    assert simmim["decoder.weight"].shape == (12, 12)
    alone = tiny(heads=None).state_dict()
    assert all(torch.equal(x, simmim[name]) for name, x in alone.items())  # the same start with L_BC and without
    followed = MomentumEncoder(tiny()).state_dict()
    assert set(followed) == {*encoder, *(name for name in heads if name.startswith("head"))}


def test_the_mask_token_learns_at_the_rate_of_the_stem():
    student = tiny()
    optimizer = build_optimizer(student, 1e-3, (0.9, 0.95), 0.05, layer_decay=0.5)
    scales = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert scales[id(student.mask_token)] == scales[id(student.cls_token)] == 0.5 ** (len(student.blocks) + 1)
    assert scales[id(student.decoder.weight)] == 1


# ---- runs --------------------------------------------------------------------------------------------------


@pytest.fixture
def simmim(monkeypatch, tmp_path):
    """Call main_pretrain.py with a tiny SimMIM and the given flags."""
    return caller(monkeypatch, tmp_path, main_pretrain, TINY.replace("--decoder_depth 1", "--method simmim"))


def test_the_loss_falls_on_digits(simmim, tmp_path):
    data = "--dataset digits --in_chans 1 --no_photometric --monitor_freq 1 --monitor_images 20"
    log = simmim(data, "--batch_size 16 --epochs 1 --warmup_epochs 0.1 --lr 3e-3 --max_steps 40 --alpha 0.25")
    curve = [line["mim"] for line in log if "mim" in line]
    assert sum(curve[-5:]) < 0.75 * sum(curve[:5])
    assert all("bc" in line for line in log if "mim" in line)
    assert (tmp_path / "run" / "pictures" / "reconstruction-0001.png").exists()


def test_from_mae_s_weights_to_a_classifier(simmim, pretrain, finetune, class_folders, tmp_path, capsys):
    data = ("--data_path", class_folders)
    pretrain(*data, "--max_steps 1", output=tmp_path / "mae")
    simmim(*data, "--max_steps 2 --init_from", tmp_path / "mae" / "checkpoint-0-step1.pth", output=tmp_path / "pre")
    assert "left as initialised: decoder (3 tensors)" in capsys.readouterr().out
    finetune(*data, "--max_steps 1 --finetune", tmp_path / "pre" / "checkpoint-0-step2.pth")
    assert "SimMIM, student, 76 tensors loaded" in capsys.readouterr().out


def test_a_resumed_run_ends_bit_equal(simmim, flat_folder, tmp_path):
    flags = ("--data_path", flat_folder, "--distance infonce --context_mask_ratio 0.5")
    simmim(*flags, output=tmp_path / "whole")
    simmim(*flags, "--max_steps 3", output=tmp_path / "parts")
    simmim(*flags, "--auto_resume", output=tmp_path / "parts")
    a, b = (load_checkpoint(tmp_path / run / "checkpoint-1.pth") for run in ("whole", "parts"))
    for part in ("model", "model_ema"):
        assert all(torch.equal(x, b[part][name]) for name, x in a[part].items())


# ---- recipes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "alpha"), [("simmim_vit_base", 0), ("simmim_lut_vit_base", 0.25)])
def test_recipes_are_table_a_s(name, alpha, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    config = parse_config(PretrainConfig, ["--recipe", name], "main_pretrain.py")
    assert (config.method, config.model, config.resolved_input_size) == ("simmim", "lut_vit_base_patch16", (224, 224))
    assert (config.resolved_mask_ratio, config.mask_unit_pixels, config.norm_pix_loss) == (0.6, 32, False)
    assert (config.epochs, config.resolved_alpha, config.w_mim) == (100, alpha, 1)
    assert (config.effective_batch, config.peak_lr) == (2048, pytest.approx(4e-4))


def test_the_recipe_of_fine_tuning_is_simmim_s(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    config = parse_config(FinetuneConfig, ["--recipe", "finetune_simmim_vit_base"], "main_finetune.py")
    assert (config.effective_batch, config.peak_lr) == (2048, pytest.approx(5e-3))
    assert (config.epochs, config.warmup_epochs, config.layer_decay, config.drop_path) == (100, 20, 0.65, 0.1)
