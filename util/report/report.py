"""A report of runs: one HTML file with curves, pictures, attention maps, the paper's numbers and how to repeat them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING

import yaml
from markupsafe import Markup

from util.report.films import films_of
from util.report.page import render
from util.report.paper_rows import paper_tables
from util.report.settings import commands, differing_settings, environment_rows
from util.report.summary import card, speed_rows, summary_rows
from util.results.curves import GROUPS, Metric, curves_of, metrics_of, points_per_curve, thinning_note
from util.results.run_folder import RunFolder
from util.runtime.errors import UserError
from util.tables.tables import PRETRAIN

if TYPE_CHECKING:  # its imports take seconds
    from util.report.attention import Attention

MOST_BYTES = 10 * 10**6  # of a report; the plotting library is 4.8 MB of it


def report(runs: Sequence[RunFolder], title: str, attention: Attention | None) -> str:
    """Return the HTML.

    Args:
        attention: None if no maps were asked for.

    Raises:
        UserError: the page would be larger than MOST_BYTES.
    """
    from plotly.offline import get_plotlyjs  # slow to import

    metrics = metrics_of(runs)
    most = points_per_curve(runs)
    tables, homeless = paper_tables(runs)
    html = render(
        "report.html",
        title=title,
        facts=[f"Made on {datetime.now(timezone.utc):%Y-%m-%d at %H:%M} UTC."],
        cards=[card(run, metrics) for run in runs],
        summary=summary_rows(runs, metrics),
        differing=differing_settings(runs),
        configs=[(run.label, yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)) for run in runs],
        groups=[(group, panels) for group in GROUPS if (panels := panels_of(metrics, group))],
        thinned=thinning_note(runs, most),
        no_clock=[run.label for run in runs if run.clock is None],
        no_epochs=[run.label for run in runs if run.updates_per_epoch is None],
        speed=speed_rows(runs),
        films=films_of(runs),
        without_pictures=[run.label for run in runs if run.stage == PRETRAIN and not run.pictures],
        attention=attention,
        tables=tables,
        homeless=homeless,
        environment=environment_rows(runs),
        commands=[(run.label, commands(run)) for run in runs],
        data={"runs": [curves_of(run, metrics, most) for run in runs]},
        plotly=Markup(get_plotlyjs()),
        footer="Made by scripts/report.py.",
    )
    size = len(html.encode())
    if size > MOST_BYTES:
        raise UserError(f"RUN: {len(runs)} runs make a page of {size / 1e6:.1f} MB, over 10 MB: give fewer at once")
    return html


def panels_of(metrics: dict[str, Metric], group: str) -> list[tuple[str, Metric]]:
    """Return the metrics of a group by name."""
    return [(name, metric) for name, metric in metrics.items() if metric.group == group]
