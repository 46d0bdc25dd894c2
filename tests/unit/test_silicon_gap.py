"""The gap between halves: its value by hand, and an interval over cells, not rows."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.silicon_rows import row
from validate.silicon.gap import gap_section, gaps
from validate.silicon.price import Prediction
from validate.silicon.scored import Half


def half(*errors_by_cell: list[float]) -> Half:
    """Rows of measured TPOT 10 ms and TTFT 100 ms; each list is a cell's relative errors."""
    found = []
    for cell, errors in enumerate(errors_by_cell):
        for error in errors:
            one = replace(row(0), model=f"m{cell}", tpot_ms=10.0, ttft_ms=100.0)
            found.append(Prediction(one, 0.11, 0.01 * (1.0 + error)))
    return Half(tuple(found), tuple(found))


def test_the_value_is_the_ratio_of_mean_errors() -> None:
    sides = {"odd": half([0.2, -0.4], [0.3]), "even": half([0.1], [0.2, 0.1])}
    assert gaps(sides)["tpot"].value == pytest.approx((0.9 / 3) / (0.4 / 3))


def test_many_rows_of_few_cells_stay_unsure() -> None:
    """Sixty rows of two cells that differ: the interval reaches from one cell's error to the other's."""
    sides = {"odd": half([0.1] * 30, [0.3] * 30), "even": half([0.1] * 30, [0.1] * 30)}
    found = gaps(sides)["tpot"]
    assert (found.value, found.low, found.high) == pytest.approx((2.0, 1.0, 3.0))
    assert "2 odd cells, 2 even ones" in gap_section({"tpot": found}, sides)
    assert "| TPOT | 2.00x | 1.00x to 3.00x |" in gap_section({"tpot": found}, sides)


def test_equal_cells_are_sure() -> None:
    found = gaps({"odd": half([0.2], [0.2]), "even": half([0.1], [-0.1])})["tpot"]
    assert (found.low, found.high) == pytest.approx((2.0, 2.0))


def test_no_gap_without_both_halves() -> None:
    assert gaps({"odd": half([0.2]), "even": half()}) == {}
