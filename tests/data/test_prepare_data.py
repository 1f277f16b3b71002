"""Data sets made small: what comes out, that it is read with the same labels, bad images, wrong places."""

import io
import json
import os
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from shared.calls import one_line
from shared.images import colours, encode, plain, tree, write_images
from util.data.datasets import find_validation, open_images
from util.data.decode import decode
from util.data.loader import training_loader
from util.data.preparation import Progress
from util.data.prepared import labels_of, name_images
from util.data.samples import BatchOrder, PretrainStream
from util.data.sources import FileSource, ReaderSource
from util.data.views import TwoViews, resize, sample_generator
from util.runtime.errors import UserError


def short(name):
    """CLASS/STEM of an image's name in a message."""
    return "/".join(Path(name.rpartition(":")[2]).with_suffix("").parts[-2:])


def contents(source):
    """CLASS/STEM and label of each image, in order."""
    return [(short(source.name(i)), source.labels[i]) for i in range(len(source))]


def smooth(seed, size=(100, 70)):
    """Return a picture of soft blobs, as JPEG."""
    blobs = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return encode(Image.fromarray(blobs).resize(size, Image.Resampling.BICUBIC), "JPEG", quality=98)


# ---- what comes out ----------------------------------------------------------------------------------------


def test_class_folders_keep_order_labels_and_classes(prepare, class_folders, tmp_path):
    out = tmp_path / "out"
    output = prepare("--data_path", class_folders, "--output_dir", out, "--shard_mb", "0.01")
    assert f"to train on it: --data_path {out}" in output
    assert len(list((out / "train").glob("*.tar"))) > 3
    for split in ("train", "val"):
        before, after = (open_images(str(root), "", split) for root in (class_folders, out))
        assert contents(after) == contents(before)
        assert after.class_names == before.class_names == ["cat", "dog"]
        for i in range(len(after)):
            assert decode(after.read(i), 3).shape == (3, 26, 24)  # of 40 x 36
    assert contents(find_validation(str(out), "", "")) == contents(find_validation(str(class_folders), "", ""))


def test_flat_folder_and_tar(prepare, flat_folder, tar_file, tmp_path):
    for i, path in enumerate((flat_folder, tar_file)):
        prepare("--data_path", path, "--output_dir", tmp_path / str(i))
        before, after = (open_images(str(root), "", "train") for root in (path, tmp_path / str(i)))
        assert sorted(label for _, label in contents(before)) == sorted(label for _, label in contents(after))
        assert [Path(name).stem for name, _ in contents(before)] == [Path(name).stem for name, _ in contents(after)]
        assert after.class_names == before.class_names
        assert not (tmp_path / str(i) / "val").exists()


def test_readers_by_name(prepare, class_folders, tmp_path):
    prepare("--dataset", "digits", "--in_chans", "1", "--image_format", "png", "--output_dir", tmp_path / "digits")
    digits = open_images("", "digits", "train")
    after = open_images(str(tmp_path / "digits"), "", "train")
    assert after.class_names == digits.class_names
    for i in range(0, len(after), 97):
        number = int(short(after.name(i)).split("/")[1])  # within a shard the order is by name
        assert torch.equal(decode(after.read(i), 1), digits.images[number])
        assert after.labels[i] == digits.labels[number]

    root = ("--data_path", class_folders, "--dataset", "torch/image_folder")
    prepare(*root, "--output_dir", tmp_path / "folder")
    for split, number in (("train", 16), ("val", 8)):
        after = open_images(str(tmp_path / "folder"), "", split)
        assert contents(after) == [
            (f"{c}/{i:08d}", n) for n, c in enumerate(("cat", "dog")) for i in range(n * number, (n + 1) * number)
        ]


def test_the_mains_read_it(prepare, pretrain, finetune, class_folders, tmp_path):
    prepare("--data_path", class_folders, "--output_dir", tmp_path / "out")
    pretrain("--data_path", tmp_path / "out", "--monitor_freq 1 --epochs 1", output=tmp_path / "a")
    lines = finetune("--data_path", tmp_path / "out", "--epochs 1 --warmup_epochs 0", output=tmp_path / "b")
    assert any("top1" in line for line in lines), lines


