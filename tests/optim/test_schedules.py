"""Learning rate and momentum against tables worked out by hand, and what holds for all of them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from util.optim.schedules import learning_rate, momentum_decay, polynomial_rate

quick = settings(max_examples=100, deadline=None)
HALF = math.sqrt(0.5)  # cosine of 45 degrees

# total 100, warm-up 10, peak 2, end 0: the cosine at 0, 45, 60, 90, 120, 135 and 180 degrees
TABLE = {0: 0, 1: 0.2, 5: 1, 9: 1.8, 10: 2, 32.5: 1 + HALF, 40: 1.5, 55: 1, 70: 0.5, 77.5: 1 - HALF, 100: 0}


@pytest.mark.parametrize("update", TABLE)
def test_learning_rate_table(update):
    assert learning_rate(update, 100, 10, 2.0, 0.0) == pytest.approx(TABLE[update], abs=1e-12)


@pytest.mark.parametrize("update", TABLE)
def test_the_end_lifts_the_cosine_and_not_the_warm_up(update):
    expected = TABLE[update] if update < 10 else 0.5 + TABLE[update] * 1.5 / 2
    assert learning_rate(update, 100, 10, 2.0, 0.5) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("update", "total", "warmup", "expected"),
    [
        (0, 8, 0, 1),  # no warm-up: the first update is at the peak
        (2, 8, 0, 0.5 + HALF / 2),
        (4, 8, 0, 0.5),
        (8, 8, 0, 0),
        (1, 12, 2.5, 0.4),  # a fraction of an epoch
        (2, 12, 2.5, 0.8),
        (3, 12, 2.5, 0.5 + 0.5 * math.cos(math.pi / 19)),
        (12, 12, 2.5, 0),
        (3, 4, 4, 0.75),  # nothing but warm-up
        (4, 4, 4, 1),
        (0, 1, 0, 1),
        (9, 8, 2, 0),  # beyond the end it stays there
    ],
)
def test_learning_rate_at_the_edges(update, total, warmup, expected):
    assert learning_rate(update, total, warmup, 1.0, 0.0) == pytest.approx(expected, abs=1e-12)


@st.composite
def runs(draw) -> tuple[int, float, float, float]:
    """total, warm-up (whole or not), peak, end, at least one update behind the warm-up."""
    total = draw(st.integers(2, 5000))
    warmup = draw(st.one_of(st.integers(0, total - 1), st.floats(0.25, total - 1)))
    peak = draw(st.floats(1e-6, 10))
    return total, warmup, peak, draw(st.floats(0, peak))


@quick
@given(runs(), st.data())
def test_learning_rate_stays_within_its_bounds_and_has_one_summit(run, data):
    total, warmup, peak, end = run
    a, b = sorted(data.draw(st.tuples(st.integers(0, total), st.integers(0, total))))
    low, high = learning_rate(a, *run), learning_rate(b, *run)
    slack = 1e-12 * peak
    assert 0 <= low <= peak + slack
    if b < warmup:
        assert low <= high
    if a >= warmup:
        assert high <= low + slack
        assert high >= end - slack


@quick
@given(runs())
def test_learning_rate_ends_at_the_end_and_warms_up_in_equal_steps(run):
    total, warmup, peak, end = run
    assert learning_rate(total, *run) == pytest.approx(end, abs=1e-9 * peak)
    rates = [learning_rate(update, *run) for update in range(min(math.ceil(warmup), 50))]
    assert rates == pytest.approx([peak / warmup * update for update in range(len(rates))])


@quick
@given(runs())
def test_learning_rate_has_no_jump_at_the_joint(run):
    warmup, peak = run[1:3]
    assert learning_rate(warmup, *run) == pytest.approx(peak, rel=1e-12)
    for near in (warmup - 1e-7, warmup + 1e-7) if warmup else (1e-7,):
        assert learning_rate(near, *run) == pytest.approx(peak, rel=1e-6)


# total 8, .9 to 1: 1 - .1 (1 + cos) / 2
@pytest.mark.parametrize(
    ("update", "expected"), [(0, 0.9), (2, 0.95 - 0.05 * HALF), (4, 0.95), (6, 0.95 + 0.05 * HALF), (8, 1.0), (9, 1.0)]
)
def test_momentum_table(update, expected):
    assert momentum_decay(update, 8, 0.9, 1.0) == pytest.approx(expected, abs=1e-12)


def test_momentum_of_the_paper_stays_near_its_start_for_the_first_epochs():
    updates = 1600 * 312  # of ImageNet
    assert momentum_decay(0, updates, 0.996, 1.0) == 0.996
    assert momentum_decay(updates // 2, updates, 0.996, 1.0) == pytest.approx(0.998)
    assert momentum_decay(40 * 312, updates, 0.996, 1.0) == pytest.approx(0.996 + 0.002 * (1 - math.cos(math.pi / 40)))


@quick
@given(st.integers(1, 5000), st.floats(0, 1), st.floats(0, 1), st.data())
def test_momentum_goes_from_start_to_end_and_never_back(total, start, end, data):
    a, b = sorted(data.draw(st.tuples(st.integers(0, total), st.integers(0, total))))
    first, second = momentum_decay(a, total, start, end), momentum_decay(b, total, start, end)
    assert (second - first) * (end - start) >= -1e-12
    assert min(start, end) - 1e-12 <= first <= max(start, end) + 1e-12
    assert momentum_decay(0, total, start, end) == pytest.approx(start, abs=1e-12)
    assert momentum_decay(total, total, start, end) == pytest.approx(end, abs=1e-12)


def test_equal_ends_are_a_constant():
    assert {momentum_decay(update, 7, 0.99, 0.99) for update in range(8)} == {0.99}


@pytest.mark.parametrize(
    ("update", "power", "expected"),
    [(0, 1, 0), (5, 1, 1), (10, 1, 2), (55, 1, 1.1), (100, 1, 0.2), (120, 1, 0.2), (55, 2, 0.2 + 1.8 / 4), (10, 2, 2)],
)
def test_polynomial_rate_table(update, power, expected):
    """Total 100, warm-up 10, peak 2, end .2."""
    assert polynomial_rate(update, 100, 10, 2.0, 0.2, power) == pytest.approx(expected, abs=1e-12)
