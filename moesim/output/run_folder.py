"""Reading the folder of a run: what the report is made from, checked at the edge."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from moesim.errors import BadInput
from moesim.files import read_text
from moesim.spec.base import Spec
from moesim.spec.parallel import ParallelSpec
from moesim.spec.scenario import Scenario
from moesim.spec.workload import RolesSpec
from moesim.spec.yaml_text import read_yaml

RESULT, SIMULATION, PLAN = "result.json", "simulation.json", "plan.yaml"
# What the page shows of every plan that ran.
SHOWN = (
    "output_tokens_per_s_per_gpu",
    "ttft_s.p50",
    "ttft_s.p99",
    "tpot_s.p50",
    "tpot_s.p90",
    "tpot_s.p99",
    "rank_load_max_over_mean",
    "memory_peak_bytes",
)
# Far beyond any figure of a deployment, and far enough from where arithmetic overflows.
_LARGEST = 1e30
Number = Annotated[float, Field(ge=-_LARGEST, le=_LARGEST)]
_REMAKE = "make the run again with `moesim tune`"


class Stored(Spec):
    """A value read back from a run; keys that the report does not show are left aside."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Interval(Stored):
    """A central interval of the joint draws."""

    low: Number
    high: Number


class Gain(Stored):
    """A paired difference; without a baseline that ran there is none."""

    metric: str
    value: Number | None
    low: Number | None
    high: Number | None


class PairedGain(Stored):
    """A paired difference; without draws on both sides it has no interval."""

    value: Number
    low: Number | None
    high: Number | None


class Verdict(Stored):
    """A code and its sentence."""

    code: str
    text: str


class PlanRow(Stored):
    """A plan of the search with its figures; `metrics` is empty where it could not run (`status` says why)."""

    label: str
    parallel: ParallelSpec
    status: str
    meets_slo: bool
    metrics: dict[str, Number]
    roles: RolesSpec | None = None
    intervals: dict[str, Interval] = Field(default_factory=dict)
    tied_with_best: bool | None = None


class ChoiceRow(Stored):
    """What one choice of the best plan is worth: objective and latency lost without it; None: nothing else will do."""

    choice: str
    value: str
    values: int
    tried: int
    loss: Number | None
    latency: Number | None
    instead: str | None
    plan: str | None
    exact: bool


class WorldPlan(Stored):
    """A finalist in another world; `metrics` is empty where it could not run there."""

    label: str
    status: str
    meets_slo: bool
    metrics: dict[str, Number]


class WorldRow(Stored):
    """One world: what differs, the best finalist there (None: none will do), and from which factor on it leads."""

    told: str
    best: str | None
    changed: bool
    turns_at: Number | None
    plans: tuple[WorldPlan, ...]


class WhatIf(Stored):
    """The finalists in worlds that differ in one thing."""

    plans: tuple[str, ...]
    metric: str
    changes: tuple[WorldRow, ...]
    text: str


class ClaimError(Stored):
    """How far predictions of the records cited were off."""

    figure: str
    cases: int
    mean: Number
    median: Number | None


class ClaimRow(Stored):
    """One thing that the verdict leans on, and the records that cover it or are the nearest."""

    claim: str
    of: str
    nodes: int = 1
    status: str
    records: tuple[str, ...]
    error: ClaimError | None
    differs: tuple[str, ...]
    missed: tuple[str, ...]


class Result(Stored):
    """What `moesim tune --json` told."""

    best: PlanRow
    baseline: PlanRow | None
    gain: Gain
    latency_gain: Gain
    placement_gain: dict[str, PairedGain] | None = None
    verdict: Verdict
    alternatives: tuple[PlanRow, ...]
    pareto: tuple[PlanRow, ...]
    trials: int
    space: int
    exhausted: bool
    infeasible: dict[str, int]
    missed_slo: int
    notes: tuple[str, ...]
    trial_list: tuple[PlanRow, ...]
    choices: tuple[ChoiceRow, ...] = ()
    what_if: WhatIf | None = None
    validation: tuple[ClaimRow, ...] = ()
    run: dict[str, float | int | str]


class Stage(Stored):
    """One pipeline stage of the typical decode step."""

    layers: tuple[int, int]
    seconds: Number = Field(ge=0)
    to_the_next_s: Number | None


class ServingFigures(Stored):
    """What the serving loop did, as far as the page tells it."""

    stage_busy: tuple[Annotated[Number, Field(ge=0)], ...] = ()


class Step(Stored):
    """The typical decode step."""

    tokens_per_dp_rank: Number
    step_s: Number = Field(ge=0)
    by_operation_s: dict[str, Number]
    exposed_communication_s: Number
    stages: tuple[Stage, ...] = ()


class RoutingFigures(Stored):
    """Balance, and what it was judged on."""

    max_over_mean: Number
    per_step_max_over_mean: Number
    dispersion: str
    judged_on: tuple[str, ...]
    judged_on_fit: bool


