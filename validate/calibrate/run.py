"""Host times of an engine from a user's own benchmark runs: fitted, judged held out, kept with their provenance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from moesim import __version__
from moesim.engine.draws import LEVEL, interval
from moesim.errors import BadInput
from moesim.files import write_text
from moesim.spec.overheads import FORMAT, NAMES, CalibrationSpec
from moesim.spec.scenario import Scenario
from validate.calibrate.bench_files import read_runs, sha256_of
from validate.calibrate.bench_run import BenchRun
from validate.calibrate.fit import RESAMPLES, Fit, blocks, fit
from validate.calibrate.rows import QUANTILES, sizes_of
from validate.calibrate.sim import Seen, Simulated, deployment_for

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

# One run is cut into so many blocks of requests, every second of which is held out.
TIME_BLOCKS = 8
# Host times are judged by so many simulations around them, so far away over the sizes that matter: requests meet other
# batches where chance decides which, and the same where they follow from the host times.
JUDGED, HAIR = 8, 1e-3
# Runs with less than so many times the requests under way are at one load.
ONE_LOAD = 1.5
# Less is what other batches by chance do to an error.
RISE = 0.01
USE, DONT = "use", "dont"
# Backends of sglang.bench_serving that speak SGLang's own protocol: no other engine answers it.
_NATIVE = ("sglang", "sglang-native")
METRICS = ("ttft_s", "tpot_s")


@dataclass(frozen=True)
class Calibrated:
    """The outcome. before, after: errors on what was held out, see `errors_of`; gain: mean, low and high of what the
    absolute error falls by. part: fitted without what was held out; whole: fitted to everything, which is what is kept.
    """

    runs: list[BenchRun]
    start: dict[str, float]
    part: Fit
    whole: Fit
    held_by: str
    held_requests: int
    before: dict[str, dict[str, float]]
    after: dict[str, dict[str, float]]
    gain: tuple[float, float, float]
    notes: list[str]
    simulations: int

    @property
    def verdict(self) -> str:
        """`use` where the error on what was held out falls by more than chance, else `dont`."""
        return USE if self.gain[1] > 0 and self.whole.low else DONT


def calibrate(
    scenario: Scenario, files: Sequence[Path], *, names: Sequence[str] | None = None, seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> Calibrated:  # fmt: skip
    """Fit the host times of a scenario's engine to benchmark results.

    names: which to fit; None = as many as the runs tell apart. Raises BadInput on files that are no results, on a
    scenario that has no plain pool, and where `names` cannot be told apart; Infeasible where a run cannot be served.
    """
    runs = [run for path in files for run in read_runs(path)]
    _refuse_other_engine(scenario, runs)
    simulated = Simulated(deployment_for(scenario, runs), seed)
    start = simulated.now
    fitted, held, held_by = parts(runs)
    say(f"fitting to {sum(int(one.sum()) for one in fitted)} requests of {_count(fitted)}")
    part = fit(simulated, *_some(runs, fitted), names=names or NAMES, start=start, seed=seed)
    if names and part.kept:
        name, reason = next(iter(part.kept.items()))
        raise BadInput(
            f"{name} cannot be fitted: {reason}", where="--fit", mend="leave it out, or give runs at other loads"
        )
    others, judged = _some(runs, held)
    seen = [_seen(simulated, others, values, seed) for values in (start, part.values)]
    say("fitting to all requests")
    before, after = (errors_of(others, one, judged) for one in seen)
    everything = [np.ones(run.requests, dtype=bool) for run in runs]
    asked = [name for name in NAMES if name in part.low]
    whole = fit(simulated, runs, everything, names=asked, start=start, seed=seed) if asked else part
    return Calibrated(
        runs=runs,
        start=start,
        part=part,
        whole=replace(whole, kept={**part.kept, **whole.kept}),
        held_by=held_by,
        held_requests=sum(int(one.sum()) for one in judged),
        before=before,
        after=after,
        gain=_gain(others, seen, judged, seed),
        notes=[*_notes(scenario, runs), *_path_note(whole), *load_note(runs, whole), *worse_note(before, after)],
        simulations=simulated.count,
    )


def _seen(simulated: Simulated, runs: Sequence[BenchRun], values: dict[str, float], seed: int) -> list[Seen]:
    """What clients would see of each run at values a hair around the given ones, as draws.

    At the values alone the batches that happen to form, and requests that come in the very moment in which a step ends,
    would decide how good they are.
    """
    size, rng = sizes_of(simulated, runs), np.random.default_rng([seed, 53])
    every = []
    for away in rng.uniform(-1.0, 1.0, size=(JUDGED, len(NAMES))):
        moved = {name: values[name] + HAIR * size[name] * by for name, by in zip(NAMES, away.tolist(), strict=True)}
        every.append(simulated.see(runs, {name: max(0.0, value) for name, value in moved.items()}))
    return [
        Seen(np.concatenate([one.ttft_s for one in alike]), np.concatenate([one.tpot_s for one in alike]))
        for alike in zip(*every, strict=True)
    ]


def parts(runs: Sequence[BenchRun]) -> tuple[list[Flags], list[Flags], str]:
    """Requests to fit to and requests to judge on, by run: every second run, or every second block of the only one."""
    if len(runs) > 1:
        held = [np.full(run.requests, index % 2 == 1) for index, run in enumerate(runs)]
        return [~one for one in held], held, "run"
    block = np.arange(runs[0].requests) * TIME_BLOCKS // runs[0].requests
    odd = np.asarray(block % 2 == 1)
    return [~odd], [odd], "time block"


def errors_of(runs: Sequence[BenchRun], seen: Sequence[Seen], use: Sequence[Flags]) -> dict[str, dict[str, float]]:
    """By metric: mape, the mean absolute error over what was measured, and bias, that of the means with its sign."""
    found = {}
    for metric in METRICS:
        size = np.concatenate([_size(*one, metric) for one in zip(runs, seen, use, strict=True)])
        told = [_means(*one, metric) for one in zip(runs, seen, use, strict=True)]
        bias = float(np.mean([simulated / measured - 1.0 for measured, simulated in told]))
        found[metric] = {"mape": float(size.mean()), "bias": bias}
    return found


def _size(run: BenchRun, seen: Seen, use: Flags, metric: str, at: NDArray[np.int64] | None = None) -> Floats:
    """Absolute relative errors by request, means over draws, or by quantile; at: a resample of what was measured."""
    measured, simulated = getattr(run, metric)[use], getattr(seen, metric)[:, use]
    there = np.isfinite(measured)
    measured, simulated = measured[there], simulated[:, there]
    if run.paired:
        error = simulated / np.maximum(measured, 1e-9) - 1.0
        size = np.abs(error).mean(axis=0)
        return np.asarray(size if at is None else size[at])
    measured = measured if at is None else measured[at]
    level = np.quantile(simulated, QUANTILES, axis=1).mean(axis=1)
    return np.asarray(np.abs(level / np.maximum(np.quantile(measured, QUANTILES), 1e-9) - 1.0))


def _means(run: BenchRun, seen: Seen, use: Flags, metric: str) -> tuple[float, float]:
    measured, simulated = getattr(run, metric)[use], getattr(seen, metric)[:, use]
    return float(np.nanmean(measured)), float(np.nanmean(simulated))


def _gain(
    runs: Sequence[BenchRun], seen: Sequence[Sequence[Seen]], use: Sequence[Flags], seed: int
) -> tuple[float, float, float]:
    """What the mean absolute error of both metrics falls by, with its interval over resampled blocks of requests.

    seen: before and after, by run, the same draws each; they are resampled, too.
    """
    rng = np.random.default_rng([seed, 41])

    def falls(resample: bool) -> float:
        found = []
        draws = rng.integers(JUDGED, size=JUDGED) if resample else np.arange(JUDGED)
        for index, (run, chosen) in enumerate(zip(runs, use, strict=True)):
            drawn = [_drawn(one[index], draws) for one in seen]
            for metric in METRICS:
                count = int(np.isfinite(getattr(run, metric)[chosen]).sum())
                at = blocks(count, run.in_flight, rng) if resample else None
                before, after = (_size(run, one, chosen, metric, at).mean() for one in drawn)
                found.append(before - after)
        return float(np.mean(found))

    low, high = interval(np.asarray([falls(True) for _ in range(RESAMPLES)]))
    return falls(False), low, high


def _drawn(seen: Seen, draws: NDArray[np.int64]) -> Seen:
    """Some of JUDGED equal parts of the draws."""
    part = seen.ttft_s.shape[0] // JUDGED
    rows = (draws[:, None] * part + np.arange(part)).ravel()
    return Seen(seen.ttft_s[rows], seen.tpot_s[rows])


def _some(runs: Sequence[BenchRun], use: Sequence[Flags]) -> tuple[list[BenchRun], list[Flags]]:
    """The runs that have requests in use."""
    chosen = [(run, flags) for run, flags in zip(runs, use, strict=True) if flags.any()]
    return [run for run, _ in chosen], [flags for _, flags in chosen]


def _count(use: Sequence[Flags]) -> str:
    runs = sum(bool(one.any()) for one in use)
    return f"{runs} run{'s' if runs > 1 else ''}"


def _refuse_other_engine(scenario: Scenario, runs: Sequence[BenchRun]) -> None:
    for run in runs:
        if run.told.get("client_backend") in _NATIVE and scenario.engine.name != "sglang":
            raise BadInput(
                f"this run is of SGLang, the scenario's engine is {scenario.engine.name}", where=run.where,
                mend="set engine.name to sglang, or give runs of the scenario's engine",
            )  # fmt: skip


def _notes(scenario: Scenario, runs: Sequence[BenchRun]) -> list[str]:
    """Where the files tell of another model or version than the scenario."""
    found = []
    for run in runs:
        model, version = run.told.get("model"), run.told.get("engine_version")
        if model and Path(model).name.lower() != Path(scenario.model).name.lower():
            found.append(f"{run.where} names model {model}, the scenario {scenario.model}")
        if version and version != scenario.engine.version:
            found.append(f"{run.where} names engine version {version}, the scenario {scenario.engine.version}")
        if not run.paired:
            found.append(f"{run.where} does not tell when requests came: quantiles are fitted, not requests")
        if run.failed:
            found.append(f"{run.where}: {run.failed} failed requests are left out")
    return found


def _path_note(whole: Fit) -> list[str]:
    if not whole.on_path:
        return []
    return ["errors are less than half of those a little off these host times: simulated batches are those of the runs"]


def under_way(run: BenchRun) -> float:
    """Requests under way at a time, on the mean; of a run that tells no times by Little's law."""
    if run.paired:
        return float(run.in_flight)
    return run.requests_per_s * float((run.ttft_s + run.decode_s).mean())


