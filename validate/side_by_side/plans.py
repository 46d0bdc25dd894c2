"""Plans of either tool as moesim simulates them, under the other's assumptions and under the scenario's own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from moesim.engine.deployment import Groundwork, groundwork, resolve, solve
from moesim.engine.explain import typical_prefill
from moesim.engine.serving import Served
from moesim.engine.simulate import Simulation, simulate, typical_decode
from moesim.engine.stepmodel import ExactModel
from moesim.errors import BadInput, Infeasible, OutsideProfile
from moesim.graph.batch import StepBatch
from moesim.output.metrics import outside_share
from moesim.spec.parallel import ParallelSpec
from moesim.spec.plan import ExpertPlacement
from moesim.spec.scenario import Scenario
from validate.side_by_side.sweep import AicPoint, AicPrice

# Requests of a run for each place of the closed loop; what the first and the last of them meet is not counted.
ROUNDS = 6
# What operations of both tools are put under; an operation that is in none stands under its own name.
ATTENTION = "attention, its products, norms"
EXPERTS = "experts, and the wait for the fullest rank"
GROUPS = {
    "attention": ATTENTION,
    "attention_projections": ATTENTION,
    "experts": EXPERTS,
    "dispatch": "exchange",
    "combine": "exchange",
    "shared_expert": "shared expert, dense layers",
    "dense": "shared expert, dense layers",
    "gate": "router",
    "lm_head": "head",
    "embedding": "embedding",
    "engine_overhead": "host",
}
# Parts of aiconfigurator's names, the first that fits counts. `moe_overlap` holds the whole expert block of a step.
_AIC_GROUPS = (
    ("moe_overlap", "expert block"),
    ("dispatch", "exchange"),
    ("combine", "exchange"),
    ("all_gather", "exchange"),
    ("reduce_scatter", "exchange"),
    ("all_reduce", "exchange"),
    ("_ar", "exchange"),
    ("p2p", "exchange"),
    ("_moe", EXPERTS),
    ("attention", ATTENTION),
    ("mla", ATTENTION),
    ("qkv", ATTENTION),
    ("downscale", ATTENTION),
    ("proj", ATTENTION),
    ("shared", "shared expert, dense layers"),
    ("ffn", "shared expert, dense layers"),
    ("act_gate", "shared expert, dense layers"),
    ("router", "router"),
    ("logits", "head"),
    ("norm", ATTENTION),
    ("embedding", "embedding"),
)
_BLOCK = (EXPERTS, "exchange", "shared expert, dense layers", "router")


@dataclass(frozen=True)
class SidePlan:
    """A plan that both tools can be asked about.

    concurrency: requests in flight in the whole cluster. batch_tokens, running: limits of an attention-DP rank.
    schedule, solver, redundant: moesim's further choices; None: as the scenario has them (aiconfigurator makes none of
    them). options: keys of the scenario and values, of the search's other axes.
    chosen_by: "aiconfigurator" or "moesim".
    """

    parallel: ParallelSpec
    backend: str
    concurrency: int
    batch_tokens: int
    running: int
    chosen_by: str
    schedule: str | None = None
    solver: str | None = None
    redundant: int | None = None
    options: tuple[tuple[str, Any], ...] = ()

    def label(self) -> str:
        """Short name: `DP8 EP8 deepep, 2048 in flight`."""
        overlap = "" if self.schedule in (None, "sequential") else f" {self.schedule}"
        placed = "" if self.solver is None else f", {self.solver} +{self.redundant}"
        return f"{self.parallel.label()} {self.backend}{overlap}{placed}, {self.concurrency} in flight"

    def point(self, gpus: int, isl: int) -> AicPoint:
        """The plan's instance in aiconfigurator's words: whole prompts in a prefill, an even share of the requests."""
        instances = gpus // self.parallel.gpus
        each = max(1, round(self.concurrency / instances / self.parallel.attention_dp))
        return AicPoint(
            tp=self.parallel.tp,
            attention_dp=self.parallel.attention_dp,
            expert_tp=self.parallel.expert_tp,
            ep=self.parallel.ep,
            batch=min(each, self.running),
            context_tokens=max(1, min(each, self.batch_tokens // isl)) * isl,
        )


@dataclass(frozen=True)
class View:
    """What a plan is simulated under. power_law: exponent of a generated skew in place of the scenario's routing.

    even: every expert gets the same instead. in_order: experts in order without replicas. kv_cache: type in place of
    the scenario's. mixed: prompts are read in decode steps; None: as the scenario has it.
    """

    name: str
    power_law: float | None = None
    even: bool = False
    in_order: bool = False
    kv_cache: str | None = None
    mixed: bool | None = None


OWN = View("as the scenario has it")


def assumed(price: AicPrice) -> View:
    """What aiconfigurator takes a plan to run under: its power law, experts in order, its cache, mixed steps."""
    kv = {"bfloat16": "bf16", "fp8": "fp8"}.get(price.kv_cache or "")
    return View(
        "as aiconfigurator assumes",
        power_law=1.01 if price.power_law is None else price.power_law,
        in_order=True,
        kv_cache=kv,
        mixed=True,
    )


def rungs(price: AicPrice) -> list[View]:
    """From its assumptions to the scenario's own, one at a time."""
    first = assumed(price)
    cache = replace(first, name="+ the scenario's KV cache", kv_cache=None)
    batching = replace(cache, name="+ the engine's batching", mixed=None)
    routing = replace(batching, name="+ the scenario's routing, experts in order", power_law=None)
    return [first, cache, batching, routing, replace(OWN, name="+ the scenario's placement")]


