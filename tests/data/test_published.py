"""Readers of published data sets, on small folders in each one's layout with its traps, and what is said of others."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from shared.calls import one_line
from shared.published import (
    make_aircraft,
    make_aircraft_with_banner,
    make_cifar,
    make_cub200,
    make_dogs,
    make_flowers102,
    make_mini,
    make_mini_json,
    make_nabirds,
    make_naturalist,
)
from util.data.datasets import find_validation, open_images
from util.data.decode import decode
from util.data.published import DATASETS, download, find
from util.data.sources import BadImage, hold_out
from util.runtime.errors import UserError

LAYOUTS = {
    "cub200": make_cub200,
    "nabirds": make_nabirds,
    "dogs": make_dogs,
    "flowers102": make_flowers102,
    "aircraft": make_aircraft,
    "inat2018": make_naturalist(2018),
    "inat2019": make_naturalist(2019),
    "inat2021_mini": make_mini(("train_mini", "val")),
    "cifar10": make_cifar(10),
    "cifar100": make_cifar(100),
}
VARIANTS = {
    "aircraft_cropped": ("aircraft_cropped", make_aircraft_with_banner),
    "inat2021_mini of torchvision": ("inat2021_mini", make_mini(("2021_train_mini", "2021_valid"))),
    "inat2021_mini with annotations": ("inat2021_mini", make_mini_json),
}


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def own_md5(monkeypatch):
    """Let torchvision take the pickles that a test made, by their MD5."""

    def accept(root: Path) -> None:
        for base in (torchvision.datasets.CIFAR10, torchvision.datasets.CIFAR100):
            folder = root / base.base_folder
            if folder.is_dir():
                for part in ("train_list", "test_list"):
                    monkeypatch.setattr(base, part, [[name, md5(folder / name)] for name, _ in getattr(base, part)])
                monkeypatch.setattr(base, "meta", base.meta | {"md5": md5(folder / base.meta["filename"])})

    return accept


def pixel_and_class(source) -> list[tuple[int, str]]:
    """(Red value, class name) of each image."""
    values = [int(decode(source.read(i), 3)[0].max()) for i in range(len(source))]
    return [(value, source.class_names[label]) for value, label in zip(values, source.labels, strict=True)]


# ---- what is read ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [*LAYOUTS, *VARIANTS])
def test_each_set_as_published(tmp_path, own_md5, name):
    dataset, make = VARIANTS.get(name) or (name, LAYOUTS[name])
    names, train, val = make(tmp_path)
    own_md5(tmp_path)
    archive = tmp_path / DATASETS[dataset].archive  # both the folder around it and the folder itself
    for root in (tmp_path, archive):
        images = open_images(str(root), dataset, "train")
        assert images.class_names == names
        assert pixel_and_class(images) == train
        other = open_images(str(root), dataset, "val")
        assert other.class_names == names
        assert pixel_and_class(other) == val
        assert pixel_and_class(find_validation(str(root), dataset, "")) == val


def test_an_image_that_is_all_banner_is_bad(tmp_path):
    make_aircraft(tmp_path)  # images of fewer rows than the banner has
    source = open_images(str(tmp_path), "aircraft_cropped", "train")
    with pytest.raises(BadImage, match="rows of pixels, its banner alone has 20"):
        source.read(0)


@pytest.mark.parametrize("name", LAYOUTS)
def test_all_sets_may_lie_in_folders_of_their_names(tmp_path, own_md5, name):
    (tmp_path / "made").mkdir()
    _, train, _ = LAYOUTS[name](tmp_path / "made")
    own_md5(tmp_path / "made")
    shutil.move(tmp_path / "made" / DATASETS[name].archive, tmp_path / name)
    assert pixel_and_class(open_images(str(tmp_path), name, "train")) == train


def test_both_birds_in_one_folder_are_told_apart(tmp_path):
    _, cub, _ = make_cub200(tmp_path)
    _, north_american, _ = make_nabirds(tmp_path)
    assert pixel_and_class(open_images(str(tmp_path), "cub200", "train")) == cub
    assert pixel_and_class(open_images(str(tmp_path), "nabirds", "train")) == north_american


def test_flowers_and_aircraft_are_what_torchvision_makes_of_them(tmp_path, monkeypatch):
    made = {"flowers102": tmp_path / "f", "aircraft": tmp_path / "a"}
    for name, root in made.items():
        LAYOUTS[name](root)
    monkeypatch.setattr(torchvision.datasets.Flowers102, "_check_integrity", lambda self: True)
    by_torchvision = {
        "flowers102": [torchvision.datasets.Flowers102(made["flowers102"], part) for part in ("train", "val", "test")],
        "aircraft": [torchvision.datasets.FGVCAircraft(made["aircraft"], part) for part in ("train", "val", "test")],
    }
    for name, parts in by_torchvision.items():
        reference = [[(int(np.asarray(x).max()), label) for x, label in part] for part in parts]
        for split, expected in (("train", reference[0] + reference[1]), ("val", reference[2])):
            source = open_images(str(made[name]), name, split)
            values = [int(decode(source.read(i), 3).max()) for i in range(len(source))]
            labels = source.labels
            if name == "flowers102":  # ours has the three classes that there are
                labels = [int(source.class_names[label]) - 1 for label in labels]
            assert list(zip(values, labels, strict=True)) == expected


def test_a_published_set_goes_through_fine_tuning(tmp_path, finetune):
    make_flowers102(tmp_path / "data")
    log = finetune(
        "--dataset flowers102 --data_path",
        tmp_path / "data",
        "--batch_size 2 --epochs 1 --warmup_epochs 0 --input_size 16",
    )
    assert 0 <= log[-1]["top1"] <= 100


# ---- what is refused ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_other_set_is_refused_by_name_and_what_was_looked_for(tmp_path, name):
    LAYOUTS[name](tmp_path)
    for asked in LAYOUTS:
        if asked == name:
            continue
        assert find(asked, tmp_path) is None
        for call in (open_images, lambda root, dataset, _: find_validation(root, dataset, "")):
            with pytest.raises(UserError) as error:
                call(str(tmp_path), asked, "train")
            message = one_line(error)
            assert message.startswith(f"--data_path {tmp_path}: is not {DATASETS[asked].title}, looked for ")
            assert all(file in message for file in DATASETS[asked].files[0])
            assert message.endswith(f"; it holds {DATASETS[name].title} (--dataset {name})")


def spoil(path: str, old: str, new: str) -> Callable[[Path], None]:
    """Replace text in a file."""

    def change(root):
        text = (root / path).read_text()
        assert old in text
        (root / path).write_text(text.replace(old, new, 1))

    return change


SPOILT = {
    "an image without a label": ("cub200", spoil("CUB_200_2011/image_class_labels.txt", "2 1\n", ""), "KeyError: '2'"),
    "a line cut short": ("nabirds", spoil("nabirds/classes.txt", "817 Oak Titmouse", "817"), "ValueError"),
    "an unknown variant": (
        "aircraft",
        spoil("fgvc-aircraft-2013b/data/images_variant_trainval.txt", "F/A-18", "F/A-19"),
        "KeyError: 'F/A-19'",
    ),
    "annotations of the test images": ("inat2018", spoil("train2018.json", "annotations", "x"), "'annotations'"),
    "annotations cut short": ("inat2019", lambda r: (r / "val2019.json").write_text("{"), "JSONDecodeError"),
    "no .mat file": ("dogs", lambda r: (r / "test_list.mat").write_bytes(b"x" * 200), "cannot be read as"),
    "an image is missing": (
        "flowers102",
        lambda r: (r / "flowers-102/jpg/image_00006.jpg").unlink(),
        "image_00006.jpg, which is not there",
    ),
    "a changed pickle": ("cifar10", lambda r: None, "Dataset not found or corrupted"),
    "no test images": (
        "cub200",
        spoil("CUB_200_2011/train_test_split.txt", "1 0", "1 1"),
        "name no image of split val",
    ),
}


def test_an_unreadable_validation_split_is_not_left_out_when_prepared(tmp_path, prepare):
    make_naturalist(2018)(tmp_path)
    next((tmp_path / "train_val2018" / "Mammalia" / "4105").glob("0009.jpg")).unlink()
    flags = ("--data_path", tmp_path, "--dataset", "inat2018", "--output_dir", tmp_path / "out")
    status, _, message = prepare(*flags, fails=True)
    assert status == 2
    assert "0009.jpg" in message
    assert not list((tmp_path / "out").glob("*.tar"))


@pytest.mark.parametrize("damage", SPOILT)
def test_lists_that_do_not_fit_are_one_line(tmp_path, damage):
    name, change, expected = SPOILT[damage]
    LAYOUTS[name](tmp_path)
    change(tmp_path)
    with pytest.raises(UserError) as error:
        [open_images(str(tmp_path), name, split) for split in ("val", "train")]
    assert expected in one_line(error)
    assert DATASETS[name].title in one_line(error)


@pytest.mark.parametrize("name", ["/etc/passwd", "../secret.jpg", "train_val2018/../../secret.jpg"])
@pytest.mark.parametrize("current_folder", [False, True])
def test_lists_that_name_files_elsewhere_are_refused(tmp_path, monkeypatch, name, current_folder):
    root = tmp_path / "set"
    make_naturalist(2018)(root)
    (tmp_path / "secret.jpg").write_bytes(b"x")
    content = json.loads((root / "train2018.json").read_text())
    content["images"][1]["file_name"] = name
    (root / "train2018.json").write_text(json.dumps(content))
    monkeypatch.chdir(root)
    with pytest.raises(UserError) as error:
        open_images("." if current_folder else str(root), "inat2018", "train")
    assert one_line(error).endswith("which is not in this folder")


def test_no_folder_is_one_line(tmp_path):
    for path, message in (("", "--data_path: is missing, --dataset dogs"), (f"{tmp_path}/x", "there is no such file")):
        with pytest.raises(UserError, match=message):
            open_images(path, "dogs", "train")


def test_an_unknown_set_is_told_the_nearest_name():
    with pytest.raises(UserError) as error:
        open_images("", "flower102", "train")
    assert one_line(error).startswith("--dataset flower102: unknown, did you mean flowers102? (one of digits, inat2018")


# ---- download ----------------------------------------------------------------------------------------------------
def test_nothing_is_fetched_unasked_and_only_what_torchvision_has(tmp_path, monkeypatch):
    fetched = []

    def fake(name):
        def fetch(root, *_, download=False, **more):
            assert download
            fetched.append((name, *more.values()))
            if name == "CIFAR100":
                raise OSError("no\nnetwork")

        return fetch

    for name in ("CIFAR10", "CIFAR100", "Flowers102", "FGVCAircraft", "INaturalist"):
        monkeypatch.setattr(torchvision.datasets, name, fake(name))
    for name in DATASETS:
        with pytest.raises(UserError):
            open_images(str(tmp_path), name, "train")
    assert fetched == []
    for name in ("cifar10", "flowers102", "aircraft", "inat2021_mini"):
        download(name, str(tmp_path))
    parts = [("INaturalist", "2021_train_mini"), ("INaturalist", "2021_valid")]
    assert fetched == [("CIFAR10",), ("Flowers102",), ("FGVCAircraft",), *parts]
    for name in ("cub200", "nabirds", "dogs", "inat2018", "inat2019"):
        with pytest.raises(
            UserError, match=rf"--download: torchvision cannot fetch {DATASETS[name].title}, get it from"
        ):
            download(name, str(tmp_path))
    with pytest.raises(UserError, match=r"--download: CIFAR-100 cannot be fetched into .* \(OSError: no network\)"):
        download("cifar100", str(tmp_path))
    make_dogs(tmp_path)
    download("dogs", str(tmp_path))  # it is there


# ---- held-out training images ------------------------------------------------------------------------------------
class Labels:
    def __init__(self, labels):
        self.labels, self.class_names = labels, None

    def __len__(self):
        return len(self.labels)

    def read(self, index):
        return torch.full((1, 1, 1), index)

    def name(self, index):
        return str(index)


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.9])
def test_a_share_of_each_class_is_held_out(share):
    labels = [0] * 10 + [1] * 3 + [2] + [3] * 40
    labels = np.random.default_rng(1).permutation(labels).tolist()
    remaining, held_out = hold_out(Labels(labels), share)
    assert sorted([*remaining.indices, *held_out.indices]) == list(range(len(labels)))
    for source in (remaining, held_out):
        assert source.labels == [labels[i] for i in source.indices]
        assert [int(source.read(i)) for i in range(len(source))] == source.indices.tolist()
        assert source.name(0) == str(source.indices[0])
    for label, number in ((0, 10), (1, 3), (2, 1), (3, 40)):
        expected = 0 if number == 1 else min(max(1, round(share * number)), number - 1)
        assert held_out.labels.count(label) == expected
        assert remaining.labels.count(label) == number - expected
    again = hold_out(Labels(labels), share)[1]
    assert again.indices.tolist() == held_out.indices.tolist()


def test_fine_tuning_on_what_is_not_held_out(class_folders, finetune, tmp_path):
    shutil.rmtree(class_folders / "val")  # nobody looks at it
    log = finetune("--data_path", class_folders, "--holdout 0.25 --epochs 1 --warmup_epochs 0")
    assert [line["step"] for line in log if "loss" in line] == [1, 2, 3]  # 24 of the 32 images
    assert log[-1]["top1"] in [12.5 * n for n in range(9)]  # on the other 8
    evaluate = f"--eval --holdout 0.25 --resume {tmp_path}/run/checkpoint-0.pth"
    finetune("--data_path", class_folders, evaluate, output=tmp_path / "again")
    (line,) = (tmp_path / "again" / "results.jsonl").read_text().splitlines()
    assert json.loads(line)["metrics"]["top1"] == log[-1]["top1"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--holdout=-0.1", "must lie in [0, 1)"),
        ("--holdout 1", "must lie in [0, 1)"),
        ("--holdout nan", "must lie in [0, 1)"),
        ("--holdout 0.2 --val_path x", "--holdout 0.2: evaluates training images, leave out --val_path"),
    ],
)
def test_a_wrong_share_is_one_line(class_folders, finetune, capsys, flags, message):
    with pytest.raises(SystemExit):
        finetune("--data_path", class_folders, flags)
    assert message in capsys.readouterr().err
