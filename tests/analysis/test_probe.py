"""Probes of frozen features against slow, obvious versions."""

import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from util.analysis import probe
from util.analysis.probe import (
    RIDGE,
    extract_features,
    few_labels,
    knn_accuracy,
    logistic_probe_accuracy,
    rankme,
    ridge_probe_accuracy,
)
from util.runtime.errors import UserError

quick = settings(max_examples=30, deadline=None)


def slow_knn_accuracy(train, train_labels, test, test_labels, k, temperature):
    correct = 0
    for x, label in zip(test.tolist(), test_labels.tolist(), strict=True):
        similarities = []
        for y, other in zip(train.tolist(), train_labels.tolist(), strict=True):
            dot = sum(a * b for a, b in zip(x, y, strict=True))
            similarities.append((dot / math.hypot(*x) / math.hypot(*y), other))
        votes = {}
        for similarity, other in sorted(similarities, reverse=True)[:k]:
            votes[other] = votes.get(other, 0) + math.exp(similarity / temperature)
        correct += max(votes, key=votes.get) == label
    return 100 * correct / len(test)


@quick
@given(
    seed=st.integers(0, 10**6),
    n_train=st.integers(1, 30),
    n_test=st.integers(1, 12),
    dim=st.integers(2, 6),
    k=st.integers(1, 40),
    temperature=st.sampled_from([0.05, 0.07, 1.0]),
    max_similarities=st.integers(1, 200),
)
def test_knn_equals_loops(seed, n_train, n_test, dim, k, temperature, max_similarities):
    generator = torch.Generator().manual_seed(seed)
    train, test = (torch.randn(n, dim, generator=generator) for n in (n_train, n_test))
    labels = torch.tensor([-3, 0, 7, 1000])  # neither dense nor positive
    train_labels = labels[torch.randint(4, (n_train,), generator=generator)]
    test_labels = labels[torch.randint(4, (n_test,), generator=generator)]
    arguments = (train, train_labels, test, test_labels, k, temperature)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "MAX_SIMILARITIES", max_similarities)  # chunks of every size
        assert knn_accuracy(*arguments) == pytest.approx(slow_knn_accuracy(*arguments))


def test_knn_with_a_tiny_temperature_is_the_nearest_neighbour():
    train = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.9, 0.12], [0.0, 1.0]])
    labels = torch.tensor([0, 1, 1, 1])
    query = torch.tensor([[5.0, 0.01]])
    assert knn_accuracy(train, labels, query, torch.tensor([0]), k=4, temperature=1e-4) == 100
    assert knn_accuracy(train, labels, query, torch.tensor([1]), k=4, temperature=1.0) == 100


@quick
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 40),
    dim=st.integers(1, 12),
    rank=st.integers(1, 12),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
)
def test_rankme_equals_the_formula_on_an_svd(seed, n, dim, rank, scale):
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(n, rank, generator=generator), torch.randn(rank, dim, generator=generator)
    features = left @ right * scale
    entropy = 0.0
    singular_values = np.linalg.svd(features.double().numpy(), compute_uv=False)
    for value in singular_values:
        p = value / singular_values.sum() + 1e-7
        entropy -= p * math.log(p)
    assert rankme(features) == pytest.approx(math.exp(entropy), rel=1e-4)


def test_features_that_are_not_finite_have_no_rank():
    assert math.isnan(rankme(torch.full((4, 3), math.nan)))


def test_rankme_of_known_spectra():
    assert rankme(torch.eye(8)) == pytest.approx(8, rel=1e-4)
    assert rankme(torch.ones(50, 8)) == pytest.approx(1, rel=1e-4)  # collapsed: not centred
    assert rankme(torch.zeros(50, 8)) == pytest.approx(1, rel=1e-4)
    rows = torch.eye(4).repeat(5000, 1)  # more rows than one block
    assert rankme(rows) == pytest.approx(4, rel=1e-4)


