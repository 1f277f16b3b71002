"""Checkpoints of any program opened for analysis: which tensors a model gets, and errors in one line."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import timm
import torch

from models_lut import Encoder
from models_vit import Classifier, LinearProbe
from shared.calls import one_line
from shared.checkpoints import save_lut, shaken
from util.runtime.errors import UserError
from util.runtime.files import ROOT
from util.weights.vit import grid_of, is_classifier, logits_of, open_vit, pooled, tokens_of

DATA = ROOT / "tests" / "files"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return save_lut(tmp_path_factory.mktemp("lut") / "checkpoint-7.pth")


def opened(name, weights="student", size=(), num_heads=None):
    return open_vit(str(name), weights, "", size, num_heads, CPU)


def test_student_and_momentum_encoder_of_a_run(run):
    state = torch.load(run, weights_only=True)
    images = torch.randn(2, 1, 32, 32)
    for weights, prefix, name in (("student", "", "model"), ("momentum", "ema.", "model_ema")):
        vit = opened(run, weights)
        expected = Encoder(**vit.model.shape)
        expected.load_state_dict({n: state[name][prefix + n] for n in expected.state_dict()})
        assert torch.equal(tokens_of(vit.model, images), expected.encode(images_as_patches(images)))
        assert (vit.size, vit.in_chans) == ((32, 32), 1)
        assert not vit.model.training
        assert not any(p.requires_grad for p in vit.model.parameters())
    assert opened(run).label.endswith("/7")
    assert opened(run, "momentum").label.endswith("/7, momentum")


def images_as_patches(images):
    patches = images.unfold(2, 8, 8).unfold(3, 8, 8)  # [B, 1, 4, 4, 8, 8]
    return patches.reshape(len(images), 16, 64)


@pytest.mark.parametrize("name", ["mae_encoder_only_tiny", "mae_full_tiny", "release_lut_tiny"])
def test_files_of_other_programs(name):
    vit = opened(DATA / f"{name}.pth", num_heads=3)
    state = torch.load(DATA / f"{name}.pth", weights_only=False)["model"]
    for tensor_name, tensor in vit.model.state_dict().items():
        assert torch.equal(tensor, state[tensor_name])
    with pytest.raises(UserError, match="--num_heads"):
        opened(DATA / f"{name}.pth")


@pytest.mark.parametrize(("kind", "pool"), [(Classifier, "avg"), (Classifier, "token"), (LinearProbe, "token")])
def test_a_classifier_gives_its_own_logits(tmp_path, kind, pool):
    architecture = dict(embed_dim=24, depth=2, num_heads=3)
    common = dict(img_size=(16, 16), patch_size=8, in_chans=3)
    model = shaken(kind(architecture, num_classes=5, pool=pool, **common))
    torch.save({"model": model.state_dict()}, tmp_path / "tuned.pth")
    vit = opened(tmp_path / "tuned.pth", num_heads=3)
    images = torch.randn(3, 3, 16, 16)
    assert isinstance(vit.model, kind)
    assert torch.equal(logits_of(vit.model, images), model(images))


def test_a_linear_probe_of_the_mean_says_so_in_its_settings(tmp_path):
    architecture = dict(embed_dim=24, depth=2, num_heads=3)
    model = shaken(LinearProbe(architecture, num_classes=5, pool="avg", img_size=(16, 16), patch_size=8, in_chans=3))
    torch.save({"model": model.state_dict(), "config": {"global_pool": True}}, tmp_path / "probe.pth")
    images = torch.randn(3, 3, 16, 16)
    assert torch.equal(logits_of(opened(tmp_path / "probe.pth", num_heads=3).model, images), model(images))


def test_another_image_size_resamples_positions(run):
    vit = opened(run, size=(48, 32))
    assert vit.size == (48, 32)
    assert grid_of(vit.model) == (6, 4)
    assert "pos_embed: 4 x 4 to 6 x 4 patches" in vit.origin
    assert tokens_of(vit.model, torch.randn(1, 1, 48, 32)).shape == (1, 25, 96)
    with pytest.raises(UserError, match="--input_size 30: no multiple of the patch, 8 pixels, try 32"):
        opened(run, size=(30,))


def test_timms_models_without_and_with_a_file(tmp_path):
    first, second = opened("timm:test_vit"), opened("timm:test_vit")
    images = torch.randn(2, 3, *first.size)
    assert torch.equal(tokens_of(first.model, images), tokens_of(second.model, images))  # random, always the same
    torch.manual_seed(9)
    model = shaken(timm.create_model("test_vit"))
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    given = opened(f"timm:test_vit={tmp_path / 'vit.pth'}")
    assert torch.equal(tokens_of(given.model, images), model.forward_features(images))
    assert given.normalise.mean == tuple(model.pretrained_cfg["mean"])
    larger = opened(f"timm:test_vit={tmp_path / 'vit.pth'}", size=(first.size[0] * 2,))
    assert grid_of(larger.model)[0] == 2 * grid_of(first.model)[0]
    pooled(larger.model, tokens_of(larger.model, torch.randn(1, 3, *larger.size)), "avg")


@pytest.mark.parametrize("kind", ["DINO", "DINO or iBOT, whole", "MoCo v3", "DeiT"])
@pytest.mark.parametrize("prefix", ["", "timm:test_vit="])
def test_the_files_that_the_papers_figure_compares_with(tmp_path, kind, prefix):
    """Keys as in the files that these programs publish, beside heads and second networks with other weights."""
    small = dict(img_size=32, embed_dim=24, depth=2, num_heads=3)
    make = (
        partial(timm.create_model, "test_vit")
        if prefix
        else partial(timm.create_model, "vit_base_patch16_224", **small)
    )
    model = shaken(make(num_classes=1000 if kind == "DeiT" else 0))
    state, wrong = model.state_dict(), shaken(make(num_classes=0), seed=1).state_dict()
    file = {
        "DINO": state,
        "DINO or iBOT, whole": {
            "student": {f"module.backbone.{name}": x for name, x in wrong.items()},
            "teacher": {f"backbone.{name}": x for name, x in state.items()} | {"head.mlp.0.weight": torch.zeros(2, 64)},
            "epoch": 7,
        },
        "MoCo v3": {
            "state_dict": {f"module.base_encoder.{name}": x for name, x in state.items()}
            | {f"module.momentum_encoder.{name}": x for name, x in wrong.items()}
            | {"module.predictor.0.weight": torch.zeros(2, 64)},
        },
        "DeiT": {"model": state},
    }[kind]
    torch.save(file, tmp_path / "file.pth")
    vit = opened(f"{prefix}{tmp_path / 'file.pth'}", num_heads=None if prefix else 3)
    images = torch.randn(2, 3, *vit.size)
    torch.testing.assert_close(tokens_of(vit.model, images), model.forward_features(images), rtol=1e-4, atol=1e-5)
    assert is_classifier(vit.model) == (kind == "DeiT")


def test_opening_draws_nothing_from_the_global_generator():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    opened("timm:test_vit")
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:resnet18", "no plain ViT"),
        ("timm:vit_small_patch16_18x2_224", "no plain ViT"),  # several attention layers in a block
        ("timm:vit_bse_patch16_224", "did you mean vit_base_patch16_224"),
        ("nowhere.pth", "no such file"),
    ],
)
def test_what_is_no_vit_is_said_in_one_line(name, message):
    with pytest.raises(UserError, match=message) as error:
        opened(name)
    assert name in one_line(error)


def test_a_file_that_lacks_tensors_of_the_timm_model(tmp_path):
    state = timm.create_model("test_vit").state_dict()
    del state["blocks.0.attn.qkv.weight"]
    torch.save(state, tmp_path / "vit.pth")
    with pytest.raises(UserError, match=r"lacks 1 tensors of timm's test_vit: blocks\.0\.attn\.qkv\.weight"):
        opened(f"timm:test_vit={tmp_path / 'vit.pth'}")
