"""Attention maps of a report: how the newest checkpoint of each run attends, all on the same images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from util.analysis.images import Images, find_images
from util.analysis.studies import attention_of_queries, known_heads
from util.data.sources import BadImage
from util.figures.figure import heat_over
from util.report.films import webp
from util.report.page import Embedded, embed
from util.results.run_folder import RunFolder
from util.runtime.errors import UserError
from util.tables.tables import SEGMENT
from util.weights.vit import NamedViT, block_number, grid_of, open_vit

MOST_MAPS = 100  # of a page; with more, only the means over heads are shown
SIDE = 128  # pixels
NUM_IMAGES = 3


@dataclass(frozen=True)
class AttentionRow:
    """The attention from the query in the newest checkpoint of a run."""

    label: str
    cells: list[tuple[str, Embedded]]  # `mean`, `head 0`, ...


@dataclass(frozen=True)
class AttentionImage:
    """One image, with the maps of all runs."""

    title: str
    picture: Embedded
    mark: tuple[float, float]  # percent from the top and the left
    rows: list[AttentionRow]


@dataclass(frozen=True)
class Attention:
    """The maps, and remarks on what is missing."""

    images: list[AttentionImage]
    remarks: list[str]


def attention_maps(runs: Sequence[RunFolder], files: Sequence[str], device: torch.device) -> Attention:
    """Return maps of the newest checkpoints in the last block, for the query in the middle of each image.

    Args:
        files: image files; empty: some images that the first run validates on.

    Raises:
        UserError: one of the files is no image.
    """
    vits, remarks = open_newest(runs, device)
    if not vits:
        return Attention([], remarks)
    try:
        images = images_for(runs, files)
        rows, columns = grid_of(vits[0].model)
        query = ((rows // 2 + 0.5) / rows, (columns // 2 + 0.5) / columns)
        layers = [block_number(vit.model, -1, "") for vit in vits]
        looks = [
            attention_of_queries(vit, images, layer, known_heads(vit, ()), [query])
            for vit, layer in zip(vits, layers, strict=True)
        ]
    except (UserError, BadImage, OSError) as error:
        if files:
            raise
        return Attention([], [*remarks, f"No images to look at, give some with --image: {error}"])
    with_heads = sum(1 + len(each.heads) for each in looks) * len(looks[0].pictures) <= MOST_MAPS
    shown = []
    for i, picture in enumerate(looks[0].pictures):
        lines = []
        for vit, each in zip(vits, looks, strict=True):
            maps = {"mean": each.maps[i, 0].mean(axis=0)}
            if with_heads:
                maps |= {f"head {head}": heat for head, heat in zip(each.heads, each.maps[i, 0], strict=True)}
            cells = [(name, embed_small(heat_over(each.pictures[i], heat))) for name, heat in maps.items()]
            lines.append(AttentionRow(vit.label, cells))
        mark = (100 * query[0], 100 * query[1])
        shown.append(AttentionImage(images.title(i), embed_small(picture), mark, lines))
    return Attention(shown, remarks if with_heads else [*remarks, "So many runs: only means over heads are shown."])


def embed_small(picture: np.ndarray) -> Embedded:
    """Return a picture, uint8 [H, W, 3], of SIDE pixels at most; a small one is enlarged by a whole factor, sharp."""
    factor = max(1, SIDE // max(picture.shape[:2]))
    return embed(webp(picture.repeat(factor, axis=0).repeat(factor, axis=1), SIDE))


def open_newest(runs: Sequence[RunFolder], device: torch.device) -> tuple[list[NamedViT], list[str]]:
    """Return the ViT in each run's newest checkpoint, and remarks on the runs without one that can be opened."""
    vits, remarks = [], []
    for run in runs:
        path = run.newest_checkpoint
        if path is None:
            remarks.append(f"{run.label} has no complete checkpoint.")
            continue
        try:
            vits.append(open_vit(str(path), None, f"{run.label}, {path.name}", (), None, device, "checkpoint"))
        except (UserError, OSError) as error:  # a run that is training may delete it meanwhile
            remarks.append(f"{run.label}: {error}.")
    return vits, remarks


def images_for(runs: Sequence[RunFolder], files: Sequence[str]) -> Images:
    """Return the image files, or some images of the first run's data set that can still be opened.

    Raises:
        UserError: a file is no image, or no data set can be opened.
    """
    if files:
        return find_images(files, "", "", "val", most=len(files), show=len(files), seed=0)
    errors: list[str] = []
    for run in (run for run in runs if run.config):
        for path, dataset, split in image_places(run):
            try:
                return find_images((), path, dataset, split, most=NUM_IMAGES, show=NUM_IMAGES, seed=0)
            except (UserError, OSError) as error:
                errors.append(str(error))
    raise UserError(errors[0] if errors else "no run tells its data set")


def image_places(run: RunFolder) -> list[tuple[str, str, str]]:
    """Return where a run's images may be: (folder or file, data set, split).

    A segmentation's folder has masks too, so only its validation images are taken.
    """
    keys = ("dataset", "data_path", "val_path", "val_images")
    dataset, path, val, val_images = (str(run.config.get(key) or "") for key in keys)
    if run.stage != SEGMENT:
        return [(val or path, dataset, "val"), (path, dataset, "train")]
    if val_images:
        return [(val_images, "", "val")]
    return [(str(Path(path) / "images"), "", "val")] if path else []
