"""Small data sets in the layouts that their authors publish."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torchvision
from PIL import Image
from scipy.io import savemat

from shared.images import plain
from util.data.banner import BANNER


def image(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(plain(number))


def lines(path: Path, *rows: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{row}\n" for row in rows))


# ---- folders as published; each returns (pixel value, class name) of the images of both splits, in their order -------
def make_cub200(root):
    folder = root / "CUB_200_2011"
    files = ["001.Black_footed_Albatross/a_1.jpg", "001.Black_footed_Albatross/a_2.jpg", "002.Laysan_Albatross/l_9.jpg"]
    for number, file in enumerate(files):
        image(folder / "images" / file, number)
    lines(folder / "images.txt", *(f"{i} {file}" for i, file in enumerate(files, start=1)))
    lines(folder / "image_class_labels.txt", "1 1", "2 1", "3 2")
    lines(folder / "train_test_split.txt", "1 0", "2 1", "3 1")
    lines(folder / "classes.txt", "1 001.Black_footed_Albatross", "2 002.Laysan_Albatross")
    names = ["001.Black_footed_Albatross", "002.Laysan_Albatross"]
    return names, [(1, names[0]), (2, names[1])], [(0, names[0])]


def make_nabirds(root):
    folder = root / "nabirds"
    birds = [("0000139e-21dc-4d0c-bfe1-4cae3c85c829", 817), ("0000d9fc-4e02-4c06-a0af-a55cfb16b12b", 295)]
    birds += [("00019306-9d83-4334-b255-a447742edce3", 817), ("ffffe0a5-0000-4000-8000-000000000000", 1010)]
    for number, (uuid, label) in enumerate(birds):
        image(folder / "images" / f"{label:04d}" / f"{uuid.replace('-', '')}.jpg", number)
    lines(folder / "images.txt", *(f"{uuid} {label:04d}/{uuid.replace('-', '')}.jpg" for uuid, label in birds))
    lines(folder / "image_class_labels.txt", *(f"{uuid} {label}" for uuid, label in birds))
    split = zip(birds, (1, 1, 0, 0), strict=True)
    lines(folder / "train_test_split.txt", *(f"{uuid} {training}" for (uuid, _), training in split))
    names = {0: "Birds", 22: "Ducks, Geese, and Swans", 295: "Common Eider (Adult male)", 817: "Oak Titmouse"}
    names |= {1010: "Dark-eyed Junco (White-winged)"}
    lines(folder / "classes.txt", *(f"{number} {name}" for number, name in names.items()))
    lines(folder / "hierarchy.txt", "22 0", "295 22", "817 0", "1010 0")
    known = [names[295], names[817], names[1010]]  # 0 and 22 are inner nodes
    return known, [(0, names[817]), (1, names[295])], [(2, names[817]), (3, names[1010])]


def make_dogs(root):
    files = ["n02085620-Chihuahua/n02085620_5927.jpg", "n02085620-Chihuahua/n02085620_7.jpg"]
    files += ["n02116738-African_hunting_dog/n02116738_3.jpg", "n02116738-African_hunting_dog/n02116738_9.jpg"]
    for number, file in enumerate(files):
        image(root / "Images" / file, number)
    for part, chosen in (("train", (0, 2)), ("test", (3,)), ("file", (0, 1, 2, 3))):
        cells = np.empty((len(chosen), 1), dtype=object)
        cells[:, 0] = [files[i] for i in chosen]
        labels = np.array([[1.0] if i < 2 else [120.0] for i in chosen])
        savemat(root / f"{part}_list.mat", {"file_list": cells, "annotation_list": cells, "labels": labels})
    names = ["n02085620-Chihuahua", "n02116738-African_hunting_dog"]
    return names, [(0, names[0]), (2, names[1])], [(3, names[1])]


def make_flowers102(root):
    folder = root / "flowers-102"
    for number in range(1, 8):
        image(folder / "jpg" / f"image_{number:05d}.jpg", number)
    labels = np.array([[77, 77, 1, 102, 1, 102, 1]], dtype=np.uint8)
    savemat(folder / "imagelabels.mat", {"labels": labels})
    parts = {"trnid": [[3, 1]], "valid": [[4, 7]], "tstid": [[6, 2, 5]]}  # the test part is the largest
    savemat(folder / "setid.mat", {name: np.array(part, dtype=np.uint16) for name, part in parts.items()})
    return ["001", "077", "102"], [(3, "001"), (1, "077"), (4, "102"), (7, "001")], [(6, "102"), (2, "077"), (5, "001")]


def make_aircraft(root):
    folder = root / "fgvc-aircraft-2013b" / "data"
    names = ["707-320", "F/A-18", "DC-3 Dakota"]  # not in alphabetical order, with slash and space
    for number, name in enumerate(("0056978", "1025794", "0481847", "2151717")):
        image(folder / "images" / f"{name}.jpg", number)
    lines(folder / "variants.txt", *names)
    lines(folder / "images_variant_train.txt", "1025794 F/A-18")
    lines(folder / "images_variant_val.txt", "0056978 DC-3 Dakota")
    lines(folder / "images_variant_trainval.txt", "1025794 F/A-18", "0056978 DC-3 Dakota")
    lines(folder / "images_variant_test.txt", "0481847 707-320", "2151717 DC-3 Dakota")
    return names, [(1, names[1]), (0, names[2])], [(2, names[0]), (3, names[2])]


def make_aircraft_with_banner(root):
    """White rows, which would be the brightest value, lie in the banner alone."""
    made = make_aircraft(root)
    for path in (root / "fgvc-aircraft-2013b" / "data" / "images").iterdir():
        picture = Image.open(path).convert("RGB")
        larger = Image.new("RGB", (picture.width, picture.height + BANNER), "white")
        larger.paste(picture)
        larger.save(path, format="PNG")
    return made


def make_naturalist(year: int) -> Callable[[Path], tuple]:
    def make(root):
        categories = [{"id": 4105, "name": "Taxidea taxus"}, {"id": 12, "name": "Bombus impatiens"}]
        for part, ids in (("train", (7, 3, 6)), ("val", (9, 8))):
            files = [f"train_val{year}/Mammalia/{4105 if i % 2 else 12}/{i:04d}.jpg" for i in ids]
            for number, file in zip(ids, files, strict=True):
                image(root / file, number)
            images = [{"id": i, "file_name": file, "width": 6} for i, file in zip(ids, files, strict=True)]
            notes = [{"id": i, "image_id": i, "category_id": 4105 if i % 2 else 12} for i in sorted(ids)]
            plain = {"info": {}, "images": images, "categories": categories, "annotations": notes}
            (root / f"{part}{year}.json").write_text(json.dumps(plain))
        names = ["Bombus impatiens", "Taxidea taxus"]  # in the order of the ids
        return names, [(7, names[1]), (3, names[1]), (6, names[0])], [(9, names[1]), (8, names[0])]

    return make


def make_mini(folders: tuple[str, str]) -> Callable[[Path], tuple]:
    def make(root):
        names = [f"{i:05d}_Animalia_Chordata_Aves_Order_Family_Genus_s{9 - i}" for i in range(2)]
        for folder, first in zip(folders, (0, 2), strict=True):
            for i, name in enumerate(names):
                image(root / folder / name / f"x{first + i}.jpg", first + i)
        return names, [(0, names[0]), (1, names[1])], [(2, names[0]), (3, names[1])]

    return make


def make_mini_json(root):
    names, *_ = make_mini(("train_mini", "val"))(root)
    for file, folder, first in (("train_mini", "train_mini", 0), ("val", "val", 2)):
        images = [{"id": i, "file_name": f"{folder}/{names[i]}/x{first + i}.jpg"} for i in range(2)]
        notes = [{"image_id": i, "category_id": i} for i in range(2)]
        categories = [{"id": i, "name": f"Genus s{9 - i}"} for i in range(2)]
        plain = {"images": images, "categories": categories, "annotations": notes}
        (root / f"{file}.json").write_text(json.dumps(plain))
    return ["Genus s9", "Genus s8"], [(0, "Genus s9"), (1, "Genus s8")], [(2, "Genus s9"), (3, "Genus s8")]


def make_cifar(number: int) -> Callable[[Path], tuple]:
    base = {10: torchvision.datasets.CIFAR10, 100: torchvision.datasets.CIFAR100}[number]

    def make(root):
        folder = root / base.base_folder
        folder.mkdir(parents=True)
        key, kind = ("labels", "label_names") if number == 10 else ("fine_labels", "fine_label_names")
        names = ["airplane", "cat", "truck"]
        rows, train, val = 0, [], []
        for file, _ in [*base.train_list, *base.test_list]:
            pixels = np.zeros((2, 3072), dtype=np.uint8)
            pixels[:, :1024] = [[rows], [rows + 1]]  # the red plane comes first
            labels = [rows % 3, (rows + 1) % 3]
            with open(folder / file, "wb") as stream:
                pickle.dump({"data": pixels, key: labels, "coarse_labels": [9, 9]}, stream)
            (val if file.startswith("test") else train).extend(
                (rows + i, names[label]) for i, label in enumerate(labels)
            )
            rows += 2
        with open(folder / base.meta["filename"], "wb") as stream:
            pickle.dump({kind: names, "coarse_label_names": ["x"]}, stream)
        return names, train, val

    return make
