"""Robustness of an ImageNet-1k classifier: Table 5 of the paper, its twelve columns, with the paper's rows beside ours.

    python scripts/robustness.py TUNED/checkpoint-99.pth --data_root DATA
    python scripts/robustness.py mae_finetuned_vit_base.pth --imagenet IMAGENET --imagenet_v2 V2 --objectnet OBJECTNET
    torchrun --nproc_per_node=8 scripts/robustness.py timm:deit_base_patch16_224=DEIT.pth --data_root DATA
    python scripts/robustness.py --format markdown --picture table5.png          # only show what has finished

CHECKPOINT is a fine-tuned classifier of ours or MAE's, `timm:NAME=FILE`, or `timm:NAME` with random weights; nothing is
downloaded. Take the last checkpoint: checkpoint-best was chosen on images that IN-1k, IN-Real and Cocc score. Each
finished set is a line of results.jsonl in --output_dir: the same command again evaluates the sets that are missing, and
several models in one folder become rows of one table.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tyro.conf import Positional, arg

from util.config.checks import check, check_choice, check_image_size
from util.config.command_line import parse_config
from util.config.groups import DataConfig
from util.robustness.sets import COLUMNS, IMAGE_SETS, find_sets, plan_tasks
from util.robustness.view import (
    column_titles,
    filled_table,
    paper_table,
    read_lines,
    read_models,
    table_notes,
    text_table,
)
from util.runtime.distributed import Processes, is_main, start_processes, stop_processes
from util.runtime.errors import RunError, UserError, run_main
from util.tables.formats import Style, as_note, print_table
from util.weights.layouts import Weights

if TYPE_CHECKING:
    import torch

    from util.weights.classifiers import NamedClassifier


@dataclass(frozen=True)
class RobustnessConfig:
    """Evaluate a classifier of ImageNet-1k on Table 5's sets."""

    checkpoint: Annotated[Positional[str], arg(metavar="CHECKPOINT")] = ""
    """fine-tuned by main_finetune.py or MAE, `timm:NAME=FILE`, or `timm:NAME` (random weights); without it the table of
    --output_dir is shown"""
    label: str = ""
    """its name in the table; default: its folder and file"""
    weights: Weights | None = None
    """momentum: the EMA weights of a run with --model_ema, the default for such a run"""
    num_heads: int | None = None
    """attention heads; default: as the file or its layout tells"""
    input_size: Annotated[tuple[int, ...], arg(aliases=["--img_size"])] = ()
    """pixels, one number or height and width; default: the model's own"""
    mean: tuple[float, ...] = ()
    """of the pixels, per channel; default: the run's, timm's for `timm:NAME`, else ImageNet's"""
    std: tuple[float, ...] = ()
    """of the pixels, per channel; default: likewise"""

    # images
    data_root: str = ""
    """folder that holds the sets under their usual names; missing sets are shown as –"""
    imagenet: str = ""
    """ImageNet-1k's validation images: class folders by WordNet id, or flat ILSVRC2012_val_*.JPEG; a .tar of either; or
    the folder around val/"""
    imagenet_v2: str = ""
    """folders 0 to 999; the paper does not say which of the three variants, matched-frequency is the usual one"""
    imagenet_a: str = ""
    """200 class folders"""
    imagenet_o: str = ""
    """200 class folders; needs --imagenet too"""
    sketch: str = ""
    """1,000 class folders"""
    imagenet_r: str = ""
    """200 class folders"""
    objectnet: str = ""
    """the published images with their red border, which is cut off; 113 of the 313 folders count"""
    si_size: str = ""
    """SI-Score's object_size: folders by label"""
    si_location: str = ""
    """SI-Score's object_location"""
    si_rotation: str = ""
    """SI-Score's object_rotation"""
    partial: bool = False
    """accept sets that lack classes or images; their numbers are marked"""

    # evaluation
    columns: tuple[str, ...] = ()
    """one or more of in1k v2 real a o sketch r cocc objnet si_size si_loc si_rot; default: all"""
    occlusion: float = 0.5
    """share of each side that the rectangle of Cocc covers (112 of 224 pixels); the paper does not say"""
    occlusion_fill: Literal["mean", "black"] = "mean"
    """mean: zero after normalisation; black: zero before it"""
    batch_size: int = 128
    """images per process and forward pass"""
    num_workers: int | None = None
    """loader workers per rank, 0: none; default: 10, or the number of processors"""
    exif: Literal["ignore", "apply"] = "ignore"
    """EXIF orientation of images: ignore it, or turn the pixels as it says"""
    on_bad_image: Literal["error", "skip"] = "error"
    """error: an unreadable image ends the run; skip: it is left out and counted"""
    loader_timeout: float = 600.0
    """seconds to wait for a batch before the run ends because a loader worker hangs or is dead"""
    amp: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """auto: bf16 where the device computes in it, else fp16 on a GPU, else fp32"""
    device: str = "auto"
    """auto: cuda where there is one, else cpu"""
    dist_backend: str = "auto"
    """auto: nccl on GPUs, gloo on CPU"""

    # output
    output_dir: str = "output/robustness"
    """folder of results.jsonl, one line per finished set; several models may share it"""
    again: bool = False
    """evaluate finished sets again"""
    dry_run: bool = False
    """check the folders and the checkpoint, and print what would be evaluated"""
    format: Style = "text"
    """of the table; text: columns under each other, or a block per row where these would pass 100 columns"""
    picture: str = ""
    """also draw the table into this PNG"""
    examples: int = 6
    """images of each set to draw as the model sees them, into examples-LABEL.png; 0: none"""

    def __post_init__(self) -> None:
        for key in self.columns:
            check_choice("columns", key, list(COLUMNS))
        check_image_size(self.input_size)
        check(all(std > 0 for std in self.std), "std", self.std, "must be above 0")
        check(0 < self.occlusion <= 1, "occlusion", self.occlusion, "must lie in (0, 1]")
        check(self.batch_size >= 1, "batch_size", self.batch_size, "must be 1 or more")
        check(self.examples >= 0, "examples", self.examples, "must be 0 or more")
        check(self.num_heads is None or self.num_heads >= 1, "num_heads", self.num_heads, "must be 1 or more")
        check(not self.picture or self.picture.endswith(".png"), "picture", self.picture, "give the name of a .png")
        _ = self.loading  # runs its checks
        if self.checkpoint and not (self.data_root or self.given):
            flags = " ".join(f"--{flag}" for flag in IMAGE_SETS)
            raise UserError(f"--data_root: is missing, give it or one of {flags}")
        if self.imagenet_o and not (self.imagenet or self.data_root) and "o" in self.wanted:
            raise UserError(f"--imagenet_o {self.imagenet_o}: its inliers are images of ImageNet, add --imagenet")

    @property
    def loading(self) -> DataConfig:
        """Return the settings of reading images."""
        return DataConfig(
            exif=self.exif,
            num_workers=self.num_workers,
            on_bad_image=self.on_bad_image,
            loader_timeout=self.loader_timeout,
        )

    @property
    def given(self) -> dict[str, str]:
        """Return the folders that were given, by flag."""
        return {flag: getattr(self, flag) for flag in IMAGE_SETS if getattr(self, flag)}

    @property
    def wanted(self) -> list[str]:
        """Return the columns to evaluate, in the table's order."""
        return [key for key in COLUMNS if key in (self.columns or COLUMNS)]