class MemoryFigures(Stored):
    """The ledger of the fullest GPU, bytes."""

    peak_bytes: Number
    limit_bytes: Number = Field(gt=0)
    ledger: dict[str, Number]


class Limit(Stored):
    """A service level with what was found."""

    metric: str = Field(pattern=r"^[a-z0-9]+_s\.p[0-9][0-9]$")
    limit_s: Number = Field(gt=0)
    value_s: Number
    met: bool


class Levels(Stored):
    """All service levels."""

    met: bool
    limits: tuple[Limit, ...]


class PlanFigures(Stored):
    """How the plan of a simulation runs."""

    parallel: ParallelSpec
    instances: int = Field(gt=0)
    solver: str
    redundant_experts: int
    schedule: str
    dispatch: dict[str, Any]
    max_running_requests_per_dp_rank: int


class LoadFigures(Stored):
    """Offered and served load, and why the run is not steady, if it is not."""

    offered_output_tokens_per_s_per_gpu: Number | None
    served_output_tokens_per_s_per_gpu: Number
    fault: str | None


class Change(Stored):
    """A step under a what-if."""

    step_s: Number = Field(ge=0)
    saves: float = Field(ge=-_LARGEST, le=1)  # below 0 where contention makes a change cost more


class LayerHeat(Stored):
    """Where a MoE layer is hottest."""

    layer: int
    rank: int
    rank_over_mean: Number
    slowest_rank: int
    slowest_over_mean: Number
    per_step_max_over_mean: Number
    expert: int
    expert_over_mean: Number
    replicas: int


