"""Pictures and words of a report, and its page without a browser."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from models_upernet import UperNet
from scripts import report as script
from shared.calls import one_line, script_caller
from shared.checkpoints import save_lut
from shared.flags import TINY_SEGMENTER
from shared.runs import complete, pretraining_lines, segmenting_lines, write_run
from util.config.classifier import FinetuneConfig
from util.config.command_line import parse_config
from util.config.groups import as_dict
from util.config.pretrain import PretrainConfig
from util.config.segment import SegmentConfig
from util.figures.figure import HEAT_ALPHA, HEAT_GROUND, heat_over
from util.report import attention as attention_module
from util.report import report as report_module
from util.report.attention import attention_maps
from util.report.films import encode_frames, evenly
from util.report.report import report
from util.report.settings import commands, differing_settings, environment_rows
from util.report.summary import speed_rows
from util.results.curves import points_per_curve
from util.results.run_folder import open_runs, read_run
from util.runtime.errors import UserError
from util.runtime.files import ROOT

# ---- pictures ----------------------------------------------------------------------------------------------


def test_pictures_are_left_out_evenly():
    assert evenly(3, 5) == [0, 1, 2]
    assert evenly(101, 5) == [0, 25, 50, 75, 100]
    assert evenly(9, 1) == [8]


def test_a_film_fits_its_budget_and_skips_what_is_broken(tmp_path):
    rng = np.random.default_rng(0)
    paths = []
    for epoch in range(30):
        path = tmp_path / f"reconstruction-{epoch:04d}.png"
        Image.fromarray(rng.integers(0, 256, (8, 700, 3), dtype=np.uint8)).save(path)
        paths.append((epoch, path))
    (tmp_path / "reconstruction-0029.png").write_bytes(b"\x89PNG half of it")
    film, broken = encode_frames(paths, 10**9)
    assert (len(film), broken) == (23, ["reconstruction-0029.png"])
    assert film[0][0] == 0
    for budget in (15_000, 3_000, 600):
        frames, _ = encode_frames(paths, budget)
        assert 0 < sum(len(data) for _, data in frames) <= budget
        assert {frames[-1][0], film[-1][0]} == {film[-1][0]}
    assert encode_frames(paths, 10)[0] == []


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"


def enormous_png() -> bytes:
    """Return some bytes that announce 300,000 x 300,000 pixels."""
    head = struct.pack(">IIBBBBB", 300_000, 300_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + head
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(head)) + chunk + struct.pack(">I", zlib.crc32(chunk))


@pytest.mark.parametrize(
    "content", [EPS, enormous_png(), b"", b"P6 9 9 255 ", None], ids=["eps", "huge", "empty", "ppm", "pipe"]
)
def test_pictures_of_other_formats_are_never_opened(tmp_path, monkeypatch, content):
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started"))
    path = tmp_path / "reconstruction-0001.png"
    os.mkfifo(path) if content is None else path.write_bytes(content)
    assert encode_frames([(1, path)], 10**6) == ([], [path.name])


def test_heat_lies_over_the_grey_image_patch_by_patch():
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    image[..., 0] = 90
    picture = heat_over(image, np.array([[0.0, 1.0], [2.0, 4.0]]))
    assert picture.shape == (8, 8, 3)
    for rows in (slice(0, 4), slice(4, 8)):
        for columns in (slice(0, 4), slice(4, 8)):
            assert len(np.unique(picture[rows, columns].reshape(-1, 3), axis=0)) == 1
    grey = (1 - HEAT_ALPHA) * HEAT_GROUND * 30
    assert np.allclose(picture[0, 0], np.array([0, 0, 3]) * HEAT_ALPHA + grey, atol=3)  # inferno begins black
    assert picture[7, 7].astype(int).sum() > picture[7, 0].astype(int).sum() > picture[0, 7].astype(int).sum()


# ---- words -------------------------------------------------------------------------------------------------


def test_only_settings_that_differ_are_rows(tmp_path):
    base = as_dict(PretrainConfig(epochs=2, warmup_epochs=1))
    a = read_run(write_run(tmp_path / "a", [{"step": 1, "loss": 1}], base), "a")
    other = base | {"alpha": 0.5, "input_size": [32, 64], "norm_pix_loss": True}
    b = read_run(write_run(tmp_path / "b", [{"step": 1, "loss": 1}], other), "b")
    assert differing_settings([a, b]) == [
        ["", "a", "b"], ["input_size", "–", "32 64"], ["norm_pix_loss", "no", "yes"], ["alpha", "–", "0.5"]
    ]  # fmt: skip
    assert differing_settings([a, a]) == []
    assert differing_settings([a]) == [["", "a", "default"], ["epochs", "2", "400"], ["warmup_epochs", "1", "–"]]
    tuned = as_dict(FinetuneConfig(epochs=3, warmup_epochs=1))  # of another stage: what only it has is no difference
    c = read_run(write_run(tmp_path / "c", [{"step": 1, "loss": 1}], tuned, stage="finetune"), "c")
    keys = [row[0] for row in differing_settings([a, c])]
    assert "epochs" in keys
    assert "drop_path" not in keys
    assert "mask_ratio" not in keys


def test_speed_and_environment(tmp_path):
    run = read_run(write_run(tmp_path / "a", pretraining_lines(2, 5)), "a")
    assert speed_rows([run])[1][:2] == ["a", "102.5"]
    assert speed_rows([run])[1][3:] == ["25 %", "1 GiB", "0:00:21"]
    rows = dict(environment_rows([run])[1:])
    assert {"commit", "torch", "Python", "CPU", "processes"} <= rows.keys()
    assert rows["processes"] == "1"
    assert not {"command", "stage"} & rows.keys()


def test_commands_repeat_the_run(tmp_path):
    config = as_dict(
        PretrainConfig(model="lut_vit_nano_patch4", patch_size=8, epochs=2, warmup_epochs=1, betas=(0.8, 0.9))
    )
    command = "/opt/python /home/me/main_pretrain.py --data_path 'two words'"
    run = read_run(write_run(tmp_path / "a b", [{"step": 1, "loss": 1}], config, command=command), "a")
    command_of = dict(commands(run))
    assert command_of["As it was last started"] == command
    again = command_of["From its saved settings, even if the recipe has changed"]
    assert again == f"python main_pretrain.py --recipe '{run.path}/config.yaml' --output_dir AGAIN"
    settings = parse_config(PretrainConfig, ["--recipe", str(run.path / "config.yaml"), "--output_dir", "AGAIN"], "x")
    assert as_dict(settings) == config | {"recipe": str(run.path / "config.yaml"), "output_dir": "AGAIN"}
    many = dict(commands(dataclasses.replace(run, facts=run.facts | {"processes": 8})))
    assert many["As it was last started, in each of 8 processes"] == command
    again = many["From its saved settings, even if the recipe has changed"]
    assert again.startswith("torchrun --nproc_per_node=8 main_pretrain.py --recipe ")


# ---- the page ----------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """The addresses that a page would load or lead to, its scripts and its texts."""

    VOID = ("meta", "link", "img", "input", "br")

    def __init__(self):
        super().__init__()
        self.addresses, self.open, self.texts, self.ids = [], [], [], []
        self.scripts: dict[str, str] = {}

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        assert not any(name.startswith("on") for name in attrs), attrs
        assert tag not in ("iframe", "object", "embed", "base", "form", "link")
        self.addresses += [attrs[name] for name in ("src", "href", "srcset", "action", "poster") if name in attrs]
        if "id" in attrs:
            self.ids.append(attrs["id"])
        if tag not in self.VOID:
            self.open.append((tag, attrs))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        tag, attrs = self.open[-1] if self.open else ("", {})
        if tag == "script":
            self.scripts[attrs.get("id", str(len(self.scripts)))] = data
        elif tag != "style":
            self.texts.append(data)


def parsed(html: str) -> Page:
    page = Page()
    page.feed(html)
    page.close()
    assert page.open == []
    return page


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Call scripts/report.py from a folder of its own: exit status, stdout, stderr."""
    (tmp_path / "here").mkdir()
    return script_caller(monkeypatch, capsys, tmp_path / "here", script)


