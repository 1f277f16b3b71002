"""Robustness of an ImageNet-1k classifier: Table 5 of the paper, its twelve columns, with the paper's rows beside ours.

    python scripts/robustness.py TUNED/checkpoint-best.pth --data_root DATA
    python scripts/robustness.py mae_finetuned_vit_base.pth --imagenet IMAGENET --imagenet_v2 V2 --objectnet OBJECTNET
    torchrun --nproc_per_node=8 scripts/robustness.py timm:deit_base_patch16_224=DEIT.pth --data_root DATA
    python scripts/robustness.py --format markdown --picture table5.png          # what --output_dir holds already

CHECKPOINT is a fine-tuned classifier of ours or MAE's, `timm:NAME=FILE`, or `timm:NAME` with random weights; nothing is
downloaded. Each finished set is a line of results.jsonl in --output_dir: the same command again goes on with what is
missing, and several models in one folder become rows of one table.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from tyro.conf import Positional, arg

from util.config.command_line import parse_config
from util.config.groups import DataConfig, check, check_choice, check_image_size
from util.data.device_views import Normalise
from util.results.results import append_result, hardware_info
from util.robustness.imagenet import NUM_CLASSES
from util.robustness.scores import Look, examples, in_passes, places_of, scores_of_pass
from util.robustness.sets import COLUMNS, IMAGE_SETS, Task, find_below, flags_of, plan_tasks
from util.robustness.view import (
    STAGE,
    column_titles,
    draw_examples,
    draw_with,
    finished,
    main_metric,
    read_lines,
    read_ours,
    remarks_on,
    render_with,
)
from util.runtime.amp import autocast_dtype, choose_attention
from util.runtime.distributed import Processes, is_main, start_processes, stop_processes
from util.runtime.errors import RunError, UserError, run_main
from util.runtime.files import sha256_of, writable_folder
from util.runtime.logs import format_duration
from util.tables.formats import commented
from util.weights.classifiers import NamedClassifier, open_classifier
from util.weights.interop import Weights
from util.weights.vit import TIMM


@dataclass(frozen=True)
class RobustnessConfig:
    """Evaluate a classifier of ImageNet-1k on Table 5's sets."""

    checkpoint: Annotated[Positional[str], arg(metavar="CHECKPOINT")] = ""
    """fine-tuned by main_finetune.py or MAE, `timm:NAME=FILE`, or `timm:NAME` (random weights); without it: only show
    what --output_dir holds"""
    label: str = ""
    """what to call it in the table; default: its folder and file"""
    weights: Weights | None = None
    """momentum: the moving average of a run with --model_ema, which is the default there"""
    num_heads: int | None = None
    """attention heads; default: of the run's settings, or of the known model of that width"""
    input_size: Annotated[tuple[int, ...], arg(aliases=["--img_size"])] = ()
    """pixels, one number or height and width; default: the model's own"""
    mean: tuple[float, ...] = ()
    """per channel, by which pixels are normalised; default: the run's, timm's for `timm:NAME`, else ImageNet's"""
    std: tuple[float, ...] = ()
    """per channel, likewise"""

    # images
    data_root: str = ""
    """folder that holds the sets under their usual names; those that it lacks are shown as missing"""
    imagenet: str = ""
    """ImageNet-1k's validation images: class folders by WordNet id, or flat ILSVRC2012_val_*.JPEG; .tar of either; or
    the folder whose val/ they are"""
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
    """some of in1k v2 real a o sketch r cocc objnet si_size si_loc si_rot; default: all"""
    occlusion: float = 0.5
    """share of each side that the rectangle of Cocc covers (112 of 224 pixels); the paper does not say"""
    occlusion_fill: Literal["mean", "black"] = "mean"
    """what zeroed means: after normalisation (the mean colour) or before it"""
    batch_size: int = 128
    """images per process and forward pass"""
    num_workers: int | None = None
    """loader processes per rank, 0: none; default: 10, or the processors there are"""
    exif: Literal["ignore", "apply"] = "ignore"
    """EXIF orientation of images: ignore it, or turn the pixels as it says"""
    on_bad_image: Literal["error", "skip"] = "error"
    """an unreadable image stops, or is left out and counted"""
    loader_timeout: float = 600.0
    """seconds to wait for a batch before a hung or dead loader process ends it"""
    amp: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """auto: bf16 where the device computes in it, else fp16 on a GPU, else fp32"""
    device: str = "auto"
    """auto: cuda where there is one, else cpu"""
    dist_backend: str = "auto"
    """auto: nccl on GPUs, gloo on CPU"""

    # output
    output_dir: str = "output/robustness"
    """results.jsonl, one line per finished set; several models may share it"""
    again: bool = False
    """also what has finished already"""
    dry_run: bool = False
    """look at the folders and the checkpoint, and say what would be done"""
    format: Literal["text", "markdown", "latex"] = "text"
    """of the table"""
    picture: str = ""
    """also draw the table into this PNG"""
    examples: int = 6
    """images of each set that are drawn as the model sees them, into examples-LABEL.png; 0: none"""

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
        _ = self.loading  # its own checks
        if self.checkpoint and not (self.data_root or self.given):
            flags = " ".join(f"--{flag}" for flag in IMAGE_SETS)
            raise UserError(f"--data_root: is missing, give it or one of {flags}")
        if self.imagenet_o and not (self.imagenet or self.data_root) and "o" in self.wanted:
            raise UserError(f"--imagenet_o {self.imagenet_o}: is set against ImageNet's images, add --imagenet")

    @property
    def loading(self) -> DataConfig:
        """How images are read."""
        return DataConfig(
            exif=self.exif,
            num_workers=self.num_workers,
            on_bad_image=self.on_bad_image,
            loader_timeout=self.loader_timeout,
        )

    @property
    def given(self) -> dict[str, str]:
        """Folders that were named, by their flags."""
        return {flag: getattr(self, flag) for flag in IMAGE_SETS if getattr(self, flag)}

    @property
    def wanted(self) -> list[str]:
        """Columns, in the table's order."""
        return [key for key in COLUMNS if key in (self.columns or COLUMNS)]


