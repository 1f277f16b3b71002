"""Names of any script, and names that look like formulas, in matplotlib's figures."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from matplotlib.font_manager import fontManager
from matplotlib.text import Text
from PIL import Image

from util.figures.figure import new_figure, save_figure
from util.figures.fonts import installed_families
from util.figures.pictures import confusion_picture

NAMES = ["猫", "قطة", "बिल्ली", "คน", "\U0001f431", "$\\frac$", "a$b", "\\x1b[31m"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_any_script_is_drawn_without_an_error_or_a_warning(tmp_path, name):
    figure = new_figure(3, 2, f"title {name}", name)
    axes = figure.add_subplot()
    axes.plot([1, 1000], label=name)
    axes.set(yscale="log", xlabel=name)
    axes.legend()
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        save_figure(figure, tmp_path / "figure.png")
        confusion_picture(np.eye(2, dtype=int), [name, "other"], tmp_path / "confusion.png")
    assert [str(each.message) for each in raised] == []
    for picture in ("figure.png", "confusion.png"):
        assert np.asarray(Image.open(tmp_path / picture).convert("L")).std() > 1
    named = [text for text in figure.findobj(Text) if text.get_text() == name]
    assert [text.get_fontfamily() for text in named] == [installed_families()] * len(named)
    assert len(named) >= 3
    ticks = [text.get_text() for text in axes.get_yticklabels()]
    assert "$\\mathdefault{10^{3}}$" in ticks  # powers of ten are still set as such


def test_a_font_that_has_the_characters_is_taken_if_it_is_installed(tmp_path):
    fonts = [font for font in fontManager.ttflist if "CJK" in font.name and Path(font.fname).exists()]
    if not fonts:
        pytest.skip("no Chinese font is installed here")
    pictures = []
    for name in ("猫", "\U0010fffd"):  # the second is no character: an empty box
        save_figure(new_figure(1, 1, name, ""), tmp_path / "figure.png")
        pictures.append(np.asarray(Image.open(tmp_path / "figure.png")))
    assert (pictures[0] != pictures[1]).any()