def test_a_page_of_two_runs_needs_nothing_else(call, tmp_path):
    lines = pretraining_lines(2, 5)
    write_run(tmp_path / "lut", lines, pictures=(0, 1, 2), finished={"knn": 21.0})
    write_run(tmp_path / "mae", lines[:8])
    status, output, error = call(f"{tmp_path}/lut {tmp_path}/mae --no_attention --output new/page.html")
    assert (status, error) == (0, "")
    assert output.startswith("new/page.html: 2 runs, ")
    html = Path("new/page.html").read_text()
    page = parsed(html)
    assert all(address.startswith(("data:image/webp;base64,", "#")) for address in page.addresses)
    assert {address[1:] for address in page.addresses if address[0] == "#"} <= set(page.ids)
    assert sum(address.startswith("data:") for address in page.addresses) == 3
    assert "url(" not in html.partition("</style>")[0]
    assert "default-src 'none'" in html
    texts = " ".join(" ".join(page.texts).split())
    for expected in (
        "All runs have the same settings",
        "kNN accuracy",
        "21.00 %",
        "finished",
        "6 of 10 updates, left 0:00:08",
        "git checkout",
    ):
        assert expected in texts, expected
    assert "No pictures were saved by mae." in texts
    data = json.loads(page.scripts["data"])
    assert [run["label"] for run in data["runs"]] == ["lut", "mae"]
    assert len(data["runs"][0]["curves"]["loss"]["x"]) == 10


