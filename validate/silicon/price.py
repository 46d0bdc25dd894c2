"""Measured serving runs priced by simulation: a prediction for each row."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from moesim.engine.deployment import Groundwork, groundwork, resolve
from moesim.engine.serving import Served
from moesim.engine.simulate import simulate
from moesim.engine.visible import as_seen, with_pause
from moesim.errors import MoesimError
from moesim.output.metrics import serving_metrics
from moesim.spec.scenario import Scenario
from validate.silicon.causes import Causes, adjusted, causes_of
from validate.silicon.disagg import Kept, disagg_times
from validate.silicon.rows import SiliconRow
from validate.silicon.scenario import reason_of, scenario_of
from validate.silicon.settings import layout_of, settings_of
from validate.silicon.workers import in_workers

OK, UNSUPPORTED = "ok", "unsupported"


@dataclass(frozen=True)
class Prediction:
    """What is predicted of a row, in seconds; reason: why it is not supported; causes: what it is made of, if asked."""

    row: SiliconRow
    ttft_s: float | None
    tpot_s: float | None
    reason: str = ""
    causes: Causes | None = None

    @property
    def status(self) -> str:
        """`ok` or `unsupported`."""
        return UNSUPPORTED if self.reason else OK


@dataclass(frozen=True)
class Asked:
    """How rows are priced. scale: costs made wrong on purpose, part -> factor. causes: whether to tell shares too."""

    scale: Mapping[str, float] = field(default_factory=dict)
    causes: bool = False


AS_IT_IS = Asked()


def predict(
    row: SiliconRow,
    profiles: Path,
    grounds: dict[str, Groundwork] | None = None,
    asked: Asked = AS_IT_IS,
    kept: Kept | None = None,
) -> Prediction:
    """Mean TTFT and TPOT of a row, by simulating its benchmark; of a disaggregated one without causes.

    grounds, kept: what aggregated and disaggregated rows of the same model and system share.
    """
    if not row.aggregated and row.moe:
        try:
            return Prediction(row, *disagg_times(row, profiles, kept_for(asked) if kept is None else kept))
        except MoesimError as error:
            return Prediction(row, None, None, reason_of(error))
    try:
        scenario = scenario_of(row, profiles)
        settings = settings_of(row, layout_of(row))

        def seen(served: Served) -> tuple[float, float]:
            if settings.cold_s:
                served = with_pause(served, settings.batch_tokens, settings.cold_s)
            served = as_seen(served, lag=True, front_end_s=settings.front_end_s)
            metrics = serving_metrics(served, row.gpus)
            return metrics["ttft_s"]["mean"], metrics["tpot_s"]["mean"]

        ground = _ground(scenario, {} if grounds is None else grounds)
        ground = adjusted(ground, asked.scale) if asked.scale or asked.causes else ground
        simulation = simulate(resolve(ground), draws=0)
        ttft_s, tpot_s = seen(simulation.served)
        causes = causes_of(simulation, seen, settings.front_end_s) if asked.causes else None
    except MoesimError as error:
        return Prediction(row, None, None, reason_of(error))
    return Prediction(row, ttft_s, tpot_s, causes=causes)


def kept_for(asked: Asked) -> Kept:
    """An empty store of what disaggregated rows share, at the costs that are asked for."""
    scale = asked.scale
    return Kept(change=(lambda ground: adjusted(ground, scale)) if scale else None)


def _ground(scenario: Scenario, grounds: dict[str, Groundwork]) -> Groundwork:
    parts = (scenario.model, scenario.cluster, scenario.cost, scenario.engine.name)
    key = "|".join(part if isinstance(part, str) else part.model_dump_json() for part in parts)  # type: ignore[union-attr]
    if key not in grounds:
        grounds[key] = groundwork(scenario)
    return replace(grounds[key], scenario=scenario)


def predict_all(
    rows: Sequence[SiliconRow],
    profiles: Path,
    progress: Callable[[float], None] | None = None,
    asked: Asked = AS_IT_IS,
    workers: int = 1,
) -> list[Prediction]:
    """A prediction for each row, in order; rows that ask for the same run are simulated once.

    workers: processes; each takes the rows of a model and system together, in parts.
    """
    runs = [run_in(row, profiles) for row in rows]
    alike: dict[tuple[object, ...], SiliconRow] = {}
    for run, row in zip(runs, rows, strict=True):
        alike.setdefault(run, row)
    parts = _parts(list(alike.values()))
    priced = in_workers(_predict_part, [(part, profiles, asked) for part in parts], workers, progress)
    known = {run_in(one.row, profiles): one for part in priced for one in part}
    return [replace(known[run], row=row) for run, row in zip(runs, rows, strict=True)]


PART = 24  # rows that a worker takes at once


def _parts(rows: list[SiliconRow]) -> list[list[SiliconRow]]:
    """Rows of one model, system and engine together, which share tables; cut so that workers end at about one time."""
    ordered = sorted(rows, key=lambda row: (row.system, row.model, row.engine))
    return [ordered[start : start + PART] for start in range(0, len(ordered), PART)]


def run_of(row: SiliconRow) -> tuple[object, ...]:
    """What tells the benchmark run that a row is priced by."""
    return (
        row.model, row.system, row.engine, row.version, row.precision, row.mode, row.isl, row.osl, row.layout,
        row.batch, row.concurrency, row.prefill, row.decode,
        row.source[-40:] if "measured=" not in row.source else row.source,
    )  # fmt: skip


def run_in(row: SiliconRow, profiles: Path) -> tuple[object, ...]:
    """What tells the simulation that a row is priced by: its scenario, and how a client sees the run.

    Two dumps tell of one measurement in different words, and no price hangs on an engine's version. Rows that are not
    supported, and those with two pools, are told by what they say.
    """
    if not (row.aggregated and row.moe):
        return run_of(row)
    try:
        scenario = scenario_of(row, profiles)
    except MoesimError:
        return run_of(row)
    settings = settings_of(row, layout_of(row))
    engine = scenario.engine.model_copy(update={"version": "any"})
    text = scenario.model_copy(update={"engine": engine}).model_dump_json()
    return text, settings.cold_s, settings.front_end_s, settings.batch_tokens


@dataclass
class _Shared:
    """What the rows of one model and system share in a process; parts come in their order, so one at a time is kept."""

    key: tuple[object, ...] = ()
    grounds: dict[str, Groundwork] = field(default_factory=dict)
    kept: Kept = field(default_factory=Kept)


_shared = _Shared()


def _predict_part(task: tuple[list[SiliconRow], Path, Asked]) -> list[Prediction]:
    """Predictions of some rows; what they share stays for the next rows of their model and system in this process."""
    rows, profiles, asked = task
    found = []
    for row in rows:
        key = (profiles, row.system, row.model, *sorted(asked.scale.items()))
        if _shared.key != key:
            _shared.key, _shared.grounds, _shared.kept = key, {}, kept_for(asked)
        found.append(predict(row, profiles, _shared.grounds, asked, _shared.kept))
    return found


def predictions_csv(found: Sequence[Prediction]) -> str:
    """`id,status,ttft_ms,tpot_ms,reason`, a line for each row, in order."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("id", "status", "ttft_ms", "tpot_ms", "reason"))
    for one in found:
        times = ("" if value is None else f"{value * 1e3:.4f}" for value in (one.ttft_s, one.tpot_s))
        writer.writerow((one.row.id, one.status, *times, one.reason))
    return out.getvalue()