def test_views_are_nearly_those_of_the_originals(prepare, tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(6):
        (tmp_path / "in" / f"{i}.jpg").write_bytes(smooth(i, (300 + i, 260)))
    prepare("--data_path", tmp_path / "in", "--output_dir", tmp_path / "out", "--short_side", "128")
    before, after = (open_images(str(tmp_path / name), "", "train") for name in ("in", "out"))
    for crop in ("src", "rrc"):
        views = TwoViews((112, 112), crop=crop, photometric=False)
        for i in range(6):
            if crop == "src":
                a, b = (views(decode(s.read(i), 3), sample_generator(0, 0, i)) for s in (before, after))
            else:  # its windows are drawn in pixels, so the whole image is compared
                a, b = (resize(decode(s.read(i), 3), (112, 112)) for s in (before, after))
            assert (a.float() - b.float()).abs().mean() < 2


@pytest.mark.parametrize("in_chans", [1, 3, 4])
def test_png_is_training_s_own_resize_without_loss(prepare, tmp_path, in_chans):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(encode(colours(60, 40).convert("RGBA")))
    (tmp_path / "in/b.jpg").write_bytes(encode(colours(45, 51), "JPEG"))
    (tmp_path / "in/c.bmp").write_bytes(encode(colours(12, 90), "BMP"))
    flags = ("--image_format", "png", "--in_chans", in_chans)
    prepare("--data_path", tmp_path / "in", "--output_dir", tmp_path / "out", *flags)
    before, after = (open_images(str(tmp_path / name), "", "train") for name in ("in", "out"))
    for i, size in enumerate([(36, 24), (24, 27), (12, 90)]):
        pixels = decode(after.read(i), in_chans)
        assert torch.equal(pixels, resize(decode(before.read(i), in_chans), size))
        assert after.name(i).endswith(".png")


def test_small_images_are_not_enlarged_and_jpegs_keep_their_bytes(prepare, tmp_path):
    (tmp_path / "in").mkdir()
    encoded = {"a.jpeg": encode(colours(24, 30), "JPEG"), "b.JPG": encode(colours(9, 200).convert("L"), "JPEG")}
    for name, content in encoded.items():
        (tmp_path / "in" / name).write_bytes(content)
    (tmp_path / "in/c.png").write_bytes(encode(colours(20, 10)))
    prepare("--data_path", tmp_path / "in", "--output_dir", tmp_path / "jpeg")
    prepare("--data_path", tmp_path / "in", "--output_dir", tmp_path / "png", "--image_format", "png")
    for name, extension in (("jpeg", "jpg"), ("png", "png")):
        source = open_images(str(tmp_path / name), "", "train")
        assert [source.read(i) for i in (0, 1)] == list(encoded.values())
        assert [Path(source.name(i)).suffix for i in range(3)] == [".jpg", ".jpg", f".{extension}"]
        assert decode(source.read(2), 3).shape == (3, 20, 10)
    assert source.read(2) == (tmp_path / "in/c.png").read_bytes()


def test_webdataset(prepare, class_folders, tmp_path):
    out = tmp_path / "out"
    (class_folders / "train/cat/image-000.png").rename(class_folders / "train/cat/v1.2.png")
    prepare("--data_path", class_folders, "--output_dir", out, "--format", "webdataset", "--shard_mb", "0.02")
    splits = json.loads((out / "_info.json").read_text())["splits"]
    for split, name in (("train", "train"), ("val", "validation")):
        samples = []
        for shard, length in zip(splits[name]["filenames"], splits[name]["shard_lengths"], strict=True):
            with tarfile.open(out / shard) as tar:
                files = [(member.name, tar.extractfile(member).read()) for member in tar]
            assert len(files) == 2 * length
            for (image, content), (label, number) in zip(files[::2], files[1::2], strict=True):
                assert image.split(".", 1) == [label.removesuffix(".cls"), "jpg"]
                assert Image.open(io.BytesIO(content)).size == (24, 26)
                samples.append((image.removesuffix(".jpg"), int(number)))
        source = open_images(str(class_folders), "", split)
        assert sorted(samples) == sorted((name.replace(".", "_"), label) for name, label in contents(source))
        assert splits[name]["num_samples"] == len(samples) == len(source)
        assert contents(open_images(str(out), "", split)) == sorted(samples)


def test_timm_reads_the_webdataset(prepare, class_folders, tmp_path):
    pytest.importorskip("webdataset")
    prepare("--data_path", class_folders, "--output_dir", tmp_path / "out", "--format", "webdataset")
    stream = open_images(str(tmp_path / "out"), "wds/", "train")
    assert len(stream) == 32
    dataset = PretrainStream(stream, TwoViews((8, 8)), 4, 3, seed=0, rank=0)
    loader = training_loader(dataset, BatchOrder(32, 8, 1, 0, 1, 0), num_workers=0, pin_memory=False, timeout=0)
    assert next(iter(loader)).views.shape == (8, 2, 3, 8, 8)
    val = open_images(str(tmp_path / "out"), "wds/", "val")
    assert sorted(int(label) for _, label in val) == [0] * 8 + [1] * 8


# ---- names and labels --------------------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.sampled_from(["x", "x-2", "x-3", "y.z", "y_z"]), st.sampled_from("jp"))
    )
)
def test_keys_are_unique_and_begin_with_the_class(names):
    paths = [f"/{folder}/{stem}.{extension}ng" for folder, stem, extension in names]
    labels = ["ab".index(folder) for folder, *_ in names]
    for webdataset in (False, True):
        split = name_images("train", FileSource(paths, labels, ["a", "b"]), webdataset)
        assert len(set(split.keys)) == len(paths)
        for key, (folder, stem, _) in zip(split.keys, names, strict=True):
            assert key.startswith(f"{folder}/{stem.replace('.', '_') if webdataset else stem}")
            assert not (webdataset and "." in key)


