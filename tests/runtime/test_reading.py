"""Small YAML and JSON files, damaged or hostile; tests/report/test_damaged_runs.py has them in a run's folder."""

from __future__ import annotations

import os
import time

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from util.runtime.reading import (
    Unreadable,
    as_count,
    as_number,
    name_lines,
    parse_yaml,
    read_bytes,
    read_json_lines,
    read_mapping,
)

BOMB = "a: &a [x, x]\n" + "".join(
    f"{chr(n + 1)}: &{chr(n + 1)} [{', '.join([f'*{chr(n)}'] * 9)}]\n" for n in range(97, 110)
)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.yaml", BOMB, "has a YAML alias or tag"),
        ("a.yaml", "a: !!python/name:os.system", "has a YAML alias or tag"),
        ("a.yaml", "[" * 900_000, "nest"),  # libyaml has a limit of its own
        ("a.yaml", "[" * 50 + "]" * 50, "is nested more than 32 levels deep"),
        ("a.yaml", "- " * 100 + "a", "is nested more than 32 levels deep"),
        ("a.yaml", f"a: {'9' * 400}", "has a number of 400 digits"),
        ("a.yaml", f"a: 0x{'f' * 900_000}", "has a number of 900002 digits"),
        ("a.yaml", f"a: 1{':59' * 300_000}", "has a number of 900001 digits"),
        ("a.yaml", "a: [1", "is not valid YAML"),
        ("a.yaml", "a: 2026-99-99", "is not valid YAML"),
        ("a.yaml", b"a: \xff", "is not valid YAML ('utf-8' codec"),
        ("a.yaml", "", "holds NoneType instead of `key: value`"),
        ("a.yaml", "- 1", "holds list instead of `key: value`"),
        ("a.json", "[" * 900_000, "is not valid JSON"),
        ("a.json", '{"a": ' + "[" * 50 + "]" * 50 + "}", "is nested more than 32 levels deep"),
        ("a.json", f'{{"a": {"9" * 400}}}', "has a number of 400 digits"),
        ("a.json", '{"a": 1', "is not valid JSON"),
        ("a.json", b'{"a": "\xff"}', "is not valid JSON ('utf-8' codec"),
        ("a.json", "x" * (2**20 + 1), "is too large (1048577 bytes, at most 1048576 are read)"),
    ],
)
def test_what_is_damaged_or_hostile_is_refused_within_a_second_or_two(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    start = time.process_time()
    with pytest.raises(Unreadable) as error:
        read_mapping(path)
    assert message in str(error.value)
    assert time.process_time() - start < 5  # the bomb would unfold to 10^13 strings


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer
    for path, message in ((tmp_path, "is a folder"), (tmp_path / "pipe", "is not a regular file")):
        with pytest.raises(Unreadable, match=message):
            read_bytes(path)
    with pytest.raises(Unreadable, match="null"):
        read_bytes(tmp_path / "a\0b")
    with pytest.raises(FileNotFoundError):
        read_bytes(tmp_path / "missing")
    (tmp_path / "sparse").touch()
    os.truncate(tmp_path / "sparse", 2**40)
    with pytest.raises(Unreadable, match="is too large"):
        read_bytes(tmp_path / "sparse", 2**28)


# without control characters and line separators, which PyYAML does not always read back as it wrote them
text = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cf", "Zl", "Zp")))
values_of_settings = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**17), 10**17) | st.floats(allow_nan=False) | text,
    lambda children: st.lists(children, max_size=3) | st.dictionaries(text, children, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(text, values_of_settings))
def test_whatever_safe_dump_writes_of_plain_settings_is_read_back(values):
    assert parse_yaml(yaml.safe_dump(values, allow_unicode=True).encode()) == values


def test_lines_are_read_or_counted(tmp_path):
    (tmp_path / "log.jsonl").write_bytes(b'{"a": 1}\n\n[1]\n{"b": "\xe2\x80\xa8"}\n{"c": "\xff"}\n{"d": 1')
    lines, damaged = read_json_lines(tmp_path / "log.jsonl")
    assert lines == [(1, {"a": 1}), (4, {"b": "\u2028"})]
    assert damaged == [3, 5, 6]


def test_counts_numbers_and_names_of_lines():
    values = (0, 7, True, -1, 2**60, 1.0, "1", None)
    assert [as_count(value) for value in values] == [0, 7, *[None] * 6]
    assert [as_number(value) for value in (1, "inf", "1", True, None, [])] == [1.0, float("inf"), *[None] * 4]
    assert [name_lines(list(range(n))) for n in (1, 2, 9)] == [
        "line 0", "lines 0 and 1", "lines 0, 1, 2, 3, 4 and 4 more"
    ]  # fmt: skip
