"""90 % intervals of predictions of measured runs, made from even cells alone (conformal prediction).

An interval reaches from predicted / f to predicted x f, where ln f is the 90 % quantile of |ln(measured / predicted)|
over the rows of even cells: as wide as the errors were, with no assumption about their distribution. Where a
prediction tells how sure its own costs are (its sigma), the quantile is of |ln| / sigma and ln f is that times sigma,
if this makes intervals narrower at equal coverage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from validate.accuracy import coverage
from validate.silicon.price import Prediction
from validate.silicon.scored import FIGURES, Half

Floats = NDArray[np.float64]

LEVEL = 0.9
# Rows and cells below which a quantile tells nothing.
ROWS, CELLS = 20, 2
# Sigmas below this are taken for it: a run that waits for the front end alone is not sure to the last digit.
LEAST_SIGMA = 0.02


@dataclass(frozen=True)
class Width:
    """How wide intervals of a figure are.

    plain: the quantile of |ln(measured / predicted)|. scaled: that of |ln| / sigma, None where predictions tell no
    sigma. normalised: whether the scaled one makes intervals narrower at equal coverage, each even cell left out.
    """

    plain: float
    scaled: float | None
    normalised: bool

    def as_dict(self) -> dict[str, float | bool | None]:
        """JSON-ready, to four digits."""
        return {
            "plain": _short(self.plain),
            "scaled": None if self.scaled is None else _short(self.scaled),
            "normalised": self.normalised,
        }

    def log(self, sigma: float | None) -> float:
        """ln of the factor between a prediction and either end; sigma: the prediction's own, None where not told."""
        if self.normalised and self.scaled is not None and sigma is not None:
            return self.scaled * sigma
        return self.plain


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def width_of(told: Mapping[str, Any]) -> Width:
    """A width from `Width.as_dict`. Raises KeyError, TypeError or ValueError where it is none."""
    plain, scaled = float(told["plain"]), None if told["scaled"] is None else float(told["scaled"])
    if not all(0.0 <= value < math.inf for value in (plain, scaled or 0.0)):
        raise ValueError("no width")
    return Width(plain, scaled, bool(told["normalised"]))


def sigma_of(one: Prediction, figure: str) -> float | None:
    """One standard deviation of ln(true / predicted) by the errors of a prediction's own costs; None where not told."""
    if one.causes is None or one.ttft_s is None or one.tpot_s is None:
        return None
    ttft, tpot = (max(value, LEAST_SIGMA) for value in (one.causes.ttft_sigma, one.causes.tpot_sigma))
    if figure != "tokens_per_s_per_gpu":
        return ttft if figure == "ttft" else tpot
    decode_s = one.tpot_s * (one.row.osl - 1)
    return (one.ttft_s * ttft + decode_s * tpot) / (one.ttft_s + decode_s)


def calibrate(even: Half) -> dict[str, Width]:
    """Figure -> width, from the even half; empty where it has too few rows or cells."""
    found = {}
    for figure in FIGURES:
        sizes, sigmas, cells = _columns(even, figure)
        if len(sizes) < ROWS or len(np.unique(cells)) < CELLS:
            return {}
        scaled = None if sigmas is None else _quantile(sizes / sigmas)
        normalised = sigmas is not None and _spread(sizes, sigmas, cells) < _spread(sizes, np.ones(len(sizes)), cells)
        found[figure] = Width(_quantile(sizes), scaled, normalised)
    return found


def _columns(side: Half, figure: str) -> tuple[Floats, Floats | None, NDArray[np.int64]]:
    """|ln(measured / predicted)|, sigma (None unless every row tells one) and cell of the rows that have a figure."""
    sizes = np.abs(side.logs(figure))
    use = np.isfinite(sizes)
    sigmas = [sigma_of(one, figure) for one in side.priced]
    told = None if None in sigmas else np.array(sigmas, dtype=np.float64)[use]
    return sizes[use], told, side.cells[use]


def _quantile(sizes: Floats) -> float:
    """The LEVEL quantile, with the one place more that makes it hold for a row not yet seen."""
    rank = min(math.ceil((len(sizes) + 1) * LEVEL), len(sizes))
    return float(np.sort(sizes)[rank - 1])


def _left_out(sizes: Floats, cells: NDArray[np.int64]) -> Floats:
    """For each row the quantile of `sizes` over the other cells."""
    found = np.empty(len(sizes))
    for cell in np.unique(cells):
        found[cells == cell] = _quantile(sizes[cells != cell])
    return found


def _spread(sizes: Floats, sigmas: Floats, cells: NDArray[np.int64]) -> float:
    """Mean ln of the factor, each cell left out, once intervals are stretched to hold LEVEL of the rows exactly."""
    logs = np.maximum(_left_out(sizes / sigmas, cells) * sigmas, 1e-12)
    return float(_quantile(sizes / logs) * logs.mean())


def judged(widths: Mapping[str, Width], sides: Mapping[str, Half]) -> dict[str, Any]:
    """Figure -> its width, and how well intervals hold: on odd cells as they are, on even ones each cell left out.

    share: of rows inside. factor: between a prediction and either end, geometric mean. half_width: half of the interval
    over its middle, mean.
    """
    found: dict[str, Any] = {}
    for figure, width in widths.items():
        told: dict[str, Any] = {"level": LEVEL, **width.as_dict()}
        for half, side in sides.items():
            sizes, sigmas, cells = _columns(side, figure)
            own = sigmas if width.normalised and sigmas is not None else np.ones(len(sizes))
            if half == "even":
                logs = _left_out(sizes / own, cells) * own
            else:
                logs = np.array([width.log(sigma) for sigma in (sigmas if sigmas is not None else [None] * len(sizes))])
            told[half] = {
                "rows": len(sizes),
                "factor": float(np.exp(logs.mean())) if len(logs) else None,
                **coverage(np.exp(-logs), np.exp(logs), np.exp(sizes)),
            }
        found[figure] = told
    return found


def interval(one: Prediction, figure: str, value: float, widths: Mapping[str, Width]) -> dict[str, float] | None:
    """Interval of a predicted figure, in its unit; None for what the calibration is not of (not MoE, or pools)."""
    if figure not in widths or not (one.row.moe and one.row.aggregated):
        return None
    factor = math.exp(widths[figure].log(sigma_of(one, figure)))
    return {"low": value / factor, "high": value * factor, "level": LEVEL}


# Name in the JSON -> figure, and its value of a prediction's TTFT and TPOT.
_TOLD: dict[str, tuple[str, Callable[[Prediction, float, float], float]]] = {
    "ttft_ms": ("ttft", lambda _, ttft_s, tpot_s: ttft_s * 1e3),
    "tpot_ms": ("tpot", lambda _, ttft_s, tpot_s: tpot_s * 1e3),
    "tokens_per_s_per_gpu": ("tokens_per_s_per_gpu", lambda one, *times: one.row.throughput(*times)),
}


def with_intervals(one: Prediction, widths: Mapping[str, Width]) -> dict[str, Any]:
    """A prediction, JSON-ready: its figures, and `intervals` of those that have one."""
    if one.ttft_s is None or one.tpot_s is None:
        return {"id": one.row.id, "status": one.status, "reason": one.reason}
    values = {name: (figure, of(one, one.ttft_s, one.tpot_s)) for name, (figure, of) in _TOLD.items()}
    intervals = {name: interval(one, figure, value, widths) for name, (figure, value) in values.items()}
    return {
        "id": one.row.id,
        "status": one.status,
        **{name: value for name, (_, value) in values.items()},
        "intervals": {name: told for name, told in intervals.items() if told is not None},
    }