def main() -> None:
    """Evaluate the columns that are not finished, then show the table."""
    config = parse_config(RobustnessConfig, sys.argv[1:], Path(__file__).name)
    missing: Mapping[str, str] = {}
    settings: list[dict[str, Any]] = []
    if config.checkpoint:
        processes = start_processes(config.device, config.dist_backend)
        try:
            missing, settings = evaluate(config, processes)
        except KeyboardInterrupt:
            raise RunError("interrupted; finished sets are kept, run the same command to continue") from None
        stop_processes()
    if is_main() and not config.dry_run:
        show(config, missing, settings)


def evaluate(config: RobustnessConfig, processes: Processes) -> tuple[Mapping[str, str], list[dict[str, Any]]]:
    """Evaluate the columns that are not finished. Return why columns are missing, and the settings of the others."""
    from util.robustness import evaluation
    from util.robustness.imagenet import NUM_CLASSES, imagenet_folders
    from util.robustness.scores import PassSettings
    from util.runtime.amp import autocast_dtype, choose_attention
    from util.runtime.files import writable_folder
    from util.weights.classes import class_permutation, reorder_classes
    from util.weights.classifiers import open_classifier

    dtype, folder = autocast_dtype(config.amp, processes.device), Path(config.output_dir)
    pass_settings = PassSettings(
        processes, dtype, config.batch_size, config.loading, config.occlusion, config.occlusion_fill
    )
    classifier = open_classifier(
        config.checkpoint, config.weights, config.label, config.input_size, config.num_heads, processes.device,
        NUM_CLASSES, "CHECKPOINT",
    )  # fmt: skip
    permutation = class_permutation(classifier.class_names, list(imagenet_folders()), f"CHECKPOINT {config.checkpoint}")
    reorder_classes(classifier.model, permutation)
    classifier = with_normalisation(classifier, config, processes.device)
    choose_attention(classifier.model, dtype, processes.device)
    paths = (find_sets(Path(config.data_root)) if config.data_root else {}) | config.given
    absent = "is not given" + (f", nor in {config.data_root} by a usual name" if config.data_root else "")
    tasks, missing = plan_tasks(config.wanted, paths, config.partial, absent)
    pixels = {"mean": config.mean, "std": config.std}
    identity = evaluation.identity_of(classifier, config.checkpoint, config.num_heads, pixels)
    settings = {task.key: evaluation.settings_of(task, identity, paths, pass_settings) for task in tasks}
    lines = read_lines(folder) if folder.is_dir() and not config.again else []
    plan = evaluation.plan_passes(tasks, missing, settings, lines)
    if is_main():
        evaluation.print_plan(classifier, plan)
    if not config.dry_run:
        if is_main():
            writable_folder(folder, "output_dir")  # an error now, rather than after the first pass
            evaluation.record_label(plan, lines, folder)
        evaluation.run_passes(classifier, plan, pass_settings, folder)
        if is_main() and config.examples:
            evaluation.save_examples(classifier, plan.todo, config.examples, pass_settings, folder)
    return missing, list(settings.values())