def test_extract_features_returns_float32_on_the_cpu_without_a_graph():
    weight = torch.ones(3, 2, dtype=torch.bfloat16, requires_grad=True)
    loader = [(torch.full((2, 3), float(i)), torch.tensor([i, i], dtype=torch.int32)) for i in range(3)]
    features, labels = extract_features(lambda images: images.bfloat16() @ weight, loader)
    assert features.dtype == torch.float32
    assert not features.requires_grad
    assert torch.equal(features, torch.tensor([0.0, 0, 3, 3, 6, 6])[:, None].expand(6, 2))
    assert torch.equal(labels, torch.tensor([0, 0, 1, 1, 2, 2]))


def test_extract_features_of_nothing():
    with pytest.raises(UserError, match="no batch"):
        extract_features(lambda images: images, [])


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32), torch.tensor(data.target)
    return x[:400], y[:400], x[400:800], y[400:800]


def test_logistic_probe_reads_digits_without_warnings(digits):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # constant border pixels and separable classes included
        accuracy = logistic_probe_accuracy(*digits, seed=0)
        assert accuracy == logistic_probe_accuracy(*digits, seed=0)
    assert 80 < accuracy < 90  # other writers than those of the training part


@pytest.mark.parametrize(("offset", "scale"), [(0, 1), (5, 100)])
def test_ridge_probe_is_its_normal_equations(digits, offset, scale):
    train, train_labels, test, test_labels = digits
    mean, std = train.double().mean(0), train.double().std(0, correction=0).clamp_min(1e-12)
    x, y = (train.double() - mean) / std, 2 * F.one_hot(train_labels).double() - 1
    penalty = RIDGE * len(x) * torch.eye(x.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(x.T @ x + penalty, x.T @ (y - y.mean(0)))
    predicted = ((test.double() - mean) / std @ weights + y.mean(0)).argmax(dim=1)
    expected = 100 * (predicted == test_labels).double().mean().item()
    assert expected > 70
    given = (offset + scale * train, train_labels, offset + scale * test, test_labels)
    assert ridge_probe_accuracy(*given) == pytest.approx(expected, abs=0.6)  # a sample may lie on the border
    broken = train.index_fill(0, torch.tensor([3]), float("nan"))
    assert math.isnan(ridge_probe_accuracy(broken, *digits[1:]))
    assert ridge_probe_accuracy(train, 0 * train_labels, test, 0 * test_labels) == 100  # of one class


def test_logistic_probe_does_not_depend_on_offset_and_scale(digits):
    train_x, train_y, test_x, test_y = digits
    scale = torch.logspace(-3, 3, 64)
    moved = logistic_probe_accuracy(train_x * scale + 5, train_y, test_x * scale + 5, test_y, seed=0)
    assert moved == pytest.approx(logistic_probe_accuracy(*digits, seed=0), abs=0.5)


def test_logistic_probe_chooses_the_penalty_on_held_out_training_samples_only():
    # One informative feature among noise of which there is more than samples: a weak penalty overfits.
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 2
    features = torch.randn(60, 200, generator=generator)
    features[:, 0] += 3 * labels
    fitted = []
    with pytest.MonkeyPatch.context() as patch:
        fit_probe = probe._fit_probe
        patch.setattr(probe, "_fit_probe", lambda x, y, c: fitted.append((len(x), c)) or fit_probe(x, y, c))
        logistic_probe_accuracy(features, labels, features, labels, seed=0)
    assert [n for n, _ in fitted] == [48] * 4 + [60]
    assert fitted[-1][1] in probe.PROBE_C_GRID


@pytest.mark.parametrize("per_class", [1, 2, 5])
def test_logistic_probe_with_few_labels(digits, per_class):
    train_x, train_y, test_x, test_y = digits
    chosen = few_labels(train_y, per_class, seed=0)
    accuracy = logistic_probe_accuracy(train_x[chosen], train_y[chosen], test_x, test_y, seed=0)
    assert accuracy > 30  # chance is 10


def test_logistic_probe_of_one_class():
    with pytest.raises(UserError, match="two classes"):
        logistic_probe_accuracy(torch.ones(3, 2), torch.ones(3), torch.ones(3, 2), torch.ones(3), seed=0)


@quick
@given(
    labels=st.lists(st.sampled_from([-1, 0, 5]), min_size=1, max_size=60),
    per_class=st.integers(1, 6),
    seed=st.integers(0, 2**31),
)
def test_few_labels(labels, per_class, seed):
    labels = torch.tensor(labels)
    counts = {label: labels.tolist().count(label) for label in labels.tolist()}
    if min(counts.values()) < per_class:
        with pytest.raises(UserError, match=f"use {min(counts.values())} or fewer"):
            few_labels(labels, per_class, seed)
        return
    indices = few_labels(labels, per_class, seed).tolist()
    assert indices == sorted(set(indices))
    chosen = labels[indices].tolist()
    assert {label: chosen.count(label) for label in chosen} == dict.fromkeys(counts, per_class)
    assert few_labels(labels, per_class, seed).tolist() == indices
    if per_class > 1:
        assert set(few_labels(labels, per_class - 1, seed).tolist()) < set(indices)


def test_few_labels_depends_on_the_seed_and_refuses_none():
    labels = torch.arange(100) % 2
    assert few_labels(labels, 5, seed=0).tolist() != few_labels(labels, 5, seed=1).tolist()
    with pytest.raises(UserError, match="0: is too few"):
        few_labels(labels, 0, seed=0)


# ---- linear heads of a grid -----------------------------------------------------------------------------------


def test_heads_of_a_grid_equal_sgd_one_by_one():
    torch.manual_seed(0)
    x, y = torch.randn(50, 6), torch.randint(3, (50,))
    lr, decay = torch.tensor([0.5, 0.1]), torch.tensor([0.0, 0.1])
    weight, bias = probe._train_heads(x, y, 3, lr, decay, epochs=4, batch_size=16, seed=7)
    order = torch.cat([torch.randperm(50, generator=g) for g in [torch.Generator().manual_seed(7)] for _ in range(4)])
    steps = 4 * 4  # 50 samples make 4 batches of 16
    for g in range(2):
        head = torch.nn.Linear(6, 3)
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
        groups = [dict(params=[head.weight], weight_decay=decay[g].item()), dict(params=[head.bias], weight_decay=0.0)]
        optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9)
        for step, batch in enumerate(order.split(13)):  # 200 samples in 16 steps
            for group in optimizer.param_groups:
                group["lr"] = lr[g].item() * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(head(x[batch]), y[batch]).backward()
            optimizer.step()
        torch.testing.assert_close(weight[g], head.weight.T, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(bias[g, 0], head.bias, rtol=1e-3, atol=1e-4)


def test_a_sweep_chooses_without_the_test_samples():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(300) % 3
    x = torch.randn(300, 8, generator=generator) + 2 * torch.nn.functional.one_hot(y, 8)
    shuffled = y[torch.randperm(300, generator=generator)]
    settings = dict(lrs=(1e4, 0.1), weight_decays=(0.0, 1e-3), epochs=5, batch_size=32, seed=0)
    chosen = probe.linear_sweep(x[:200], y[:200], x[200:], y[200:], **settings)
    assert chosen.accuracy > 80
    assert chosen.lr == pytest.approx(0.1)
    assert chosen.held_out.shape == (2, 2)
    assert chosen.held_out.argmax().item() // 2 == 1
    blind = probe.linear_sweep(x[:200], y[:200], x[200:], shuffled[200:], **settings)
    assert (blind.lr, blind.weight_decay) == (chosen.lr, chosen.weight_decay)
    assert torch.equal(blind.held_out, chosen.held_out)
    with pytest.raises(UserError, match="single training image"):
        probe.linear_sweep(x[:4], torch.tensor([0, 0, 1, 2]), x[200:], y[200:], **settings)
