"""A web page of pictures, words and tables in one file: it opens from disk, on a phone, in light and dark."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from PIL import Image

STYLE = """
:root { color-scheme: light dark; --text: #1b1b1b; --soft: #5a5a5a; --ground: #fbfbfa; --line: #dcdcdc; }
figure { background: #fff; }
@media (prefers-color-scheme: dark) { :root { --text: #e8e8e6; --soft: #a5a5a0; --ground: #17181a; --line: #3a3b3e; }
  figure { background: #d9d9d9; } img { filter: brightness(.85); } } /* white pictures would glare */
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 70rem; color: var(--text); background: var(--ground);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
p { max-width: 46rem; } footer, .soft { color: var(--soft); font-size: .9rem; }
nav a { display: inline-block; padding: .3rem .8rem .3rem 0; } a { color: inherit; }
figure { margin: 1rem 0; padding: .5rem; border: 1px solid var(--line); border-radius: .5rem;
  overflow-x: auto; }
img { display: block; max-width: 100%; height: auto; margin: auto; }
@media (max-width: 40rem) { figure img.wide { max-width: none; width: 46rem; } }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; }
"""
WIDE_PIXELS = 900  # a phone would shrink such a picture beyond reading: it scrolls inside its frame instead


@dataclass(frozen=True)
class Section:
    """A heading, how to read what follows, pictures (PNG), and a table whose first row is its heads."""

    title: str
    text: str
    pictures: Sequence[bytes]
    table: Sequence[Sequence[str]] = ()


def page(title: str, facts: Sequence[str], sections: Sequence[Section], footer: str) -> str:
    """The HTML; nothing in it is fetched from anywhere. `facts` stand below the title."""
    links = "".join(f'<a href="#{number}">{escape(s.title)}</a>' for number, s in enumerate(sections))
    body = "".join(section_html(number, section) for number, section in enumerate(sections))
    head = "".join(f'<p class="soft">{escape(fact)}</p>' for fact in facts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><h1>{escape(title)}</h1>{head}<nav>{links}</nav>\n{body}<footer><p>{escape(footer)}</p></footer>"
        "</body></html>\n"
    )


def section_html(number: int, section: Section) -> str:
    """One section; its number is the anchor."""
    pictures = "".join(f"<figure>{img(png, section.title)}</figure>\n" for png in section.pictures)
    return f'<section id="{number}"><h2>{escape(section.title)}</h2><p>{escape(section.text)}</p>\n' + (
        f"{table_html(section.table)}{pictures}</section>\n"
    )


def img(png: bytes, alternative: str) -> str:
    """The picture, embedded."""
    width, height = Image.open(io.BytesIO(png)).size
    wide = ' class="wide"' if width > WIDE_PIXELS else ""
    data = base64.b64encode(png).decode()
    return (
        f'<img{wide} width="{width}" height="{height}" alt="{escape(alternative)}" src="data:image/png;base64,{data}">'
    )


def table_html(rows: Sequence[Sequence[str]]) -> str:
    """A table that scrolls inside the page where it is wider than a phone; nothing for no rows."""
    if not rows:
        return ""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows[1:])
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>\n'
