"""Measures of a ViT: attention and its distance, spectra of features, Grad-CAM, features in the plane, neighbours.

Every function takes models of `util.weights.vit` and leaves them unchanged. Hooks observe a normal forward pass, fused
attention included, and are removed afterwards. Measures of a data set are accumulated batch by batch, so memory does
not grow with the number of images.

Letters: B images, N tokens (prefix and L patches), h heads, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention
from torch import Tensor

from models_position_bias import bias_of_block
from models_vit import Pool
from util.analysis.probe import MAX_SIMILARITIES
from util.runtime.errors import UserError
from util.weights.vit import AnyViT, grid_of, logits_of, num_heads_of, num_prefix_tokens, pooled, tokens_of

# --------------------------------------------------------------------------------------------------------
# Attention
# --------------------------------------------------------------------------------------------------------


def softmax_attention(attention: Attention, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return S = softmax(QKᵀ/√d + bias) of each head, float32 [B, h, N, N], a row per query for x [B, N, D]."""
    q, k, _ = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [B, h, N, d]
    q, k = attention.q_norm(q).float(), attention.k_norm(k).float()
    logits = q * attention.scale @ k.transpose(-2, -1)
    return (logits if bias is None else logits + bias).softmax(dim=-1)


@contextmanager
def observe_attention(model: AnyViT, layers: Sequence[int], observe: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Call `observe(layer, S)` with S [B, h, N, N] of each block in `layers` during each forward pass.

    S is computed a second time from the input of the attention layer, because fused attention does not return it.
    """

    def hook_of(layer: int) -> Callable:
        return lambda attention, inputs: observe(
            layer, softmax_attention(attention, inputs[0], bias_of_block(model, layer))
        )

    handles = [model.blocks[layer].attn.register_forward_pre_hook(hook_of(layer)) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def attention_maps(model: AnyViT, images: Tensor, layer: int) -> Tensor:
    """Return S [B, h, N, N] of one block for normalised images [B, C, H, W]."""
    attentions: list[Tensor] = []
    with observe_attention(model, [layer], lambda _, attention: attentions.append(attention)):
        tokens_of(model, images)
    return attentions[0]


def query_maps(model: AnyViT, attention: Tensor, query: tuple[int, int]) -> Tensor:
    """Return the attention [B, h, rows, columns] of the patch at `query` (row, column) to all patches, from S."""
    (rows, columns), prefix = grid_of(model), num_prefix_tokens(model)
    return attention[:, :, prefix + query[0] * columns + query[1], prefix:].unflatten(-1, (rows, columns))


# --------------------------------------------------------------------------------------------------------
# Attention distance (Eq. 4)
# --------------------------------------------------------------------------------------------------------

DISTANCE_BINS = 256  # bins of the histogram over [0, √2]


@dataclass(frozen=True)
class AttentionDistance:
    """Statistics of Eq. 4 over the images of a data set, for each layer and head."""

    layers: tuple[int, ...]
    images: int
    mean: np.ndarray  # [layers, h]
    std: np.ndarray  # [layers, h], over images
    histogram: np.ndarray  # [layers, h, DISTANCE_BINS] number of images in each bin
    patch_share: np.ndarray  # [layers, h] share of a patch's attention on patches; cls and registers get the rest


def patch_distances(grid: tuple[int, int]) -> Tensor:
    """Return ‖p_i − p_j‖ [L, L] between the centres of patches, with each side of the image of length 1."""
    rows, columns = grid
    centres = torch.cartesian_prod((torch.arange(rows) + 0.5) / rows, (torch.arange(columns) + 0.5) / columns)
    return torch.cdist(centres, centres, compute_mode="donot_use_mm_for_euclid_dist")


@torch.no_grad()
def attention_distance(model: AnyViT, batches: Iterable[Tensor], layers: Sequence[int]) -> AttentionDistance:
    """Return the mean distance over which patches attend: Eq. 4, divided by the number of query patches.

    This is Σ_i Σ_j S(i, j) ‖p_i − p_j‖ / L over patches i, j. S is the softmax over all tokens, as the model uses it,
    so attention to cls or registers counts as distance 0; `patch_share` is the share that goes to patches.

    Args:
        batches: normalised images [B, C, H, W] on the model's device.
        layers: blocks, counted from 0.

    Raises:
        UserError: there are no images.
    """
    row_of = {layer: row for row, layer in enumerate(layers)}
    prefix, h = num_prefix_tokens(model), num_heads_of(model)
    total, squares, share = (np.zeros((len(layers), h)) for _ in range(3))
    histogram = np.zeros((len(layers), h, DISTANCE_BINS), dtype=np.int64)
    distances, images = patch_distances(grid_of(model)), 0

    def accumulate(layer: int, attention: Tensor) -> None:
        row = row_of[layer]
        among_patches = attention[:, :, prefix:, prefix:]  # [B, h, L, L]
        L = among_patches.shape[-1]
        distance = (torch.einsum("bhij,ij->bh", among_patches, distances) / L).double().cpu()
        share[row] += (among_patches.sum(dim=(0, 2, 3)) / L).double().cpu().numpy()
        total[row] += distance.sum(dim=0).numpy()
        squares[row] += distance.square().sum(dim=0).numpy()
        bins = (distance * (DISTANCE_BINS / math.sqrt(2))).long().clamp(0, DISTANCE_BINS - 1)  # [B, h]
        histogram[row] += F.one_hot(bins, DISTANCE_BINS).sum(dim=0).numpy()

    with observe_attention(model, layers, accumulate):
        for batch in batches:
            distances = distances.to(batch.device)
            images += len(batch)
            tokens_of(model, batch)
    if not images:
        raise UserError("the attention distance needs at least one image")
    mean = total / images
    std = np.sqrt(np.maximum(squares / images - mean**2, 0))
    return AttentionDistance(tuple(layers), images, mean, std, histogram, share / images)


# --------------------------------------------------------------------------------------------------------
# Spectrum of the features
# --------------------------------------------------------------------------------------------------------


class RunningCovariance:
    """Accumulate the covariance of features batch by batch in float64.

    Batches are merged by their means and centred squares (Chan et al. 1983). Subtracting squared means from sums of
    squares would lose small singular values to rounding.
    """

    def __init__(self, dim: int):
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self.squares = torch.zeros(dim, dim, dtype=torch.float64)  # Σ (x − mean)(x − mean)ᵀ

    def add(self, features: Tensor) -> None:
        """Add a batch of features [B, D]."""
        x = features.double().cpu()
        mean, total = x.mean(dim=0), self.count + len(x)
        shift, centred = mean - self.mean, x - mean
        self.squares += centred.T @ centred + torch.outer(shift, shift) * (self.count * len(x) / total)
        self.mean += shift * (len(x) / total)
        self.count = total

    def singular_values(self) -> Tensor:
        """Return the singular values [D] of the covariance (divided by the number of samples), largest first.

        A covariance is symmetric and positive, so they are its eigenvalues.
        """
        return torch.linalg.eigvalsh(self.squares / self.count).flip(0).clamp_min(0)


@torch.no_grad()
def feature_spectra(model: AnyViT, batches: Iterable[Tensor], pool: Pool) -> np.ndarray:
    """Return the singular values of the feature covariance after each block, [depth, D], largest first.

    A feature is the mean of an image's patch tokens, or its cls token. The paper names a covariance of 50k x 50k, image
    by image; that Gram matrix has the same non-zero spectrum up to its scale but needs far more memory.

    Raises:
        UserError: there are not more images than features, so some singular values are zero for every model.
    """
    D = model.patch_embed.proj.out_channels
    covariances = [RunningCovariance(D) for _ in model.blocks]

    def hook_of(covariance: RunningCovariance) -> Callable:
        return lambda block, inputs, tokens: covariance.add(pooled(model, tokens, pool))

    handles = [b.register_forward_hook(hook_of(c)) for b, c in zip(model.blocks, covariances, strict=True)]
    try:
        for batch in batches:
            tokens_of(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    count = covariances[0].count
    if count <= D:
        raise UserError(f"the spectrum of {D} features needs more than {D} images, there are {count}: give more images")
    return torch.stack([covariance.singular_values() for covariance in covariances]).numpy()


def effective_rank(singular_values: np.ndarray) -> np.ndarray:
    """Return exp(entropy) of the normalised spectrum along the last axis: the number of directions used, 1 to D."""
    p = singular_values / singular_values.sum(axis=-1, keepdims=True)
    return np.exp(-(p * np.log(np.maximum(p, np.finfo(float).tiny))).sum(axis=-1))


# --------------------------------------------------------------------------------------------------------
# Grad-CAM
# --------------------------------------------------------------------------------------------------------


def class_score(model: AnyViT, target: int | None) -> Callable[[Tensor], Tensor]:
    """Return a function from images to the logit [B] of class `target`; None: of the most likely class of each image.

    Raises:
        UserError: there is no such class.
    """
    last = model.num_classes - 1
    if target is not None and not 0 <= target <= last:
        raise UserError(f"--target_class {target}: the model has the classes 0 to {last}")

    def score(images: Tensor) -> Tensor:
        logits = logits_of(model, images)
        return logits.max(dim=1).values if target is None else logits[:, target]

    return score


def feature_score(model: AnyViT) -> Callable[[Tensor], Tensor]:
    """Return a function from images to ½‖f‖² [B] of the mean f of the patch tokens, for an encoder without classes.

    Its gradient with respect to f is f itself, so the map shows where the image's own feature comes from.
    """
    return lambda images: pooled(model, tokens_of(model, images), "avg").square().sum(dim=1) / 2


def grad_cam(model: AnyViT, images: Tensor, layer: int, score: Callable[[Tensor], Tensor]) -> Tensor:
    """Return Grad-CAM (Selvaraju et al. 2017) on patch tokens, float32 [B, rows, columns], 0 where no score is raised.

    The map is relu(Σ_d w_d A_d), where w_d is the mean over patches of ∂score/∂A_d, and A [L, D] are the normalised
    tokens that the attention of block `layer` reads (`norm1`). Tokens after the last block would have no gradient in a
    model that classifies its cls token.

    The package grad-cam needs a classifier and OpenCV, and would save ten lines here.

    Args:
        images: normalised [B, C, H, W].
        score: maps these images to one number each by a forward pass of `model`.
    """
    leaves: list[Tensor] = []

    def make_leaf(norm: torch.nn.Module, inputs: tuple, tokens: Tensor) -> Tensor:
        leaves.append(tokens.detach().requires_grad_(True))
        return leaves[0]

    handle = model.blocks[layer].norm1.register_forward_hook(make_leaf)
    try:
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(score(images).sum(), leaves[0])
    finally:
        handle.remove()
    prefix = num_prefix_tokens(model)
    tokens, gradient = leaves[0].detach()[:, prefix:].float(), gradient[:, prefix:].float()  # [B, L, D]
    weights = gradient.mean(dim=1, keepdim=True)
    return (weights * tokens).sum(dim=2).relu().unflatten(1, grid_of(model))


# --------------------------------------------------------------------------------------------------------
# Features in the plane, as colours, and neighbours
# --------------------------------------------------------------------------------------------------------


def project_to_plane(features: Tensor, method: str, seed: int) -> tuple[np.ndarray, list[float] | None]:
    """Project features [N, D] to [N, 2] by `pca` or `tsne`; for PCA also return each axis' share of the variance."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    x = features.double().numpy()
    if method == "pca":
        pca = PCA(2, svd_solver="full").fit(x)
        return pca.transform(x), pca.explained_variance_ratio_.tolist()
    perplexity = min(30.0, (len(x) - 1) / 3)
    return TSNE(init="pca", perplexity=perplexity, random_state=seed).fit_transform(x.astype(np.float32)), None


def patch_colours(tokens: Tensor) -> np.ndarray:
    """Return colours [B, L, 3] in [0, 1] of patch tokens [B, L, D]: three principal components over all images.

    Each component is stretched from its 1st to its 99th percentile.
    """
    from sklearn.decomposition import PCA

    flat = tokens.flatten(0, 1).double().cpu().numpy()
    components = PCA(3, svd_solver="full").fit_transform(flat)  # [B·L, 3]
    low, high = np.percentile(components, [1, 99], axis=0)
    return ((components - low) / np.maximum(high - low, 1e-12)).clip(0, 1).reshape(*tokens.shape[:2], 3)


def nearest_neighbours(features: Tensor, k: int) -> Tensor:
    """Return the indices [N, k] of the nearest samples of each of [N, D] by cosine, nearest first, without itself."""
    x = F.normalize(features.float(), dim=1)
    neighbours = []
    for rows in torch.arange(len(x)).split(max(1, MAX_SIMILARITIES // len(x))):
        similarities = x[rows] @ x.T
        similarities[torch.arange(len(rows)), rows] = -math.inf
        neighbours.append(similarities.topk(k, dim=1).indices)
    return torch.cat(neighbours)
