"""A grid of heads trained on the tokens of a frozen encoder, side by side on the same batches.

The images pass through the encoder once per epoch for all heads of all kinds. Tokens of centre views do not change, so
they are computed once and kept if they fit into the memory that is allowed for them. Batches and their order are the
same in both cases. With augmentation, each epoch encodes new views.

Letters as in util/analysis/attentive.py: B images, L patches, D width, K classes, G heads of the grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from util.analysis.attentive import AttentiveHeads, GridAdamW, LinearHeads, losses_of
from util.analysis.probe import hold_out
from util.data.decode import MUST_BE_READ, load_image
from util.data.loader import Loader
from util.data.sources import ImageSource
from util.data.views import TwoViews, centre_view, sample_generator
from util.runtime.errors import UserError
from util.runtime.progress import progress

WARMUP = 0.1  # share of the updates in which learning rates rise linearly; a half cosine to 0 follows
Batch = tuple[Tensor, Tensor]  # tokens [B, 1 + L, D] with cls in front, and labels [B]


@dataclass
class ViewDataset(Dataset):
    """uint8 views with labels: the centre of each image or, with `epoch`, a random crop of it, flipped at random."""

    source: ImageSource
    indices: Sequence[int]
    view: TwoViews  # of one view
    in_chans: int
    seed: int
    epoch: int | None

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        index = self.indices[position]
        image, index = load_image(self.source, index, self.in_chans, False, fix=MUST_BE_READ)
        if self.epoch is None:
            return centre_view(image, self.view.size), self.source.labels[index]
        return self.view(image, sample_generator(self.seed, self.epoch, index))[0], self.source.labels[index]


@dataclass
class FrozenTokens:
    """Tokens of labelled images from a frozen encoder, encoded in every pass or kept after the first."""

    views: Callable[[int | None], Dataset]  # uint8 pixels and labels of an epoch's views; None: centre views
    encode: Callable[[Tensor], Tensor]  # uint8 pixels [B, C, H, W] to tokens [B, 1 + L, D] on the device
    loader_arguments: dict[str, Any] = field(default_factory=dict)
    augment: bool = False  # training passes see other views in every epoch
    keep: bool = False  # keep the tokens of all centre views in memory
    _stored: Batch | None = None

    def passes(self, orders: Sequence[Sequence[Tensor]], training: bool = False) -> Iterator[Batch]:
        """Yield the batches of `orders`, which lists positions [B] for each batch of each epoch."""
        for epoch, batches in enumerate(orders):
            if training and self.augment:
                yield from self._encoded(epoch, batches)
            elif not self.keep:
                yield from self._encoded(None, batches)
            else:
                tokens, labels = self._stored = self._stored or self._encode_all(len(batches[0]))
                yield from ((tokens[batch], labels[batch]) for batch in batches)

    def _encode_all(self, batch_size: int) -> Batch:
        number = len(self.views(None))
        encoded = self._encoded(None, torch.arange(number).split(batch_size))
        stored: Batch | None = None
        begin = 0
        for tokens, labels in progress(encoded, number, "tokens", "images", lambda batch: len(batch[1])):
            if stored is None:  # filled in place: a list of batches and its concatenation would take twice the memory
                stored = tokens.new_empty(number, *tokens.shape[1:], device="cpu"), labels.new_empty(number)
            stored[0][begin : begin + len(labels)], stored[1][begin : begin + len(labels)] = tokens, labels
            begin += len(labels)
        return stored

    def _encoded(self, epoch: int | None, batches: Sequence[Tensor]) -> Iterator[Batch]:
        sampler = [batch.tolist() for batch in batches]
        for pixels, labels in Loader(self.views(epoch), batch_sampler=sampler, **self.loader_arguments):
            with torch.no_grad():
                tokens = self.encode(pixels)
            yield tokens, labels


class Grid(NamedTuple):
    """Hyper-parameters of the sweep."""

    lrs: Sequence[float]  # per update
    weight_decays: Sequence[float]
    epochs: int
    batch_size: int
    seed: int
    num_queries: int = 1
    num_heads: int | None = None  # attention heads of the projections; None: no projections

    @property
    def pairs(self) -> Tensor:
        """The learning rate and weight decay of each head, [G, 2]."""
        return torch.tensor([(lr, decay) for lr in self.lrs for decay in self.weight_decays])


class BestHead(NamedTuple):
    """The head of one kind with the best accuracy on the held-out training images."""

    accuracy: float  # % of the validation images
    lr: float
    weight_decay: float
    held_out: Tensor  # [G] accuracy in % of all heads on the held-out training images


class HeadKinds(nn.Module):
    """The three kinds of heads, G of each, on the same tokens: linear on cls, linear on the mean, attentive."""

    def __init__(self, G: int, D: int, K: int, grid: Grid):
        super().__init__()
        generators = [torch.Generator().manual_seed(grid.seed + kind) for kind in range(3)]
        self.linear_cls = LinearHeads(G, D, K, generators[0])
        self.linear_mean = LinearHeads(G, D, K, generators[1])
        self.attentive = AttentiveHeads(G, D, K, grid.num_queries, grid.num_heads, generators[2])

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits [3·G, B, K] of tokens [B, 1 + L, D], kind by kind."""
        cls, patches = tokens[:, 0], tokens[:, 1:]
        return torch.cat([self.linear_cls(cls), self.linear_mean(patches.mean(dim=1)), self.attentive(patches)])


