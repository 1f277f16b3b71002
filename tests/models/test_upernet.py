"""UperNet: the pyramid's strides, weights from every program, rates per layer, sizes other than the training's."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from models_architectures import ARCHITECTURES
from models_encoder import fixed_positions
from models_upernet import POOLS, UperNet, feature_blocks, rescaled
from util.optim.optimizer import parameter_groups
from util.runtime.distributed import SyncBatchNorm, synchronise_batch_norm
from util.runtime.errors import UserError
from util.runtime.files import ROOT
from util.weights.interop import load_weights

DATA = ROOT / "tests" / "files"
SHAPE = dict(embed_dim=24, depth=4, num_heads=3)


def upernet(size: tuple[int, int] = (32, 48), patch: int = 8, classes: int = 5, **more) -> UperNet:
    torch.manual_seed(0)
    arguments = dict(img_size=size, patch_size=patch, in_chans=3, num_classes=classes, head_width=8) | more
    return UperNet(arguments.pop("shape", SHAPE), **arguments)


def test_features_of_four_depths():
    assert feature_blocks(12) == (3, 5, 7, 11)
    assert feature_blocks(24) == (7, 11, 15, 23)
    assert all(len(set(feature_blocks(shape["depth"]))) == 4 for shape in ARCHITECTURES.values())
    with pytest.raises(ValueError, match="2 blocks"):
        feature_blocks(2)


def test_the_pyramid_reads_the_blocks_it_names():
    model = upernet().eval()
    images, outputs = torch.randn(2, 3, 32, 48), []
    for block in model.blocks:
        block.register_forward_hook(lambda _, __, y: outputs.append(y))
    pyramid = model.pyramid(images)
    expected = outputs[feature_blocks(4)[1]][:, 1:].transpose(1, 2).reshape(2, 24, 4, 6)  # patch 8: stride 8 as it is
    assert isinstance(model.neck[1], nn.Identity)
    assert torch.equal(pyramid[1], expected)
    top = outputs[feature_blocks(4)[3]][:, 1:].transpose(1, 2).reshape(2, 24, 4, 6)
    assert torch.equal(pyramid[3], F.max_pool2d(F.pad(top, (0, 2), value=-torch.inf), 4))  # a part at the edge counts


@pytest.mark.parametrize(("patch", "size"), [(4, (32, 64)), (8, (64, 96)), (16, (96, 160)), (32, (64, 128))])
def test_strides_are_4_8_16_and_32_whatever_the_patch(patch, size):
    model = upernet(size, patch).eval()
    images = torch.randn(1, 3, *size)
    assert [tuple(x.shape[2:]) for x in model.pyramid(images)] == [(size[0] // s, size[1] // s) for s in (4, 8, 16, 32)]
    main, auxiliary = model(images)
    assert main.shape == (1, 5, size[0] // 4, size[1] // 4)
    assert auxiliary.shape == (1, 5, size[0] // 16, size[1] // 16)
    assert model.predict(images).shape == (1, 5, *size)


def test_patch_14_counts_as_16():
    assert [type(rescaled(8, 14, stride)) for stride in (16, 32)] == [nn.Identity, nn.MaxPool2d]
    assert upernet((28, 42), 14).predict(torch.randn(2, 3, 28, 42)).shape == (2, 5, 28, 42)


def test_the_decode_head_against_its_parts_in_words():
    """Pool, join, add downwards, smooth, join, classify: each step by hand."""
    head = upernet().eval().decode_head
    pyramid = [torch.randn(1, 24, 16 // 2**i, 24 // 2**i) for i in range(4)]

    def at(x, like):
        return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)

    top = pyramid[3]
    pooled = [at(head.pools[i][1](F.adaptive_avg_pool2d(top, side)), top) for i, side in enumerate(POOLS)]
    p4 = head.bottleneck(torch.cat([top, *pooled], 1))
    p3 = head.lateral[2](pyramid[2]) + at(p4, pyramid[2])
    p2 = head.lateral[1](pyramid[1]) + at(p3, pyramid[1])
    p1 = head.lateral[0](pyramid[0]) + at(p2, pyramid[0])
    levels = [head.smooth[0](p1), head.smooth[1](p2), head.smooth[2](p3), p4]
    fused = head.fuse(torch.cat([at(x, p1) for x in levels], 1))
    torch.testing.assert_close(head(pyramid), head.classifier[1](fused))


def test_every_parameter_learns_and_all_layers_have_their_rate():
    model = upernet(drop_path=0.0)
    main, auxiliary = model(torch.randn(2, 3, 32, 48))
    (main.square().mean() + auxiliary.square().mean()).backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "qkv.bias" not in n
    )
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, 0.05, 0.5)
    scale = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    decay = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
    assert scale["pos_embed"] == scale["patch_embed.proj.weight"] == 0.5**5
    assert [scale[f"blocks.{i}.mlp.fc1.weight"] for i in range(4)] == [0.5**4, 0.5**3, 0.5**2, 0.5]
    heads = [name for name in scale if name.startswith(("neck", "decode_head", "auxiliary_head"))]
    assert len(heads) > 40
    assert {scale[name] for name in heads} == {1}
    assert decay["decode_head.fuse.0.weight"] == 0.05
    assert decay["decode_head.fuse.1.weight"] == decay["decode_head.classifier.1.bias"] == decay["pos_embed"] == 0


# ---- weights -----------------------------------------------------------------------------------------------

TWO_BLOCKS = dict(embed_dim=24, depth=2, num_heads=3)


@pytest.fixture
def four_depths_of_two_blocks(monkeypatch):
    """Take levels from two blocks: the published layouts among the tests' data have no more."""
    monkeypatch.setattr("models_upernet.feature_blocks", lambda depth: (0, 0, 0, 1))
    monkeypatch.setattr(UperNet, "pyramid", None)  # which would need four


