"""The bench: its baseline equals ours, it refuses what differs, counts what it says, and reads its flags."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from matplotlib.figure import Figure
from PIL import Image

import util.bench.limits
import util.bench.measure
import util.bench.variant
from scripts import bench
from shared.bench import CPU, FORMS, TINY_STEP, variants
from shared.calls import script_caller
from shared.images import write_images
from util.bench.config import EpochConfig, LoaderConfig, StepConfig
from util.bench.epoch import PARTS, recipe_of, summary, timed_run
from util.bench.loader import bench_images
from util.bench.measure import check_losses, measure
from util.bench.pil_pipeline import PilDataset
from util.bench.plot import plot_sweep
from util.bench.step import Stepper, StepperProcess
from util.bench.timing import Spread, named_spreads
from util.config.command_line import parse_config
from util.config.pretrain import PretrainConfig
from util.data.sources import ArraySource
from util.data.views import Normalise
from util.figures.figure import number_log_axis
from util.runtime.errors import RunError
from util.train.pretraining import build_state


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Call scripts/bench.py from an empty folder: exit status, stdout, stderr."""
    return script_caller(monkeypatch, capsys, tmp_path, bench)


# ---- variants by flags --------------------------------------------------------------------------------------


def test_plain_stands_once_for_flags_that_it_does_not_know():
    rows = variants("--forms asymmetric", "compile=none,block", "batch_size=4,6")
    assert [variant.name for variant in rows] == [
        "asymmetric ours compile=none batch_size=4",
        "asymmetric ours compile=none batch_size=6",
        "asymmetric ours compile=block batch_size=4",
        "asymmetric ours compile=block batch_size=6",
        "asymmetric plain batch_size=4",
        "asymmetric plain batch_size=6",
    ]
    assert [variant.config.batch_size for variant in rows[-2:]] == [4, 6]
    assert rows[0].work == rows[2].work == rows[4].work != rows[1].work


def test_every_setting_of_the_work_is_there():
    names = set(StepConfig.__dataclass_fields__)
    assert set(util.bench.variant.PLAIN_KNOWS) <= names


def test_a_form_says_what_is_trained():
    mae, asymmetric, symmetric = (variant.config for variant in variants("--variants ours --alpha 0.5"))
    assert (mae.has_momentum_encoder, mae.num_views) == (False, 1)
    assert (asymmetric.views, asymmetric.resolved_alpha) == ("asymmetric", 0.5)
    assert (symmetric.views, symmetric.resolved_alpha) == ("symmetric", 0.5)


def test_depth_is_that_of_the_encoder():
    config = variants("--depth 5")[0].config
    student = build_state(config, None, CPU)[0].model
    assert (len(student.blocks), len(student.decoder_blocks)) == (5, 2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("stepp", "did you mean step?"),
        ("step --forms paper", "paper"),
        ("step --forms mae mae", "--forms mae mae: give each once"),
        ("step --vary compil=true,false", "--vary compil: unknown, did you mean compile?"),
        ("step --vary rounds=1,2", "--vary rounds: unknown"),
        ("step --vary compile=maybe", "--compile maybe: unknown"),
        ("step --vary amp", "write name=value,value"),
        ("step --vary batch_size=8,-1", "--batch_size -1"),
        ("step --model mae_vit_nano_patch4 --forms asymmetric", "--forms asymmetric: alpha is 0"),
        ("step --distance smooth_l1", "--variants ours"),
        ("step --method simmim", "--variants ours"),
        ("step --sweep width", "--sweep width: unknown"),
        ("step --sweep batch --find_batch --memory_gib 1", "leave out --find_batch"),
        ("step --find_batch --device cpu", "--memory_gib"),
        ("step --memory_gib 3", "--find_batch"),
        ("step --plot a.png", "--sweep"),
        ("step --profile taken", "--profile taken: cannot be written"),
        ("step --json nowhere/a.json", "--json nowhere/a.json: cannot be written"),
        ("step --json .", "--json .: cannot be written"),
        ("loader --data_path nowhere", "there is no such file or folder"),
        ("loader --batch_size 8 --images 4", "--batch_size 8"),
        ("loader --scale_to 500", "--scale_to 500: write WIDTHxHEIGHT"),
        ("loader --dataset digits --in_chans 1 --batch_size 2000 --images 2000", "the data set has 1437 images"),
        ("epoch --depth 2", "--depth 2"),
        ("limits --numbers tf32 --device cpu", "--numbers tf32"),
        ("limits --folder taken", "--folder taken: cannot be written"),
    ],
)
def test_a_wrong_flag_is_one_line_that_names_it(call, flags, message, tmp_path):
    (tmp_path / "taken").touch()
    status, _, error = call(flags)
    assert status == 2
    assert message in error
    assert error.count("\n") == 1