class Reader:
    """Images as timm's reader of Hugging Face data sets hands them out."""

    def __init__(self, labels, names):
        self.labels, self.class_to_idx = labels, {name: i for i, name in enumerate(names)}

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return io.BytesIO(plain(index)), self.labels[index]

    def iter_targets(self):
        yield from self.labels


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (["zebra", "ant", "fox", "gnu"], ["zebra", "ant", "fox", "gnu"]),  # not in lexical order
        (["a/b", "a_b", "x", "y"], ["0 a_b", "1 a_b", "2 x", "3 y"]),
        (["..", "é", "train", ""], ["0 ..", "1 é", "2 train", "3"]),
        ([], ["0", "1", "2"]),
    ],
)
def test_label_numbers_survive_whatever_the_classes_are_called(prepare, monkeypatch, tmp_path, names, classes):
    import timm.data

    labels = [2, 0, 2, 0, 0]  # 1 and 3 have no image
    readers = {"train": Reader(labels, names), "validation": Reader([-1, -1], names)}
    monkeypatch.setattr(timm.data, "create_dataset", lambda *_, split, **__: readers[split])
    prepare("--dataset", "hfds/user/name", "--output_dir", tmp_path / "out", "--image_format", "png")
    source = open_images(str(tmp_path / "out"), "", "train")
    label_of = {int(decode(source.read(i), 3).max()): source.labels[i] for i in range(5)}
    assert label_of == dict(enumerate(labels))
    assert source.class_names == classes
    val = open_images(str(tmp_path / "out"), "", "val")  # without labels
    assert (len(val), val.class_names) == (2, [""])


def test_labels_without_names_are_numbered():
    source = ReaderSource(None, "x", labels=[3, 11, 0])
    assert labels_of(source) == ([3, 11, 0], [f"{i:02d}" for i in range(12)])
    assert labels_of(ReaderSource(None, "x")) == (None, None)


def test_a_class_called_train_is_a_class(prepare, tmp_path):
    for split in ("train", "val"):
        for name in ("bus", "train"):
            write_images(tmp_path / "in" / split / name, 2)
    prepare("--data_path", tmp_path / "in", "--output_dir", tmp_path / "out")
    for split in ("train", "val"):
        source = open_images(str(tmp_path / "out"), "", split)
        assert source.class_names == ["bus", "train"]
        assert len(source) == 4


