"""Fitting host times to what clients saw, by least squares on requests; with intervals, and what cannot be told apart.

Residuals and their least squares: `validate.calibrate.rows`. Intervals: see `_intervals`. Two host times that move
every residual alike cannot be told apart: their condition index (Belsley, Kuh and Welsch, Regression Diagnostics, 1980)
is above 30, and the later one of NAMES is not fitted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from moesim.engine.draws import LEVEL
from moesim.spec.overheads import MOST_S, NAMES
from validate.calibrate.bench_run import BenchRun
from validate.calibrate.path import own_path
from validate.calibrate.rows import (
    QUANTILES,
    Flags,
    Floats,
    Rows,
    cost,
    moved,
    rows_around,
    rows_at,
    sizes_of,
    solve,
    system,
    weights,
)
from validate.calibrate.sim import Simulated

MOST_INDEX = 30.0
# Rounds on single simulations until nothing moves by STILL; then rounds on means over simulations around until nothing
# moves by MEAN_STILL of the sizes that matter: single ones may end far off, where every step makes their chance worse.
ROUNDS, STILL = 20, 1e-3
LEAST_MEAN_ROUNDS, MEAN_ROUNDS, MEAN_STILL = 2, 15, 0.1
# Of a step that makes things worse, smaller parts are tried.
SHARES = (1.0, 0.5, 0.2, 0.05)
RESAMPLES, BLOCK = 400, 8


@dataclass(frozen=True)
class Fit:
    """Host times in seconds by name, with the interval around each at `level`.

    kept: what was not fitted, with the reason. index: the largest condition index of those that were. on_path: whether
    the simulation at these values forms the batches that the runs did (`validate.calibrate.path`).
    """

    values: dict[str, float]
    low: dict[str, float]
    high: dict[str, float]
    kept: dict[str, str]
    index: float
    level: float = LEVEL
    on_path: bool = False


def fit(
    simulated: Simulated, runs: Sequence[BenchRun], use: Sequence[Flags], *, names: Sequence[str] = NAMES,
    start: Mapping[str, float], seed: int,
) -> Fit:  # fmt: skip
    """Fit host times to the requests of each run that `use` names; `start` holds all of NAMES.

    Raises Infeasible and OutsideProfile where a run cannot be simulated.
    """
    names, kept = list(names), dict[str, str]()
    values, rows = dict(start), list[Rows]()
    while names:
        values, rows = _settle(simulated, runs, use, names, start, seed)
        lost = _indistinct(rows, names)
        if lost is None:
            break
        kept[lost[0]] = lost[1]
        names.remove(lost[0])
    if not names:
        return Fit(dict(start), {}, {}, kept, 1.0)
    low, high = _intervals(rows, names, values, seed)
    index = _index(rows, range(len(names)))[0]
    found = own_path(simulated, runs, use, values, low, high, rows, seed)
    if found is None:
        return Fit(values, low, high, kept, index)
    low, high = _intervals(found.rows, names, found.values, seed)
    low = {name: min(end, found.low[name]) for name, end in low.items()}
    high = {name: max(end, found.high[name]) for name, end in high.items()}
    return Fit(found.values, low, high, kept, index, on_path=True)


def _settle(
    simulated: Simulated, runs: Sequence[BenchRun], use: Sequence[Flags], names: list[str], start: Mapping[str, float],
    seed: int,
) -> tuple[dict[str, float], list[Rows]]:  # fmt: skip
    """The host times by Gauss-Newton with bounds at 0, and the rows there.

    First from the start to where no step makes it better, then on means over simulations around, as single ones scatter
    with the batches that happen to form.
    """
    values, size = dict(start), sizes_of(simulated, runs)
    rows = rows_at(simulated, runs, use, names, values, size)
    for _ in range(ROUNDS):
        step = solve(rows, values, names)
        for share in SHARES:
            there = moved(values, step, share)
            tried = rows_at(simulated, runs, use, names, there, size)
            if cost(tried) < cost(rows):
                break
        else:
            break
        still = max(abs(there[name] - values[name]) / max(size[name], values[name]) for name in names) < STILL
        values, rows = there, tried
        if still:
            break
    rng = np.random.default_rng([seed, 43])
    for turn in range(MEAN_ROUNDS):
        rows = rows_around(simulated, runs, use, names, values, size, rng)
        step = solve(rows, values, names)
        there = moved(values, step, 1.0)
        change = np.asarray([there[name] - values[name] for name in names])
        rows = [replace(one, residual=one.residual - one.answer @ change) for one in rows]
        values = there
        matters = np.abs(change) / np.asarray([size[name] for name in names])
        if turn + 1 >= LEAST_MEAN_ROUNDS and matters.max() < MEAN_STILL:
            break
    return values, rows


def _index(rows: Sequence[Rows], chosen: Sequence[int]) -> tuple[float, Floats]:
    """Condition index of the chosen host times, and the combination that residuals answer to least."""
    left = system(rows)[0][:, list(chosen)]
    norm = np.linalg.norm(left, axis=0)
    _, sizes, turned = np.linalg.svd(left / np.where(norm > 0, norm, 1.0), full_matrices=False)
    return float(sizes[0] / max(sizes[-1], 1e-300)), np.abs(turned[-1])


def _indistinct(rows: Sequence[Rows], names: Sequence[str]) -> tuple[str, str] | None:
    """The host time that these runs do not tell, and why; None where they tell all."""
    left = system(rows)[0]
    for at, name in enumerate(names):
        if np.linalg.norm(left[:, at]) == 0:
            return name, "no request of these runs answers to it"
    index, share = _index(rows, range(len(names)))
    if index <= MOST_INDEX:
        return None
    involved = [name for name, part in zip(names, share, strict=True) if part > 0.3]
    lost = max(involved, key=list(NAMES).index)
    others = " and ".join(name for name in involved if name != lost)
    told = f"these runs do not tell it from {others} (condition index {index:.0f}, at most {MOST_INDEX:g})"
    return lost, f"{told}; another load may"


def _intervals(
    rows: Sequence[Rows], names: Sequence[str], values: Mapping[str, float], seed: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Ends of the central interval of each host time.

    Two errors add up: that of the requests at hand, by resampling blocks of them and solving anew; and that of the one
    path that the run took, as batches that form otherwise change a whole stretch of requests: how far the fit would
    move if each of the simulations around had been the run. Of rows on the run's own path it is none: how far
    that goes is told apart (`own_path`).
    """
    rng = np.random.default_rng([seed, 37])
    drawn = np.asarray([_resolved(rows, rng) for _ in range(RESAMPLES)])
    count = rows[0].paths.shape[0]
    variance = drawn.var(axis=0)
    if count:
        moves = np.asarray([_solved(rows, [one.paths[at] for one in rows]) for at in range(count)])
        variance += moves.var(axis=0, ddof=1) * (1.0 + 1.0 / count)
    reach = NormalDist().inv_cdf((1.0 + LEVEL) / 2.0) * np.sqrt(variance)
    low = {name: max(0.0, float(values[name] - reach[at])) for at, name in enumerate(names)}
    return low, {name: min(MOST_S, float(values[name] + reach[at])) for at, name in enumerate(names)}


