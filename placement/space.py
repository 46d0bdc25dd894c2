"""The plans that the hardware allows: layouts x solvers x replica budgets x schedules, illegal ones counted."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from moesim.engine.deployment import Groundwork, check_plan, resolve
from moesim.engine.stepmodel import price_light_steps
from moesim.errors import BadInput, Infeasible, OutsideProfile
from moesim.spec.parallel import ParallelSpec
from moesim.spec.scenario import Scenario

# Replica budgets tried when the scenario names none, in slots for each rank and layer beyond an even spread.
_EXTRA_SLOTS_PER_RANK = (0, 1, 2, 4)
_BACKEND_NAMES = {"deepep": "DeepEP", "allreduce": "AR", "allgather_reducescatter": "AG+RS", "alltoall": "A2A"}
SOLVERS = ("contiguous", "eplb", "greedy", "robust")


@dataclass(frozen=True)
class Plan:
    """One choice on each axis that the tuner searches."""

    parallel: ParallelSpec
    backend: str
    solver: str
    redundant_experts: int
    schedule: str

    @property
    def layout(self) -> str:
        """Short name of parallelism and dispatch: `DP32 EP32 DeepEP`."""
        return f"{self.parallel.label()} {_BACKEND_NAMES.get(self.backend, self.backend)}"

    def label(self) -> str:
        """Short name of the whole plan."""
        overlap = "" if self.schedule == "sequential" else f" {self.schedule}"
        return f"{self.layout}{overlap}, {self.solver} +{self.redundant_experts}"

    def params(self) -> dict[str, str]:
        """The plan as the categorical parameters that samplers see."""
        return {
            "layout": self.layout,
            "schedule": self.schedule,
            "placement": f"{self.solver} +{self.redundant_experts}",
        }

    def apply(self, scenario: Scenario) -> Scenario:
        """The scenario with this plan's choices."""
        dispatch = scenario.policies.dispatch.model_copy(update={"backend": self.backend})
        policies = scenario.policies.model_copy(update={"dispatch": dispatch, "schedule": self.schedule})
        placement = scenario.placement.model_copy(
            update={"solver": self.solver, "redundant_experts": self.redundant_experts, "file": None}
        )
        return scenario.model_copy(update={"parallel": self.parallel, "policies": policies, "placement": placement})


@dataclass(frozen=True)
class Space:
    """All legal plans in a fixed order, and why the others are not: reason -> count."""

    plans: tuple[Plan, ...]
    infeasible: dict[str, int]

    @functools.cached_property
    def by_params(self) -> dict[tuple[str, ...], Plan]:
        """Plans by their parameter values."""
        return {tuple(plan.params().values()): plan for plan in self.plans}

    @functools.cached_property
    def choices(self) -> dict[str, list[str]]:
        """The values of each parameter, in order."""
        names = list(self.plans[0].params())
        return {name: sorted({values[axis] for values in self.by_params}) for axis, name in enumerate(names)}


def own_plan(ground: Groundwork, scenario: Scenario) -> Plan:
    """The plan that the scenario itself describes."""
    parallel = scenario.parallel or ParallelSpec(attention_dp=ground.cluster.gpus, ep=ground.cluster.gpus)
    return Plan(
        parallel=parallel,
        backend=scenario.policies.dispatch.backend,
        solver=scenario.placement.solver or "greedy",
        redundant_experts=scenario.placement.redundant_experts,
        schedule=scenario.policies.schedule,
    )


def baseline_plan(ground: Groundwork, scenario: Scenario) -> Plan:
    """The plain baseline: the scenario's own parallelism, contiguous placement, no redundancy, nothing overlapped."""
    own = own_plan(ground, scenario)
    spare = -ground.model.moe.experts % own.parallel.ep
    return Plan(own.parallel, own.backend, "contiguous", spare, "sequential")


def plain_placement(ground: Groundwork, plan: Plan) -> Plan:
    """The same plan with contiguous experts and no redundancy."""
    return Plan(plan.parallel, plan.backend, "contiguous", -ground.model.moe.experts % plan.parallel.ep, plan.schedule)