def test_shards_are_read_without_their_manifests_too_and_never_by_wrong_ones(prepare, class_folders, tmp_path):
    out = tmp_path / "out"
    prepare("--data_path", class_folders, "--output_dir", out)
    source = open_images(str(out), "", "train")
    expected = contents(source)
    manifest = out / "train/train-00000.tar.json"
    ours = json.loads(manifest.read_text())
    for wrong in ("[]", "{", '{"bytes": 3}', json.dumps(ours | {"bytes": 1})):
        manifest.write_text(wrong)
        assert contents(open_images(str(out), "", "train")) == expected
    manifest.unlink()
    assert contents(open_images(str(out), "", "train")) == expected
    manifest.write_text(json.dumps(ours | {"classes": ["cat"]}))
    with pytest.raises(UserError, match="shards of several data sets, only one has a class 'dog'"):
        open_images(str(out), "", "train")


def hostile_manifests(ours):
    """Changes of a manifest that no call of ours has written, and what is said of each."""
    name, offset, size = ours["members"][0]
    return {
        "members must be a list": [
            {"members": "x"},
            {"members": [[1, 2, 3]]},
            {"members": [[name, "0", 1]]},
            {"members": {}},
        ],
        "places ": [
            {"members": [[name, -1, size]]},
            {"members": [[name, offset, 10**15]]},
            {"members": [[name, 1, -5]]},
        ],
        "begin, end, bytes": [{"begin": "x"}, {"end": -1}, {"bytes": float(ours["bytes"])}, {"source_bytes": None}],
        "sha256 must": [{"sha256": 3}],
        "classes must": [{"classes": "cat"}, {"classes": [1, 2]}, {"classes": {"cat": 0}}, {"classes": ["cat", "cat"]}],
        "bad must": [{"bad": [["x"]]}, {"bad": 7}],
    }


def test_hostile_manifests_are_one_line(prepare, class_folders, tmp_path):
    out = tmp_path / "out"
    prepare("--data_path", class_folders, "--output_dir", out)
    manifest = out / "train/train-00000.tar.json"
    ours = json.loads(manifest.read_text())
    for reason, changes in hostile_manifests(ours).items():
        for change in changes:
            manifest.write_text(json.dumps(ours | change))
            with pytest.raises(UserError) as error:
                open_images(str(out), "", "train")
            message = one_line(error)
            assert message.startswith(f"{manifest}: {reason}"), message
            assert message.endswith("remove it, or prepare the data set again")
    manifest.write_text("[" * 100_000)
    with pytest.raises(UserError, match="is nested too deeply"):
        open_images(str(out), "", "train")
    manifest.unlink()
    os.mkfifo(manifest)
    with pytest.raises(UserError, match="is no file of at most"):
        open_images(str(out), "", "train")


# ---- what is no image, and orientation -----------------------------------------------------------------------


def test_what_is_no_data_is_neither_prepared_nor_checked(prepare, class_folders, tmp_path):
    expected = contents(open_images(str(class_folders), "", "train"))
    for name in ("train/cat/._image-000.png", "train/.ipynb_checkpoints/x.png", "val/@eaDir/x.png"):
        (class_folders / name).parent.mkdir(exist_ok=True)
        (class_folders / name).write_bytes(b"no image")
    assert "all images can be read" in prepare("--check", "--data_path", class_folders)
    prepare("--data_path", class_folders, "--output_dir", tmp_path / "out")
    assert contents(open_images(str(tmp_path / "out"), "", "train")) == expected


@pytest.mark.timeout(60)
@pytest.mark.parametrize("workers", [0, 2])
def test_pipes_and_large_files_are_named_and_not_read(prepare, class_folders, tmp_path, workers):
    os.mkfifo(class_folders / "train/cat/pipe.png")
    with open(class_folders / "train/dog/large.png", "wb") as file:
        file.truncate(2**40)
    code, out, _ = prepare("--check", "--data_path", class_folders, "--num_workers", workers, fails=True)
    assert code == 1
    assert "cat/pipe.png\tis a pipe (FIFO), no file" in out
    assert f"dog/large.png\thas {2**40} bytes, at most" in out
    flags = ("--data_path", class_folders, "--output_dir", tmp_path / "out", "--num_workers", workers)
    assert "pipe.png: cannot be read (is a pipe" in prepare(*flags, fails=True)[2]
    assert "2 bad ones left out" in prepare(*flags, "--on_bad_image", "skip")


