"""The paper's figures for models side by side: each study looks at images, and returns pictures, numbers and words.

Nothing is written here and nothing is global: scripts/analyze.py writes files, a report may use the parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from models_vit import Pool
from util.analysis import attention as analysis
from util.analysis.images import Images, broken
from util.analysis.plots import distance_figure, map_figure, spectrum_figure
from util.analysis.probe import extract_features
from util.data.labelled import LabelledDataset
from util.figures.figure import BLUE, ORANGE, Cell, picture_grid
from util.figures.pictures import drawable
from util.runtime.errors import UserError
from util.runtime.progress import with_progress
from util.weights.vit import (
    NamedViT,
    block_number,
    grid_of,
    is_classifier,
    logits_of,
    num_heads_of,
    num_prefix_tokens,
    pooled,
    tokens_of,
)

CELLS_PER_ROW = 6
POOLED = {"avg": "mean patch tokens", "token": "cls tokens"}


@dataclass(frozen=True)
class Study:
    """What came out of it."""

    title: str
    text: str  # what is shown and how to read it
    figures: dict[str, Figure]  # by the end of their file's name; the first one's is empty
    numbers: dict[str, Any]  # plain types
    table: list[list[str]]  # the main numbers; its first row are heads


def labels_of(vits: Sequence[NamedViT]) -> list[str]:
    """What the models are called above a column."""
    return [broken(vit.label) for vit in vits]


# --------------------------------------------------------------------------------------------------------
# Attention maps (Figures 1, A, B)
# --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """What one model attends to."""

    vit: NamedViT
    block: int
    heads: list[int]
    pictures: np.ndarray  # uint8 [n, H, W, 3]
    maps: np.ndarray  # [n, queries, heads, rows, columns]


def attention_study(
    vits: Sequence[NamedViT], images: Images, queries: Sequence[tuple[int, int]], layer: int, heads: Sequence[int]
) -> Study:
    """How query patches attend to all patches, as the mean over heads and head by head.

    Args:
        queries: (row, column) in the first model's grid, empty: its centre. In another grid, the patch at that place.
        layer: block, negative from the end.
        heads: those to show and to average, empty: all.

    Raises:
        UserError: no such block, head or patch.
    """
    rows, columns = grid_of(vits[0].model)
    queries = list(queries) or [(rows // 2, columns // 2)]
    for row, column in queries:
        if not (0 <= row < rows and 0 <= column < columns):
            raise UserError(
                f"--query {row},{column}: outside the {rows} x {columns} patches of {vits[0].label},"
                f" rows 0 to {rows - 1}, columns 0 to {columns - 1}"
            )
    places = [((row + 0.5) / rows, (column + 0.5) / columns) for row, column in queries]
    blocks = [block_number(vit.model, layer, vit.label) for vit in vits]
    kept = [known_heads(vit, heads) for vit in vits]
    seen = [look(vit, images, *rest, places) for vit, *rest in zip(vits, blocks, kept, strict=True)]

    text = (
        "The circle marks the query patch. The brighter a patch, the more of the query's attention it gets, relative to"
        " the maximum of each map; what cls and registers get is left out."
    )
    where = f"block {blocks[0]}" if len(set(blocks)) == 1 else f"block {layer}"
    pairs = [(i, q) for i in range(len(seen[0].pictures)) for q in range(len(queries))]
    scale = "attention, share of the map's maximum"
    means = picture_grid(
        [
            [Cell(seen[0].pictures[i], mark=places[q])]
            + [Cell(each.pictures[i], each.maps[i, q].mean(axis=0), places[q]) for each in seen]
            for i, q in pairs
        ],
        ["query", *labels_of(vits)],
        [images.title(i) for i, _ in pairs],
        f"Attention of a patch, {where}, mean over heads",
        text,
        scale,
    )
    lines = []
    for i, q in pairs:
        own = [line for each in seen for line in head_rows(each, i, q, places[q])]
        lines += [(f"{images.title(i)}\n{own[0][0]}", own[0][1]), *own[1:]]
    by_head = picture_grid(
        [cells for _, cells in lines],
        [],
        [name for name, _ in lines],
        f"Attention of a patch, {where}, by head",
        text,
        scale,
    )
    numbers = {
        "queries": [list(query) for query in queries],
        "images": [images.source.name(index) for index in images.order[: images.num_shown]],
        "models": [
            {"label": each.vit.label, "block": each.block, "heads": each.heads, "maps": each.maps} for each in seen
        ],
    }
    return Study("Attention", text, {"": means, "-heads": by_head}, numbers, [])


def known_heads(vit: NamedViT, heads: Sequence[int]) -> list[int]:
    """`heads`, or all where there are none; UserError for one that the model has not."""
    h = num_heads_of(vit.model)
    for head in heads:
        if not 0 <= head < h:
            raise UserError(f"--heads {head}: {vit.label} has {h} heads, 0 to {h - 1}")
    return list(heads) or list(range(h))


def look(vit: NamedViT, images: Images, block: int, heads: list[int], places: Sequence[tuple[float, float]]) -> Seen:
    """Attention from the patches at `places`, which are shares of height and width."""
    inputs, pictures = images.shown(vit)
    rows, columns = grid_of(vit.model)
    queries = [(int(y * rows), int(x * columns)) for y, x in places]
    maps = []
    for image in inputs.split(1):  # at 480 pixels the attention of one image and block has 10 M numbers
        attention = analysis.attention_maps(vit.model, image, block)
        maps.append([analysis.query_maps(vit.model, attention, query)[0, heads].cpu().numpy() for query in queries])
    return Seen(vit, block, heads, pictures, np.array(maps))


def head_rows(seen: Seen, image: int, query: int, place: tuple[float, float]) -> list[tuple[str, list[Cell | None]]]:
    """The query, and the maps of all heads, `CELLS_PER_ROW` in a row; the model's name stands beside the first row."""
    cells = [
        Cell(seen.pictures[image], heat, place, f"head {head}")
        for head, heat in zip(seen.heads, seen.maps[image, query], strict=True)
    ]
    parts = [cells[begin : begin + CELLS_PER_ROW] for begin in range(0, len(cells), CELLS_PER_ROW)]
    asked = Cell(seen.pictures[image], mark=place, title="query")
    return [(broken(seen.vit.label), [asked, *parts[0]]), *(("", [None, *part]) for part in parts[1:])]


