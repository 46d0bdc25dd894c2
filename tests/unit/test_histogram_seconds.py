"""The grouped product's model of many rows at once is that of each row alone, to the last digit."""

from __future__ import annotations

import numpy as np
import pytest

from profiles.grouped import histogram_seconds

CONSTANTS = np.asarray([1e-5, 2e-5, 1e-6, 1e-8, 3e-8, 64.0, 2.5, 1e-9, 1.0, 0.3])


def by_hand(row: np.ndarray) -> float:
    """M of one row, slot by slot, in plain Python."""
    fixed, second, per_expert, per_pair, per_padded, tile, p, per_row, rows, share_padded = CONSTANTS.tolist()
    touched = pairs = padded = 0.0
    for tokens in row.tolist():
        if tokens > 0.0:
            share = min(tokens, 1.0)
            touched, pairs = touched + share, pairs + tokens
            padded += max(tokens + share * 0.5 * (tile - 1.0), share * tile)
    if pairs <= 0.0:
        return 0.0

    def norm(a: float, b: float) -> float:
        most = max(a, b)
        return most * ((a / most) ** p + (b / most) ** p) ** (1.0 / p)

    streamed = pairs + share_padded * (padded - pairs)
    busy = norm(touched * per_expert, padded * per_padded) + streamed * per_pair + pairs * rows * per_row
    return fixed + norm(busy, second)


@pytest.mark.parametrize("rows", [1, 3, 4, 11, 3000])
@pytest.mark.parametrize("slots", [1, 9, 36])
def test_rows_side_by_side_are_rows_alone(rows: int, slots: int) -> None:
    tokens = np.random.default_rng(rows).poisson(1.5, size=(rows, slots)) * 0.5
    tokens[0] = 0.0  # a rank that nobody sends to
    together = np.empty(rows)
    histogram_seconds(tokens, CONSTANTS, together)
    for row, seconds in zip(tokens, together, strict=True):
        alone = np.empty(1)
        histogram_seconds(row[None], CONSTANTS, alone)
        assert alone[0] == seconds == pytest.approx(by_hand(row), rel=1e-14)
    assert together[0] == 0.0
    assert rows == 1 or together[1:].min() > 0.0 or slots == 1
