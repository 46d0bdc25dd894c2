"""One plan of a serving or training search, and the plans that a scenario stands for by itself."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from moesim.engine.deployment import Groundwork
from moesim.spec.parallel import ParallelSpec
from moesim.spec.scenario import Scenario
from moesim.spec.workload import HostSpec
from placement.axes import Scalar, value_at, with_value
from placement.layouts import layout_name
from placement.pools import (
    NO_ROLES,
    Options,
    Pool,
    Roles,
    own_pools,
    plain_pool,
    searches_roles,
    with_pools,
    without_pools,
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """One choice on each axis that the tuner searches. options: key of the scenario and value, of the further axes.

    roles: None where the search has none; where the plan has a prefill pool, the rest is its decode pool.
    """

    parallel: ParallelSpec
    backend: str
    solver: str
    redundant_experts: int
    schedule: str
    options: Options = ()
    roles: Roles | None = None

    def __hash__(self) -> int:
        sizes = self.parallel
        key = (sizes.tp, sizes.attention_dp, sizes.ep, self.backend, self.solver, self.redundant_experts)
        return hash((*key, self.schedule, self.options, self.roles))

    @property
    def prefill(self) -> Pool | None:
        """The prefill pool; None in a plan without roles."""
        return None if self.roles is None else self.roles.prefill

    @property
    def decode(self) -> Pool:
        """The decode pool of a plan with roles."""
        assert self.roles is not None
        chosen = (self.parallel, self.backend, self.solver, self.redundant_experts, self.schedule)
        return Pool(*chosen, self.roles.replicas)

    @property
    def pools(self) -> dict[str, Pool]:
        """Role -> its pool; empty in a plan without roles."""
        return {} if self.prefill is None else {"prefill": self.prefill, "decode": self.decode}

    def roles_json(self) -> dict[str, Any] | None:
        """What the search chose of each role, in the form of `serving.roles`; None in a plan without roles."""
        if self.prefill is None:
            return None
        return {name: pool.role().model_dump(mode="json", exclude_none=True) for name, pool in self.pools.items()}

    @property
    def spread(self) -> bool:
        """Whether there are experts to place: expert parallelism in any pool."""
        return max([self.parallel.ep, *(pool.parallel.ep for pool in self.pools.values())]) > 1

    @property
    def stage_gpus(self) -> int:
        """GPUs of its largest pipeline stage, all of an instance's where it has one: no expert is dispatched beyond."""
        every = [self.parallel, *(pool.parallel for pool in self.pools.values())]
        return max(parallel.gpus // parallel.pp for parallel in every)

    @property
    def in_stages(self) -> bool:
        """Whether an instance has several pipeline stages."""
        return self.parallel.pp > 1 or any(pool.parallel.pp > 1 for pool in self.pools.values())

    @property
    def layout(self) -> str:
        """Short name of parallelism and dispatch: `DP32 EP32 DeepEP`; with roles, of both pools."""
        own = layout_name(self.parallel, self.backend)
        if self.prefill is None:
            return own
        return f"prefill {self.prefill.replicas} x {self.prefill.layout}; decode {self.decode.replicas} x {own}"

    def label(self) -> str:
        """Short name of the whole plan."""
        overlap = "" if self.schedule == "sequential" else f" {self.schedule}"
        more = "".join(f", {key.rpartition('.')[2]} {told(value)}" for key, value in self.options)
        if self.prefill is not None:
            return f"prefill {self.prefill.label()}; decode {self.decode.label()}{more}"
        return f"{self.layout}{overlap}, {self.solver} +{self.redundant_experts}{more}"

    def params(self) -> dict[str, str]:
        """The plan as the categorical parameters that samplers see."""
        return {
            "layout": layout_name(self.parallel, self.backend),
            "schedule": self.schedule,
            "placement": f"{self.solver} +{self.redundant_experts}",
            **({} if self.roles is None else self.roles.params(self.parallel.gpus)),
            **{key: told(value) for key, value in self.options},
        }

    def apply(self, scenario: Scenario) -> Scenario:
        """The scenario with this plan's choices."""
        if self.prefill is not None:
            found = with_pools(scenario, self.prefill, self.decode)
            for key, value in self.options:
                found = with_value(found, key, value)
            return found
        scenario = without_pools(scenario)
        dispatch = scenario.policies.dispatch.model_copy(update={"backend": self.backend})
        policies = scenario.policies.model_copy(update={"dispatch": dispatch, "schedule": self.schedule})
        placement = scenario.placement.model_copy(
            update={"solver": self.solver, "redundant_experts": self.redundant_experts, "file": None}
        )
        found = scenario.model_copy(update={"parallel": self.parallel, "policies": policies, "placement": placement})
        training = found.training
        if training is not None and training.host.posts and self.backend != "deepep":
            # What CPU threads post is DeepEP's; another dispatcher has no such time.
            host = HostSpec(layer_s=training.host.layer_s)
            found = found.model_copy(update={"training": training.model_copy(update={"host": host})})
        for key, value in self.options:
            found = with_value(found, key, value)
        return found


def told(value: Scalar) -> str:
    """A value of an axis in words, as samplers see it."""
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def pooled(prefill: Pool, decode: Pool, options: Options) -> Plan:
    """The plan of two pools."""
    roles = Roles(prefill, decode.replicas)
    chosen = (decode.parallel, decode.backend, decode.solver, decode.redundant_experts, decode.schedule)
    return Plan(*chosen, options, roles)


def own_plan(ground: Groundwork, scenario: Scenario) -> Plan:
    """The plan that the scenario itself describes."""
    pools = own_pools(scenario)
    if pools is not None:
        return pooled(*pools, own_options(scenario))
    return own_without_roles(ground, scenario)


def own_without_roles(ground: Groundwork, scenario: Scenario) -> Plan:
    """The plan that the scenario describes, its roles left aside."""
    parallel = scenario.parallel or ParallelSpec(attention_dp=ground.cluster.gpus, ep=ground.cluster.gpus)
    return Plan(
        parallel=parallel,
        backend=scenario.policies.dispatch.backend,
        solver=scenario.placement.solver or "greedy",
        redundant_experts=scenario.placement.redundant_experts,
        schedule=scenario.policies.schedule,
        options=own_options(scenario),
        roles=NO_ROLES if searches_roles(scenario) else None,
    )


def own_options(scenario: Scenario) -> tuple[tuple[str, Scalar], ...]:
    """The scenario's own values on the further axes."""
    return tuple((key, value_at(scenario, key, where=f"search.axes.{key}")) for key in scenario.search.axes or {})


def baseline_plan(ground: Groundwork, scenario: Scenario) -> Plan:
    """The plain baseline: the scenario's own parallelism, contiguous placement, no redundancy, nothing overlapped.

    It has roles where the scenario has some.
    """
    return plain_base(ground, own_plan(ground, scenario))


def plain_base(ground: Groundwork, own: Plan) -> Plan:
    """A plan with contiguous experts, no redundancy, and nothing overlapped."""
    experts = ground.model.moe.experts
    if own.prefill is not None:
        prefill, decode = (plain_pool(pool, experts, schedule="sequential") for pool in (own.prefill, own.decode))
        return pooled(prefill, decode, own.options)
    spare = -experts % own.parallel.ep
    return Plan(own.parallel, own.backend, "contiguous", spare, "sequential", own.options, own.roles)


def plain_placement(ground: Groundwork, plan: Plan) -> Plan:
    """The same plan with contiguous experts and no redundancy."""
    experts = ground.model.moe.experts
    if plan.prefill is not None:
        return pooled(plain_pool(plan.prefill, experts), plain_pool(plan.decode, experts), plan.options)
    spare = -experts % plan.parallel.ep
    return replace(plan, solver="contiguous", redundant_experts=spare)