# --------------------------------------------------------------------------------------------------------
# Grad-CAM (Figure 3)
# --------------------------------------------------------------------------------------------------------


def gradcam_study(vits: Sequence[NamedViT], images: Images, layer: int, target: int | None) -> Study:
    """Grad-CAM of each image's most likely class, or of class `target`; for an encoder of its own pooled feature.

    Raises:
        UserError: no such block or class, or a class asked of an encoder.
    """
    columns, numbers = [], []
    for vit in vits:
        block = block_number(vit.model, layer, vit.label)
        classifies = is_classifier(vit.model)
        if target is not None and not classifies:
            raise UserError(f"--target_class {target}: {vit.label} is an encoder without classes, leave the flag out")
        score = analysis.class_score(vit.model, target) if classifies else analysis.feature_score(vit.model)
        inputs, pictures = images.shown(vit)
        maps = torch.cat([analysis.grad_cam(vit.model, image, block, score) for image in inputs.split(1)]).cpu().numpy()
        said = predictions(vit, inputs, target)
        columns.append([Cell(*each) for each in zip(pictures, maps, [None] * len(maps), said, strict=True)])
        numbers.append({"label": vit.label, "block": block, "maps": maps, "said": said})
    text = (
        "Patches whose features raise the score, relative to the maximum of each map. The score of a classifier is the"
        f" logit of {'its most likely class' if target is None else f'class {target}'}; that of an encoder, which knows"
        " no classes, is half the squared length of its mean patch token."
    )
    rows = [[Cell(cells[0].image), *cells] for cells in zip(*columns, strict=True)]
    names = [images.title(i) for i in range(len(rows))]
    figure = picture_grid(
        rows, ["image", *labels_of(vits)], names, "Grad-CAM", text, "Grad-CAM, share of the map's maximum"
    )
    shown = [images.source.name(index) for index in images.order[: images.num_shown]]
    return Study("Grad-CAM", text, {"": figure}, {"images": shown, "models": numbers}, [])


@torch.no_grad()
def predictions(vit: NamedViT, inputs: Tensor, target: int | None) -> list[str]:
    """`class 7, 93 %` of each image for a classifier, nothing for an encoder."""
    if not is_classifier(vit.model):
        return [""] * len(inputs)
    shares = logits_of(vit.model, inputs).softmax(dim=1).cpu()
    classes = shares.argmax(dim=1) if target is None else torch.full((len(shares),), target)
    return [f"class {k}, {share[k]:.0%}" for k, share in zip(classes.tolist(), shares, strict=True)]


# --------------------------------------------------------------------------------------------------------
# Attention distance (Figure 4a, Eq. 4) and spectrum (Figure 4b)
# --------------------------------------------------------------------------------------------------------


