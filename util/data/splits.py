"""Names of splits: which folders and .tar files hold training images, and which hold others."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path

from util.runtime.errors import UserError

_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "eval", "evaluation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_KNOWN = re.compile(rf"({'|'.join(_WORDS)})[ _.-]?(set|data|split|images|imgs)?", re.IGNORECASE)
_OTHER_WORDS = ("trainval", "trn", "tst", "dev", "holdout", "heldout", "unlabeled", "unlabelled")
# what may stand beside such a word in a split's name, and seldom does in a class's: train_clean, test-a, mini_val
_QUALIFIERS = frozenset(
    (
        *("set", "sets", "data", "split", "subset", "fold", "images", "imgs", "part", "new", "old", "small", "large"),
        *("full", "mini", "tiny", "all", "final", "clean", "raw", "extra", "orig", "original", "challenge", "standard"),
    )
)


def split_kind(name: str) -> str | None:
    """Return train, val or test for a name that means this split, in any case, and None for every other name."""
    match = _KNOWN.fullmatch(name)
    return _WORDS[match[1].lower()] if match else None


def matching_names(names: Iterable[str], split: str) -> list[str]:
    """Return the names that mean `split`; a test split counts as val where there is no other."""
    kinds = {name: split_kind(name) for name in names}
    for kind in ("train",) if split == "train" else ("val", "test"):
        if matches := sorted(name for name in kinds if kinds[name] == kind):
            return matches
    return []


def the_one(names: list[str], flag: str, root: Path) -> str | None:
    """Return the only name, or None where there is none.

    Raises:
        UserError: several folders mean the same split.
    """
    if len(names) > 1:
        raise UserError(f"{flag} {root}: holds {' and '.join(names)}, name one of them or merge them")
    return names[0] if names else None


def without_training_images(flag: str, root: Path, val: str) -> UserError:
    """Return the error for a folder without training images: to train on the validation images is never meant."""
    fix = "name the training images train, or give their own folder or .tar, and the others to --val_path"
    return UserError(f"{flag} {root}: holds {val} but no train, {fix}")


def check_one_split(flag: str, root: Path, folders: Collection[str]) -> None:
    """Refuse training and validation images side by side further down, which would both count.

    Args:
        folders: paths below `root` of folders that hold images.
    """
    inside: dict[str, set[str]] = {}
    for folder in folders:
        parts = folder.split("/")
        for depth in range(1, len(parts)):  # at the top they are split already, or classes
            inside.setdefault("/".join(parts[:depth]), set()).add(parts[depth])
    for parent, names in inside.items():
        train, val = matching_names(names, "train"), matching_names(names, "val")
        if train and val:
            held = " and ".join(f"{parent}/{name}" for name in (train[0], val[0]))
            raise UserError(f"{flag} {root}: holds {held}, give {root / parent}, or one of the two")
        if all(map(looks_like_a_split, names)) and len(names) > 1:
            raise unclear_split(flag, root, f"{parent}/{min(names)}")


def check_no_unclear_split(flag: str, root: Path, folders: Collection[str]) -> None:
    """Refuse a folder at the top that looks like a split and is not understood: it must not become a class.

    A folder that holds images itself, as others beside it do, may be a class called bullet_train or test tube.

    Args:
        folders: paths below `root` of folders that hold images.
    """
    names = {folder.partition("/")[0] for folder in folders} - {""}
    classes = any(name in folders for name in names if not looks_like_a_split(name))
    for name in sorted(filter(looks_like_a_split, names)):
        if not (classes and name in folders) or _is_qualified(name):
            raise unclear_split(flag, root, name)


def unclear_split(flag: str, root: Path, name: str) -> UserError:
    """Return the error that asks what a folder is."""
    fix = "name splits train and val (or test), or give one of them; if it is a class, put all classes into a train"
    return UserError(f"{flag} {root}: is {name} a split or a class? {fix}")


def looks_like_a_split(name: str) -> bool:
    """Return True if a word of the name is that of a split, or one with two letters exchanged."""
    return any(map(_is_split_word, _words(name)))


def _is_qualified(name: str) -> bool:
    """Return True if the name is words of splits and what qualifies them, and nothing that could name a class."""
    return all(_is_split_word(word) or word in _QUALIFIERS or len(word) == 1 for word in _words(name))


def _words(name: str) -> list[str]:
    """Return the words of a name in lower case: trainA, TRAIN_A and train2017a begin with train."""
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)]


def _is_split_word(word: str) -> bool:
    known = (*_WORDS, *_OTHER_WORDS)
    return word in known or any(len(word) > 4 and sorted(word) == sorted(other) for other in known)
