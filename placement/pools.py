"""Prefill and decode pools that the tuner searches: how the GPUs are split, and what each pool may run.

A pool is `replicas` instances of one layout. Splits use every GPU of the cluster: whole nodes, and eighths of it. What
a pool cannot run is found out once, not for every pool of the other role beside it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moesim.engine.deployment import Groundwork, check_plan, resolve
from moesim.engine.role_specs import ROLES, merged, role_cluster, role_scenario
from moesim.engine.stepmodel import price_light_steps
from moesim.errors import BadInput, Infeasible, OutsideProfile
from moesim.spec.cluster import ClusterSpec
from moesim.spec.parallel import ParallelSpec
from moesim.spec.scenario import Scenario
from moesim.spec.workload import RoleSpec, RolesSpec
from placement.axes import Scalar
from placement.layouts import divisors, layout_name, layouts_of, with_split_contexts

NONE = "none"
# Clusters of more nodes are split by eighths only.
_NODES_APART = 8
# Replica budgets of each role where the scenario names none, in slots for each rank and layer beyond an even spread;
# reading prompts gains from balance, but one solver and one redundancy are enough to tell what it is worth.
_EXTRA_SLOTS = {"prefill": (0, 1), "decode": (0, 1, 2)}
_DECODE_SOLVERS = ("greedy", "robust")
# Reasons that another value of a further axis may undo; pools that any other one bars are left out at once.
_UNDONE = ("out_of_memory", "contradictory", "low_latency_limit", "outside_profile")

Options = tuple[tuple[str, Scalar], ...]


@dataclass(frozen=True)
class Pool:
    """One role's instances."""

    parallel: ParallelSpec
    backend: str
    solver: str
    redundant_experts: int
    schedule: str
    replicas: int

    def __hash__(self) -> int:
        sizes = self.parallel
        key = (sizes.tp, sizes.attention_dp, sizes.ep, self.backend, self.solver, self.redundant_experts)
        return hash((*key, self.schedule, self.replicas))

    @property
    def gpus(self) -> int:
        """GPUs of all its instances."""
        return self.parallel.gpus * self.replicas

    @property
    def layout(self) -> str:
        """Short name of an instance: `TP8 EP8 AR`, and its schedule where that overlaps."""
        overlap = "" if self.schedule == "sequential" else f" {self.schedule}"
        return f"{layout_name(self.parallel, self.backend)}{overlap}"

    @property
    def placed(self) -> str:
        """Solver and redundant experts: `robust +32`."""
        return f"{self.solver} +{self.redundant_experts}"

    def label(self) -> str:
        """Short name: `2 x TP8 EP8 AR, greedy +0`."""
        return f"{self.replicas} x {self.layout}, {self.placed}"

    def role(self, own: RoleSpec | None = None) -> RoleSpec:
        """The pool in the form of `serving.roles`; own: the scenario's, whose batching, precision and rest stay."""
        own = own or RoleSpec(gpus=self.parallel.gpus)
        placed = {key: value for key, value in (own.placement or {}).items() if key != "file"}
        chosen = {"dispatch": {"backend": self.backend}, "schedule": self.schedule}
        return own.model_copy(
            update={
                "gpus": self.parallel.gpus,
                "replicas": self.replicas,
                "parallel": self.parallel,
                "placement": {**placed, "solver": self.solver, "redundant_experts": self.redundant_experts},
                "policies": merged(own.policies or {}, chosen),
            }
        )


@dataclass(frozen=True)
class Roles:
    """Whether a plan has roles, in a search of roles: its prefill pool (None: it has none), and its decode replicas."""

    prefill: Pool | None = None
    replicas: int = 0

    def params(self, gpus: int) -> dict[str, str]:
        """The choices that samplers see. gpus: of a decode instance."""
        if self.prefill is None:
            return {"split": NONE, "prefill": NONE, "prefill_placement": NONE}
        return {
            "split": f"{self.prefill.gpus}+{gpus * self.replicas}",
            "prefill": self.prefill.layout,
            "prefill_placement": self.prefill.placed,
        }


