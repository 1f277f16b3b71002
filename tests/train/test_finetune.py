"""The fine-tuning and linear-probe mains on real files: weights, augmentation, evaluation, resume, wrong input."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters

import main_finetune
import main_linprobe
from engine_finetune import ClassifierTrainer, evaluate
from models_vit import Classifier
from shared.finetune import config_of, random_batch, trainer_of
from shared.flags import TINY_CLASSIFIER
from shared.images import write_images
from util.data.datasets import open_images
from util.data.labelled import LabelledBatch
from util.data.views import Normalise
from util.results.results import read_results
from util.runtime.files import ROOT
from util.runtime.logs import processor_name
from util.train.classification import train_dataset
from util.weights.checkpoint import load_checkpoint

CPU = torch.device("cpu")


def values(log: list[dict], name: str) -> list[float]:
    return [line[name] for line in log if name in line]


# ---- runs --------------------------------------------------------------------------------------------------
def test_another_normalisation_than_the_pre_training_s_is_said(pretrain, linprobe, class_folders, tmp_path, capsys):
    own = "--mean 0.2 0.3 0.4 --std 0.1 0.2 0.3"
    pretrain("--data_path", class_folders, "--max_steps 1", own, output=tmp_path / "pre")
    flags = ("--data_path", class_folders, "--max_steps 1 --finetune", tmp_path / "pre" / "checkpoint-0-step1.pth")
    linprobe(*flags, output=tmp_path / "other")
    assert f"normalised by other numbers there, {own}: give the same here" in capsys.readouterr().out
    linprobe(*flags, own, output=tmp_path / "same")
    assert "normalised by other numbers" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["", "--checkpoint_activations"])
def test_blocks_that_differ_in_stochastic_depth_are_compiled_once(finetune, class_folders, monkeypatch, flags):
    graphs, update = [], ClassifierTrainer.update

    def counted(trainer: ClassifierTrainer, batches: list[LabelledBatch]) -> None:
        update(trainer, batches)
        graphs.append(counters["stats"]["unique_graphs"])

    monkeypatch.setattr(ClassifierTrainer, "update", counted)
    torch._dynamo.reset()
    counters.clear()
    finetune("--data_path", class_folders, "--compile block --drop_path 0.3", flags)
    assert set(graphs) == {2}  # without any in the first block, and with it


def test_a_run_from_pre_trained_weights_to_a_result(pretrain, finetune, class_folders, tmp_path, capsys):
    pretrain("--data_path", class_folders, "--max_steps 1", output=tmp_path / "pre")
    checkpoint = tmp_path / "pre" / "checkpoint-0-step1.pth"
    log = finetune("--data_path", class_folders, "--finetune", checkpoint, "--per_class")
    printed = capsys.readouterr().out
    assert "LUT, student, 76 tensors loaded" in printed
    assert "left as initialised: fc_norm (2 tensors), head (2 tensors)" in printed
    assert len(values(log, "loss")) == 2 * 32 // 8
    assert len(values(log, "top1")) == 2

    run = tmp_path / "run"
    (result,) = read_results(run)
    assert result["stage"] == "finetune"
    assert result["metrics"]["top1"] == pytest.approx(values(log, "top1")[-1], abs=1e-3)
    assert result["metrics"]["best_top1"] == pytest.approx(max(values(log, "top1")), abs=1e-3)
    assert result["config"]["finetune"] == str(checkpoint)
    assert result["made_on"]["device"] == processor_name()
    assert (result["made_on"]["processes"], result["made_on"]["precision"]) == (1, "fp32")
    assert [r["stage"] for r in read_results(tmp_path / "pre")] == ["pretrain"]
    classes = json.loads((run / "per_class.json").read_text())
    assert [(c["class"], c["images"]) for c in classes] == [("cat", 8), ("dog", 8)]
    confusion = np.load(run / "confusion.npy")
    assert confusion.sum(axis=1).tolist() == [8, 8]
    assert 100 * confusion.trace() / 16 == pytest.approx(result["metrics"]["top1"])
    assert (run / "confusion.png").stat().st_size > 1000


@pytest.mark.parametrize("which", ["finetune", "linprobe"])
def test_a_classifier_learns_digits(finetune, linprobe, which):
    digits = "--dataset digits --in_chans 1 --hflip 0 --batch_size 64 --epochs 4"
    if which == "finetune":
        log = finetune(digits, "--aa none --reprob 0 --lr 1e-3 --layer_decay 1 --drop_path 0")
    else:  # of a random encoder
        log = linprobe(digits, "--global_pool --lr 10")
    assert values(log, "top1")[-1] > (20 if which == "finetune" else 15)  # chance is 10
    assert sum(values(log, "loss")[-5:]) < 0.97 * sum(values(log, "loss")[:5])


def test_a_linear_probe_leaves_the_encoder_bit_identical(pretrain, linprobe, class_folders, tmp_path):
    pretrain("--data_path", class_folders, "--max_steps 1", output=tmp_path / "pre")
    pre = tmp_path / "pre" / "checkpoint-0-step1.pth"
    log = linprobe("--data_path", class_folders, "--finetune", pre)
    before, after = load_checkpoint(pre)["model"], load_checkpoint(tmp_path / "run" / "checkpoint-1.pth")["model"]
    encoder = [name for name in after if not name.startswith("head")]
    assert len(encoder) == 78
    assert all(torch.equal(after[name], before[name]) for name in encoder)
    assert len(set(values(log, "loss"))) > 1
    assert after["head.0.running_mean"].abs().sum() > 0


@pytest.mark.parametrize("which", ["finetune", "linprobe"])
@pytest.mark.parametrize("stop_after", [4, 6])  # at the epoch's end; in the middle of one
def test_a_resumed_run_ends_bit_equal(request, class_folders, tmp_path, which, stop_after):
    main = request.getfixturevalue(which)
    flags = ["--data_path", class_folders]
    if which == "finetune":  # everything that draws random numbers, and a moving average
        flags.append("--mixup 0.8 --cutmix 1 --drop_path 0.3 --model_ema --model_ema_decay 0.5")
    expected = main(*flags, output=tmp_path / "whole")
    main(*flags, "--max_steps", str(stop_after), output=tmp_path / "parts")
    log = main(*flags, "--auto_resume", output=tmp_path / "parts")
    assert values(log, "loss") == values(expected, "loss")
    a, b = (load_checkpoint(tmp_path / run / "checkpoint-1.pth") for run in ("whole", "parts"))
    for part in ("model", "model_ema") if which == "finetune" else ("model",):
        assert all(torch.equal(x, b[part][name]) for name, x in a[part].items())


def test_the_best_checkpoint_and_its_accuracy_survive_a_resume(finetune, class_folders, tmp_path, capsys):
    finetune("--data_path", class_folders, "--epochs 3 --max_steps 4")
    manifest = tmp_path / "run" / "checkpoint-best.pth.json"
    first = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(first | {"metric": 99.0}))  # as if the first part had been very good
    finetune("--data_path", class_folders, "--epochs 3 --auto_resume")
    assert "best 99.00 %" in capsys.readouterr().out
    assert json.loads(manifest.read_text())["step"] == 4
    assert read_results(tmp_path / "run")[-1]["metrics"]["best_top1"] == 99


@pytest.mark.parametrize("which", ["finetune", "linprobe"])
def test_weights_that_are_gone_are_not_missed_on_resume(request, pretrain, class_folders, tmp_path, which):
    pretrain("--data_path", class_folders, "--max_steps 1", output=tmp_path / "pre")
    start = tmp_path / "pre" / "checkpoint-0-step1.pth"
    main, flags = request.getfixturevalue(which), ("--data_path", class_folders, "--finetune", start)
    complete = main(*flags, output=tmp_path / "whole")
    main(*flags, "--max_steps 3")
    start.unlink()
    assert values(main(*flags, "--auto_resume"), "loss") == values(complete, "loss")


def test_the_best_checkpoint_alone_is_a_run_to_go_on_with(finetune, class_folders, tmp_path, capsys):
    flags = ("--data_path", class_folders, "--epochs 3 --save_freq 3")
    complete = finetune(*flags)
    run = tmp_path / "run"
    path = run / "checkpoint-best.pth"
    best = json.loads((run / "checkpoint-best.pth.json").read_text())
    for other in run.glob("checkpoint-?.pth*"):
        other.unlink()
    with pytest.raises(SystemExit):
        finetune(*flags)
    assert "holds checkpoint-best.pth of an earlier run; add --auto_resume" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        finetune(*flags, "--eval --resume", run)
    assert f"is a folder, give a checkpoint: {path}" in capsys.readouterr().err
    log = finetune(*flags, "--auto_resume")
    assert f"resumed after update {best['step']}" in capsys.readouterr().out
    assert values(log, "loss") == values(complete, "loss")
    assert len(read_results(run)) == 1


def test_a_bad_validation_image_costs_no_epoch(finetune, class_folders, tmp_path, capsys):
    complete = finetune("--data_path", class_folders, output=tmp_path / "whole")
    bad = next((class_folders / "val").rglob("*.png"))
    content = bad.read_bytes()
    bad.write_bytes(b"no picture")
    with pytest.raises(SystemExit):
        finetune("--data_path", class_folders)
    assert f"{bad}: cannot be read" in capsys.readouterr().err
    bad.write_bytes(content)
    log = finetune("--data_path", class_folders, "--auto_resume")
    assert [line["step"] for line in log if "loss" in line] == list(range(1, 9))  # none of them twice
    assert values(log, "top1")[-1] == values(complete, "top1")[-1]


def test_a_finished_run_that_is_called_again_has_one_result(finetune, class_folders, tmp_path):
    for flags in ("", "--auto_resume", "--auto_resume"):
        finetune("--data_path", class_folders, flags)
    assert len(read_results(tmp_path / "run")) == 1
    finetune("--data_path", class_folders, "--eval --resume", tmp_path / "run" / "checkpoint-1.pth")
    assert len(read_results(tmp_path / "run")) == 2  # another measurement


def test_the_best_accuracy_goes_with_a_checkpoint_into_another_folder(finetune, class_folders, tmp_path, capsys):
    finetune("--data_path", class_folders, "--epochs 3 --max_steps 4 --save_periods last", output=tmp_path / "one")
    path = tmp_path / "one" / "checkpoint-0.pth"
    saved = load_checkpoint(path)
    torch.save(saved | {"best_metric": 99.0}, path)  # as if an epoch before had been very good
    (tmp_path / "one" / "checkpoint-0.pth.json").unlink()
    finetune("--data_path", class_folders, "--epochs 3 --save_periods last --resume", path, output=tmp_path / "two")
    assert "best 99.00 %" in capsys.readouterr().out
    assert read_results(tmp_path / "two")[-1]["metrics"]["best_top1"] == 99


@pytest.mark.parametrize(
    ("which", "flags"),
    [
        ("finetune", "--mean 0.1 0.2 0.3 --std 0.4 0.4 0.4 --input_size 48"),
        ("finetune", "--model_ema --model_ema_decay 0.9"),
        ("linprobe", "--global_pool"),
    ],
)
def test_eval_takes_model_and_input_from_the_run(request, class_folders, tmp_path, which, flags):
    main = request.getfixturevalue(which)
    expected = main("--data_path", class_folders, flags)[-1]
    with pytest.MonkeyPatch.context() as patch:
        where = ["--data_path", str(class_folders), "--output_dir", str(tmp_path / "evaluated")]
        model = ["--eval", "--resume", str(tmp_path / "run" / "checkpoint-1.pth"), "--num_workers", "0"]
        patch.setattr(sys, "argv", ["main.py", *model, *where, "--device", "cpu", "--amp", "fp32"])
        (main_finetune if which == "finetune" else main_linprobe).main()
    metrics = read_results(tmp_path / "evaluated")[-1]["metrics"]
    assert metrics["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-5)


def test_a_checkpoint_of_another_kind_of_training_is_told_where_to_go(
    pretrain, finetune, class_folders, tmp_path, capsys
):
    pretrain("--data_path", class_folders, "--max_steps 1", output=tmp_path / "pre")
    with pytest.raises(SystemExit):
        finetune("--data_path", class_folders, "--resume", tmp_path / "pre" / "checkpoint-0-step1.pth")
    assert (
        "the checkpoint is of pretrain, this run is finetune; start from its weights by --finetune"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--batch_size 1", "--batch_size 1: BatchNorm needs two images"),
        ("--layer_decay 0.5", "--layer_decay 0.5: LARS has none"),
        ("--betas 0.1 0.2", "--betas 0.1 0.2: LARS has none"),
        ("--weights momentum", "--weights momentum: is of --finetune, which is not given"),
    ],
)
def test_flags_without_effect_on_a_linear_probe_are_refused(linprobe, class_folders, capsys, flags, message):
    with pytest.raises(SystemExit):
        linprobe("--data_path", class_folders, flags)
    assert message in capsys.readouterr().err


def test_eval_of_a_fine_tuned_file(finetune, class_folders, tmp_path, capsys):
    log = finetune("--data_path", class_folders, "--epochs 1 --mixup 0.5")
    tuned = tmp_path / "run" / "checkpoint-0.pth"
    bare = tmp_path / "bare.pth"  # as MAE writes them
    torch.save({"model": load_checkpoint(tuned)["model"], "epoch": 0}, bare)
    for path in (tuned, bare):
        capsys.readouterr()
        finetune("--data_path", class_folders, "--eval --resume", path, output=tmp_path / "evaluated")
        assert f"top-1 {values(log, 'top1')[-1]:.2f} %" in capsys.readouterr().out
    result = read_results(tmp_path / "evaluated")[-1]
    assert result["stage"] == "finetune-eval"
    assert result["metrics"]["val_loss"] == pytest.approx(values(log, "val_loss")[-1], rel=1e-5)
    shutil.rmtree(class_folders / "train")  # it needs no training images
    finetune("--data_path", class_folders, "--eval --finetune", bare, output=tmp_path / "evaluated")


def test_mae_s_commands_run(finetune, class_folders, tmp_path):
    """Every flag of MAE's document of fine-tuning."""
    log = finetune(
        "--data_path", class_folders, "--accum_iter 2 --epochs 1 --warmup_epochs 0 --blr 5e-4 --layer_decay 0.65"
        " --weight_decay 0.05 --drop_path 0.1 --reprob 0.25 --remode pixel --recount 1 --mixup 0.8 --cutmix 1.0"
        " --mixup_prob 1.0 --mixup_switch_prob 0.5 --mixup_mode batch --smoothing 0.1 --aa rand-m9-mstd0.5-inc1"
        " --clip_grad 1.0 --min_lr 1e-6 --color_jitter 0.3 --nb_classes 2 --dist_eval --cls_token --seed 3"
        " --start_epoch 0 --pin_mem --input_size 32",
    )  # fmt: skip
    assert len(values(log, "loss")) == 2
    assert "norm.weight" in load_checkpoint(tmp_path / "run" / "checkpoint-0.pth")["model"]