KINDS = ("linear_cls", "linear_mean", "attentive")


def sweep_heads(
    train: FrozenTokens,
    train_labels: Tensor,
    val: FrozenTokens,
    val_labels: Tensor,
    *,
    width: int,
    grid: Grid,
    device: torch.device,
    title: str,
) -> dict[str, BestHead]:
    """Train all heads and return the best of each kind, chosen on a fifth of the training images (`hold_out`).

    The reported accuracy is that of the chosen head as it was trained, on four fifths of the training images.

    Args:
        train, val: tokens of the images.
        train_labels, val_labels: [N] each, 0 to K - 1.
        width: D of the tokens.
        title: name of the encoder, for the progress on stderr.

    Raises:
        UserError: there are fewer than two images to fit.
    """
    held_out = hold_out(train_labels, grid.seed)
    fitted, chosen_by = (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]
    if len(fitted) < 2:
        raise UserError("--attentive: needs two training images or more beside those that choose the heads")
    orders = [batches_of_epoch(fitted, grid, epoch) for epoch in range(grid.epochs)]
    held_out_order = [chosen_by.split(grid.batch_size)]
    val_order = [torch.arange(len(val_labels)).split(grid.batch_size)]
    batches = chain(train.passes(orders, training=True), train.passes(held_out_order), val.passes(val_order))
    total = len(fitted) * grid.epochs + len(chosen_by) + len(val_labels)
    batches = progress(batches, total, f"heads, {title}", "images", lambda batch: len(batch[1]))
    K = 1 + int(max(train_labels.max(), val_labels.max()))
    heads = train_heads(batches, sum(map(len, orders)), width, K, grid, device)
    held_out_accuracy = accuracies(heads, batches, len(held_out_order[0]), device)
    val_accuracy = accuracies(heads, batches, len(val_order[0]), device)
    best: dict[str, BestHead] = {}
    for kind, own, on_val in zip(KINDS, held_out_accuracy.chunk(3), val_accuracy.chunk(3), strict=True):
        index = int(own.argmax())
        best[kind] = BestHead(on_val[index].item(), *grid.pairs[index].tolist(), own)
    next(batches, None)  # ends the line of the progress
    return best


def batches_of_epoch(positions: Tensor, grid: Grid, epoch: int) -> Sequence[Tensor]:
    """Return the positions in a random order in batches of `batch_size` or a little more, never of one image."""
    generator = torch.Generator().manual_seed(grid.seed * 1_000_003 + epoch)
    order = positions[torch.randperm(len(positions), generator=generator)]
    return order.tensor_split(max(1, len(order) // grid.batch_size))


def train_heads(batches: Iterator[Batch], updates: int, D: int, K: int, grid: Grid, device: torch.device) -> HeadKinds:
    """Return G heads of each kind, trained on the next `updates` batches and set to eval mode."""
    heads = HeadKinds(len(grid.pairs), D, K, grid).to(device)
    optimizer = GridAdamW(heads, *grid.pairs.to(device).T)
    for update in range(updates):
        tokens, labels = next(batches)
        losses_of(heads(tokens.to(device)), labels.to(device)).sum().backward()
        optimizer.step(schedule((update + 0.5) / updates))
    return heads.eval()


def schedule(share: float) -> float:
    """Return the factor on the learning rates, in [0, 1], once `share` of the updates is done."""
    return min(1.0, share / WARMUP) * 0.5 * (1 + math.cos(math.pi * max(0.0, share - WARMUP) / (1 - WARMUP)))


@torch.no_grad()
def accuracies(heads: HeadKinds, batches: Iterator[Batch], number: int, device: torch.device) -> Tensor:
    """Return the accuracy in % of all heads, kind by kind, on the next `number` batches."""
    correct, count = 0, 0
    for _ in range(number):
        tokens, labels = next(batches)
        labels = labels.to(device)
        correct = correct + (heads(tokens.to(device)).argmax(dim=2) == labels).sum(dim=1)
        count += len(labels)
    return 100 * correct.cpu() / count
