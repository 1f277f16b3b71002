"""A segmenter's run: its data looked at, training, evaluation, pictures."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch

from engine_segment import SegmenterTrainer, SegmentScores, evaluate, predicted_classes
from models_upernet import UperNet
from util import evaluation
from util.data import MUST_BE_READ
from util.distributed import Processes, is_main, sum_over_ranks
from util.errors import UserError
from util.evaluation import (
    Evaluation,
    Prepared,
    evaluation_loader,
    share_of_images,
    show_plan,
    train_and_evaluate,
    write_per_class,
)
from util.figures import save_figure
from util.joint_views import resized_image, scaled_size
from util.logs import RunLog
from util.pictures import drawable
from util.progress import progress
from util.run import resumes
from util.segment_config import SegmentConfig
from util.segment_data import MaskedImages, WholeImages, count_pixels, load_pair, open_masked, train_dataset
from util.segment_masks import IGNORED, MaskedSource
from util.segment_pictures import Predicted, as_array, segmentation_figure


def prepare(config: SegmentConfig) -> Prepared:
    """Processes, precision, data and batches of a run; every UserError that they may hold."""
    return evaluation.prepare(config, open_checked)


def open_checked(config: SegmentConfig, processes: Processes) -> MaskedImages:
    """The images and masks of the settings, looked at where the run is a fresh one and --check_data asks for it."""
    data = open_masked(config)
    if config.check_data and not config.eval and not resumes(config):  # an earlier run has looked at the data
        for split, source in (("training", data.train), ("validation", data.val)):
            look_at(source, split, config, processes)
    return data


def look_at(source: MaskedSource, split: str, config: SegmentConfig, processes: Processes) -> None:
    """Read every mask of a split, each rank its share, and say what the split holds.

    Raises:
        UserError: something is wrong with a mask, or all pixels are ignored.
    """
    counts = count_pixels(source, config, split, share_of_images(len(source), processes, dist_eval=True))
    counts = sum_over_ranks(torch.from_numpy(counts).to(processes.device)).tolist()
    names, total = source.classes.names, sum(counts)
    if counts[IGNORED] == total:
        raise UserError(f"{source.masks[0]}, ...: all pixels of the {split} masks are ignored, see --ignore_index")
    absent = [name for name, count in zip(names, counts, strict=False) if count == 0]
    shown = f"; without {', '.join(absent[:6])}{', ...' * (len(absent) > 6)}" if absent else ""
    if is_main():
        have = f"{len(names) - len(absent)} of {len(names)} classes"
        print(f"{split}: {len(source)} masks, {have}{shown}; {100 * counts[IGNORED] / total:.1f} % ignored", flush=True)


def train_segmenter(trainer: SegmenterTrainer, prepared: Prepared, said: str) -> SegmentScores | None:
    """The whole run of a segmenter that has been built: resume, updates, evaluations, result; or --eval alone.

    Args:
        said: where the weights came from, for the log.
    """
    config, data = prepared.config, prepared.data
    make_dataset = partial(train_dataset, config, data.train)
    if config.dry_run:
        training = 0 if data.train is None else len(data.train)
        images = f"{training} training, {len(data.val)} validation, {data.num_classes} classes"
        show_plan(trainer, images, prepared.order, make_dataset if training else None)
        return None
    make_evaluation = partial(SegmentEvaluation, trainer, data, prepared.processes)
    return train_and_evaluate(trainer, prepared, make_dataset, make_evaluation, "segment", said)


class SegmentEvaluation(Evaluation):
    """Mean intersection over union on the validation images, and pictures of some of them."""

    metric = "miou"

    def __init__(self, trainer: SegmenterTrainer, data: MaskedImages, processes: Processes):
        super().__init__(trainer)
        config: SegmentConfig = trainer.config
        self.data = data
        indices = share_of_images(len(data.val), processes, config.dist_eval)
        dataset = WholeImages(data.val, indices, config.image_size, config.in_chans)
        self.loader = evaluation_loader(dataset, trainer, batch_size=None)
        self.shown: list[Predicted] = []  # of the latest evaluation

    def evaluate(self) -> SegmentScores:
        """Of the segmenter; the same on all ranks."""
        trainer = self.trainer
        # ranks have different numbers of windows: none may wait for the others' weights
        model = trainer.state.unsharded(trainer.state.model, trainer.device)
        how = (trainer.normalise, trainer.config, trainer.device, trainer.autocast())
        loader = progress(self.loader, len(self.loader), "evaluating", "images") if is_main() else self.loader
        scores = evaluate(model, loader, self.data.num_classes, *how)
        if is_main():
            self.shown = [self.predicted(model, index) for index in self.chosen]
        return scores

    @property
    def chosen(self) -> list[int]:
        """The validation images that are drawn, spread evenly over all of them."""
        number = min(self.trainer.config.pictures, len(self.data.val))
        return np.linspace(0, len(self.data.val) - 1, number).round().astype(int).tolist()

    def predicted(self, model: UperNet, index: int) -> Predicted:
        """A validation image with truth and prediction."""
        trainer, val = self.trainer, self.data.val
        image, mask, _ = load_pair(val, index, trainer.config.in_chans, skip_bad=False, fix=MUST_BE_READ)
        seen = resized_image(image, scaled_size(tuple(mask.shape), trainer.config.image_size))
        how = (trainer.normalise, trainer.config, trainer.device, trainer.autocast())
        said = predicted_classes(model, seen, tuple(mask.shape), *how).cpu().to(torch.uint8)
        return Predicted(Path(val.name(index)).name, drawable(image / 255), mask.numpy(), said.numpy())

    def describe(self, scores: SegmentScores) -> str:
        """The scores in one line."""
        miou, aacc, macc = scores.values.values()
        return f"mIoU {miou:.2f} %, aAcc {aacc:.2f} %, mAcc {macc:.2f} % on {scores.images} images"

    def draw(self, title: str, name: str, log: RunLog | None) -> None:
        """pictures/segmentation-NAME.png."""
        if not self.shown:
            return
        figure = segmentation_figure(self.shown, self.data.val.classes.names, title)
        save_figure(figure, Path(self.trainer.config.output_dir) / "pictures" / f"segmentation-{name}.png")
        if log is not None:
            log.image(self.trainer.state.updates, "segmentation", as_array(figure))

    def write_classes(self, scores: SegmentScores) -> str:
        """IoU and accuracy per class and the confusion matrix, drawn in % of the true class."""
        confusion = scores.confusion.numpy()
        pixels = confusion.sum(axis=1)
        rows = [
            {"class": name, "pixels": int(number), "iou": rounded(iou), "accuracy": rounded(accuracy)}
            for name, number, iou, accuracy in zip(
                self.data.val.classes.names, pixels, scores.iou.tolist(), scores.accuracy.tolist(), strict=True
            )
        ]
        percent = (100 * confusion / np.maximum(pixels[:, None], 1)).round().astype(int)
        return write_per_class(self.trainer.config.output_dir, rows, confusion, percent)


def rounded(percent: float) -> float | None:
    """For JSON, which knows no nan."""
    return None if percent != percent else round(percent, 4)