def test_grey_images_of_another_shape(finetune, class_folders):
    log = finetune("--data_path", class_folders, "--in_chans 1 --input_size 32 48 --epochs 1")
    assert len(values(log, "top1")) == 1


def test_accumulation_over_four_is_one_batch_of_four_times_the_size():
    one_batch, parts = trainer_of("--clip_grad 0.5"), trainer_of("--clip_grad 0.5 --accum_iter 4")
    batch = random_batch(16)
    one_batch.update([batch])
    parts.update([LabelledBatch(*(x[i : i + 4] for x in batch)) for i in range(0, 16, 4)])
    assert parts.meter.drain()["loss"] == pytest.approx(one_batch.meter.drain()["loss"], abs=1e-6)
    for name, p in one_batch.state.model.named_parameters():
        if not name.endswith("qkv.bias"):  # its keys' part has no gradient: noise decides the sign of AdamW's step
            torch.testing.assert_close(dict(parts.state.model.named_parameters())[name], p, atol=1e-6, rtol=0)


def test_mixed_targets_sum_to_one_and_mix_what_the_images_mix():
    from timm.data import Mixup

    config = config_of("--mixup 0.8 --cutmix 1 --smoothing 0.1")
    mix = Mixup(**config.mixup_arguments(5))
    np.random.seed(0)
    shares = []
    for _ in range(200):
        labels = torch.arange(8) % 5
        images = labels.float()[:, None, None, None].expand(-1, 1, 8, 8).clone()
        mixed, targets = mix(images, labels)
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(8))
        assert targets.min() >= 0.1 / 5 - 1e-6
        expected = ((targets - 0.1 / 5) / 0.9) @ torch.arange(5.0)  # of the labels, as of the pixels
        torch.testing.assert_close(mixed.mean(dim=(1, 2, 3)), expected, atol=1e-4, rtol=1e-4)
        shares.append(targets[0].max().item())
    assert len(set(shares)) > 50