HOSTILE = "</script><script>alert(1)</script><img src=https://evil.example/x onerror=alert(2)>\"'&{{ 7*7 }}"


def test_hostile_names_and_settings_stay_text(call, tmp_path):
    folder = tmp_path / "<b>run&amp;"
    config = as_dict(PretrainConfig(epochs=2, warmup_epochs=1)) | {
        "model": HOSTILE,
        "data_path": HOSTILE,
        HOSTILE: HOSTILE,
    }
    lines = [{"step": 1, "epoch": 0, "loss": 1.0, HOSTILE: 2.0}]
    write_run(folder, lines, config, command=f"python main_pretrain.py '{HOSTILE}", finished={})
    shutil.copytree(folder, tmp_path / "other")
    label = HOSTILE.replace('"', '\\"').replace("'", "'\"'\"'").replace('\\"', '"')
    status, _, error = call(f"'{folder}' '{tmp_path}/other' --label '{label}' b --no_attention --output page.html")
    assert status == 0, error
    page = parsed(Path("page.html").read_text())
    assert set(page.scripts) == {"0", "data", "2", "3"}  # the theme, the numbers, plotly, and ours
    assert all(address.startswith("#") for address in page.addresses)
    assert json.loads(page.scripts["data"])["runs"][0]["label"] == HOSTILE
    assert HOSTILE in json.loads(page.scripts["data"])["runs"][0]["curves"]
    assert "".join(page.texts).count(HOSTILE) > 4
    assert "49" not in "".join(page.texts).replace(HOSTILE, "").partition("Environment")[0]


def test_long_runs_stay_within_the_size(call, tmp_path):
    lines = pretraining_lines(10, 100)
    for number in range(6):
        write_run(tmp_path / "runs" / str(number), lines)
    runs = open_runs([str(tmp_path / "runs")])
    html = report(runs, "long", None)
    assert len(html.encode()) < report_module.MOST_BYTES
    curve = json.loads(parsed(html).scripts["data"])["runs"][0]["curves"]["loss"]
    most = points_per_curve(runs)
    assert len(curve["x"]) == len(curve["low"]) == most < 1000
    assert f"Curves of more than {most} points (the longest has 1000)" in html


