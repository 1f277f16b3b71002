"""Checkpoints of any program opened for analysis; the script, its files, its page and its errors."""

from __future__ import annotations

import base64
import io
import json
import sys
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from models_lut import LUT, Encoder
from models_vit import Classifier, LinearProbe
from scripts import analyze
from shared.calls import one_line
from shared.checkpoints import SETTINGS, save_lut, shaken
from shared.images import write_images
from util.analysis.images import find_images, wrap_name
from util.config.groups import as_dict
from util.config.pretrain import PretrainConfig
from util.runtime import progress as progress_module
from util.runtime.errors import UserError, run_main
from util.runtime.files import ROOT
from util.runtime.progress import progress
from util.weights.vit import grid_of, is_classifier, logits_of, open_vit, pooled, tokens_of

DATA = ROOT / "tests" / "files"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return save_lut(tmp_path_factory.mktemp("lut") / "checkpoint-7.pth")


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """An MAE of the same shape."""
    path = tmp_path_factory.mktemp("mae") / "checkpoint-9.pth"
    settings = PretrainConfig(**vars(SETTINGS) | {"model": "mae_vit_nano_patch4"})
    student = shaken(LUT(**settings.model_arguments), seed=2)
    torch.save({"model": student.state_dict(), "config": as_dict(settings)}, path)
    return path


def opened(name, weights="student", size=(), num_heads=None):
    return open_vit(str(name), weights, "", size, num_heads, CPU)


# ---- opening -----------------------------------------------------------------------------------------------
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
    assert "pos_embed: 4 x 4 to 6 x 4 patches" in vit.said
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
    ("name", "said"),
    [
        ("timm:resnet18", "no plain ViT"),
        ("timm:vit_small_patch16_18x2_224", "no plain ViT"),  # several attention layers in a block
        ("timm:vit_bse_patch16_224", "did you mean vit_base_patch16_224"),
        ("nowhere.pth", "no such file"),
    ],
)
def test_what_is_no_vit_is_said_in_one_line(name, said):
    with pytest.raises(UserError, match=said) as error:
        opened(name)
    assert name in one_line(error)


def test_a_file_that_lacks_tensors_of_the_timm_model(tmp_path):
    state = timm.create_model("test_vit").state_dict()
    del state["blocks.0.attn.qkv.weight"]
    torch.save(state, tmp_path / "vit.pth")
    with pytest.raises(UserError, match=r"lacks 1 tensors of timm's test_vit: blocks\.0\.attn\.qkv\.weight"):
        opened(f"timm:test_vit={tmp_path / 'vit.pth'}")