NO_ROLES = Roles()


def with_pools(scenario: Scenario, prefill: Pool, decode: Pool) -> Scenario:
    """The scenario with these roles."""
    assert scenario.serving is not None
    own = scenario.serving.roles
    roles = RolesSpec.model_construct(
        prefill=prefill.role(own.prefill if own is not None else None),
        decode=decode.role(own.decode if own is not None else None),
        transfer=own.transfer if own is not None else "after",
    )
    return scenario.model_copy(update={"serving": scenario.serving.model_copy(update={"roles": roles})})


def without_pools(scenario: Scenario) -> Scenario:
    """The scenario without roles."""
    if scenario.serving is None or scenario.serving.roles is None:
        return scenario
    return scenario.model_copy(update={"serving": scenario.serving.model_copy(update={"roles": None})})


def searches_roles(scenario: Scenario) -> bool:
    """Whether a search has plans with roles. Raises BadInput where `search` or `serving` contradict them."""
    serving = scenario.serving
    if serving is None or (serving.roles is None and scenario.search.roles == "off"):
        return False
    if serving.balance == "central_queue":
        raise BadInput(
            "a queue at the router is not simulated together with roles",
            where="serving.balance",
            mend="use round_robin, shortest_queue or fewest_tokens, or search without roles",
        )
    if serving.roles is None and scenario.search.parallel == "fixed":
        raise BadInput(
            "search.parallel fixed says nothing about the layouts of roles",
            where="search.roles",
            mend="use search.parallel auto, or give serving.roles",
        )
    return True


def own_pools(scenario: Scenario) -> tuple[Pool, Pool] | None:
    """The scenario's own prefill and decode pools; None where it has no roles. Raises BadInput."""
    if scenario.serving is None or scenario.serving.roles is None:
        return None
    found = []
    for name in ROLES:
        part, role = role_scenario(scenario, name), getattr(scenario.serving.roles, name)
        assert part.parallel is not None
        found.append(
            Pool(
                parallel=part.parallel,
                backend=part.policies.dispatch.backend,
                solver=part.placement.solver or "greedy",
                redundant_experts=part.placement.redundant_experts,
                schedule=part.policies.schedule,
                replicas=role.replicas,
            )
        )
    return found[0], found[1]


def plain_pool(pool: Pool, experts: int, *, schedule: str | None = None) -> Pool:
    """The pool with contiguous experts and no redundancy."""
    spare = -experts % pool.parallel.ep
    return replace(pool, solver="contiguous", redundant_experts=spare, schedule=schedule or pool.schedule)


