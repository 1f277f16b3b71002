"""Features of a whole data set in files: shards of cls, mean and patch features, an index, and a search among them.

A folder of embeddings holds `embeddings.json` (how they were made), `index.csv` (file name, label and class of each
image, in the order of the features) and shards of `shard_size` images, `shard-00000.safetensors`, or with format npy
one array per kind, `shard-00000-mean.npy`. A shard is written whole or not at all and follows from the settings alone,
so that an interrupted call resumes after its last shard, and several processes share the shards.

Letters: n images of a shard, L patches, D width.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from util.data.formats import Exif
from util.data.labelled import LabelledDataset
from util.data.loader import Loader
from util.data.sources import ImageSource
from util.runtime.errors import UserError
from util.runtime.files import write_durably
from util.weights.vit import NamedViT, grid_of, num_prefix_tokens, tokens_of

Kind = Literal["cls", "mean", "patch"]
FACTS_FILE, INDEX_FILE = "embeddings.json", "index.csv"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True)
class Embeddings:
    """The facts of a folder of embeddings. Two calls with equal facts write equal bytes."""

    checkpoint: str
    sha256: str  # of the checkpoint; empty for random weights
    weights: str  # student or momentum
    images: int
    names_sha256: str  # of the images' names, in their order
    input_size: tuple[int, int]  # pixels
    width: int  # D
    grid: tuple[int, int]  # rows and columns of patches
    kinds: tuple[Kind, ...]
    dtype: Literal["fp32", "fp16"]
    format: Literal["safetensors", "npy"]
    shard_size: int
    precision: str  # of the forward pass
    exif: Exif = "ignore"  # what was done with the orientation of images

    @property
    def shards(self) -> list[range]:
        """The images of each shard."""
        starts = range(0, self.images, self.shard_size)
        return [range(start, min(start + self.shard_size, self.images)) for start in starts]

    def files(self, folder: Path, shard: int) -> list[Path]:
        """Return the paths of a shard's files."""
        stem = f"shard-{shard:05d}"
        if self.format == "safetensors":
            return [folder / f"{stem}.safetensors"]
        return [folder / f"{stem}-{kind}.npy" for kind in self.kinds]


def names_digest(source: ImageSource) -> str:
    """Return the SHA-256 of all names of a source."""
    digest = hashlib.sha256()
    for index in range(len(source)):
        digest.update(source.name(index).encode(errors="surrogateescape") + b"\0")
    return digest.hexdigest()


def open_folder(folder: Path, facts: Embeddings) -> None:
    """Begin a folder of embeddings, or check that a call that was interrupted had the same settings.

    Raises:
        UserError: the folder holds embeddings with other settings, named with both values.
    """
    path = folder / FACTS_FILE
    new = json.loads(json.dumps(asdict(facts)))
    if path.exists():
        old = read_facts(folder)
        for name, value in new.items():
            if old.get(name) != value:
                raise UserError(
                    f"--output {folder}: holds embeddings with {name} {old.get(name)}, here it is {value};"
                    " make them equal, or choose another folder"
                )
        return
    write_durably(path, lambda file: file.write((json.dumps(new, indent=1) + "\n").encode()))


def read_facts(folder: Path) -> dict[str, Any]:
    """Read `embeddings.json`.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        facts = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: holds no embeddings ({FACTS_FILE} cannot be read: {error})") from error
    if not isinstance(facts, dict):
        raise UserError(f"{folder}: holds no embeddings ({FACTS_FILE} is no mapping)")
    return facts


def write_index(folder: Path, source: ImageSource) -> None:
    """Write `index.csv`: row, file name, label and class of each image; label and class are empty without labels."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["row", "name", "label", "class"])
    for row in range(len(source)):
        label = "" if source.labels is None else source.labels[row]
        class_name = source.class_names[label] if source.class_names and label != "" else ""
        writer.writerow([row, source.name(row), label, class_name])
    content = text.getvalue().encode(errors="surrogateescape")
    write_durably(folder / INDEX_FILE, lambda file: file.write(content))


def features_of(vit: NamedViT, pixels: Tensor, kinds: Sequence[Kind], dtype: torch.dtype | None) -> dict[Kind, Tensor]:
    """Return features of uint8 pixels [n, C, H, W]: cls and mean [n, D], patch [n, L, D], float32 on the CPU.

    Args:
        dtype: of autocast; None: fp32.
    """
    images = vit.images(pixels)
    with torch.autocast(images.device.type, dtype=dtype, enabled=dtype is not None):
        tokens = tokens_of(vit.model, images).float()  # [n, N, D]
    patches = tokens[:, num_prefix_tokens(vit.model) :]
    features: dict[Kind, Tensor] = {}
    for kind in kinds:
        if kind == "patch":
            features[kind] = patches.cpu()
        else:
            features[kind] = (tokens[:, 0] if kind == "cls" else patches.mean(dim=1)).cpu()
    return features