@pytest.mark.parametrize("size", [(20, 30), (60, 90)])  # kept, and reduced
def test_orientation_is_passed_on_or_applied(prepare, tmp_path, size):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jpg").write_bytes(encode(colours(*size), "JPEG", quality=95, exif=exif))
    flags = ("--data_path", tmp_path / "in", "--image_format", "png")
    prepare(*flags, "--output_dir", tmp_path / "ignore")
    prepare(*flags, "--output_dir", tmp_path / "apply", "--exif", "apply")
    ignored, applied = (open_images(str(tmp_path / name), "", "train").read(0) for name in ("ignore", "apply"))
    assert (decode(ignored, 3, "apply").int() - decode(applied, 3).int()).abs().max() <= 2  # turned, then reduced
    assert torch.equal(decode(applied, 3, "apply"), decode(applied, 3))  # it is upright, and says so
    assert decode(applied, 3).shape == (3, *decode(ignored, 3).shape[:0:-1])
    assert "--exif is ignore here but apply" in prepare(*flags, "--output_dir", tmp_path / "apply", fails=True)[2]


# ---- bad images --------------------------------------------------------------------------------------------


@pytest.fixture
def with_bad_images(class_folders):
    """`class_folders` with two unreadable images."""
    intact = (class_folders / "train/cat/image-003.png").read_bytes()
    (class_folders / "train/cat/image-003.png").write_bytes(intact[:-40])
    (class_folders / "val/dog/image-007.png").write_bytes(b"")
    return class_folders


def test_a_bad_image_stops_or_is_left_out_and_listed(prepare, with_bad_images, tmp_path):
    flags = ("--data_path", with_bad_images, "--shard_mb", "0.002", "--output_dir")
    code, _, message = prepare(*flags, tmp_path / "out", fails=True)
    assert code == 2
    assert f"{with_bad_images}/train/cat/image-003.png: cannot be read (" in message
    assert "add --on_bad_image skip" in message
    output = prepare(*flags, tmp_path / "out", "--on_bad_image", "skip")
    assert "31 images" in output
    assert f"1 bad ones left out, see {tmp_path}/out/bad_images.txt" in output
    lines = [line.split("\t") for line in (tmp_path / "out/bad_images.txt").read_text().splitlines()]
    assert [Path(name).name for name, _ in lines] == ["image-003.png", "image-007.png"]
    assert lines[1][1] == "the file is empty"
    prepare(*flags, tmp_path / "again", "--on_bad_image", "skip", "--num_workers", "2")
    assert tree(tmp_path / "again") == tree(tmp_path / "out")
    source = open_images(str(tmp_path / "out"), "", "train")
    expected = contents(open_images(str(with_bad_images), "", "train"))
    assert contents(source) == [item for item in expected if item[0] != "cat/image-003"]


def test_file_names_that_are_no_text(prepare, tmp_path):
    folder = os.path.join(os.fsencode(tmp_path), b"in", b"\xfc\nx")
    os.makedirs(folder)
    for name, content in ((b"\xe9.png", plain(7)), (b"\xff.png", b"")):
        with open(os.path.join(folder, name), "wb") as file:
            file.write(content)
    code, printed, _ = prepare("--check", "--data_path", tmp_path / "in", fails=True)
    assert (code, "\\udcff.png\tthe file is empty" in printed) == (1, True)
    flags = ("--data_path", tmp_path / "in", "--image_format", "png", "--on_bad_image", "skip")
    prepare(*flags, "--output_dir", tmp_path / "out")
    assert b"\xff.png\tthe file is empty\n" in (tmp_path / "out/bad_images.txt").read_bytes()
    source = open_images(str(tmp_path / "out"), "", "train")
    assert (len(source), source.read(0)) == (1, plain(7))
    (tmp_path / "out/train/train-00000.tar.json").unlink()
    assert open_images(str(tmp_path / "out"), "", "train").members[0] == source.members[0]


