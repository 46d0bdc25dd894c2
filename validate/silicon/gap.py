"""How much larger errors are on blind cells than on calibrated ones, and how sure that is with so few cells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from validate.silicon.score import markdown_table
from validate.silicon.scored import FIGURES, HALVES, Half

Floats = NDArray[np.float64]

LEVEL, DRAWS = 0.9, 4000

READ_GAP = (
    "Mean absolute error on odd cells over that on even ones. The rows of a cell share their errors, so the interval "
    "comes from drawing whole cells with replacement within each half ({odd} odd cells, {even} even ones)."
)


@dataclass(frozen=True)
class Gap:
    """Mean error of odd cells over that of even ones, and the interval of LEVEL over draws of cells."""

    value: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        """JSON-ready."""
        return {**vars(self), "level": LEVEL}


def gaps(sides: Mapping[str, Half], seed: int = 0) -> dict[str, Gap]:
    """Figure -> gap; nothing where a half has no priced row.

    A bootstrap over clusters (Davison and Hinkley, Bootstrap Methods and their Application, 1997, section 3.8).
    """
    if not all(sides[half].priced for half in HALVES):
        return {}
    found = {}
    for name, stream in zip(FIGURES, np.random.default_rng(seed).spawn(len(FIGURES)), strict=True):
        of = {half: _by_cell(sides[half], name) for half in HALVES}
        value = {half: float(sums.sum() / rows.sum()) for half, (sums, rows) in of.items()}
        drawn = {half: _drawn(*pair, rng) for (half, pair), rng in zip(of.items(), stream.spawn(2), strict=True)}
        low, high = np.quantile(drawn["odd"] / drawn["even"], [(1.0 - LEVEL) / 2.0, (1.0 + LEVEL) / 2.0])
        found[name] = Gap(value["odd"] / value["even"], float(low), float(high))
    return found


def _by_cell(side: Half, figure: str) -> tuple[Floats, Floats]:
    """Sum of absolute relative errors of each cell, and its rows: [cells] each."""
    errors = np.abs(side.predicted[figure] / side.measured[figure] - 1.0)
    return np.bincount(side.cells, weights=errors).astype(np.float64), np.bincount(side.cells).astype(np.float64)


def _drawn(sums: Floats, rows: Floats, rng: np.random.Generator) -> Floats:
    """Mean errors over draws of cells: [DRAWS]."""
    times = rng.multinomial(len(rows), np.full(len(rows), 1.0 / len(rows)), size=DRAWS)
    return np.asarray((times @ sums) / (times @ rows))


def gap_section(found: Mapping[str, Gap], sides: Mapping[str, Half]) -> str:
    """What to read and the table, as Markdown."""
    cells = {half: len(np.unique(sides[half].cells)) for half in HALVES}
    lines = [[FIGURES[name], f"{one.value:.2f}x", f"{one.low:.2f}x to {one.high:.2f}x"] for name, one in found.items()]
    return f"{READ_GAP.format(**cells)}\n\n{markdown_table(['figure', 'odd over even', '90 % interval'], lines)}"
