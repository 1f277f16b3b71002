"""Cost: FLOPs against a table of full-size models, parameters against real modules, memory by hand."""

from __future__ import annotations

import pytest

from models_lut import LUT, MomentumEncoder
from util.config.pretrain import PretrainConfig
from util.train import cost
from util.train.cost import Cost, count_parameters, pretrain_cost

FORMS = ("mae", "asymmetric", "symmetric")
GFLOP = {"small": (38.9, 48.2, 64.1), "base": (58.5, 93.7, 155.1)}  # per image, forward and backward, in each form
TINY = dict(model="lut_vit_nano_patch4", patch_size=8, decoder_depth=1, head_mlp_dim=16, in_chans=1)


def model_arguments(form: str, **settings) -> dict:
    """Arguments of LUT for MAE or for LUT, with the default heads unless they are given."""
    return PretrainConfig(**settings | (dict(alpha=0.0) if form == "mae" else {})).model_arguments


@pytest.mark.parametrize("size", GFLOP)
@pytest.mark.parametrize("form", FORMS)
def test_flops_of_full_size_models(size, form):
    cost = pretrain_cost(model_arguments(form, model=f"lut_vit_{size}_patch16"), form == "symmetric")
    expected = GFLOP[size][FORMS.index(form)]
    assert 0.97 * expected < cost.flops_per_image / 1e9 < 1.005 * expected


@pytest.mark.parametrize("form", FORMS)
def test_parameters_are_those_of_real_modules(form):
    arguments = model_arguments(form, **TINY)
    cost, student = pretrain_cost(arguments, form == "symmetric"), LUT(**arguments)
    followed = 0 if form == "mae" else sum(p.numel() for p in MomentumEncoder(student).parameters())
    assert cost.student_parameters == sum(p.numel() for p in student.parameters()) == count_parameters(student)
    assert cost.momentum_parameters == followed
    assert cost.encoder_parameters == count_parameters(student) - sum(
        count_parameters(part)
        for name, part in student.named_children()
        if name not in ("patch_embed", "blocks", "norm")
    ) - student.mask_token.numel()  # fmt: skip
    # weight, gradient and two moments of each number that trains, one of each that follows; 4 bytes each
    assert cost.state_bytes == 16 * cost.student_parameters + 4 * cost.momentum_parameters


def test_flops_of_a_tiny_mae_by_hand():
    """32 pixels in patches of 8: L = 16, V = 4; 2 per multiply-add, the backward pass twice the forward pass."""
    D, E, P, L, V = 96, 64, 64, 16, 4

    def block(tokens: int, width: int) -> int:
        return 12 * tokens * width**2 + 2 * tokens**2 * width  # qkv, out, MLP; scores, weighted sum

    def last_block(tokens: int, asked: int, width: int) -> int:
        return (2 * tokens + 10 * asked) * width**2 + 2 * asked * tokens * width  # keys and values of all tokens

    embed, between, out = V * P * D, (1 + V) * D * E, (L - V) * E * P
    forward = 2 * (embed + 6 * block(1 + V, D) + between + last_block(1 + L, L - V, E) + out)
    expected = 3 * forward - 2 * embed  # no gradient of the image
    flops = pretrain_cost(model_arguments("mae", **TINY), symmetric=False).flops_per_image
    assert flops == pytest.approx(expected, rel=0.01)  # some attention kernels compute their scores twice


def test_all_is_per_image(monkeypatch):
    arguments = model_arguments("asymmetric", **TINY)
    two = pretrain_cost(arguments, symmetric=False)
    monkeypatch.setattr(cost, "_BATCH", 8)
    eight = pretrain_cost(arguments, symmetric=False)
    assert eight.flops_per_image == two.flops_per_image
    assert eight.activation_bytes_per_image == pytest.approx(two.activation_bytes_per_image, rel=0.001)


def test_the_symmetric_form_saves_more_and_mae_less():
    saved = [pretrain_cost(model_arguments(f, **TINY), f == "symmetric").activation_bytes_per_image for f in FORMS]
    mae, asymmetric, symmetric = saved
    assert mae < asymmetric < 1.2 * mae  # the heads alone: the momentum encoder saves nothing
    assert 1.2 * asymmetric < symmetric < 2 * asymmetric


@pytest.mark.parametrize(
    ("batch_size", "bytes_per_number", "expected"), [(1, 4, 1300), (10, 4, 4000), (10, 2, 2500), (0, 4, 1000)]
)
def test_memory_is_the_state_and_the_activations_of_a_batch(batch_size, bytes_per_number, expected):
    cost = Cost(1, 1, 1, 1, state_bytes=1000, activation_bytes_per_image=300)
    assert cost.memory_bytes(batch_size, bytes_per_number) == expected


def test_no_memory_is_taken():
    cost = pretrain_cost(model_arguments("asymmetric", **TINY | dict(head_mlp_dim=2**20)), symmetric=False)
    assert cost.student_parameters > 4 * 96 * 2**20


@pytest.mark.parametrize("form", FORMS)
def test_checkpointed_activations_are_computed_twice_and_not_kept(form):
    arguments = model_arguments(form, model="lut_vit_small_patch16")
    plain = pretrain_cost(arguments, form == "symmetric")
    checkpointed = pretrain_cost(arguments, form == "symmetric", checkpoint_activations=True)
    assert checkpointed.activation_bytes_per_image < 0.2 * plain.activation_bytes_per_image
    assert checkpointed.state_bytes == plain.state_bytes
    assert 1.1 < checkpointed.flops_per_image / plain.flops_per_image < 1.34
