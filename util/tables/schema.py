"""Read the YAML files of tables and scales, and check what they hold; every error is one line that says where."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from util.runtime.errors import UserError, nearest

REQUIRED = object()  # default of a key that must be given


@dataclass(frozen=True)
class Key:
    """The values that a mapping may have under one of its keys."""

    types: type | tuple[type, ...]
    rule: str | Callable[[Any], str]  # ends the error `KEY VALUE RULE`
    default: Any = REQUIRED
    accepts: Callable[[Any], bool] = lambda value: True


def one_of(kind: str, names: Iterable[str]) -> Key:
    """Return an optional key whose value is one of these names."""
    return Key(str, lambda value: f"is no {kind}{nearest(str(value), names)}", "", lambda value: value in names)


def check_mapping(where: str, mapping: Any, keys: Mapping[str, Key] | None = None) -> dict[str, Any]:
    """Return the mapping, with the defaults of the keys that it leaves out; `keys` None allows any key.

    Raises:
        UserError: it is no mapping, has an unknown key, lacks a required one, or a value breaks its key's rule.
    """
    if not isinstance(mapping, dict):
        raise UserError(f"{where}: {mapping!r} must be a mapping")
    if keys is None:
        return mapping
    for name in mapping:
        if name not in keys:
            raise UserError(f"{where}: unknown key {name}{nearest(str(name), keys)}")
    for name, key in keys.items():
        if name not in mapping and key.default is REQUIRED:
            raise UserError(f"{where}: {name} is missing")
        if name in mapping and not (isinstance(mapping[name], key.types) and key.accepts(mapping[name])):
            rule = key.rule if isinstance(key.rule, str) else key.rule(mapping[name])
            raise UserError(f"{where}: {name} {mapping[name]} {rule}")
    return {name: mapping.get(name, key.default) for name, key in keys.items()}


class UniqueKeys(yaml.SafeLoader):
    """Refuse a key that is written twice; SafeLoader would silently take the second value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names = [key.value for key, _ in node.value]
        for (key, _), name in zip(node.value, names, strict=True):
            if names.count(name) > 1:
                raise yaml.MarkedYAMLError(problem=f"{name} is there twice", problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a mapping from a YAML file; UserError where it is none or a key comes twice."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), UniqueKeys)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path.name}: cannot be read as YAML ({' '.join(str(error).split())})") from error
    return check_mapping(path.name, content)
