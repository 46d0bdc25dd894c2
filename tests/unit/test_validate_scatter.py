"""Drawing runs from the profile's own samples."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from validate.hardware.scatter import Lots, scatter


def lots(draws: int = 4000, seed: int = 0) -> Lots:
    return Lots.drawn(draws, np.random.default_rng(seed))


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 9), st.integers(0, 2**31), st.booleans())
def test_a_draw_is_a_run_that_was_seen(points: int, ranks: int, runs: int, seed: int, relative: bool) -> None:
    rng = np.random.default_rng(seed)
    samples = [rng.uniform(1.0, 3.0, size=(ranks, runs)) for _ in range(points)]
    found = scatter(range(1, points + 1), samples, relative=relative)
    middle = np.full(ranks, 2.0)
    drawn = found.draw(np.full(ranks, 2.0), middle, lots(50, seed))
    seen = []
    for one in samples:
        median = np.median(one)
        seen += (2.0 * one / median if relative else np.maximum(2.0 + one - median, 0.0)).T.tolist()
    table = np.asarray(seen)
    for row in drawn:  # the ranks of one run stay together
        assert np.isclose(table, row).all(axis=1).any()


def test_tails_of_exchanges_do_not_grow_with_the_bytes_and_those_of_computing_do() -> None:
    samples = [np.asarray([[1.0] * 9 + [3.0]])]
    for relative, tail in ((True, 30.0), (False, 12.0)):
        drawn = scatter([1.0], samples, relative=relative).draw(np.ones(1), np.full(1, 10.0), lots())
        assert sorted(set(drawn.ravel().tolist())) == pytest.approx([10.0, tail])
        assert (drawn == tail).mean() == pytest.approx(0.1, abs=0.02)


def test_runs_come_from_the_nearest_sizes_of_each_rank() -> None:
    samples = [np.asarray([[1.0, 1.0 + size], [1.0, 1.0 + size]]) for size in (1, 10, 100, 1000, 10000)]
    found = scatter([1.0, 10.0, 100.0, 1000.0, 10000.0], samples, relative=False)
    drawn = found.draw(np.asarray([1.0, 10000.0]), np.zeros(2), lots())
    assert set(np.round(drawn[:, 0], 6)) == {0.0, 0.5, 5.0, 50.0}
    assert set(np.round(drawn[:, 1], 6)) == {0.0, 50.0, 500.0, 5000.0}


def test_nothing_takes_less_than_no_time_and_equal_lots_give_equal_runs() -> None:
    samples = [np.asarray([[1.0, 5.0, 9.0]])]
    found = scatter([1.0], samples, relative=False)
    drawn = found.draw(np.ones(1), np.asarray([2.0]), lots())
    assert drawn.min() == 0.0 and drawn.max() == 6.0
    slower = found.draw(np.ones(1), np.asarray([9.0]), lots())
    assert np.array_equal(slower, np.where(drawn > 0.0, drawn, -2.0) + 7.0)
