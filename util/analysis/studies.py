"""The paper's figures for models side by side: attention maps, Grad-CAM, attention distance, spectrum.

Each study analyses images with every model and returns figures, numbers and text. It writes no files: that is done by
scripts/analyze.py, and the report uses parts of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from models_vit import Pool
from util.analysis import attention as measures
from util.analysis.images import Images, wrap_name
from util.analysis.plots import distance_figure, spectrum_figure
from util.figures.figure import Cell, picture_grid
from util.runtime.errors import UserError
from util.weights.vit import NamedViT, block_number, grid_of, is_classifier, logits_of, num_heads_of, num_prefix_tokens

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CELLS_PER_ROW = 6
POOLED = {"avg": "mean patch tokens", "token": "cls tokens"}
ATTENTION_SCALE = "attention, share of the map's maximum"
ATTENTION_TEXT = (
    "The circle marks the query patch. Brighter patches get more of the query's attention, relative to the maximum of"
    " each map; attention to cls and registers is left out."
)


@dataclass(frozen=True)
class Study:
    """The outcome of one study."""

    title: str
    text: str  # what is shown and how to read it
    figures: dict[str, Figure]  # keys are appended to the file name; the first one is empty
    numbers: dict[str, Any]  # plain types and arrays, for the JSON file
    table: list[list[str]]  # the main numbers; the first row holds the column titles


def labels_of(vits: Sequence[NamedViT]) -> list[str]:
    """Return the models' labels, wrapped to stand above a column."""
    return [wrap_name(vit.label) for vit in vits]


# --------------------------------------------------------------------------------------------------------
# Attention maps (Figures 1, A, B)
# --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class QueryMaps:
    """Attention maps of one model."""

    vit: NamedViT
    block: int
    heads: list[int]
    pictures: np.ndarray  # uint8 [n, H, W, 3]
    maps: np.ndarray  # [n, queries, heads, rows, columns]