def main() -> None:
    """Open the model and the sets, look at what is not done yet, show the table."""
    config = parse_config(RobustnessConfig, sys.argv[1:], Path(__file__).name)
    missing: dict[str, str] = {}
    settings: list[dict[str, Any]] = []
    if config.checkpoint:
        processes = start_processes(config.device, config.dist_backend)
        try:
            missing, settings = evaluate_all(config, processes)
        except KeyboardInterrupt:
            raise RunError("interrupted; what has finished is kept, the same command goes on") from None
        stop_processes()
    if is_main() and not config.dry_run:
        show(config, missing, settings)


def evaluate_all(config: RobustnessConfig, processes: Processes) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """What is not done yet; why each column that is not there is missing, and the settings of the others."""
    dtype = autocast_dtype(config.amp, processes.device)
    look = Look(processes, dtype, config.batch_size, config.loading, config.occlusion, config.occlusion_fill)
    classifier = open_classifier(
        config.checkpoint, config.weights, config.label, config.input_size, config.num_heads, processes.device,
        NUM_CLASSES, "CHECKPOINT",
    )  # fmt: skip
    classifier = with_given_pixels(classifier, config, processes.device)
    choose_attention(classifier.model, dtype, processes.device)
    paths = (find_below(Path(config.data_root)) if config.data_root else {}) | config.given
    absent = "is not given" + (f", nor in {config.data_root} by a usual name" if config.data_root else "")
    tasks, missing = plan_tasks(config.wanted, paths, config.partial, absent)
    identity = identity_of(config, classifier)
    settings = {task.key: settings_of(task, identity, paths, look) for task in tasks}
    folder = Path(config.output_dir)
    lines = [] if config.again else read_lines(folder)
    done = [task for task in tasks if finished(lines, settings[task.key])]
    passes = in_passes([task for task in tasks if task not in done])
    if is_main():
        announce(classifier, passes, done, missing)
    if not config.dry_run:
        if is_main():
            writable_folder(folder, "output_dir")  # now, rather than after the first pass
            rename([settings[task.key] for task in done], lines, folder)
        run_passes(classifier, passes, look, settings, folder)
        if is_main() and passes and config.examples:
            show_examples(classifier, [task for task in tasks if task not in done], config.examples, look, folder)
    return missing, list(settings.values())


def with_given_pixels(classifier: NamedClassifier, config: RobustnessConfig, device: torch.device) -> NamedClassifier:
    """Normalised by --mean and --std where they are given."""
    for flag in ("mean", "std"):
        given, chans = getattr(config, flag), classifier.in_chans
        check(len(given) in (0, chans), flag, given, f"give one number for each of {chans} channels")
    mean, std = config.mean or classifier.normalise.mean, config.std or classifier.normalise.std
    return dataclasses.replace(classifier, normalise=Normalise(mean, std, device))


def identity_of(config: RobustnessConfig, classifier: NamedClassifier) -> dict[str, Any]:
    """What tells the model from others; of a file the content, since runs write to the same name again.

    Its path is for the reader: a file that has moved is still the same model.
    """
    name = config.checkpoint
    path = name.partition("=")[2] if name.startswith(TIMM) else name
    digest = ""
    if path:
        with open(path, "rb") as file:
            digest = sha256_of(file)
    return {
        "label": classifier.label,
        "checkpoint": name.partition("=")[0] if name.startswith(TIMM) else str(Path(name).resolve()),
        "sha256": digest,
        "weights": classifier.weights,
        "num_heads": config.num_heads,
        "input_size": list(classifier.size),
        **{flag: list(given) for flag in ("mean", "std") if (given := getattr(config, flag))},
    }


