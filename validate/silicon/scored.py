"""Predictions beside measurements as arrays: the rows that a score counts, by half of the cells, and their parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from validate.silicon.price import OK, Prediction
from validate.silicon.rows import SiliconRow, clean

Floats = NDArray[np.float64]

# Figures of a run and what people call them, in the order in which they are told. TTFT and TPOT in seconds.
FIGURES = {"tpot": "TPOT", "ttft": "TTFT", "tokens_per_s_per_gpu": "tokens/s/GPU"}
HALVES = ("odd", "even")
# Parts of a split with fewer rows in both halves together are gathered under OTHERS.
GATHERED = 20
OTHERS = "others"
_BUSY = (4, 16, 64, 256)  # upper ends of the buckets of concurrency


@dataclass(frozen=True)
class Half:
    """The clean, measured, aggregated MoE rows of one half of the cells.

    counted: a prediction for each of them. priced: those with times, n of them.
    """

    counted: tuple[Prediction, ...]
    priced: tuple[Prediction, ...]

    @cached_property
    def rows(self) -> list[SiliconRow]:
        """The priced rows, n."""
        return [one.row for one in self.priced]

    @cached_property
    def predicted(self) -> Mapping[str, Floats]:
        """Figure of FIGURES -> [n], in seconds and tokens/s/GPU."""
        return _figures(self.rows, [(one.ttft_s or 0.0, one.tpot_s or 0.0) for one in self.priced])

    @cached_property
    def measured(self) -> Mapping[str, Floats]:
        """Figure of FIGURES -> [n], in seconds and tokens/s/GPU."""
        return _figures(self.rows, [((row.ttft_ms or 0.0) * 1e-3, (row.tpot_ms or 0.0) * 1e-3) for row in self.rows])

    @cached_property
    def cells(self) -> NDArray[np.int64]:
        """Number of each priced row's cell (model, system, engine), [n]."""
        numbers: dict[tuple[str, str, str], int] = {}
        return np.array(
            [numbers.setdefault((row.model, row.system, row.engine), len(numbers)) for row in self.rows], dtype=np.int64
        )

    def logs(self, figure: str) -> Floats:
        """ln(measured / predicted), [n]; NaN where nothing positive is predicted."""
        with np.errstate(divide="ignore", invalid="ignore"):
            found: Floats = np.log(self.measured[figure] / self.predicted[figure])
        return np.where(np.isfinite(found), found, np.nan)


def _figures(rows: Sequence[SiliconRow], times_s: Sequence[tuple[float, float]]) -> dict[str, Floats]:
    """Figures from TTFT and TPOT of each row."""
    rates = [row.throughput(*both) for row, both in zip(rows, times_s, strict=True)]
    columns = {"tpot": [each for _, each in times_s], "ttft": [first for first, _ in times_s]}
    return {name: np.array(columns.get(name, rates), dtype=np.float64) for name in FIGURES}


def halves(found: Sequence[Prediction]) -> dict[str, Half]:
    """The rows that a score counts, by half of the cells: repeats once, rows without a measurement left out."""
    by_row = {id(one.row): one for one in found}
    rows = [row for row in clean(one.row for one in found) if row.tpot_ms is not None and row.ttft_ms is not None]
    sides = {}
    for half in HALVES:
        counted = tuple(by_row[id(row)] for row in rows if row.cell == half)
        sides[half] = Half(counted, tuple(one for one in counted if one.status == OK))
    return sides


def layout_label(row: SiliconRow) -> str:
    """Attention DP over 1; else EP over 1; else TP alone."""
    return "attention DP" if row.layout.attention_dp > 1 else "EP" if row.layout.ep > 1 else "TP"


def _busy(row: SiliconRow) -> tuple[float, str]:
    if row.concurrency is None:
        return float("inf"), "not said"
    for below, most in zip((0, *_BUSY), _BUSY, strict=False):
        if row.concurrency <= most:
            return most, f"{below + 1} to {most}"
    return float(2 * _BUSY[-1]), f"over {_BUSY[-1]}"


def _named(text: str) -> tuple[float, str]:
    return 0.0, text


# Split -> a row's part: what it is ordered by before its name, and its name.
SPLITS: dict[str, Callable[[SiliconRow], tuple[float, str]]] = {
    "layout": lambda row: (("TP", "EP", "attention DP").index(layout_label(row)), layout_label(row)),
    "engine": lambda row: _named(row.engine),
    "system": lambda row: _named(row.system),
    "model": lambda row: _named(row.model),
    "lengths": lambda row: (row.isl + 1e-6 * row.osl, f"{row.isl}/{row.osl}"),
    "concurrency": _busy,
}


def parts(sides: Mapping[str, Half], split: str) -> dict[str, dict[str, NDArray[np.int64]]]:
    """Part -> half -> indices of its priced rows, in order; small parts together as OTHERS, last."""
    labels = {half: [SPLITS[split](row) for row in side.rows] for half, side in sides.items()}
    sizes = Counter(label for found in labels.values() for label in found)
    whole = [label for label in sorted(sizes) if sizes[label] >= GATHERED or split == "layout"]
    named = {label: label[1] for label in whole}
    of = {half: np.array([named.get(label, OTHERS) for label in found], dtype=object) for half, found in labels.items()}
    names = [label[1] for label in whole] + ([OTHERS] if len(whole) < len(sizes) else [])
    return {name: {half: np.flatnonzero(of[half] == name) for half in sides} for name in names}
