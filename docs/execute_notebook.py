"""Run a notebook from its top and save it with its outputs.

    python docs/execute_notebook.py docs/tour.ipynb

The notebook runs in a copy of the code in a temporary folder, so it neither finds nor leaves files of other runs.
Times, the version of Python and stderr are removed, because they differ between machines. If a cell fails, the script
ends and the notebook is not changed. The script needs the packages of requirements-test.txt.
"""

from __future__ import annotations

import base64
import io
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import nbclient
import nbformat
from nbclient.exceptions import CellExecutionError, CellTimeoutError
from nbformat import NotebookNode
from PIL import Image
from tyro.conf import Positional, arg

from util.cluster.code import copy_code
from util.config.checks import check
from util.config.command_line import parse_config
from util.runtime.errors import RunError, UserError, run_main
from util.runtime.files import ROOT


@dataclass(frozen=True)
class ExecuteConfig:
    """Run a notebook in a copy of the code, and overwrite it with its outputs."""

    notebook: Annotated[Positional[str], arg(metavar="NOTEBOOK")]
    """notebook to run and overwrite (.ipynb)"""
    timeout: int = 600
    """most seconds for a cell"""

    def __post_init__(self) -> None:
        check(self.timeout >= 1, "timeout", self.timeout, "must be 1 or more")
        check(self.notebook.endswith(".ipynb"), "notebook", self.notebook, "must be a notebook (.ipynb)")


def main() -> None:
    """Run the notebook, clean its outputs and write it."""
    config = parse_config(ExecuteConfig, sys.argv[1:], Path(__file__).name)
    path = Path(config.notebook).resolve()
    with tempfile.TemporaryDirectory() as folder:
        notebook = execute(path, Path(folder), config.timeout)
    nbformat.write(cleaned(notebook), path)
    print(f"{config.notebook}: {len(pictures(notebook))} pictures, {path.stat().st_size / 1000:.0f} kB")


def execute(path: Path, folder: Path, timeout: int) -> NotebookNode:
    """Copy the code to `folder`, run the notebook at its place there, and return it with its outputs.

    Raises:
        UserError: the notebook cannot be read.
        RunError: a cell failed, or took more than `timeout` seconds.
    """
    try:
        notebook = nbformat.read(path, as_version=4)
    except (OSError, ValueError, nbformat.reader.NotJSONError) as error:
        raise UserError(f"{path}: cannot be read as a notebook ({error})") from error
    copy_code(folder)
    place = folder / path.relative_to(ROOT).parent if path.is_relative_to(ROOT) else folder
    place.mkdir(parents=True, exist_ok=True)
    try:
        return nbclient.execute(notebook, cwd=str(place), timeout=timeout, record_timing=False)
    except CellExecutionError as error:
        raise RunError(f"{path.name}: a cell failed: {error.ename}: {' '.join(error.evalue.split())}") from error
    except CellTimeoutError as error:
        raise RunError(f"{path.name}: a cell took more than {timeout} seconds (--timeout)") from error


def cleaned(notebook: NotebookNode) -> NotebookNode:
    """Remove, in place, what differs between machines and runs, and make the pictures small."""
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
    """Reduce a PNG in base64 to 256 colours, a third of the size; one with a palette is returned unchanged."""
    image = Image.open(io.BytesIO(base64.b64decode(picture)))
    if image.mode == "P":
        return picture
    buffer = io.BytesIO()
    image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def pictures(notebook: NotebookNode) -> list[str]:
    """Return all PNGs of the outputs, in base64."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]


if __name__ == "__main__":
    run_main(Path(__file__).name, main)