def distance_study(vits: Sequence[NamedViT], images: Images, last_layers: int) -> Study:
    """Attention distance in the last so many blocks (0: all).

    Raises:
        UserError: a model has fewer blocks.
    """
    found = []
    for vit in vits:
        depth = len(vit.model.blocks)
        if last_layers > depth:
            raise UserError(f"--last_layers {last_layers}: {vit.label} has {depth} blocks")
        layers = range(depth - last_layers if last_layers else 0, depth)
        found.append(analysis.attention_distance(vit.model, images.batches(vit, "attention distance"), layers))
    text = (
        f"Mean distance from a patch to the patches it attends to (Eq. 4, per query patch) on {found[0].images} images."
        " Violin: all images and heads; dots: mean of each head; bar: mean of all. Each side of the image has length 1;"
        " attention to cls and registers counts as distance 0. Dashed: attention that is the same to all patches."
    )
    blocks = max((each.layers for each in found), key=len)
    if len({each.layers[-1] for each in found}) > 1:  # of models of several depths the ends are compared
        blocks = range(-len(blocks), 0)
    table = [["mean attention distance", *(f"block {block}" for block in blocks)]]
    for vit, each in zip(vits, found, strict=True):
        means = [f"{mean:.4f}" for mean in each.mean.mean(axis=1)]
        table.append([vit.label, *[""] * (len(blocks) - len(means)), *means])
    numbers = [
        {"label": vit.label, "layers": each.layers, "mean": each.mean, "std": each.std, "patch_share": each.patch_share}
        for vit, each in zip(vits, found, strict=True)
    ]
    even = analysis.patch_distances(grid_of(vits[0].model)).mean().item()
    figure = distance_figure([vit.label for vit in vits], found, blocks, even, text)
    shown = {"images": found[0].images, "even": even, "models": numbers}
    return Study("Attention distance", text, {"": figure}, shown, table)


def spectrum_study(vits: Sequence[NamedViT], images: Images, pool: Pool) -> Study:
    """Singular values of the covariance of pooled features after each block."""
    for vit in vits:
        check_pool(vit, pool)
    spectra = [analysis.feature_spectra(vit.model, images.batches(vit, "spectrum"), pool) for vit in vits]
    text = (
        f"Singular values of the covariance of the {POOLED[pool]} of {len(images.order)} images after each block, as it"
        " leaves them (not normalised). A higher right end: more directions are in use."
        " Effective rank: exp(entropy) of the spectrum, whatever its scale."
    )
    ranks = [analysis.effective_rank(each) for each in spectra]
    depth = max(map(len, ranks))
    table = [["effective rank", *(f"block {layer}" for layer in range(depth))]]
    for vit, each in zip(vits, ranks, strict=True):
        table.append([vit.label, *(f"{rank:.1f}" for rank in each), *[""] * (depth - len(each))])
    numbers = [
        {"label": vit.label, "singular_values": values, "effective_rank": rank}
        for vit, values, rank in zip(vits, spectra, ranks, strict=True)
    ]
    figure = spectrum_figure([vit.label for vit in vits], spectra, text)
    return Study("Spectrum", text, {"": figure}, {"images": len(images.order), "models": numbers}, table)


def check_pool(vit: NamedViT, pool: Pool) -> None:
    """UserError where a cls token is asked for and there is none."""
    if pool == "token" and num_prefix_tokens(vit.model) == 0:
        raise UserError(f"--pool token: {vit.label} has no cls token, use avg")


# --------------------------------------------------------------------------------------------------------
# Features
# --------------------------------------------------------------------------------------------------------


def features_study(
    vits: Sequence[NamedViT], images: Images, pool: Pool, method: Literal["pca", "tsne"], neighbours: int, seed: int
) -> Study:
    """Pooled features in the plane, patch tokens as colours, and nearest neighbours.

    Raises:
        UserError: too few images for so many neighbours, or no cls token to pool.
    """
    count = len(images.order)
    if count <= neighbours + 1:
        raise UserError(f"--neighbours {neighbours}: needs {neighbours + 2} images or more, there are {count}")
    found = []
    for vit in vits:
        check_pool(vit, pool)
        loader = with_progress(images.loader(vit), f"features, {vit.label}")
        found.append(extract_features(lambda x, vit=vit: encode(vit, vit.images(x), pool), loader))
    labels = found[0][1] if images.labelled else None
    names = [images.class_of(place) for place in range(count)]
    nearest = [analysis.nearest_neighbours(features, neighbours) for features, _ in found]
    maps = [analysis.flat_map(features, method, seed) for features, _ in found]
    models = []
    for vit, (points, shares), near in zip(vits, maps, nearest, strict=True):
        models.append({"label": vit.label, "points": points, "explained_variance": shares, "neighbours": near.numpy()})
        if labels is not None:
            models[-1]["same_class_percent"] = 100 * (labels[near] == labels[:, None]).double().mean().item()
    table = []
    if labels is not None:
        table = [["", f"of the {neighbours} nearest neighbours, same class"]]
        table += [[each["label"], f"{each['same_class_percent']:.1f} %"] for each in models]
    text = (
        f"Features are the {POOLED[pool]} of {count} images after the last norm: in the plane by"
        f" {'their first principal components' if method == 'pca' else 't-SNE'}; patch tokens coloured"
        " by their first three principal components; and nearest neighbours by cosine."
    )
    numbers = {
        "method": method,
        "images": [images.source.name(index) for index in images.order],
        "classes": names if labels is not None else None,
        "models": models,
    }
    drawn = {
        "": plane(vits, maps, labels, images.source.class_names, method, count),
        "-patches": patches(vits, images),
        "-neighbours": neighbour_grid(vits, images, nearest, labels, names),
    }
    return Study("Features", text, drawn, numbers, table)


