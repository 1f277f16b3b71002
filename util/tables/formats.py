"""Tables of strings as text, Markdown and LaTeX."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from util.runtime.logs import aligned

Style = Literal["text", "markdown", "latex"]
WIDTH = 100  # columns of a terminal that a text table may fill
LATEX = {
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    **{"±": "$\\pm$", "†": "$\\dagger$", "‡": "$\\ddagger$", "Δ": "$\\Delta$", "–": "--", "~": "\\textasciitilde{}"},
}


@dataclass(frozen=True)
class TextTable:
    """Titles and rows of strings; the first `labels` columns name the row."""

    titles: Sequence[str]
    rows: Sequence[Sequence[str]]
    labels: int

    def render(self, style: Style) -> str:
        """Return the table in this style."""
        return {"text": self.as_text, "markdown": self.as_markdown, "latex": self.as_latex}[style]()

    def as_text(self) -> str:
        """Return aligned columns, with titles wrapped if need be; records if these are wider than WIDTH."""
        for titles in ([self.titles], self.wrapped_titles()):
            rule = ["-" * max(map(len, column)) for column in zip(*titles, *self.rows, strict=True)]
            if sum(map(len, rule)) + 2 * (len(rule) - 1) <= WIDTH:
                return aligned([*titles, rule, *self.rows], self.labels)
        return self.as_records()

    def wrapped_titles(self) -> list[list[str]]:
        """Return the titles in several lines, each as narrow as its longest word and the cells below allow."""
        wrapped = []
        for title, *cells in zip(self.titles, *self.rows, strict=True):
            widest = max(len(part) for part in [*cells, *title.replace("-", "- ").split(), "-"])
            wrapped.append(textwrap.wrap(title, widest) or [""])
        height = max(map(len, wrapped))
        padded = [[""] * (height - len(lines)) + lines for lines in wrapped]
        return [list(line) for line in zip(*padded, strict=True)]

    def as_records(self) -> str:
        """Return a block per row: its labels, then a line for each column that is not empty."""
        widest = max(map(len, self.titles[self.labels :]))
        blocks = []
        for row in self.rows:
            cells = zip(self.titles[self.labels :], row[self.labels :], strict=True)
            lines = [f"  {title:{widest}}  {cell}" for title, cell in cells if cell]
            blocks.append("\n".join([", ".join(filter(None, row[: self.labels])), *lines]))
        return "\n\n".join(blocks)

    def as_markdown(self) -> str:
        """Return a table of GitHub's Markdown."""
        rule = ["---" if i < self.labels else "---:" for i in range(len(self.titles))]
        escaped = [[cell.replace("|", "\\|") for cell in row] for row in self.rows]
        return "\n".join(f"| {' | '.join(row)} |" for row in (self.titles, rule, *escaped))

    def as_latex(self) -> str:
        """Return a tabular with the rules of booktabs."""
        lines = [
            " & ".join("".join(LATEX.get(letter, letter) for letter in cell) for cell in row) + " \\\\"
            for row in (self.titles, *self.rows)
        ]
        shape = "l" * self.labels + "r" * (len(self.titles) - self.labels)
        body = ["\\toprule", lines[0], "\\midrule", *lines[1:], "\\bottomrule"]
        return "\n".join([f"\\begin{{tabular}}{{{shape}}}", *body, "\\end{tabular}"])


def print_table(heading: str, table: TextTable, notes: Sequence[str], style: Style) -> None:
    """Print a heading, the table, and notes below it; in LaTeX the first and the last are comments."""
    print(f"{as_note(heading, style)}\n\n{table.render(style)}\n")
    for note in notes:
        print(as_note(note, style))


def as_note(line: str, style: Style) -> str:
    """Return a line of text as it may stand beside a table."""
    return f"% {line}" if style == "latex" else f"{line}  " if style == "markdown" else line
