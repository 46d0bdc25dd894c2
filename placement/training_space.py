"""The training plans that the hardware allows: TP x PP x CP x EP x DP x expert-TP, dispatchers, overlap, and axes.

Pipeline schedule, virtual stages, micro-batch, recomputation, capacity factor and drop policy are axes of `Space`;
values under `search.axes` take the place of the ones here. Legality and memory are the training engine's own checks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from moesim.engine.training_checks import refuse_unsupported_training
from moesim.engine.training_memory import require_room
from moesim.engine.training_plan import SharedTraining, checked_training
from moesim.errors import BadInput, Infeasible
from moesim.routing.capacity.rule import DROPLESS, DROPS, default_drop
from moesim.spec.parallel import ParallelSpec
from moesim.spec.scenario import Scenario
from moesim.units import human_bytes
from placement.axes import Axis, Scalar, axis_of, value_at
from placement.layouts import divisors
from placement.plans import Plan
from placement.space import Space, collect

# Grids of so many plans are checked whole (2 ms each); of more, a sample tells how many are legal.
ENUMERATED, SAMPLED = 6_000, 1_500
# Values of the capacity factor between the two ends of search.capacity_factor: a grid, so that a small space can be
# evaluated whole and a front has the same points in every run.
FACTORS = 5
_FACTOR, _DROP = "policies.capacity.factor", "policies.capacity.drop"
AXES: dict[str, tuple[Scalar, ...]] = {
    "training.pipeline.schedule": ("1f1b", "interleaved", "zero_bubble"),
    "training.pipeline.virtual_stages": (1, 2),
    "training.micro_batch": (1, 2, 4),
    "training.recompute": ("none", "selective", "full"),
}


@dataclass
class NearMiss:
    """The plan that came nearest to fitting in memory, of those that did not."""

    label: str = ""
    over: float = field(default=math.inf)
    needs: str = ""


def training_axes(scenario: Scenario, top_k: int) -> tuple[Axis, ...]:
    """The axes beside layout, dispatcher, overlap and solver. Raises BadInput for keys that contradict each other."""
    asked = scenario.search.axes or {}
    found = {**AXES, **_capacity(scenario, top_k), **asked}
    return tuple(axis_of(scenario, key, values) for key, values in found.items())


def _capacity(scenario: Scenario, top_k: int) -> dict[str, tuple[Scalar, ...]]:
    ends, rule = scenario.search.capacity_factor, scenario.policies.capacity.rule
    if ends is None or rule == DROPLESS:
        return {}
    if _FACTOR in (scenario.search.axes or {}):
        raise BadInput(
            f"search.capacity_factor and search.axes.{_FACTOR} ask for the same axis",
            where="search.capacity_factor",
            mend="keep one of them",
        )
    default = default_drop(rule, top_k)
    drops = () if rule == "deepspeed" else tuple(drop for drop in DROPS[rule] if drop != default)
    factors = tuple(dict.fromkeys(round(float(one), 4) for one in np.linspace(*ends, FACTORS)))
    return {_FACTOR: factors, **({_DROP: drops} if drops and scenario.policies.capacity.drop is None else {})}


def own_training_plan(scenario: Scenario, gpus: int, axes: tuple[Axis, ...]) -> Plan:
    """The plan that the scenario itself describes: what every answer is measured against."""
    return Plan(
        parallel=scenario.parallel or ParallelSpec(attention_dp=gpus, ep=gpus),
        backend=scenario.policies.dispatch.backend,
        solver=scenario.placement.solver or "greedy",
        redundant_experts=0,
        schedule=scenario.policies.schedule,
        options=tuple((axis.key, value_at(scenario, axis.key, where=axis.key)) for axis in axes),
    )


def training_space(scenario: Scenario, shared: SharedTraining) -> tuple[Space, Plan, NearMiss]:
    """The grid's plans, those that cannot run counted by reason; the scenario's own plan; the nearest miss.

    Raises BadInput for the scenario's own faults and for search keys that contradict it.
    """
    _refuse(scenario)
    refuse_unsupported_training(scenario)
    _, ground, _ = shared.ground(scenario)
    axes = training_axes(scenario, ground.model.moe.top_k)
    own = own_training_plan(scenario, ground.cluster.gpus, axes)
    near = NearMiss()

    def why_not(plan: Plan) -> str | None:
        try:
            checked = checked_training(plan.apply(scenario), scenario.seed, shared)
            over = checked.memory.peak_bytes / checked.memory.limit_bytes - 1.0
            if 0.0 < over < near.over:
                near.label, near.over, near.needs = plan.label(), over, human_bytes(checked.memory.peak_bytes)
            require_room(checked.setup, checked.memory)
        except Infeasible as error:
            return error.reason
        except BadInput:
            if plan == own:
                raise  # a scenario that contradicts itself is told, not counted
            return "contradictory"
        return None

    why_not(own)
    bases = tuple(_bases(scenario, own, ground.cluster.gpus, ground.cluster.gpus_per_node, ground.model.layers))
    space = collect(bases, axes, why_not, scenario.seed, enumerated=ENUMERATED, sampled=SAMPLED)
    return space, own, near


def _refuse(scenario: Scenario) -> None:
    search = scenario.search
    if any(search.redundant_experts or ()):
        raise BadInput(
            "replicas of experts are not simulated in training", where="search.redundant_experts", mend="leave it out"
        )
    if scenario.placement.file is not None:
        raise BadInput(
            "a map of experts fixes the ranks, which the search changes",
            where="placement.file",
            mend="give placement.solver instead",
        )


def _bases(scenario: Scenario, own: Plan, gpus: int, node: int, layers: int) -> Iterator[Plan]:
    search = scenario.search
    layouts = [own.parallel]
    if search.parallel == "auto":
        layouts += [one for one in _layouts(gpus, node, layers, own.parallel) if one != own.parallel]
    backends = dict.fromkeys((own.backend, *(("alltoall", "deepep") if search.backends is None else search.backends)))
    schedules = dict.fromkeys((own.schedule, *(search.schedules or ("sequential", "forward_backward"))))
    solvers = dict.fromkeys((own.solver, *(search.solvers or ())))
    if search.placement == "fixed":
        solvers = dict.fromkeys((own.solver,))
    for parallel in layouts:
        for backend in backends:
            for schedule in schedules:
                for solver in solvers:
                    yield Plan(parallel, backend, solver, 0, schedule, own.options)


def _layouts(gpus: int, node: int, layers: int, own: ParallelSpec) -> Iterator[ParallelSpec]:
    """Stages of tp x cp x dp ranks, with TP and CP inside a node and experts over the stage, whole or cut by TP."""
    for pp in divisors(gpus):
        if pp > layers:
            continue
        for stage in divisors(gpus // pp):
            for tp in divisors(math.gcd(stage, node)):
                for cp in divisors(math.gcd(stage // tp, node // tp)):
                    for expert_tp in sorted({1, tp}):
                        yield ParallelSpec(
                            tp=tp,
                            pp=pp,
                            cp=cp,
                            attention_dp=stage // tp // cp,
                            ep=stage // expert_tp,
                            expert_tp=expert_tp,
                            rank_order=own.rank_order,
                        )


def require_training_plans(space: Space, near: NearMiss, where: str) -> None:
    """Raises Infeasible when no plan is legal, with the commonest reasons and the nearest plan."""
    if space.plans:
        return
    told = ", ".join(f"{reason} {count}" for reason, count in space.infeasible.items())
    nearest = f"; nearest: {near.label}, which needs {near.needs}, {near.over:.0%} over" if near.label else ""
    raise Infeasible(
        f"none of {sum(space.infeasible.values())} plans can run ({told}){nearest}",
        where=where,
        mend="use more GPUs, a smaller model or micro_batch, or widen `search`",
        reason="no_legal_plan",
    )
