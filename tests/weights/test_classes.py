"""Names of classes travel with a classifier: mapped if the order differs, refused by name if the names do."""

from __future__ import annotations

import json

import pytest
import torch

import main_finetune
import main_linprobe
from models_upernet import UperNet
from models_vit import Classifier, LinearProbe
from shared.calls import one_line
from shared.images import write_images, write_masked
from util.runtime.errors import UserError
from util.weights.checkpoint import load_checkpoint
from util.weights.classes import class_permutation, reorder_classes

ARCHITECTURE = dict(embed_dim=24, depth=4, num_heads=3)
COMMON = dict(img_size=(16, 16), patch_size=8, in_chans=3, num_classes=4)


@pytest.mark.parametrize(
    ("saved", "data", "expected"),
    [
        (["a", "b", "c"], ["a", "b", "c"], None),
        (["a", "b", "c"], ["c", "a", "b"], [2, 0, 1]),
        (None, ["a"], None),
        (["a"], None, None),
        (["a", "a"], ["a", "a"], None),
    ],
)
def test_the_place_of_each_class(saved, data, expected):
    assert class_permutation(saved, data) == expected


@pytest.mark.parametrize(
    ("saved", "data", "message"),
    [
        (["cat", "dog"], ["cat", "fox"], r"1 are only in the classifier \(dog\); 1 are only in the data \(fox\)"),
        (["cat"], ["cat", "fox"], r"1 are only in the data \(fox\)"),
        (["cat", "dog", "cat"], ["cat", "dog"], "3 in the classifier, 2 in the data"),
        (["cat", "cat", "dog"], ["dog", "cat", "cat"], "class names occur twice"),
    ],
)
def test_other_classes_are_refused_by_name(saved, data, message):
    with pytest.raises(UserError, match=message) as error:
        class_permutation(saved, data, "--resume FILE")
    assert one_line(error).startswith("--resume FILE: ")


@pytest.mark.parametrize("kind", [Classifier, LinearProbe, UperNet])
def test_logits_follow_the_permutation(kind):
    torch.manual_seed(0)
    model = kind(ARCHITECTURE, **COMMON).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    images, order = torch.randn(2, 3, 16, 16), [2, 0, 3, 1]
    outputs = (lambda: list(model(images))) if kind is UperNet else (lambda: [model(images)])
    before = outputs()
    reorder_classes(model, order)
    assert all(torch.equal(after, first[:, order]) for after, first in zip(outputs(), before, strict=True))


# ---- in runs -----------------------------------------------------------------------------------------------


def class_tree(root, names, contents):
    """train/ and val/ whose folder `names[i]` holds pictures of class `contents[i]`."""
    for split, number in (("train", 12), ("val", 6)):
        for name, content in zip(names, contents, strict=True):
            write_images(root / split / name, number, seed=100 * number + content)
    return root


def scores_of(capsys, folder):
    """Return the metrics of the last line of results.jsonl, and what was printed."""
    lines = (folder / "results.jsonl").read_text().splitlines()
    return json.loads(lines[-1])["metrics"], capsys.readouterr().out


@pytest.mark.parametrize("main", [main_finetune, main_linprobe])
def test_a_classifier_is_evaluated_on_the_same_classes_in_another_order(
    main, finetune, linprobe, tmp_path, capsys, monkeypatch
):
    call = finetune if main is main_finetune else linprobe
    data = class_tree(tmp_path / "data", ["ape", "bee", "cow"], [0, 1, 2])
    call("--data_path", data, "--lr 1e-3", output=tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoint-1.pth"
    saved = load_checkpoint(checkpoint)
    assert saved["class_names"] == ["ape", "bee", "cow"]
    call("--eval --resume", checkpoint, "--data_path", data, output=tmp_path / "same")
    same, _ = scores_of(capsys, tmp_path / "same")

    saved["class_names"] = ["cow", "ape", "bee"]  # as if the rows of the head stood in this order
    head = "head" if main is main_finetune else "head.1"
    for name in (f"{head}.weight", f"{head}.bias"):
        saved["model"][name] = saved["model"][name][[2, 0, 1]].contiguous()
    torch.save(saved, tmp_path / "shuffled.pth")
    call("--eval --resume", tmp_path / "shuffled.pth", "--data_path", data, output=tmp_path / "mapped")
    mapped, printed = scores_of(capsys, tmp_path / "mapped")
    assert mapped == pytest.approx(same)
    assert "logits are mapped by name" in printed

    other = class_tree(tmp_path / "other", ["ape", "bee", "dog"], [0, 1, 2])
    with pytest.raises(SystemExit) as stop:
        call("--eval --resume", checkpoint, "--data_path", other, output=tmp_path / "refused")
    assert stop.value.code == 2
    assert "1 are only in the classifier (cow); 1 are only in the data (dog)" in capsys.readouterr().err


def test_a_segmenter_keeps_its_classes_and_is_refused_on_others(segment, tmp_path, capsys):
    scenes = tmp_path / "scenes"
    for split, number in (("train", 6), ("val", 3)):
        write_masked(scenes / "images" / split, scenes / "masks" / split, number, seed=number)
    (scenes / "classes.json").write_text(json.dumps({"class_names": ["brick", "grass", "sky", "void"]}))
    segment("--data_path", scenes, "--max_updates 2 --warmup_updates 0", output=tmp_path / "run")
    checkpoint = max((tmp_path / "run").glob("checkpoint-[0-9]*.pth"))
    assert load_checkpoint(checkpoint)["class_names"] == ["brick", "grass", "sky", "void"]
    (scenes / "classes.json").write_text(json.dumps({"class_names": ["brick", "grass", "sea", "void"]}))
    with pytest.raises(SystemExit):
        segment("--eval --finetune", checkpoint, "--data_path", scenes, output=tmp_path / "refused")
    assert "(sky); 1 are only in the data (sea)" in capsys.readouterr().err


def test_a_file_without_names_says_so(finetune, tmp_path, capsys):
    data = class_tree(tmp_path / "data", ["ape", "bee"], [0, 1])
    finetune("--data_path", data, "--max_steps 1", output=tmp_path / "run")
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-[0-9]*.pth")
    saved = load_checkpoint(checkpoint)
    del saved["class_names"]
    torch.save(saved, tmp_path / "older.pth")
    finetune("--eval --resume", tmp_path / "older.pth", "--data_path", data, output=tmp_path / "eval")
    assert "the file names no classes" in capsys.readouterr().out
