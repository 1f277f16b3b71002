"""Attention and features of any checkpoints side by side: the figures of the paper.

    python scripts/analyze.py attention --checkpoint MAE.pth LUT.pth --image cat.jpg --query 7,7 --input_size 480
    python scripts/analyze.py gradcam   --checkpoint TUNED/checkpoint-best.pth --image cat.jpg dog.jpg
    python scripts/analyze.py distance  --checkpoint MAE.pth LUT.pth --data_path IMAGENET --most_images 50000
    python scripts/analyze.py spectrum  --checkpoint MAE.pth LUT.pth --data_path IMAGENET --most_images 50000
    python scripts/analyze.py features  --checkpoint MAE.pth LUT.pth --data_path IMAGENET --method tsne
    python scripts/analyze.py compare   --checkpoint MAE.pth LUT.pth --data_path IMAGENET

A checkpoint is a file of ours (--weights momentum: its momentum encoder), of MAE, LUT's release or timm, a fine-tuned
classifier or linear probe, `timm:NAME` (random weights) or `timm:NAME=FILE`. Pictures (.png) and numbers (.json) go to
--output_dir; compare runs all commands and writes one page (.html). `analyze.py COMMAND --help` lists the flags.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from tyro.conf import arg

from models_vit import Pool
from util.analysis.feature_study import features_study
from util.analysis.images import find_images
from util.analysis.studies import (
    Images,
    Study,
    attention_study,
    distance_study,
    gradcam_study,
    spectrum_study,
)
from util.config.checks import check, check_image_size
from util.config.command_line import parse_config
from util.config.groups import as_dict
from util.figures.figure import save_figure
from util.runtime.distributed import choose_device
from util.runtime.errors import UserError, nearest, run_main
from util.runtime.files import write_durably
from util.runtime.logs import aligned
from util.weights.layouts import Weights
from util.weights.vit import NamedViT, open_vit

# --------------------------------------------------------------------------------------------------------
# Settings
# --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AnalyzeConfig:
    """Settings that all commands share: models, images, output."""

    checkpoint: tuple[str, ...]
    """one or more: a file of ours, MAE's, LUT's release or timm's, `timm:NAME` (random weights), `timm:NAME=FILE`"""
    label: tuple[str, ...] = ()
    """a name for each checkpoint; default: its folder and number"""
    weights: tuple[Weights, ...] = ()
    """student or momentum encoder, one value for all checkpoints or one for each; default: student, or the moving
    average (momentum) of a classifier trained with --model_ema"""
    num_heads: tuple[int, ...] = ()
    """attention heads: one number for all checkpoints, or one for each; default: as each file or its layout tells"""
    input_size: Annotated[tuple[int, ...], arg(aliases=["--img_size"])] = ()
    """pixels, one number or height and width (224, 480); default: the model's own. Positions are resampled"""
    image: tuple[str, ...] = ()
    """image files to analyse, instead of a data set"""
    data_path: str = ""
    """images as for main_pretrain.py, labelled or not"""
    dataset: str = ""
    """a reader's name as for main_pretrain.py; default without --image and --data_path: digits"""
    exif: Literal["ignore", "apply"] = "ignore"
    """EXIF orientation of images: ignore it, or turn the pixels as it says"""
    split: Literal["train", "val"] = "val"
    """split of the data set"""
    most_images: int = 5000
    """most images of the data set that are analysed, drawn with --seed"""
    show: int = 4
    """number of them in pictures of images; --image shows all"""
    batch_size: int = 32
    """images per forward pass"""
    num_workers: int = 0
    """data loader workers"""
    seed: int = 0
    """seed of the choice of images and of t-SNE"""
    device: str = "auto"
    """auto: cuda where there is one, else cpu"""
    output_dir: str = "output/analysis"
    """folder for pictures and numbers"""

    def __post_init__(self) -> None:
        count = len(self.checkpoint)
        check(count >= 1, "checkpoint", "", "give at least one")
        check(len(self.label) in (0, count), "label", self.label, f"give one for each of {count} checkpoints, or none")
        fix = f"give one for all, or one for each of {count} checkpoints"
        check(len(self.weights) in (0, 1, count), "weights", self.weights, fix)
        check(len(self.num_heads) in (0, 1, count), "num_heads", self.num_heads, fix)
        check_image_size(self.input_size)
        check(
            not (self.image and (self.data_path or self.dataset)),
            "image",
            self.image,
            "give it or a data set, not both",
        )
        for flag in ("most_images", "show", "batch_size"):
            check(getattr(self, flag) >= 1, flag, getattr(self, flag), "must be 1 or more")
        check(self.num_workers >= 0, "num_workers", self.num_workers, "must be 0 or more")
        check(0 <= self.seed < 2**32, "seed", self.seed, "must lie in 0..2^32 - 1")


