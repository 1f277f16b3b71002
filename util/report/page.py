"""A web page of pictures, text and tables in one file: it opens from disk, on a phone, in light and dark.

The templates are in util/report/pages. All values are escaped, and the page forbids itself the network.
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

from util.runtime.errors import printable

FOLDER = Path(__file__).resolve().parent / "pages"
WIDE_PIXELS = 900  # a phone would shrink such a picture beyond reading: it scrolls inside its frame instead
PICTURE_FORMATS = ("PNG", "JPEG", "WEBP")  # Pillow would try others too: EPS starts Ghostscript


@dataclass(frozen=True)
class Section:
    """A heading, a paragraph, pictures (PNG), and a table whose first row is its head."""

    title: str
    text: str
    pictures: Sequence[bytes]
    table: Sequence[Sequence[str]] = ()


@dataclass(frozen=True)
class Embedded:
    """A picture for an `img` element."""

    address: str  # a data: address, which holds the bytes themselves
    width: int
    height: int

    @property
    def wide(self) -> bool:
        """True if it scrolls on a phone."""
        return self.width > WIDE_PIXELS


def page(title: str, facts: Sequence[str], sections: Sequence[Section], footer: str) -> str:
    """Return the HTML of a page; `facts` stand below the title."""
    return render("sections.html", title=title, facts=facts, sections=sections, footer=footer)


def render(template: str, **values: Any) -> str:
    """Return a template of util/report/pages with all values escaped."""
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,  # what is missing is an error, not a hole in the page
        finalize=visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(file=own_file, embed=embed)
    return environment.get_template(template).render(**values)


def visible(value: Any) -> Any:
    """Return text with its control characters as escapes: HTML has no way to write them."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return "\n".join(map(printable, value.split("\n")))


def own_file(name: str) -> Markup:
    """Return a style or script of util/report/pages, which is trusted as it stands."""
    return Markup((FOLDER / name).read_text(encoding="utf-8"))


def embed(picture: bytes) -> Embedded:
    """Return an encoded picture (see PICTURE_FORMATS) that stands in the page itself."""
    image = Image.open(io.BytesIO(picture), formats=PICTURE_FORMATS)
    kind = Image.MIME[image.format]
    return Embedded(f"data:{kind};base64,{base64.b64encode(picture).decode()}", *image.size)
