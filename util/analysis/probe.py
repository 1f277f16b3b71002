"""Quality of frozen features: nearest neighbours, rank and linear probes.

scikit-learn is imported by the functions that fit with it, so that other programs start faster.

Letters: N samples, D features, K classes, G heads.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from util.runtime.errors import UserError

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

MAX_SIMILARITIES = 2**26  # computed at a time, 256 MiB of float32
RANKME_EPSILON = 1e-7  # Garrido et al. 2023, for float32 features
RIDGE = 0.01  # penalty for each sample
PROBE_C_GRID = (0.001, 0.01, 0.1, 1.0)  # inverse strength of the L2 penalty, strongest first
PROBE_C_WITHOUT_CHOICE = 0.1  # used if no sample can be held out


@torch.no_grad()
def extract_features(
    encode: Callable[[Tensor], Tensor], loader: Iterable[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Encode a data set.

    Args:
        encode: maps a batch of images from the loader to features [B, D], on any device.
        loader: yields images and integer labels [B].

    Returns:
        Features [N, D], float32, and labels [N], int64, both on the CPU.

    Raises:
        UserError: the loader yields no batch.
    """
    features, labels = [], []
    for images, batch_labels in loader:
        features.append(encode(images).float().cpu())
        labels.append(batch_labels.long().cpu())
    if not features:
        raise UserError("the data set of the probe yields no batch, it is empty")
    return torch.cat(features), torch.cat(labels)


