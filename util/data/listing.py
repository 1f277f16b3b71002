"""What lies in a folder or in .tar files: images by folder, what is passed over, and classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from util.data.formats import ENDINGS_SHOWN, ending_of, is_hidden, is_image
from util.data.splits import check_no_unclear_split, check_one_split
from util.runtime.errors import UserError
from util.runtime.logs import warn_once

# files that lie beside images and never were some
_DOCUMENTS = frozenset(
    (
        *(".txt", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".toml", ".ini", ".cfg", ".md", ".rst"),
        *(".pth", ".pt", ".ckpt", ".safetensors", ".onnx", ".lock"),  # a run's folder may lie beside the classes
        *(".html", ".htm", ".log", ".pdf", ".doc", ".docx", ".py", ".sh", ".ipynb", ".mat", ".cls", ".names"),
    )
)


@dataclass
class Listing:
    """Files below a root. Folders are paths relative to it, "" is the root itself."""

    images: dict[str, list[Any]] = field(default_factory=dict)  # by the folder that holds them
    others: Counter[str] = field(default_factory=Counter)  # files of other kinds, by ending
    hidden: Counter[str] = field(default_factory=Counter)  # hidden and system files and folders, by name
    lost: dict[str, Counter[str]] = field(default_factory=dict)  # what may have been images, by folder and ending

    def pass_over(self, folder: str, name: str) -> None:
        """Count a file, or a hidden folder, that is no data."""
        ending = ending_of(name)
        if is_hidden(name):
            self.hidden[name] += 1
            may_be_image = is_image(name.lstrip("._"))
        else:
            self.others[ending] += 1
            may_be_image = ending not in _DOCUMENTS and not ending[1:].isdigit()  # events.out.tfevents.N.HOST.PID.0
        if may_be_image:
            self.lost.setdefault(folder, Counter())[ending] += 1

    def keep_below(self, folder: str) -> None:
        """Leave out what is not below a folder."""
        for kind in (self.images, self.lost):
            for other in [each for each in kind if not f"{each}/".startswith(f"{folder}/")]:
                del kind[other]

    def passed_over(self) -> str:
        """Return what was passed over in words, or nothing."""
        parts = []
        if self.hidden:
            names = list(self.hidden)
            shown = ", ".join(names[:3]) + ", ..." * (len(names) > 3)
            parts.append(f"{sum(self.hidden.values())} hidden or system files and folders ({shown})")
        if self.others:
            parts.append(f"{sum(self.others.values())} files of other kinds ({counts_in_words(self.others)})")
        return " and ".join(parts)

    def check(self, flag: str, root: Path, is_split: bool) -> None:
        """Say what is passed over, and refuse what can only be a mistake.

        Args:
            is_split: it is one split, whose folders are classes, whatever they are called.

        Raises:
            UserError: there are no images, several splits, or a class without images.
        """
        passed_over = self.passed_over()
        if not self.images:
            published = "; one in its published form is named by --dataset" * (flag == "--data_path")
            passed_over = f", but {passed_over}" * bool(passed_over)
            raise UserError(f"{flag} {root}: holds no images ({ENDINGS_SHOWN}) at any depth{passed_over}{published}")
        if not is_split:
            check_no_unclear_split(flag, root, self.images)
        check_one_split(flag, root, self.images)
        self.check_lost(flag, root)
        if passed_over:
            warn_once(f"{flag} {root}: {passed_over} are passed over")

    def check_lost(self, flag: str, root: Path) -> None:
        """Refuse a folder without a single image where its siblings have images and it has files that may be images.

        Text, code, weights and logs are no images: the folder of a run may lie beside the classes.
        """
        holding = {parent for folder in self.images for parent in parents_of(folder)}
        depths = {(parent, depth) for folder in self.images for depth, parent in enumerate(parents_of(folder))}
        for folder, endings in sorted(self.lost.items()):
            chain = parents_of(folder)  # itself, the folder around it, ..., the root
            top = next((depth for depth, parent in enumerate(chain) if parent in holding), 0)
            if top and (chain[top], top) in depths:
                raise UserError(
                    f"{flag} {root}: its folder {chain[top - 1]} holds no image that is read, only"
                    f" {counts_in_words(endings)}, and folders beside it do; convert the files or remove the folder"
                )


def parents_of(folder: str) -> list[str]:
    """Return the folder itself, the folder around it, and so on to the root."""
    parts = folder.split("/") if folder else []
    return ["/".join(parts[:depth]) for depth in range(len(parts), -1, -1)]


def counts_in_words(endings: Counter[str]) -> str:
    """Return `.txt 3, .npy 1` for at most five endings."""
    shown = [f"{ending or 'no ending'} {count}" for ending, count in endings.most_common(5)]
    return ", ".join(shown) + ", ..." * (len(endings) > 5)


def class_by_folder(folders: Collection[str]) -> dict[str, str]:
    """Return the class of each folder that holds images: its name.

    Where every folder has the same name, as in class/images/x.jpg of Tiny ImageNet, the name of the folder around it.
    """
    named = {folder: folder for folder in folders}
    while (
        len(named) > 1
        and len({name_of(path) for path in named.values()}) == 1
        and all("/" in path for path in named.values())
    ):
        named = {folder: path.rpartition("/")[0] for folder, path in named.items()}
    return {folder: name_of(path) for folder, path in named.items()}


def name_of(path: str) -> str:
    """Return the last part of a path."""
    return path.rpartition("/")[2]


def number_classes(folders: Sequence[str], classes: list[str] | None = None) -> tuple[list[int], list[str]]:
    """Return labels and class names: as listed, or in the order of torchvision's ImageFolder ("10" before "2")."""
    classes = sorted(set(folders)) if classes is None else classes
    numbers = {name: i for i, name in enumerate(classes)}
    return [numbers[folder] for folder in folders], classes
