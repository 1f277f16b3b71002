"""A web page of pictures, words and tables in one file: it opens from disk, on a phone, in light and dark.

The templates lie in util/report/pages. Whatever is put into them is escaped, and the page forbids itself the network.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

FOLDER = Path(__file__).resolve().parent / "pages"
WIDE_PIXELS = 900  # a phone would shrink such a picture beyond reading: it scrolls inside its frame instead


@dataclass(frozen=True)
class Section:
    """A heading, how to read what follows, pictures (PNG), and a table whose first row is its heads."""

    title: str
    text: str
    pictures: Sequence[bytes]
    table: Sequence[Sequence[str]] = ()


@dataclass(frozen=True)
class Embedded:
    """A picture as an `img` takes it."""

    address: str  # data:, the bytes themselves
    width: int
    height: int

    @property
    def wide(self) -> bool:
        """Whether it scrolls on a phone."""
        return self.width > WIDE_PIXELS


def page(title: str, facts: Sequence[str], sections: Sequence[Section], footer: str) -> str:
    """The HTML; nothing in it is fetched from anywhere. `facts` stand below the title."""
    return render("sections.html", title=title, facts=facts, sections=sections, footer=footer)


def render(template: str, **values: Any) -> str:
    """A template of util/report/pages, all values escaped."""
    blanks = dict(trim_blocks=True, lstrip_blocks=True)
    # StrictUndefined: what is missing is an error, not a hole in the page
    environment = Environment(loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined, **blanks)
    environment.globals.update(file=own_file, embed=embed)
    return environment.get_template(template).render(**values)


def own_file(name: str) -> Markup:
    """A style or script of util/report/pages, which is trusted as it stands."""
    return Markup((FOLDER / name).read_text(encoding="utf-8"))


def embed(picture: bytes) -> Embedded:
    """An encoded picture (PNG, WebP, ...), to stand in the page itself."""
    opened = Image.open(io.BytesIO(picture))
    kind = Image.MIME[opened.format]
    return Embedded(f"data:{kind};base64,{base64.b64encode(picture).decode()}", *opened.size)
