"""Fitting host times to what clients saw, by least squares on requests; with intervals, and what cannot be told apart.

Residuals are measured minus simulated TTFT and TPOT of each request (of quantiles where the file does not tell when
requests came), each over its own scatter, large ones weighed down (Huber). How they answer to a host time is found by
simulating again with a little more of it; answers are averaged over requests of like length, as batches that happen to
form otherwise scatter those of single requests. Intervals: see `_intervals`. Two host times that move every
residual alike cannot be told apart: their condition index (Belsley, Kuh and Welsch, Regression Diagnostics, 1980) is
above 30, and the later one of NAMES is not fitted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import lsq_linear

from moesim.engine.draws import LEVEL
from moesim.spec.overheads import MOST_S, NAMES
from validate.calibrate.bench_run import BenchRun
from validate.calibrate.sim import Seen, Simulated

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

MOST_INDEX = 30.0
ROUNDS, STILL = 20, 1e-3
# Rounds on means, over how many simulations around the values each mean is taken, and at how many of them answers are.
FINAL_ROUNDS, AROUND, ANSWERED = 2, 16, 3
# How far around, over the sizes that matter: far enough for other batches to form, near enough to be linear.
AWAY = 0.15
# Of a step that makes things worse, smaller parts are tried.
SHARES = (1.0, 0.5, 0.2, 0.05)
RESAMPLES, BLOCK = 400, 8
HUBER = 1.345  # 95 % as efficient as plain least squares where errors are normal (Huber, Robust Statistics)
QUANTILES = np.linspace(0.05, 0.95, 19)
# Least scatter of a residual, relative to the median of what was measured: clocks and streams are no better.
LEAST_SCATTER = 2e-3
GROUPS = 4


@dataclass(frozen=True)
class Fit:
    """Host times in seconds by name, with the interval around each at `level`.

    kept: what was not fitted, with the reason. index: the largest condition index of those that were.
    """

    values: dict[str, float]
    low: dict[str, float]
    high: dict[str, float]
    kept: dict[str, str]
    index: float
    level: float = LEVEL


@dataclass(frozen=True)
class _Rows:
    """Residuals [rows] of one run and metric, and what they answer to each host time [rows, names].

    scale: scatter of the residuals; middle: median of what was measured. level: what was simulated. raw: what was
    measured of each request where rows are quantiles, else None. paths [simulations, rows]: how far each simulation
    around was from their mean. block: neighbours that are resampled together.
    """

    residual: Floats
    answer: Floats
    scale: float
    middle: float
    level: Floats
    raw: Floats | None
    block: int
    paths: Floats


def fit(
    simulated: Simulated, runs: Sequence[BenchRun], use: Sequence[Flags], *, names: Sequence[str] = NAMES,
    start: Mapping[str, float], seed: int,
) -> Fit:  # fmt: skip
    """Fit host times to the requests of each run that `use` names; `start` holds all of NAMES.

    Raises Infeasible and OutsideProfile where a run cannot be simulated.
    """
    names, kept = list(names), dict[str, str]()
    values, rows = dict(start), list[_Rows]()
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
    return Fit(values, low, high, kept, _index(rows, range(len(names)))[0])


def _settle(
    simulated: Simulated, runs: Sequence[BenchRun], use: Sequence[Flags], names: list[str], start: Mapping[str, float],
    seed: int,
) -> tuple[dict[str, float], list[_Rows]]:  # fmt: skip
    """The host times by Gauss-Newton with bounds at 0, and the rows there.

    First from the start to where no step makes it better, then on means over simulations around, as single ones scatter
    with the batches that happen to form.
    """
    values, size = dict(start), _sizes(simulated, runs)
    rows = _rows(simulated, runs, use, names, values, size)
    for _ in range(ROUNDS):
        step = _solve(rows, values, names)
        for share in SHARES:
            there = _moved(values, step, share)
            tried = _rows(simulated, runs, use, names, there, size)
            if _cost(tried) < _cost(rows):
                break
        else:
            break
        still = max(abs(there[name] - values[name]) / max(size[name], values[name]) for name in names) < STILL
        values, rows = there, tried
        if still:
            break
    rng = np.random.default_rng([seed, 43])
    for _ in range(FINAL_ROUNDS):
        rows = _rows_around(simulated, runs, use, names, values, size, rng)
        step = _solve(rows, values, names)
        there = _moved(values, step, 1.0)
        change = np.asarray([there[name] - values[name] for name in names])
        rows = [replace(one, residual=one.residual - one.answer @ change) for one in rows]
        values = there
    return values, rows


def _moved(values: Mapping[str, float], step: Mapping[str, float], share: float) -> dict[str, float]:
    return {name: min(MOST_S, max(0.0, value + share * step.get(name, 0.0))) for name, value in values.items()}


def _rows_around(
    simulated: Simulated, runs: Sequence[BenchRun], use: Sequence[Flags], names: list[str], values: Mapping[str, float],
    size: Mapping[str, float], rng: np.random.Generator,
) -> list[_Rows]:  # fmt: skip
    """Rows at the values as the mean of those at AROUND points near by, each brought there by its answers."""
    here = np.asarray([values[name] for name in names])
    reach = AWAY * np.asarray([size[name] for name in names])
    points = np.maximum(here + reach * rng.uniform(-1.0, 1.0, size=(AROUND, len(names))), 0.0)
    away = points - here
    asked = [{**values, **dict(zip(names, point.tolist(), strict=True))} for point in points]
    every = [_rows(simulated, runs, use, names if at < ANSWERED else [], one, size) for at, one in enumerate(asked)]
    found = []
    for alike in zip(*every, strict=True):
        answer = np.mean([one.answer for one in alike[:ANSWERED]], axis=0)
        residual = np.mean([one.residual + answer @ by for one, by in zip(alike, away, strict=True)], axis=0)
        levels = np.asarray([one.level - answer @ by for one, by in zip(alike, away, strict=True)])
        level = levels.mean(axis=0)
        found.append(_made(residual, answer, alike[0].middle, level, alike[0].raw, alike[0].block, levels - level))
    return found


def _sizes(simulated: Simulated, runs: Sequence[BenchRun]) -> dict[str, float]:
    """What a host time has to be to matter, in seconds: a tenth of the median TTFT or TPOT, over layers."""
    ttft_s = 0.1 * min(float(np.median(run.ttft_s)) for run in runs)
    tpot_s = 0.1 * min(float(np.nanmedian(run.tpot_s)) for run in runs)
    layers = simulated.model.deployment.setup.model.layers
    least = 1e-7
    return {"request_s": max(ttft_s, least), "step_s": max(tpot_s, least), "layer_s": max(tpot_s / layers, least)}


def _rows(
    simulated: Simulated, runs: Sequence[BenchRun], use: Sequence[Flags], names: list[str], values: Mapping[str, float],
    size: Mapping[str, float],
) -> list[_Rows]:  # fmt: skip
    """Residuals at the values, and how they answer to more of each host time, in seconds by `size`."""
    here = simulated.see(runs, values)
    more_s = size
    there = {name: simulated.see(runs, {**values, name: values[name] + more_s[name]}) for name in names}
    found = []
    for at, (run, chosen) in enumerate(zip(runs, use, strict=True)):
        for metric in ("ttft_s", "tpot_s"):
            level, measured = _level(run, here[at], metric, chosen), _measured(run, metric, chosen)
            moved = [(_level(run, there[name][at], metric, chosen) - level) / more_s[name] for name in names]
            answer = np.empty((len(level), len(moved)))
            for column, one in enumerate(moved):
                answer[:, column] = _smooth(one, _like(run, metric, chosen))
            raw = None if run.paired else _finite(getattr(run, metric)[chosen])
            found.append(_made(measured - level, answer, float(np.median(measured)), level, raw, run.in_flight))
    return found


def _made(
    residual: Floats, answer: Floats, middle: float, level: Floats, raw: Floats | None, block: int,
    paths: Floats | None = None,
) -> _Rows:  # fmt: skip
    scatter = 1.4826 * float(np.median(np.abs(residual - np.median(residual))))
    paths = np.zeros((0, len(level))) if paths is None else paths
    return _Rows(residual, answer, max(scatter, LEAST_SCATTER * middle), middle, level, raw, block, paths)


def _finite(values: Floats) -> Floats:
    return values[np.isfinite(values)]


def _measured(run: BenchRun, metric: str, chosen: Flags) -> Floats:
    """What was measured [rows]: by request, or its quantiles."""
    values = _finite(getattr(run, metric)[chosen])
    return values if run.paired else np.asarray(np.quantile(values, QUANTILES))


def _level(run: BenchRun, seen: Seen, metric: str, chosen: Flags) -> Floats:
    """What is simulated for the rows of `_measured`."""
    values: Floats = getattr(seen, metric)[:, chosen]
    values = values[:, np.isfinite(values[0])]
    return values[0] if run.paired else np.asarray(np.quantile(values, QUANTILES, axis=1).mean(axis=1))


def _like(run: BenchRun, metric: str, chosen: Flags) -> NDArray[np.int64]:
    """Group [rows] of each row: requests of like length; TTFT goes by the prompt, TPOT by the output."""
    if not run.paired:
        return np.arange(len(QUANTILES))
    length = (run.isl if metric == "ttft_s" else run.osl)[chosen]
    if metric == "tpot_s":
        length = length[length > 1]
    cuts = np.quantile(length, np.linspace(0, 1, GROUPS + 1)[1:-1])
    return np.asarray(np.searchsorted(cuts, length), dtype=np.int64)


def _smooth(values: Floats, group: NDArray[np.int64]) -> Floats:
    total = np.bincount(group, values)
    return np.asarray((total / np.maximum(np.bincount(group), 1))[group])


def _weights(rows: _Rows) -> Floats:
    size = np.abs(rows.residual - np.median(rows.residual)) / rows.scale
    return np.minimum(1.0, HUBER / np.maximum(size, 1e-12)) / rows.scale**2 / len(size)


def _cost(rows: Sequence[_Rows]) -> float:
    """Mean absolute residual over the measured median, by which rounds are compared."""
    return float(np.mean([np.abs(one.residual).mean() / max(one.middle, 1e-12) for one in rows]))


def _system(rows: Sequence[_Rows]) -> tuple[Floats, Floats]:
    root = [np.sqrt(_weights(one)) for one in rows]
    left = np.concatenate([one.answer * weight[:, None] for one, weight in zip(rows, root, strict=True)])
    right = np.concatenate([one.residual * weight for one, weight in zip(rows, root, strict=True)])
    return left, right


def _solve(rows: Sequence[_Rows], values: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """The step of each host time that leaves the least residuals, none below 0."""
    left, right = _system(rows)
    norm = np.maximum(np.linalg.norm(left, axis=0), 1e-300)
    least = -np.asarray([values[name] for name in names]) * norm - 1e-12
    found = lsq_linear(left / norm, right, bounds=(least, np.full(len(least), np.inf)))
    return dict(zip(names, (found.x / norm).tolist(), strict=True))


def _index(rows: Sequence[_Rows], chosen: Sequence[int]) -> tuple[float, Floats]:
    """Condition index of the chosen host times, and the combination that residuals answer to least."""
    left = _system(rows)[0][:, list(chosen)]
    norm = np.linalg.norm(left, axis=0)
    _, sizes, turned = np.linalg.svd(left / np.where(norm > 0, norm, 1.0), full_matrices=False)
    return float(sizes[0] / max(sizes[-1], 1e-300)), np.abs(turned[-1])


def _indistinct(rows: Sequence[_Rows], names: Sequence[str]) -> tuple[str, str] | None:
    """The host time that these runs do not tell, and why; None where they tell all."""
    left = _system(rows)[0]
    for at, name in enumerate(names):
        if np.linalg.norm(left[:, at]) == 0:
            return name, "no request of these runs answers to it"
    index, share = _index(rows, range(len(names)))
    if index <= MOST_INDEX:
        return None
    involved = [name for name, part in zip(names, share, strict=True) if part > 0.3]
    lost = max(involved, key=list(NAMES).index)
    others = " and ".join(name for name in involved if name != lost)
    return lost, f"these runs do not tell it from {others} (condition index {index:.0f}, at most {MOST_INDEX:g})"


def _intervals(
    rows: Sequence[_Rows], names: Sequence[str], values: Mapping[str, float], seed: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Ends of the central interval of each host time.

    Two errors add up: that of the requests at hand, by resampling blocks of them and solving anew; and that of the one
    path that the run took, as batches that form otherwise change a whole stretch of requests: how far the fit would
    move if each of the simulations around had been the run.
    """
    rng = np.random.default_rng([seed, 37])
    drawn = np.asarray([_resolved(rows, rng) for _ in range(RESAMPLES)])
    count = rows[0].paths.shape[0]
    moved = np.asarray([_solved(rows, [one.paths[at] for one in rows]) for at in range(count)])
    variance = drawn.var(axis=0) + moved.var(axis=0, ddof=1) * (1.0 + 1.0 / count)
    reach = NormalDist().inv_cdf((1.0 + LEVEL) / 2.0) * np.sqrt(variance)
    low = {name: max(0.0, float(values[name] - reach[at])) for at, name in enumerate(names)}
    return low, {name: min(MOST_S, float(values[name] + reach[at])) for at, name in enumerate(names)}