def load_note(runs: Sequence[BenchRun], whole: Fit) -> list[str]:
    """Where all runs had about as many requests under way, and several host times were fitted to them."""
    loads = [under_way(run) for run in runs]
    if len(whole.low) < 2 or max(loads) > ONE_LOAD * min(loads):
        return []
    return ["the runs are at one load, which seldom tells host times apart, whatever intervals say: add another"]


def worse_note(before: dict[str, dict[str, float]], after: dict[str, dict[str, float]]) -> list[str]:
    """Which metric's errors on what was held out rise by more than RISE; the verdict goes by both together."""
    return [
        f"{metric[:4].upper()} errors on what was held out rise from {before[metric]['mape']:.1%} to "
        f"{after[metric]['mape']:.1%}: something else is off, such as the engine or the prices of its kernels"
        for metric in METRICS
        if after[metric]["mape"] > before[metric]["mape"] + RISE
    ]


def as_json(found: Calibrated) -> dict[str, Any]:
    """The outcome, JSON-ready."""
    names = [name for name in NAMES if name in found.whole.low]
    return {
        "overheads": {
            name: {
                "before_s": found.start[name],
                "fitted_on_part_s": found.part.values[name],
                "value_s": found.whole.values[name],
                "low_s": found.whole.low[name],
                "high_s": found.whole.high[name],
            }
            for name in names
        },
        "not_fitted": {name: {"value_s": found.start[name], "reason": why} for name, why in found.whole.kept.items()},
        "level": LEVEL,
        "condition_index": found.whole.index,
        "on_path": {"part": found.part.on_path, "whole": found.whole.on_path},
        "held_out": {
            "by": found.held_by,
            "requests": found.held_requests,
            "before": found.before,
            "after": found.after,
            "gain": dict(zip(("value", "low", "high"), found.gain, strict=True)),
        },
        "verdict": {"code": found.verdict, "text": verdict_text(found)},
        "runs": [
            {"where": run.where, "format": run.format, "requests": run.requests, "sent": run.sent, **run.told}
            for run in found.runs
        ],
        "notes": found.notes,
        "simulations": found.simulations,
    }


