"""Two pieces of work at once, on a clock that is made up: what counts as beside, and what is said when nothing does."""

from __future__ import annotations

import itertools
import time
from types import SimpleNamespace

import pytest

from profiles import beside

CPU = SimpleNamespace(type="cpu")


def test_both_are_timed_alone_and_beside_each_other() -> None:
    both = beside.measure(
        None, CPU, lambda: time.sleep(0.001), lambda: time.sleep(0.002), repeats=5, pace=beside.Pace()
    )
    assert [len(one) for one in (both.alone_s, both.beside_s, both.product_alone_s, both.product_beside_s)].count(
        5
    ) >= 3
    # Sleeps do not disturb each other; a busy machine may only lengthen them.
    assert min(both.alone_s) >= 0.001 and min(both.product_beside_s) >= 0.002
    told = both.slowdowns()
    assert set(told) == {"slowdown", "beside_slowdown"} and 0.2 < told["slowdown"] < 5.0


def test_every_rank_keeps_step_and_counts_as_the_slowest() -> None:
    starts = itertools.count()
    both = beside.measure(
        None, CPU, lambda: None, lambda: time.sleep(0.001), repeats=2,
        pace=beside.Pace(start=lambda: next(starts), most=lambda value: max(value, 0.5) if value else 0.0),
    )  # fmt: skip
    assert set(both.beside_s) == set(both.product_beside_s) == {0.5}  # another rank took half a second
    assert next(starts) >= 2 + 2 + 1 + 2 * 2


def test_products_that_end_too_early_on_some_rank_are_told() -> None:
    with pytest.raises(beside.NeverTogether, match="again and again"):
        beside.measure(
            None, CPU, lambda: None, lambda: time.sleep(0.0005), repeats=2,
            pace=beside.Pace(most=lambda value: 1.0),  # some rank always says so
        )  # fmt: skip