# ---- images ------------------------------------------------------------------------------------------------
def test_files_keep_their_order_and_a_data_set_is_drawn_by_the_seed(tmp_path, run):
    paths = [str(path) for path in write_images(tmp_path, 3)][::-1]
    files = find_images(paths, "", "", "val", most=2, show=1, seed=0)
    assert ([files.source.name(i) for i in files.order], files.num_shown) == (paths, 3)
    drawn = [find_images((), "", "digits", "val", most=20, show=30, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0].order == drawn[1].order != drawn[2].order
    assert (len(drawn[0].order), drawn[0].num_shown) == (20, 20)
    inputs, pictures = drawn[0].shown(opened(run))
    assert inputs.shape == (20, 1, 32, 32)
    assert pictures.shape == (20, 32, 32, 3)
    assert pictures.dtype == np.uint8
    loaded = torch.cat([pixels for pixels, _ in drawn[0].loader(opened(run))])
    assert np.array_equal(loaded[:, 0].numpy(), pictures[..., 0])


def test_names_are_broken_after_spaces_slashes_and_underscores():
    assert wrap_name("vit_small_patch16_224", 12) == "vit_small_\npatch16_224"
    assert wrap_name("a run/checkpoint", 8) == "a run/\ncheckpoint"
    assert wrap_name("unbreakable", 3) == "unbreakable"


def test_progress_says_how_much_is_done_and_left(monkeypatch, capsys):
    monkeypatch.setattr(progress_module, "SECONDS_BETWEEN_LINES", 0)
    assert list(progress("abc", 6, "title", "letters", lambda letter: 2)) == ["a", "b", "c"]
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [f"title: {n}/6 letters" for n in (2, 4, 6)]
    assert all("left" in line for line in lines)


# ---- the script --------------------------------------------------------------------------------------------
@pytest.fixture
def run_analyze(monkeypatch, capsys, tmp_path):
    """Call scripts/analyze.py with an output folder: exit status, stdout, stderr, folder."""

    def call(*arguments):
        output = tmp_path / "out"
        monkeypatch.setattr(sys, "argv", ["analyze.py", *map(str, arguments), "--output_dir", str(output)])
        status = 0
        try:
            run_main("analyze.py", analyze.main)
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr(), output

    return call


def numbers_of(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def test_attention_of_image_files_at_two_sizes_side_by_side(run_analyze, run, tmp_path):
    files = write_images(tmp_path / "in", 2)
    flags = ("--checkpoint", run, "timm:test_vit", "--image", *files, "--query", "0,0", "3,1", "--heads", 1)
    status, _, _, folder = run_analyze("attention", *flags, "--label", "ours", "theirs")
    assert status == 0
    numbers = numbers_of(folder, "attention")
    assert numbers["images"] == [str(path) for path in files]
    assert numbers["queries"] == [[0, 0], [3, 1]]
    assert [each["label"] for each in numbers["models"]] == ["ours", "theirs"]
    for each, grid in zip(numbers["models"], ((4, 4), grid_of(opened("timm:test_vit").model)), strict=True):
        assert np.array(each["maps"]).shape == (2, 2, 1, *grid)
        assert each["heads"] == [1]
    for name in ("attention", "attention-heads"):
        assert Image.open(folder / f"{name}.png").size[0] > 400


def test_gradcam_of_a_classifier_names_its_class(run_analyze, tmp_path):
    files = write_images(tmp_path / "in", 1)
    flags = ("--checkpoint", "timm:test_vit", "--image", *files)
    status, _, _, folder = run_analyze("gradcam", *flags, "--target_class", 4)
    assert status == 0
    (model,) = numbers_of(folder, "gradcam")["models"]
    assert model["predicted"][0].startswith("class 4, ")
    assert np.array(model["maps"]).min() >= 0


def test_compare_writes_everything_and_a_page_that_needs_no_network(run_analyze, run, other):
    flags = ("--checkpoint", other, run, "--label", "<MAE>", "LUT", "--most_images", 100, "--show", 1)
    status, said, _, folder = run_analyze("compare", *flags, "--last_layers", 0)
    assert status == 0
    pictures = {path.name for path in folder.glob("*.png")}
    assert pictures == {
        *("attention.png", "attention-heads.png", "gradcam.png", "distance.png", "spectrum.png"),
        *("features.png", "features-patches.png", "features-neighbours.png"),
    }
    distance, spectrum = numbers_of(folder, "distance"), numbers_of(folder, "spectrum")
    assert distance["images"] == spectrum["images"] == 100
    assert np.array(distance["models"][0]["mean"]).shape == (6, 3)
    assert np.array(spectrum["models"][1]["singular_values"]).shape == (6, 96)
    assert 0 <= numbers_of(folder, "features")["models"][0]["same_class_percent"] <= 100
    shown = f"{np.mean(distance['models'][1]['mean'][5]):.4f}"
    assert shown in said

    html = (folder / "compare.html").read_text()
    page = Page()
    page.feed(html)
    assert len(page.pictures) == len(pictures)
    for picture in page.pictures:
        Image.open(io.BytesIO(base64.b64decode(picture))).verify()
    assert page.addresses == {f"#{number}" for number in range(5)} <= {f"#{name}" for name in page.ids}
    assert {"viewport"} <= page.metas
    assert "color-scheme: light dark" in html
    assert "://" not in html
    assert "&lt;MAE&gt;" in html
    assert "<MAE>" not in html
    assert shown in html


def test_compare_leaves_out_what_the_data_do_not_allow(run_analyze, run, other):
    flags = ("--checkpoint", other, run, "--most_images", 5, "--show", 1, "--input_size", 16, "--last_layers", 1)
    status, printed, _, folder = run_analyze("compare", *flags)
    assert status == 0
    spectrum = "spectrum is left out: the spectrum of 96 features needs more than 96 images, there are 5"
    features = "features is left out: --neighbours 5: needs 7 images or more, there are 5"
    html = (folder / "compare.html").read_text()
    for reason in (spectrum, features):
        assert reason in printed
        assert reason in html
    assert {path.stem for path in folder.glob("*.json")} == {"attention", "gradcam", "distance"}


class Page(HTMLParser):
    """What a page holds and refers to; tags have to be closed in order."""

    def __init__(self):
        super().__init__()
        self.pictures, self.addresses, self.ids, self.metas = [], set(), set(), set()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        assert tag not in ("script", "link", "iframe")
        if "src" in attrs:
            kind, _, data = attrs["src"].partition(",")
            assert (tag, kind) == ("img", "data:image/png;base64")
            assert attrs["alt"]
            self.pictures.append(data)
        self.addresses |= {attrs["href"]} if "href" in attrs else set()
        self.ids |= {attrs["id"]} if "id" in attrs else set()
        self.metas |= {attrs["name"]} if tag == "meta" and "name" in attrs else set()


def test_a_timm_file_with_other_classes_has_none_here(tmp_path):
    torch.save(timm.create_model("test_vit", num_classes=5).state_dict(), tmp_path / "vit.pth")
    vit = opened(f"timm:test_vit={tmp_path / 'vit.pth'}")
    assert not is_classifier(vit.model)
    assert "not used: head.weight, head.bias" in vit.said


def test_unlabelled_images_and_models_of_other_shapes(run_analyze, run, tmp_path):
    write_images(tmp_path / "flat", 12)
    flags = ("--checkpoint", run, "timm:test_vit", "--data_path", tmp_path / "flat", "--show", 1)
    status, said, _, folder = run_analyze("features", *flags, "--method", "tsne", "--neighbours", 2)
    assert status == 0
    assert numbers_of(folder, "features")["classes"] is None
    assert "same class" not in said


def test_models_of_several_depths_and_widths_are_compared_at_their_ends(run_analyze, run):
    flags = ("--checkpoint", run, "timm:test_vit2", "--most_images", 100)  # 6 blocks of 96, 8 of 64
    status, said, _, folder = run_analyze("distance", *flags, "--last_layers", 0)
    assert status == 0
    heads, ours, theirs = (line.split() for line in said.splitlines()[2:5])
    assert heads[3:] == [word for n in range(-8, 0) for word in ("block", str(n))]
    assert (len(ours), len(theirs)) == (7, 9)
    assert [each["layers"] for each in numbers_of(folder, "distance")["models"]] == [list(range(6)), list(range(8))]
    status, said, _, folder = run_analyze("spectrum", *flags)
    assert status == 0
    assert [len(line.split()) - 1 for line in said.splitlines()[3:5]] == [6, 8]


def test_a_file_is_never_looked_at_by_its_name_alone(run_analyze, run, tmp_path):
    (tmp_path / "fake.png").write_text("words")
    status, _, said, _ = run_analyze("attention", "--checkpoint", run, "--image", tmp_path / "fake.png")
    assert (status, said.count("\n")) == (2, 1)
    assert "fake.png: cannot be read" in said


def test_a_bad_image_in_a_data_set_is_named(run_analyze, run, tmp_path):
    write_images(tmp_path / "flat", 3)
    (tmp_path / "flat" / "bad.png").write_bytes(b"words")
    status, _, said, _ = run_analyze("distance", "--checkpoint", run, "--data_path", tmp_path / "flat")
    assert (status, said.count("\n")) == (2, 1)
    assert "bad.png: cannot be read" in said
    assert "mend it or take it out" in said


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("attention --query 4,0", "--query 4,0: outside the 4 x 4 patches"),
        ("attention --query 7", "--query 7: give row,col"),
        ("attention --layer 6", "--layer 6:"),
        ("attention --layer -7", "6 blocks, 0 to 5 or -6 to -1"),
        ("attention --heads 3", "has 3 heads, 0 to 2"),
        ("gradcam --target_class 1", "is an encoder without classes"),
        ("distance --last_layers 7", "has 6 blocks"),
        ("spectrum --most_images 96", "96 features needs more than 96 images, there are 96"),
        ("features --most_images 6", "--neighbours 5: needs 7 images or more, there are 6"),
        ("features --split test", "test"),
        ("distance --input_size 33", "no multiple of the patch"),
        ("distance --label a b", "give one for each of 1 checkpoints"),
        ("distance --weights momentum student", "or one for each of 1 checkpoints"),
        ("distance --dataset hfids/x", "--dataset hfids/x"),
        ("compare", "compare takes two"),
        ("distanse", "did you mean distance?"),
        ("distance --image . --data_path .", "--image .: give it or a data set, not both"),
        ("attention --image .", "--image .: is a folder, give it to --data_path"),
        ("attention --image gone.png", "gone.png: cannot be read"),
    ],
)
def test_wrong_input_is_one_line(run_analyze, run, flags, said):
    status, _, error, folder = run_analyze(*flags.split(), "--checkpoint", run)
    assert status == 2
    assert error.count("\n") == 1
    assert said in error
    assert not folder.exists()


def test_no_command_or_help_says_what_there_is(monkeypatch, capsys):
    for arguments in ([], ["--help"]):
        monkeypatch.setattr(sys, "argv", ["analyze.py", *arguments])
        analyze.main()
        assert "attention --checkpoint" in capsys.readouterr().out