def _way(value: float) -> str:
    return "falls" if value >= 0 else "rises"


def verdict_text(found: Calibrated) -> str:
    """One sentence on whether to use the fitted host times."""
    value, low, high = (100 * one for one in found.gain)
    told = f"the error on what was held out {_way(value)} by {abs(value):.1f} points"
    told += f" ({low:.1f} to {high:.1f})" if value >= 0 else f" ({-high:.1f} to {-low:.1f})"
    if found.verdict == USE:
        return f"use them: {told}"
    if not found.whole.low:
        return "don't: these runs tell none of the host times"
    return f"don't: {told}, which may be chance; nothing was written"


def keep(
    path: Path, found: Calibrated, scenario: Scenario, scenario_file: Path, files: Sequence[Path], system: str,
    overrides: Sequence[str] = (),
) -> None:  # fmt: skip
    """Write the host times with their provenance, as `cost.overheads` of a scenario reads them. Raises BadInput."""
    overheads: dict[str, Any] = {}
    for name in NAMES:
        if name in found.whole.low:
            ends = {"low": found.whole.low[name], "high": found.whole.high[name]}
            overheads[name] = {"value": found.whole.values[name], **ends, "tag": "measured"}
    told = as_json(found)
    hashes = {str(path): sha256_of(path) for path in files}
    data = {
        "format": FORMAT,
        "schema_version": 1,
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "moesim": __version__,
        "engine": {"name": scenario.engine.name, "version": scenario.engine.version},
        "model": scenario.model,
        "system": system,
        "level": LEVEL,
        "overheads": overheads,
        "not_fitted": told["not_fitted"],
        "held_out": told["held_out"],
        "verdict": told["verdict"],
        "sources": [
            {**run, "where": Path(run["where"]).name, "sha256": _hash_of(run["where"], hashes)} for run in told["runs"]
        ],
        "scenario": {
            "file": Path(scenario_file).name,
            "sha256": sha256_of(scenario_file),
            "set": list(overrides),
            "cost_source": scenario.cost.source,
            "profiles": [Path(one).name for one in scenario.cost.profiles],
        },
        "notes": told["notes"],
    }
    CalibrationSpec.read(data, where=path)
    write_text(path, yaml.safe_dump(data, sort_keys=False, allow_unicode=True))


def _hash_of(where: str, hashes: dict[str, str]) -> str:
    return next(found for path, found in hashes.items() if where == path or where.startswith(f"{path}, line "))