class LinkBytes(Stored):
    """A link of the cluster in one step."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False, populate_by_name=True)

    source: str = Field(alias="from")
    target: str = Field(alias="to")
    dispatch_bytes: Number
    combine_bytes: Number
    full_rate_s: Number


class Traffic(Stored):
    """Bytes of one step by link."""

    tag: str
    links: tuple[LinkBytes, ...]


class Explained(Stored):
    """One representative step; lists are by rank."""

    kind: str
    which: str
    role: str | None = None
    share_of_time: Number
    tokens_per_dp_rank: Number
    reading_ranks: int
    stages: int = Field(default=1, gt=0)
    step_s: Number = Field(gt=0)
    critical_path_s: dict[str, Number]
    exposed_communication_s: tuple[Number, ...] = Field(min_length=1)
    waited_s: tuple[Number, ...] = Field(min_length=1)
    waited_for_operation_s: dict[str, tuple[Number, ...]]
    waited_for_rank_s: tuple[Number, ...] = Field(min_length=1)
    layers: tuple[LayerHeat, ...]
    what_if: dict[str, Change]
    without_operation: dict[str, Change]
    traffic: Traffic | None


class TransferChange(Stored):
    """The mean time to the first token under a what-if of the KV transfer."""

    ttft_s: Number = Field(ge=0)
    saves: float = Field(ge=-_LARGEST, le=1)


class KvTransfer(Stored):
    """KV cache that moved between roles."""

    requests: int = Field(gt=0)
    bytes: Number = Field(ge=0)
    bytes_per_request: Number
    transfer_s: dict[Literal["mean", "p50", "p90", "p99"], Number] = Field(min_length=4)
    alone_s: Number
    waited_for_nics_s: Number
    hidden_s: Number
    ttft_s: Number = Field(gt=0)
    share_of_ttft: Number
    sent_bytes_by_rank: tuple[Annotated[Number, Field(ge=0)], ...] = Field(min_length=1)
    received_bytes_by_rank: tuple[Annotated[Number, Field(ge=0)], ...] = Field(min_length=1)
    what_if: dict[str, TransferChange]


class Explanations(Stored):
    """Why the run is slow, where it was asked."""

    steps: tuple[Explained, ...]
    transfer: KvTransfer | None = None
    not_priced: dict[str, str] = Field(default_factory=dict)


# A figure, a latency by statistic, or figures by role: the roles of a run are its deepest mapping.
_Latency = dict[str, Number]
_Role = dict[str, Number | _Latency]
Metrics = dict[str, Number | _Latency | dict[str, _Role]]


class Figures(Stored):
    """What `moesim simulate --json` told."""

    metrics: Metrics
    intervals: dict[str, Interval]
    step: Step
    routing: RoutingFigures
    memory: MemoryFigures
    slo: Levels
    load: LoadFigures | None = None
    provenance: dict[str, Number]
    plan: PlanFigures
    serving: ServingFigures | None = None
    explain: Explanations | None = None
    run: dict[str, float | int | str]


class Steps(Stored):
    """The run over time, thinned."""

    start_s: tuple[Number, ...]
    step_s: tuple[Number, ...]
    decode_seqs: tuple[Number, ...]
    prefill_tokens: tuple[Number, ...]


class Series(Stored):
    """What the pictures are drawn from: rank_loads [layers][ranks], latency at percentiles 0 to 100."""

    layer_ids: tuple[int, ...]
    rank_loads: tuple[tuple[Number, ...], ...]
    latency: dict[str, tuple[Number, ...]]
    steps: Steps


class Told(Stored):
    """A simulation: its figures, and its series where they were kept."""

    figures: Figures
    series: Series | None = None


class Simulations(Stored):
    """The best plan's run, and the baseline's where it could run."""

    best: Told
    baseline: Told | None


@dataclass(frozen=True)
class RunFolder:
    """A run, read and checked. launch: engine -> text of its launch.txt; files: (name, bytes) of the folder."""

    result: Result
    simulations: Simulations
    scenario: Scenario
    launch: dict[str, str]
    files: tuple[tuple[str, int], ...]


def read_run(folder: Path) -> RunFolder:
    """Read a run folder that `moesim tune` wrote. Raises BadInput that names the file and the key."""
    folder = Path(folder)
    if not folder.is_dir():
        raise BadInput(
            "there is no such run folder", where=str(folder), mend="give the folder that `moesim tune` wrote"
        )
    result = Result.read(_json(folder / RESULT), where=folder / RESULT)
    check_result(result, where=str(folder / RESULT))
    simulations = Simulations.read(_json(folder / SIMULATION), where=folder / SIMULATION)
    for name, told in (("best", simulations.best), ("baseline", simulations.baseline)):
        if told is not None and told.series is not None:
            check_series(told.series, where=f"{folder / SIMULATION}: {name}.series")
    plan = _yaml(folder / PLAN)
    if not isinstance(plan, dict) or "scenario" not in plan:
        raise BadInput("no `scenario` here", where=str(folder / PLAN), mend=_REMAKE)
    scenario = Scenario.read(plan["scenario"], where=f"{folder / PLAN}: scenario")
    found = sorted([*folder.glob("*/launch.txt"), *folder.glob("*/*/launch.txt")])  # by engine, or by role and engine
    launch = {" ".join(path.relative_to(folder).parts[:-1]): read_text(path, what="launch file") for path in found}
    return RunFolder(result, simulations, scenario, launch, _files(folder))


def check_result(result: Result, *, where: str) -> None:
    """Whether every plan that ran holds the figures that the page shows. Raises BadInput."""
    if result.best.status != "ok":
        raise BadInput(f"the best plan did not run ({result.best.status})", where=f"{where}: best.status", mend=_REMAKE)
    groups = {"alternatives": result.alternatives, "pareto": result.pareto, "trial_list": result.trial_list}
    rows = [("best", result.best)] + ([("baseline", result.baseline)] if result.baseline is not None else [])
    rows += [(f"{name}.{index}", row) for name, group in groups.items() for index, row in enumerate(group)]
    for place, row in rows:
        for metric in (*SHOWN, result.gain.metric):
            if row.status == "ok" and metric not in row.metrics:
                raise BadInput("this figure is missing", where=f"{where}: {place}.metrics.{metric}", mend=_REMAKE)


def check_series(series: Series, *, where: str) -> None:
    """Whether the series fit together. Raises BadInput."""
    widths = {len(row) for row in series.rank_loads}
    if len(series.rank_loads) != len(series.layer_ids) or len(widths) > 1 or 0 in widths:
        raise BadInput("rank_loads is no [layers][ranks] table", where=where, mend=_REMAKE)
    if any(load < 0 for row in series.rank_loads for load in row):
        raise BadInput("rank_loads holds a negative load", where=where, mend=_REMAKE)
    for name, values in series.latency.items():
        if len(values) not in (0, 101) or list(values) != sorted(values):
            raise BadInput(f"latency.{name} is not 101 rising percentiles", where=where, mend=_REMAKE)
    if len({len(values) for values in vars(series.steps).values()}) != 1:
        raise BadInput("the lists of steps differ in length", where=where, mend=_REMAKE)


def _json(path: Path) -> Any:
    try:
        return json.loads(read_text(path, what="run's file"))
    except (ValueError, RecursionError) as error:
        place = f"line {error.lineno}" if isinstance(error, json.JSONDecodeError) else "nested too deep"
        raise BadInput(f"not valid JSON ({place})", where=str(path), mend=_REMAKE) from None


def _yaml(path: Path) -> Any:
    return read_yaml(path, what="plan", mend=_REMAKE)


def _files(folder: Path) -> tuple[tuple[str, int], ...]:
    """Files that a person may want, with their sizes; the page itself and the search's journal are left out."""
    skip = {"report.html", "study.journal"}
    found = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    named = [(path.relative_to(folder).as_posix(), path.stat().st_size) for path in found]
    return tuple(sorted((name, size) for name, size in named if name not in skip))
