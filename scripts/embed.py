"""Write the features of a data set into files, by any encoder that the project reads.

    python scripts/embed.py RUN/checkpoint-399.pth --data_path IMAGES --output FEATURES
    torchrun --nproc_per_node=8 scripts/embed.py timm:vit_base_patch16_224=FILE --data_path IMAGES --output FEATURES
    python scripts/embed.py RUN/checkpoint-399.pth --data_path IMAGES --output FEATURES --query cat.jpg

FEATURES holds index.csv (file name, label and class of each image) and shards of cls and mean features, with --kinds
also of patches; docs/EVALUATION.md has five lines that read them. An interrupted call resumes with the same command.
--query also draws the images that are nearest to an image.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch.utils.data import IterableDataset
from tyro.conf import Positional, arg

from util.analysis.embedding import (
    Embeddings,
    Kind,
    embed,
    facts_of,
    features_of,
    nearest,
    open_folder,
    pending_shards,
    write_index,
)
from util.analysis.images import image_files
from util.config.checks import check, check_image_size
from util.config.command_line import parse_config
from util.data.datasets import open_images
from util.data.labelled import LabelledDataset
from util.data.sources import ImageSource
from util.runtime.amp import autocast_dtype, name_of
from util.runtime.distributed import barrier, is_main, start_processes, stop_processes
from util.runtime.errors import UserError, run_main
from util.runtime.files import sha256_of, writable_folder
from util.runtime.progress import progress
from util.weights.vit import TIMM, NamedViT, open_vit


@dataclass(frozen=True)
class EmbedConfig:
    """Embed images."""

    checkpoint: Annotated[Positional[str], arg(metavar="CHECKPOINT")]
    """a checkpoint of ours, MAE's, LUT's release or timm's; timm:NAME=FILE; timm:NAME has random weights"""
    data_path: str = ""
    """images as for main_pretrain.py, labelled or not"""
    dataset: str = ""
    """a reader's name as for main_pretrain.py"""
    split: Literal["train", "val"] = "train"
    """of the data set"""
    output: str = "output/embeddings"
    """folder of the shards and the index"""
    weights: Literal["student", "momentum"] = "student"
    """which of the two encoders of the checkpoint"""
    num_heads: int | None = None
    """attention heads; default: of the run's settings, or of the known model of that width"""
    input_size: tuple[int, ...] = ()
    """pixels, one number or height and width; default: the model's own"""
    exif: Literal["ignore", "apply"] = "ignore"
    """the EXIF orientation of images: ignored, as MAE does, or applied"""
    kinds: tuple[Kind, ...] = ("cls", "mean")
    """features to write: cls token, mean of the patch tokens, all patch tokens"""
    dtype: Literal["fp32", "fp16"] = "fp32"
    """numbers of the files"""
    format: Literal["safetensors", "npy"] = "safetensors"
    """one file per shard, or one array per shard and kind"""
    shard_size: int = 4096
    """images per shard; a shard is kept in memory until it is whole"""
    query: tuple[str, ...] = ()
    """image files whose nearest neighbours are drawn into neighbours.png"""
    neighbours: int = 8
    """images drawn for each --query"""
    batch_size: int = 128
    """images per forward pass"""
    num_workers: int = 4
    """data loader workers per process"""
    loader_timeout: float = 600.0
    """seconds to wait for a batch before a hung or dead worker ends it; 0: for ever"""
    amp: Literal["auto", "bf16", "fp16", "fp32"] = "fp32"
    """precision of the forward pass"""
    device: str = "auto"
    """auto: cuda where there is one, else cpu"""

    def __post_init__(self) -> None:
        check(bool(self.kinds), "kinds", "", "give at least one of cls, mean, patch")
        check(len(set(self.kinds)) == len(self.kinds), "kinds", self.kinds, "give each kind once")
        for flag in ("shard_size", "batch_size", "neighbours"):
            check(getattr(self, flag) >= 1, flag, getattr(self, flag), "must be 1 or more")
        check(self.num_workers >= 0, "num_workers", self.num_workers, "must be 0 or more")
        timeout = self.loader_timeout
        check(0 <= timeout < math.inf, "loader_timeout", timeout, "must be 0 (never) or more, and finite")
        check(not self.query or self.kinds != ("patch",), "query", "", "needs cls or mean features, add one to --kinds")
        check_image_size(self.input_size)


