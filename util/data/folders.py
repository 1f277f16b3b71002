"""Images in folders: all files below a folder, and the split that lies in it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from util.data.formats import ending_of, is_hidden, is_image
from util.data.listing import Listing, class_by_folder, number_classes
from util.data.sources import FileSource
from util.data.splits import looks_like_a_split, matching_names, split_kind, the_one, without_training_images
from util.runtime.errors import UserError
from util.runtime.logs import warn_once


def find_split(root: Path, split: str, flag: str) -> Path | None:
    """Return the folder or .tar below `root` that holds the split, or None where `root` holds images of one split.

    Raises:
        UserError: it holds other splits only, several of this one, or one cannot know whether `train` is a class.
    """
    train, val = (split_path(root, name, flag) for name in ("train", "val"))
    if split_kind(root.name) and not (train and val):  # what it holds are classes, whatever they are called
        return None
    if split == "train" and val and not train:
        raise without_training_images(flag, root, val.name)
    if train and not val and (beside := classes_beside(train)):
        raise train_is_a_class(flag, root, train.name, beside)
    if train and (ignored := [name for name in unclear_folders(root) if not is_hidden(name)]):
        warn_once(f"{flag} {root}: {', '.join(ignored)} beside {train.name} is not read")
    if split == "val" and train and not val:
        raise UserError(f"{flag} {root}: holds {train.name} but no val, name the validation images val")
    return train if split == "train" else val


def split_path(root: Path, split: str, flag: str) -> Path | None:
    """Return `root`/train or `root`/train.tar, under any name of this split, or None; a folder goes before its .tar.

    Raises:
        UserError: several folders, or several .tar files, mean this split.
    """
    if not root.is_dir():
        return None
    # of a million names few begin so: only these are looked at
    near = [name for name in os.listdir(root) if name[0] in "tTvVeE"]
    folders = [name for name in near if split_kind(name) and (root / name).is_dir()]
    tars = {name.rpartition(".")[0]: name for name in near if ending_of(name) == ".tar" and (root / name).is_file()}
    folder = the_one(matching_names(folders, split), flag, root)
    tar = the_one(matching_names(tars, split), flag, root)
    if folder and tar and split_kind(folder) != split_kind(tar):  # val.tar beside test/
        folder = folder if split_kind(folder) == "val" else None
    return root / folder if folder else root / tars[tar] if tar else None


def unclear_folders(root: Path) -> list[str]:
    """Return the names of folders that look like a split and are not understood: train 2, val_old."""
    names = sorted(os.listdir(root))
    return [name for name in names if looks_like_a_split(name) and not split_kind(name) and (root / name).is_dir()]


def classes_beside(train: Path) -> list[str]:
    """Return the names of the folders beside `train` that hold images themselves."""
    if not train.is_dir():
        return []
    folders = sorted(path for path in train.parent.iterdir() if path.is_dir() and path != train)
    return [path.name for path in folders if not is_hidden(path.name) and any(map(is_image, os.listdir(path)))]


def train_is_a_class(flag: str, path: Path, train: str, beside: Sequence[str]) -> UserError:
    """Return the error for a folder of which one cannot know whether `train` is a split or a class."""
    others = ", ".join(beside[:3]) + ", ..." * (len(beside) > 3)
    fix = f"give {path / train}; if it is a class, put all of them into a folder {train}"
    return UserError(f"{flag} {path}: holds {train} and {others}, if these are not to be trained on, {fix}")


def tar_files(folder: Path) -> list[Path]:
    """Return the .tar files that lie in a folder, in the order of their names."""
    return [folder / name for name in sorted(os.listdir(folder)) if ending_of(name) == ".tar" and not is_hidden(name)]


def open_folder(path: Path, flag: str, is_split: bool = True) -> FileSource:
    """Open the image files below a folder; the class of a file is the name of the folder that holds it.

    Args:
        is_split: it is one split, whose folders are classes, whatever they are called.

    Raises:
        UserError: see `list_folder` and `Listing.check`.
    """
    listing = list_folder(path, flag)
    listing.check(flag, path, is_split)
    classes = class_by_folder(listing.images)
    paths, class_of = [], {}
    for folder, names in listing.images.items():
        around = os.path.join(path, folder, "")
        paths += [around + name for name in names]
        class_of[around[:-1]] = classes[folder]
    paths.sort()
    return FileSource(paths, *number_classes([class_of[file.rpartition("/")[0]] for file in paths]))


def list_folder(root: Path, flag: str) -> Listing:
    """List the files at any depth; links to folders are followed.

    Raises:
        UserError: a folder cannot be listed, or is reached again from inside.
    """
    listing = Listing()
    waiting: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", ())]  # folders, and device and inode of those above
    while waiting:
        folder, above = waiting.pop()
        path = os.path.join(root, folder) if folder else str(root)
        images = []
        try:
            status = os.stat(path)
            identity = (status.st_dev, status.st_ino)
            if identity in above:
                raise UserError(f"{flag} {path}: a link leads back to a folder around it, remove the link")
            with os.scandir(path) as entries:
                for entry in entries:
                    name = entry.name
                    if entry.is_dir() and not is_hidden(name):
                        waiting.append((f"{folder}/{name}" if folder else name, (*above, identity)))
                    elif is_image(name):
                        images.append(name)
                    else:
                        listing.pass_over(folder, name)
        except OSError as error:
            raise UserError(f"{flag} {path}: cannot be listed ({error.strerror})") from error
        if images:
            listing.images[folder] = images
    return listing