def test_nothing_but_bad_images(prepare, tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(3):
        (tmp_path / f"in/{i}.jpg").write_bytes(b"no image")
    flags = ("--data_path", tmp_path / "in", "--output_dir", tmp_path / "out", "--on_bad_image", "skip")
    code, _, message = prepare(*flags, fails=True)
    assert (code, "none of its 3 images can be read (no image" in message) == (1, True)


def test_check_names_all_and_writes_nothing(prepare, with_bad_images, tmp_path):
    before = tree(tmp_path)
    for workers in (0, 2):
        flags = ("--check", "--data_path", with_bad_images, "--num_workers", workers)
        code, out, message = prepare(*flags, fails=True)
        assert (code, "2 bad" in message) == (1, True)
        named = [line.split("\t")[0] for line in out.splitlines() if "\t" in line]
        assert named == [f"{with_bad_images}/train/cat/image-003.png", f"{with_bad_images}/val/dog/image-007.png"]
    assert tree(tmp_path) == before


def test_check_of_prepared_shards_compares_hashes(prepare, class_folders, tmp_path):
    out = tmp_path / "out"
    prepare("--data_path", class_folders, "--output_dir", out)
    assert "all images can be read" in prepare("--check", "--data_path", out)
    shard = out / "val/val-00000.tar"
    content = bytearray(shard.read_bytes())
    content[130] ^= 1  # in a header, which decoding does not see
    shard.write_bytes(content)
    code, printed, _ = prepare("--check", "--data_path", out, fails=True)
    assert (code, f"{shard}\tits SHA-256 is not" in printed) == (1, True)


# ---- wrong places ------------------------------------------------------------------------------------------


def test_places_where_nothing_is_written(prepare, class_folders, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").touch()
    (tmp_path / "file").touch()
    wrong = {
        class_folders / "small": "lies inside --data_path",
        class_folders: "lies inside --data_path",
        tmp_path / "full": "holds something else (thesis.tex)",
        tmp_path / "file": "cannot be written",
        Path("/proc/nowhere"): "cannot be written",
    }
    before = tree(tmp_path)
    for path, reason in wrong.items():
        code, _, message = prepare("--data_path", class_folders, "--output_dir", path, fails=True)
        assert code == 2
        assert message.startswith(f"prepare_data.py: error: --output_dir {path}: ")
        assert reason in message
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--output_dir x", "--data_path: say where the images are"),
        ("--dataset digits", "--output_dir: say where to write"),
        ("--dataset digits --output_dir x --short_side 4", "--short_side 4: must be 8 or more"),
        ("--dataset digits --output_dir x --quality 0", "--quality 0: must lie in 1 to 100"),
        ("--dataset digits --output_dir x --in_chans 4", "--in_chans 4: JPEG has no transparency"),
        ("--dataset digits --output_dir x --in_chans 2", "--in_chans 2: images have"),
        ("--dataset digits --output_dir x --shard_mb 0", "--shard_mb 0.0: must be above 0"),
        ("--dataset digits --output_dir x --num_workers -1", "--num_workers -1: must be 0 or more"),
        ("--data_path absent --output_dir x", "--data_path absent: there is no such file"),
        ("--data_path absent --output_dir x --qualty 3", "--qualty: unknown flag, did you mean --quality?"),
    ],
)
def test_wrong_flags_are_one_line(prepare, monkeypatch, tmp_path, flags, message):
    monkeypatch.chdir(tmp_path)
    code, _, error = prepare(*flags.split(), fails=True)
    assert (code, message in error) == (2, True), error
    assert not list(tmp_path.iterdir())


def test_streams_have_no_numbered_images(prepare, monkeypatch, tmp_path):
    import timm.data
    from timm.data import IterableImageDataset

    stream = IterableImageDataset.__new__(IterableImageDataset)
    monkeypatch.setattr(timm.data, "create_dataset", lambda *_, **__: stream)
    code, _, message = prepare("--dataset", "wds/x", "--output_dir", tmp_path / "out", fails=True)
    assert (code, "is a stream without numbered images" in message) == (2, True)


# ---- progress ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("terminal", [True, False])
def test_progress(monkeypatch, capsys, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    with Progress("train", 100) as progress:
        progress.skip(40)
        progress.begin -= 10
        progress.shown -= 31
        progress.advance(20)
        progress.advance(1)  # too soon for another
    log = capsys.readouterr().err
    assert log.count("train: 60/100 images, 2 images/s, left 0:00:20") == 1
    assert log == ("\rtrain: 60/100 images, 2 images/s, left 0:00:20\x1b[K\r\x1b[K" if terminal else log)
    assert log.endswith("\n") != terminal