@torch.no_grad()
def embed(
    vit: NamedViT,
    source: ImageSource,
    facts: Embeddings,
    folder: Path,
    pending: Sequence[int],
    *,
    batch_size: int,
    num_workers: int,
    loader_timeout: float,
    dtype: torch.dtype | None,
    exif: Exif = "ignore",
) -> Iterator[int]:
    """Write the pending shards one after the other, and yield the number of images of each batch that was encoded."""
    batches = [
        list(rows[start : start + batch_size])
        for rows in (facts.shards[shard] for shard in pending)
        for start in range(0, len(rows), batch_size)
    ]
    dataset = LabelledDataset(source, range(len(source)), vit.size, vit.in_chans, exif=exif)
    loader = iter(
        Loader(dataset, batch_sampler=batches, num_workers=num_workers, loader_timeout=loader_timeout)
        if batches
        else ()
    )
    for shard in pending:
        rows = facts.shards[shard]
        parts: dict[Kind, list[Tensor]] = {kind: [] for kind in facts.kinds}
        for _ in range(0, len(rows), batch_size):
            pixels, _ = next(loader)
            for kind, features in features_of(vit, pixels, facts.kinds, dtype).items():
                parts[kind].append(features.to(DTYPES[facts.dtype]))
            yield len(pixels)
        write_shard(facts, folder, shard, {kind: torch.cat(tensors) for kind, tensors in parts.items()})


def write_shard(facts: Embeddings, folder: Path, shard: int, features: dict[Kind, Tensor]) -> None:
    """Write the files of one shard, each whole or not at all."""
    if facts.format == "safetensors":
        content = save({kind: tensor.contiguous() for kind, tensor in features.items()})
        write_durably(facts.files(folder, shard)[0], lambda file: file.write(content))
        return
    for path, tensor in zip(facts.files(folder, shard), features.values(), strict=True):
        buffer = io.BytesIO()
        np.save(buffer, tensor.numpy())
        write_durably(path, lambda file, buffer=buffer: file.write(buffer.getbuffer()))


def pending_shards(facts: Embeddings, folder: Path) -> list[int]:
    """Return the shards that are not there yet."""
    return [
        shard for shard in range(len(facts.shards)) if not all(path.exists() for path in facts.files(folder, shard))
    ]


# --------------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------------


def read_shards(folder: Path, kind: Kind) -> Iterator[Tensor]:
    """Yield the features of one kind, shard by shard in their order: [n, D], or [n, L, D] of patches."""
    facts = read_facts(folder)
    if kind not in facts["kinds"]:
        raise UserError(
            f"{folder}: holds {', '.join(facts['kinds'])} features and no {kind}, embed with --kinds {kind}"
        )
    for start in range(0, facts["images"], facts["shard_size"]):
        stem = f"shard-{start // facts['shard_size']:05d}"
        if facts["format"] == "safetensors":
            yield load_file(folder / f"{stem}.safetensors")[kind]
        else:
            yield torch.from_numpy(np.load(folder / f"{stem}-{kind}.npy", mmap_mode="r").copy())


def nearest(folder: Path, kind: Kind, queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Find the images whose features have the greatest cosine with each query [Q, D], a shard at a time.

    Returns:
        Rows [Q, count] and cosines [Q, count], the greatest first.
    """
    queries = torch.nn.functional.normalize(queries.float(), dim=1)
    best = torch.full((len(queries), 0), -1.0)
    rows = torch.zeros(len(queries), 0, dtype=torch.int64)
    first = 0
    for features in read_shards(folder, kind):
        cosines = queries @ torch.nn.functional.normalize(features.float(), dim=1).T  # [Q, n]
        numbers = torch.arange(first, first + len(features)).expand(len(queries), -1)
        first += len(features)
        all_cosines, all_rows = torch.cat([best, cosines], dim=1), torch.cat([rows, numbers], dim=1)
        best, places = all_cosines.topk(min(count, all_cosines.shape[1]), dim=1)
        rows = all_rows.gather(1, places)
    return rows, best


def facts_of(vit: NamedViT, checkpoint: str, sha256: str, source: ImageSource, **settings: Any) -> Embeddings:
    """Return what a folder of embeddings of these images by this encoder holds.

    Args:
        settings: kinds, dtype, format, shard_size and precision.
    """
    return Embeddings(
        checkpoint=checkpoint,
        sha256=sha256,
        weights=vit.weights,
        images=len(source),
        names_sha256=names_digest(source),
        input_size=tuple(vit.size),
        width=vit.model.embed_dim,
        grid=tuple(grid_of(vit.model)),
        **settings,
    )
