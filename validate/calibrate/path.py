"""Host times at which the simulation takes the very path of the runs: the same requests share the same steps.

Means over simulations leave the chance of the one path that was measured in the fit. But requests come when the files
say, so a simulation close enough to the truth forms most of the batches that were measured, and its errors drop far
below those of its neighbours, within thousandths of a step's time. Differential evolution (Storn and Price, Journal of
Global Optimization 11, 1997) looks for such a place within the reach of the fit. Where there is none, as the simulator
leaves out too much of the server, the fit stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import OptimizeResult, differential_evolution

from moesim.spec.overheads import MOST_S
from validate.calibrate.bench_run import BenchRun
from validate.calibrate.rows import Flags, Floats, Rows, cost, made, rows_at, sizes_of
from validate.calibrate.sim import Simulated

# Members of a generation for each host time, and generations; after some of them the search ends early unless errors
# are below this share of what they are around the fit, on the mean over so many simulations. Found is what ends below
# the other share.
MEMBERS, GENERATIONS = 12, 40
EARLY, EARLY_SHARE, SHARE, MEAN_OF = 12, 0.75, 0.5, 16
# How far the search goes, over the fit's interval; and the spread of a generation's errors at which it is done.
REACH, DONE = 2.0, 0.02
# Of fewer, some values make errors that small by chance.
LEAST_REQUESTS = 100
# Host times with errors up to so many times the least are on the path, too.
NEAR = 1.5


@dataclass(frozen=True)
class OnPath:
    """Host times in seconds by name, how far others go that are on the path, too, and the rows there."""

    values: dict[str, float]
    low: dict[str, float]
    high: dict[str, float]
    rows: list[Rows]


def own_path(
    simulated: Simulated, runs: Sequence[BenchRun], use: Sequence[Flags], values: Mapping[str, float],
    low: Mapping[str, float], high: Mapping[str, float], rows: Sequence[Rows], seed: int,
) -> OnPath | None:  # fmt: skip
    """The host times on the path and the rows there; None where there are none, a run does not tell its times, or there
    are too few requests.

    values: the fit, in seconds; low, high: its interval, of those that were fitted; rows: at the fit, with answers.
    """
    if not all(run.paired for run in runs) or sum(int(one.sum()) for one in use) < LEAST_REQUESTS:
        return None
    names, size = list(low), sizes_of(simulated, runs)
    middle = np.asarray([values[name] for name in names])
    reach = 0.5 * REACH * np.asarray([high[name] - low[name] for name in names])
    rng = np.random.default_rng([seed, 47])

    def there(point: Floats) -> dict[str, float]:
        return {**values, **dict(zip(names, np.clip(point, 0.0, MOST_S).tolist(), strict=True))}

    tried: list[tuple[float, dict[str, float]]] = []

    def error(point: Floats) -> float:
        found = cost(rows_at(simulated, runs, use, [], there(point), size))
        tried.append((found, there(point)))
        return found

    around = np.mean([error(middle + 0.25 * reach * rng.standard_normal(len(names))) for _ in range(MEAN_OF)])

    def hopeless(intermediate_result: OptimizeResult) -> bool:
        return bool(intermediate_result.nit == EARLY and intermediate_result.fun > EARLY_SHARE * around)

    found = differential_evolution(
        error,
        list(zip(np.maximum(middle - reach, 0.0), np.minimum(middle + reach, MOST_S), strict=True)),
        popsize=MEMBERS,
        maxiter=GENERATIONS,
        tol=DONE,
        polish=False,
        rng=rng,
        callback=hopeless,
    )
    if found.fun > SHARE * around:
        return None
    near = [point for error_there, point in tried if error_there <= NEAR * found.fun]
    here = rows_at(simulated, runs, use, [], there(found.x), size)
    return OnPath(
        values=there(found.x),
        low={name: min(point[name] for point in near) for name in names},
        high={name: max(point[name] for point in near) for name in names},
        rows=[
            made(one.residual, with_answers.answer, one.middle, one.level, one.raw, one.block)
            for one, with_answers in zip(here, rows, strict=True)
        ],
    )