def test_smoothed_labels_against_loops():
    trainer = trainer_of("--batch_size 8", smoothing=0.1)
    batch = random_batch(8)
    logits = trainer.state.model(batch.images).detach()
    expected = 0.0
    for row, label in zip(logits.log_softmax(1), batch.labels.tolist(), strict=True):
        expected -= sum((0.9 * (k == label) + 0.1 / 5) * row[k].item() for k in range(5)) / 8
    trainer.update([batch])
    assert trainer.meter.drain()["loss"] == pytest.approx(expected, rel=1e-5)


def test_the_moving_average_follows_once_per_update():
    import copy

    average = copy.deepcopy(trainer_of().state.model).requires_grad_(False)
    trainer = trainer_of("--model_ema", average=average, ema_decay=0.75)
    before = {name: p.clone() for name, p in average.named_parameters()}
    trainer.update([random_batch(8)])
    for name, p in trainer.state.model.named_parameters():
        torch.testing.assert_close(dict(average.named_parameters())[name], 0.75 * before[name] + 0.25 * p.detach())


def test_lr_per_update_against_a_table():
    trainer = trainer_of("--epochs 4 --warmup_epochs 1 --lr 1e-3 --min_lr 1e-5")
    table = {0: 0.0, 5: 5e-4, 10: 1e-3, 25: 5.05e-4, 40: 1e-5}  # warm-up, its end, half of the cosine, the end
    for update, lr in table.items():
        assert trainer.lr(update) == pytest.approx(lr, rel=1e-9, abs=1e-12)


