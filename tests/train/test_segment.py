"""The segmentation main on real files: updates, resume, evaluation, processes, wrong input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from engine_segment import pixel_loss
from models_upernet import UperNet
from shared.flags import TINY_SEGMENTER
from shared.ranks import Ranks
from shared.segment import DAMAGES, damage, random_batch, trainer_of
from util.config.command_line import parse_config
from util.config.segment import SegmentConfig
from util.data.masked_samples import MaskedBatch
from util.data.masks import IGNORED
from util.results.results import read_results
from util.weights.checkpoint import load_checkpoint

CPU = torch.device("cpu")


def values(log: list[dict], name: str) -> list[float]:
    return [line[name] for line in log if name in line]


def newest(run: Path) -> dict:
    return load_checkpoint(max(run.glob("checkpoint-*.pth"), key=lambda path: path.stat().st_mtime))


# ---- runs --------------------------------------------------------------------------------------------------
def test_a_run_from_pre_trained_weights_to_a_result(pretrain, segment, scenes, tmp_path, capsys):
    pretrain("--data_path", scenes / "images" / "train", "--max_steps 1 --input_size 32", output=tmp_path / "pre")
    checkpoint = tmp_path / "pre" / "checkpoint-0.pth"
    log = segment("--data_path", scenes, "--finetune", checkpoint, "--input_size 48", "--per_class --pictures 2")
    printed = capsys.readouterr().out
    assert "training: 10 masks, 3 of 3 classes; " in printed
    assert "LUT, student, 76 tensors loaded" in printed
    assert "not used: norm.weight, norm.bias" in printed
    assert "resampled: pos_embed: 4 x 4 to 6 x 6 patches, interpolated" in printed
    assert len(values(log, "loss")) == 5  # the run ends in the middle of its third epoch
    assert [line["epoch"] for line in log if "miou" in line] == [1, 2, 3]

    run = tmp_path / "run"
    (result,) = read_results(run)
    assert result["stage"] == "segment"
    for name in ("miou", "aacc", "macc"):
        assert result["metrics"][name] == pytest.approx(values(log, name)[-1], abs=1e-3)
    assert result["metrics"]["best_miou"] == pytest.approx(max(values(log, "miou")), abs=1e-3)
    classes = json.loads((run / "per_class.json").read_text())
    assert [c["class"] for c in classes] == ["brick", "grass", "sky"]
    confusion = np.load(run / "confusion.npy")
    assert confusion.sum(axis=1).tolist() == [c["pixels"] for c in classes]
    assert np.mean([c["iou"] for c in classes]) == pytest.approx(result["metrics"]["miou"], abs=1e-3)
    assert (run / "confusion.png").stat().st_size > 1000
    assert sorted(p.name for p in (run / "pictures").iterdir()) == [f"segmentation-000{i}.png" for i in (1, 2, 3)]


def test_a_segmenter_learns_colours(segment, scenes):
    """Colours say the class: mIoU rises far beyond chance, from scratch, and on images that it has not seen."""
    flags = "--max_updates 40 --lr 1e-2 --head_width 16 --layer_decay 1 --drop_path 0 --eval_freq 4"
    log = segment("--data_path", scenes, flags)
    curve, loss = values(log, "miou"), values(log, "main")
    assert len(curve) == 5
    assert curve[0] < curve[-1]
    assert curve[-1] > 60
    assert sum(loss[-5:]) < 0.7 * sum(loss[:5])


@pytest.mark.slow
def test_compiled_as_eager(segment, scenes, tmp_path):
    flags = ["--data_path", scenes, "--drop_path 0 --dropout 0"]
    eager = segment(*flags, output=tmp_path / "eager")
    compiled = segment(*flags, "--compile block", output=tmp_path / "compiled")
    assert values(compiled, "loss") == pytest.approx(values(eager, "loss"), rel=1e-3)
    names = [newest(tmp_path / run)["model"].keys() for run in ("eager", "compiled")]
    assert names[0] == names[1]


@pytest.mark.parametrize("stop_after", [2, 3])  # at an epoch's end; in the middle of one
def test_a_resumed_run_ends_bit_equal(segment, scenes, tmp_path, stop_after):
    flags = ["--data_path", scenes, "--drop_path 0.3 --dropout 0.3"]
    expected = segment(*flags, output=tmp_path / "whole")
    segment(*flags, "--max_steps", stop_after, output=tmp_path / "parts")
    log = segment(*flags, "--auto_resume", output=tmp_path / "parts")
    assert len(values(expected, "loss")) == 5
    assert values(log, "loss") == values(expected, "loss")
    assert values(log, "miou")[-1] == values(expected, "miou")[-1]
    a, b = newest(tmp_path / "whole"), newest(tmp_path / "parts")
    assert a["updates"] == b["updates"] == 5
    assert all(torch.equal(x, b["model"][name]) for name, x in a["model"].items())
    moments = [checkpoint["optimizer"]["state"] for checkpoint in (a, b)]
    assert all(torch.equal(moments[0][p]["exp_avg_sq"], moments[1][p]["exp_avg_sq"]) for p in moments[0])


def test_loader_workers_change_nothing(segment, scenes, tmp_path):
    logs = [segment("--data_path", scenes, "--num_workers", n, output=tmp_path / str(n)) for n in (0, 2)]
    assert values(logs[0], "loss") == values(logs[1], "loss")
    assert values(logs[0], "miou") == values(logs[1], "miou")


def test_a_finished_run_gets_its_result_once_more_when_it_is_resumed(segment, scenes, tmp_path):
    segment("--data_path", scenes)
    (tmp_path / "run" / "results.jsonl").unlink()  # as if it had been killed before
    log = segment("--data_path", scenes, "--auto_resume")
    assert len(values(log, "loss")) == 5
    assert len(read_results(tmp_path / "run")) == 1


def test_another_length_is_another_run(segment, scenes, tmp_path, capsys):
    segment("--data_path", scenes, "--max_steps 2")
    with pytest.raises(SystemExit):
        segment("--data_path", scenes, "--max_updates 6 --auto_resume")
    assert "max_updates is 6 here but 5 in the checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["--eval_mode slide", "--eval_mode slide --eval_stride 16 20", "--eval_mode whole"])
def test_eval_of_a_trained_file(segment, scenes, tmp_path, capsys, mode):
    log = segment("--data_path", scenes, mode)
    trained = next(path for path in (tmp_path / "run").glob("checkpoint-*-step5.pth"))
    shutil.rmtree(scenes / "images" / "train")  # it needs no training images
    segment("--data_path", scenes, "--eval --resume", trained, mode, "--pictures 1", output=tmp_path / "evaluated")
    assert f"mIoU {values(log, 'miou')[-1]:.2f} %" in capsys.readouterr().out
    (result,) = read_results(tmp_path / "evaluated")
    assert result["stage"] == "segment-eval"
    assert result["metrics"]["macc"] == pytest.approx(values(log, "macc")[-1], abs=1e-3)
    assert (tmp_path / "evaluated" / "pictures" / "segmentation-eval.png").exists()


def test_grey_images_and_crops_that_are_not_square(segment, scenes):
    log = segment("--data_path", scenes, "--in_chans 1 --input_size 32 48 --accum_iter 2")
    assert len(values(log, "miou")) == 5  # an epoch is one update here


def test_accumulation_over_four_is_one_batch_of_four_times_the_size():
    one_batch, parts = trainer_of("--clip_grad 0.5"), trainer_of("--clip_grad 0.5 --accum_iter 4")
    batch = random_batch(8)
    one_batch.update(one_batch.to_device([batch]))
    parts.update(parts.to_device([MaskedBatch(*(x[i : i + 2] for x in batch)) for i in range(0, 8, 2)]))
    assert parts.meter.drain()["loss"] == pytest.approx(one_batch.meter.drain()["loss"], abs=1e-5)
    for name, p in one_batch.state.model.named_parameters():
        if not name.endswith("qkv.bias"):  # its keys' part has no gradient: noise decides the sign of AdamW's step
            torch.testing.assert_close(dict(parts.state.model.named_parameters())[name], p, atol=2e-5, rtol=0)


def test_the_loss_against_loops():
    logits = torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    masks = torch.randint(0, 4, (2, 5, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    masks[0, :2] = IGNORED
    expected = 0.0
    for b, y, x in np.ndindex(2, 5, 6):
        if masks[b, y, x] != IGNORED:
            expected -= logits[b, :, y, x].log_softmax(0)[int(masks[b, y, x])].item()
    assert pixel_loss(logits, masks).item() == pytest.approx(expected / 60, rel=1e-5)
    assert pixel_loss(logits, torch.full_like(masks, IGNORED)).item() == 0
    smooth = F.interpolate(logits, (10, 12), mode="bilinear", align_corners=False)
    enlarged = masks.repeat_interleave(2, 1).repeat_interleave(2, 2)
    torch.testing.assert_close(pixel_loss(logits, enlarged), pixel_loss(smooth, enlarged))


def test_the_schedule_spans_the_updates_and_not_the_epochs():
    trainer = trainer_of("--warmup_updates 4 --min_lr 1e-5")
    assert (trainer.total_updates, trainer.epochs) == (20, 2)
    for update, lr in {0: 0.0, 2: 5e-4, 4: 1e-3, 12: 5.05e-4, 20: 1e-5}.items():
        assert trainer.lr(update) == pytest.approx(lr, rel=1e-9, abs=1e-12)
    trainer.state.updates = 0
    begun = [update for update in range(25) if (setattr(trainer.state, "updates", update), not trainer.finished)[1]]
    assert begun == list(range(20))


# ---- processes ---------------------------------------------------------------------------------------------
def in_two(*flags: object) -> None:
    """Call the main in two processes."""
    arguments = ["main_segment.py", *TINY_SEGMENTER.split(), *" ".join(map(str, flags)).split()]
    with Ranks(arguments, 2) as ranks:
        assert [status for status, _ in ranks.finish()] == [0, 0]


@pytest.mark.slow
def test_two_processes_train_and_evaluate_as_one_does(segment, scenes, tmp_path):
    """Losses with BatchNorm over both, also with the weights sharded; scores over five images."""
    flags = ["--data_path", scenes, "--drop_path 0 --dropout 0"]
    expected = values(segment(*flags, "--per_class", output=tmp_path / "one"), "loss")
    for parallel in ("ddp", "fsdp"):
        run = tmp_path / parallel
        in_two(*flags, "--batch_size 2 --parallel", parallel, "--output_dir", run)
        log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        assert values(log, "loss") == pytest.approx(expected, abs=2e-5)
        assert len(values(log, "miou")) == 3
    trained = next((tmp_path / "one").glob("checkpoint-*-step5.pth"))
    in_two("--data_path", scenes, "--eval --per_class --resume", trained, "--output_dir", tmp_path / "evaluated")
    one, two = (np.load(tmp_path / run / "confusion.npy") for run in ("one", "evaluated"))
    assert (one == two).all()
    masks = [np.asarray(Image.open(path)) for path in (scenes / "masks" / "val").iterdir()]
    assert one.sum() == sum((mask != 3).sum() for mask in masks)


# ---- wrong input -------------------------------------------------------------------------------------------
WRONG = {
    "--finetune JUNK": "--finetune JUNK: cannot be read as a checkpoint",
    "--batch_size 1": "--batch_size 1: BatchNorm needs two images at a time",
    "--batch_size 64": "= 64 images per update, but the data set has 10",
    "--warmup_updates 9": "--warmup_updates 9: must lie in 0..--max_updates 5",
    "--scale_range 2 1": "--scale_range 2.0 1.0: give two factors",
    "--most_of_a_class 0": "--most_of_a_class 0.0: must lie in (0, 1]",
    "--eval_stride 40": "--eval_stride 40: must lie in 1..32",
    "--input_size 33": "--input_size 33 33: must be a multiple of the patch",
    "--in_chans 4": "--in_chans 4: colours of RGBA are not changed",
    "--eval": "add --finetune or --resume with a file",
    "--eval --finetune JUNK --resume JUNK": "give one of --resume and --finetune",
    "--train_images JUNK": "add --train_masks",
    "--max_update 7": "did you mean --max_updates?",
    "--model vit_bse_patch16": "did you mean vit_base_patch16?",
    "--head_width 0": "--head_width 0: must be 1 or more",
    "--ignore_index 0 1 2 3": "names 0 classes",
    "--first_label 5": "holds the number 0, but",
    "--eval_mode sliding": "sliding",
}


@pytest.mark.parametrize("flags", WRONG)
def test_wrong_input_is_one_line(segment, scenes, tmp_path, capsys, flags):
    (tmp_path / "junk").write_text("no checkpoint")
    with pytest.raises(SystemExit) as stop:
        segment("--data_path", scenes, flags.replace("JUNK", str(tmp_path / "junk")))
    assert stop.value.code == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert WRONG[flags].replace("JUNK", str(tmp_path / "junk")) in error[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("damaged", DAMAGES)
def test_a_wrong_mask_is_found_before_anything_is_trained(segment, scenes, tmp_path, capsys, damaged, split):
    path = scenes / "masks" / split / "scene-003.png"
    damage(path, damaged)
    with pytest.raises(SystemExit) as stop:
        segment("--data_path", scenes)
    assert stop.value.code == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert str(path) in error[0]
    assert DAMAGES[damaged] in error[0]
    assert not (tmp_path / "run").exists()


def test_from_a_loader_worker_it_is_one_line_too(segment, scenes, capsys):
    damage(scenes / "masks" / "train" / "scene-003.png", "out of range")
    for flags in ("--num_workers 1", "--num_workers 1 --no_check_data"):
        with pytest.raises(SystemExit) as stop:
            segment("--data_path", scenes, flags)
        assert stop.value.code == 2
        error = capsys.readouterr().err.splitlines()
        assert len(error) == 1
        assert "scene-003.png: holds the number 7" in error[0]


def test_masks_that_are_ignored_altogether_are_one_line(segment, scenes, capsys):
    for path in (scenes / "masks" / "val").iterdir():
        Image.fromarray(np.full_like(np.asarray(Image.open(path)), 3)).save(path)
    with pytest.raises(SystemExit):
        segment("--data_path", scenes)
    assert "all pixels of the validation masks are ignored" in capsys.readouterr().err


def test_a_bad_image_can_be_skipped(segment, scenes, capsys):
    (scenes / "images" / "train" / "scene-002.png").write_text("no image")
    with pytest.raises(SystemExit):
        segment("--data_path", scenes)
    error = capsys.readouterr().err
    assert "scene-002.png: cannot be read (no image, or of an unknown format); mend it or add --on_bad_image" in error
    log = segment("--data_path", scenes, "--on_bad_image skip")
    assert "skipped a bad image" in capsys.readouterr().out
    assert len(values(log, "loss")) == 5


def test_dry_run_looks_at_the_masks_and_trains_nothing(segment, scenes, tmp_path, capsys):
    segment("--data_path", scenes, "--dry_run")
    printed = capsys.readouterr().out
    assert "validation: 5 masks, 3 of 3 classes" in printed
    assert "updates          2 per epoch, in all 5" in printed
    assert "one batch        (4, 3, 32, 32)" in printed
    assert "GFLOP" in printed
    assert not (tmp_path / "run").exists()


# ---- recipes -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", ["small", "base", "large"])
def test_recipes_are_table_e(size, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    config = parse_config(SegmentConfig, ["--recipe", f"segment_vit_{size}", "--data_path", "ADE20K"], "main.py")
    assert config.model == f"vit_{size}_patch16"
    assert (config.effective_batch, config.peak_lr, config.weight_decay) == (16, 1e-4, 0.05)
    assert (config.betas, config.layer_decay, config.drop_path) == ((0.9, 0.999), 0.65, 0.1)
    assert (config.max_updates, config.warmup_updates, config.power, config.min_lr) == (160_000, 1500, 1, 0)
    assert (config.resolved_input_size, config.window_stride) == ((512, 512), (341, 341))
    with torch.device("meta"):
        model = UperNet(**config.model_arguments(150))
    assert model.decode_head.classifier[1].weight.shape == (150, 768, 1, 1)
    assert model.auxiliary_head.classifier[1].weight.shape == (150, 256, 1, 1)
