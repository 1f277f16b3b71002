"""Images with masks: layouts, class lists, what is refused and how, and augmentation of both together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from shared.calls import one_line
from shared.images import write_images, write_masked
from shared.segment import DAMAGES, config_of, damage
from util.data.joint_views import (
    Distortion,
    JointView,
    distort,
    draw_distortion,
    resized_image,
    resized_mask,
    scaled_size,
)
from util.data.masked_samples import WholeImages, load_pair
from util.data.masks import IGNORED, UNKNOWN, find_classes, in_words, make_classes, read_classes
from util.data.views import sample_generator
from util.runtime.errors import UserError
from util.train.segmentation import count_pixels, open_masked, train_dataset

quick = settings(max_examples=60, deadline=None)


def refused(*flags: object) -> str:
    with pytest.raises(UserError) as error:
        open_masked(config_of(*flags))
    return one_line(error)


# ---- layouts -----------------------------------------------------------------------------------------------
def test_camvid_s_layout(scenes):
    data = open_masked(config_of("--data_path", scenes))
    assert (len(data.train), len(data.val), data.num_classes) == (10, 5, 3)
    assert data.val.class_names == ["brick", "grass", "sky"]
    image, mask, place = load_pair(data.val, 2, 3, skip_bad=False)
    raw = np.asarray(Image.open(scenes / "masks" / "val" / "scene-002.png"))
    assert place == 2
    assert image.shape == (3, *mask.shape)
    assert mask.dtype == torch.uint8
    assert np.array_equal(mask, np.where(raw == 3, IGNORED, raw))


@pytest.fixture
def ade20k(tmp_path) -> Path:
    """ADE20K's own layout, numbers 1 to 4 (of 150), and ignored zeros."""
    root = tmp_path / "ADEChallengeData2016"
    for split, number in (("training", 6), ("validation", 3)):
        write_masked(root / "images" / split, root / "annotations" / split, number, offset=1)
        for path in (root / "annotations" / split).iterdir():
            mask = np.asarray(Image.open(path)).copy()
            mask[:4] = 0
            Image.fromarray(mask).save(path)
    return root


HEADER = ("Idx", "Ratio", "Train", "Val", "Stuff", "Name")


def object_info(path: Path, delimiter: str, separator: str) -> None:
    rows = [(i, "0.1", 10, 1, 0, f"thing {i}{separator}synonym") for i in range(1, 151)]
    lines = [delimiter.join(map(str, row)) for row in (HEADER, *reversed(rows))]
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("names", ["objectInfo150.csv", "objectInfo150.txt", None])
def test_ade20k_s_own_layout(ade20k, names):
    if names:
        object_info(ade20k / names, *(("," if names.endswith("csv") else "\t"), ";" if names.endswith("csv") else ", "))
    data = open_masked(config_of("--data_path", ade20k))
    assert (len(data.train), len(data.val), data.num_classes) == (6, 3, 150)
    assert data.val.class_names[0] == ("thing 1" if names else "class 1")
    assert data.val.class_names[149] == ("thing 150" if names else "class 150")
    if names:  # known by this file, whatever the folders are called
        (ade20k / "annotations" / "training").rename(ade20k / "annotations" / "others")
        (ade20k / "annotations" / "validation").rename(ade20k / "annotations" / "val")
        (ade20k / "images" / "validation").rename(ade20k / "images" / "val")
        others = f"--train_images {ade20k}/images/training --train_masks {ade20k}/annotations/others"
        data = open_masked(config_of("--data_path", ade20k, others))
    _, mask, _ = load_pair(data.train, 0, 3, skip_bad=False)
    raw = np.asarray(Image.open(data.train.masks[0])).astype(int)
    assert (raw == 0).any()
    assert np.array_equal(mask, np.where(raw == 0, IGNORED, raw - 1))