@torch.no_grad()
def encode(vit: NamedViT, inputs: Tensor, pool: Pool) -> Tensor:
    """Pooled features [B, D]."""
    return pooled(vit.model, tokens_of(vit.model, inputs), pool)


def plane(
    vits: Sequence[NamedViT],
    maps: Sequence[tuple[np.ndarray, list[float] | None]],
    labels: Tensor | None,
    class_names: Sequence[str] | None,
    method: str,
    count: int,
) -> Figure:
    """The maps side by side."""
    axes = [
        (f"component 1, {shares[0]:.0%} of the variance", f"component 2, {shares[1]:.0%}") if shares else ("", "")
        for _, shares in maps
    ]
    how = "principal components" if method == "pca" else "t-SNE; only closeness means something, not distances or axes"
    names = class_names or [str(k) for k in range(1 + int(labels.max()) if labels is not None else 0)]
    caption = f"{count} images, {how}." + (" Colour and name: class." if labels is not None else "")
    classes = None if labels is None else labels.numpy()
    return map_figure([vit.label for vit in vits], [points for points, _ in maps], classes, names, axes, caption)


@torch.no_grad()
def patches(vits: Sequence[NamedViT], images: Images) -> Figure:
    """Each shown image, and beside it its patch tokens as colours, for each model."""
    columns = []
    for vit in vits:
        inputs, pictures = images.shown(vit)
        tokens = torch.cat([tokens_of(vit.model, image) for image in inputs.split(1)])  # [n, N, D]
        coloured = analysis.patch_colours(tokens[:, num_prefix_tokens(vit.model) :])  # [n, L, 3]
        columns = columns or [[Cell(picture) for picture in pictures]]
        columns.append([Cell(each.reshape(*grid_of(vit.model), 3)) for each in coloured])
    rows = list(zip(*columns, strict=True))
    caption = (
        "Patch tokens after the last norm. Red, green and blue are their first three principal components over these"
        " images, for each model its own: like colours are like features, colours cannot be compared between models."
    )
    titles = [images.title(i) for i in range(len(rows))]
    return picture_grid(rows, ["image", *labels_of(vits)], titles, "Patch features as colours", caption)


def neighbour_grid(
    vits: Sequence[NamedViT], images: Images, nearest: Sequence[Tensor], labels: Tensor | None, names: Sequence[str]
) -> Figure:
    """The shown images and their nearest neighbours, a row for each model."""
    count = min(images.num_shown, len(images.order))
    needed = sorted({*range(count), *(int(i) for near in nearest for i in near[:count].flatten())})
    dataset = LabelledDataset(images.source, images.order, vits[0].size, vits[0].in_chans, exif=images.exif)
    pictures = {place: drawable(dataset[place][0] / 255) for place in needed}

    def neighbour(query: int, place: int) -> Cell:
        if labels is None:
            return Cell(pictures[place])
        same = bool(labels[query] == labels[place])
        return Cell(pictures[place], title=names[place], frame=BLUE if same else ORANGE)

    rows, titles = [], []
    for query in range(count):
        for vit, near in zip(vits, nearest, strict=True):
            rows.append([Cell(pictures[query], title=names[query]), *(neighbour(query, int(p)) for p in near[query])])
            titles.append(broken(vit.label))
    heads = ["image", *(f"neighbour {k + 1}" for k in range(nearest[0].shape[1]))]
    caption = "Nearest by the cosine of pooled features."
    caption += " Blue frame: same class, orange: another." if labels is not None else ""
    return picture_grid(rows, heads, titles, "Nearest neighbours", caption, cell_inches=1.0)
