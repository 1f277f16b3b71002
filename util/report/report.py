"""A report of runs: one HTML file with curves, pictures, attention maps, the paper's numbers and how to do it again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import yaml
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from util.analysis.images import Images, find_images
from util.analysis.studies import known_heads, look
from util.data.sources import BadImage
from util.figures.figure import heat_over
from util.report import parts as parts
from util.report.page import Embedded, embed, render
from util.report.paper_rows import paper_tables
from util.report.thumbnails import enlarged, film, webp
from util.results.curves import GROUPS, Metric, curves_of, left_out, metrics_of, points_per_curve
from util.results.run_folder import RunFolder
from util.runtime.errors import UserError
from util.tables.tables import PRETRAIN, SEGMENT
from util.weights.vit import NamedViT, block_number, grid_of, open_vit

MOST_BYTES = 10 * 10**6  # of a report; the plotting library is 4.8 MB of it
PICTURE_BYTES = 2_200_000  # of the pictures over the epochs, before base64
ATTENTION_CELLS = 100  # maps in all; where there are more, only those of the mean over heads are shown
ATTENTION_SIDE = 128  # pixels
ATTENTION_IMAGES = 3

# --------------------------------------------------------------------------------------------------------
# Pictures over the epochs
# --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Film:
    """The pictures of one kind that a run has saved."""

    label: str
    name: str
    frames: list[tuple[int, Embedded]]  # by epoch
    said: str  # what was left out
    norm_pix_loss: bool


def films(runs: Sequence[RunFolder]) -> list[Film]:
    """Of every run that has pictures."""
    kinds = [(run, name, pictures) for run in runs for name, pictures in run.pictures.items()]
    found = []
    for run, name, pictures in kinds:
        frames, broken = film(pictures, PICTURE_BYTES // len(kinds))
        said = [f"{len(frames)} of {len(pictures)} pictures are shown."] if len(frames) < len(pictures) else []
        said += [f"Cannot be read: {', '.join(broken)}."] if broken else []
        embedded = [(epoch, embed(data)) for epoch, data in frames]
        found.append(Film(run.label, name, embedded, " ".join(said), bool(run.config.get("norm_pix_loss"))))
    return [each for each in found if each.frames or each.said]


# --------------------------------------------------------------------------------------------------------
# Attention
# --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttentionRow:
    """How the newest checkpoint of a run attends from the query."""

    label: str
    cells: list[tuple[str, Embedded]]


@dataclass(frozen=True)
class AttentionImage:
    """One image, seen by all runs."""

    title: str
    picture: Embedded
    mark: tuple[float, float]  # percent from the top and the left
    rows: list[AttentionRow]


@dataclass(frozen=True)
class Attention:
    """The maps, and what to say of them."""

    images: list[AttentionImage]
    said: list[str]


def attention(runs: Sequence[RunFolder], files: Sequence[str], device: torch.device) -> Attention:
    """Maps of the newest checkpoints, of the query in the middle, in the last block.

    Args:
        files: images to look at; empty: some that the first run validates on.

    Raises:
        UserError: a file that is no image.
    """
    vits, said = open_newest(runs, device)
    if not vits:
        return Attention([], said)
    try:
        images = images_for(runs, files)
        rows, columns = grid_of(vits[0].model)
        place = ((rows // 2 + 0.5) / rows, (columns // 2 + 0.5) / columns)
        seen = [look(vit, images, block_number(vit.model, -1, ""), known_heads(vit, ()), [place]) for vit in vits]
    except (UserError, BadImage, OSError) as error:
        if files:
            raise
        return Attention([], [*said, f"No images to look at, give some with --image: {error}"])
    with_heads = sum(1 + len(each.heads) for each in seen) * len(seen[0].pictures) <= ATTENTION_CELLS
    found = []
    for i, picture in enumerate(seen[0].pictures):
        lines = []
        for vit, each in zip(vits, seen, strict=True):
            maps = {"mean": each.maps[i, 0].mean(axis=0)}
            if with_heads:
                maps |= {f"head {head}": heat for head, heat in zip(each.heads, each.maps[i, 0], strict=True)}
            cells = [(name, small(heat_over(each.pictures[i], heat))) for name, heat in maps.items()]
            lines.append(AttentionRow(vit.label, cells))
        found.append(AttentionImage(images.title(i), small(picture), (100 * place[0], 100 * place[1]), lines))
    return Attention(found, said if with_heads else [*said, "So many runs: only the means over heads are shown."])


def small(picture: Any) -> Embedded:
    """A cell."""
    return embed(webp(enlarged(picture, ATTENTION_SIDE), ATTENTION_SIDE))


def open_newest(runs: Sequence[RunFolder], device: torch.device) -> tuple[list[NamedViT], list[str]]:
    """The encoder (or classifier) of each run that has a checkpoint which can be opened; what to say of the others."""
    vits, said = [], []
    for run in runs:
        path = run.newest_checkpoint
        if path is None:
            said.append(f"{run.label} has no complete checkpoint.")
            continue
        try:
            vits.append(open_vit(str(path), None, f"{run.label}, {path.name}", (), None, device, "checkpoint"))
        except (UserError, OSError) as error:  # a run under way may delete it meanwhile
            said.append(f"{run.label}: {error}.")
    return vits, said


def images_for(runs: Sequence[RunFolder], files: Sequence[str]) -> Images:
    """--image, or some of the first data set that can still be opened; of a segmentation its validation images."""
    if files:
        return find_images(files, "", "", "val", most=len(files), show=len(files), seed=0)
    said: list[str] = []
    for run in (run for run in runs if run.config):
        for path, dataset, split in places_of_images(run):
            try:
                return find_images((), path, dataset, split, most=ATTENTION_IMAGES, show=ATTENTION_IMAGES, seed=0)
            except (UserError, OSError) as error:
                said.append(str(error))
    raise UserError(said[0] if said else "no run tells its data set")


def places_of_images(run: RunFolder) -> list[tuple[str, str, str]]:
    """Where images of a run may be: folder or file, data set and split.

    Of a segmentation, whose folder has masks too, those of validation alone; none where its settings name none.
    """
    known = ("dataset", "data_path", "val_path", "val_images")
    dataset, path, val, val_images = (str(run.config.get(key) or "") for key in known)
    if run.stage != SEGMENT:
        return [(val or path, dataset, "val"), (path, dataset, "train")]
    if val_images:
        return [(val_images, "", "val")]
    return [(str(Path(path) / "images"), "", "val")] if path else []


# --------------------------------------------------------------------------------------------------------
# The page
# --------------------------------------------------------------------------------------------------------


def report(runs: Sequence[RunFolder], title: str, seen: Attention | None) -> str:
    """The HTML.

    Args:
        seen: None: attention was not asked for.

    Raises:
        UserError: it would be larger than MOST_BYTES.
    """
    metrics = metrics_of(runs)
    most = points_per_curve(runs)
    tables, homeless = paper_tables(runs)
    html = render(
        "report.html",
        title=title,
        facts=[f"Made on {datetime.now(timezone.utc):%Y-%m-%d at %H:%M} UTC."],
        cards=[parts.card(run, metrics) for run in runs],
        summary=parts.summary_rows(runs, metrics),
        differing=parts.differing_settings(runs),
        configs=[(run.label, yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)) for run in runs],
        groups=[(group, panels(metrics, group)) for group in GROUPS if panels(metrics, group)],
        thinned=left_out(runs, most),
        no_clock=[run.label for run in runs if run.clock is None],
        no_epochs=[run.label for run in runs if run.updates_per_epoch is None],
        speed=parts.speed_rows(runs),
        films=films(runs),
        without_pictures=[run.label for run in runs if run.stage == PRETRAIN and not run.pictures],
        attention=seen,
        tables=tables,
        homeless=homeless,
        environment=parts.environment_rows(runs),
        commands=[(run.label, parts.commands(run)) for run in runs],
        data={"runs": [curves_of(run, metrics, most) for run in runs]},
        plotly=Markup(get_plotlyjs()),
        footer="Made by scripts/report.py.",
    )
    size = len(html.encode())
    if size > MOST_BYTES:
        raise UserError(f"RUN: {len(runs)} runs make a page of {size / 1e6:.1f} MB, over 10 MB: give fewer at once")
    return html


def panels(metrics: dict[str, Metric], group: str) -> list[tuple[str, Metric]]:
    """The curves of a group."""
    return [(name, metric) for name, metric in metrics.items() if metric.group == group]