def splits(cluster: ClusterSpec) -> list[tuple[int, int]]:
    """How the cluster's GPUs are shared out: those of the prefill pool, and those of the decode pool."""
    total, node = cluster.gpus, cluster.gpus_per_node
    first = {total * part // 8 for part in range(1, 8) if part not in {3, 5} and total * part % 8 == 0}
    if cluster.nodes <= _NODES_APART:
        first |= {node * nodes for nodes in range(1, cluster.nodes)}
    return [(one, total - one) for one in sorted(first) if 0 < one < total]


def sizes(gpus: int, node: int) -> list[int]:
    """GPUs of an instance that a pool of so many may have: whole nodes, or equal parts of one."""
    return [size for size in divisors(gpus) if size % node == 0 or node % size == 0]


class PoolChecks:
    """Whether a pool can run in a role: each is checked once."""

    def __init__(self, ground: Groundwork) -> None:
        self.ground = ground
        self._known: dict[tuple[Any, ...], str | None] = {}
        self._priced: dict[tuple[Any, ...], bool] = {}

    def why_not(self, name: str, pool: Pool, options: Options, applied: Callable[[], Scenario]) -> str | None:
        """The reason why the pool cannot run in a role, `prefill_out_of_memory`; None where it can.

        applied: the scenario with the pool in that role and with the options; asked for where it is not known yet.
        """
        sizes = pool.parallel
        own = (sizes.tp, sizes.pp, sizes.cp, sizes.decode_cp, sizes.attention_dp, sizes.ep, sizes.rank_order)
        layout = (*own, pool.backend)
        key = (name, layout, pool.redundant_experts, pool.schedule, pool.replicas, options)
        if key not in self._known:
            self._known[key] = self._checked(name, pool, applied())
        return self._known[key]

    def short(self, name: str, pool: Pool, options: Options, applied: Callable[[], Scenario]) -> float:
        """What share of a GPU's memory the pool lacks: 0 where it can run, infinity where it is not memory it lacks."""
        if self.why_not(name, pool, options, applied) is None:
            return 0.0
        try:
            self.check(name, applied())
        except Infeasible as error:
            return math.inf if error.over is None else error.over
        except BadInput:
            pass
        return math.inf

    def _checked(self, name: str, pool: Pool, scenario: Scenario) -> str | None:
        try:
            ground, part = self.check(name, scenario)
        except Infeasible as error:
            return f"{name}_{error.reason}"
        except BadInput:
            return "contradictory"
        key = (name, pool.layout)
        if key not in self._priced:
            self._priced[key] = _prices(name, ground, part)
        return None if self._priced[key] else f"{name}_outside_profile"

    def check(self, name: str, scenario: Scenario) -> tuple[Groundwork, Scenario]:
        """The groundwork and the scenario of a role that is legal and fits in memory. Raises BadInput, Infeasible."""
        part = role_scenario(scenario, name)
        ground = replace(self.ground, cluster=role_cluster(scenario, name, self.ground.cluster))
        check_plan(ground, part)
        return ground, part


def _prices(name: str, ground: Groundwork, scenario: Scenario) -> bool:
    placement = scenario.placement.model_copy(update={"solver": "contiguous"})
    try:
        price_light_steps(resolve(ground, scenario.model_copy(update={"placement": placement})), (name,))
    except OutsideProfile:
        return False
    return True


def pool_pairs(
    ground: Groundwork, scenario: Scenario, checks: PoolChecks, options: Options
) -> tuple[list[tuple[Pool, Pool]], Counter[str]]:
    """Prefill and decode pools that can run side by side, and how many pairs cannot, by reason.

    Where the search has further axes, pools that another value may help stay, to be checked with each.
    """
    found: dict[tuple[Pool, Pool], None] = {}
    reasons: Counter[str] = Counter()
    for schedule, sides in _sides(ground, scenario):
        barred = [
            [(pool, _barred(checks, name, pool, options, scenario)) for pool in pools]
            for name, pools in zip(ROLES, sides, strict=True)
        ]
        for prefill, first in barred[0]:
            for decode, second in barred[1]:
                if not _overlaps(schedule, prefill, decode):
                    continue
                reason = first or second
                if reason is not None:
                    reasons[reason] += 1
                else:
                    found[prefill, decode] = None
    return list(found), reasons


def nearest_pools(
    ground: Groundwork, scenario: Scenario, checks: PoolChecks, options: Options
) -> tuple[float, tuple[Pool, Pool] | None]:
    """The pair that lacks least memory, and what share of a GPU's its worse pool lacks; None where it is not memory."""
    best: tuple[float, tuple[Pool, Pool] | None] = (math.inf, None)
    for schedule, sides in _sides(ground, scenario):
        short = [
            [(pool, checks.short(name, pool, options, _as_both(scenario, pool))) for pool in pools]
            for name, pools in zip(ROLES, sides, strict=True)
        ]
        for prefill, first in short[0]:
            for decode, second in short[1]:
                if _overlaps(schedule, prefill, decode) and 0.0 < max(first, second) < best[0]:
                    best = (max(first, second), (prefill, decode))
    return best


def _sides(ground: Groundwork, scenario: Scenario) -> Iterator[tuple[str | None, list[list[Pool]]]]:
    """The pools of both roles for every schedule and split."""
    own = own_pools(scenario)
    for schedule in scenario.search.schedules or (None,):
        for totals in _totals(ground.cluster, scenario, own):
            mine = (None, None) if own is None else own
            asked = zip(ROLES, totals, mine, strict=True)
            yield (
                schedule,
                [list(_candidates(ground, scenario, name, gpus, one, schedule)) for name, gpus, one in asked],
            )


def _overlaps(schedule: str | None, prefill: Pool, decode: Pool) -> bool:
    """Whether a pair is one of this schedule; where neither can overlap, it is the sequential pair again."""
    return schedule != "two_batch" or not prefill.schedule == decode.schedule == "sequential"


def _totals(cluster: ClusterSpec, scenario: Scenario, own: tuple[Pool, Pool] | None) -> list[tuple[int, int]]:
    mine = [] if own is None else [(own[0].gpus, own[1].gpus)]
    if scenario.search.parallel == "fixed":
        return mine
    return list(dict.fromkeys([*mine, *splits(cluster)]))


def _barred(checks: PoolChecks, name: str, pool: Pool, options: Options, scenario: Scenario) -> str | None:
    reason = checks.why_not(name, pool, options, _as_both(scenario, pool))
    if reason is not None and options and reason.removeprefix(f"{name}_") in _UNDONE:
        return None
    return reason


def _as_both(scenario: Scenario, pool: Pool) -> Callable[[], Scenario]:
    """The scenario with the pool in either role, when it is asked for."""
    return lambda: with_pools(scenario, pool, pool)


def _candidates(
    ground: Groundwork, scenario: Scenario, name: str, gpus: int, own: Pool | None, schedule: str | None
) -> Iterator[Pool]:
    """The pools of one role on so many GPUs."""
    usual = schedule or (scenario.policies.schedule if own is None else own.schedule)
    layouts: list[tuple[ParallelSpec, str]] = []
    if scenario.search.parallel == "auto":
        for size in sizes(gpus, ground.cluster.gpus_per_node):
            layouts += layouts_of(size)
    if name == "decode":
        layouts = list(with_split_contexts(layouts, scenario.search, ground.model.attention))
    if own is not None and own.gpus == gpus and (own.parallel, own.backend) not in layouts:
        layouts.insert(0, (own.parallel, own.backend))
    for parallel, backend in layouts:
        runs = "sequential" if backend == "allreduce" and usual == "two_batch" else usual
        for solver, redundant in _placements(ground, scenario, name, parallel.ep, own):
            yield Pool(parallel, backend, solver, redundant, runs, gpus // parallel.gpus)


def _placements(
    ground: Groundwork, scenario: Scenario, name: str, ep: int, own: Pool | None
) -> Iterator[tuple[str, int]]:
    placed = scenario.placement
    solver = own.solver if own is not None else placed.solver or "greedy"
    redundant = own.redundant_experts if own is not None else placed.redundant_experts
    if ep == 1:
        yield "contiguous", 0
        return
    if scenario.search.placement == "fixed":
        yield solver, redundant
        return
    experts = ground.model.moe.experts
    spare = -experts % ep
    usual = (spare + extra * ep for extra in _EXTRA_SLOTS[name])
    budgets = scenario.search.redundant_experts or tuple(one for one in usual if one <= experts)
    for one in _solvers(name, solver, scenario.search.solvers):
        for budget in budgets:
            if one == "contiguous" and budget != min(budgets):
                continue  # replicas that follow no load are nobody's plan
            yield one, budget


def _solvers(name: str, own: str, named: Sequence[str] | None) -> tuple[str, ...]:
    """Solvers of a role: for prompts one, the scenario's own where it may be."""
    if name == "decode":
        return tuple(named or _DECODE_SOLVERS)
    if own != "contiguous" and (named is None or own in named):
        return (own,)
    return (next((one for one in named or () if one != "contiguous"), (*(named or ()), "greedy")[0]),)
