"""Run a notebook from its top, and keep it with what came out.

    python docs/execute_notebook.py docs/tour.ipynb

It runs in a copy of the code in a temporary folder: it finds nothing of earlier runs, and leaves none. Outputs are
kept; what belongs to this machine or moment is not: times, the version of Python, what went to stderr. A cell that
fails ends the script, and the notebook stays as it was. Needs the packages of requirements-test.txt.
"""

from __future__ import annotations

import base64
import io
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError
from nbformat import NotebookNode
from PIL import Image
from tyro.conf import Positional, arg

from util.config.command_line import parse_config
from util.config.groups import check
from util.runtime.errors import RunError, UserError, run_main
from util.runtime.files import ROOT

CODE = ("*.py", "util/**/*.py", "scripts/*.py", "recipes/*.yaml")  # what a notebook may call


@dataclass(frozen=True)
class ExecuteConfig:
    """Run a notebook in a copy of the code, and write it back with its outputs."""

    notebook: Annotated[Positional[str], arg(metavar="NOTEBOOK")]
    """to be run, and overwritten"""
    timeout: int = 600
    """seconds that a cell may take"""

    def __post_init__(self) -> None:
        check(self.timeout >= 1, "timeout", self.timeout, "must be 1 or more")
        check(self.notebook.endswith(".ipynb"), "notebook", self.notebook, "must be a notebook (.ipynb)")


def main() -> None:
    """Run, clean, write."""
    config = parse_config(ExecuteConfig, sys.argv[1:], Path(__file__).name)
    path = Path(config.notebook).resolve()
    with tempfile.TemporaryDirectory() as folder:
        notebook = execute(path, Path(folder), config.timeout)
    nbformat.write(cleaned(notebook), path)
    print(f"{config.notebook}: {len(pictures(notebook))} pictures, {path.stat().st_size / 1000:.0f} kB")


def execute(path: Path, folder: Path, timeout: int) -> NotebookNode:
    """The notebook with its outputs, after a run in a copy of the code that is made in `folder`, at its place there.

    Raises:
        UserError: it cannot be read.
        RunError: a cell failed, or took more than `timeout` seconds.
    """
    try:
        notebook = nbformat.read(path, as_version=4)
    except (OSError, ValueError, nbformat.reader.NotJSONError) as error:
        raise UserError(f"{path}: cannot be read as a notebook ({error})") from error
    for pattern in CODE:
        for file in ROOT.glob(pattern):
            copy = folder / file.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
    place = folder / path.relative_to(ROOT).parent if path.is_relative_to(ROOT) else folder
    place.mkdir(parents=True, exist_ok=True)
    client = NotebookClient(notebook, timeout=timeout, record_timing=False, resources={"metadata": {"path": place}})
    try:
        return client.execute()
    except CellExecutionError as error:
        raise RunError(f"{path.name}: a cell failed: {error.ename}: {' '.join(error.evalue.split())}") from error
    except CellTimeoutError as error:
        raise RunError(f"{path.name}: a cell took more than {timeout} seconds (--timeout)") from error


def cleaned(notebook: NotebookNode) -> NotebookNode:
    """In place, small, and without what another machine or another minute would have written differently."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                if "image/png" in output.get("data", {}):
                    output.data["image/png"] = smaller(output.data["image/png"])
    return notebook


def smaller(picture: str) -> str:
    """A PNG in base64 with 256 colours, a third of the size; one that has them already stays as it is."""
    image = Image.open(io.BytesIO(base64.b64decode(picture)))
    if image.mode == "P":
        return picture
    buffer = io.BytesIO()
    image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def pictures(notebook: NotebookNode) -> list[str]:
    """All PNGs in the outputs, in base64."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]


if __name__ == "__main__":
    run_main(Path(__file__).name, main)
