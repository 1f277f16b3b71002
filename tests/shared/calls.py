"""Mains and scripts called in this process, their one-line errors and their tables."""

from __future__ import annotations

import json
import math
import shlex
import sys
from pathlib import Path

from util.runtime.errors import run_main


def one_line(error):
    """Return the message of a UserError, which has to be one line."""
    message = str(error.value)
    assert "\n" not in message
    return message


def script_caller(monkeypatch, capsys, folder: Path, script):
    """Return a function that calls a script of scripts/ from the folder and returns exit status, stdout and stderr."""
    program = Path(script.__file__).name
    monkeypatch.chdir(folder)
    monkeypatch.setattr(
        "util.runtime.progress.SECONDS_BETWEEN_LINES", math.inf
    )  # lines that come on slow machines only

    def call(flags: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [program, *shlex.split(flags)])
        status = 0
        try:
            run_main(program, script.main)
        except SystemExit as stop:
            status = stop.code
        return status or 0, *capsys.readouterr()

    return call


def caller(monkeypatch, tmp_path: Path, main, shared: str):
    """Return a function that calls a main with the `shared` flags and more, and returns the lines of log.jsonl."""
    program = Path(main.__file__).name

    def call(*flags: str, output: Path | None = None) -> list[dict]:
        output = output or tmp_path / "run"
        arguments = [*shared.split(), "--output_dir", str(output), *" ".join(map(str, flags)).split()]
        monkeypatch.setattr(sys, "argv", [program, *arguments])
        run_main(program, main.main)
        log = output / "log.jsonl"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    return call


def markdown_rows(shown: str) -> list[list[str]]:
    """Return the cells of each row of all Markdown tables, titles included."""
    lines = [line for line in shown.splitlines() if line.startswith("|") and not line.startswith("| ---")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
