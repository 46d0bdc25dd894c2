"""The scenario: one YAML file that says what is deployed, on what, for which load (the contract's file)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from moesim.errors import BadInput
from moesim.spec.base import Spec
from moesim.spec.cluster import BackgroundSpec
from moesim.spec.drift import DriftSpec, ShiftSpec
from moesim.spec.faults import FaultSpec
from moesim.spec.gate import GateChosen
from moesim.spec.overheads import OverheadsSpec
from moesim.spec.overlap import ExpertCacheSpec, OverlapSpec, Schedule, Storage
from moesim.spec.parallel import ParallelSpec
from moesim.spec.rebalance import RebalanceSpec
from moesim.spec.workload import ServingSpec, SloSpec, TrainingSpec
from moesim.spec.yaml_text import FAULTS, parse_yaml, read_yaml, yaml_fault
from moesim.units import BYTES_PER_ELEMENT

Dtype = Literal["fp32", "bf16", "fp16", "fp8", "fp8_block", "int8", "mxfp4", "nvfp4", "int4", "w4a8_mxfp4_mxfp8"]
Phase = Literal["prefill", "decode", "any"]


class ClusterChoice(Spec):
    """A named cluster preset, with its size."""

    system: str
    nodes: int = Field(default=1, gt=0)
    gpus_per_node: int | None = Field(default=None, gt=0)
    background: tuple[BackgroundSpec, ...] = Field(default=(), description="traffic of other jobs; `des` alone sees it")


class EngineSpec(Spec):
    """Whose kernels and rules apply; `moesim` means our own measurements and plain rules."""

    name: Literal["sglang", "vllm", "trtllm", "moesim"] = "sglang"
    version: str = "0.5.14"


class PrecisionSpec(Spec):
    """Element type of each family of tensors."""

    dense: Dtype = "fp8_block"
    attention: Dtype | None = Field(default=None, description="attention's projections; none = as `dense`")
    experts: Dtype = "fp8_block"
    activations: Dtype = "bf16"
    kv_cache: Dtype = "bf16"
    dispatch: Dtype = "fp8"
    combine: Dtype = "bf16"
    gather: Dtype | None = Field(default=None, description="what an all-gather dispatches; none = as `activations`")

    @property
    def projections(self) -> Dtype:
        """Type of attention's projections."""
        return self.attention or self.dense

    @property
    def gathered_share(self) -> float:
        """Bytes that an all-gather dispatches over those of the activations."""
        return BYTES_PER_ELEMENT[self.gather or self.activations] / BYTES_PER_ELEMENT[self.activations]


class CostSpec(Spec):
    """Which cost model prices the operations."""

    source: str = "store"
    profiles: tuple[str, ...] = ("default",)
    extrapolate: Literal["refuse", "allow"] = "refuse"
    experts_from: Literal["sglang", "vllm", "trtllm"] | None = Field(
        default=None, description="engine whose tables price the experts' products; none = the scenario's own"
    )
    experts_version: str | None = Field(
        default=None, description="version of the tables that price the experts' products; none = the newest"
    )
    experts_kernel: str | None = Field(
        default=None,
        min_length=1,
        description="word in the name of the kernel that runs the experts' products; where its rows lack the model's "
        "shape and `extrapolate` allows, its physics at the nearest measured shape prices them; none = any kernel",
    )
    overheads: OverheadsSpec | Path | None = Field(
        default=None, description="host times of the engine: given, or a file of `moesim validate calibrate`"
    )


class LoadFile(Spec):
    """One file of expert counts."""

    file: Path
    phase: Phase = "any"
    weight: float = Field(default=1.0, gt=0)
    prompt_tokens: float | None = Field(default=None, ge=1, description="mean tokens of a prompt: for `expect`")


class ExpectedWorkload(Spec):
    """A workload by what is known of it, without its load."""

    phase: Phase = "any"
    prompt_tokens: float | None = Field(default=None, ge=1, description="mean tokens of a prompt; none = not known")


