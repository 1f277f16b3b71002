"""The switches of Tables 4a to 4e and C: each against a slow computation of its loss, and what is refused."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from models_encoder import independent_noise, mask_from_noise, mask_squares, patchify
from models_lut import LUT, MomentumEncoder, Steering
from shared.calls import one_line
from shared.flags import TINY
from shared.models import TINY_MODEL, head_by_hand, images, noise
from shared.pretrain import config_of
from shared.slow_losses import SLOW, slow_cosine, slow_infonce
from util.config.command_line import parse_config
from util.config.pretrain import PretrainConfig
from util.config.same_run import check_same_run
from util.runtime.errors import UserError
from util.train.pretraining import build_state

CPU = torch.device("cpu")


# ---- the terms of L_BC -------------------------------------------------------------------------------------
def models(**steering) -> tuple[LUT, MomentumEncoder]:
    """Return a tiny student whose BatchNorms do something, and a momentum encoder that has gone elsewhere; fp64."""
    torch.manual_seed(0)
    arguments = dict(reconstructs=steering.pop("reconstructs", True), mask_unit_patches=steering.pop("mask_unit", 1))
    student = LUT(**TINY_MODEL, steering=Steering(**steering), **arguments).double()
    for name, head in student.named_children():
        if name.endswith(("head", "predictor")):
            nn.init.uniform_(head[1].weight, 0.5, 2)
            nn.init.uniform_(head[1].bias, 0.1, 1)
    momentum_encoder = MomentumEncoder(student).double()
    for x in momentum_encoder.state_dict().values():
        if x.is_floating_point():
            x += 0.1 * torch.rand(x.shape, dtype=x.dtype)
    return student, momentum_encoder


def latents(encoder, batch: Tensor, ids: list[list[int]]) -> list[Tensor]:
    """Image by image, token by token: [1 + N, D] each of the patches `ids` in that order."""
    tokens = []
    for image, visible in zip(batch, ids, strict=True):
        x = encoder.patch_embed(image[None])[0] + encoder.pos_embed[0, 1:]
        x = torch.stack([encoder.cls_token[0, 0] + encoder.pos_embed[0, 0], *(x[i] for i in visible)])[None]
        for block in encoder.blocks:
            x = block(x)
        tokens.append(encoder.norm(x)[0])
    return tokens


def frozen_head(head: nn.Sequential, x: Tensor) -> Tensor:
    """Apply the head in eval mode: BatchNorm with its running statistics."""
    x = x @ head[0].weight.T
    x = (x - head[1].running_mean) / (head[1].running_var + 1e-5).sqrt() * head[1].weight + head[1].bias
    return x.clamp(min=0) @ head[3].weight.T


def predicted(first: nn.Sequential, second: nn.Sequential, x: Tensor) -> Tensor:
    return head_by_hand(second, head_by_hand(first, x)[0])[0]


def visible_and_hidden(batch: int, view: int = 0) -> tuple[list[list[int]], list[list[int]]]:
    """Return, by sorting, the 6 patches of each image that the student sees of a view, and the others."""
    order = [sorted(range(24), key=row.__getitem__) for row in noise(batch).tolist()]
    visible = [row[6 * view : 6 * view + 6] for row in order]
    return visible, [[i for i in range(24) if i not in row] for row in visible]


def context_vectors(encoder: MomentumEncoder, batch: Tensor, kind: str, visible: list | None = None) -> Tensor:
    """v̂ [B, D] of images, all patches or the `visible` ones."""
    tokens = latents(encoder, batch, visible or len(batch) * [list(range(24))])
    return frozen_head(encoder.head, torch.stack([x[0] if kind == "cls" else x[1:].mean(0) for x in tokens]))


def context_term(student, encoder, u: Tensor, v: Tensor, kind="avg", distance="cosine", view=0, visible=None) -> float:
    tokens = latents(student, u, visible_and_hidden(len(u), view)[0])
    context = torch.stack([x[0] if kind == "cls" else x[1:].mean(0) for x in tokens])
    return SLOW[distance](
        predicted(student.head, student.predictor, context), context_vectors(encoder, v, kind, visible)
    )  # fmt: skip


def token_term(student, encoder, u: Tensor, v: Tensor, view=0, distance="cosine") -> float:
    """Every visible token of every image against the token of the same patch of the other view."""
    ids, _ = visible_and_hidden(len(u), view)
    student_tokens = torch.cat([x[1:] for x in latents(student, u, ids)])
    context_tokens = latents(encoder, v, len(v) * [list(range(24))])
    targets = torch.stack([context_tokens[b][1 + i] for b, visible in enumerate(ids) for i in visible])
    prediction = predicted(student.head, student.predictor, student_tokens)
    return SLOW[distance](prediction, frozen_head(encoder.head, targets))


def hidden_term(student, encoder, u: Tensor, v: Tensor) -> float:
    """Return the mean of the decoder's tokens of hidden patches, in image order as MAE has them, against v̂."""
    means, (ids, hidden) = [], visible_and_hidden(len(u))
    for latent, visible, unseen in zip(latents(student, u, ids), ids, hidden, strict=True):
        tokens = student.decoder_embed(latent)
        places = [tokens[1 + visible.index(i)] if i in visible else student.mask_token[0, 0] for i in range(24)]
        x = (torch.stack([tokens[0], *places]) + student.decoder_pos_embed[0])[None]
        for block in student.decoder_blocks:
            x = block(x)
        means.append(student.decoder_norm(x)[0, [1 + i for i in unseen]].mean(0))
    prediction = predicted(student.mask_head, student.mask_predictor, torch.stack(means))
    return slow_cosine(prediction, context_vectors(encoder, v, "avg"))


