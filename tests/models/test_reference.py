"""Both forms of the step against numbers from an independent implementation (fp32, a tiny model)."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from models_encoder import mask_from_noise, patchify
from models_lut import LUT, MomentumEncoder
from shared.reference import CONFIG, DATA, tiny_student
from util.optim.losses import cosine_distance
from util.optim.optimizer import build_optimizer

SCALARS = CONFIG["scalars"]
ALPHA = 0.25


def section(reference: dict, prefix: str) -> dict[str, torch.Tensor]:
    """Return the tensors under `prefix`, without it."""
    return {name[len(prefix) :]: x for name, x in reference.items() if name.startswith(prefix)}


@pytest.fixture(scope="module")
def reference() -> dict[str, torch.Tensor]:
    return load_file(DATA / "lut_tiny.safetensors")


@pytest.fixture
def models(reference) -> tuple[LUT, MomentumEncoder]:
    student = tiny_student()
    student.load_state_dict(section(reference, "online/"))
    momentum_encoder = MomentumEncoder(student)
    target = section(reference, "target/")
    momentum_encoder.load_state_dict({name: target[name] for name in momentum_encoder.state_dict()})
    return student, momentum_encoder


def close(actual, expected, tolerance):
    """Largest difference relative to the largest expected value: what 'relative' means for a whole tensor."""
    scale = max(expected.abs().max().item(), 1e-8)
    worst = (actual - expected).abs().max().item() / scale
    assert worst < tolerance, f"off by {worst:.2e} of the largest value, allowed {tolerance:.0e}"


def test_fixed_positions_are_the_reference_s(reference):
    student = tiny_student()
    close(student.pos_embed, reference["online/pos_embed"], 1e-6)
    close(student.decoder_pos_embed, reference["online/decoder_pos_embed"], 1e-6)


def test_state_dict_keys_are_the_reference_s(reference):
    assert set(tiny_student().state_dict()) == set(section(reference, "online/"))


def test_masking(reference):
    masking = mask_from_noise(reference["noise"], CONFIG["config"]["mask_ratio"])
    assert torch.equal(masking.mask, reference["mask"])
    assert torch.equal(masking.ids_restore, reference["ids_restore"])


def test_latent_and_prediction(models, reference):
    student, _ = models
    masking = mask_from_noise(reference["noise"], student.mask_ratio)
    latent = student.encode(patchify(reference["view_u"], student.patch_size), masking.visible_ids())
    close(latent, reference["latent"], 1e-5)
    mask, prediction = student.reconstruct(reference["view_u"], reference["noise"])
    assert torch.equal(mask, reference["mask"])
    close(prediction, reference["pred"], 1e-5)


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_mim_loss(reference, norm_pix_loss):
    student = tiny_student(norm_pix_loss)
    student.load_state_dict(section(reference, "online/"))
    losses = student(reference["view_u"][None], reference["noise"])
    assert losses.mim.item() == pytest.approx(SCALARS[f"mim_loss_norm_pix_{norm_pix_loss}"], rel=1e-5)
    assert losses.bc.item() == 0


def test_heads(models, reference):
    student, momentum_encoder = models
    masking = mask_from_noise(reference["noise"], student.mask_ratio)
    latent = student.encode(patchify(reference["view_u"], student.patch_size), masking.visible_ids())
    online, target = student.predict(latent), momentum_encoder(reference["view_v"][None], reference["noise"]).context[0]
    close(online, reference["paper/online_out"], 1e-5)
    close(target, reference["paper/target_out"], 1e-5)
    assert cosine_distance(online, target).item() == pytest.approx(SCALARS["paper/bc"], rel=1e-5)


def losses_of(form: str, models, reference):
    """Take the step of either form as the engine does."""
    student, momentum_encoder = models
    views, noise = torch.stack([reference["view_u"], reference["view_v"]]), reference["noise"]
    if form == "paper":
        return student(views[:1], noise, momentum_encoder(views[1:], noise))
    return student(views, noise, momentum_encoder(views.flip(0), noise))


@pytest.mark.parametrize("form", ["paper", "symmetric"])
def test_losses_and_every_gradient(models, reference, form):
    student, _ = models
    losses = losses_of(form, models, reference)
    total = losses.mim + ALPHA * losses.bc
    assert losses.mim.item() == pytest.approx(SCALARS[f"{form}/mim"], rel=1e-5)
    assert losses.bc.item() == pytest.approx(SCALARS[f"{form}/bc"], rel=1e-5)
    assert total.item() == pytest.approx(SCALARS[f"{form}/total_alpha_0.25"], rel=1e-5)

    total.backward()
    grads = {name: p.grad for name, p in student.named_parameters()}
    norm = torch.stack([g.norm() for g in grads.values()]).norm().item()
    assert norm == pytest.approx(SCALARS[f"{form}/grad_norm"], rel=1e-4)
    expected = section(reference, f"{form}/grad/")
    if form == "paper":
        assert set(grads) == set(expected)  # every parameter, none left out
    for name, grad in expected.items():
        close(grads[name], grad, 1e-4)


def test_one_adamw_step_and_one_momentum_update(models, reference):
    student, momentum_encoder = models
    losses = losses_of("paper", models, reference)
    (losses.mim + ALPHA * losses.bc).backward()
    optimizer = build_optimizer(student, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05)
    optimizer.step()
    stepped = section(reference, "paper/after_step/")
    grads = section(reference, "paper/grad/")
    for name, x in student.state_dict().items():
        # Adam divides a gradient by its own size. Where it is zero but for rounding (a bias of the keys shifts
        # all scores of a query alike) rounding decides the sign of the step: there only its size is known
        noise = grads[name].abs() < 1e-7 if name in grads else torch.zeros_like(x, dtype=torch.bool)
        assert noise.float().mean() < 0.01 or name.endswith("attn.qkv.bias"), name
        torch.testing.assert_close(x[~noise], stepped[name][~noise], atol=1e-6, rtol=1e-5, msg=name)
        assert (x - stepped[name])[noise].abs().le(2.1e-3).all(), name

    # isolate the update: from the reference's own stepped weights, so that nothing adds up
    student.load_state_dict(stepped)
    momentum_encoder.update(student, 0.996)
    expected = section(reference, "paper/after_ema/")
    for name, x in momentum_encoder.state_dict().items():
        torch.testing.assert_close(x, expected[name], atol=1e-6, rtol=1e-5, msg=name)
