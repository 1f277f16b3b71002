"""Where images are found: layouts on disk, tar files, readers by name, and what is no data set."""

import io
import itertools
import json
import multiprocessing
import os
import pickle
import sys
import tarfile
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, IterableDataset

from shared.calls import one_line
from shared.images import encode, plain
from util.data.datasets import find_validation, open_images
from util.data.decode import decode
from util.data.labelled import LabelledDataset
from util.data.loader import training_loader
from util.data.samples import BatchOrder, PretrainDataset, PretrainStream
from util.data.sources import BadImage, FileSource, Names, TarSource, fingerprint
from util.data.views import TwoViews
from util.runtime.errors import UserError

# ---- layouts -----------------------------------------------------------------------------------------------

SPLITS = {
    "train/cat/2.png": 1,
    "train/cat/10.PNG": 0,
    "train/dog/1.png": 2,
    "val/cat/3.png": 3,
    "val/dog/4.png": 4,
    "train/notes.txt": 0,
}
TRAIN = [("cat/10.PNG", 0, "cat"), ("cat/2.png", 1, "cat"), ("dog/1.png", 2, "dog")]  # in lexical order
VAL = [("cat/3.png", 3, "cat"), ("dog/4.png", 4, "dog")]
CLASSES = {name.removeprefix("train/"): n for name, n in SPLITS.items() if name.startswith("train/")}
FLAT = {"b.png": 1, "a.png": 0, "c.png": 2}
DEEP = {"x/y/b.png": 1, "x/a.png": 0, "z/x/c.png": 2, "d.png": 3}


def write_folder(root, files):
    """Files as images of one colour below a folder."""
    for name, number in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(plain(number) if name.lower().endswith("png") else b"no image")
    return root


