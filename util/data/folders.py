"""Images in folders and tar files: which files are images, their splits and their classes."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from util.data.shards import read_shard
from util.data.sources import FileSource, TarSource
from util.runtime.errors import UserError

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")
SPLIT_NAMES = {"train": ("train", "training"), "val": ("val", "valid", "validation", "test")}


def without_training_images(flag: str, path: Path, val: str) -> UserError:
    """Training on validation images, which is what is left there, is never meant."""
    fix = "name the training images train, or give their own folder or .tar, and the others to --val_path"
    return UserError(f"{flag} {path}: holds {val} but no train, {fix}")


def names_a_split(path: Path) -> bool:
    """Whether a folder is called as one."""
    return any(path.name in names for names in SPLIT_NAMES.values())


def classes_beside(train: Path) -> list[str]:
    """The folders beside `train` that hold images themselves."""
    if not train.is_dir():
        return []
    folders = sorted(path for path in train.parent.iterdir() if path.is_dir() and path != train)
    return [folder.name for folder in folders if any(map(is_image, os.listdir(folder)))]


def train_is_a_class(flag: str, path: Path, train: str, beside: Sequence[str]) -> UserError:
    """For a folder of which one cannot know whether `train` is a split or a class."""
    others = ", ".join(beside[:3]) + ", ..." * (len(beside) > 3)
    fix = f"give {path / train}; if it is a class, put all of them into a folder {train}"
    return UserError(f"{flag} {path}: holds {train} and {others}, if these are not to be trained on, {fix}")


def is_image(name: str) -> bool:
    """By its ending."""
    return os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS


def split_path(root: Path, split: str) -> Path | None:
    """`root`/train or `root`/train.tar (for val: SPLIT_NAMES in their order), or None."""
    for name in SPLIT_NAMES[split]:
        if os.path.isdir(root / name):
            return root / name
        if os.path.isfile(root / f"{name}.tar"):
            return root / f"{name}.tar"
    return None


def open_folder(path: Path, flag: str) -> FileSource:
    """Image files below `path`; the name of the folder that holds a file is its class."""
    found = [
        (os.path.join(folder, name), os.path.basename(folder.removeprefix(str(path))))
        for folder, name in image_paths(path, flag)
    ]
    if not found:
        published = "; one in its published form is named by --dataset" * (flag == "--data_path")
        raise UserError(f"{flag} {path}: holds no images ({' '.join(IMAGE_EXTENSIONS)}) at any depth{published}")
    paths, folders = zip(*sorted(found), strict=True)
    check_one_split(flag, path, {os.path.dirname(os.path.relpath(name, path)) for name in paths})
    return FileSource(list(paths), *number_classes(folders))


def image_paths(path: Path, flag: str) -> Iterator[tuple[str, str]]:
    """Folder and name of each image file at any depth; links to folders are followed.

    Raises:
        UserError: a folder cannot be listed, or is reached again from inside.
    """

    def stop(error: OSError) -> None:  # otherwise os.walk leaves out what it cannot list
        raise UserError(f"{flag} {error.filename}: cannot be listed ({error.strerror})") from error

    above: dict[str, tuple[tuple[int, int], ...]] = {str(path): ()}  # folders on the way to one: device and inode
    for folder, inside, names in os.walk(path, followlinks=True, onerror=stop):
        about, way = os.stat(folder), above.pop(folder)
        this = (about.st_dev, about.st_ino)
        if this in way:
            raise UserError(f"{flag} {folder}: a link leads back to a folder around it, remove the link")
        above |= {os.path.join(folder, name): (*way, this) for name in inside}
        for name in names:
            if is_image(name):
                yield folder, name


def open_tars(root: Path, tars: list[Path], split: str, flag: str) -> TarSource:
    """Image files in .tar files, below train/ (or val/) where there is one; classes are folders, as on disk."""
    found, classes = tar_contents(tars, flag)
    if classes is None:  # in a shard they are classes of these names
        splits = splits_of([name for _, name, _, _ in found])
        if split == "train" and "val" in splits and "train" not in splits:
            raise without_training_images(flag, root, splits["val"].rsplit("/")[-1])
        if split in splits:
            found = [member for member in found if in_folder(member[1], splits[split])]
        check_one_split(flag, root, {os.path.dirname(name) for _, name, _, _ in found})
    if not found:
        raise UserError(f"{flag} {root}: holds no images ({' '.join(IMAGE_EXTENSIONS)})")
    found.sort()
    folders = [PurePosixPath(name).parent.name for _, name, _, _ in found]
    unlisted = set(folders) - set(folders if classes is None else classes)
    if unlisted:
        raise UserError(f"{flag} {root}: holds shards of several data sets, only one has a class {min(unlisted)!r}")
    return TarSource(found, *number_classes(folders, classes))


def tar_contents(tars: Sequence[Path], flag: str) -> tuple[list[tuple[str, str, int, int]], list[str] | None]:
    """File, name, offset and bytes of each image; the classes where scripts/prepare_data.py wrote them down."""
    shards = [read_shard(tar) for tar in tars]  # None where the .tar is not one of scripts/prepare_data.py
    members = [shard.members if shard else tar_members(tar, flag) for tar, shard in zip(tars, shards, strict=True)]
    found = [(str(tar), *member) for tar, inside in zip(tars, members, strict=True) for member in inside]
    return found, next((shard.classes for shard in shards if shard), None)


def splits_of(names: Sequence[str]) -> dict[str, str]:
    """The folders that hold `train` and `val` among members of a .tar: at its top, or in a folder around all of it."""
    folders = {PurePosixPath(name).parts[:-1] for name in names}
    shared = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*folders, strict=False))
    around = [names[0] for names in shared]
    known = [name for names in SPLIT_NAMES.values() for name in names]
    level = next((i for i, folder in enumerate(around) if folder in known), len(around))
    there = {folder[level]: "/".join(folder[: level + 1]) for folder in folders if len(folder) > level}
    return {split: there[name] for split, names in SPLIT_NAMES.items() for name in reversed(names) if name in there}


def in_folder(name: str, folder: str) -> bool:
    """Whether a member of a .tar lies there, at any depth."""
    return str(PurePosixPath(name)).startswith(f"{folder}/")


def check_one_split(flag: str, root: Path, folders: Iterable[str]) -> None:
    """UserError where training and validation images lie side by side further down, and would both count."""
    inside: dict[PurePosixPath, set[str]] = {}
    for folder in map(PurePosixPath, folders):
        for each in (folder, *folder.parents)[:-2]:  # at the top they are split already, or classes
            inside.setdefault(each.parent, set()).add(each.name)
    for parent, names in inside.items():
        both = [next((name for name in SPLIT_NAMES[split] if name in names), None) for split in SPLIT_NAMES]
        if all(both):
            held = " and ".join(str(parent / name) for name in both)
            raise UserError(f"{flag} {root}: holds {held}, give {root / parent}, or one of the two")


def tar_members(tar: Path, flag: str) -> list[tuple[str, int, int]]:
    """Name, offset and bytes of each image, by looking through the file: 4 s for 100,000."""
    import tarfile

    try:
        with tarfile.open(tar, "r:") as file:
            found = [
                (member.name, member.offset_data, member.size)
                for member in file
                if member.isfile() and is_image(member.name)
            ]
            file.fileobj.seek(file.offset)  # tarfile takes a damaged header for the end
            if file.fileobj.read(512) != bytes(512):
                raise tarfile.ReadError(f"truncated or damaged after {file.offset} bytes")
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{flag} {tar}: cannot be read as an uncompressed .tar ({error})") from error
    return found


def number_classes(folders: Sequence[str], classes: list[str] | None = None) -> tuple[list[int], list[str]]:
    """Labels and class names: as listed, or in the lexical order of torchvision's ImageFolder ("10" before "2")."""
    classes = sorted(set(folders)) if classes is None else classes
    numbers = {name: i for i, name in enumerate(classes)}
    return [numbers[folder] for folder in folders], classes
