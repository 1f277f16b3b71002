"""The plain baseline does what ours does, and the bench refuses to compare what differs."""

from __future__ import annotations

import math

import pytest
import torch

import util.bench.baseline
from shared.bench import CPU, FORMS, variants
from shared.calls import one_line
from util.bench.baseline import PlainTrainer
from util.bench.measure import check_losses, measure
from util.bench.step import Stepper
from util.bench.timing import compiled_graphs
from util.runtime.errors import RunError
from util.train.pretraining import build_state


# ---- the plain baseline does what ours does -----------------------------------------------------------------
@pytest.mark.parametrize("norm_pix_loss", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_losses_and_gradients_of_the_baseline_are_ours(form, norm_pix_loss):
    flags = f"--forms {form} " + ("--norm_pix_loss" if norm_pix_loss else "")
    config = variants(flags)[0].config
    state, _ = build_state(config, None, CPU)
    student, g = state.model, state.model_ema
    plain_student = build_state(config, None, CPU)[0].model
    plain = PlainTrainer(config, plain_student, CPU, None, total_updates=10)
    views, noise = torch.randn(2, 6, 3, *config.resolved_input_size), torch.rand(6, config.num_patches)

    targets = None
    if form == "asymmetric":
        targets = g(views[1:], noise)
    elif form == "symmetric":
        targets = g(views.flip(0), noise)
    ours = student(views if form == "symmetric" else views[:1], noise, targets)
    mim, bc = plain.losses(views, noise, plain.targets(views))
    assert mim.item() == pytest.approx(ours.mim.item(), rel=1e-5)
    assert bc.item() == pytest.approx(ours.bc.item(), rel=1e-5)
    assert (bc.item() > 0) == (form != "mae")

    (ours.mim + ours.bc).backward()
    (mim + bc).backward()
    gradients = {name: p.grad for name, p in student.named_parameters()}
    largest_gradient = max(g.abs().max().item() for g in gradients.values())
    for name, p in plain_student.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-4, atol=1e-5 * largest_gradient, msg=name)


@pytest.mark.parametrize("form", FORMS)
def test_both_train_alike_over_several_updates(form):
    ours, plain = (Stepper(variant) for variant in variants(f"--forms {form} --lr 1e-3 --momentum 0.5 --clip_grad 1"))
    losses = check_losses([ours, plain], 4)
    values = losses[f"{form} ours"]
    assert values == pytest.approx(losses[f"{form} plain"], rel=1e-5)
    assert len({round(x, 5) for x in values}) == 4  # the learning rate is not zero
    if form != "mae":  # and the momentum encoder has followed alike
        teacher_weights = dict(plain.trainer.teacher.named_parameters())
        start = dict(Stepper(ours.variant).trainer.state.model_ema.named_parameters())
        for name, p in ours.trainer.state.model_ema.named_parameters():
            torch.testing.assert_close(p, teacher_weights[name], rtol=0, atol=1e-4)
        moved = max((p - start[name]).abs().max().item() for name, p in teacher_weights.items() if name in start)
        assert moved > 1e-3


def test_the_baseline_uses_no_flag_of_speed():
    (variant,) = variants("--forms mae --variants plain --cache ram --checkpoint_activations", "compile=block,whole")
    stepper, graphs = Stepper(variant), compiled_graphs()
    stepper.updates(1)
    assert compiled_graphs() == graphs
    assert not stepper.config.checkpoint_activations


def test_accumulation_in_the_baseline_is_ours():
    pair = [Stepper(variant) for variant in variants("--forms asymmetric --accum_iter 2 --head_norm_layer LN")]
    check_losses(pair, 3)
    assert pair[0].variant.images == 12


# ---- refusing -----------------------------------------------------------------------------------------------
def test_variants_whose_losses_differ_are_not_compared(monkeypatch):
    right = util.bench.baseline.mim_loss
    monkeypatch.setattr(util.bench.baseline, "mim_loss", lambda *arguments: 1.001 * right(*arguments))
    with pytest.raises(RunError) as error:
        measure([Stepper(variant) for variant in variants("--forms mae")], "step")
    message = one_line(error)
    assert "mae ours" in message
    assert "mae plain" in message
    ours, plain = (float(word) for word in message.split() if word.replace(".", "").isdigit() and "." in word)
    assert plain / ours == pytest.approx(1.001, abs=1e-4)


def test_a_wrong_optimiser_is_found_too(monkeypatch):
    ours, plain = (Stepper(variant) for variant in variants("--forms mae --lr 1e-3"))
    for group in plain.trainer.optimizer.param_groups:
        group["betas"] = (0.5, 0.95)
        group["lr_scale"] = 2.0
    with pytest.raises(RunError, match=r"at update [23] "):
        check_losses([ours, plain], 3)


def test_a_loss_that_is_nan_is_never_equal(monkeypatch):
    right = util.bench.baseline.mim_loss
    monkeypatch.setattr(util.bench.baseline, "mim_loss", lambda *arguments: math.nan * right(*arguments))
    with pytest.raises(RunError, match="nan"):
        check_losses([Stepper(variant) for variant in variants("--forms mae")], 1)


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param("compile=none,block", marks=pytest.mark.slow),
        "augment_on=worker,device",
        "checkpoint_activations=true,false",
    ],
)
def test_a_flag_of_speed_leaves_the_losses(flags):
    check_losses([Stepper(variant) for variant in variants("--forms asymmetric", flags)], 3)


def test_other_work_is_not_held_against_a_variant():
    rows = variants("--forms mae --variants ours", "batch_size=4,6", "mask_ratio=0.5,0.75")
    assert len({variant.work for variant in rows}) == 4
    assert len(check_losses([Stepper(variant) for variant in rows], 1)) == 4