def test_too_large_a_page_is_refused(call, tmp_path, monkeypatch):
    write_run(tmp_path / "a", pretraining_lines(1, 3))
    monkeypatch.setattr(report_module, "MOST_BYTES", 10**6)
    status, _, error = call(f"{tmp_path}/a --no_attention")
    assert (status, error.count("\n")) == (2, 1)
    assert "over 10 MB: give fewer at once" in error
    assert not Path("output").exists()


def test_attention_of_a_checkpoint_on_images_of_its_data_set(tmp_path, monkeypatch):
    config = as_dict(PretrainConfig(epochs=2, warmup_epochs=1, dataset="digits"))
    folder = write_run(tmp_path / "a", pretraining_lines(1, 3), config)
    complete(save_lut(folder / "checkpoint-0.pth"), epoch=0, step=3)
    runs = open_runs([str(folder)])
    attention = attention_maps(runs, (), torch.device("cpu"))
    assert attention.remarks == []
    assert len(attention.images) == 3
    assert [name for name, _ in attention.images[0].rows[0].cells] == ["mean", "head 0", "head 1", "head 2"]
    assert attention.images[0].mark == (62.5, 62.5)  # the patch after the middle of 4 x 4
    texts = " ".join(" ".join(parsed(report(runs, "a", attention)).texts).split())
    assert "a, checkpoint-0.pth" in texts
    monkeypatch.setattr(attention_module, "MOST_MAPS", 11)
    few = attention_maps(runs, (), torch.device("cpu"))
    assert [name for name, _ in few.images[2].rows[0].cells] == ["mean"]
    assert few.remarks == ["So many runs: only means over heads are shown."]


@pytest.mark.parametrize("layout", ["data_path", "folders"])
def test_attention_of_a_segmenter_on_its_validation_images(tmp_path, scenes, layout):
    given = {"data_path": ["--data_path", str(scenes)]}
    given["folders"] = [
        word for split in ("train", "val") for kind in ("images", "masks")
        for word in (f"--{split}_{kind}", str(scenes / kind / split))
    ] + ["--classes", str(scenes / "classes.json")]  # fmt: skip
    settings = parse_config(SegmentConfig, [*TINY_SEGMENTER.split(), *given[layout]], "main_segment.py")
    folder = write_run(tmp_path / "a", segmenting_lines(5, 2), as_dict(settings), stage="segment")
    model = UperNet(**settings.model_arguments(3))
    torch.save({"model": model.state_dict(), "config": as_dict(settings)}, folder / "checkpoint-0.pth")
    complete(folder / "checkpoint-0.pth", epoch=0, step=2)
    runs = open_runs([str(folder)])
    attention = attention_maps(runs, (), torch.device("cpu"))
    assert attention.remarks == []
    names = {path.name for path in (scenes / "images" / "val").iterdir()}
    assert {image.title for image in attention.images} <= names
    assert len({image.title for image in attention.images}) == 3
    assert [name for name, _ in attention.images[0].rows[0].cells] == ["mean", "head 0", "head 1", "head 2"]
    shutil.rmtree(scenes / "images" / "val")
    attention = attention_maps(runs, (), torch.device("cpu"))
    assert attention.images == []
    assert "No images to look at" in attention.remarks[0]


@pytest.mark.slow
def test_real_runs_of_every_stage_with_their_attention(call, pretrain, finetune, linprobe, tmp_path):
    digits = "--dataset digits --in_chans 1 --max_steps 3"
    pretrain(digits, "--monitor_freq 1 --monitor_images 20 --norm_pix_loss", output=tmp_path / "lut")
    (checkpoint,) = (tmp_path / "lut").glob("checkpoint-*step*.pth")
    finetune(digits, "--finetune", checkpoint, "--aa none --reprob 0", output=tmp_path / "tuned")
    linprobe(digits, "--finetune", checkpoint, output=tmp_path / "probed")
    status, _, error = call(f"{tmp_path}/lut {tmp_path}/tuned {tmp_path}/probed --output page.html")
    assert (status, error) == (0, "")
    html = Path("page.html").read_text()
    page = parsed(html)
    texts = " ".join(" ".join(page.texts).split())
    for expected in ("pre-training", "fine-tuning", "linear probing", "Top-1 accuracy", "RankMe", "head 2", "digits["):
        assert expected in texts, expected
    pictures = [address for address in page.addresses if address.startswith("data:")]
    films, looks = 2, 3 * (1 + 3 * (1 + 3))  # before and after; three images, each with three maps of mean and heads
    assert len(pictures) == films + looks
    assert len(set(pictures)) > 12  # the probe's encoder is the pre-trained one
    repeated = re.search(r"python main_finetune.py --recipe \S+config.yaml", texts)
    assert repeated
    again = yaml.safe_load(Path(repeated.group().split()[-1]).read_text())
    assert again["finetune"] == str(checkpoint)