def enumerate_space(ground: Groundwork, scenario: Scenario) -> Space:
    """Every plan of the grid, checked before anything is simulated: legality, memory, and whether it can be priced.

    A layout that the cost model cannot price even at a light load leaves with all its plans under `outside_profile`.
    """
    priced: dict[str, bool] = {}
    legal: list[Plan] = []
    reasons: Counter[str] = Counter()
    for plan in _grid(ground, scenario):
        try:
            check_plan(ground, plan.apply(scenario))
        except Infeasible as error:
            reasons[error.reason] += 1
            continue
        if plan.layout not in priced:
            priced[plan.layout] = _priced(ground, plan.apply(scenario))
        if priced[plan.layout]:
            legal.append(plan)
        else:
            reasons["outside_profile"] += 1
    return Space(tuple(legal), dict(sorted(reasons.items())))


def _priced(ground: Groundwork, scenario: Scenario) -> bool:
    """Whether a light decode step and one prompt can be priced; the placement does not matter for that."""
    placement = scenario.placement.model_copy(update={"solver": "contiguous"})
    deployment = resolve(ground, scenario.model_copy(update={"placement": placement}))
    try:
        price_light_steps(deployment)
    except OutsideProfile:
        return False
    return True


def _grid(ground: Groundwork, scenario: Scenario) -> Iterator[Plan]:
    schedules = scenario.search.schedules or (scenario.policies.schedule,)
    own = own_plan(ground, scenario)
    free = scenario.search.parallel == "auto"
    layouts = list(_layouts(ground.cluster.gpus)) if free else [(own.parallel, own.backend)]
    if (own.parallel, own.backend) not in layouts:
        layouts.insert(0, (own.parallel, own.backend))
    base = baseline_plan(ground, scenario)
    yield base  # what every answer is measured against, whatever the search is narrowed to
    for parallel, backend in layouts:
        for schedule in schedules:
            if schedule == "two_batch" and backend == "allreduce":
                continue  # two-batch overlap is an all-to-all schedule in the engines
            for solver, redundant in _placements(ground, scenario, parallel.ep, own):
                plan = Plan(parallel, backend, solver, redundant, schedule)
                if plan != base:
                    yield plan


def _layouts(gpus: int) -> Iterator[tuple[ParallelSpec, str]]:
    """Instances of 1, 2, 4 ... GPUs: attention DP and EP under DeepEP, tensor parallelism, and mixes of them."""
    for size in _divisors(gpus):
        for tp in _divisors(size):
            dp = size // tp
            if size > 1:
                yield ParallelSpec(tp=tp, attention_dp=dp, ep=size), "deepep"
            if dp == 1:
                for ep in _divisors(size):
                    yield ParallelSpec(tp=tp, ep=ep, expert_tp=size // ep), "allreduce"
            else:
                for ep in sorted({1, size}):
                    parallel = ParallelSpec(tp=tp, attention_dp=dp, ep=ep, expert_tp=size // ep)
                    yield parallel, "allgather_reducescatter"


def _placements(ground: Groundwork, scenario: Scenario, ep: int, own: Plan) -> Iterator[tuple[str, int]]:
    if ep == 1:
        yield "contiguous", 0
        return
    if scenario.search.placement == "fixed":
        yield own.solver, own.redundant_experts
        return
    spare = -ground.model.moe.experts % ep
    budgets = scenario.search.redundant_experts or tuple(
        sorted(
            {spare + extra * ep for extra in _EXTRA_SLOTS_PER_RANK if spare + extra * ep <= ground.model.moe.experts}
        )
    )
    for solver in scenario.search.solvers or SOLVERS:
        for redundant in budgets:
            if solver == "contiguous" and redundant != min(budgets):
                continue  # replicas that follow no load are nobody's plan
            yield solver, redundant


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def require_plans(space: Space, where: str) -> None:
    """Raises Infeasible when no plan is legal, with the commonest reasons; BadInput when there was nothing to try."""
    if space.plans:
        return
    if not space.infeasible:
        raise BadInput("the search has no plan at all", where=where, mend="widen `search`")
    told = ", ".join(f"{reason} {count}" for reason, count in space.infeasible.items())
    raise Infeasible(
        f"none of {sum(space.infeasible.values())} plans can run ({told})",
        where=where,
        mend="use more GPUs, a smaller model or fewer redundant experts",
        reason="no_legal_plan",
    )
