"""Write a page about one run, or several side by side, as one HTML file that opens from disk.

    python scripts/report.py RUN
    python scripts/report.py MAE LUT TUNED --label MAE LUT "LUT, fine-tuned" --output compared.html
    python scripts/report.py output/digits                       # all runs below a folder

RUN is the --output_dir of any main, finished or still training. The page has curves to zoom into (losses, learning
rate, kNN, RankMe, accuracy, images per second, data wait); reconstructions over the epochs; attention maps of the
newest checkpoint; settings and where they differ; the paper's numbers if a run belongs to a row of its tables; versions
and machine; the commands that repeat the run. It needs no network and is smaller than 10 MB. Damaged files of a run are
left out, and the page says so.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tyro.conf import Positional, arg

from util.config.checks import check
from util.config.command_line import parse_config
from util.results.run_folder import open_runs
from util.runtime.distributed import choose_device
from util.runtime.errors import UserError, printable, run_main
from util.runtime.files import write_durably


@dataclass(frozen=True)
class ReportConfig:
    """Write a page about runs."""

    runs: Annotated[Positional[tuple[str, ...]], arg(metavar="RUN")] = ()
    """folders of runs, or folders that hold runs"""
    label: tuple[str, ...] = ()
    """name of each run; default: the end of its path"""
    title: str = ""
    """title of the page; default: the labels"""
    attention: bool = True
    """open the newest checkpoint of each run and show its attention"""
    image: tuple[str, ...] = ()
    """image files for the attention maps; default: some of the first run's validation images"""
    device: str = "auto"
    """device for the attention maps; auto: cuda if there is one, else cpu"""
    output: str = "output/report.html"
    """file to write"""

    def __post_init__(self) -> None:
        if not self.runs:
            raise UserError("RUN: give the folder of a run, or of several")
        check(len(self.image) <= 8, "image", len(self.image), "give 8 or fewer")
        check(Path(self.output).suffix in (".html", ".htm"), "output", self.output, "is written as .html")


def main() -> None:
    """Read the runs, make the page, write it."""
    config = parse_config(ReportConfig, sys.argv[1:], Path(__file__).name)
    from util.report.report import report  # here: --help needs neither this nor what it imports

    runs = open_runs(config.runs, config.label)
    for run in runs:
        for remark in run.remarks:
            print(printable(f"{run.label}: {remark}"), file=sys.stderr)
    device, attention = choose_device(config.device), None
    if config.attention:
        from util.report.attention import attention_maps

        attention = attention_maps(runs, config.image, device)
    html = report(runs, config.title or title_of([run.label for run in runs]), attention)
    path = Path(config.output)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _, size = write_durably(path, lambda file: file.write(html.encode()))
    except OSError as error:
        raise UserError(f"--output {path}: cannot be written ({error.strerror or error})") from error
    print(printable(f"{path}: {len(runs)} {'run' if len(runs) == 1 else 'runs'}, {size / 1e6:.1f} MB"))


def title_of(labels: list[str]) -> str:
    """Return up to three labels, or two and the number of the others."""
    return ", ".join(labels) if len(labels) <= 3 else f"{', '.join(labels[:2])} and {len(labels) - 2} more"


if __name__ == "__main__":
    run_main(Path(__file__).name, main)
