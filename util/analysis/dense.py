"""Dense probes of frozen patch tokens on masks: kNN and logistic regression name the class of each patch.

All pixels of a patch get the class that is predicted for it, and mIoU counts pixels, so the size of a patch limits what
can be reached. This compares encoders quickly; main_segment.py trains a decoder.

Letters: N patches, D width, K classes, L patches of an image of H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torchvision.transforms.v2.functional as TF
from torch import Tensor
from torch.utils.data import Dataset

from util.analysis.probe import knn_predictions, logistic_predictions
from util.data.decode import MUST_BE_READ
from util.data.joint_views import resized_image, resized_mask, scaled_size
from util.data.masked_samples import load_pair
from util.data.masks import IGNORED, MaskedSource
from util.data.views import Size
from util.runtime.errors import UserError


@dataclass
class CentreMasks(Dataset):
    """Images, uint8 [C, H, W], and masks [H, W]: resized to cover `size`, then its centre is cut out of both."""

    source: MaskedSource
    indices: Sequence[int]
    size: Size
    in_chans: int

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor]:
        image, mask, _ = load_pair(self.source, self.indices[position], self.in_chans, skip_bad=False, fix=MUST_BE_READ)
        size = scaled_size(tuple(mask.shape), self.size)
        image, mask = resized_image(image, size), resized_mask(mask, size)
        return TF.center_crop(image, list(self.size)), TF.center_crop(mask, list(self.size))


class Patches(NamedTuple):
    """Frozen tokens of patches and the pixels of each class in them."""

    tokens: Tensor  # [N, D] float32
    pixels: Tensor  # [N, K] number of pixels of each class; ignored pixels do not count

    def labelled(self, most: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return tokens and most frequent classes of at most `most` patches that have a class, drawn with `seed`."""
        positions = self.pixels.any(dim=1).nonzero()[:, 0]
        order = torch.randperm(len(positions), generator=torch.Generator().manual_seed(seed))[:most]
        chosen = positions[order]
        return self.tokens[chosen], self.pixels[chosen].argmax(dim=1)


@torch.no_grad()
def extract_patches(
    encode: Callable[[Tensor], Tensor], loader: Iterable[tuple[Tensor, Tensor]], patch_size: int, num_classes: int
) -> Patches:
    """Encode images with masks.

    Args:
        encode: maps images from the loader to patch tokens [B, L, D], on any device.
        loader: yields images [B, C, H, W] and masks [B, H, W].
    """
    tokens, pixels = [], []
    for images, masks in loader:
        tokens.append(encode(images).flatten(0, 1).float().cpu())
        pixels.append(patch_pixels(masks, patch_size, num_classes))
    return Patches(torch.cat(tokens), torch.cat(pixels))


def patch_pixels(masks: Tensor, patch_size: int, num_classes: int) -> Tensor:
    """Return the number of pixels of each class in each patch, int32 [B·L, K], of masks [B, H, W]."""
    p = patch_size
    patches = masks.long().unfold(1, p, p).unfold(2, p, p).reshape(-1, p * p)  # [B·L, p²]
    patches = patches.where(patches != IGNORED, num_classes)
    counts = torch.zeros(len(patches), num_classes + 1, dtype=torch.int32)
    counts.scatter_add_(1, patches, torch.ones_like(patches, dtype=torch.int32))
    return counts[:, :num_classes]


class DenseScore(NamedTuple):
    """Scores over all pixels that are not ignored, in %."""

    miou: float  # mean over the classes that occur in the masks or the predictions
    accuracy: float


def dense_score(pixels: Tensor, predicted: Tensor) -> DenseScore:
    """Score classes `predicted` [N] for patches whose pixels are counted in `pixels` [N, K]."""
    K = pixels.shape[1]
    confusion = torch.zeros(K, K, dtype=torch.float64).index_add_(0, predicted, pixels.double())  # [predicted, true]
    correct = confusion.diagonal()
    union = confusion.sum(dim=0) + confusion.sum(dim=1) - correct
    occurs = union > 0
    return DenseScore(
        100 * (correct[occurs] / union[occurs]).mean().item(), 100 * (correct.sum() / confusion.sum()).item()
    )


def dense_probe(
    train: Patches, val: Patches, max_patches: int, k: int, temperature: float, seed: int
) -> dict[str, DenseScore]:
    """Score kNN and logistic regression, fitted to at most `max_patches` patches, on all validation patches.

    Raises:
        UserError: all pixels of a split are ignored, or the training patches have one class.
    """
    tokens, labels = train.labelled(max_patches, seed)
    if not len(labels) or not val.pixels.any():
        raise UserError("--dense: all pixels of a split are ignored, see --ignore_index")
    knn = knn_predictions(tokens, labels, val.tokens, k, temperature)
    logistic = logistic_predictions(tokens, labels, val.tokens, seed)
    return {"dense_knn": dense_score(val.pixels, knn), "dense_logistic": dense_score(val.pixels, logistic)}