# ---- measuring ----------------------------------------------------------------------------------------------


@pytest.fixture
def small_machine(monkeypatch):
    """Limits are measured on small matrices and arrays."""
    monkeypatch.setattr(util.bench.limits, "MATRIX_SIDES", dict(cpu=(32, 64)))
    monkeypatch.setattr(util.bench.measure, "BANDWIDTH_BYTES", 2**16)


def test_a_row_says_all(small_machine):
    rows = measure([Stepper(variant) for variant in variants("--forms asymmetric")], "step")
    ours, plain = rows
    parts = ["data", "target", "student", "backward", "optimiser", "momentum"]
    for row in rows:
        assert list(row["ms_of_parts"]) == parts
        assert all(x.median >= 0 for x in row["ms_of_parts"].values())
        assert len(row["seconds"]) == 2
        assert row["images_per_second"].lower <= row["images_per_second"].median <= row["images_per_second"].upper
        fps = row["gflop_per_image"] * row["images_per_second"].median / 1000
        assert 0.5 * fps < row["tflops"].median < 2 * fps
        assert row["memory_bytes"] > 2**20
        assert row["compiled_while_timed"] == 0
        assert row["share_of_matrix_peak"].median > 0
        assert row["settings"]["views"] == "asymmetric"
    assert ours["of_first"] == Spread(1, 1, 1)
    assert ours["losses"] == pytest.approx(plain["losses"], rel=1e-4)
    (sentence,) = bench.comparisons(rows)
    assert "times as fast as asymmetric plain" in sentence
    json.dumps(named_spreads(rows))


def test_what_is_left_to_the_device_is_part_of_the_update():
    flags = "--forms asymmetric --variants ours --augment_on device"
    steppers = [Stepper(variant) for variant in variants(flags, "cache=none,ram,device")]
    losses = check_losses(steppers, 2)
    assert len({tuple(values) for values in losses.values()}) == 1
    assert all(stepper.flops_per_image() > 0 for stepper in steppers)


@pytest.mark.parametrize("form", FORMS)
def test_parts_are_timed_without_leaving_a_trace(form):
    for stepper in (Stepper(variant) for variant in variants(f"--forms {form} --accum_iter 2")):
        before = dict(vars(stepper.trainer))
        assert {"data", "target", "student", "backward", "optimiser", "momentum"} == set(stepper.parts())
        assert set(vars(stepper.trainer)) == set(before)
        assert getattr(stepper.trainer, "model", None) is before.get("model")


def test_a_profile_leaves_a_trace_and_a_table(tmp_path):
    (variant,) = variants("--forms mae --variants plain")
    profile = Stepper(variant).profile(tmp_path)
    assert "aten::addmm" in profile.operators
    assert profile.waits["aten::item"] >= 4  # loss, mim, bc, norm
    trace = json.loads((tmp_path / "mae-plain.json").read_text())
    assert any(event.get("name") == "update" for event in trace["traceEvents"])


# ---- loader -------------------------------------------------------------------------------------------------


