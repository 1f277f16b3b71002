"""Fonts for text of any script in matplotlib's figures: names of classes and files may be Chinese, Arabic, Hindi."""

from __future__ import annotations

import functools
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# matplotlib takes each character from the first family that has it; only installed ones may be named
FAMILIES = (
    *("DejaVu Sans", "Noto Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "WenQuanYi Zen Hei"),
    *("PingFang SC", "Hiragino Sans", "Microsoft YaHei", "Malgun Gothic", "Noto Sans Arabic", "Noto Naskh Arabic"),
    *("Noto Sans Devanagari", "Lohit Devanagari", "Nirmala UI", "Noto Sans Bengali", "Noto Sans Tamil"),
    *("Noto Sans Thai", "Noto Sans Hebrew", "Noto Sans Ethiopic", "Arial Unicode MS", "FreeSans", "Unifont"),
)


@functools.cache
def installed_families() -> list[str]:
    """Return those of FAMILIES that matplotlib finds; it brings the first one with it."""
    from matplotlib.font_manager import fontManager

    known = {font.name for font in fontManager.ttflist}
    return [family for family in FAMILIES if family in known]


def use_any_script(figure: Figure) -> None:
    """Let a finished figure take characters from any installed font, and draw `$` as it stands.

    A character that no font has is drawn as an empty box, without a warning for each.
    """
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_fontfamily(installed_families())
        if "$" in text.get_text() and "mathdefault" not in text.get_text():  # which matplotlib's own numbers have
            text.set_parse_math(False)
    warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