@pytest.mark.parametrize(
    ("name", "weights", "layout"),
    [
        ("mae_encoder_only_tiny.pth", "student", "MAE encoder"),
        ("mae_full_tiny.pth", "student", "MAE with decoder"),
        ("release_lut_tiny.pth", "student", "LUT, student"),
        ("release_lut_tiny.pth", "momentum", "LUT, momentum encoder"),
    ],
)
@pytest.mark.usefixtures("four_depths_of_two_blocks")
def test_published_encoders_load_whole_and_positions_are_resampled(name, weights, layout):
    model = upernet((64, 96), shape=TWO_BLOCKS)
    before = {n: x.clone() for n, x in model.state_dict().items()}
    report = load_weights(model, DATA / name, weights, "--finetune")
    assert report.layout == layout
    encoder = {n for n in before if n.startswith(("cls_token", "pos_embed", "patch_embed", "blocks"))}
    assert set(report.loaded) == encoder
    sines = fixed_positions(24, (4, 4))
    of_patches = sines[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    larger = F.interpolate(of_patches, (8, 12), mode="bicubic", antialias=True).permute(0, 2, 3, 1).flatten(1, 2)
    torch.testing.assert_close(model.pos_embed, torch.cat([sines[:, :1], larger], dim=1))
    assert report.resampled == ("pos_embed: 4 x 4 to 8 x 12 patches, interpolated",)
    assert set(report.missing) == set(before) - encoder
    message = str(report)
    assert "neck (" in message
    assert "decode_head (" in message
    assert "auxiliary_head (" in message


@pytest.mark.usefixtures("four_depths_of_two_blocks")
def test_a_damaged_encoder_is_refused_by_name(tmp_path):
    checkpoint = torch.load(DATA / "mae_full_tiny.pth", weights_only=False)
    del checkpoint["model"]["blocks.1.mlp.fc1.weight"]
    torch.save(checkpoint, tmp_path / "damaged.pth")
    with pytest.raises(UserError, match=r"blocks.1.mlp.fc1.weight \(missing\)"):
        load_weights(upernet(shape=TWO_BLOCKS), tmp_path / "damaged.pth")


def test_timm_s_weights_give_timm_s_features(tmp_path):
    vit = timm.create_model("vit_tiny_patch16_224", img_size=(32, 48), patch_size=8, **SHAPE, num_classes=3).eval()
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    model = upernet().eval()
    report = load_weights(model, tmp_path / "vit.pth")
    assert report.layout == "ViT classifier"
    images = torch.randn(2, 3, 32, 48)
    expected = vit.forward_intermediates(images, indices=[feature_blocks(4)[1]], intermediates_only=True)[0]
    torch.testing.assert_close(model.pyramid(images)[1], expected)


def test_a_segmenter_loads_whole_at_another_size(tmp_path):
    model = upernet((32, 32))
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    other = upernet((64, 64))
    report = load_weights(other, tmp_path / "model.pth", strict=True)
    assert report.layout == "UperNet"
    assert not report.missing
    assert torch.equal(other.decode_head.fuse[0].weight, model.decode_head.fuse[0].weight)
    with pytest.raises(
        UserError, match=r"decode_head.classifier.1.weight \(\[5, 8, 1, 1\] instead of \[7, 8, 1, 1\]\)"
    ):
        load_weights(upernet(classes=7), tmp_path / "model.pth", strict=True)


def test_an_image_of_another_size_sees_resampled_positions():
    """Sines at twice the grid are nearly what interpolation gives, and the training's own grid is left as it is."""
    model = upernet((64, 64)).eval()
    images = torch.randn(1, 3, 64, 64)
    same = model.predict(images)
    model.pos_embed.data[:, 1:] += 1.0  # every position alike: stays so, whatever the grid
    larger = model.predict(F.interpolate(images, (96, 128)))
    assert larger.shape == (1, 5, 96, 128)
    model.pos_embed.data[:, 1:] -= 1.0
    torch.testing.assert_close(model.predict(images), same, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("device", "kind"), [("cpu", SyncBatchNorm), ("cuda", torch.nn.SyncBatchNorm)])
def test_all_batch_norms_are_synchronised(monkeypatch, device, kind):
    monkeypatch.setenv("WORLD_SIZE", "2")
    model = synchronise_batch_norm(upernet(), torch.device(device))
    assert {type(m) for m in model.modules() if "BatchNorm" in type(m).__name__} == {kind}
