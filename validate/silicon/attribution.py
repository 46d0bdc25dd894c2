"""What predictions are made of beside how far they are off: which causes the error goes along with.

The record holds the share of each family of costs in every prediction. If a family were (1 + m) times as dear, a
prediction would be 1 + m x its share times as long; ln(measured / predicted) of many rows, regressed on the shares,
gives the m of each family that brings predictions nearest to measurements. That is a correlation: it says where to
look, not what is wrong, and nothing is fitted to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from validate.silicon.causes import FRONT_END, PARTS, PROMPTS, WAITING, Causes
from validate.silicon.scored import FIGURES, Half

Floats = NDArray[np.float64]

# Figures that have shares by cause, and what stands across their families: of TTFT the wait before the own prompt is
# read (queueing), of TPOT the steps that read other requests' prompts. Both are made of the families' own time.
ACROSS = {"tpot": PROMPTS, "ttft": WAITING}
# A cause with a smaller mean share has no say in the error, and is left out of the regression.
LEAST_SHARE = 0.01
# Errors beyond this, in ln, count less than by their square.
CLIP = 0.1
# How closely the regression is solved: closer than the digits that are told, on any machine.
_EXACT = {"xtol": 1e-12, "ftol": 1e-12, "gtol": 1e-12}
# Rows for each cause below which a regression says nothing.
ROWS = 4


@dataclass(frozen=True)
class Attribution:
    """Causes of one figure over n rows.

    shares: cause -> mean share of the prediction; families sum to 1, what stands across them comes on top. more: cause
    -> (by what share it would have to be dearer, standard error). before, after: median |ln(measured / predicted)| as
    it is, and with every cause dearer by that.
    """

    rows: int
    shares: Mapping[str, float]
    more: Mapping[str, tuple[float, float]]
    before: float | None
    after: float | None

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        more = {name: {"dearer": value, "standard_error": error} for name, (value, error) in self.more.items()}
        return {**vars(self), "shares": dict(self.shares), "more": more}


def causes_in_order(figure: str) -> tuple[str, ...]:
    """Causes of a figure: the families of costs, the front end, and what stands across them."""
    return (*PARTS, FRONT_END, ACROSS[figure])


def attributed(side: Half) -> dict[str, Attribution]:
    """Figure of ACROSS -> its causes, over the rows of a half whose prediction tells its shares."""
    return {figure: _attribution(side, figure) for figure in FIGURES if figure in ACROSS}


def _attribution(side: Half, figure: str) -> Attribution:
    names, size = causes_in_order(figure), side.logs(figure)
    use = [
        (_shares(one.causes, figure), size[at], side.cells[at])
        for at, one in enumerate(side.priced)
        if one.causes is not None and np.isfinite(size[at])
    ]
    if not use:
        return Attribution(0, {}, {}, None, None)
    shares, logs = np.array([line for line, _, _ in use]), np.array([value for _, value, _ in use])
    mean = shares.mean(axis=0)
    told = dict(zip(names, mean.tolist(), strict=True))
    before = float(np.median(np.abs(logs)))
    kept = np.flatnonzero(mean >= LEAST_SHARE)
    if len(logs) < ROWS * len(names):
        return Attribution(len(logs), told, {}, before, None)
    more, errors = _fit(shares[:, kept], logs, np.array([cell for _, _, cell in use]))
    after = float(np.median(np.abs(logs - np.log(_longer(shares[:, kept], more)))))
    named = zip((names[at] for at in kept), zip(more.tolist(), errors.tolist(), strict=True), strict=True)
    return Attribution(len(logs), told, dict(named), before, after)


def _shares(causes: Causes, figure: str) -> list[float]:
    families: Mapping[str, float] = getattr(causes, figure)
    across = causes.waiting if figure == "ttft" else causes.prompts
    return [*(families[name] for name in (*PARTS, FRONT_END)), across]


def _longer(shares: Floats, more: Floats) -> Floats:
    """How many times as long predictions [n] are with causes dearer by `more` [k]; kept above 0."""
    return np.maximum(1.0 + shares @ more, 0.02)


def _fit(shares: Floats, logs: Floats, cells: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """How much dearer each cause [k] would have to be, and its error: `logs` [n] on `shares` [n, k], robustly.

    Rows of one cell err together, so the standard error is that of whole cells (a sandwich over clusters) or of single
    rows, whichever is larger.
    """
    from scipy.optimize import least_squares

    def left(more: Floats) -> Floats:
        found: Floats = logs - np.log(_longer(shares, more))
        return found

    bounds = (-0.98, np.inf)
    fit = least_squares(left, np.zeros(shares.shape[1]), bounds=bounds, loss="soft_l1", f_scale=CLIP, **_EXACT)
    more: Floats = fit.x
    slope = shares / _longer(shares, more)[:, None]
    size = 1.0 + (left(more) / CLIP) ** 2
    pull = slope * (left(more) / np.sqrt(size))[:, None]  # [n, k]: what each row pulls at each cause
    inner = np.linalg.pinv(slope.T @ (slope * (size**-1.5)[:, None]))
    variances = [np.diag(inner @ pull.T @ pull @ inner)]
    groups = np.unique(cells)
    if len(groups) > 1:
        summed = np.array([pull[cells == group].sum(axis=0) for group in groups])
        scale = len(groups) / (len(groups) - 1)
        variances.append(scale * np.diag(inner @ summed.T @ summed @ inner))
    errors: Floats = np.sqrt(np.max(variances, axis=0))
    return more, errors