@torch.no_grad()
def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Return the top-1 accuracy, in per cent, of a weighted vote among the k nearest training samples.

    Similarity is the cosine, and a vote weighs exp(similarity / temperature) (Wu et al. 2018, as DINO does it). If k
    exceeds the number of training samples, all of them vote.

    Args:
        train_features, test_features: [N, D] each, not necessarily normalised.
        train_labels, test_labels: [N] each, any integers.
    """
    predicted = knn_predictions(train_features, train_labels, test_features, k, temperature)
    return 100 * (predicted == test_labels).sum().item() / len(test_features)


@torch.no_grad()
def knn_predictions(
    train_features: Tensor, train_labels: Tensor, test_features: Tensor, k: int, temperature: float
) -> Tensor:
    """Return the labels [N] that `knn_accuracy` compares."""
    classes, train_classes = train_labels.unique(return_inverse=True)
    train_features = F.normalize(train_features.float(), dim=1)
    test_features = F.normalize(test_features.float(), dim=1)
    k = min(k, len(train_features))
    chunk = max(1, MAX_SIMILARITIES // len(train_features))
    predicted = []
    for features in test_features.split(chunk):
        similarities, neighbours = (features @ train_features.T).topk(k, dim=1)  # [chunk, k]
        # relative to the nearest, so that a small temperature does not overflow; the vote is the same
        weights = ((similarities - similarities[:, :1]) / temperature).exp()
        votes = weights.new_zeros(len(features), len(classes))
        votes.scatter_add_(1, train_classes[neighbours], weights)
        predicted.append(classes[votes.argmax(dim=1)])
    return torch.cat(predicted)


@torch.no_grad()
def rankme(features: Tensor) -> float:
    """Return RankMe, a smooth rank of the features [N, D], between 1 (collapsed) and min(N, D).

    It is exp(-sum p log p) with p = s / sum(s) + 1e-7 over the singular values s of the features, which are not
    centred (Garrido et al. 2023). Features that are not finite, of a run that diverges, give nan.

    The singular values are square roots of the eigenvalues of the Gram matrix on the shorter side, [D, D] for N >> D,
    because an SVD needs another [N, D] of memory. Squaring halves the digits: in float64, singular values below about
    1e-8 of the largest are lost, and the formula's own 1e-7 hides them anyway.
    """
    if not features.isfinite().all():
        return math.nan
    if len(features) < features.shape[1]:
        features = features.T
    gram = torch.zeros(features.shape[1], features.shape[1], dtype=torch.float64, device=features.device)
    for rows in features.split(8192):  # avoids a float64 copy of all features
        gram += rows.double().T @ rows.double()
    eigenvalues = torch.linalg.eigvalsh(gram)
    singular_values = eigenvalues.clamp_min(0).sqrt()
    total = singular_values.sum().clamp_min(torch.finfo(torch.float64).tiny)  # features may be all zero
    p = singular_values / total + RANKME_EPSILON
    return (-(p * p.log()).sum()).exp().item()


def ridge_probe_accuracy(
    train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor
) -> float:
    """Return the test accuracy, in per cent, of ridge regression of the classes on standardised features.

    This linear probe in closed form is a few points below the logistic one and a thousand times as fast, so that it can
    run during training. Features that are not finite give nan.

    Args:
        train_features, test_features: [N, D] each.
        train_labels, test_labels: [N] each, any integers.
    """
    if not (train_features.isfinite().all() and test_features.isfinite().all()):
        return math.nan
    from sklearn.linear_model import RidgeClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    train_x, test_x = train_features.double().cpu().numpy(), test_features.double().cpu().numpy()
    probe = make_pipeline(StandardScaler(), RidgeClassifier(alpha=RIDGE * len(train_x)))
    return 100 * float(probe.fit(train_x, train_labels.cpu().numpy()).score(test_x, test_labels.cpu().numpy()))


def logistic_probe_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    seed: int,
) -> float:
    """Return the test accuracy, in per cent, of logistic regression on frozen features.

    Features are standardised with the mean and standard deviation of the fitted samples. The L2 penalty is the best of
    `PROBE_C_GRID` (ties: the strongest) on the samples of `hold_out`; then all training samples are fitted. If no
    sample can be held out, the penalty is `PROBE_C_WITHOUT_CHOICE`.

    Args:
        train_features, test_features: [N, D] each.
        train_labels, test_labels: [N] each, any integers.

    Raises:
        UserError: the training labels hold fewer than two classes.
    """
    predicted = logistic_predictions(train_features, train_labels, test_features, seed)
    return 100 * (predicted == test_labels.cpu()).double().mean().item()


def logistic_predictions(train_features: Tensor, train_labels: Tensor, test_features: Tensor, seed: int) -> Tensor:
    """Return the labels [N] that `logistic_probe_accuracy` compares; the same errors are raised."""
    classes = train_labels.unique()
    if len(classes) < 2:
        raise UserError(f"a logistic probe needs two classes, its training labels hold {classes.tolist()}")
    train_x, test_x = train_features.double().cpu().numpy(), test_features.double().cpu().numpy()
    train_y = train_labels.cpu().numpy()
    held_out = hold_out(train_labels, seed).numpy()
    best_c, best_correct = PROBE_C_WITHOUT_CHOICE, -1
    if held_out.any():
        for c in PROBE_C_GRID:
            probe = _fit_probe(train_x[~held_out], train_y[~held_out], c)
            correct = int((probe.predict(train_x[held_out]) == train_y[held_out]).sum())
            if correct > best_correct:
                best_c, best_correct = c, correct
    return torch.from_numpy(_fit_probe(train_x, train_y, best_c).predict(test_x))


class Sweep(NamedTuple):
    """The head that a sweep has chosen."""

    accuracy: float  # % of the test samples
    lr: float
    weight_decay: float
    held_out: Tensor  # [lrs, weight decays] accuracy in % on the held-out training samples


def linear_sweep(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    lrs: Sequence[float],
    weight_decays: Sequence[float],
    epochs: int,
    batch_size: int,
    seed: int,
) -> Sweep:
    """Train linear heads for all pairs of learning rate and weight decay at once, by SGD on cached features.

    Features are standardised with the fitted samples' mean and deviation (the BatchNorm of MAE's probe, over the whole
    set). SGD has momentum 0.9 and a half cosine to 0. The pair is chosen on the samples of `hold_out` (ties: the first
    pair), and its head is then trained on all training samples.

    Args:
        train_features, test_features: [N, D] each.
        train_labels, test_labels: [N] each, 0 to K - 1.
        lrs: learning rates of a step, not scaled by the batch size.

    Raises:
        UserError: a class of the training labels has a single sample, so none can be held out.
    """
    check_hold_out(train_labels, "--sweep")
    held_out = hold_out(train_labels, seed)
    pairs = torch.tensor([(lr, decay) for lr in lrs for decay in weight_decays])  # [G, 2]
    K = 1 + int(max(train_labels.max(), test_labels.max()))

    def accuracy(fitted: Tensor, test: tuple[Tensor, Tensor], grid: Tensor) -> Tensor:
        x, y = train_features[fitted].float(), train_labels[fitted]
        mean, scale = x.mean(dim=0), x.std(dim=0, correction=0) + 1e-6
        weight, bias = _train_heads((x - mean) / scale, y, K, *grid.T, epochs, batch_size, seed)
        logits = torch.einsum("nd,gdk->gnk", (test[0].float() - mean) / scale, weight) + bias
        return 100 * (logits.argmax(dim=2) == test[1]).float().mean(dim=1)  # [G]

    validation = accuracy(~held_out, (train_features[held_out], train_labels[held_out]), pairs)
    best = pairs[validation.argmax()]
    test_accuracy = accuracy(torch.ones_like(held_out), (test_features, test_labels), best[None])
    return Sweep(test_accuracy.item(), *best.tolist(), validation.reshape(len(lrs), len(weight_decays)))


def hold_out(labels: Tensor, seed: int) -> Tensor:
    """Return a mask [N], true for a fifth of each class of `labels` [N]: one sample at least, of a single sample none.

    Every class keeps samples to fit. util.data.sources.hold_out divides images in the same way but draws others, and
    recorded results depend on both.
    """
    counts = labels.unique(return_counts=True)[1]
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    held_out[_first_of_each_class(labels, (counts // 5).clamp_min(1).minimum(counts - 1), seed)] = True
    return held_out


def check_hold_out(labels: Tensor, flag: str) -> None:
    """Raise UserError if a class has a single sample, so that none can be held out to choose hyper-parameters."""
    if labels.unique(return_counts=True)[1].min() < 2:
        raise UserError(f"{flag}: a class has a single training image, none can be held out to choose a head")


def _train_heads(
    x: Tensor, y: Tensor, K: int, lr: Tensor, decay: Tensor, epochs: int, batch_size: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Return weights [G, D, K] and biases [G, 1, K] of heads trained on the same batches with `lr` and `decay` [G]."""
    generator = torch.Generator().manual_seed(seed)
    heads = [torch.zeros(len(lr), x.shape[1], K), torch.zeros(len(lr), 1, K)]
    velocity = [torch.zeros_like(p) for p in heads]
    steps = epochs * math.ceil(len(x) / batch_size)
    order = torch.cat([torch.randperm(len(x), generator=generator) for _ in range(epochs)])
    for step, batch in enumerate(order.split(math.ceil(len(order) / steps))):
        logits = torch.einsum("nd,gdk->gnk", x[batch], heads[0]) + heads[1]
        error = (logits.softmax(dim=2) - F.one_hot(y[batch], K)) / len(batch)  # gradient of the cross-entropy
        gradients = [torch.einsum("nd,gnk->gdk", x[batch], error) + decay[:, None, None] * heads[0]]
        gradients.append(error.sum(dim=1, keepdim=True))
        rate = lr[:, None, None] * 0.5 * (1 + math.cos(math.pi * step / steps))
        for head, speed, gradient in zip(heads, velocity, gradients, strict=True):
            speed.mul_(0.9).add_(gradient)
            head.sub_(rate * speed)
    return heads[0], heads[1]