def test_the_pil_pipeline_makes_the_same_of_a_plain_image():
    config = parse_config(LoaderConfig, TINY_LOADER.split(), "bench.py loader")
    pixels = torch.tensor([30, 130, 230], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 40, 50).contiguous()
    views = PilDataset(ArraySource(pixels, None, None, "plain"), config)[0, 0]
    expected = Normalise(config.resolved_mean, config.resolved_std, CPU)(pixels[0, :, :32, :32])
    assert views.shape == (2, 3, 32, 32)
    assert views.dtype == torch.float32
    torch.testing.assert_close(views[0], expected)


TINY_LOADER = "--model lut_vit_nano_patch4 --batch_size 4 --images 8 --rounds 2"


def test_loader_on_a_folder(call, tmp_path):
    write_images(tmp_path / "images", 10)
    status, shown, error = call(
        f"loader {TINY_LOADER} --data_path images --scale_to 50x40 --vary crop=src,rrc --json out.json"
    )
    assert (status, error) == (0, "")
    assert "re-encoded at 50x40" in shown
    report = json.loads((tmp_path / "out.json").read_text())
    assert [row["name"] for row in report["rows"]] == ["ours crop=src", "pil crop=src", "ours crop=rrc", "pil crop=rrc"]
    assert all(row["images_per_second_and_core"]["median"] > 0 for row in report["rows"])
    assert report["images"] == 8
    assert {"command", "torch", "device", "cores", "git_commit", "started"} <= set(report)


def test_images_are_re_encoded_at_the_size_asked_for(tmp_path):
    write_images(tmp_path / "images", 3, size=(40, 30))
    flags = f"{TINY_LOADER} --data_path {tmp_path / 'images'} --scale_to 60x20 --batch_size 2"
    images = bench_images(parse_config(LoaderConfig, flags.split(), "bench.py loader"))
    assert len(images) == 2
    (tmp_path / "one.jpg").write_bytes(images.read(0))
    with Image.open(tmp_path / "one.jpg") as image:
        assert (image.format, image.size) == ("JPEG", (20, 60))  # upright, as the original


# ---- epoch --------------------------------------------------------------------------------------------------

TINY_EPOCH = (
    "--model lut_vit_nano_patch4 --patch_size 16 --decoder_depth 1 --head_mlp_dim 16 --batch_size 128 --max_steps 4"
    " --dataset digits --in_chans 1 --input_size 32 --amp fp32 --device cpu --num_workers 0 --print_freq 2"
    " --monitor_freq 1 --monitor_images 50"
)


def test_the_settings_of_a_run_survive_as_a_recipe(tmp_path):
    flags = "--dataset digits --in_chans 1 --no_photometric --betas 0.9 0.99 --mean 0.5 --clip_grad 1 --epochs 3"
    config = parse_config(EpochConfig, flags.split(), "bench.py epoch")
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(recipe_of(config)))
    read = parse_config(PretrainConfig, ["--recipe", str(tmp_path / "settings.yaml")], "main_pretrain.py")
    for name, value in vars(read).items():
        assert name in ("recipe",) or value == getattr(config, name), name


def test_a_run_is_taken_apart(tmp_path):
    config = parse_config(EpochConfig, TINY_EPOCH.split(), "bench.py epoch")
    result = timed_run(recipe_of(config), config.effective_batch, str(tmp_path))
    parts = [result[part] for part in PARTS]
    assert all(part > 0 for part in parts)
    assert sum(parts) == pytest.approx(result["total"])
    assert list((tmp_path / "run").glob("checkpoint-0*.pth"))
    assert result["loss"] > 0
    assert result["compiled_later"] == 0