@dataclass(frozen=True)
class AttentionConfig(AnalyzeConfig):
    """Attention of query patches, as the mean over heads and head by head (Figures 1, A, B)."""

    query: tuple[str, ...] = ()
    """row,col of patches, counted from 0 in the grid of the first checkpoint; default: the centre"""
    layer: int = -1
    """block, counted from 0, or from the end if negative"""
    heads: tuple[int, ...] = ()
    """heads to show and to average, counted from 0; default: all"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for query in self.query:
            numbers = query.split(",")
            check(len(numbers) == 2 and all(n.isdecimal() for n in numbers), "query", query, "give row,col as 7,7")

    @property
    def queries(self) -> list[tuple[int, int]]:
        """The values of --query as numbers."""
        return [(int(row), int(column)) for row, column in (query.split(",") for query in self.query)]

    def study(self, vits: list[NamedViT], images: Images) -> Study:
        """Return the study of these models and images."""
        return attention_study(vits, images, self.queries, self.layer, self.heads)


@dataclass(frozen=True)
class GradcamConfig(AnalyzeConfig):
    """Grad-CAM: the patches that raise a class score, or an encoder's feature (Figure 3)."""

    layer: int = -1
    """block whose attention reads the tokens, counted from 0, or from the end if negative"""
    target_class: int | None = None
    """class whose score is explained; default: the most likely class of each image"""

    def study(self, vits: list[NamedViT], images: Images) -> Study:
        """Return the study of these models and images."""
        return gradcam_study(vits, images, self.layer, self.target_class)


@dataclass(frozen=True)
class DistanceConfig(AnalyzeConfig):
    """Distance of attention for each head and layer, over a data set (Figure 4a, Eq. 4)."""

    last_layers: int = 3
    """number of blocks, counted from the end; 0: all"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.last_layers >= 0, "last_layers", self.last_layers, "must be 0 (all) or more")

    def study(self, vits: list[NamedViT], images: Images) -> Study:
        """Return the study of these models and images."""
        return distance_study(vits, images, self.last_layers)


@dataclass(frozen=True)
class SpectrumConfig(AnalyzeConfig):
    """Singular values of the features' covariance in each layer, and the difference of two models (Figure 4b)."""

    pool: Pool = "avg"
    """an image's feature: mean of the patch tokens, or the cls token"""

    def study(self, vits: list[NamedViT], images: Images) -> Study:
        """Return the study of these models and images."""
        return spectrum_study(vits, images, self.pool)


@dataclass(frozen=True)
class FeaturesConfig(AnalyzeConfig):
    """Features in the plane, patch tokens as colours, nearest neighbours."""

    pool: Pool = "avg"
    """an image's feature: mean of the patch tokens, or the cls token"""
    method: Literal["pca", "tsne"] = "pca"
    """projection of features to the plane"""
    neighbours: int = 5
    """number of nearest neighbours"""
    map_images: int = 2000
    """most images in the plane and among the neighbours"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for flag in ("neighbours", "map_images"):
            check(getattr(self, flag) >= 1, flag, getattr(self, flag), "must be 1 or more")

    def study(self, vits: list[NamedViT], images: Images) -> Study:
        """Return the study of these models and images."""
        images = replace(images, order=images.order[: self.map_images])
        return features_study(vits, images, self.pool, self.method, self.neighbours, self.seed)


@dataclass(frozen=True)
class CompareConfig(AttentionConfig, GradcamConfig, DistanceConfig, SpectrumConfig, FeaturesConfig):
    """All commands for two checkpoints, and a page with everything."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(len(self.checkpoint) == 2, "checkpoint", self.checkpoint, "compare takes two")
        check(not self.image, "image", self.image, "compare analyses a data set, give --data_path or --dataset")


COMMANDS: dict[str, type[AnalyzeConfig]] = {
    "attention": AttentionConfig,
    "gradcam": GradcamConfig,
    "distance": DistanceConfig,
    "spectrum": SpectrumConfig,
    "features": FeaturesConfig,
    "compare": CompareConfig,
}