def test_samples_are_the_same_whatever_was_drawn_before(class_folders):
    dataset = train_dataset(config_of("--data_path", str(class_folders)), open_images(str(class_folders), "", "train"))
    first = dataset[1, 7]
    torch.rand(5)
    np.random.rand(3)
    dataset[0, 3]
    assert torch.equal(dataset[1, 7].images, first.images)
    assert not torch.equal(dataset[2, 7].images, first.images)
    assert dataset[1, 31].labels == 1


# ---- evaluation --------------------------------------------------------------------------------------------
class Fixed(nn.Module):
    """Gives the logits that stand in the pixels."""

    def forward(self, x):
        return x.flatten(1)[:, :7]


@pytest.mark.parametrize("batch_size", [1, 8, 103])
def test_scores_against_loops(batch_size):
    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(rng.integers(0, 256, (103, 1, 3, 3), dtype=np.uint8))
    labels = torch.from_numpy(rng.integers(0, 6, 103))  # there is no image of the last class
    normalise = Normalise((0.5,), (0.25,), CPU)
    loader = list(zip(pixels.split(batch_size), labels.split(batch_size), strict=True))
    arguments = (Fixed(), loader, normalise, 7, CPU, torch.autocast("cpu", enabled=False))
    scores = evaluate(*arguments, per_class=True)
    assert evaluate(*arguments)[:4] == scores[:4]
    assert evaluate(*arguments).confusion is None

    loss = top1 = top5 = 0
    confusion = np.zeros((7, 7), dtype=int)
    for image, label in zip(pixels, labels.tolist(), strict=True):
        logits = ((image.double() / 255 - 0.5) / 0.25).flatten()[:7]
        order = logits.argsort(descending=True).tolist()
        loss += -F.log_softmax(logits, 0)[label].item()
        top1 += order[0] == label
        top5 += label in order[:5]
        confusion[label, order[0]] += 1
    assert scores.images == 103
    assert scores.loss == pytest.approx(loss / 103, rel=1e-5)
    assert scores.top1 == pytest.approx(100 * top1 / 103)
    assert scores.top5 == pytest.approx(100 * top5 / 103)
    assert (scores.confusion.numpy() == confusion).all()
    per_class = scores.per_class.tolist()
    assert per_class[:6] == pytest.approx([100 * confusion[k, k] / confusion[k].sum() for k in range(6)])
    assert np.isnan(per_class[6])