def _resolved(rows: Sequence[Rows], rng: np.random.Generator) -> Floats:
    """The step [names] that resampled residuals ask for, from where the whole ones ask for none."""
    at, residuals = [], []
    for one in rows:
        chosen = blocks(len(one.residual if one.raw is None else one.raw), one.block, rng)
        at.append(chosen if one.raw is None else np.arange(len(one.residual)))
        residuals.append(
            one.residual[chosen] if one.raw is None else np.quantile(one.raw[chosen], QUANTILES) - one.level
        )
    return _solved(rows, residuals, at)


def _solved(rows: Sequence[Rows], residuals: Sequence[Floats], at: Sequence[NDArray[np.int64]] | None = None) -> Floats:
    """The step [names] that residuals in place of the rows' own ask for; at: which rows they are of."""
    width = rows[0].answer.shape[1]
    square, right = np.zeros((width, width)), np.zeros(width)
    for index, (one, residual) in enumerate(zip(rows, residuals, strict=True)):
        chosen = np.arange(len(one.residual)) if at is None else at[index]
        answer = one.answer[chosen]
        weighed = (answer * weights(one)[chosen][:, None]).T
        square, right = square + weighed @ answer, right + weighed @ residual
    size = np.maximum(np.sqrt(np.diag(square)), 1e-300)
    return np.asarray(np.linalg.lstsq(square / np.outer(size, size), right / size)[0] / size)


def blocks(count: int, length: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Indices [count] of a resample of runs of `length` neighbours, at least BLOCK and at most an eighth of all."""
    length = max(1, min(max(BLOCK, length), count // 8))
    starts = rng.integers(0, count - length + 1, size=-(-count // length))
    return np.asarray((starts[:, None] + np.arange(length)).ravel()[:count], dtype=np.int64)
