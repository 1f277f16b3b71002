"""From the command line to settings: a recipe (YAML) is read as flags, and tyro parses all flags into a dataclass."""

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

from util.config.checks import check, check_choice
from util.config.classifier import FinetuneConfig, LinprobeConfig
from util.config.flags import check_flags, without_local_rank
from util.config.pretrain import PretrainConfig
from util.config.probe import ProbeConfig
from util.config.segment import SegmentConfig
from util.runtime.errors import UserError, nearest, one_line
from util.runtime.files import ROOT

RECIPES = ROOT / "recipes"
EXTENDS = "extends"  # key of a recipe: the recipe whose settings it starts from
Config = TypeVar("Config")


def parse_config(
    config_type: type[Config], arguments: Sequence[str], program: str, before: Sequence[str] = ()
) -> Config:
    """Return a checked `config_type` from the recipe's flags and the arguments, which win; --help prints and exits.

    Args:
        before: flags over which the recipe's win.

    Raises:
        UserError: a flag is unknown (the message has the nearest one), a value is unreadable, or a check fails.
    """
    arguments = without_local_rank(arguments)
    recipe = last_value("recipe", arguments)
    flags = [*before, *(read_recipe(recipe, config_type) if recipe else []), *arguments]
    if not {"-h", "--help"} & set(flags):
        check_flags(config_type, flags)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # tyro draws a box around its errors
            return tyro.cli(config_type, prog=program, args=flags, use_underscores=True)
    except SystemExit as stop:
        if not stop.code:
            raise
        if isinstance(stop.__context__, UserError):  # of the config's own checks, which tyro turns into an exit
            raise stop.__context__ from None
        raise UserError(f"{shlex.join(arguments)}: cannot be read as flags (--help lists all)") from None


def parse_command(
    commands: Mapping[str, type], arguments: Sequence[str], program: str, description: str, after: str = ""
) -> tuple[Any, list[str]]:
    """Parse `COMMAND [flags] [-- launcher flags]` and return the command's settings and the launcher's flags.

    Launcher flags need --submit among the command's. Without a command, or with --help in its place, the description is
    printed and the program exits.

    Args:
        after: text for the message, says what follows the command.

    Raises:
        UserError: the command is unknown, or its flags are wrong.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(description)
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


def split_like_shell(flag: str, text: str) -> list[str]:
    """Split the text of a flag at spaces as a shell would; UserError if a quotation is not closed."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"--{flag} {text}: {error}") from error


def read_recipe(name_or_file: str, config_type: type) -> list[str]:
    """Return the flags of recipes/NAME.yaml or of a YAML file; UserError names an unknown key."""
    known = [field.name for field in dataclasses.fields(config_type)]
    settings: dict[str, Any] = {}
    for name, own in reversed(recipe_chain(name_or_file)):
        for key in own:
            check(key in known, "recipe", name, f"unknown key {key}{nearest(str(key), known)}")
        settings |= own
    return as_flags(settings)


def recipe_chain(name_or_file: str) -> list[tuple[str, dict[str, Any]]]:
    """Return names and own settings of a recipe, of the recipe that it `extends`, and so on; the first ones win."""
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
    """Read recipes/NAME.yaml or a YAML file; UserError if it is missing or not one mapping."""
    names = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    path = RECIPES / f"{name_or_file}.yaml" if name_or_file in names else Path(name_or_file)
    if not os.path.isfile(path):
        check_choice("recipe", name_or_file, names)
    try:
        settings = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--recipe {name_or_file}: cannot be read as YAML ({one_line(str(error))})") from error
    settings = {} if settings is None else settings  # an empty file
    check(isinstance(settings, dict), "recipe", name_or_file, "must hold one `key: value` per line")
    return settings


def as_flags(settings: Mapping[str, Any]) -> list[str]:
    """Return the flags that set these fields."""
    flags: list[str] = []
    for key, value in settings.items():
        if isinstance(value, bool):
            flags.append(f"--{key}" if value else f"--no_{key}")
        else:
            flags += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    return flags


def last_value(flag: str, arguments: Sequence[str]) -> str:
    """Return the value of the last `--flag value` or `--flag=value` among the arguments, "" if there is none."""
    last = ""
    for position, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == f"--{flag}":
            last = value if equals else "".join(arguments[position + 1 : position + 2])
    return last


def flag_values(axis: str, config_type: type, flag: str) -> list[tuple[str, list[str]]]:
    """Read an axis `name=value,value` as points: for each value a label and the flags of `config_type` that set it.

    Args:
        flag: the flag that `axis` came with, for the message of the UserError.
    """
    name, equals, values = axis.partition("=")
    well_formed = equals and re.fullmatch(r"\w+", name) and all(values.split(","))
    check(bool(well_formed), flag, axis, "write name=value,value")
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


@dataclass(frozen=True)
class Main:
    """A script that does one kind of run."""

    program: str  # path in the project's folder
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
