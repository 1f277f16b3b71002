"""Reconstruction grids, pixel by pixel against loops."""

import resource
import signal
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from util.figures.figure import new_figure, save_figure
from util.figures.pictures import GAP, as_grid, reconstruction_cells, save_png

MEANS, STDS = [0.4, 0.5, 0.6, 0.3], [0.2, 0.25, 0.3, 0.1]


def reconstruction_grid(*arguments):
    return as_grid(reconstruction_cells(*arguments))


def slow_cells(images, mask, prediction, p, mean, std, norm_pix_loss):
    """Return the four cells of each sample as lists of float [H, W, C] in 0..1, in loops over pixels."""
    batch, channels, height, width = images.shape
    cells = np.zeros((batch, 4, height, width, channels))
    for b, c, y, x in np.ndindex(batch, channels, height, width):
        patch = (y // p) * (width // p) + x // p
        value = prediction[b, patch, ((y % p) * p + x % p) * channels + c].item()
        if norm_pix_loss:
            top, left = y // p * p, x // p * p
            true = images[b, :, top : top + p, left : left + p].double()
            value = value * (true.var().item() + 1e-6) ** 0.5 + true.mean().item()
        true, guess = images[b, c, y, x].item() * std[c] + mean[c], value * std[c] + mean[c]
        hidden = bool(mask[b, patch])
        cells[b, :, y, x, c] = (true, 0.5 if hidden else true, guess, guess if hidden else true)
    return cells


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 3),
    channels=st.integers(1, 4),
    rows=st.integers(1, 3),
    columns=st.integers(1, 3),
    p=st.integers(2, 4),
    norm_pix_loss=st.booleans(),
)
def test_grid_equals_loops(seed, batch, channels, rows, columns, p, norm_pix_loss):
    generator = torch.Generator().manual_seed(seed)
    height, width = rows * p, columns * p
    images = torch.randn(batch, channels, height, width, generator=generator)
    mask = torch.rand(batch, rows * columns, generator=generator) < 0.6
    prediction = torch.randn(batch, rows * columns, p * p * channels, generator=generator)
    mean, std = MEANS[:channels], STDS[:channels]

    grid = reconstruction_grid(images, mask.float(), prediction, p, mean, std, norm_pix_loss)

    cells = slow_cells(images, mask, prediction, p, mean, std, norm_pix_loss)
    cells = np.clip(cells, 0, 1)[..., : 3 if channels >= 3 else 1] * 255
    if channels < 3:
        cells = cells.repeat(3, axis=-1)
    factor = 128 // max(height, width)
    cells = cells.repeat(factor, axis=2).repeat(factor, axis=3)
    height, width = height * factor, width * factor
    assert grid.dtype == np.uint8
    assert grid.shape == (batch * (height + GAP) - GAP, 4 * (width + GAP) - GAP, 3)
    gap = np.ones(grid.shape[:2], bool)
    for b in range(batch):
        for column in range(4):
            top, left = b * (height + GAP), column * (width + GAP)
            cell = grid[top : top + height, left : left + width]
            assert np.abs(cell - cells[b, column]).max() <= 0.5 + 1e-3
            gap[top : top + height, left : left + width] = False
    assert (grid[gap] == 255).all()


def test_perfect_normalised_prediction_gives_back_the_image():
    images = torch.rand(1, 3, 32, 48)
    patches = images.unfold(2, 16, 16).unfold(3, 16, 16)  # [1, 3, 2, 3, 16, 16]
    target = patches.permute(0, 2, 3, 4, 5, 1).reshape(1, 6, -1)
    normalised = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    mask = torch.tensor([[1, 0, 1, 1, 1, 0]])
    grid = reconstruction_grid(images, mask, normalised.bfloat16().float(), 16, [0] * 3, [1] * 3, True)
    side = 48 * 2  # enlarged twice
    truth = grid[:, :side].astype(int)
    assert np.abs(grid[:, 2 * (side + GAP) :][:, :side] - truth).max() <= 2
    assert np.abs(grid[:, 3 * (side + GAP) :] - truth).max() <= 2


@pytest.mark.parametrize(("side", "factor"), [(28, 4), (32, 4), (64, 2), (96, 1), (224, 1)])
def test_small_images_are_enlarged_by_whole_factors(side, factor):
    tokens = (side // 4) ** 2
    grid = reconstruction_grid(
        torch.zeros(1, 1, side, side), torch.zeros(1, tokens), torch.zeros(1, tokens, 16), 4, [0], [1], False
    )
    assert grid.shape == (side * factor, 4 * (side * factor + GAP) - GAP, 3)


def test_titles_stand_above_their_columns_and_leave_the_cells():
    cells = np.full((2, 3, 40, 50, 3), 200, dtype=np.uint8)
    plain, titled = as_grid(cells), as_grid(cells, ("image", "masked", "two\nlines"))
    head = titled[: len(titled) - len(plain)]
    assert np.array_equal(titled[len(head) :], plain)
    width = 2 * 50 + GAP
    inked = [(head[:, column * width : (column + 1) * width] < 100).any(axis=(1, 2)) for column in range(3)]
    assert all(ink.any() for ink in inked)
    assert not inked[0][len(head) // 2 + GAP :].any()  # one line
    assert inked[2][len(head) // 2 + GAP :].any()  # two


def test_bfloat16_prediction_with_a_graph():
    prediction = torch.zeros(1, 4, 16, dtype=torch.bfloat16, requires_grad=True)
    grid = reconstruction_grid(torch.zeros(1, 1, 8, 8), torch.ones(1, 4), prediction, 4, [0.5], [1], True)
    assert set(grid.ravel().tolist()) == {128, 255}


def test_save_png_round_trip(tmp_path):
    array = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    save_png(array, tmp_path / "new" / "picture.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "new" / "picture.png")), array)


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files as Linux does")
@pytest.mark.parametrize("kind", ["picture", "figure"])
def test_a_disk_that_is_full_leaves_the_older_picture(tmp_path, kind):
    def write():
        if kind == "picture":
            save_png(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8), tmp_path / "a.png")
        else:
            save_figure(new_figure(2, 2, "title", "caption"), tmp_path / "a.png")

    write()
    before = (tmp_path / "a.png").read_bytes()
    assert len(before) > 2000
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert (tmp_path / "a.png").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
