"""Residuals of the requests of benchmark runs, what they answer to each host time, and the least squares of both.

Residuals are measured minus simulated TTFT and TPOT of each request (of quantiles where the file does not tell when
requests came), each over its own scatter, large ones weighed down (Huber). How they answer to a host time is found by
simulating again with a little more of it; answers are averaged over requests of like length, as batches that happen to
form otherwise scatter those of single requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import lsq_linear

from moesim.spec.overheads import MOST_S
from validate.calibrate.bench_run import BenchRun
from validate.calibrate.sim import Seen, Simulated

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

# Over how many simulations around the values a mean is taken, and at how many of them answers are.
AROUND, ANSWERED = 16, 3
# How far around, over the sizes that matter: far enough for other batches to form, near enough to be linear.
AWAY = 0.15
HUBER = 1.345  # 95 % as efficient as plain least squares where errors are normal (Huber, Robust Statistics)
QUANTILES = np.linspace(0.05, 0.95, 19)
# Least scatter of a residual, relative to the median of what was measured: clocks and streams are no better.
LEAST_SCATTER = 2e-3
GROUPS = 4


@dataclass(frozen=True)
class Rows:
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


def rows_at(
    simulated: Simulated, runs: Sequence[BenchRun], use: Sequence[Flags], names: list[str], values: Mapping[str, float],
    size: Mapping[str, float],
) -> list[Rows]:  # fmt: skip
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
            found.append(made(measured - level, answer, float(np.median(measured)), level, raw, run.in_flight))
    return found


def rows_around(
    simulated: Simulated, runs: Sequence[BenchRun], use: Sequence[Flags], names: list[str], values: Mapping[str, float],
    size: Mapping[str, float], rng: np.random.Generator,
) -> list[Rows]:  # fmt: skip
    """Rows at the values as the mean of those at AROUND points near by, each brought there by its answers."""
    here = np.asarray([values[name] for name in names])
    reach = AWAY * np.asarray([size[name] for name in names])
    points = np.maximum(here + reach * rng.uniform(-1.0, 1.0, size=(AROUND, len(names))), 0.0)
    away = points - here
    asked = [{**values, **dict(zip(names, point.tolist(), strict=True))} for point in points]
    every = [rows_at(simulated, runs, use, names if at < ANSWERED else [], one, size) for at, one in enumerate(asked)]
    found = []
    for alike in zip(*every, strict=True):
        answer = np.mean([one.answer for one in alike[:ANSWERED]], axis=0)
        residual = np.mean([one.residual + answer @ by for one, by in zip(alike, away, strict=True)], axis=0)
        levels = np.asarray([one.level - answer @ by for one, by in zip(alike, away, strict=True)])
        level = levels.mean(axis=0)
        found.append(made(residual, answer, alike[0].middle, level, alike[0].raw, alike[0].block, levels - level))
    return found


def sizes_of(simulated: Simulated, runs: Sequence[BenchRun]) -> dict[str, float]:
    """What a host time has to be to matter, in seconds: a tenth of the median TTFT or TPOT, over layers."""
    ttft_s = 0.1 * min(float(np.median(run.ttft_s)) for run in runs)
    tpot_s = 0.1 * min(float(np.nanmedian(run.tpot_s)) for run in runs)
    layers = simulated.model.deployment.setup.model.layers
    least = 1e-7
    return {"request_s": max(ttft_s, least), "step_s": max(tpot_s, least), "layer_s": max(tpot_s / layers, least)}


def made(
    residual: Floats, answer: Floats, middle: float, level: Floats, raw: Floats | None, block: int,
    paths: Floats | None = None,
) -> Rows:  # fmt: skip
    """Rows of residuals [rows], with their scatter: 1.4826 of the median distance from the median, or more."""
    scatter = 1.4826 * float(np.median(np.abs(residual - np.median(residual))))
    paths = np.zeros((0, len(level))) if paths is None else paths
    return Rows(residual, answer, max(scatter, LEAST_SCATTER * middle), middle, level, raw, block, paths)


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


def weights(rows: Rows) -> Floats:
    """Huber's weight of each residual over the square of the scatter [rows]; each run and metric counts alike."""
    size = np.abs(rows.residual - np.median(rows.residual)) / rows.scale
    return np.minimum(1.0, HUBER / np.maximum(size, 1e-12)) / rows.scale**2 / len(size)


def cost(rows: Sequence[Rows]) -> float:
    """Mean absolute residual over the measured median, by which rounds are compared."""
    return float(np.mean([np.abs(one.residual).mean() / max(one.middle, 1e-12) for one in rows]))


def system(rows: Sequence[Rows]) -> tuple[Floats, Floats]:
    """Both sides of the least squares, each row times the root of its weight: [rows, names], [rows]."""
    root = [np.sqrt(weights(one)) for one in rows]
    left = np.concatenate([one.answer * weight[:, None] for one, weight in zip(rows, root, strict=True)])
    right = np.concatenate([one.residual * weight for one, weight in zip(rows, root, strict=True)])
    return left, right


def solve(rows: Sequence[Rows], values: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """The step of each host time that leaves the least residuals, none below 0."""
    left, right = system(rows)
    norm = np.maximum(np.linalg.norm(left, axis=0), 1e-300)
    least = -np.asarray([values[name] for name in names]) * norm - 1e-12
    found = lsq_linear(left / norm, right, bounds=(least, np.full(len(least), np.inf)))
    return dict(zip(names, (found.x / norm).tolist(), strict=True))


def moved(values: Mapping[str, float], step: Mapping[str, float], share: float) -> dict[str, float]:
    """The values after a share of a step, in seconds, within 0 and MOST_S."""
    return {name: min(MOST_S, max(0.0, value + share * step.get(name, 0.0))) for name, value in values.items()}
