"""From the command line to settings: a recipe (YAML) stands for flags, and tyro parses them into a dataclass."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_origin, get_type_hints

import tyro
import yaml

from util.config.classifier import FinetuneConfig, LinprobeConfig
from util.config.groups import check, check_choice
from util.config.pretrain import PretrainConfig
from util.config.probe import ProbeConfig
from util.config.segment import SegmentConfig
from util.runtime.errors import UserError, nearest
from util.runtime.files import ROOT

RECIPES = ROOT / "recipes"
EXTENDS = "extends"  # key of a recipe: the recipe whose settings it starts from
Config = TypeVar("Config")


def parse_config(
    config_type: type[Config], arguments: Sequence[str], program: str, before: Sequence[str] = ()
) -> Config:
    """The recipe's flags, then the arguments' (which win), as a checked `config_type`; --help prints and exits.

    Args:
        before: flags over which the recipe's win.

    Raises UserError for an unknown flag (with the nearest one), an unreadable value or a failed check.
    """
    recipe = last_value("recipe", arguments)
    flags = [*before, *(read_recipe(recipe, config_type) if recipe else []), *arguments]
    console = io.StringIO()  # tyro draws a box around its errors; one line is wanted
    try:
        with contextlib.redirect_stderr(console):
            config, unknown = tyro.cli(
                config_type, prog=program, args=flags, use_underscores=True, return_unknown_args=True
            )
    except SystemExit as stop:
        if stop.code:
            raise UserError(first_line_of_box(console.getvalue())) from None
        raise
    if unknown:
        flag = unknown[0].partition("=")[0]
        if not flag.startswith("-"):
            raise UserError(f"{flag}: stands behind no flag that takes it (--help lists all)")
        spelt = "--" + flag.removeprefix("--").replace("-", "_")
        raise UserError(f"{flag}: unknown flag{nearest(spelt, known_flags(config_type))} (--help lists all)")
    return config


def parse_command(
    commands: Mapping[str, type], arguments: Sequence[str], program: str, about: str, after: str = ""
) -> tuple[Any, list[str]]:
    """The settings of `COMMAND [flags] [-- flags of the launcher]`, and those flags, which need `submit` among them.

    No command, or --help instead of one, prints what the program is about and exits.

    Args:
        after: what stands behind the command, for the message.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(about)
        raise SystemExit
    command, *rest = arguments
    if command not in commands:
        known = ", ".join(commands)
        raise UserError(f"{command}: unknown command{nearest(command, commands)} (one of {known}{after})")
    rest, launcher = (rest[: rest.index("--")], rest[rest.index("--") + 1 :]) if "--" in rest else (rest, [])
    flags = parse_config(commands[command], rest, f"{program} {command}")
    if launcher and not getattr(flags, "submit", False):
        raise UserError("`--`: flags of the launcher need --submit before it")
    return flags, launcher


