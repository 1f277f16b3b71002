"""Features in the plane, as colours, and nearest neighbours against slow, obvious versions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from util.analysis.attention import nearest_neighbours, patch_colours, project_to_plane
from util.analysis.plots import spread_boxes

quick = settings(max_examples=20, deadline=None)


def test_neighbours_equal_loops_in_any_chunks(monkeypatch):
    x = torch.randn(17, 5, generator=torch.Generator().manual_seed(0))
    cosines = torch.nn.functional.cosine_similarity(x[:, None], x[None], dim=2)
    for most in (1, 40, 10**6):
        monkeypatch.setattr("util.analysis.attention.MAX_SIMILARITIES", most)
        neighbours = nearest_neighbours(x, 4)
        for i in range(17):
            others = sorted((j for j in range(17) if j != i), key=lambda j: -cosines[i, j].item())
            assert neighbours[i].tolist() == others[:4]


def test_the_plane_of_pca_is_that_of_an_svd():
    x = torch.randn(30, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([5.0, 3, 1, 1, 1, 1]) + 7
    points, shares = project_to_plane(x, "pca", seed=0)
    centred = (x - x.mean(dim=0)).double().numpy()
    _, s, vt = np.linalg.svd(centred, full_matrices=False)
    assert np.abs(points) == pytest.approx(np.abs(centred @ vt[:2].T), abs=1e-4)
    assert shares == pytest.approx((s**2 / (s**2).sum())[:2].tolist(), abs=1e-5)


def test_tsne_keeps_clusters_apart_and_repeats_itself():
    x = torch.cat([torch.randn(15, 4, generator=torch.Generator().manual_seed(0)) + shift for shift in (0, 40)])
    points, shares = project_to_plane(x, "tsne", seed=3)
    assert shares is None
    assert np.array_equal(points, project_to_plane(x, "tsne", seed=3)[0])
    inside = np.linalg.norm(points[:15] - points[:15].mean(axis=0), axis=1).max()
    assert np.linalg.norm(points[:15].mean(axis=0) - points[15:].mean(axis=0)) > inside


def test_patch_colours_are_alike_where_tokens_are():
    kinds = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[0, 1, 2, 3, 0, 0], [3, 3, 2, 1, 0, 2]])
    colours = patch_colours(kinds[ids])
    assert colours.shape == (2, 6, 3)
    assert colours.min() >= 0
    assert colours.max() <= 1
    flat, kind = colours.reshape(-1, 3), ids.flatten().numpy()
    for a in range(12):
        for b in range(12):
            assert np.allclose(flat[a], flat[b], atol=1e-6) == (kind[a] == kind[b])


@quick
@given(seed=st.integers(0, 10**6), count=st.integers(1, 12))
def test_names_in_the_plane_do_not_lie_on_each_other(seed, count):
    rng = np.random.default_rng(seed)
    centres, widths = rng.random((count, 2)) * (0.6, 0.1), rng.uniform(0.05, 0.2, count)
    positions = spread_boxes(centres, widths, 0.04)
    assert np.array_equal(positions[:, 0], centres[:, 0])
    for i in range(count):
        for j in range(i):
            across, up = np.abs(positions[i] - positions[j])
            assert across >= (widths[i] + widths[j]) / 2 or up >= 0.04 - 1e-3
    far = np.array([[0.1, 0.1], [0.9, 0.1]])
    assert np.array_equal(spread_boxes(far, [0.2, 0.2], 0.04), far)