@pytest.mark.parametrize("own", ["classes.txt", "classes.json"])
def test_ade20k_s_folders_with_classes_of_their_own(ade20k, own):
    """Many medical sets are like this: numbers begin at 0, and nothing is ignored."""
    names = ["background", *(f"organ {number}" for number in range(1, 5))]
    (ade20k / own).write_text(json.dumps(names) if own.endswith("json") else "\n".join(names))
    data = open_masked(config_of("--data_path", ade20k))
    assert data.train.class_names == names
    _, mask, _ = load_pair(data.train, 0, 3, skip_bad=False)
    assert np.array_equal(mask, np.asarray(Image.open(data.train.masks[0])))


def test_ade20k_s_folders_with_names_from_elsewhere_must_be_told_apart(ade20k, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("\n".join(["background", *(f"organ {number}" for number in range(1, 5))]))
    flags = ("--data_path", ade20k, "--classes", names)
    with pytest.raises(UserError, match="say --first_label 1 if it is that") as error:
        open_masked(config_of(*flags))
    one_line(error)
    assert open_masked(config_of(*flags, "--first_label", 0)).train.class_names[0] == "background"


def test_any_pair_of_folders_with_names_that_end_differently(tmp_path):
    """Cityscapes': folders of cities, and two suffixes."""
    for split in ("train", "val"):
        for city in ("aachen", "ulm"):
            write_masked(tmp_path / "left" / split / city, tmp_path / "fine" / split / city, 2)
            for path in (tmp_path / "left" / split / city).iterdir():
                path.rename(path.with_name(f"{path.stem}_leftImg8bit.png"))
            for path in (tmp_path / "fine" / split / city).iterdir():
                path.rename(path.with_name(f"{path.stem}_gtFine_labelTrainIds.png"))
    (tmp_path / "names.txt").write_text("road\nwall\n\nsky\ncar\n")
    folders = [f"--{s}_{kind} {tmp_path}/{place}/{s}" for s in ("train", "val") for kind, place in
               (("images", "left"), ("masks", "fine"))]  # fmt: skip
    suffixes = "--image_suffix _leftImg8bit --mask_suffix _gtFine_labelTrainIds"
    data = open_masked(config_of(*folders, suffixes, "--classes", tmp_path / "names.txt"))
    assert data.train.class_names == ["road", "wall", "sky", "car"]
    assert len(data.train) == 4
    for index in range(4):
        load_pair(data.train, index, 3, skip_bad=False)
        assert Path(data.train.masks[index]).parent.name == Path(data.train.paths[index]).parent.name
    assert "does not end so" in refused(*folders, "--image_suffix _right", "--classes", tmp_path / "names.txt")


@pytest.mark.parametrize(("mode", "kind"), [("P", None), ("1", None), ("I;16", np.uint16)])
def test_masks_of_other_modes_are_numbers_all_the_same(scenes, mode, kind):
    path = scenes / "masks" / "val" / "scene-000.png"
    mask = Image.open(path)
    mask.load()
    numbers = np.asarray(mask) % (2 if mode == "1" else 4)
    if kind is not None:
        changed = Image.fromarray(numbers.astype(kind))
    elif mode == "1":
        changed = Image.fromarray(numbers.astype(bool))
    else:
        changed = Image.fromarray(numbers)
        changed.putpalette(list(range(255, -1, -1)) * 3)  # whose colours have nothing to do with the numbers
    assert changed.mode == mode
    changed.save(path)
    _, loaded, _ = load_pair(open_masked(config_of("--data_path", scenes)).val, 0, 3, skip_bad=False)
    assert np.array_equal(loaded, np.where(numbers == 3, IGNORED, numbers))


# ---- classes -----------------------------------------------------------------------------------------------
@given(
    st.integers(2, 12), st.integers(0, 3), st.sets(st.integers(0, 20), max_size=4)
)  # fmt: skip
@quick
def test_the_table_of_numbers_against_a_loop(number, first, ignored):
    names = [f"class {i}" for i in range(number)]
    if sum(first + i not in ignored for i in range(number)) < 2:
        return
    classes = make_classes(names, first, tuple(ignored), "names.txt")
    expected_classes = []
    for value in range(40):
        if value in ignored:
            assert classes.table[value] == IGNORED
        elif first <= value < first + number:
            assert classes.table[value] == len(expected_classes)
            expected_classes.append(names[value - first])
        else:
            assert classes.table[value] == UNKNOWN
    assert list(classes.names) == expected_classes


@pytest.mark.parametrize(
    ("name", "text", "names", "ignored"),
    [
        ("a.txt", "sky\n road \n\ncar\n", ["sky", "road", "car"], None),
        ("a.json", '["sky", "road"]', ["sky", "road"], None),
        ("a.json", '{"class_names": ["sky", "road"], "ignore_index": 1}', ["sky", "road"], (1,)),
        ("a.json", '{"class_names": ["sky", "road"], "ignore_index": [0, 255]}', ["sky", "road"], (0, 255)),
        ("a.csv", "Idx,Name\n2,b;c\n1,\"a, x\"\n", ["a", "b"], None),
    ],
)  # fmt: skip
def test_class_files(tmp_path, name, text, names, ignored):
    (tmp_path / name).write_text(text)
    assert read_classes(tmp_path / name, "--classes") == (names, ignored)


@pytest.mark.parametrize("text", ["{", "3", '{"names": []}', '{"class_names": {"0": "sky"}}'])
def test_what_is_no_class_file_is_one_line(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=r"--classes .*a.json: cannot be read as a list of classes") as error:
        read_classes(tmp_path / "a.json", "--classes")
    one_line(error)


def test_flags_win_over_the_class_file(tmp_path):
    (tmp_path / "a.json").write_text('{"class_names": ["x", "y", "z"], "ignore_index": 2}')
    file = str(tmp_path / "a.json")
    assert find_classes(None, file, None, ()).names == ("x", "y")
    assert find_classes(None, file, None, (0, 9)).names == ("y", "z")
    shifted = find_classes(None, file, 1, (0,))
    assert shifted.names == ("x", "y", "z")
    assert shifted.table[:5].tolist() == [IGNORED, 0, 1, 2, UNKNOWN]


def test_numbers_in_words():
    assert in_words([0, 1, 2, 5, 7, 8, 255]) == "0 to 2, 5, 7 to 8, 255"


# ---- wrong input -------------------------------------------------------------------------------------------
def test_no_data_set_is_one_line(scenes, tmp_path):
    assert "--data_path: give a folder with images/ and masks/" in _refused_flags("")
    assert "there is no such folder" in refused("--data_path", tmp_path / "absent")
    assert "is a file" in refused("--data_path", scenes / "classes.json")
    for split in ("train", "val"):
        write_images(tmp_path / "imagenet" / split / "dog", 2)
    message = refused("--data_path", tmp_path / "imagenet")
    assert "holds train, val, but a segmentation's folder has images/ and masks/" in message
    assert "main_finetune.py" in message
    (tmp_path / "nothing").mkdir()
    assert "holds nothing, but" in refused("--data_path", tmp_path / "nothing")


def _refused_flags(flags: str) -> str:
    with pytest.raises(UserError) as error:
        config_of(flags)
    return one_line(error)


def test_a_split_that_is_empty_or_not_there_is_one_line(scenes):
    for path in (scenes / "images" / "val").iterdir():
        path.unlink()
    assert "images/val: holds no images" in refused("--data_path", scenes)
    (scenes / "images" / "val").rmdir()
    assert "has no folder images/val; name one val, or give --val_images and --val_masks" in refused(
        "--data_path", scenes
    )


def test_an_image_without_a_mask_is_one_line(scenes):
    (scenes / "masks" / "train" / "scene-004.png").unlink()
    message = refused("--data_path", scenes)
    assert f"images/train/scene-004.png: has no mask {scenes}/masks/train/scene-004.png" in message
    shutil.rmtree(scenes / "masks" / "train")
    assert "masks/train: there is no such folder" in refused("--data_path", scenes)
    (scenes / "masks" / "train").mkdir()
    assert "(10 of 10 images have none)" in refused("--data_path", scenes)


def test_classes_that_nothing_names_are_one_line(scenes, tmp_path):
    (scenes / "classes.json").unlink()
    assert "holds no classes.json, --classes: give a file" in refused("--data_path", scenes)
    assert "there is no such file" in refused("--data_path", scenes, "--classes", tmp_path / "absent.txt")
    (tmp_path / "one.txt").write_text("sky\n")
    message = refused("--data_path", scenes, "--classes", tmp_path / "one.txt")
    assert "names 1 classes, there must be 2 to 255" in message


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_mask_that_is_none_is_one_line(scenes, kind):
    path = scenes / "masks" / "train" / "scene-003.png"
    damage(path, kind)
    data = open_masked(config_of("--data_path", scenes))
    with pytest.raises(UserError) as error:
        load_pair(data.train, 3, 3, skip_bad=False)
    message = one_line(error)
    assert message.startswith(str(path))
    assert DAMAGES[kind] in message
    if kind in ("out of range", "sixteen bits"):
        assert "classes.json knows 3 classes (0 to 2) and ignores 3; mend it" in message
    if kind in ("no image", "cut"):  # such files, and no other faults, may be skipped
        assert load_pair(data.train, 3, 3, skip_bad=True)[2] == 4
    else:
        with pytest.raises(UserError, match="scene-003"):
            load_pair(data.train, 3, 3, skip_bad=True)


@pytest.mark.parametrize("folder", ["images", "masks"])
def test_a_validation_image_is_not_to_be_skipped(scenes, folder):
    path = next(iter(sorted((scenes / folder / "val").iterdir())))
    path.write_text("no image")
    config = config_of("--data_path", scenes, "--on_bad_image skip --num_workers 0")
    val = open_masked(config).val
    dataset = WholeImages(val, range(len(val)), config.resolved_input_size, 3)
    for read in (lambda: dataset[0], lambda: count_pixels(val, config, "validation", range(len(val)))):
        with pytest.raises(UserError, match=rf"{path.name}: cannot be read .*; mend it or take it out"):
            read()


# ---- augmentation ------------------------------------------------------------------------------------------
VIEW = dict(size=(24, 32), scale_range=(0.5, 2.0), most_of_a_class=0.75, hflip=0.5, photometric=False, fill=(9, 9, 9))


def numbered(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return an image whose mask can be read off it: 20 times the class, in large tiles."""
    mask = (torch.arange(height)[:, None] // 8 + torch.arange(width)[None] // 8) % 11
    mask = mask.to(torch.uint8)
    return (20 * mask).expand(3, -1, -1).clone(), mask


@given(st.integers(20, 90), st.integers(20, 90), st.integers(0, 10**6))
@quick
def test_image_and_mask_stay_together(height, width, seed):
    view, mask = JointView(**VIEW)(*numbered(height, width), sample_generator(0, 0, seed))
    assert view.shape == (3, 24, 32)
    assert mask.shape == (24, 32)
    assert type(view) is type(mask) is torch.Tensor
    ignored = mask == IGNORED
    assert torch.equal(ignored, (view == 9).all(0) & ignored)  # padding is of the fill
    assert not ignored[0, 0]
    inside = torch.from_numpy(_away_from_edges(mask.numpy())) & ~ignored
    if inside.any():  # within a tile the image says what the mask says
        assert (view[0].float() / 20 - mask.float()).abs()[inside].max() < 0.5


def _away_from_edges(mask: np.ndarray, distance: int = 3) -> np.ndarray:
    """Pixels all of whose neighbours within `distance` are there and have their class."""
    padded = np.pad(mask, distance, constant_values=254)
    size = 2 * distance + 1
    windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size))
    return (windows == mask[..., None, None]).all(axis=(2, 3))


def test_a_mask_is_resized_to_the_class_at_each_pixel_s_centre():
    mask = torch.randint(0, 9, (30, 47), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    resized = resized_mask(mask, (13, 61))
    for y in range(13):
        for x in range(61):
            assert resized[y, x] == mask[int((y + 0.5) * 30 / 13), int((x + 0.5) * 47 / 61)]


def test_sizes():
    assert scaled_size((360, 480), (128, 128)) == (128, 171)
    assert scaled_size((360, 480), (128, 128), 0.5) == (64, 85)
    assert scaled_size((100, 100), (24, 32)) == (32, 32)
    assert scaled_size((100, 1000), (50, 50)) == (20, 200)  # the longer side is at most four crops
    assert resized_image(torch.zeros(3, 20, 30, dtype=torch.uint8), (10, 15)).shape == (3, 10, 15)


def test_a_crop_of_one_class_is_drawn_again():
    """A large plain area and a small other one: nearly all crops see both, unless all are allowed."""
    mask = torch.zeros(48, 96, dtype=torch.uint8)
    mask[:, 72:] = 1
    image = torch.zeros(3, 48, 96, dtype=torch.uint8)
    shares = {}
    for most in (0.75, 1.0):
        view = JointView(**VIEW | dict(most_of_a_class=most, scale_range=(1.0, 1.0)))
        masks = [view(image, mask, sample_generator(0, 0, i))[1] for i in range(60)]
        shares[most] = np.mean([0.25 <= m.float().mean() <= 0.75 for m in masks])
    assert shares[0.75] > 0.95
    assert shares[1.0] < 0.7


def test_ignored_pixels_are_no_class_of_a_crop():
    view = JointView(**VIEW)
    mask = torch.full((8, 8), IGNORED, dtype=torch.uint8)
    assert not view.is_varied(mask)
    mask[0, :2] = torch.tensor([3, 4], dtype=torch.uint8)
    assert view.is_varied(mask)
    mask[1, :3] = 3
    assert not view.is_varied(mask)  # 4 of 5


def test_a_sample_follows_from_seed_epoch_and_index(scenes):
    config = config_of("--data_path", scenes)
    dataset = train_dataset(config, open_masked(config).train)
    first = dataset[1, 7]
    torch.rand(3)
    np.random.rand(3)
    dataset[0, 2]
    again, other = dataset[1, 7], dataset[2, 7]
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.masks, again.masks)
    assert not torch.equal(first.images, other.images)


@pytest.mark.parametrize("channels", [1, 3])
def test_photometric_distortion(channels):
    image = torch.randint(0, 256, (channels, 9, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    neutral = Distortion(0.0, 1.0, False, 1.0, 0.0)
    assert torch.equal(distort(image, neutral), image)
    expected = (image.double() * 1.3 + 1.3 * 20).round().clamp(0, 255)
    assert (distort(image, Distortion(20.0, 1.3, False, 1.0, 0.0)).double() - expected).abs().max() <= 1
    late = (image.double() + 20).clamp(0, 255) * 1.3
    distorted = distort(image, Distortion(20.0, 1.3, True, 1.0, 0.0)).double()
    assert (distorted - late.round().clamp(0, 255)).abs().max() <= 1
    drawn = [draw_distortion(sample_generator(0, 0, i)) for i in range(400)]
    for name, low, high, rest in (("brightness", -32, 32, 0), ("contrast", 0.5, 1.5, 1), ("hue", -0.1, 0.1, 0)):
        values = np.array([getattr(each, name) for each in drawn])
        assert 0.4 < np.mean(values == rest) < 0.6
        assert low <= values.min() < low + 0.1 * (high - low)
        assert high - 0.1 * (high - low) < values.max() <= high
    if channels == 3:
        grey = distort(image, Distortion(0.0, 1.0, False, 0.0, 0.0))
        assert (grey.float().amax(0) - grey.float().amin(0)).max() <= 1