def _resolved(rows: Sequence[_Rows], rng: np.random.Generator) -> Floats:
    """The step [names] that resampled residuals ask for, from where the whole ones ask for none."""
    at, residuals = [], []
    for one in rows:
        chosen = blocks(len(one.residual if one.raw is None else one.raw), one.block, rng)
        at.append(chosen if one.raw is None else np.arange(len(one.residual)))
        residuals.append(
            one.residual[chosen] if one.raw is None else np.quantile(one.raw[chosen], QUANTILES) - one.level
        )
    return _solved(rows, residuals, at)


def _solved(
    rows: Sequence[_Rows], residuals: Sequence[Floats], at: Sequence[NDArray[np.int64]] | None = None
) -> Floats:
    """The step [names] that residuals in place of the rows' own ask for; at: which rows they are of."""
    width = rows[0].answer.shape[1]
    square, right = np.zeros((width, width)), np.zeros(width)
    for index, (one, residual) in enumerate(zip(rows, residuals, strict=True)):
        chosen = np.arange(len(one.residual)) if at is None else at[index]
        answer = one.answer[chosen]
        weighed = (answer * _weights(one)[chosen][:, None]).T
        square, right = square + weighed @ answer, right + weighed @ residual
    size = np.maximum(np.sqrt(np.diag(square)), 1e-300)
    return np.asarray(np.linalg.lstsq(square / np.outer(size, size), right / size)[0] / size)


def blocks(count: int, length: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Indices [count] of a resample of runs of `length` neighbours, at least BLOCK and at most an eighth of all."""
    length = max(1, min(max(BLOCK, length), count // 8))
    starts = rng.integers(0, count - length + 1, size=-(-count // length))
    return np.asarray((starts[:, None] + np.arange(length)).ravel()[:count], dtype=np.int64)