@pytest.fixture
def folders_of_103(tmp_path) -> Path:
    """103 validation images of three classes: no number of processes divides it."""
    root = tmp_path / "images"
    for i, number in enumerate((40, 41, 22)):
        write_images(root / "val" / f"class{i}", number, seed=i)
        write_images(root / "train" / f"class{i}", 4, seed=9 + i)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("dist_eval", ["--dist_eval", "--no_dist_eval"])
def test_two_processes_evaluate_103_images_as_one_does(folders_of_103, tmp_path, dist_eval):
    torch.manual_seed(0)
    config = config_of("--data_path", str(folders_of_103))
    model = Classifier(**config.model_arguments(3) | dict(head_std=0.5))
    torch.save({"model": model.state_dict()}, tmp_path / "tuned.pth")
    scores = []
    for processes in (1, 2):
        output = tmp_path / f"on{processes}"
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        flags = [*TINY_CLASSIFIER.split(), "--data_path", folders_of_103, "--output_dir", output, "--per_class"]
        command = [sys.executable, *launch, "main_finetune.py", *flags, "--eval", "--resume", tmp_path / "tuned.pth"]
        subprocess.run([*map(str, command), dist_eval], cwd=ROOT, check=True, capture_output=True, timeout=300)
        scores.append((read_results(output)[-1]["metrics"], np.load(output / "confusion.npy")))
    (one, confusion_one), (two, confusion_two) = scores
    assert confusion_one.sum() == confusion_two.sum() == 103
    assert (confusion_one == confusion_two).all()
    assert two == pytest.approx(one, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("program", ["main_finetune.py", "main_linprobe.py"])
def test_two_processes_train_as_one_does(class_folders, tmp_path, program):
    curves = []
    for processes, batch_size in ((1, 8), (2, 4)):
        output = tmp_path / f"on{processes}"
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        flags = [
            *TINY_CLASSIFIER.split(),
            "--batch_size",
            batch_size,
            "--data_path",
            class_folders,
            "--output_dir",
            output,
        ]
        flags += ["--drop_path", "0"] if "finetune" in program else []
        command = [sys.executable, *launch, program, *flags]
        subprocess.run([*map(str, command)], cwd=ROOT, check=True, capture_output=True, timeout=300)
        lines = (output / "log.jsonl").read_text().splitlines()
        curves.append(values([json.loads(line) for line in lines], "loss"))
    assert len(curves[0]) == 8
    assert curves[1] == pytest.approx(curves[0], abs=1e-5)