def test_checkpoints_and_images_that_cannot_be_opened_are_said(call, tmp_path):
    config = as_dict(PretrainConfig(epochs=2, warmup_epochs=1)) | {"data_path": "gone"}
    folder = write_run(tmp_path / "a", pretraining_lines(1, 3), config)
    (folder / "checkpoint-0.pth").write_bytes(b"junk")
    manifest = {"sha256": "0" * 64, "bytes": 4, "epoch": 0, "step": 3, "metric": None, "time": 0.0}
    (folder / "checkpoint-0.pth.json").write_text(json.dumps(manifest))
    write_run(tmp_path / "b", pretraining_lines(1, 3), config)
    status, _, error = call(f"{tmp_path}/a {tmp_path}/b --output page.html")
    assert (status, error) == (0, "")
    texts = " ".join(" ".join(parsed(Path("page.html").read_text()).texts).split())
    assert "is damaged, its SHA-256 is not the one that was written" in texts
    assert "b has no complete checkpoint" in texts


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("nowhere", "RUN nowhere: there is no such folder"),
        ("none", "RUN none: is no run, neither it nor a folder below has a log.jsonl"),
        ("", "RUN: give the folder of a run"),
        ("run --output page.pdf", "--output page.pdf: is written as .html"),
        ("run --output /proc/none/page.html", "--output /proc/none/page.html: cannot be written"),
        ("run --label a b", "--label a b: give one for each of 1 runs, or none"),
        ("run --lable a", "did you mean --label?"),
        ("run --device cuda:99", "--device cuda:99"),
    ],
)
def test_wrong_input_is_one_line(call, flags, message):
    write_run(Path("run"), [{"step": 1, "loss": 1.0}])
    Path("none").mkdir()
    before = sorted(Path().rglob("*"))
    status, _, error = call(flags if "label a b" in flags or "--output" in flags else f"{flags} --no_attention")
    assert (status, error.count("\n")) == (2, 1), error
    assert message in error
    assert sorted(Path().rglob("*")) == before


def test_an_image_that_is_none_is_one_line(call, pretrain, tmp_path):
    pretrain("--dataset digits --in_chans 1 --max_steps 1", output=tmp_path / "lut")
    Path("fake.png").write_text("words")
    status, _, error = call(f"{tmp_path}/lut --image fake.png")
    assert (status, error.count("\n")) == (2, 1)
    assert "--image fake.png: cannot be read" in error


def test_help_does_not_import_what_draws():
    """Plotly, matplotlib, SciPy and scikit-learn take seconds."""
    program = (
        "import runpy, sys; sys.argv = ['report.py', '--help']\n"
        "try: runpy.run_path('scripts/report.py', run_name='__main__')\n"
        "finally: print(*sorted({'plotly', 'matplotlib', 'scipy', 'sklearn'} & sys.modules.keys()), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "folders of runs" in done.stdout
    assert done.stderr.strip() == ""


def test_labels_must_fit_the_runs(tmp_path):
    write_run(tmp_path / "a", [{"step": 1, "loss": 1.0}])
    with pytest.raises(UserError, match="give one for each of 1 runs") as error:
        open_runs([str(tmp_path)], ["a", "b"])
    assert "--label a b" in one_line(error)
