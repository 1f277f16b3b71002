"""A page of one run or of several side by side, in one file that opens from disk.

    python scripts/report.py RUN
    python scripts/report.py MAE LUT TUNED --label MAE LUT "LUT, fine-tuned" --output compared.html
    python scripts/report.py output/digits                       # all runs below a folder

RUN is the --output_dir of any main, finished or still under way. The page has losses, learning rate, kNN and RankMe,
accuracy, images per second and waiting as curves that can be zoomed; reconstructions over the epochs; attention maps of
the newest checkpoint; settings and where they differ; the paper's numbers where a run belongs to a row of its tables;
versions and machine; the commands that repeat the run. It needs no network, and is smaller than 10 MB.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tyro.conf import Positional, arg

from util.config.command_line import parse_config
from util.config.groups import check
from util.report.report import attention, report
from util.results.run_folder import open_runs
from util.runtime.distributed import choose_device
from util.runtime.errors import UserError, run_main


@dataclass(frozen=True)
class ReportConfig:
    """A page about runs."""

    runs: Annotated[Positional[tuple[str, ...]], arg(metavar="RUN")] = ()
    """folders of runs, or folders that hold runs"""
    label: tuple[str, ...] = ()
    """what to call each run; default: the end of its path"""
    title: str = ""
    """of the page; default: the labels"""
    attention: bool = True
    """open the newest checkpoint of each run, and show how it attends"""
    image: tuple[str, ...] = ()
    """image files for the attention maps; default: some of the first run's validation images"""
    device: str = "auto"
    """for the attention maps; auto: cuda where there is one, else cpu"""
    output: str = "output/report.html"
    """file to write"""

    def __post_init__(self) -> None:
        if not self.runs:
            raise UserError("RUN: give the folder of a run, or of several")
        check(len(self.image) <= 8, "image", len(self.image), "give 8 or fewer")
        check(Path(self.output).suffix in (".html", ".htm"), "output", self.output, "is written as .html")


def main() -> None:
    """Read, look, write."""
    config = parse_config(ReportConfig, sys.argv[1:], Path(__file__).name)
    runs = open_runs(config.runs, config.label)
    for run in runs:
        for remark in run.remarks:
            print(f"{run.label}: {remark}", file=sys.stderr)
    device = choose_device(config.device)
    seen = attention(runs, config.image, device) if config.attention else None
    html = report(runs, config.title or titled([run.label for run in runs]), seen)
    path = Path(config.output)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(html, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output {path}: cannot be written ({error.strerror or error})") from error
    print(f"{path}: {len(runs)} {'run' if len(runs) == 1 else 'runs'}, {path.stat().st_size / 1e6:.1f} MB")


def titled(labels: list[str]) -> str:
    """Up to three runs by their names."""
    return ", ".join(labels) if len(labels) <= 3 else f"{', '.join(labels[:2])} and {len(labels) - 2} more"


if __name__ == "__main__":
    run_main(Path(__file__).name, main)
