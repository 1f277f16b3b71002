"""Tables as text, Markdown and LaTeX."""

from __future__ import annotations

from collections.abc import Sequence

from util.runtime.logs import aligned


def as_text(titles: Sequence[str], rows: Sequence[Sequence[str]], labels: int) -> str:
    """Columns under each other, numbers flush right."""
    rule = ["-" * max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    return aligned([titles, rule, *rows], labels)


def as_markdown(titles: Sequence[str], rows: Sequence[Sequence[str]], labels: int) -> str:
    """A table of GitHub's Markdown."""
    rule = ["---" if i < labels else "---:" for i in range(len(titles))]
    cleaned = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (titles, rule, *cleaned))


LATEX = {
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    **{"±": "$\\pm$", "†": "$\\dagger$", "‡": "$\\ddagger$", "Δ": "$\\Delta$", "–": "--", "~": "\\textasciitilde{}"},
}


def as_latex(titles: Sequence[str], rows: Sequence[Sequence[str]], labels: int) -> str:
    """A tabular with booktabs' rules."""

    def line(cells: Sequence[str]) -> str:
        return " & ".join("".join(LATEX.get(letter, letter) for letter in cell) for cell in cells) + " \\\\"

    shape = "l" * labels + "r" * (len(titles) - labels)
    body = [line(titles), "\\midrule", *map(line, rows)]
    return "\n".join([f"\\begin{{tabular}}{{{shape}}}", "\\toprule", *body, "\\bottomrule", "\\end{tabular}"])


FORMATS = {"text": as_text, "markdown": as_markdown, "latex": as_latex}


def commented(line: str, style: str) -> str:
    """A line of text as it may stand beside a table."""
    return f"% {line}" if style == "latex" else f"{line}  " if style == "markdown" else line
