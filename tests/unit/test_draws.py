"""Joint draws: seeded, the same for every plan, centred on the loads' own weights."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.engine.draws import joint_draws


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