def attention_study(
    vits: Sequence[NamedViT], images: Images, queries: Sequence[tuple[int, int]], layer: int, heads: Sequence[int]
) -> Study:
    """Show how query patches attend to all patches, as the mean over heads and head by head.

    Args:
        queries: (row, column) in the first model's grid, empty: its centre. In another grid, the patch at that place.
        layer: block, negative from the end.
        heads: heads to show and to average, empty: all.

    Raises:
        UserError: there is no such block, head or patch.
    """
    rows, columns = grid_of(vits[0].model)
    queries = list(queries) or [(rows // 2, columns // 2)]
    for row, column in queries:
        if not (0 <= row < rows and 0 <= column < columns):
            raise UserError(
                f"--query {row},{column}: outside the {rows} x {columns} patches of {vits[0].label},"
                f" rows 0 to {rows - 1}, columns 0 to {columns - 1}"
            )
    positions = [((row + 0.5) / rows, (column + 0.5) / columns) for row, column in queries]
    blocks = [block_number(vit.model, layer, vit.label) for vit in vits]
    heads_of = [known_heads(vit, heads) for vit in vits]
    attended = [
        attention_of_queries(vit, images, block, own_heads, positions)
        for vit, block, own_heads in zip(vits, blocks, heads_of, strict=True)
    ]
    block_name = f"block {blocks[0]}" if len(set(blocks)) == 1 else f"block {layer}"
    figures = {
        "": mean_attention_figure(attended, images, positions, f"Attention of a patch, {block_name}, mean over heads"),
        "-heads": head_attention_figure(attended, images, positions, f"Attention of a patch, {block_name}, by head"),
    }
    numbers = {
        "queries": [list(query) for query in queries],
        "images": images.shown_names,
        "models": [
            {"label": each.vit.label, "block": each.block, "heads": each.heads, "maps": each.maps} for each in attended
        ],
    }
    return Study("Attention", ATTENTION_TEXT, figures, numbers, [])


def known_heads(vit: NamedViT, heads: Sequence[int]) -> list[int]:
    """Return `heads`, or all heads if empty; raise UserError for a head that the model does not have."""
    h = num_heads_of(vit.model)
    for head in heads:
        if not 0 <= head < h:
            raise UserError(f"--heads {head}: {vit.label} has {h} heads, 0 to {h - 1}")
    return list(heads) or list(range(h))


def attention_of_queries(
    vit: NamedViT, images: Images, block: int, heads: list[int], positions: Sequence[tuple[float, float]]
) -> QueryMaps:
    """Return the attention of the patches at `positions`, which are fractions of height and width."""
    inputs, pictures = images.shown(vit)
    rows, columns = grid_of(vit.model)
    queries = [(int(y * rows), int(x * columns)) for y, x in positions]
    maps = []
    for image in inputs.split(1):  # at 480 pixels the attention of one image and block has 10 M numbers
        attention = measures.attention_maps(vit.model, image, block)
        maps.append([measures.query_maps(vit.model, attention, query)[0, heads].cpu().numpy() for query in queries])
    return QueryMaps(vit, block, heads, pictures, np.array(maps))


def mean_attention_figure(
    attended: Sequence[QueryMaps], images: Images, positions: Sequence[tuple[float, float]], title: str
) -> Figure:
    """Draw a row for each image and query: the query, and each model's attention averaged over heads."""
    pairs = [(i, q) for i in range(len(attended[0].pictures)) for q in range(len(positions))]
    rows = [
        [Cell(attended[0].pictures[i], mark=positions[q])]
        + [Cell(each.pictures[i], each.maps[i, q].mean(axis=0), positions[q]) for each in attended]
        for i, q in pairs
    ]
    column_titles = ["query", *labels_of([each.vit for each in attended])]
    row_titles = [images.title(i) for i, _ in pairs]
    return picture_grid(rows, column_titles, row_titles, title, ATTENTION_TEXT, ATTENTION_SCALE)


def head_attention_figure(
    attended: Sequence[QueryMaps], images: Images, positions: Sequence[tuple[float, float]], title: str
) -> Figure:
    """Draw rows for each image, query and model: the query, and the attention of each head."""
    rows, row_titles = [], []
    for i in range(len(attended[0].pictures)):
        for q, position in enumerate(positions):
            for model, each in enumerate(attended):
                parts = head_rows(each, i, q, position)
                name = wrap_name(each.vit.label)
                rows += parts
                row_titles += [name if model else f"{images.title(i)}\n{name}", *[""] * (len(parts) - 1)]
    return picture_grid(rows, [], row_titles, title, ATTENTION_TEXT, ATTENTION_SCALE)


def head_rows(attended: QueryMaps, image: int, query: int, position: tuple[float, float]) -> list[list[Cell | None]]:
    """Return the query's cell and the maps of all heads in rows of `CELLS_PER_ROW`, each cell with its title."""
    picture = attended.pictures[image]
    cells = [
        Cell(picture, heat, position, f"head {head}")
        for head, heat in zip(attended.heads, attended.maps[image, query], strict=True)
    ]
    parts = [cells[begin : begin + CELLS_PER_ROW] for begin in range(0, len(cells), CELLS_PER_ROW)]
    query_cell = Cell(picture, mark=position, title="query")
    return [[None if number else query_cell, *part] for number, part in enumerate(parts)]


# --------------------------------------------------------------------------------------------------------
# Grad-CAM (Figure 3)
# --------------------------------------------------------------------------------------------------------


def gradcam_study(vits: Sequence[NamedViT], images: Images, layer: int, target: int | None) -> Study:
    """Show Grad-CAM of each image's most likely class, or of class `target`; of an encoder, of its pooled feature.

    Raises:
        UserError: there is no such block or class, or a class is asked of an encoder.
    """
    columns, numbers = [], []
    for vit in vits:
        block = block_number(vit.model, layer, vit.label)
        classifies = is_classifier(vit.model)
        if target is not None and not classifies:
            raise UserError(f"--target_class {target}: {vit.label} is an encoder without classes, leave the flag out")
        score = measures.class_score(vit.model, target) if classifies else measures.feature_score(vit.model)
        inputs, pictures = images.shown(vit)
        maps = torch.cat([measures.grad_cam(vit.model, image, block, score) for image in inputs.split(1)]).cpu().numpy()
        predicted = predicted_classes(vit, inputs, target)
        columns.append([Cell(*cell) for cell in zip(pictures, maps, [None] * len(maps), predicted, strict=True)])
        numbers.append({"label": vit.label, "block": block, "maps": maps, "predicted": predicted})
    text = (
        "Patches whose features raise the score, relative to the maximum of each map. The score of a classifier is the"
        f" logit of {'its most likely class' if target is None else f'class {target}'}; the score of an encoder, which"
        " has no classes, is half the squared length of its mean patch token."
    )
    rows = [[Cell(cells[0].image), *cells] for cells in zip(*columns, strict=True)]
    row_titles = [images.title(i) for i in range(len(rows))]
    scale = "Grad-CAM, share of the map's maximum"
    figure = picture_grid(rows, ["image", *labels_of(vits)], row_titles, "Grad-CAM", text, scale)
    return Study("Grad-CAM", text, {"": figure}, {"images": images.shown_names, "models": numbers}, [])


@torch.no_grad()
def predicted_classes(vit: NamedViT, inputs: Tensor, target: int | None) -> list[str]:
    """Return `class 7, 93 %` of each image for a classifier, empty strings for an encoder."""
    if not is_classifier(vit.model):
        return [""] * len(inputs)
    shares = logits_of(vit.model, inputs).softmax(dim=1).cpu()
    classes = shares.argmax(dim=1) if target is None else torch.full((len(shares),), target)
    return [f"class {k}, {share[k]:.0%}" for k, share in zip(classes.tolist(), shares, strict=True)]


# --------------------------------------------------------------------------------------------------------
# Attention distance (Figure 4a, Eq. 4) and spectrum (Figure 4b)
# --------------------------------------------------------------------------------------------------------


def distance_study(vits: Sequence[NamedViT], images: Images, last_layers: int) -> Study:
    """Measure the attention distance in the last `last_layers` blocks (0: all).

    Raises:
        UserError: a model has fewer blocks.
    """
    distances = []
    for vit in vits:
        depth = len(vit.model.blocks)
        if last_layers > depth:
            raise UserError(f"--last_layers {last_layers}: {vit.label} has {depth} blocks")
        layers = range(depth - last_layers if last_layers else 0, depth)
        batches = images.batches(vit, "attention distance")
        distances.append(measures.attention_distance(vit.model, batches, layers))
    num_images = distances[0].images
    text = (
        f"Mean distance from a patch to the patches it attends to (Eq. 4, per query patch) on {num_images} images."
        " Violin: all images and heads; dots: mean of each head; bar: mean of all. Each side of the image has length 1;"
        " attention to cls and registers counts as distance 0. Dashed: uniform attention."
    )
    blocks = max((distance.layers for distance in distances), key=len)
    if len({distance.layers[-1] for distance in distances}) > 1:  # models of different depth are aligned at their ends
        blocks = range(-len(blocks), 0)
    table = [["mean attention distance", *(f"block {block}" for block in blocks)]]
    for vit, distance in zip(vits, distances, strict=True):
        means = [f"{mean:.4f}" for mean in distance.mean.mean(axis=1)]
        table.append([vit.label, *[""] * (len(blocks) - len(means)), *means])
    models = [
        {"label": vit.label, "layers": d.layers, "mean": d.mean, "std": d.std, "patch_share": d.patch_share}
        for vit, d in zip(vits, distances, strict=True)
    ]
    uniform = measures.patch_distances(grid_of(vits[0].model)).mean().item()
    figure = distance_figure([vit.label for vit in vits], distances, blocks, uniform, text)
    numbers = {"images": num_images, "even": uniform, "models": models}
    return Study("Attention distance", text, {"": figure}, numbers, table)


def spectrum_study(vits: Sequence[NamedViT], images: Images, pool: Pool) -> Study:
    """Compute the singular values of the covariance of pooled features after each block.

    Raises:
        UserError: there are too few images, or there is no cls token to pool.
    """
    for vit in vits:
        check_pool(vit, pool)
    spectra = [measures.feature_spectra(vit.model, images.batches(vit, "spectrum"), pool) for vit in vits]
    text = (
        f"Singular values of the covariance of the {POOLED[pool]} of {len(images.order)} images after each block,"
        " before any further norm. A higher right end means that more directions are in use."
        " Effective rank: exp(entropy) of the spectrum, independent of its scale."
    )
    ranks = [measures.effective_rank(spectrum) for spectrum in spectra]
    depth = max(map(len, ranks))
    table = [["effective rank", *(f"block {layer}" for layer in range(depth))]]
    for vit, rank_of_blocks in zip(vits, ranks, strict=True):
        table.append([vit.label, *(f"{rank:.1f}" for rank in rank_of_blocks), *[""] * (depth - len(rank_of_blocks))])
    models = [
        {"label": vit.label, "singular_values": values, "effective_rank": rank}
        for vit, values, rank in zip(vits, spectra, ranks, strict=True)
    ]
    figure = spectrum_figure([vit.label for vit in vits], spectra, text)
    return Study("Spectrum", text, {"": figure}, {"images": len(images.order), "models": models}, table)


def check_pool(vit: NamedViT, pool: Pool) -> None:
    """Raise UserError if the cls token is pooled and the model has none."""
    if pool == "token" and num_prefix_tokens(vit.model) == 0:
        raise UserError(f"--pool token: {vit.label} has no cls token, use --pool avg")