# --------------------------------------------------------------------------------------------------------
# The script
# --------------------------------------------------------------------------------------------------------


def main() -> None:
    """Run one command, or all commands and a page of them for compare."""
    command, flags = (sys.argv[1:2] or ["--help"])[0], sys.argv[2:]
    if command in ("-h", "--help"):
        print(__doc__)
        return
    if command not in COMMANDS:
        raise UserError(f"COMMAND {command}: unknown{nearest(command, COMMANDS)} (one of {', '.join(COMMANDS)})")
    config = parse_config(COMMANDS[command], flags, f"{Path(__file__).name} {command}")
    images = find_images(
        config.image, config.data_path, config.dataset, config.split, most=config.most_images, show=config.show,
        seed=config.seed, batch_size=config.batch_size, num_workers=config.num_workers, exif=config.exif,
    )  # fmt: skip
    vits = open_models(config)
    folder = Path(config.output_dir)
    names = [name for name in COMMANDS if name != "compare"] if command == "compare" else [command]
    studies: list[tuple[Study, list[Path]]] = []
    missing = []
    for name in names:
        try:
            study = COMMANDS[name].study(config, vits, images)
        except UserError as error:
            if command != "compare":
                raise
            missing.append(f"{name} is left out: {error}")
            print(missing[-1], flush=True)
            continue
        studies.append((study, write(study, folder, name, config, vits)))
    if command == "compare":
        data = config.dataset or config.data_path or "digits"
        facts = [
            *(f"{vit.label}: {vit.origin}" for vit in vits),
            f"Data: {len(images.order)} images of {data}",
            *missing,
        ]
        write_page(" and ".join(vit.label for vit in vits), facts, studies, folder / "compare.html")


def open_models(config: AnalyzeConfig) -> list[NamedViT]:
    """Open every checkpoint and print what became of its tensors."""
    device, count = choose_device(config.device), len(config.checkpoint)
    weights = config.weights * count if len(config.weights) == 1 else config.weights or (None,) * count
    labels = config.label or ("",) * count
    heads = config.num_heads * count if len(config.num_heads) == 1 else config.num_heads or (None,) * count
    vits = []
    for name, which, label, number in zip(config.checkpoint, weights, labels, heads, strict=True):
        vits.append(open_vit(name, which, label, config.input_size, number, device))
        print(f"{vits[-1].label}: {vits[-1].origin}", flush=True)
    return vits


def write(study: Study, folder: Path, name: str, config: AnalyzeConfig, vits: list[NamedViT]) -> list[Path]:
    """Write NAME*.png and NAME.json, print the main numbers, and return the paths of the pictures."""
    pictures = [folder / f"{name}{ending}.png" for ending in study.figures]
    try:
        for path, figure in zip(pictures, study.figures.values(), strict=True):
            save_figure(figure, path)
        models = [{"label": vit.label, "input_size": list(vit.size), "weights": vit.origin} for vit in vits]
        numbers = {"command": name, "config": as_dict(config), "opened": models, **study.numbers}
        text = json.dumps(numbers, default=plain, allow_nan=False) + "\n"
        write_durably(folder / f"{name}.json", lambda file: file.write(text.encode()))
    except OSError as error:
        raise not_writable(folder, error) from error
    print(aligned(study.table))
    print(f"{study.title}: {', '.join(map(str, pictures))}, {name}.json", flush=True)
    return pictures


def plain(value: Any) -> Any:
    """Convert for JSON: arrays become lists, numbers keep seven significant digits."""
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        digits = np.vectorize(lambda x: float(f"{x:.7g}"), otypes=[float])
        return digits(value).tolist()
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else list(value)


def write_page(title: str, facts: list[str], studies: list[tuple[Study, list[Path]]], path: Path) -> None:
    """Write the studies and their pictures as one HTML file."""
    from util.report.page import Section, page

    sections = [Section(s.title, s.text, [p.read_bytes() for p in pictures], s.table) for s, pictures in studies]
    html = page(title, facts, sections, "Made by scripts/analyze.py compare.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, lambda file: file.write(html.encode()))
    except OSError as error:
        raise not_writable(path.parent, error) from error
    print(f"page: {path} ({path.stat().st_size / 2**20:.1f} MB)")


def not_writable(folder: Path, error: OSError) -> UserError:
    """Return the error for an output folder that cannot be written."""
    return UserError(f"--output_dir {folder}: cannot be written ({error.strerror or error})")


if __name__ == "__main__":
    run_main(Path(__file__).name, main)
