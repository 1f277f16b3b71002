"""Turns, spreads, tables, patches, pauses of a GPU, and the search for the largest batch."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.bench import variants
from util.bench.memory import largest, largest_batch
from util.bench.profile import busy_and_gaps
from util.bench.timing import Spread, in_turn, patched, ratios, short, spread, table


def test_pauses_of_a_gpu_by_hand():
    spans = [(0.0, 10.0), (5.0, 12.0), (13.0, 20.0), (120.0, 130.0)]  # two streams, a short and a long pause
    assert busy_and_gaps(spans) == (12 + 7 + 10, [100.0])
    assert busy_and_gaps([]) == (0.0, [])


def test_all_take_turns():
    order = []
    results = in_turn({name: (lambda name=name: order.append(name) or len(order)) for name in "abc"}, 4, "turns")
    assert "".join(order) == "abcbcacababc"
    assert results == {"a": [1, 6, 8, 10], "b": [2, 4, 9, 11], "c": [3, 5, 7, 12]}


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=30))
def test_half_of_the_values_lie_in_the_spread(values):
    half = spread(values)
    inside = sum(half.lower <= x <= half.upper for x in values)
    assert half.lower <= half.median <= half.upper
    assert inside >= len(values) // 2 - 1
    assert ratios(values, values) == Spread(1, 1, 1)


@given(st.floats(1e-6, 1e9))
def test_short_numbers_keep_their_digits(value):
    text = short(value)
    assert "e" not in text
    assert float(text) == pytest.approx(value, rel=0.006)


def test_a_table_is_aligned():
    text = table([{"name": "a", "n": "1"}, {"name": "long name", "n": "100"}])
    assert text == "name         n\na            1\nlong name  100"


def test_a_patch_is_taken_back():
    class Owner:
        def method(self) -> int:
            return 1

    owner = Owner()
    with patched(owner, "method", lambda method: lambda: method() + 1):
        assert owner.method() == 2
    assert owner.method() == 1
    assert not vars(owner)


@given(st.integers(0, 700), st.integers(2, 200))
def test_the_largest_that_fits(most, start):
    tried = []

    def fits(n: int) -> bool:
        tried.append(n)
        return n <= most

    size = largest(fits, start, lambda n: 1 if n < 64 else 8)
    expected = most if most >= 2 else 0
    assert size <= expected
    assert expected - size <= (0 if size < 63 else 8)
    assert size in tried or size == 0
    assert len(tried) <= 24


@pytest.mark.slow
def test_a_process_that_takes_too_much_memory_does_not_fit():
    (variant,) = variants("--forms mae --variants ours --batch_size 2 --find_batch --memory_gib 0.01")
    tried = []
    assert largest_batch(variant, lambda *tested: tried.append(tested)) == 0
    assert tried == [(2, False)]
