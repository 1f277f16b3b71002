"""Run the stages of scripts/check_gpu.py: each in a process of its own and with a time limit, results after each.

A stage that fails, hangs or is killed never stops the next one, and what it has recorded until then is kept.
"""

from __future__ import annotations

import contextlib
import html
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LEAST_SECONDS = 5.0  # a stage with less time left is not started
LOG_LINES = 15  # of a failed stage, shown on the page


@dataclass(frozen=True)
class Stage:
    """A stage: its command records rows in FOLDER/NAME.jsonl (`Recorder`) and exits with 0."""

    name: str
    title: str
    seconds: float  # time limit
    command: tuple[str, ...]


class Recorder:
    """Append rows of results to a file, which survive the end of the process."""

    def __init__(self, folder: Path, stage: str):
        self.path = folder / f"{stage}.jsonl"
        self.path.unlink(missing_ok=True)
        self.failed: list[str] = []

    def row(self, name: str, passed: bool | None = None, **numbers: Any) -> None:
        """Write a row; `passed` False makes the stage fail at its end."""
        if passed is False:
            self.failed.append(name)
        row = {"name": name} | ({} if passed is None else {"passed": passed}) | numbers
        print(json.dumps(row), flush=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def attempt(self, name: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Record what `measure` returns, or its error: the next row is measured whatever happens."""
        try:
            self.row(name, **measure())
        except Exception as error:
            self.row(name, passed=False, error=f"{type(error).__name__}: {error}"[:500])


def run_stages(stages: Sequence[Stage], folder: Path, minutes: float) -> list[dict[str, Any]]:
    """Run the stages one after the other within `minutes`; write results.json and index.html after each."""
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * minutes
    results: list[dict[str, Any]] = []
    for stage in stages:
        seconds = min(stage.seconds, deadline - time.monotonic())
        print(f"{stage.name}: {stage.title} (at most {max(seconds, 0):.0f} s)", flush=True)
        if seconds < LEAST_SECONDS:
            results.append(
                {"stage": stage.name, "title": stage.title, "state": "not started", "seconds": 0, "rows": []}
            )
        else:
            results.append(run_stage(stage, folder, seconds))
        print(f"{stage.name}: {results[-1]['state']}, {results[-1]['seconds']:.0f} s", flush=True)
        (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        (folder / "index.html").write_text(page(results), encoding="utf-8")
    return results


def run_stage(stage: Stage, folder: Path, seconds: float) -> dict[str, Any]:
    """Run a stage, kill it with all its processes at the time limit, and return its state and rows."""
    begin, log = time.monotonic(), folder / f"{stage.name}.log"
    with log.open("wb") as file:
        process = subprocess.Popen(stage.command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = process.wait(seconds)
            state = "passed" if status == 0 else f"failed with status {status}"
        except subprocess.TimeoutExpired:
            state = f"stopped after {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # data loader workers too
            process.wait()
    rows_file = folder / f"{stage.name}.jsonl"
    lines = rows_file.read_text(encoding="utf-8").splitlines() if rows_file.exists() else []
    result = {"stage": stage.name, "title": stage.title, "state": state, "seconds": time.monotonic() - begin}
    result["rows"] = [json.loads(line) for line in lines if line.endswith("}")]
    if state != "passed":
        result["log"] = log.read_text(errors="replace").splitlines()[-LOG_LINES:]
    return result


def page(results: Sequence[dict[str, Any]]) -> str:
    """Return the results as one HTML page."""
    sections = []
    for result in results:
        names = list(dict.fromkeys(key for row in result["rows"] for key in row))
        cells = [[cell(row.get(name)) for name in names] for row in result["rows"]]
        table = "".join(f"<tr>{''.join(f'<td>{text}</td>' for text in row)}</tr>" for row in cells)
        head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
        log = html.escape("\n".join(result.get("log", [])))
        sections.append(
            f"<h2>{html.escape(result['title'])}</h2><p>{html.escape(result['state'])}, {result['seconds']:.0f} s</p>"
            + (f"<table><tr>{head}</tr>{table}</table>" if names else "")
            + (f"<pre>{log}</pre>" if log else "")
        )
    style = (
        "body{font:15px sans-serif;margin:2em}td,th{padding:.2em .8em;text-align:right}td:first-child{text-align:left}"
    )
    return (
        f'<!doctype html><meta charset="utf-8"><title>GPU check</title><style>{style}</style><h1>GPU check</h1>'
        + "".join(sections)
        + "\n"
    )


def cell(value: Any) -> str:
    """Return a value of a row as the text of a table cell."""
    if value is None:
        return ""
    return html.escape(f"{value:.4g}" if isinstance(value, float) else str(value))