def few_labels(labels: Tensor, per_class: int, seed: int) -> Tensor:
    """Return the indices, ascending, of `per_class` samples of every class.

    With the same seed, a larger subset contains the smaller ones.

    Args:
        labels: [N], any integers.

    Raises:
        UserError: `per_class` is below 1 or above the size of a class.
    """
    if per_class < 1:
        raise UserError(f"--labels_per_class {per_class}: is too few, use 1 or more")
    classes, counts = labels.unique(return_counts=True)
    if counts.min() < per_class:
        smallest = counts.argmin()
        most = counts[smallest]
        raise UserError(
            f"--labels_per_class {per_class}: is more than class {classes[smallest]} has; use {most} or fewer"
        )
    return _first_of_each_class(labels, torch.full_like(counts, per_class), seed)


def _first_of_each_class(labels: Tensor, wanted: Tensor, seed: int) -> Tensor:
    """Shuffle the samples and return the indices, ascending, of the first `wanted[c]` of each class c."""
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    _, classes, counts = labels.cpu()[shuffled].unique(return_inverse=True, return_counts=True)
    order = classes.argsort(stable=True)  # class by class, each in the shuffled order
    starts = counts.cumsum(0) - counts
    rank_in_class = torch.arange(len(labels)) - starts[classes[order]]
    chosen = order[rank_in_class < wanted.cpu()[classes[order]]]
    return shuffled[chosen].sort().values


def _fit_probe(x: np.ndarray, y: np.ndarray, c: float) -> Pipeline:
    """Return a fitted logistic regression on standardised features, with inverse penalty `c`."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    with warnings.catch_warnings():
        # classes that can be separated may not converge under a weak penalty; held-out samples judge such a fit too
        warnings.simplefilter("ignore", ConvergenceWarning)
        return make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=1000)).fit(x, y)
