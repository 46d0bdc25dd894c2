"""Joint draws: seeded, the same for every plan, centred on the loads' own weights."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.cost.estimate import Tag, estimate
from moesim.engine import draws
from moesim.engine.draws import joint_draws
from moesim.graph.priced_step import Part


def test_drawn_weights_have_the_loads_own_weights_as_their_mean() -> None:
    weights = np.asarray([1.0, 1.0, 0.1])
    drawn = np.asarray([draw.load_weights for draw in joint_draws(4000, weights, 0)])
    np.testing.assert_allclose(drawn.sum(axis=1), 1.0)
    np.testing.assert_allclose(drawn.mean(axis=0), weights / weights.sum(), atol=0.015)


@pytest.mark.parametrize("seed", [0, 7])
def test_more_draws_begin_with_the_same_ones(seed: int) -> None:
    few, many = (joint_draws(count, np.ones(3), seed) for count in (2, 5))
    for one, other in zip(few, many, strict=False):
        assert one.normal == other.normal
        np.testing.assert_array_equal(one.load_weights, other.load_weights)


def test_families_that_came_later_leave_the_others_draws_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = np.asarray([1.0, 2.0])
    now = joint_draws(5, weights, 3)
    monkeypatch.setattr(draws, "LATER", ())
    for before, after in zip(joint_draws(5, weights, 3), now, strict=True):
        np.testing.assert_array_equal(before.load_weights, after.load_weights)
        assert before.normal == {name: after.normal[name] for name in draws.FAMILIES}
        assert after.normal["host_copy"] != 0


def test_each_price_errs_by_its_own_table_together_with_its_family() -> None:
    """A draw moves a prompt's experts by the error of the prompt tables, not by that of the decode ones."""
    loose, tight = (estimate(np.ones((1, 1)), Tag.MEASURED, "experts", sigma, "made up") for sigma in (0.5, 0.1))
    normal = {"experts": 2.0}
    assert Part((loose,)).seconds(normal) == pytest.approx(np.exp(1.0))
    assert Part((tight,)).seconds(normal) == pytest.approx(np.exp(0.2))
    assert Part((loose, tight)).seconds(normal) == pytest.approx(np.exp(1.0) + np.exp(0.2))
    assert Part((loose, tight)).seconds({"gemm": 2.0}) == Part((loose, tight)).seconds() == 2.0
