"""Read small YAML and JSON files that may be damaged or hostile.

Every file is checked before its content is believed: it must be a regular file (opening a pipe would block, a device
has no end) and no larger than a limit. YAML aliases, tags, deep nesting and numbers of hundreds of digits are refused,
because they take memory or time out of all proportion to the size of the file.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

MOST_BYTES = 2**20  # settings take some KB
MOST_LOG_BYTES = 2**28  # 700,000 log lines
MOST_DEPTH = 32
MOST_DIGITS = 64
MOST_WHOLE = 2**50  # steps, epochs and bytes above are damage, and sums of them would overflow int64
YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast where libyaml is installed
NUMERIC = set("0123456789abcdefxoABCDEF_+-.:")  # also hexadecimal and sexagesimal


class Unreadable(ValueError):
    """The file cannot be read; the message continues a sentence that begins with its name."""


def read_bytes(path: Path, most_bytes: int = MOST_BYTES) -> bytes:
    """Return the content of a regular file.

    Raises:
        FileNotFoundError: there is no such file.
        Unreadable: it is a folder, a pipe or a device, is larger than `most_bytes`, or cannot be opened.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise Unreadable("is a folder" if stat.S_ISDIR(status.st_mode) else "is not a regular file")
        if status.st_size > most_bytes:
            raise Unreadable(f"is too large ({status.st_size} bytes, at most {most_bytes} are read)")
        with path.open("rb") as file:
            return file.read(most_bytes)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise Unreadable(f"cannot be read ({error.strerror})") from error
    except ValueError as error:  # a null byte in the path
        raise error if isinstance(error, Unreadable) else Unreadable(f"cannot be read ({error})") from error


def read_mapping(path: Path, most_bytes: int = MOST_BYTES) -> dict[str, Any]:
    """Return the mapping that a YAML file, or a JSON file by its suffix, holds.

    Raises:
        FileNotFoundError: there is no such file.
        Unreadable: see `read_bytes`, `parse_yaml` and `parse_json`; or the file holds no mapping.
    """
    data = read_bytes(path, most_bytes)
    values = parse_json(data) if path.suffix == ".json" else parse_yaml(data)
    if not isinstance(values, dict):
        raise Unreadable(f"holds {type(values).__name__} instead of `key: value`")
    return {str(key): value for key, value in values.items()}


def read_json_lines(path: Path, most_bytes: int = MOST_LOG_BYTES) -> tuple[list[tuple[int, dict]], list[int]]:
    """Return (line number, mapping) for each JSON line, and the numbers of the lines that are damaged.

    Empty lines are skipped; line numbers count from 1.

    Raises:
        FileNotFoundError: there is no such file.
        Unreadable: see `read_bytes`.
    """
    lines, damaged = [], []
    for number, text in enumerate(read_bytes(path, most_bytes).split(b"\n"), start=1):
        if not text.strip():
            continue
        try:
            values = parse_json(text) if len(text) <= MOST_BYTES else None
        except Unreadable:
            values = None
        if isinstance(values, dict):
            lines.append((number, values))
        else:
            damaged.append(number)
    return lines, damaged


def parse_json(data: bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
        Unreadable: it is not JSON in UTF-8, is nested too deeply, or has a number too long.
    """
    try:
        values = json.loads(data, parse_int=whole_number)
    except Unreadable:
        raise
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"is not valid JSON ({error})") from error
    check_depth(values)
    return values


def parse_yaml(data: bytes) -> Any:
    """Return the value of a YAML text; its events are checked before anything is built from them.

    Raises:
        Unreadable: it is not YAML in UTF-8, is nested too deeply, or has an alias, a tag, or a number too long.
    """
    try:
        text = data.decode()
        depth = 0
        for event in yaml.parse(text, YAML_LOADER):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MOST_DEPTH:
                raise Unreadable(f"is nested more than {MOST_DEPTH} levels deep")
            if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None):
                raise Unreadable("has a YAML alias or tag, which settings never need")
            if isinstance(event, yaml.ScalarEvent) and event.implicit[0] and not set(event.value) - NUMERIC:
                check_digits(event.value)
        return yaml.load(text, YAML_LOADER)
    except Unreadable:
        raise
    except (ValueError, yaml.YAMLError) as error:
        raise Unreadable(f"is not valid YAML ({' '.join(str(error).split())})") from error


def whole_number(digits: str) -> int:
    """Return the integer, see `check_digits`."""
    check_digits(digits)
    return int(digits)


def check_digits(digits: str) -> None:
    """Raise Unreadable for more than MOST_DIGITS digits, which take quadratic time to convert and fit no float."""
    if len(digits) > MOST_DIGITS:
        raise Unreadable(f"has a number of {len(digits)} digits")


def check_depth(values: Any) -> None:
    """Raise Unreadable where containers are nested more than MOST_DEPTH deep; printing them would recurse as deep."""
    level = [values]
    for _ in range(MOST_DEPTH + 1):
        level = [child for each in level for child in children_of(each)]
        if not level:
            return
    raise Unreadable(f"is nested more than {MOST_DEPTH} levels deep")


def children_of(value: Any) -> Iterable[Any]:
    """Return the values in a list or mapping, none for anything else."""
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def as_count(value: Any) -> int | None:
    """Return a number of steps, epochs or bytes, from 0 to MOST_WHOLE; None for anything else, true and false too."""
    right = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST_WHOLE
    return value if right else None


def as_number(value: Any) -> float | None:
    """Return a number of a log, "nan", "inf" and "-inf" among them; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str) and value not in ("nan", "inf", "-inf"):
        return None
    return float(value)


def name_lines(numbers: list[int], most: int = 5) -> str:
    """Return `line 2`, `lines 2 and 5`, or `lines 1, 2, 3, 4, 5 and 31 more`."""
    shown = [str(number) for number in numbers[:most]]
    if len(numbers) > most:
        shown.append(f"{len(numbers) - most} more")
    return f"line {shown[0]}" if len(shown) == 1 else f"lines {', '.join(shown[:-1])} and {shown[-1]}"