class ExpectSpec(Spec):
    """Workloads that placements are for: their loads are foretold from the files, beside which they are fitted to."""

    workloads: tuple[ExpectedWorkload, ...] = Field(min_length=1)
    share: float = Field(default=0.6, gt=0, lt=1, description="of the weight of all loads of a fit")


class SyntheticSpec(Spec):
    """Generated routing; what the parameters mean is told in docs/explanation/routing.md."""

    kind: Literal["uniform", "zipf", "lognormal", "power_law", "deepseek_like"] = "deepseek_like"
    exponent: float | None = Field(default=None, ge=0, description="zipf, power_law")
    sigma: float | None = Field(default=None, ge=0, le=100, description="lognormal; more than 100 is beyond a float")
    workloads: int = Field(default=6, gt=0, description="load scenarios drawn")
    seed: int | None = Field(default=None, description="its own seed; none = the scenario's")


class HoldoutSpec(Spec):
    """Which part of the loads the placement is not fitted to, but judged on."""

    by: Literal["file", "step", "time", "none"] = "file"
    fraction: float = Field(default=0.5, gt=0, lt=1)


class RoutingSpec(Spec):
    """Exactly one of `loads`, `trace` and `synthetic`; `shifts` or `drift` change them in simulated time."""

    loads: tuple[LoadFile, ...] | None = Field(default=None, min_length=1)
    trace: Path | None = None
    synthetic: SyntheticSpec | None = None
    holdout: HoldoutSpec = HoldoutSpec()
    drift: DriftSpec | None = Field(default=None, description="loads over simulated time; none = the same throughout")
    mix: Literal["step", "request"] = Field(default="step", description="what is of one load: a step, or a request")
    shifts: tuple[ShiftSpec, ...] = ()
    expect: ExpectSpec | None = Field(default=None, description="workloads to place for; none = those of the files")

    @model_validator(mode="after")
    def _one(self) -> RoutingSpec:
        given = [name for name in ("loads", "trace", "synthetic") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of loads, trace and synthetic, not {' and '.join(given) or 'none'}")
        if self.shifts and self.drift is not None:
            raise ValueError("give shifts or drift, not both")
        if self.expect is not None:
            phases = {load.phase for load in self.loads or ()}
            missing = [one.phase for one in self.expect.workloads if one.phase not in phases]
            if missing:
                raise ValueError(f"expect: no file under loads is of the phase {missing[0]}: give it one")
        return self


class PlacementSpec(Spec):
    """A solver with its replica budget, or a map from a file; `rebalance` lays experts out anew while serving."""

    solver: str | None = None
    redundant_experts: int = Field(default=0, ge=0, description="slots beyond one for each expert, per layer")
    groups: int = Field(default=1, gt=0)
    file: Path | None = None
    tokens_per_rank: int | None = Field(
        default=None, gt=0, description="decode tokens of a rank that a solver on time places for; none = 128"
    )
    rebalance: RebalanceSpec | None = Field(default=None, description="new placements while it serves")

    @model_validator(mode="after")
    def _one(self) -> PlacementSpec:
        if self.solver is not None and self.file is not None:
            raise ValueError("give a solver or a file, not both")
        return self


class CapacitySpec(Spec):
    """What happens when an expert has too many tokens."""

    rule: Literal["dropless", "gshard", "switch", "deepspeed", "megatron", "survey"] = "dropless"
    factor: float | None = Field(default=None, gt=0)
    drop: Literal["position", "probability", "random"] | None = None
    pad: bool | None = None
    backup: Literal["random", "next_best"] | None = None
    min_capacity: int | None = Field(default=None, ge=0, description="deepspeed; none = 4")
    max_capacity: int | None = Field(default=None, ge=0, description="survey; none = no cap")


class CompressionSpec(Spec):
    """Fewer bytes for each element that travels, in a dispatch and in a combine: exactly one of `dtype`, `factor`."""

    dtype: Dtype | None = Field(default=None, description="element type on the wire, its scales included")
    factor: float | None = Field(default=None, gt=1, description="how many times fewer bytes than the activations'")

    @model_validator(mode="after")
    def _one(self) -> CompressionSpec:
        if (self.dtype is None) == (self.factor is None):
            raise ValueError("give exactly one of dtype and factor")
        return self


class DispatchSpec(Spec):
    """How tokens travel to their experts, and to which replica."""

    backend: Literal["deepep", "allreduce", "allgather_reducescatter", "alltoall", "two_level", "tp_dedup"] = "deepep"
    mode: Literal["auto", "normal", "low_latency"] = "auto"
    replica: Literal["local_first", "equal", "round_robin", "fewest_activated", "lp"] = "local_first"
    replica_solve_s: float | None = Field(
        default=None, ge=0, description="time of one layer's replica choice; none = as measured on a CPU core"
    )
    compression: CompressionSpec | None = None
    low_latency_tokens: int | None = Field(
        default=None, gt=0, description="DeepEP's low-latency limit per GPU; none = as the engine sets it"
    )

    @property
    def scatters(self) -> bool:
        """Whether the tokens of a TP group lie scattered over its ranks around the experts."""
        return self.backend in ("deepep", "tp_dedup")


class PoliciesSpec(Spec):
    """A choice on each policy axis."""

    gate: GateChosen = "model"
    capacity: CapacitySpec = CapacitySpec()
    dispatch: DispatchSpec = DispatchSpec()
    schedule: Schedule = "sequential"
    overlap: OverlapSpec = OverlapSpec()
    storage: Storage = "resident"
    expert_cache: ExpertCacheSpec | None = Field(default=None, description="of storage `cached`, which needs it")


TRAINING_OBJECTIVES = ("tokens_per_s_per_gpu", "mfu", "memory_headroom_bytes")


class TrainingLimits(Spec):
    """Upper bounds that a training plan has to keep; one that is left out does not bind."""

    step_s: float | None = Field(default=None, gt=0)
    dropped_fraction: float | None = Field(default=None, ge=0, le=1, description="of the picks, by a capacity rule")
    memory_share: float | None = Field(default=None, gt=0, le=1, description="of the bytes that may be used")


class ObjectiveSpec(Spec):
    """What the tuner maximises, under which service levels."""

    maximize: Literal[
        "output_tokens_per_s_per_gpu",
        "total_tokens_per_s_per_gpu",
        "goodput_per_gpu",
        "tokens_per_s_per_gpu",
        "mfu",
        "memory_headroom_bytes",
    ] = Field(default="output_tokens_per_s_per_gpu", description="the last three are of training")
    minimize: Literal["step_s", "dropped_fraction"] | None = Field(
        default=None, description="training: instead of `maximize`"
    )
    slo: SloSpec = SloSpec()
    limits: TrainingLimits = TrainingLimits()

    @property
    def of_training(self) -> bool:
        """Whether it asks for what only training has."""
        return self.maximize in TRAINING_OBJECTIVES or self.minimize is not None or self.limits != TrainingLimits()

    @model_validator(mode="after")
    def _one(self) -> ObjectiveSpec:
        if self.minimize is not None and "maximize" in self.model_fields_set and self.maximize in TRAINING_OBJECTIVES:
            raise ValueError("give maximize or minimize, not both")
        return self


class SearchSpec(Spec):
    """What the tuner may change; `auto` lets it choose, `fixed` keeps the scenario's."""

    parallel: Literal["auto", "fixed"] = "auto"
    placement: Literal["auto", "fixed"] = "auto"
    roles: Literal["auto", "off"] = Field(
        default="off", description="serving: auto = plans with and without prefill and decode roles; off = as it says"
    )
    pp: Literal["off", "auto"] | tuple[Annotated[int, Field(gt=0)], ...] = Field(
        default="off",
        description="serving: off = one pipeline stage beside the scenario's own plan; auto = 1, 2, 4 and 8; or a list",
    )
    decode_cp: Literal["off", "auto"] | tuple[Annotated[int, Field(gt=0)], ...] = Field(
        default="off",
        exclude_if=lambda asked: asked == "off",  # as in a plan: searches recorded before stay equal
        description="serving: off = whole contexts beside the scenario's own plan; auto = split over every divisor of "
        "the copies that TP keeps; or a list",
    )
    redundant_experts: tuple[int, ...] | None = None
    solvers: tuple[str, ...] | None = None
    capacity_factor: tuple[float, float] | None = None
    schedules: tuple[Literal["sequential", "two_batch", "forward_backward"], ...] | None = None
    backends: tuple[Literal["deepep", "alltoall", "allgather_reducescatter"], ...] | None = Field(
        default=None, description="training: dispatchers to try; none = its own, alltoall and deepep"
    )
    axes: dict[str, tuple[str | int | float | bool | None, ...]] | None = Field(
        default=None, description="further keys of the scenario, dotted, with the values to try"
    )
    sampler: Literal["auto", "tpe", "nsga2", "nsga3", "gp", "cmaes", "qmc", "random"] = Field(
        default="auto", description="auto = Gaussian processes over the choices, by this program"
    )

    @field_validator("roles", "pp", "decode_cp", mode="before")
    @classmethod
    def _off(cls, value: object) -> object:
        return "off" if value is False else value  # YAML reads `off` as false

    @model_validator(mode="after")
    def _rising(self) -> SearchSpec:
        if self.capacity_factor is not None and not 0 < self.capacity_factor[0] <= self.capacity_factor[1]:
            raise ValueError("capacity_factor goes from a low to a high factor, both above 0")
        return self


class Scenario(Spec):
    """A whole scenario; every key but model, cluster and one of serving / training has a default."""

    schema_version: Literal[1] = 1
    model: str
    cluster: ClusterChoice | Path
    engine: EngineSpec = EngineSpec()
    precision: PrecisionSpec = PrecisionSpec()
    cost: CostSpec = CostSpec()
    routing: RoutingSpec = RoutingSpec(synthetic=SyntheticSpec())
    parallel: ParallelSpec | None = Field(default=None, description="none = attention DP and EP over all GPUs")
    placement: PlacementSpec = PlacementSpec(solver="contiguous")
    policies: PoliciesSpec = PoliciesSpec()
    system: str | None = None
    serving: ServingSpec | None = None
    training: TrainingSpec | None = None
    objective: ObjectiveSpec = ObjectiveSpec()
    search: SearchSpec = SearchSpec()
    faults: tuple[FaultSpec, ...] = ()
    records: tuple[Path, ...] = Field(
        default=(), description="your own validations: folders of `validate records`, records, bundles of a node"
    )
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _one_workload(self) -> Scenario:
        if (self.serving is None) == (self.training is None):
            raise ValueError("give exactly one of serving and training")
        if self.serving is None and self.search.pp != "off":
            raise ValueError("search.pp is of serving: a training search tries pipeline stages by itself")
        if self.serving is None and self.search.decode_cp != "off":
            raise ValueError("search.decode_cp is of serving: training keeps no KV cache")
        if self.serving is None and self.cost.overheads is not None:
            raise ValueError("cost.overheads is of serving: training has training.host")
        if self.serving is not None and self.objective.of_training:
            raise ValueError("objective: step time, MFU, drops and headroom are of training, not of serving")
        schedules, unfit = self.search.schedules or (), "two_batch" if self.serving is None else "forward_backward"
        if unfit in schedules:
            raise ValueError(f"search.schedules: {unfit} is of {'serving' if self.serving is None else 'training'}")
        if self.serving is None and self.search.roles != "off":
            raise ValueError("search.roles is of serving: training has no prefill and decode")
        if self.serving is not None and self.search.backends is not None:
            raise ValueError("search.backends is of training; in serving a layout brings its dispatcher")
        return self


def load_scenario(path: Path, overrides: tuple[str, ...] = ()) -> Scenario:
    """Read a scenario file, apply `--set key=value` overrides, resolve its paths against its own folder.

    Raises BadInput with the file, the key and the mend.
    """
    path = Path(path)
    data = read_yaml(path, what="scenario")
    if not isinstance(data, dict):
        raise BadInput("a scenario is a mapping of keys", where=str(path), mend="start with `model:` and `cluster:`")
    if data.get("format") == "moesim-plan" and isinstance(data.get("scenario"), dict):
        data = data["scenario"]  # the plan.yaml of `moesim tune`
    for override in overrides:
        apply_override(data, override)
    scenario = Scenario.read(data, where=path)
    return resolve_paths(scenario, path.parent)


def apply_override(data: dict[str, Any], override: str) -> None:
    """Set `a.b=c` in nested mappings, creating what is absent; `a.0.b=c` in a list. The value is read as YAML.

    Raises BadInput.
    """
    key, equals, value = override.partition("=")
    if not equals or not key.strip():
        raise BadInput("an override has no '='", where=f"--set {override}", mend="write --set key=value")
    try:
        parsed = parse_yaml(value)
    except FAULTS as error:
        raise BadInput(
            f"the value is not valid YAML: {yaml_fault(error)}", where=f"--set {override}", mend="quote it"
        ) from None
    *parents, last = key.strip().split(".")
    node: Any = data
    for parent in parents:
        at = _entry(node, parent, override)
        found = node[at] if isinstance(node, list) else node.get(at)
        if not isinstance(found, dict | list):
            found = node[at] = {}
        node = found
    node[_entry(node, last, override)] = parsed


def _entry(node: Any, part: str, override: str) -> Any:
    """Where an override goes in a mapping (its key) or in a list (a number from 0). Raises BadInput."""
    if not isinstance(node, list):
        return part
    if part.isdecimal() and int(part) < len(node):
        return int(part)
    raise BadInput(
        f"{part!r} is no entry of a list of {len(node)}", where=f"--set {override}",
        mend=f"count its entries from 0 to {len(node) - 1}" if node else "set the whole list: key=[...]",
    )  # fmt: skip


def resolve_paths(scenario: Scenario, folder: Path) -> Scenario:
    """Make every relative path of the scenario relative to `folder`."""

    def at(path: Path | None) -> Path | None:
        return None if path is None else (path if path.is_absolute() else folder / path)

    update: dict[str, Any] = {}
    routing = scenario.routing
    if routing.loads is not None:
        loads = tuple(load.model_copy(update={"file": at(load.file)}) for load in routing.loads)
        update["routing"] = routing.model_copy(update={"loads": loads})
    elif routing.trace is not None:
        update["routing"] = routing.model_copy(update={"trace": at(routing.trace)})
    if scenario.placement.file is not None:
        update["placement"] = scenario.placement.model_copy(update={"file": at(scenario.placement.file)})
    if isinstance(scenario.cluster, Path):
        update["cluster"] = at(scenario.cluster)
    if isinstance(scenario.cost.overheads, Path):
        update["cost"] = scenario.cost.model_copy(update={"overheads": at(scenario.cost.overheads)})
    if scenario.cost.source == "points":  # whose profiles are files; those of the store are names
        files = tuple(name if name == "default" else str(at(Path(name))) for name in scenario.cost.profiles)
        cost = update.get("cost", scenario.cost)
        update["cost"] = cost.model_copy(update={"profiles": files})
    if scenario.records:
        update["records"] = tuple(at(path) for path in scenario.records)
    if scenario.model.endswith(".json"):
        update["model"] = str(at(Path(scenario.model)))
    if scenario.serving is not None and scenario.serving.workload.file is not None:
        workload = scenario.serving.workload.model_copy(update={"file": at(scenario.serving.workload.file)})
        update["serving"] = scenario.serving.model_copy(update={"workload": workload})
    return scenario.model_copy(update=update) if update else scenario