def bc(student: LUT, encoder: MomentumEncoder, views: Tensor, symmetric: bool = False) -> float:
    """L_BC as the engine computes it."""
    mask = noise(views.shape[1])
    targets = encoder(views.flip(0) if symmetric else views[1:], mask)
    return student(views if symmetric else views[:1], mask, targets).bc.item()


VIEWS = images(2, 5, 3, 8, 12)


@pytest.mark.parametrize("kind", ["avg", "cls"])
def test_4b_context_token(kind):
    student, encoder = models(context_token=kind)
    expected = [context_term(student, encoder, VIEWS[i], VIEWS[1 - i], kind, view=i) for i in range(2)]
    assert bc(student, encoder, VIEWS) == pytest.approx(expected[0], rel=1e-5)
    assert bc(student, encoder, VIEWS, symmetric=True) == pytest.approx(sum(expected) / 2, rel=1e-5)


@pytest.mark.parametrize("supervision", ["token", "both"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_4c_supervision(supervision, symmetric):
    student, encoder = models(supervision=supervision)
    terms = []
    for i in range(1 + symmetric):
        terms.append(token_term(student, encoder, VIEWS[i], VIEWS[1 - i], view=i))
        if supervision == "both":
            terms.append(context_term(student, encoder, VIEWS[i], VIEWS[1 - i], view=i))
    assert bc(student, encoder, VIEWS, symmetric) == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_4a_all_tokens():
    student, encoder = models(steered_tokens="all")
    visible = [context_term(student, encoder, VIEWS[i], VIEWS[1 - i], view=i) for i in range(2)]
    hidden = hidden_term(student, encoder, *VIEWS)
    assert bc(student, encoder, VIEWS) == pytest.approx((visible[0] + hidden) / 2, rel=1e-5)
    assert bc(student, encoder, VIEWS, symmetric=True) == pytest.approx((sum(visible) + hidden) / 3, rel=1e-5)


def test_4a_the_heads_of_the_hidden_tokens_are_their_own_and_map_to_the_encoder_s_width():
    student, plain = models(steered_tokens="all")[0], models()[0]
    assert student.mask_head[0].weight.shape == (10, 8)  # the decoder's width
    assert student.mask_head[3].weight.shape == student.mask_predictor[3].weight.shape == (12, 10)
    first, added = plain.state_dict(), student.state_dict()
    assert list(added)[: len(first)] == list(first)  # same names, in the same order, and further ones behind
    assert all(name.startswith(("mask_head", "mask_predictor")) for name in list(added)[len(first) :])


@pytest.mark.parametrize("distance", ["cosine", "smooth_l1", "infonce"])
def test_4d_distance_of_the_context(distance):
    student, encoder = models(distance=distance)
    expected = context_term(student, encoder, *VIEWS, distance=distance)
    assert bc(student, encoder, VIEWS) == pytest.approx(expected, rel=1e-5)


def test_4d_temperature_and_distance_of_tokens():
    student, encoder = models(distance="infonce", infonce_temperature=0.7)
    x = torch.stack([latent[1:].mean(0) for latent in latents(student, VIEWS[0], visible_and_hidden(5)[0])])
    prediction, target = predicted(student.head, student.predictor, x), context_vectors(encoder, VIEWS[1], "avg")
    assert bc(student, encoder, VIEWS) == pytest.approx(slow_infonce(prediction, target, 0.7), rel=1e-5)
    student, encoder = models(distance="smooth_l1", supervision="token")
    expected = token_term(student, encoder, *VIEWS, distance="smooth_l1")
    assert bc(student, encoder, VIEWS) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("ratio", "visible"), [(0.5, 12), (0.75, 6), (0.9, 2)])
@pytest.mark.parametrize("kind", ["avg", "cls"])
def test_4e_masked_context(ratio, visible, kind):
    student, encoder = models(context_mask_ratio=ratio, context_token=kind)
    second = [[x * 4096 - math.floor(x * 4096) for x in row] for row in noise(5).tolist()]
    ids = [sorted(range(24), key=row.__getitem__)[:visible] for row in second]
    expected = context_term(student, encoder, *VIEWS, kind, visible=ids)
    assert bc(student, encoder, VIEWS) == pytest.approx(expected, rel=1e-5)
    hidden = torch.ones(5, 24).scatter_(1, torch.tensor(ids), 0.0).bool()
    patches = VIEWS[1].reshape(5, 3, 4, 2, 6, 2).permute(0, 2, 4, 1, 3, 5).reshape(5, 24, 12)
    patches = patches.masked_fill(hidden[..., None], math.nan).reshape(5, 4, 6, 3, 2, 2)
    v = patches.permute(0, 3, 1, 4, 2, 5).reshape(5, 3, 8, 12)
    assert bc(student, encoder, torch.stack([VIEWS[0], v])) == bc(student, encoder, VIEWS)  # never looked at


def test_4e_the_two_masks_know_nothing_of_each_other():
    rows = torch.rand(4000, 196, generator=torch.Generator().manual_seed(0))
    first, second = (mask_from_noise(x, 0.75).mask for x in (rows, independent_noise(rows)))
    both = (first * second).sum(1)  # hypergeometric: mean 147²/196, variance 147² 49² / (196² 195)
    mean, variance = 147**2 / 196, 147**2 * 49**2 / (196**2 * 195)
    assert both.mean().item() == pytest.approx(mean, abs=4 * math.sqrt(variance / 4000))
    assert both.var().item() == pytest.approx(variance, rel=0.1)
    assert second.mean(0).std() < 1.3 * math.sqrt(0.75 * 0.25 / 4000)  # no place is preferred
    assert torch.equal(independent_noise(rows[:7]), independent_noise(rows)[:7])  # each sample for itself


def test_c_without_l_mim_there_is_no_decoder():
    full, encoder = models()
    student, _ = models(reconstructs=False)
    decoder = {name for name in full.state_dict() if name.startswith(("decoder", "mask_token"))}
    assert set(full.state_dict()) - set(student.state_dict()) == decoder
    student.load_state_dict({name: x for name, x in full.state_dict().items() if name not in decoder})
    targets = encoder(VIEWS[1:], noise(5))
    losses = student(VIEWS[:1], noise(5), targets)
    assert losses.mim.item() == 0
    assert losses.bc.item() == full(VIEWS[:1], noise(5), targets).bc.item()


def test_squares_of_patches_are_hidden_together():
    student, _ = models(mask_unit=2)
    order = [sorted(range(6), key=[row[i] for i in (0, 2, 4, 12, 14, 16)].__getitem__) for row in noise(5).tolist()]
    masking = student.mask(noise(5))
    assert masking.num_visible == student.num_visible == 4
    for b, squares in enumerate(order):
        corners = [12 * (square // 3) + 2 * (square % 3) for square in squares]
        assert masking.shuffle[b].tolist() == [corner + i for corner in corners for i in (0, 1, 6, 7)]
    one = mask_squares(noise(5), 0.75, 1, (4, 6))
    assert torch.equal(one.shuffle, mask_from_noise(noise(5), 0.75).shuffle)
    losses = student(VIEWS[:1], noise(5))
    mask, prediction = student.reconstruct(VIEWS[0], noise(5))
    target = patchify(VIEWS[0], 2)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    expected = ((prediction - target).square().mean(-1) * mask).sum() / mask.sum()
    assert losses.mim.item() == pytest.approx(expected.item(), rel=1e-5)


# ---- settings ----------------------------------------------------------------------------------------------
REFUSED = {
    "--supervision token": "--supervision token: tokens of the same place are compared: add --shared_crop",
    "--supervision both": "--supervision both: tokens of the same place are compared: add --shared_crop",
    "--supervision token --shared_crop --context_mask_ratio 0.5": "--supervision token: --context_mask_ratio hides",
    "--supervision both --shared_crop --distance infonce": "--supervision both: --distance infonce would compare",
    "--supervision token --shared_crop --context_token cls": "--context_token cls: --supervision token uses no context",
    "--supervision token --shared_crop --steered_tokens all": "--steered_tokens all: mask tokens are pulled to",
    "--steered_tokens all --w_mim 0": "--steered_tokens all: --w_mim 0 has no decoder",
    "--steered_tokens none --w_mim 0": "--w_mim 0.0: nothing to learn",
    "--alpha 0 --context_token cls": "--context_token cls: is part of L_BC, which --alpha 0 leaves out",
    "--model mae_vit_nano_patch4 --steered_tokens all": "L_BC, which --model mae_vit_nano_patch4 leaves out",
    "--steered_tokens none --distance infonce": "--distance infonce: is part of L_BC, which --steered_tokens none",
    "--alpha 0 --context_mask_ratio 0.5": "--context_mask_ratio 0.5: is part of L_BC",
    "--context_mask_ratio 1": "--context_mask_ratio 1.0: must lie in [0, 1)",
    "--context_mask_ratio -0.5": "--context_mask_ratio -0.5: must lie in [0, 1)",
    "--context_mask_ratio nan": "--context_mask_ratio nan: must lie in [0, 1)",
    "--context_mask_ratio 0.95": "--context_mask_ratio 0.95: leaves none of 16 patches visible",
    "--infonce_temperature 0.1": "--infonce_temperature 0.1: --distance cosine has none; take infonce",
    "--distance infonce --infonce_temperature 0": "--infonce_temperature 0.0: must be above 0, and finite",
    "--distance infonce --batch_size 1": "--batch_size 1: --distance infonce needs two images at least",
    "--distance euclid": "--distance euclid: unknown",
    "--method simmim --decoder_depth 2": "--decoder_depth 2: SimMIM's decoder is one linear layer",
    "--method simmim --model mae_vit_nano_patch4": "take lut_vit_nano_patch4, and --alpha 0",
    "--mask_unit 12": "--mask_unit 12: must be a multiple of the patch, 8 pixels",
    "--mask_unit 0": "--mask_unit 0: must be a multiple of the patch",
    "--mask_unit 24": "--mask_unit 24: must divide the image, 32 x 32 pixels; one patch has 8",
    "--method simmim --input_size 40": "--mask_unit 16: must divide the image, 40 x 40 pixels",
    "--mask_unit 32": "--mask_ratio 0.75: leaves 0 of 1 squares of 32 pixels visible",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_what_makes_no_sense_is_refused_in_one_line(flags):
    base = TINY.replace("--decoder_depth 1", "") if "simmim" in flags else TINY
    with pytest.raises(UserError) as error:
        parse_config(PretrainConfig, [*base.split(), *flags.split()], "main_pretrain.py")
    assert REFUSED[flags] in one_line(error)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("", "--steered_tokens all", "steered_tokens is all here but visible"),
        ("", "--steered_tokens none", "alpha is 0.0 here but 1.0"),
        ("", "--context_token cls", "context_token is cls here but avg"),
        ("--shared_crop", "--shared_crop --supervision both", "supervision is both here but context"),
        ("", "--distance infonce", "distance is infonce here but cosine"),
        (
            "--distance infonce",
            "--distance infonce --infonce_temperature 0.1",
            "infonce_temperature is 0.1 here but 0.2",
        ),
        ("", "--context_mask_ratio 0.5", "context_mask_ratio is 0.5 here but 0.0"),
        ("", "--mask_unit 16", "mask_unit is 16 here but 8"),
        ("", "--w_mim 0", "w_mim is 0.0 here but 1.0"),
    ],
)
def test_a_resumed_run_has_the_same_switches(before, after, message):
    saved = {"binding_settings": config_of(before).resume_settings(32)}
    with pytest.raises(UserError, match=message):
        check_same_run(config_of(after).resume_settings(32), saved, elastic=False)


def test_settings_that_are_the_same_in_other_words_resume():
    for one, other in itertools.combinations(["--alpha 0", "--steered_tokens none", "--alpha 0 --mask_unit 8"], 2):
        saved = {"binding_settings": config_of(one).resume_settings(32)}
        check_same_run(config_of(f"{other} --mask_ratio 0.75").resume_settings(32), saved, elastic=False)


def test_steering_nothing_is_mae():
    none, mae = (config_of(flags) for flags in ("--steered_tokens none --alpha 0.25", "--alpha 0"))
    assert (none.resolved_alpha, none.has_momentum_encoder, none.num_views) == (0, False, 1)
    assert none.model_arguments == mae.model_arguments
    assert build_state(none, None, CPU)[0].model_ema is None


def test_targets_that_nobody_asks_for_are_not_made():
    shapes = {"context": [(1, 5, 12), None], "token": [None, (1, 5, 24, 12)], "both": [(1, 5, 12), (1, 5, 24, 12)]}
    for supervision, expected in shapes.items():
        targets = models(supervision=supervision)[1](VIEWS[1:], noise(5))
        assert [None if x is None else x.shape for x in targets] == expected