def settings_of(task: Task, identity: dict[str, Any], paths: dict[str, str], look: Look) -> dict[str, Any]:
    """All that a column's number depends on, for its line in results.jsonl."""
    return {
        "column": task.key,
        **identity,
        "images": {flag: str(Path(paths[flag]).resolve()) for flag in flags_of(task.key)},
        "num_images": len(task.places),
        "lacking": task.lacking,
        "on_bad_image": look.loading.on_bad_image,
        "amp": str(look.dtype or "fp32").removeprefix("torch."),
        **({"occlusion": look.occlusion, "occlusion_fill": look.fill} if task.occluded else {}),
    }


def announce(
    classifier: NamedClassifier, passes: Sequence[Sequence[Task]], done: Sequence[Task], missing: dict[str, str]
) -> None:
    """What is going to happen."""
    titles = column_titles()
    mean, std = classifier.normalise.mean, classifier.normalise.std
    print(f"{classifier.label}: {classifier.said}; {classifier.size[0]} x {classifier.size[1]} pixels")
    print(f"pixels normalised by mean {' '.join(map(str, mean))} and std {' '.join(map(str, std))}")
    for tasks in passes:
        lacking = f" ({tasks[0].lacking})" if tasks[0].lacking else ""
        print(f"to do: {', '.join(titles[task.key] for task in tasks)}: {len(places_of(tasks))} images{lacking}")
    if done:
        print(f"done before: {', '.join(titles[task.key] for task in done)}")
    for key, why in missing.items():
        print(f"missing: {titles[key]}, {why}")
    sys.stdout.flush()


def rename(done: Sequence[dict[str, Any]], lines: Sequence[dict[str, Any]], folder: Path) -> None:
    """Record once more what has finished under another --label, which then is the model's name."""
    for settings in done:
        before = finished(lines, settings)
        if before["config"]["label"] != settings["label"]:
            append_result(folder, STAGE, settings, before["metrics"], before["seconds"], before.get("made_on", {}))


def run_passes(
    classifier: NamedClassifier,
    passes: Sequence[Sequence[Task]],
    look: Look,
    settings: dict[str, dict[str, Any]],
    folder: Path,
) -> None:
    """Pass after pass; each that is finished is recorded."""
    titles = column_titles()
    sizes = [len(places_of(tasks)) for tasks in passes]
    on = hardware_info(look.processes.device, look.dtype)
    first = time.monotonic()
    for number, tasks in enumerate(passes):
        begin = time.monotonic()
        found = list(scores_of_pass(classifier, tasks, look, ", ".join(titles[task.key] for task in tasks)))
        if not is_main():
            continue
        now = time.monotonic()
        for task, metrics in found:
            append_result(folder, STAGE, settings[task.key], metrics, now - begin, on)
            value = main_metric(task.key, {"metrics": metrics})
            name = "AUPR" if task.key == "o" else "top-1"
            print(f"{titles[task.key]}: {name} {value:.2f} % of {metrics['images']} images", end="")
            print(f", {metrics['bad_images']} could not be read" if metrics["bad_images"] else "", flush=True)
        left = (now - first) / sum(sizes[: number + 1]) * sum(sizes[number + 1 :])
        if left:
            print(f"{number + 1} of {len(passes)} passes, left {format_duration(left)}", flush=True)


def show_examples(classifier: NamedClassifier, tasks: Sequence[Task], number: int, look: Look, folder: Path) -> None:
    """Draw what the model saw: a wrong crop or a missing label map shows at once."""
    rows = {task.key: examples(classifier, task, number, look) for task in tasks}
    rows = {key: found for key, found in rows.items() if found}
    if rows:
        path = folder / f"examples-{re.sub(r'[^A-Za-z0-9_.-]+', '_', classifier.label)}.png"
        draw_examples(rows, classifier.label, path)
        print(f"examples: {path}")


def show(config: RobustnessConfig, missing: dict[str, str], settings: Sequence[dict[str, Any]]) -> None:
    """The table of all models in --output_dir; `settings`: of this call, whose numbers come before newer ones."""
    ours = read_ours(Path(config.output_dir), settings)
    if not ours and not config.checkpoint:
        raise UserError(f"--output_dir {config.output_dir}: holds no results yet, give a CHECKPOINT")
    titles = column_titles()
    lines = ["top-1 accuracy in %, of IN-O AUPR in %; –: not evaluated", *remarks_on(ours)]
    if auroc := [f"{each.label} {each.lines['o']['metrics']['auroc']:.1f}" for each in ours if "o" in each.lines]:
        lines.append(f"AUROC of IN-O, which the paper's numbers look like: {', '.join(auroc)}")
    if missing:
        lines.append(f"missing in this run: {', '.join(titles[key] for key in missing)}")
    print("\n" + render_with(ours, config.format) + "\n")
    for line in lines:
        print(commented(line, config.format))
    if config.picture:
        draw_with(ours, Path(config.picture))
        print(commented(f"picture: {config.picture}", config.format))


if __name__ == "__main__":
    run_main(Path(__file__).name, main)