def write_tar(path, files, prefix=""):
    """Write the same into a .tar."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, number in files.items():
            content = plain(number) if name.lower().endswith("png") else b"no image"
            member = tarfile.TarInfo(prefix + name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def check_source(source, expected):
    """Names end as expected, pixels are those of the image, labels name its class."""
    assert len(source) == len(expected)
    for index, (name, number, class_name) in enumerate(expected):
        assert source.name(index).endswith(name)
        assert (decode(source.read(index), 3) == number).all()
        assert source.class_names[source.labels[index]] == class_name


def test_folder_with_train_and_val(tmp_path):
    write_folder(tmp_path, SPLITS)
    check_source(open_images(str(tmp_path), "", "train"), TRAIN)
    check_source(open_images(str(tmp_path), "", "val"), VAL)
    assert open_images(str(tmp_path), "", "train").class_names == ["cat", "dog"]


def test_folder_of_class_folders(tmp_path):
    write_folder(tmp_path, CLASSES)
    check_source(open_images(str(tmp_path) + "/", "", "train"), TRAIN)


def test_flat_folder_has_one_class(tmp_path):
    write_folder(tmp_path, FLAT)
    source = open_images(str(tmp_path), "", "train")
    check_source(source, [("/a.png", 0, ""), ("/b.png", 1, ""), ("/c.png", 2, "")])
    assert source.class_names == [""]


def test_images_at_any_depth_have_the_class_of_the_folder_that_holds_them(tmp_path):
    write_folder(tmp_path, DEEP)
    source = open_images(str(tmp_path), "", "train")
    check_source(source, [("d.png", 3, ""), ("x/a.png", 0, "x"), ("y/b.png", 1, "y"), ("x/c.png", 2, "x")])


@pytest.mark.parametrize("prefix", ["", "./", "mine/", "./of/mine/"])
def test_tar_of_each_layout(tmp_path, prefix):
    def tar(files):
        return str(write_tar(tmp_path / "x.tar", files, prefix))

    check_source(open_images(tar(CLASSES), "", "train"), [(f"x.tar:{prefix}{n}", *rest) for n, *rest in TRAIN])
    holds = PurePosixPath(prefix).name
    check_source(open_images(tar(FLAT), "", "train"), [(f"{n}.png", i, holds) for i, n in enumerate("abc")])
    check_source(open_images(tar(SPLITS), "", "train"), TRAIN)  # and not the images of val/
    check_source(open_images(tar(SPLITS), "", "val"), VAL)
    check_source(find_validation(str(tmp_path / "x.tar"), "", ""), VAL)


@pytest.mark.parametrize("val", ["val", "test"])
@pytest.mark.parametrize("tar", [False, True])
def test_training_and_validation_images_further_down_are_not_mixed(tmp_path, tar, val):
    files = {f"{top}/{split}/cat/{top}.png": 1 for top in ("mine", "yours") for split in ("train", val)}
    path = write_tar(tmp_path / "x.tar", files) if tar else write_folder(tmp_path / "x", files)
    for split in ("train", "val"):
        with pytest.raises(UserError, match=rf"x(\.tar)?: holds (mine|yours)/train and (mine|yours)/{val}, give .*x"):
            open_images(str(path), "", split)


def test_folder_with_train_tar_and_val_tar(tmp_path):
    write_tar(tmp_path / "train.tar", CLASSES)
    write_tar(tmp_path / "val.tar", {"cat/3.png": 3, "dog/4.png": 4})
    check_source(open_images(str(tmp_path), "", "train"), TRAIN)
    check_source(open_images(str(tmp_path), "", "val"), VAL)


def test_folder_of_tars_is_one_data_set(tmp_path):
    write_tar(tmp_path / "train/shard-1.tar", {"dog/1.png": 2})
    write_tar(tmp_path / "train/shard-0.tar", {"cat/2.png": 1, "cat/10.PNG": 0})
    check_source(open_images(str(tmp_path), "", "train"), TRAIN)


def test_classes_and_files_are_in_lexical_order_as_in_torchvision(tmp_path):
    from torchvision.datasets import ImageFolder

    files = {f"{folder}/{name}.png": 0 for folder in ("10", "2", "b", "B", "a10", "a2") for name in ("9", "10", "09")}
    folder = open_images(str(write_folder(tmp_path / "folder", files)), "", "train")
    tar = open_images(str(write_tar(tmp_path / "x.tar", files)), "", "train")
    reference = ImageFolder(tmp_path / "folder")
    assert folder.class_names == tar.class_names == reference.classes == ["10", "2", "B", "a10", "a2", "b"]
    assert list(zip(folder.paths, folder.labels, strict=True)) == reference.samples
    assert [member[1] for member in tar.members] == [os.path.relpath(p, tmp_path / "folder") for p in folder.paths]


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm"])
def test_formats_are_found_by_their_extension(tmp_path, suffix):
    image_format = {".jpg": "JPEG", ".tif": "TIFF"}.get(suffix, suffix[1:].upper())
    (tmp_path / f"x{suffix}").write_bytes(encode(Image.new("RGB", (9, 7), (200, 200, 200)), image_format))
    for name in ("x.txt", "x.npy", "png", "x.png.bak"):
        (tmp_path / name).write_bytes(b"")
    source = open_images(str(tmp_path), "", "train")
    assert len(source) == 1
    pixels = decode(source.read(0), 3)
    assert pixels.shape == (3, 7, 9)
    assert (pixels.int() - 200).abs().max() <= 1


def test_links_to_folders_are_followed(tmp_path):
    write_folder(tmp_path / "elsewhere", {"1.png": 1})
    (tmp_path / "images").mkdir()
    (tmp_path / "images/cat").symlink_to(tmp_path / "elsewhere")
    check_source(open_images(str(tmp_path / "images"), "", "train"), [("cat/1.png", 1, "cat")])


@pytest.mark.timeout(60)
def test_links_that_lead_back_up_are_refused(tmp_path):
    write_folder(tmp_path / "images", {"a/1.png": 1, "b/2.png": 2})
    (tmp_path / "images/a/b").symlink_to(tmp_path / "images/b")
    assert len(open_images(str(tmp_path / "images"), "", "train")) == 3  # twice, but no circle
    for link, target in (("b/a", "a"), ("b/up", ""), ("above", "..")):
        path = tmp_path / "images" / link
        path.symlink_to((tmp_path / "images" / target).resolve())
        with pytest.raises(UserError, match="a link leads back to a folder around it"):
            open_images(str(tmp_path / "images"), "", "train")
        path.unlink()


@pytest.mark.parametrize("tar", [False, True])
@pytest.mark.parametrize("name", ["val", "test"])
def test_validation_images_are_never_trained_on(tmp_path, tar, name):
    files = {f"{name}/cat/1.png": 1, "trian/cat/2.png": 2}
    path = write_tar(tmp_path / "x.tar", files) if tar else write_folder(tmp_path / "x", files)
    with pytest.raises(UserError, match=f"holds {name} but no train, name the training images train"):
        open_images(str(path), "", "train")
    assert len(open_images(str(path), "", "val")) == 1


def test_tar_files_and_images_in_one_folder_are_refused(tmp_path):
    write_folder(tmp_path / "x", CLASSES)
    write_tar(tmp_path / "x" / "old.tar", FLAT)
    with pytest.raises(UserError, match=r"holds \.tar files \(old\.tar\) and images \(.*PNG\), keep one"):
        open_images(str(tmp_path / "x"), "", "train")


def test_a_fingerprint_knows_names_and_classes_wherever_they_lie(tmp_path):
    folder, same, tar = tmp_path / "x", tmp_path / "moved", tmp_path / "x.tar"
    write_folder(folder, CLASSES), write_folder(same, CLASSES), write_tar(tar, CLASSES)
    of = [fingerprint(open_images(str(path), "", "train")) for path in (folder, same, tar)]
    assert of[0] == of[1] == of[2]
    (same / "cat" / "2.png").rename(same / "cat" / "20.png")
    (folder / "dog").rename(folder / "wolf")
    others = [fingerprint(open_images(str(path), "", "train")) for path in (folder, same)]
    assert len({of[0], *others}) == 3


def test_tar_source_works_after_a_move_to_another_process(tmp_path):
    source = open_images(str(write_tar(tmp_path / "x.tar", CLASSES)), "", "train")
    source.read(0)
    check_source(pickle.loads(pickle.dumps(source)), TRAIN)
    loader = DataLoader(LabelledDataset(source, [2, 0, 1], (8, 8), 3), batch_size=1, num_workers=2)
    assert [(int(pixels.max()), int(label)) for pixels, label in loader] == [(2, 1), (0, 0), (1, 0)]


# ---- validation images -------------------------------------------------------------------------------------


@pytest.mark.parametrize("data_path", ["", "train", "train/"])
@pytest.mark.parametrize("val", ["val", "valid", "validation", "test"])
def test_validation_lies_beside_or_below(tmp_path, data_path, val):
    write_folder(tmp_path, {name.replace("val/", f"{val}/"): number for name, number in SPLITS.items()})
    check_source(find_validation(str(tmp_path / data_path), "", ""), VAL)


def test_validation_tar_beside_train_tar(tmp_path):
    write_tar(tmp_path / "train.tar", CLASSES)
    assert find_validation(str(tmp_path / "train.tar"), "", "") is None
    write_tar(tmp_path / "val.tar", {"cat/3.png": 3, "dog/4.png": 4})
    check_source(find_validation(str(tmp_path / "train.tar"), "", ""), VAL)
    check_source(find_validation(str(tmp_path), "", ""), VAL)


@pytest.mark.parametrize("name", ["train", "test"])
def test_classes_may_be_called_as_splits(tmp_path, name):
    files = {f"{split}/{kind}/{split}.png": 1 for split in ("train", "val") for kind in ("bus", name)}
    write_folder(tmp_path, files)
    for path in (tmp_path, tmp_path / "train"):
        assert open_images(str(path), "", "train").class_names == sorted(["bus", name])
        assert find_validation(str(path), "", "").class_names == sorted(["bus", name])


def test_train_beside_other_classes_is_not_taken_for_a_split(tmp_path):
    write_folder(tmp_path, {f"{kind}/1.png": 1 for kind in ("bus", "car", "train")})
    with pytest.raises(UserError, match=r"holds train and bus, car, if .* give .*/train; if it is a class"):
        open_images(str(tmp_path), "", "train")
    assert len(open_images(str(tmp_path / "train"), "", "train")) == 1
    write_folder(tmp_path, {"val/2.png": 1})  # then nobody can mean it
    assert len(open_images(str(tmp_path), "", "train")) == 1


def test_validation_images_in_a_folder_of_tars(tmp_path):
    write_tar(tmp_path / "0.tar", {name: n for name, n in SPLITS.items() if n % 2})
    write_tar(tmp_path / "1.tar", {name: n for name, n in SPLITS.items() if not n % 2})
    assert len(open_images(str(tmp_path), "", "train")) == len(TRAIN)
    check_source(find_validation(str(tmp_path), "", ""), sorted(VAL, key=lambda image: image[1] % 2 == 0))


def test_val_path_comes_first_and_its_errors_name_it(tmp_path):
    write_folder(tmp_path, SPLITS)
    write_folder(tmp_path / "other", {"dog/9.png": 9, "emu/8.png": 8})
    source = find_validation(str(tmp_path), "", str(tmp_path / "other"))
    check_source(source, [("9.png", 9, "dog"), ("8.png", 8, "emu")])
    with pytest.raises(UserError) as error:
        find_validation(str(tmp_path), "", str(tmp_path / "absent"))
    assert one_line(error).startswith(f"--val_path {tmp_path}/absent: ")


def test_no_validation_where_there_is_none_or_one_class(tmp_path):
    write_folder(tmp_path / "a", CLASSES)
    assert find_validation(str(tmp_path / "a"), "", "") is None
    write_folder(tmp_path / "b", {"train/cat/1.png": 1, "test/2.png": 2})
    assert find_validation(str(tmp_path / "b"), "", "") is None
    assert find_validation("", "torch/image_folder", "") is None
    assert len(find_validation("", "digits", "")) == 360


# ---- data sets by name -------------------------------------------------------------------------------------


def test_digits_are_scikit_learns():
    digits = load_digits()
    train, val = (open_images("", "digits", split) for split in ("train", "val"))
    assert (len(train), len(val)) == (1437, 360)
    places = {True: [i for i in range(1797) if i % 5], False: [i for i in range(1797) if i % 5 == 0]}
    for source, expected in ((train, places[True]), (val, places[False])):
        assert source.labels == digits.target[expected].tolist()
        assert source.class_names == [str(n) for n in range(10)]
        assert source.images.dtype == torch.uint8
        assert source.images.shape[1:] == (1, 8, 8)
        np.testing.assert_allclose(source.images[:, 0], digits.images[expected] * 255 / 16, atol=0.5)
        pixels = decode(source.read(3), 3)
        assert pixels.shape == (3, 8, 8)
        assert torch.equal(pixels, source.images[3].repeat(3, 1, 1))
    assert train.name(7) == "digits[7]"


def test_torchvisions_image_folder_by_name(tmp_path):
    write_folder(tmp_path, SPLITS)
    train = open_images(str(tmp_path), "torch/image_folder", "train")
    assert train.class_names == ["cat", "dog"]
    assert train.labels == [0, 0, 1]
    assert [int(decode(train.read(i), 3).max()) for i in range(3)] == [0, 1, 2]
    assert train.name(1) == "torch/image_folder[1]"
    val = find_validation(str(tmp_path), "torch/image_folder", "")
    assert [int(decode(val.read(i), 3).max()) for i in range(2)] == [3, 4]

    (tmp_path / "train/cat/10.PNG").write_bytes(plain(0)[:30])
    dataset = PretrainDataset(train, TwoViews((8, 8)), 4, 3, 0, skip_bad=True)
    assert dataset[0, 0].read_index == 1
    dataset.skip_bad = False
    with pytest.raises(UserError, match=r"torch/image_folder\[0\]: cannot be read"):
        dataset[0, 0]


def test_timms_readers_do_not_skip_bad_images_unasked(tmp_path, monkeypatch):
    import timm.data
    from timm.data import ImageDataset

    write_folder(tmp_path, CLASSES)
    (tmp_path / "cat/10.PNG").write_bytes(b"no image")
    monkeypatch.setattr(timm.data, "create_dataset", lambda *_, root, **__: ImageDataset(root))
    source = open_images(str(tmp_path), "hfds/user/name", "train")
    assert len(source) == 3
    images = []
    for index in range(3):
        try:
            images.append(int(decode(source.read(index), 3).max()))
        except BadImage:
            images.append("bad")
    assert sorted(images, key=str) == [1, 2, "bad"]


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("cifar-10", "unknown, did you mean cifar10?"),
        ("hdfs/user/name", "unknown"),
        ("torch/nonsense", "cannot be opened"),
        ("torch/cifar10", "cannot be opened"),
        ("torch/image_folder", "cannot be opened"),
    ],
)
def test_wrong_names_of_data_sets_are_user_errors(tmp_path, dataset, message):
    with pytest.raises(UserError) as error:
        open_images(str(tmp_path / "absent"), dataset, "train")
    assert one_line(error).startswith(f"--dataset {dataset}: {message}")


def test_webdataset_stream(tmp_path):
    wds = pytest.importorskip("webdataset")
    shards = [f"x-train-{n}.tar" for n in range(2)]
    for n, shard in enumerate(shards):
        with wds.TarWriter(str(tmp_path / shard)) as writer:
            for k in range(6):
                writer.write({"__key__": f"{n}{k}", "png": plain(10 * n + k), "cls": k % 2})
    split = dict(name="train", num_samples=12, filenames=shards, shard_lengths=[6, 6])
    (tmp_path / "_info.json").write_text(json.dumps({"splits": {"train": split}}))
    source = open_images(str(tmp_path), "wds/x", "train")
    assert isinstance(source, IterableDataset)
    assert len(source) == 12
    assert find_validation(str(tmp_path), "wds/x", "") is None
    stream = PretrainStream(source, TwoViews((8, 8)), 4, 3, seed=0, rank=0)
    loader = training_loader(stream, BatchOrder(12, 4, 1, 0, 1, 0), num_workers=1, pin_memory=False, timeout=60)
    batches = list(itertools.islice(loader, 3))
    assert [batch.views.shape for batch in batches] == [(4, 2, 3, 8, 8)] * 3
    images = {int(view.max()) for batch in batches for view in batch.views[:, 0]}
    assert images == {*range(6), *range(10, 16)}


# ---- wrong paths -------------------------------------------------------------------------------------------


def wrong_paths(root):
    """(path, what the message says) of everything a user may point to by mistake."""
    write_folder(root / "text", {"cat/a.txt": 0, "b.md": 0})
    (root / "empty").mkdir()
    (root / "empty_train/train").mkdir(parents=True)
    (root / "image.png").write_bytes(plain(0))
    (root / "plain").write_bytes(b"x")
    (root / "text.tar").write_text("this is no tar\n" * 100)
    (root / "zero.tar").write_bytes(b"")
    (root / "folder.tar").mkdir()
    with tarfile.open(root / "gzip.tar", "w:gz") as tar:
        tar.add(root / "image.png", "image.png")
    write_tar(root / "no_images.tar", {"a.txt": 0})
    return {
        "absent": "there is no such file or folder",
        "text": "holds no images (.jpg",
        "empty": "holds no images (.jpg",
        "empty_train": "holds no images (.jpg",
        "folder.tar": "holds no images (.jpg",
        "image.png": "is a .png file, give a folder or a .tar file",
        "plain": "is a plain file",
        "text.tar": "cannot be read as an uncompressed .tar",
        "zero.tar": "cannot be read as an uncompressed .tar",
        "gzip.tar": "cannot be read as an uncompressed .tar",
        "no_images.tar": "holds no images (.jpg",
    }


def test_wrong_paths_are_user_errors_of_one_line(tmp_path):
    for name, expected in wrong_paths(tmp_path).items():
        with pytest.raises(UserError) as error:
            open_images(str(tmp_path / name), "", "train")
        message = one_line(error)
        assert message.startswith(f"--data_path {tmp_path / name}")
        assert expected in message, name


def test_unreadable_paths_are_user_errors(tmp_path):
    write_folder(tmp_path / "whole", CLASSES)
    write_folder(tmp_path / "part", CLASSES)
    write_folder(tmp_path / "split", SPLITS)
    tar = write_tar(tmp_path / "x.tar", CLASSES)
    for path in (tmp_path / "whole", tmp_path / "part/dog", tmp_path / "split/train", tar):
        path.chmod(0)
        if os.access(path, os.R_OK):
            pytest.skip("root may read everything")
        try:
            root = path.parent if path.name in ("dog", "train") else path
            with pytest.raises(UserError) as error:
                open_images(str(root), "", "train")
        finally:
            path.chmod(0o700)
        assert str(path) in one_line(error)


def test_truncated_tar_is_refused_wherever_it_was_cut(tmp_path):
    intact = write_tar(tmp_path / "x.tar", CLASSES).read_bytes()
    with tarfile.open(tmp_path / "x.tar") as tar:
        end = max(member.offset_data + -(-member.size // 512) * 512 for member in tar)
    for length in range(0, end + 512, 128):
        (tmp_path / "cut.tar").write_bytes(intact[:length])
        with pytest.raises(UserError, match=r"cut\.tar: cannot be read as an uncompressed \.tar"):
            open_images(str(tmp_path / "cut.tar"), "", "train")
    (tmp_path / "cut.tar").write_bytes(intact[: end + 512])
    assert len(open_images(str(tmp_path / "cut.tar"), "", "train")) == 3


def test_damaged_header_in_a_tar_is_refused(tmp_path):
    path = write_tar(tmp_path / "x.tar", CLASSES)
    with tarfile.open(path) as tar:
        offsets = [member.offset for member in tar]
    intact = path.read_bytes()
    for offset in offsets:
        path.write_bytes(intact[: offset + 20] + b"\xff" + intact[offset + 21 :])
        with pytest.raises(UserError, match=r"x\.tar: cannot be read"):
            open_images(str(path), "", "train")


# ---- memory ------------------------------------------------------------------------------------------------

names = st.lists(st.text(st.characters(blacklist_categories=["Cs"]), max_size=9), max_size=9)


@given(names)
def test_names_are_those_of_a_list(strings):
    packed = Names(strings)
    assert list(packed) == strings
    assert [packed[-1 - n] for n in range(len(strings))] == strings[::-1]
    with pytest.raises(IndexError):
        packed[len(strings)]


def own_kilobytes():
    """Memory of this process that it shares with no other."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty"))


def read_all_names(source, answers):
    before = own_kilobytes()
    for index in range(len(source)):
        source.name(index)
    answers.value = own_kilobytes() - before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc, and forks")
@pytest.mark.parametrize("kind", ["files", "tars"])
def test_loader_workers_share_the_names_of_all_images(kind):
    paths = [f"/images/train/class-{n % 1000:03}/image-{n:08}.jpg" for n in range(100_000)]
    if kind == "files":
        source = FileSource(paths, None, None)
    else:
        source = TarSource([("/images.tar", path, 512 * n, 400) for n, path in enumerate(paths)], None, None)
    context = multiprocessing.get_context("fork")
    answers = context.Value("q")
    process = context.Process(target=read_all_names, args=(source, answers))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert answers.value < 4000  # a list of str came to 13,000, one of tuples to more