def words(flag: str, text: str) -> list[str]:
    """As a shell cuts the text of a flag."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"--{flag} {text}: {error}") from error


def read_recipe(name_or_file: str, config_type: type) -> list[str]:
    """The flags that recipes/NAME.yaml or a YAML file stands for; unknown keys are refused by name."""
    known = [field.name for field in dataclasses.fields(config_type)]
    settings: dict[str, Any] = {}
    for name, own in reversed(recipe_chain(name_or_file)):
        for key in own:
            check(key in known, "recipe", name, f"unknown key {key}{nearest(str(key), known)}")
        settings |= own
    return as_flags(settings)


def recipe_chain(name_or_file: str) -> list[tuple[str, dict[str, Any]]]:
    """Name and own settings of a recipe, of the recipe that it `extends`, and so on; settings of the first win."""
    chain: list[tuple[str, dict[str, Any]]] = []
    name = name_or_file
    while name:
        check(name not in [before for before, _ in chain], "recipe", name_or_file, f"{name} extends itself")
        settings = read_settings(name)
        parent = settings.pop(EXTENDS, "")
        chain.append((name, settings))
        name = str(parent or "")
    return chain


def read_settings(name_or_file: str) -> dict[str, Any]:
    """What stands in recipes/NAME.yaml or a YAML file."""
    names = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    path = RECIPES / f"{name_or_file}.yaml" if name_or_file in names else Path(name_or_file)
    if not os.path.isfile(path):
        check_choice("recipe", name_or_file, names)
    try:
        settings = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        said = " ".join(str(error).split())
        raise UserError(f"--recipe {name_or_file}: cannot be read as YAML ({said})") from error
    settings = {} if settings is None else settings  # an empty file
    check(isinstance(settings, dict), "recipe", name_or_file, "must hold one `key: value` per line")
    return settings


def as_flags(settings: Mapping[str, Any]) -> list[str]:
    """The flags that set these fields."""
    flags: list[str] = []
    for key, value in settings.items():
        if isinstance(value, bool):
            flags.append(f"--{key}" if value else f"--no_{key}")
        else:
            flags += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    return flags


def last_value(flag: str, arguments: Sequence[str]) -> str:
    """What the last `--flag value` or `--flag=value` among the arguments says, or the empty string."""
    found = ""
    for place, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == f"--{flag}":
            found = value if equals else "".join(arguments[place + 1 : place + 2])
    return found


def known_flags(config_type: type) -> list[str]:
    """All spellings, with underscores, of the flags of `config_type`."""
    flags = []
    for name, hint in get_type_hints(config_type, include_extras=True).items():
        flags.append(f"--{name}")
        if hint is bool:
            flags.append(f"--no_{name}")
        for extra in getattr(hint, "__metadata__", ()):
            flags += getattr(extra, "aliases", None) or ()
    return flags


def flag_values(axis: str, config_type: type, flag: str) -> list[tuple[str, list[str]]]:
    """`name=value,value` as one point per value: what to call it, and the flags of `config_type` that say it.

    Args:
        flag: the one that `axis` came with, for the message of the UserError.
    """
    name, equals, values = axis.partition("=")
    right = equals and re.fullmatch(r"\w+", name) and all(values.split(","))
    check(bool(right), flag, axis, "write name=value,value")
    hint = get_type_hints(config_type).get(name)
    points = []
    for value in values.split(","):
        if hint is bool:
            check(value in ("true", "false"), flag, axis, f"{name} is true or false")
            flags = [f"--{name}" if value == "true" else f"--no_{name}"]
        else:
            flags = [f"--{name}", *(value.split() if get_origin(hint) is tuple else [value])]
        points.append((re.sub(r"[^\w.+-]+", "_", f"{name}_{value}"), flags))
    return points


def first_line_of_box(text: str) -> str:
    """What tyro says between the top of its box (or its title, where stdout takes no such signs) and the next rule."""
    lines = [line.strip("│ ") for line in text.splitlines()]
    rules = [i for i, line in enumerate(lines) if line.startswith(("╭", "─", "╰", "---"))]
    message = " ".join(lines[rules[0] + 1 : rules[1]]) if len(rules) > 1 else " ".join(text.split())
    return re.sub(r"^Error parsing (\w+: )?", "", message)  # the name of our class tells a user nothing


@dataclass(frozen=True)
class Main:
    """A script that does one kind of run."""

    program: str  # below the project's folder
    title: str
    settings: type
    metric: str  # of its `results.jsonl`


MAINS = {
    "pretrain": Main("main_pretrain.py", "pre-training", PretrainConfig, "knn"),
    "finetune": Main("main_finetune.py", "fine-tuning", FinetuneConfig, "top1"),
    "linprobe": Main("main_linprobe.py", "linear probing", LinprobeConfig, "top1"),
    "segment": Main("main_segment.py", "segmentation", SegmentConfig, "miou"),
    "probe": Main("scripts/probe.py", "probing of frozen features", ProbeConfig, "student/logistic"),
}