@dataclass(frozen=True)
class Seen:
    """What moesim makes of a plan; `error` where it has no figure. Seconds, tokens, bytes.

    Rates and means are over the rounds of the closed loop between the first and the last. mixed_*: the step with
    prompts in it; by_group_s: busy time by GROUPS. extrapolated: share of the step outside the profile.
    """

    error: str | None = None
    tokens_per_s_per_gpu: float = math.nan
    ttft_s: float = math.nan
    tpot_s: float = math.nan
    peak_bytes: float = math.nan
    limit_bytes: float = math.nan
    decode_step_s: float = math.nan
    decode_tokens: float = math.nan
    decode_by_group_s: Mapping[str, float] = field(default_factory=dict)
    mixed_step_s: float = math.nan
    mixed_tokens: float = math.nan
    mixed_by_group_s: Mapping[str, float] = field(default_factory=dict)
    extrapolated: float = math.nan

    def meets(self, ttft_s: float, tpot_s: float) -> bool:
        """Whether its means keep the limits, as aiconfigurator's averages have to."""
        return self.error is None and self.ttft_s <= ttft_s and self.tpot_s <= tpot_s


def plan_of(point: AicPoint, price: AicPrice, gpus: int) -> SidePlan | str:
    """aiconfigurator's instance, replicated until it fills the GPUs; else why moesim cannot run it."""
    if point.pp > 1 or point.cp > 1:
        why = (
            "batches in stages count otherwise there"
            if point.pp > 1
            else "its context parallelism takes GPUs of its own, which is not simulated"
        )
        return f"PP{point.pp} CP{point.cp}: {why}"
    if gpus % point.gpus:
        return f"instances of {point.gpus} GPUs do not fill {gpus}"
    if price.error is not None:
        return price.error
    whole = "allreduce" if point.attention_dp == 1 else "allgather_reducescatter"
    return SidePlan(
        parallel=ParallelSpec(tp=point.tp, attention_dp=point.attention_dp, ep=point.ep, expert_tp=point.expert_tp),
        backend="deepep" if price.comm else whole,
        concurrency=point.concurrency * (gpus // point.gpus),
        batch_tokens=point.context_tokens,
        running=point.batch,
        chosen_by="aiconfigurator",
        schedule="sequential",
    )


def scenario_for(scenario: Scenario, plan: SidePlan, view: View) -> Scenario:
    """The scenario with a plan's choices under a view. Raises BadInput where they contradict each other."""
    data = scenario.model_dump(mode="json", exclude_none=True)
    data["parallel"] = plan.parallel.model_dump(mode="json")
    data["policies"]["dispatch"]["backend"] = plan.backend
    if plan.schedule is not None:
        data["policies"]["schedule"] = plan.schedule
    for key, value in plan.options:
        *parents, last = key.split(".")
        node = data
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    workload = data["serving"]["workload"]
    workload["arrivals"] = {"concurrency": plan.concurrency}
    workload["requests"] = ROUNDS * plan.concurrency
    batching = data["serving"]["batching"]
    batching["max_batch_tokens_per_dp_rank"] = plan.batch_tokens
    batching["max_running_requests_per_dp_rank"] = plan.running
    if view.mixed is not None:
        batching["mixed_chunk"] = view.mixed
    if view.kv_cache is not None:
        data["precision"]["kv_cache"] = view.kv_cache
    if view.even or view.power_law is not None:
        law: dict[str, Any] = {"kind": "uniform"} if view.even else {"kind": "power_law", "exponent": view.power_law}
        law["workloads"] = 2
        data["routing"] = {"synthetic": law, "holdout": {"by": "file", "fraction": 0.5}}
    placement = data.setdefault("placement", {})
    if plan.solver is not None:
        placement |= {"solver": plan.solver, "redundant_experts": plan.redundant}
        placement.pop("file", None)
    if view.in_order or plan.parallel.ep == 1:
        data["placement"] = {"solver": "contiguous", "redundant_experts": 0}
    return Scenario.read(data, where="the plan")


class Stage:
    """Simulates plans of one scenario; keeps solved placements, which many plans share."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.solved: dict[tuple[object, ...], ExpertPlacement] = {}

    def see(self, plan: SidePlan, view: View) -> Seen:
        """A plan under a view; what cannot run is told in `error`."""
        try:
            simulation = self.run(plan, view)
            return _seen(simulation, plan.concurrency)
        except (Infeasible, OutsideProfile, BadInput) as error:
            return Seen(error=error.line())

    def run(self, plan: SidePlan, view: View) -> Simulation:
        """Simulate a plan. Raises Infeasible, OutsideProfile and BadInput."""
        ground = groundwork(scenario_for(self.scenario, plan, view))
        wanted = ground.scenario
        if wanted.placement.file is not None:
            return simulate(resolve(ground), draws=0)
        return simulate(resolve(ground, wanted, self._placement(ground, wanted, view)), draws=0)

    def _placement(self, ground: Groundwork, wanted: Scenario, view: View) -> ExpertPlacement:
        parallel = wanted.parallel
        assert parallel is not None
        spare = wanted.placement.redundant_experts
        spare += -(ground.model.moe.experts + spare) % parallel.ep
        solver, groups = wanted.placement.solver or "greedy", wanted.placement.groups
        nodes = max(1, parallel.gpus // ground.cluster.gpus_per_node) if groups > 1 else 1
        key = (solver, spare, parallel.ep, nodes, view.power_law, view.even)
        if key not in self.solved:
            self.solved[key] = solve(
                ground,
                solver,
                slots=ground.model.moe.experts + spare,
                parallel=parallel,
                groups=groups,
                loads=ground.fit,
            )
        return self.solved[key]


def _seen(simulation: Simulation, concurrency: int) -> Seen:
    deployment = simulation.deployment
    served, ranks = simulation.served, deployment.setup.parallel.attention_dp
    rate, ttft_s, tpot_s = steady(served, concurrency, deployment.ground.cluster.gpus)
    decode = _step(simulation, typical_decode(simulation), "decode")
    reads = served.step_prefill_tokens > 0
    mixed = _step(simulation, typical_prefill(simulation), "prefill") if reads.any() else (math.nan, math.nan, {})
    counted = deployment.memory
    return Seen(
        tokens_per_s_per_gpu=rate,
        ttft_s=ttft_s,
        tpot_s=tpot_s,
        peak_bytes=counted.fixed_bytes + served.peak_kv_tokens * counted.kv_bytes_per_token,
        limit_bytes=counted.limit_bytes,
        decode_step_s=decode[0],
        decode_tokens=decode[1] / ranks,
        decode_by_group_s=decode[2],
        mixed_step_s=mixed[0],
        mixed_tokens=mixed[1] / ranks,
        mixed_by_group_s=mixed[2],
        extrapolated=outside_share(simulation),
    )


def steady(served: Served, concurrency: int, gpus: int) -> tuple[float, float, float]:
    """Output tokens/s/GPU, mean TTFT and mean TPOT in seconds of a closed loop between its first and last round.

    Means are over the requests that come after the first `concurrency` and before the last as many, so that all places
    are taken while they run; the rate is then Little's law (requests in flight / time in the system), which does not
    depend on where in a wave of equal requests the counting begins. A run of fewer than three rounds counts whole.
    """
    order = np.argsort(served.arrival_s, kind="stable")
    counted = order if len(order) < 3 * concurrency else order[concurrency:-concurrency]
    arrived, first, ended = served.arrival_s[counted], served.first_token_s[counted], served.finish_s[counted]
    tpot_s = (ended - first) / np.maximum(served.osl[counted] - 1, 1)
    rate = min(concurrency, len(order)) * float(served.osl[counted].mean()) / float((ended - arrived).mean())
    return rate / gpus, float((first - arrived).mean()), float(tpot_s.mean())


def _step(simulation: Simulation, batch: StepBatch, kind: str) -> tuple[float, float, dict[str, float]]:
    """Seconds, tokens of all ranks, and busy seconds by group of one step."""
    _, times = ExactModel(simulation.model, "maxplus").run(batch, "decode" if kind == "decode" else "prefill")
    step_s = float(times.step_s.mean())
    busy = grouped({name: float(value.mean()) for name, value in times.busy_s.items()})
    # Ranks meet in every layer: what is left of a step without overlap is the wait for the one with most to compute.
    if simulation.deployment.setup.policies.schedule == "sequential":
        busy[EXPERTS] = busy.get(EXPERTS, 0.0) + step_s - sum(busy.values())
    return step_s, float(batch.tokens.sum(axis=-1).mean()), busy


def grouped(busy_s: Mapping[str, float]) -> dict[str, float]:
    """moesim's operations under GROUPS."""
    found: dict[str, float] = {}
    for name, seconds in busy_s.items():
        group = GROUPS.get(name, "exchange" if "exchange" in name or "collective" in name else name)
        found[group] = found.get(group, 0.0) + seconds
    return found


def aic_grouped(by_operation_ms: Mapping[str, float]) -> dict[str, float]:
    """aiconfigurator's operations under the same groups, in seconds."""
    found: dict[str, float] = {}
    for name, milliseconds in by_operation_ms.items():
        group = next((group for part, group in _AIC_GROUPS if part in name), name)
        found[group] = found.get(group, 0.0) + milliseconds / 1e3
    return found


def alike(
    theirs: Mapping[str, float], ours: Mapping[str, float], *, whole_block: bool = False
) -> list[tuple[str, float, float]]:
    """(Group, aiconfigurator's seconds, moesim's), the largest difference first.

    Where aiconfigurator has the expert block as one figure (or `whole_block` asks for it), its parts are added up.
    """
    if whole_block or "expert block" in theirs:
        block = sum(ours.get(name, 0.0) for name in _BLOCK)
        ours = {name: value for name, value in ours.items() if name not in _BLOCK} | {"expert block": block}
        extra = sum(theirs.get(name, 0.0) for name in _BLOCK)
        kept = {name: value for name, value in theirs.items() if name not in _BLOCK}
        theirs = kept | {"expert block": theirs.get("expert block", 0.0) + extra}
    names = {**dict.fromkeys(theirs), **dict.fromkeys(ours)}
    found = [(name, theirs.get(name, 0.0), ours.get(name, 0.0)) for name in names]
    found = [one for one in found if max(one[1], one[2]) > 0]
    return sorted(found, key=lambda one: -abs(one[2] - one[1]))
