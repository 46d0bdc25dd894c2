"""Max-min fair rates worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.errors import BadInput
from moesim.network.sharing import max_min

INF = np.inf
LINE = [[1, 1], [1, 0], [0, 1]]  # one flow over both links of a line, one over each


@pytest.mark.parametrize(
    ("demand", "usage", "capacity", "rates"),
    [
        # The classic line: all alike; then a wide second link, which only its own flow can use.
        ([INF, INF, INF], LINE, [1, 1], [0.5, 0.5, 0.5]),
        ([INF, INF, INF], LINE, [1, 2], [0.5, 0.5, 1.5]),
        # A flow that wants less leaves the rest to the others.
        ([0.2, INF, INF], LINE, [1, 1], [0.2, 0.8, 0.8]),
        ([INF, 0.1, INF], LINE, [1, 1], [0.5, 0.1, 0.5]),
        # One link, rising demands: 2, then (10 - 2) / 3 caps nothing, 2.6, then the last two share 5.4.
        ([2.0, 2.6, 4.0, 5.0], [[1], [1], [1], [1]], [10], [2.0, 2.6, 2.7, 2.7]),
        # Bertsekas and Gallager's kind of example: three links, five flows; the middle link is full first, at 1/3.
        (
            [INF] * 5,
            [[1, 1, 0], [0, 1, 0], [0, 1, 1], [1, 0, 0], [0, 0, 1]],
            [1, 1, 2],
            [1 / 3, 1 / 3, 1 / 3, 2 / 3, 5 / 3],
        ),
        # A flow that takes two units of the link for one of its rate.
        ([INF, INF], [[2], [1]], [3], [1.0, 1.0]),
        # Full links stop their flows at once; the others rise to their demands.
        ([INF, 0.7], [[1, 0], [0, 1]], [0, 1], [0.0, 0.7]),
        ([INF, 1.0], [[0], [1]], [1], [INF, 1.0]),
        ([], np.zeros((0, 2)), [1, 1], []),
    ],
)
def test_by_hand(demand, usage, capacity, rates):
    np.testing.assert_allclose(max_min(demand, usage, capacity), rates, rtol=1e-12)


def test_shapes_and_values_are_checked():
    with pytest.raises(BadInput, match="do not fit"):
        max_min([1.0], [[1.0, 1.0]], [1.0])
    with pytest.raises(BadInput, match="negative or not a number"):
        max_min([1.0], [[-1.0]], [1.0])