def main() -> None:
    """Open the encoder and the images, write the shards of this rank, then the index."""
    config = parse_config(EmbedConfig, sys.argv[1:], Path(__file__).name)
    processes = start_processes(config.device)
    dtype = autocast_dtype(config.amp, processes.device)
    source = open_images(config.data_path, config.dataset, config.split)
    if isinstance(source, IterableDataset):
        raise UserError(f"--dataset {config.dataset}: is a stream, whose images have no numbers; name a data set")
    vit = open_vit(
        config.checkpoint, config.weights, "", config.input_size, config.num_heads, processes.device, "CHECKPOINT"
    )
    folder = writable_folder(config.output, "output")
    facts = facts_of(
        vit,
        config.checkpoint,
        checkpoint_hash(config.checkpoint),
        source,
        kinds=config.kinds,
        dtype=config.dtype,
        format=config.format,
        shard_size=config.shard_size,
        precision=name_of(dtype),
        exif=config.exif,
    )
    if is_main():
        open_folder(folder, facts)
        print(f"{vit.label}: {vit.origin}")
    barrier()
    pending = pending_shards(facts, folder)[processes.rank :: processes.world_size]
    barrier()  # all ranks have listed them before one of them writes
    write_shards(config, vit, source, facts, folder, pending)
    barrier()
    if is_main():
        write_index(folder, source)
        print(f"{facts.images} images in {len(facts.shards)} shards, width {facts.width}: {folder}")
        if config.query:
            print(f"neighbours: {draw_neighbours(config, vit, source, folder)}")
    stop_processes()


def checkpoint_hash(checkpoint: str) -> str:
    """Return the SHA-256 of the checkpoint's file; empty for random weights."""
    path = checkpoint.partition("=")[2] if checkpoint.startswith(TIMM) else checkpoint
    if not path:
        return ""
    with open(path, "rb") as file:
        return sha256_of(file)


def write_shards(
    config: EmbedConfig, vit: NamedViT, source: ImageSource, facts: Embeddings, folder: Path, pending: list[int]
) -> None:
    """Write this rank's shards, with progress and time left on rank 0."""
    batches = embed(
        vit,
        source,
        facts,
        folder,
        pending,
        batch_size=config.batch_size,
        num_workers=config.num_workers,
        loader_timeout=config.loader_timeout,
        dtype=autocast_dtype(config.amp, vit.normalise.shift.device),
        exif=config.exif,
    )
    images = sum(len(facts.shards[shard]) for shard in pending)
    for _ in progress(batches, images, "embedding", "images", size=int) if is_main() else batches:
        pass


def draw_neighbours(config: EmbedConfig, vit: NamedViT, source: ImageSource, folder: Path) -> Path:
    """Draw the images nearest to each --query, by cosine, and return the picture's path."""
    from util.figures.figure import Cell, picture_grid, save_figure
    from util.figures.pictures import drawable

    kind: Kind = "mean" if "mean" in config.kinds else "cls"
    queries = image_files(config.query)
    query_pixels = pixels_of(queries, vit, range(len(queries)))
    rows, cosines = nearest(folder, kind, features_of(vit, query_pixels, [kind], None)[kind], config.neighbours)
    cells = []
    for query, numbers, values in zip(query_pixels, rows.tolist(), cosines.tolist(), strict=True):
        images = pixels_of(source, vit, numbers)
        line = [Cell(drawable(query / 255))]
        line += [Cell(drawable(image / 255), title=f"{value:.2f}") for image, value in zip(images, values, strict=True)]
        cells.append(line)
    heads = ["query", *(f"{k + 1}" for k in range(rows.shape[1]))]
    title, caption = f"Nearest neighbours, {vit.label}", f"Numbers are cosines of {kind} features."
    figure = picture_grid(cells, heads, [""] * len(cells), title, caption)
    path = folder / "neighbours.png"
    save_figure(figure, path)
    return path


def pixels_of(source: ImageSource, vit: NamedViT, rows: range | list[int]) -> torch.Tensor:
    """Return centre views of some images, uint8 [n, C, H, W]."""
    dataset = LabelledDataset(source, np.asarray(rows).tolist(), vit.size, vit.in_chans)
    return torch.stack([dataset[place][0] for place in range(len(dataset))])


if __name__ == "__main__":
    run_main(Path(__file__).name, main)
