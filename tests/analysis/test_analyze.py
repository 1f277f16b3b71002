"""scripts/analyze.py: its images, its files, its page and its errors."""

from __future__ import annotations

import base64
import io
import json
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from models_lut import LUT
from scripts import analyze
from shared.checkpoints import SETTINGS, save_lut, shaken
from shared.images import write_images
from util.analysis.images import find_images, wrap_name
from util.config.groups import as_dict
from util.config.pretrain import PretrainConfig
from util.runtime import progress as progress_module
from util.runtime.errors import run_main
from util.runtime.progress import progress
from util.weights.vit import grid_of, is_classifier, open_vit

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return save_lut(tmp_path_factory.mktemp("lut") / "checkpoint-7.pth")


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """Return an MAE of the same shape."""
    path = tmp_path_factory.mktemp("mae") / "checkpoint-9.pth"
    settings = PretrainConfig(**vars(SETTINGS) | {"model": "mae_vit_nano_patch4"})
    student = shaken(LUT(**settings.model_arguments), seed=2)
    torch.save({"model": student.state_dict(), "config": as_dict(settings)}, path)
    return path


def opened(name, weights="student", size=(), num_heads=None):
    return open_vit(str(name), weights, "", size, num_heads, CPU)


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
    status, output, _, folder = run_analyze("compare", *flags, "--last_layers", 0)
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
    assert shown in output

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
    """The contents and references of a page; tags have to be closed in order."""

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
    assert "not used: head.weight, head.bias" in vit.origin


def test_unlabelled_images_and_models_of_other_shapes(run_analyze, run, tmp_path):
    write_images(tmp_path / "flat", 12)
    flags = ("--checkpoint", run, "timm:test_vit", "--data_path", tmp_path / "flat", "--show", 1)
    status, output, _, folder = run_analyze("features", *flags, "--method", "tsne", "--neighbours", 2)
    assert status == 0
    assert numbers_of(folder, "features")["classes"] is None
    assert "same class" not in output


def test_models_of_several_depths_and_widths_are_compared_at_their_ends(run_analyze, run):
    flags = ("--checkpoint", run, "timm:test_vit2", "--most_images", 100)  # 6 blocks of 96, 8 of 64
    status, output, _, folder = run_analyze("distance", *flags, "--last_layers", 0)
    assert status == 0
    heads, own_layers, other_layers = (line.split() for line in output.splitlines()[2:5])
    assert heads[3:] == [word for n in range(-8, 0) for word in ("block", str(n))]
    assert (len(own_layers), len(other_layers)) == (7, 9)
    assert [each["layers"] for each in numbers_of(folder, "distance")["models"]] == [list(range(6)), list(range(8))]
    status, output, _, folder = run_analyze("spectrum", *flags)
    assert status == 0
    assert [len(line.split()) - 1 for line in output.splitlines()[3:5]] == [6, 8]


def test_a_file_is_never_looked_at_by_its_name_alone(run_analyze, run, tmp_path):
    (tmp_path / "fake.png").write_text("words")
    status, _, error, _ = run_analyze("attention", "--checkpoint", run, "--image", tmp_path / "fake.png")
    assert (status, error.count("\n")) == (2, 1)
    assert "fake.png: cannot be read" in error


def test_a_bad_image_in_a_data_set_is_named(run_analyze, run, tmp_path):
    write_images(tmp_path / "flat", 3)
    (tmp_path / "flat" / "bad.png").write_bytes(b"words")
    status, _, error, _ = run_analyze("distance", "--checkpoint", run, "--data_path", tmp_path / "flat")
    assert (status, error.count("\n")) == (2, 1)
    assert "bad.png: cannot be read" in error
    assert "mend it or take it out" in error


@pytest.mark.parametrize(
    ("flags", "message"),
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
def test_wrong_input_is_one_line(run_analyze, run, flags, message):
    status, _, error, folder = run_analyze(*flags.split(), "--checkpoint", run)
    assert status == 2
    assert error.count("\n") == 1
    assert message in error
    assert not folder.exists()


def test_no_command_or_help_says_what_there_is(monkeypatch, capsys):
    for arguments in ([], ["--help"]):
        monkeypatch.setattr(sys, "argv", ["analyze.py", *arguments])
        analyze.main()
        assert "attention --checkpoint" in capsys.readouterr().out