def with_normalisation(classifier: NamedClassifier, config: RobustnessConfig, device: torch.device) -> NamedClassifier:
    """Return the classifier with --mean and --std, where they are given."""
    from util.data.views import Normalise

    for flag in ("mean", "std"):
        values, chans = getattr(config, flag), classifier.in_chans
        check(len(values) in (0, chans), flag, values, f"give one number for each of {chans} channels")
    mean, std = config.mean or classifier.normalise.mean, config.std or classifier.normalise.std
    return dataclasses.replace(classifier, normalise=Normalise(mean, std, device))


def show(config: RobustnessConfig, missing: Mapping[str, str], settings: Sequence[dict[str, Any]]) -> None:
    """Show the table of all models in --output_dir; numbers with the `settings` of this call come before newer ones."""
    models = read_models(Path(config.output_dir), settings)
    if not models and not config.checkpoint:
        raise UserError(f"--output_dir {config.output_dir}: holds no results yet, give a CHECKPOINT")
    notes = table_notes(models)
    if missing:
        titles = column_titles()
        notes.append(f"missing in this run: {', '.join(titles[key] for key in missing)}")
    print()
    print_table(paper_table().heading, text_table(models), notes, config.format)
    if config.picture:
        from util.tables.pictures import draw_points

        draw_points(filled_table(models), "paper", Path(config.picture))
        print(as_note(f"picture: {config.picture}", config.format))


if __name__ == "__main__":
    run_main(Path(__file__).name, main)
