"""The settings and environment of the runs of a report, and the commands that repeat them, as strings."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from typing import Any

from util.config.command_line import MAINS
from util.results.run_folder import CONFIG_FILE, RunFolder, text_of
from util.runtime.logs import VERSIONS_OF
from util.runtime.reading import as_count

MISSING = "–"
Rows = list[list[str]]  # of a table, the first one is its head


def setting(value: Any) -> str:
    """Return a value as one would type it; empty if it is not set."""
    if value is None or value == "" or value == []:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def differing_settings(runs: Sequence[RunFolder]) -> Rows:
    """Return the settings that differ among the runs that have them; of one run, those that are not the default."""
    if len(runs) == 1:
        return changed_settings(runs[0])
    rows = []
    for key in dict.fromkeys(key for run in runs for key in run.config):
        values = [run.config[key] for run in runs if key in run.config]
        if any(value != values[0] for value in values):
            rows.append([key, *(setting(run.config.get(key)) or MISSING for run in runs)])
    return [["", *(run.label for run in runs)], *rows] if rows else []


def changed_settings(run: RunFolder) -> Rows:
    """Return the settings that are not the stage's default, with the default."""
    if run.stage not in MAINS:
        return []
    defaults = defaults_of(MAINS[run.stage].settings)
    rows = [
        [key, setting(value) or MISSING, setting(defaults[key]) or MISSING]
        for key, value in run.config.items()
        if key in defaults and value != defaults[key]
    ]
    return [["", run.label, "default"], *rows] if rows else []


def defaults_of(settings: type) -> dict[str, Any]:
    """Return the default of each field as config.yaml would have it.

    No instance is made: the defaults need not be valid together, a segmentation has no default data.
    """
    defaults = {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(settings)
    }
    return {name: list(value) if isinstance(value, tuple) else value for name, value in defaults.items()}


# --------------------------------------------------------------------------------------------------------
# Environment and commands
# --------------------------------------------------------------------------------------------------------

ENVIRONMENT = {  # keys of run.json, and their titles
    "git_commit": "commit",
    "git_dirty": "uncommitted changes",
    "python": "Python",
    **{package: package for package in VERSIONS_OF},
    "cuda": "CUDA of torch",
    "gpu": "GPU",
    "processes": "processes",
    "cpu": "CPU",
    "cores": "CPU cores",
    "platform": "system",
    "started": "last started",
}
ELSEWHERE = ("command", "stage", "recipe", "updates_per_epoch", "total_updates")  # keys that other sections show


def environment_rows(runs: Sequence[RunFolder]) -> Rows:
    """Return the environment in run.json, the keys of ENVIRONMENT first."""
    keys = dict.fromkeys([*ENVIRONMENT, *(key for run in runs for key in run.facts)])
    keys = [key for key in keys if key not in ELSEWHERE and any(key in run.facts for run in runs)]
    rows = [[ENVIRONMENT.get(key, key), *(setting(run.facts.get(key)) or MISSING for run in runs)] for key in keys]
    return [["", *(run.label for run in runs)], *rows] if rows else []


def commands(run: RunFolder) -> list[tuple[str, str]]:
    """Return what it takes to repeat a run: the purpose of each command, and the command."""
    facts, steps = run.facts, []
    if commit := text_of(facts.get("git_commit")):
        changed = ", which had uncommitted changes" if facts.get("git_dirty") else ""
        steps.append((f"The code{changed}", f"git checkout {shlex.quote(commit)}"))
    versions = [f"{package}=={facts[package]}" for package in VERSIONS_OF if text_of(facts.get(package))]
    if versions:
        steps.append(("The main packages", shlex.join(["pip", "install", *versions])))
    processes = as_count(facts.get("processes")) or 1
    if command := text_of(facts.get("command")):
        steps.append((f"As it was last started{f', in each of {processes} processes' * (processes > 1)}", command))
    if run.config and run.stage in MAINS:
        launcher = ["torchrun", f"--nproc_per_node={processes}"] if processes > 1 else ["python"]
        flags = ["--recipe", str(run.path / CONFIG_FILE), "--output_dir", "AGAIN"]
        flags += ["--resume", ""] if run.config.get("resume") else []
        from_settings = shlex.join([*launcher, MAINS[run.stage].program, *flags])
        steps.append(("From its saved settings, even if the recipe has changed", from_settings))
    return steps
