"""The plans that the hardware allows: layouts x solvers x replica budgets x schedules x further axes.

Illegal plans are counted by reason. A grid of up to ENUMERATED plans is checked whole; of a larger one a sample says
how many are legal, and each plan is checked when it is asked for.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace

import numpy as np

from moesim.engine.deployment import Groundwork, check_plan, resolve
from moesim.engine.stepmodel import price_light_steps
from moesim.errors import BadInput, Infeasible, OutsideProfile
from moesim.spec.scenario import Scenario
from placement.axes import Axis, axes_of
from placement.layouts import layouts, stages_to_try, with_split_contexts
from placement.near import Grid
from placement.plans import Plan, baseline_plan, own_options, own_plan, own_without_roles, plain_base, pooled, told
from placement.pools import PoolChecks, nearest_pools, pool_pairs, searches_roles

# Plans of a grid that are all checked (50 microseconds each); of more, a sample of SAMPLED tells how many are legal.
ENUMERATED = 40_000
SAMPLED = 4_000
# Replica budgets tried when the scenario names none, in slots for each rank and layer beyond an even spread.
_EXTRA_SLOTS_PER_RANK = (0, 1, 2, 4)
SOLVERS = ("contiguous", "eplb", "greedy", "robust")


@dataclass(frozen=True)
class Space:
    """Legal plans, and why the others are not: reason -> count.

    plans: all legal ones in a fixed order; of a grid that was not checked whole, those of the sample. infeasible: of
    the grid, or of the sample. size: legal plans, `estimated` from the sample. bases: the grid without the further
    axes, whose values are `axes`. why_not: None where a plan is legal, else the reason.
    """

    plans: tuple[Plan, ...]
    infeasible: dict[str, int]
    size: int
    estimated: bool
    bases: tuple[Plan, ...] = field(repr=False)
    axes: tuple[Axis, ...] = field(repr=False)
    why_not: Callable[[Plan], str | None] = field(repr=False)

    @functools.cached_property
    def _bases(self) -> dict[tuple[str, ...], Plan]:
        cut = len(self.bases[0].params()) - len(self.axes)
        return {tuple(plan.params().values())[:cut]: plan for plan in self.bases}

    @functools.cached_property
    def grid(self) -> Grid:
        """The grid that the plans are of."""
        return Grid(self.bases, self.axes)

    @functools.cached_property
    def _legal(self) -> frozenset[Plan]:
        return frozenset(self.plans)

    @functools.cached_property
    def choices(self) -> dict[str, list[str]]:
        """The values of each parameter, in order; those that no legal plan has are left out where all are known."""
        if self.estimated:
            return self.grid.choices
        named = [plan.params() for plan in self.plans]
        return {name: sorted({one[name] for one in named}) for name in named[0]}

    def __contains__(self, plan: Plan) -> bool:
        return plan in self._legal or (self.estimated and self.why_not(plan) is None)

    def find(self, values: Sequence[str]) -> Plan | None:
        """The legal plan with these parameter values, in the order of `choices`; None where there is none."""
        cut = len(values) - len(self.axes)
        base = self._bases.get(tuple(values[:cut]))
        if base is None:
            return None
        options = []
        for axis, word in zip(self.axes, values[cut:], strict=True):
            value = next((one for one in axis.values if told(one) == word), self)
            if value is self:
                return None
            options.append((axis.key, value))
        plan = replace(base, options=tuple(options))  # type: ignore[arg-type]
        return plan if plan in self else None

    def untried(self, seen: AbstractSet[Plan], room: int, rng: np.random.Generator) -> list[Plan]:
        """Up to `room` legal plans outside `seen`, at random."""
        if not self.estimated:
            left = [plan for plan in self.plans if plan not in seen]
            return [left[int(index)] for index in rng.permutation(len(left))[:room]]
        found: list[Plan] = []
        for _ in range(1000 * room):
            if len(found) == room:
                break
            plan = _drawn(self.bases, self.axes, rng)
            if plan not in seen and plan not in found and self.why_not(plan) is None:
                found.append(plan)
        return found


def _drawn(bases: Sequence[Plan], axes: Sequence[Axis], rng: np.random.Generator) -> Plan:
    base = bases[int(rng.integers(len(bases)))]
    return replace(base, options=tuple((axis.key, axis.values[int(rng.integers(len(axis.values)))]) for axis in axes))


def enumerate_space(ground: Groundwork, scenario: Scenario) -> Space:
    """The grid's plans, checked before anything is simulated: legality, memory, and whether it can be priced.

    A layout that the cost model cannot price even at a light load leaves with all its plans under `outside_profile`;
    values that contradict each other are counted as `contradictory`. Raises BadInput for the scenario's own faults.
    """
    axes = axes_of(scenario)
    checks = PoolChecks(ground)
    why_not = _checker(ground, scenario, checks)
    own = baseline_plan(ground, scenario)
    with contextlib.suppress(Infeasible):  # a scenario that contradicts itself is told, not counted
        if own.prefill is not None:
            for name in own.pools:
                checks.check(name, own.apply(scenario))
        else:
            check_plan(ground, own.apply(scenario))
    plain, bases, barred = _plain_searched(scenario), {own: None}, Counter[str]()
    if plain:
        bases |= dict.fromkeys(_grid(ground, scenario))
    if searches_roles(scenario):
        pairs, barred = pool_pairs(ground, scenario, checks, own.options)
        asked = own_plan(ground, scenario)
        bases |= {asked: None} if asked.prefill is not None else {}
        bases |= {pooled(*pair, own.options): None for pair in pairs}
    found = collect(tuple(bases), axes, why_not, scenario.seed)
    return replace(found, infeasible=dict(sorted((Counter(found.infeasible) + barred).items())))


def _plain_searched(scenario: Scenario) -> bool:
    """Whether a search has plans without roles."""
    serving = scenario.serving
    return serving is None or serving.roles is None or scenario.search.roles == "auto"


def collect(
    bases: tuple[Plan, ...],
    axes: tuple[Axis, ...],
    why_not: Callable[[Plan], str | None],
    seed: int,
    *,
    enumerated: int | None = None,
    sampled: int | None = None,
) -> Space:
    """The space of a grid (bases x axes): checked whole up to `enumerated` plans, else by a sample (None: as usual)."""
    enumerated, sampled = enumerated or ENUMERATED, sampled or SAMPLED
    grid = len(bases) * math.prod(len(axis.values) for axis in axes)
    whole = grid <= enumerated
    options = [[(axis.key, value) for value in axis.values] for axis in axes]
    rng = np.random.default_rng([seed, 10])
    looked: Iterator[Plan] = (
        (replace(base, options=chosen) for base in bases for chosen in itertools.product(*options))
        if whole
        else (_drawn(bases, axes, rng) for _ in range(sampled))
    )
    legal: dict[Plan, None] = {}
    reasons: Counter[str] = Counter()
    seen = good = 0
    for plan in looked:
        seen += 1
        reason = why_not(plan)
        if reason is not None:
            reasons[reason] += 1
            continue
        good += 1
        legal[plan] = None
    size = len(legal) if whole else round(grid * good / seen)
    return Space(tuple(legal), dict(sorted(reasons.items())), size, not whole, bases, axes, why_not)


def _checker(ground: Groundwork, scenario: Scenario, checks: PoolChecks) -> Callable[[Plan], str | None]:
    priced: dict[str, bool] = {}

    def why_not(plan: Plan) -> str | None:
        if plan.prefill is not None:
            if sum(pool.gpus for pool in plan.pools.values()) > ground.cluster.gpus:
                return "roles_exceed_cluster"
            reasons = (
                checks.why_not(name, pool, plan.options, lambda: plan.apply(scenario))
                for name, pool in plan.pools.items()
            )
            return next((reason for reason in reasons if reason is not None), None)
        try:
            check_plan(ground, plan.apply(scenario))
        except Infeasible as error:
            return error.reason
        except BadInput:
            return "contradictory"
        if plan.layout not in priced:
            priced[plan.layout] = _priced(ground, plan.apply(scenario))
        return None if priced[plan.layout] else "outside_profile"

    return why_not


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
    own = own_without_roles(ground, scenario)
    free = scenario.search.parallel == "auto"
    gpus, layers = ground.cluster.gpus, ground.model.layers
    grid = [(own.parallel, own.backend)]
    if free:
        whole = layouts(gpus, stages_to_try(scenario.search, gpus, layers))
        grid = list(with_split_contexts(whole, scenario.search, ground.model.attention))
    if (own.parallel, own.backend) not in grid:
        grid.insert(0, (own.parallel, own.backend))
    base = plain_base(ground, own)
    yield base  # what every answer is measured against, whatever the search is narrowed to
    for parallel, backend in grid:
        for schedule in schedules:
            if schedule == "two_batch" and backend == "allreduce":
                continue  # two-batch overlap is an all-to-all schedule in the engines
            for solver, redundant in _placements(ground, scenario, parallel.ep, own):
                plan = Plan(parallel, backend, solver, redundant, schedule, own.options, own.roles)
                if plan != base:
                    yield plan


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


def require_plans(space: Space, where: str, ground: Groundwork, scenario: Scenario) -> None:
    """Raises Infeasible when no plan is legal, with the reasons and the nearest plan; BadInput where there is none."""
    if space.plans:
        return
    if not space.infeasible:
        raise BadInput("the search has no plan at all", where=where, mend="widen `search`")
    told = ", ".join(f"{reason} {count}" for reason, count in space.infeasible.items())
    raise Infeasible(
        f"none of {sum(space.infeasible.values())} plans can run ({told}){_nearest(space, ground, scenario)}",
        where=where,
        mend="use more GPUs, a smaller model or fewer redundant experts",
        reason="no_legal_plan",
    )


def _nearest(space: Space, ground: Groundwork, scenario: Scenario) -> str:
    """The plan that lacks least memory, in words; nothing where memory is not what any of them lacks."""
    over, label = math.inf, ""
    for plan in space.bases:
        if plan.prefill is not None:
            continue
        try:
            check_plan(ground, plan.apply(scenario))
        except Infeasible as error:
            if error.over is not None and error.over < over:
                over, label = error.over, plan.label()
        except BadInput:
            continue
    if searches_roles(scenario):
        options = own_options(scenario)
        short, pair = nearest_pools(ground, scenario, PoolChecks(ground), options)
        if pair is not None and short < over:
            over, label = short, pooled(*pair, options).label()
    return f"; nearest: {label}, {over:.0%} of a GPU's memory short" if label else ""
