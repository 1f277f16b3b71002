"""Flags checked against the fields of a config before tyro parses them, so that a mistake is one line of our own."""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from tyro.conf import Positional

from util.runtime.errors import UserError, nearest

LAUNCH_FLAG = "--local_rank"  # torch.distributed.launch adds it; the environment says the same
SUBMIT = "is a flag of scripts/submit.py: python scripts/submit.py pretrain --nodes 8 -- FLAGS"
REPLACED = {  # flags of MAE's scripts -> what to use here
    "--use_volta32": "give --constraint to scripts/submit.py, or leave it out",
    "--world_size": "torchrun gives the number of processes, leave it out",
    "--dist_on_itp": "torchrun does this, leave it out",
    "--dist_url": "torchrun does this, leave it out",
    "--distributed": "torchrun does this, leave it out",
    **dict.fromkeys(("--nodes", "--ngpus", "--job_dir", "--partition", "--timeout", "--comment"), SUBMIT),
}


def without_local_rank(flags: Sequence[str]) -> list[str]:
    """Leave out the --local_rank (or --local-rank) that torch.distributed.launch appends."""
    remaining, skip = [], False
    for flag in flags:
        name, equals, _ = flag.partition("=")
        is_local_rank = name.replace("-", "_") == LAUNCH_FLAG.replace("-", "_")
        if not is_local_rank and not (skip and flag.isdecimal()):
            remaining.append(flag)
        skip = is_local_rank and not equals
    return remaining


def check_flags(config_type: type, flags: Sequence[str]) -> None:
    """Raise UserError at the first flag that `config_type` does not have, or whose values have another type or number.

    Ranges and what depends on several flags are checked when the config is made.
    """
    fields, positional = flag_types(config_type)
    for flag, values in groups(flags):
        if not flag:
            positional = take_positional(positional, values)
            continue
        name = spelled(flag)
        if name not in fields:
            raise unknown_flag(flag, fields)
        hint = fields[name]
        extra = values[number_of_values(hint, values) :]
        check_values(flag, hint, values[: len(values) - len(extra)])
        positional = take_positional(positional, extra)
    for name in positional:
        if not hasattr(config_type, name):  # a field without a default
            raise UserError(f"{name.upper()}: is missing (--help lists all)")


def flag_types(config_type: type) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the type behind each spelling of a flag (`--alpha`, `--w_bc`, `--no_pin_mem`), and of each positional."""
    flags: dict[str, Any] = {}
    positional: dict[str, Any] = {}
    for name, hint in get_type_hints(config_type, include_extras=True).items():
        plain, extras = (get_args(hint)[0], hint.__metadata__) if get_origin(hint) is Annotated else (hint, ())
        if any(extra in Positional[int].__metadata__ for extra in extras):
            positional[name] = plain
            continue
        aliases = [alias for extra in extras for alias in getattr(extra, "aliases", None) or ()]
        for spelling in (f"--{name}", *aliases):
            flags[spelling] = plain
        if plain is bool:
            flags[f"--no_{name}"] = bool
    return flags, positional


def spelled(flag: str) -> str:
    """Spell a flag with underscores: --batch-size as --batch_size."""
    return "--" + flag.removeprefix("--").replace("-", "_")


def groups(flags: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield each flag with the values that follow it; the values before the first flag belong to the flag ""."""
    flag, values = "", []
    for argument in flags:
        if is_flag(argument):
            yield flag, values
            flag, equals, value = argument.partition("=")
            values = [value] if equals else []
        else:
            values.append(argument)
    yield flag, values


def is_flag(argument: str) -> bool:
    """True for --name and -n, not for a negative number and a single dash."""
    if not argument.startswith("-") or argument == "-":
        return False
    try:
        float(argument)
    except ValueError:
        return True
    return False


def unknown_flag(flag: str, known: dict[str, Any]) -> UserError:
    """Make the error for a flag that does not exist: with its replacement, or the nearest flag that does."""
    name = spelled(flag)
    if name in REPLACED:
        return UserError(f"{flag}: {REPLACED[name]}")
    return UserError(f"{flag}: unknown flag{nearest(name, known)} (--help lists all)")


def take_positional(positional: dict[str, Any], values: Sequence[str]) -> dict[str, Any]:
    """Give values to the positional fields in their order and return the fields that are left.

    Raises:
        UserError: there are more values than fields.
    """
    left = dict(positional)
    for value in values:
        if not left:
            raise UserError(f"{value}: no flag takes this value (--help lists all)")
        name = next(iter(left))
        if not is_sequence(left[name]):
            check_values(name.upper(), left.pop(name), [value])
    return left


def is_sequence(hint: Any) -> bool:
    """True for tuple[X, ...], which takes any number of values."""
    return get_origin(hint) is tuple and get_args(hint)[-1] is Ellipsis


def alternatives(hint: Any) -> list[Any]:
    """Return the types of a union, or the type itself."""
    return list(get_args(hint)) if get_origin(hint) in (Union, types.UnionType) else [hint]


def number_of_values(hint: Any, values: Sequence[str]) -> int:
    """Return how many of the values after a flag belong to it; what is left over may be positional.

    A union that holds a tuple takes all, like a sequence.
    """
    if hint is bool:
        return 0
    kinds = alternatives(hint)
    tuples = [get_args(kind) for kind in kinds if get_origin(kind) is tuple]
    if is_sequence(hint) or (tuples and len(kinds) > 1):
        return len(values)
    return min(len(values), len(tuples[0]) if tuples else 1)


def check_values(flag: str, hint: Any, values: Sequence[str]) -> None:
    """Raise UserError `flag values: fix` unless one alternative of the type takes them."""
    problems = [problem_with(one, values) for one in alternatives(hint)]
    if None not in problems:
        shown = " ".join([flag, *values])
        raise UserError(f"{shown}: {next(problem for problem in problems if problem)}")


def problem_with(hint: Any, values: Sequence[str]) -> str | None:
    """Return what is wrong with the values of a flag of one type (no union); None if nothing is."""
    if hint is type(None):
        return None if list(values) == ["None"] else ""
    if hint is bool:
        return None if not values else "takes no value"
    if get_origin(hint) is tuple:
        kinds = get_args(hint)
        if is_sequence(hint):
            return next(filter(None, (problem_with(kinds[0], [value]) for value in values)), None)
        if len(values) != len(kinds):
            return f"needs {len(kinds)} values"
        return next(filter(None, map(problem_with, kinds, ([value] for value in values))), None)
    if len(values) != 1:
        return "needs a value"
    if get_origin(hint) is Literal:
        choices = list(map(str, get_args(hint)))
        fits = values[0] in choices
        return None if fits else f"unknown{nearest(values[0], choices)} (one of {', '.join(choices)})"
    if hint in (int, float):
        try:
            hint(values[0])
        except ValueError:
            return "must be a whole number" if hint is int else "must be a number"
    return None