def test_summary_by_hand():
    lines = [
        dict(step=2, images_per_second=10.0, data_wait=0.5, memory_bytes=1, loss=3.0),
        dict(step=6, images_per_second=40.0, data_wait=0.25, memory_bytes=2, loss=2.0),
    ]
    seconds = dict(saving=1.0, evaluation=2.0, epochs=5.0)
    result = summary(lines, images_per_update=10, seconds=seconds, total=10.0)
    assert result["images_per_second"] == 40.0  # without the first interval
    assert result["images_per_second_whole_run"] == 6.0
    assert result["data wait"] == pytest.approx(2 * 0.5 + 1 * 0.25)
    assert result["training"] == pytest.approx(5 - 1.25)
    assert result["start"] == 2.0
    assert result["memory_bytes"] == 2


# ---- limits, pictures ---------------------------------------------------------------------------------------


def test_limits(call, tmp_path):
    status, shown, error = call(
        "limits --device cpu --numbers fp32 bf16 --sides 8 16 --seconds 0.01 --array_mib 1 --file_mib 1 --json out.json"
    )
    assert (status, error) == (0, "")
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    units = [row["unit"] for row in rows]
    assert units == ["TFLOP/s"] * 4 + ["GB/s"] * 2 + ["MiB/s", "images/s"]
    assert all(row["value"]["median"] > 0 for row in rows)
    assert len(shown.splitlines()) == len(rows)
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_the_precision_of_matrix_products_is_left_as_it_was():
    before = torch.get_float32_matmul_precision()
    with util.bench.limits.tensor_float(True):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize("values", [("8", "16", "32"), ("src", "rrc")])
def test_a_sweep_is_drawn(tmp_path, values):
    rows_of = {
        value: [
            {"name": name, "images_per_second": Spread(x, 0.9 * x, 1.1 * x)} for name, x in (("a", i), ("b", 2 * i))
        ]
        for i, value in enumerate(values, start=1)
    }
    plot_sweep("batch_size", rows_of, tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 10


@pytest.mark.parametrize(("low", "high"), [(3.0, 4.3), (0.4, 3.0), (2.0, 25.0), (1.0, 3000.0)])
def test_a_logarithmic_axis_has_numbers_whatever_it_spans(low, high):
    axes = Figure().subplots()
    axes.plot([1, 2], [low, high])
    axes.set_yscale("log")
    number_log_axis(axes)
    axes.figure.draw_without_rendering()
    shown = [label.get_text() for place, label in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)
             if low <= place <= high]  # fmt: skip
    assert len(shown) >= 3
    assert len(set(shown)) == len(shown)
    assert all(float(text) for text in shown)


# ---- whole commands, in processes of their own --------------------------------------------------------------


@pytest.mark.slow
def test_a_sweep_of_steps(call, small_machine, tmp_path):
    status, shown, _ = call(f"step {TINY_STEP} --forms asymmetric --sweep batch=4 --json out.json")
    assert status == 0
    assert "times as fast as asymmetric plain" in shown
    report = json.loads((tmp_path / "out.json").read_text())
    assert [(row["name"], row["images"]) for row in report["rows"]["4"]] == [
        ("asymmetric ours", 4),
        ("asymmetric plain", 4),
    ]
    assert (tmp_path / "out.png").stat().st_size > 1000


@pytest.mark.slow
def test_epoch_compares_runs_and_leaves_nothing(call, tmp_path):
    status, shown, error = call(
        f"epoch {TINY_EPOCH} --rounds 1 --vary batch_size=64,128 --output_dir runs --json out.json"
    )
    assert (status, error) == (0, "")
    assert "batch_size=128" in shown
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert len(rows) == 2
    assert not list(Path("runs").iterdir())


@pytest.mark.slow
def test_a_process_that_dies_is_named(monkeypatch):
    (variant,) = variants("--forms mae --variants ours")
    with StepperProcess(variant) as stepper:
        stepper.updates(1)
        (process,) = stepper._pool._processes.values()
        os.kill(process.pid, 9)
        with pytest.raises(RunError, match="mae ours: its process died"):
            stepper.turn()
