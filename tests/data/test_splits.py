"""Names of splits: known in any case and in their usual variants, asked about where they are not understood."""

import pytest

from shared.calls import one_line
from shared.images import write_plain
from util.data.datasets import find_validation, open_images
from util.data.splits import looks_like_a_split, split_kind
from util.runtime.errors import UserError


def refused(folder, split="train"):
    with pytest.raises(UserError) as error:
        open_images(str(folder), "", split)
    return one_line(error)


def test_kinds():
    known = {
        "train": (
            "train",
            "Train",
            "TRAINING",
            "train_set",
            "trainset",
            "Train-Data",
            "training images",
            "train.split",
        ),
        "val": ("val", "Val", "valid", "VALIDATION", "validation_set", "eval", "Evaluation"),
        "test": ("test", "Testing", "TEST_IMAGES", "testset"),
        None: ("train2017", "trains", "cat", "valley", "attest", "mini_train", "tester", "", "set"),
    }
    for kind, names in known.items():
        assert {split_kind(name) for name in names} == {kind}
    assert all(map(looks_like_a_split, ("train2017", "trainA", "mini_train", "trian", "VAL-blurred", "unlabeled")))
    assert not any(map(looks_like_a_split, ("cat", "valley", "contest", "strain", "rain", "brain", "trail", "devil")))


@pytest.mark.parametrize("tar", [False, True])
@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("Train", "Test"),
        ("Training", "Testing"),
        ("TRAIN", "VAL"),
        ("train_set", "valid_set"),
        ("Train Images", "test"),
    ],
)
def test_splits_in_any_case_and_variant(tmp_path, train, val, tar):
    names = [f"{split}/{kind}/{split}.png" for split in (train, val) for kind in ("cat", "dog")]
    path = write_plain(tmp_path / ("x.tar" if tar else "x"), names)
    source, validation = open_images(str(path), "", "train"), find_validation(str(path), "", "")
    assert [source.name(i).endswith(f"{train}.png") for i in range(len(source))] == [True, True]
    assert [validation.name(i).endswith(f"{val}.png") for i in range(len(validation))] == [True, True]
    if not tar:  # the training images' own folder
        assert len(find_validation(str(path / train), "", "")) == 2


@pytest.mark.parametrize("tar", [False, True])
@pytest.mark.parametrize(
    ("names", "asked"),
    [
        (["train2017/a.png", "val2017/b.png"], "train2017"),
        (["trainA/a.png", "testB/b.png"], "testB"),
        (["mini_train/cat/a.png", "mini_val/cat/b.png"], "mini_train"),
        (["trian/cat/a.png", "other/cat/b.png"], "trian"),
        (["unlabeled/a.png"], "unlabeled"),
        (["train_clean/a.png", "cat/b.png"], "train_clean"),
        (["data/train1/cat/a.png", "data/test1/cat/b.png"], "data/test1"),
    ],
)
def test_what_looks_like_a_split_and_is_not_understood_is_asked_about(tmp_path, names, asked, tar):
    if tar and asked.startswith("data/"):
        names, asked = [name.removeprefix("data/") for name in names], "test1"  # a folder around all of a .tar is none
    path = write_plain(tmp_path / ("x.tar" if tar else "x"), names)
    assert f"is {asked} a split or a class?" in refused(path)


@pytest.mark.parametrize("name", ["bullet_train", "test tube", "model train"])
def test_classes_may_have_such_words_in_their_names(tmp_path, name):
    path = write_plain(tmp_path / "x", [f"{kind}/a.png" for kind in (name, "cat", "dog")])
    assert open_images(str(path), "", "train").class_names == sorted([name, "cat", "dog"])


def test_several_folders_of_one_split_are_refused(tmp_path):
    for names in (("train", "Training"), ("val", "validation")):
        path = write_plain(tmp_path / names[1], [f"{name}/cat/a.png" for name in {"train", *names}])
        assert f"holds {' and '.join(sorted(names))}, name one of them or merge them" in refused(path)
    path = write_plain(tmp_path / "both", [f"{name}/cat/a.png" for name in ("train", "val", "test")])
    assert "val/cat" in open_images(str(path), "", "val").name(0)  # test/ is another split beside it


def test_training_images_are_never_taken_for_validation_images(tmp_path):
    path = write_plain(tmp_path / "x", ["train/cat/a.png", "train/dog/a.png"])
    assert "holds train but no val, name the validation images val" in refused(path, "val")


@pytest.mark.parametrize("name", ["train 2", "train - Copy", "val_old"])
def test_a_folder_beside_train_that_looks_like_a_split_is_named(tmp_path, capsys, name):
    path = write_plain(tmp_path / "x", [f"{split}/cat/a.png" for split in ("train", "val", name)])
    assert len(open_images(str(path), "", "train")) == 1
    assert f"--data_path {path}: {name} beside train is not read" in capsys.readouterr().err
