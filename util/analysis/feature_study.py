"""Features of models side by side: images in the plane, patch tokens as colours, nearest neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from models_vit import Pool
from util.analysis import attention as measures
from util.analysis.images import Images, wrap_name
from util.analysis.plots import map_figure
from util.analysis.probe import extract_features
from util.analysis.studies import POOLED, Study, check_pool, labels_of
from util.data.labelled import LabelledDataset
from util.figures.figure import BLUE, ORANGE, Cell, picture_grid
from util.figures.pictures import drawable
from util.runtime.errors import UserError
from util.runtime.progress import with_progress
from util.weights.vit import NamedViT, grid_of, num_prefix_tokens, pooled, tokens_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Projection = tuple[np.ndarray, list[float] | None]  # points [N, 2], and for PCA each axis' share of the variance


def features_study(
    vits: Sequence[NamedViT], images: Images, pool: Pool, method: Literal["pca", "tsne"], neighbours: int, seed: int
) -> Study:
    """Show pooled features in the plane, patch tokens as colours, and nearest neighbours.

    Raises:
        UserError: there are too few images for so many neighbours, or there is no cls token to pool.
    """
    count = len(images.order)
    if count <= neighbours + 1:
        raise UserError(f"--neighbours {neighbours}: needs {neighbours + 2} images or more, there are {count}")
    extracted = []
    for vit in vits:
        check_pool(vit, pool)
        loader = with_progress(images.loader(vit), f"features, {vit.label}")
        extracted.append(extract_features(lambda pixels, vit=vit: encode(vit, vit.images(pixels), pool), loader))
    labels = extracted[0][1] if images.labelled else None
    classes = [images.class_of(position) for position in range(count)]
    nearest = [measures.nearest_neighbours(features, neighbours) for features, _ in extracted]
    maps = [measures.project_to_plane(features, method, seed) for features, _ in extracted]
    models = [
        {"label": vit.label, "points": points, "explained_variance": shares, "neighbours": near.numpy()}
        for vit, (points, shares), near in zip(vits, maps, nearest, strict=True)
    ]
    table = []
    if labels is not None:
        for model, near in zip(models, nearest, strict=True):
            model["same_class_percent"] = 100 * (labels[near] == labels[:, None]).double().mean().item()
        table = [["", f"of the {neighbours} nearest neighbours, same class"]]
        table += [[model["label"], f"{model['same_class_percent']:.1f} %"] for model in models]
    numbers = {
        "method": method,
        "images": [images.source.name(index) for index in images.order],
        "classes": classes if labels is not None else None,
        "models": models,
    }
    projection = "their first principal components" if method == "pca" else "t-SNE"
    text = (
        f"Features are the {POOLED[pool]} of {count} images after the last norm: in the plane by {projection}; patch"
        " tokens coloured by their first three principal components; and nearest neighbours by cosine."
    )
    figures = {
        "": plane_figure(vits, maps, labels, images.source.class_names, method),
        "-patches": patch_figure(vits, images),
        "-neighbours": neighbour_figure(vits, images, nearest, labels, classes),
    }
    return Study("Features", text, figures, numbers, table)


@torch.no_grad()
def encode(vit: NamedViT, inputs: Tensor, pool: Pool) -> Tensor:
    """Return pooled features [B, D] of normalised images."""
    return pooled(vit.model, tokens_of(vit.model, inputs), pool)


def plane_figure(
    vits: Sequence[NamedViT],
    maps: Sequence[Projection],
    labels: Tensor | None,
    class_names: Sequence[str] | None,
    method: str,
) -> Figure:
    """Draw the projections of all models side by side."""
    axis_names = [
        (f"component 1, {shares[0]:.0%} of the variance", f"component 2, {shares[1]:.0%}") if shares else ("", "")
        for _, shares in maps
    ]
    by = "principal components" if method == "pca" else "t-SNE; only closeness has a meaning, not distances or axes"
    names = class_names or [str(k) for k in range(1 + int(labels.max()) if labels is not None else 0)]
    caption = f"{len(maps[0][0])} images, {by}." + (" Colour and name: class." if labels is not None else "")
    classes = None if labels is None else labels.numpy()
    points = [points for points, _ in maps]
    return map_figure([vit.label for vit in vits], points, classes, names, axis_names, caption)


@torch.no_grad()
def patch_figure(vits: Sequence[NamedViT], images: Images) -> Figure:
    """Draw each shown image and, for each model, its patch tokens as colours."""
    columns = []
    for vit in vits:
        inputs, pictures = images.shown(vit)
        tokens = torch.cat([tokens_of(vit.model, image) for image in inputs.split(1)])  # [n, N, D]
        colours = measures.patch_colours(tokens[:, num_prefix_tokens(vit.model) :])  # [n, L, 3]
        columns = columns or [[Cell(picture) for picture in pictures]]
        columns.append([Cell(colour.reshape(*grid_of(vit.model), 3)) for colour in colours])
    rows = list(zip(*columns, strict=True))
    caption = (
        "Patch tokens after the last norm. Red, green and blue are their first three principal components over these"
        " images. Similar colours mean similar features; colours cannot be compared between models."
    )
    row_titles = [images.title(i) for i in range(len(rows))]
    return picture_grid(rows, ["image", *labels_of(vits)], row_titles, "Patch features as colours", caption)


def neighbour_figure(
    vits: Sequence[NamedViT], images: Images, nearest: Sequence[Tensor], labels: Tensor | None, classes: Sequence[str]
) -> Figure:
    """Draw the shown images and their nearest neighbours, a row for each model."""
    count = min(images.num_shown, len(images.order))
    needed = sorted({*range(count), *(int(i) for near in nearest for i in near[:count].flatten())})
    dataset = LabelledDataset(images.source, images.order, vits[0].size, vits[0].in_chans, exif=images.exif)
    pictures = {position: drawable(dataset[position][0] / 255) for position in needed}

    def neighbour(query: int, position: int) -> Cell:
        if labels is None:
            return Cell(pictures[position])
        same = bool(labels[query] == labels[position])
        return Cell(pictures[position], title=classes[position], frame=BLUE if same else ORANGE)

    rows, row_titles = [], []
    for query in range(count):
        for vit, near in zip(vits, nearest, strict=True):
            image = Cell(pictures[query], title=classes[query])
            rows.append([image, *(neighbour(query, int(position)) for position in near[query])])
            row_titles.append(wrap_name(vit.label))
    column_titles = ["image", *(f"neighbour {k + 1}" for k in range(nearest[0].shape[1]))]
    caption = "Nearest by the cosine of pooled features."
    caption += " Blue frame: same class, orange: another class." if labels is not None else ""
    return picture_grid(rows, column_titles, row_titles, "Nearest neighbours", caption, cell_inches=1.0)
