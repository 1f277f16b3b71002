"""The pre-training main and engine on real files: inputs, accumulation, resume, processes, wrong input."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from torch._dynamo.utils import counters

from engine_pretrain import PretrainTrainer
from models_lut import LUT, MomentumEncoder
from shared.flags import TINY
from shared.pretrain import random_batch, trainer_of
from shared.ranks import Ranks, command
from shared.streams import Numbers
from util.config.command_line import parse_config
from util.config.pretrain import PretrainConfig
from util.data.samples import Batch
from util.results.results import read_results
from util.runtime.amp import computes_in_bf16
from util.runtime.files import ROOT
from util.weights.checkpoint import load_checkpoint


def losses(log: list[dict], name: str = "loss") -> list[float]:
    return [line[name] for line in log if name in line]


# ---- what it reads --------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["class_folders", "flat_folder", "tar_file"])
def test_every_kind_of_data_path(pretrain, request, kind):
    log = pretrain("--data_path", request.getfixturevalue(kind), "--monitor_freq 1")
    assert len(losses(log)) == 2 * 32 // 8
    monitored = [line for line in log if "rankme" in line]
    assert [line["epoch"] for line in monitored] == [0, 1, 2]
    for accuracy in ("knn", "linear"):
        assert all((accuracy in line) == (kind == "class_folders") for line in monitored)


def test_non_square_images_of_one_channel(pretrain, flat_folder, tmp_path):
    log = pretrain("--data_path", flat_folder, "--in_chans 1 --input_size 32 48 --monitor_freq 2")
    assert len(losses(log)) == 8
    model = load_checkpoint(tmp_path / "run" / "checkpoint-1.pth")["model"]
    assert model["patch_embed.proj.weight"].shape == (96, 1, 8, 8)
    assert model["pos_embed"].shape == (1, 1 + 4 * 6, 96)
    assert (tmp_path / "run" / "pictures" / "reconstruction-0002.png").exists()


def test_a_checkpoint_is_laid_out_as_mae_s_and_the_release_s(pretrain, flat_folder, tmp_path):
    """Other programs can read it: plain torch.load, the names of the release, `epoch` as MAE means it."""
    pretrain("--data_path", flat_folder)
    saved = torch.load(tmp_path / "run" / "checkpoint-1.pth")
    assert {"model", "optimizer", "scaler", "model_ema", "epoch"} <= set(saved)
    assert saved["epoch"] == 1  # the last that was finished
    config = parse_config(PretrainConfig, TINY.split(), "main_pretrain.py")
    student = LUT(**config.model_arguments)
    assert set(saved["model"]) == set(student.state_dict())
    assert set(saved["model_ema"]) == {f"ema.{name}" for name in MomentumEncoder(student).state_dict()}


@pytest.mark.parametrize("views", ["asymmetric", "symmetric"])
def test_the_loss_falls_on_digits(pretrain, views):
    curve = losses(pretrain("--dataset digits --in_chans 1 --batch_size 64 --epochs 3 --views", views))
    assert sum(curve[-5:]) / 5 < 0.8 * sum(curve[:5]) / 5


def test_mae_builds_no_heads_and_no_momentum_encoder(pretrain, flat_folder, tmp_path):
    log = pretrain("--data_path", flat_folder, "--alpha 0")
    checkpoint = load_checkpoint(tmp_path / "run" / "checkpoint-1.pth")
    assert "model_ema" not in checkpoint
    assert not any(name.startswith(("head", "predictor")) for name in checkpoint["model"])
    assert all("bc" not in line for line in log)


def test_mae_and_lut_start_from_the_same_weights():
    def weights(alpha: str) -> dict:
        config = parse_config(PretrainConfig, [*TINY.split(), "--alpha", alpha], "main_pretrain.py")
        torch.manual_seed(0)
        return LUT(**config.model_arguments).state_dict()

    mae, lut = weights("0"), weights("1")
    assert set(mae) < set(lut)
    assert all(torch.equal(mae[name], lut[name]) for name in mae)


@pytest.mark.parametrize("distance", ["cosine", "infonce"])
@pytest.mark.parametrize("views", ["asymmetric", "symmetric"])
def test_accumulation_over_four_is_one_batch_of_four_times_the_size(views, distance):
    flags = f"--views {views} --distance {distance} --head_norm_layer none --clip_grad 0.5 --lr 1e-3".split()
    one_batch, parts = trainer_of(*flags), trainer_of(*flags, "--accum_iter", "4")
    batch = random_batch(16)
    one_batch.update([batch])
    parts.update([Batch(*(x[i : i + 4] for x in batch)) for i in range(0, 16, 4)])
    assert parts.meter.drain()["loss"] == pytest.approx(one_batch.meter.drain()["loss"], abs=1e-6)
    for state in ("model", "model_ema"):
        a, b = (getattr(t.state, state).state_dict() for t in (one_batch, parts))
        for name, tensor in a.items():
            if tensor.is_floating_point() and not name.endswith("qkv.bias"):  # its keys' part has no gradient
                # AdamW moves each weight by up to the learning rate, however small, and noisy, its gradient is
                assert (tensor - b[name]).abs().max() < 5e-6, name
                assert (tensor - b[name]).abs().mean() < 1e-8, name


def test_after_an_overflow_neither_encoder_moves():
    """The scaler of fp16 leaves the step out, the scale falls, and the next step is taken."""
    trainer = trainer_of()
    trainer.state.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    student, momentum_encoder = trainer.state.model, trainer.state.model_ema
    start = {name: x.clone() for name, x in trainer.state.state_dict()["model"].items()}
    followed = {name: p.clone() for name, p in momentum_encoder.named_parameters()}
    hook = student.cls_token.register_hook(lambda gradient: gradient * float("inf"))
    trainer.update([random_batch(8)])
    assert all(torch.equal(p, start[name]) for name, p in student.named_parameters())
    assert all(torch.equal(p, followed[name]) for name, p in momentum_encoder.named_parameters())
    assert trainer.state.scaler.get_scale() == 2
    hook.remove()
    trainer.update([random_batch(8)])
    assert not torch.equal(student.cls_token, start["cls_token"])
    assert not torch.equal(momentum_encoder.cls_token, followed["cls_token"])


def test_the_momentum_encoder_moves_once_per_update_and_by_the_schedule():
    trainer = trainer_of("--momentum", "0.5", "--momentum_end", "0.5")
    before = {name: p.clone() for name, p in trainer.state.model_ema.named_parameters()}
    trainer.update([random_batch(8)])
    student = dict(trainer.state.model.named_parameters())
    for name, p in trainer.state.model_ema.named_parameters():
        torch.testing.assert_close(p, 0.5 * before[name] + 0.5 * student[name])


def test_a_non_finite_loss_stops_the_run_without_a_checkpoint(pretrain, flat_folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        pretrain("--data_path", flat_folder, "--lr 1e30 --warmup_epochs 1 --print_freq 4")
    assert stop.value.code == 1
    assert "the loss is no longer finite" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("checkpoint-*.pth"))
    report = json.loads((tmp_path / "run" / "nonfinite.json").read_text())
    assert report["update"] in (2, 3)
    assert report["lr"] == pytest.approx(1e30 * (report["update"] - 1) / 4)  # not that of the log line, update 4


def test_a_finished_run_that_is_called_again_keeps_its_result(pretrain, flat_folder, tmp_path):
    for _ in range(2):
        pretrain("--data_path", flat_folder, "--auto_resume --monitor_freq 1")
    (result,) = read_results(tmp_path / "run")
    assert {"loss", "mim", "bc", "rankme"} <= result["metrics"].keys()


# ---- stop and go on -------------------------------------------------------------------------------------
@pytest.mark.parametrize("stop_after", [4, 6])  # at the epoch's end; in the middle of one
def test_a_resumed_run_ends_bit_equal(pretrain, flat_folder, tmp_path, stop_after):
    uninterrupted, parts = tmp_path / "whole", tmp_path / "parts"
    data = ("--data_path", flat_folder)
    expected = pretrain(*data, output=uninterrupted)
    pretrain(*data, "--max_steps", str(stop_after), output=parts)
    log = pretrain(*data, "--auto_resume", output=parts)
    assert losses(log) == losses(expected)
    seconds = [line["seconds"] for line in log]
    assert seconds == sorted(seconds)
    assert read_results(parts)[-1]["seconds"] >= seconds[-1]  # of both parts
    a, b = (load_checkpoint(folder / "checkpoint-1.pth") for folder in (uninterrupted, parts))
    for part in ("model", "model_ema"):
        assert all(torch.equal(a[part][name], b[part][name]) for name in a[part]), part
    for moments in ("exp_avg", "exp_avg_sq", "step"):
        old, new = ([group[moments] for group in checkpoint["optimizer"]["state"].values()] for checkpoint in (a, b))
        assert all(torch.equal(x, y) for x, y in zip(old, new, strict=True))


@pytest.mark.parametrize("stop_after", [3, 4])  # at the epoch's end; in the middle of one
def test_a_stream_resumes_with_what_it_has_not_had(pretrain, tmp_path, monkeypatch, capsys, stop_after):
    monkeypatch.setattr(
        "util.train.pretraining.open_images", lambda *_: Numbers(bad={5})
    )  # twelve, one of them unreadable
    flags = "--dataset wds/x --batch_size 4 --on_bad_image skip"
    expected = pretrain(flags, output=tmp_path / "whole")
    pretrain(flags, "--max_steps", str(stop_after))
    log = pretrain(flags, "--auto_resume")
    assert losses(log) == losses(expected)
    with pytest.raises(SystemExit):
        pretrain(flags, "--auto_resume --num_workers 1")  # which would be dealt other parts
    assert "num_workers is 1 here but 0 in the checkpoint" in capsys.readouterr().err


def test_resume_from_a_named_file_and_start_from_its_weights(pretrain, flat_folder, tmp_path, capsys):
    pretrain("--data_path", flat_folder, "--max_steps 4", output=tmp_path / "a")
    saved = tmp_path / "a" / "checkpoint-0.pth"
    log = pretrain("--data_path", flat_folder, "--resume", saved, output=tmp_path / "b")
    assert [line["step"] for line in log if "loss" in line] == [5, 6, 7, 8]
    with pytest.raises(SystemExit):  # checkpoint-1 would stay the newest
        pretrain("--data_path", flat_folder, "--resume", saved, output=tmp_path / "b")
    assert "holds what was trained after it (checkpoint-1.pth); delete these, or" in capsys.readouterr().err
    log = pretrain("--data_path", flat_folder, "--init_from", saved, output=tmp_path / "c")
    assert [line["step"] for line in log if "loss" in line] == [1, 2, 3, 4, 5, 6, 7, 8]


# ---- processes ------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("views", ["asymmetric", "symmetric"])
def test_two_processes_give_the_curve_of_one_with_twice_the_batch(tmp_path, views):
    def curve(launcher: list[str], batch_size: int) -> list[dict]:
        output = tmp_path / f"run-{batch_size}"
        flags = (
            "--dataset digits --in_chans 1 --epochs 2 --warmup_epochs 1 --max_steps 20 --blr 4e-3 --num_workers 1"
            " --momentum 0.9"
        )
        command = [*launcher, "main_pretrain.py", *TINY.split(), *flags.split(), "--views", views]
        command += ["--batch_size", str(batch_size), "--output_dir", str(output)]
        subprocess.run(command, cwd=ROOT, check=True, timeout=300, capture_output=True)
        return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]

    one = curve([sys.executable], 64)
    two = curve([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"], 32)
    assert len(one) == len(two) == 20
    for name in ("loss", "mim", "bc"):
        torch.testing.assert_close(losses(two, name), losses(one, name), rtol=1e-5, atol=1e-5)
    a, b = (load_checkpoint(next((tmp_path / f"run-{n}").glob("checkpoint-*.pth"))) for n in (64, 32))
    for part in ("model", "model_ema"):  # saving compared the ranks with each other before
        for name, tensor in a[part].items():
            if not name.endswith("qkv.bias"):  # the keys' part has no gradient but rounding, which Adam magnifies
                torch.testing.assert_close(b[part][name], tensor, rtol=1e-3, atol=2e-4, msg=f"{part} {name}")


# ---- wrong input: one line with flag, value and fix, status 2, no traceback ------------------------------
WRONG = {
    "--mask_ratio 0": "--mask_ratio 0.0: must lie between 0 and 1",
    "--mask_ratio 1": "--mask_ratio 1.0: must lie between 0 and 1",
    "--mask_ratio -0.1": "--mask_ratio -0.1: must lie between 0 and 1",
    "--mask_ratio nan": "--mask_ratio nan: must lie between 0 and 1",
    "--input_size 36": "--input_size 36 36: must be a multiple of the patch, 8 pixels",
    "--model lut_vit_bsae_patch16": "did you mean lut_vit_base_patch16?",
    "--recipe quickstrat": "did you mean quickstart?",
    "--epochs 3 4": "4: no flag takes this value",
    "--bach_size 4": "--bach_size: unknown flag, did you mean --batch_size?",
    "--batch_size 64": "= 64 images per update, but the data set has 32",
    "--data_path nowhere": "--data_path nowhere: there is no such file or folder",
    "--lr -1e-3": "--lr -0.001: must be 0 or more",
    "--amp fp16": "--amp fp16: needs a GPU",
    "--device cuda:99": "--device cuda:99: ",
    "--resume README.md": "--resume README.md: cannot be read as a checkpoint",
    "--resume nothing.pth": "--resume nothing.pth: there is no such file",
    "--init_from README.md": "--init_from README.md: cannot be read as a checkpoint",
    "--dataset torch/nothing": "--dataset torch/nothing: cannot be opened",
    "--output_dir README.md/run": "--output_dir README.md/run: cannot be written",
    "--views symmetric --mask_ratio 0.4": "--mask_ratio 0.4: --views symmetric hides different patches",
}


@pytest.mark.parametrize("flags", WRONG)
def test_wrong_input_is_one_line(pretrain, flat_folder, capsys, monkeypatch, flags):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        pretrain("--data_path", flat_folder, flags)
    assert stop.value.code == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert error[0].startswith("main_pretrain.py: error: ")
    assert WRONG[flags] in error[0]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["block", "whole", "block --checkpoint_activations"])
def test_compiled_as_eager_and_nothing_compiled_twice(pretrain, flat_folder, tmp_path, monkeypatch, mode):
    flags = ("--data_path", flat_folder, "--epochs 13 --monitor_freq 4 --monitor_images 12")
    eager = pretrain(*flags, output=tmp_path / "eager")
    graphs, update = [], PretrainTrainer.update

    def counted(trainer: PretrainTrainer, batches: list[Batch]) -> None:
        update(trainer, batches)
        graphs.append(counters["stats"]["unique_graphs"])

    monkeypatch.setattr(PretrainTrainer, "update", counted)
    torch._dynamo.reset()  # blocks that another test compiled would be found again
    counters.clear()
    compiled = pretrain(*flags, f"--compile {mode}", output=tmp_path / "compiled")
    assert len(compiled) >= 50
    assert losses(compiled) == pytest.approx(losses(eager), rel=1e-3)
    assert graphs[0] > 0
    assert set(graphs) == {graphs[0]}
    names = [load_checkpoint(tmp_path / run / "checkpoint-12.pth")["model"].keys() for run in ("eager", "compiled")]
    assert names[0] == names[1]


@pytest.mark.slow
def test_two_ranks_with_synchronised_batch_norm_compiled_as_eager(flat_folder, tmp_path):
    curves = []
    for mode in ("none", "whole"):
        flags = f"--batch_size 4 --epochs 3 --head_norm_layer BN --compile {mode}"
        with Ranks(command(flat_folder, tmp_path / mode, *flags.split()), 2) as ranks:
            assert {status for status, _ in ranks.finish()} == {0}
        log = [json.loads(line) for line in (tmp_path / mode / "log.jsonl").read_text().splitlines()]
        curves.append([line["loss"] for line in log if "loss" in line])
    assert len(curves[0]) == 12
    assert curves[1] == pytest.approx(curves[0], rel=1e-3)


@pytest.mark.parametrize("flags", ["", "--model mae_vit_nano_patch4"])
def test_checkpointed_activations_change_no_bit(pretrain, flat_folder, tmp_path, flags):
    stored = pretrain("--data_path", flat_folder, flags, output=tmp_path / "kept")
    again = pretrain("--data_path", flat_folder, flags, "--checkpoint_activations", output=tmp_path / "again")
    assert losses(again) == losses(stored)


@pytest.mark.skipif(computes_in_bf16(torch.device("cpu")), reason="this CPU computes in bf16")
def test_bf16_where_it_cannot(pretrain, flat_folder, capsys):
    with pytest.raises(SystemExit):
        pretrain("--data_path", flat_folder, "--amp bf16")
    assert "--amp bf16: this CPU does not compute in bf16, use --amp auto" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    {
        "": "--data_path: is missing, give a folder or .tar of images, or --dataset digits",
        "--data_path FOLDER --dataset digits": "FOLDER: --dataset digits has images of its own, leave one of them out",
        "--data_path FOLDER --log_dir FOLDER/image-000.png": "--log_dir FOLDER/image-000.png: cannot be written",
        "--data_path FOLDER --device mps": "--device mps: is not supported",
        "--data_path FOLDER --init_from FOLDER": "--init_from FOLDER: is a folder, give a checkpoint in it",
    }.items(),
)
def test_wrong_places_are_one_line(pretrain, flat_folder, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        pretrain(flags.replace("FOLDER", str(flat_folder)))
    assert stop.value.code == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert message.replace("FOLDER", str(flat_folder)) in error


def test_validation_images_without_two_classes_are_said(pretrain, flat_folder, capsys):
    pretrain("--data_path", flat_folder, "--monitor_freq 1 --max_steps 1 --val_path", flat_folder / "deep")
    assert f"no kNN accuracy: --val_path {flat_folder / 'deep'} has no labels of two classes" in capsys.readouterr().out


@pytest.mark.parametrize("steps", [4, 6])  # at an epoch's end; in the middle of one
def test_a_run_that_max_steps_ended_is_only_looked_at_again(pretrain, flat_folder, tmp_path, capsys, steps):
    flags = ("--data_path", flat_folder, f"--max_steps {steps} --monitor_freq 1 --auto_resume")
    pretrain(*flags)
    last = f"after epoch {-(-steps // 4)}"
    assert capsys.readouterr().out.count(last) == 1
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("checkpoint*")}
    log = pretrain(*flags)
    output = capsys.readouterr().out
    assert last in output
    assert f"after epoch {-(-steps // 4) + 1}" not in output
    assert len(losses(log)) == steps
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("checkpoint*")} == times


def test_a_finished_folder_is_not_begun_anew(pretrain, flat_folder, tmp_path, capsys):
    pretrain("--data_path", flat_folder, "--max_steps 1")
    with pytest.raises(SystemExit):
        pretrain("--data_path", flat_folder)
    assert "add --auto_resume to resume it" in capsys.readouterr().err


def test_resume_with_other_settings_names_both_values(pretrain, flat_folder, tmp_path, capsys):
    pretrain("--data_path", flat_folder, "--max_steps 4")
    shutil.copy(flat_folder / "image-000.png", flat_folder.parent / "one-more.png")
    for flags, message in {
        "--mask_ratio 0.5": "mask_ratio is 0.5 here but 0.75 in the checkpoint",
        "--decoder_depth 2": "decoder_depth is 2 here but 1 in the checkpoint",
        "--alpha 0": "alpha is 0.0 here but 1.0 in the checkpoint",
        "--batch_size 4": "effective batch is 4 here but 8 in the checkpoint",
        f"--data_path {flat_folder.parent}": "number of images is 33 here but 32 in the checkpoint",
    }.items():
        with pytest.raises(SystemExit):
            pretrain("--data_path", flat_folder, "--auto_resume", flags)
        assert message in capsys.readouterr().err


def test_weights_that_are_gone_are_not_missed_on_resume(pretrain, flat_folder, tmp_path):
    pretrain("--data_path", flat_folder, "--max_steps 1", output=tmp_path / "pre")
    start = tmp_path / "pre" / "checkpoint-0-step1.pth"
    flags = ("--data_path", flat_folder, "--init_from", start)
    complete = pretrain(*flags, output=tmp_path / "whole")
    pretrain(*flags, "--max_steps 3")
    start.unlink()
    assert losses(pretrain(*flags, "--auto_resume")) == losses(complete)


def test_resume_knows_its_images_by_their_names_wherever_they_lie(pretrain, flat_folder, tmp_path, capsys):
    pretrain("--data_path", flat_folder, "--max_steps 4")
    shutil.copytree(flat_folder, tmp_path / "copy")
    (flat_folder / "image-003.png").rename(flat_folder / "another.png")
    with pytest.raises(SystemExit):
        pretrain("--data_path", flat_folder, "--auto_resume")
    assert "--resume: the names of images or classes differ from the checkpoint's" in capsys.readouterr().err
    assert losses(pretrain("--data_path", tmp_path / "copy", "--auto_resume"))


def test_an_elastic_resume_may_cut_the_same_batch_in_another_way(pretrain, flat_folder, tmp_path, capsys):
    flags = ("--data_path", flat_folder, "--head_norm_layer LN")
    expected = pretrain(*flags, output=tmp_path / "whole")
    pretrain(*flags, "--max_steps 3")
    with pytest.raises(SystemExit):
        pretrain(*flags, "--auto_resume --batch_size 4 --accum_iter 2")
    assert "batch_size is 4 here but 8 in the checkpoint, make them equal, or add --elastic" in capsys.readouterr().err
    log = pretrain(*flags, "--auto_resume --elastic --batch_size 4 --accum_iter 2")
    assert losses(log) == pytest.approx(losses(expected), abs=1e-5)


def test_bad_images_stop_the_run_or_are_skipped(pretrain, flat_folder, tmp_path, capsys):
    (flat_folder / "image-003.png").write_bytes(b"no picture")
    with pytest.raises(SystemExit) as stop:
        pretrain("--data_path", flat_folder)
    assert stop.value.code == 2
    assert "image-003.png: cannot be read" in capsys.readouterr().err
    assert len(losses(pretrain("--data_path", flat_folder, "--auto_resume --on_bad_image skip"))) == 8  # as advised
    capsys.readouterr()
    flags = "--on_bad_image skip --monitor_freq 1"  # the monitor reads all images too
    log = pretrain("--data_path", flat_folder, flags, output=tmp_path / "skipped")
    assert [line["bad_images"] for line in log if "loss" in line][-1] == 2  # once per epoch
    assert "skipped a bad image" in capsys.readouterr().out


# ---- --dry_run ------------------------------------------------------------------------------------------
def test_dry_run_says_what_would_happen_and_leaves_nothing(pretrain, flat_folder, tmp_path, capsys):
    pretrain("--data_path", flat_folder, "--dry_run")
    shown = capsys.readouterr().out
    for word in (
        "updates          4 per epoch x 2 epochs = 8",
        "GFLOP",
        "memory",
        "one batch        (8, 2, 3, 32, 32)",
    ):
        assert word in shown
    assert not (tmp_path / "run").exists()


def test_dry_run_skips_bad_images_where_the_run_does(pretrain, flat_folder, capsys):
    for path in flat_folder.rglob("image-*0.png"):
        path.write_bytes(b"no picture")
    pretrain("--data_path", flat_folder, "--dry_run --on_bad_image skip --batch_size 32")
    assert "one batch        (32, 2, 3, 32, 32)" in capsys.readouterr().out
