"""From a scenario to something that can run: specs loaded, plan checked, placement solved, memory counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from moesim import plugins
from moesim.cost.estimate import CostModel
from moesim.engine.combinations import check_combination, check_keys
from moesim.engine.context_layout import check_decode_cp
from moesim.engine.dispatch_checks import check_dispatch, takes_formulas
from moesim.engine.expert_store import expert_storage
from moesim.engine.memory import MemoryLedger, ledger
from moesim.engine.moving import refuse_drift_with_holdout
from moesim.engine.overheads import rules_of
from moesim.engine.role_specs import role_scenarios
from moesim.engine.rules import EngineRules, low_latency_tokens
from moesim.engine.speculative import draft_tokens, refuse_drafts
from moesim.engine.stage_layout import check_stages, of_a_stage, refuse_idle_keys, split_of, stages_of
from moesim.engine.stream_overlap import stream_overlap
from moesim.engine.workload import lengths
from moesim.errors import BadInput, Infeasible
from moesim.graph.decode_context import BY_ALL_TO_ALL
from moesim.graph.priced_step import LayerSetup
from moesim.network.instance import instance_network
from moesim.routing.capacity.rule import capacity_rule
from moesim.routing.drift import cut_in_blocks
from moesim.routing.foretell import Expected, fit_expecting
from moesim.routing.gates.choice import gate_spec
from moesim.routing.gates.loads import gate_loads
from moesim.routing.holdout import split
from moesim.routing.resolve import resolve_routing
from moesim.routing.trace import RoutingCounts, stack_profiles
from moesim.spec.cluster import ClusterSpec
from moesim.spec.hf import load_model
from moesim.spec.maps.frame import MapFrame
from moesim.spec.model import ModelSpec
from moesim.spec.parallel import ParallelSpec
from moesim.spec.placement_file import read_placement
from moesim.spec.plan import ExpertPlacement, PlacementRequest
from moesim.spec.presets import load_cluster
from moesim.spec.scenario import PlacementSpec, PoliciesSpec, Scenario
from moesim.spec.workload import ServingSpec
from moesim.systems.load import apply_system

DEFAULT_SOLVER = "greedy"
TIMED_TOKENS = 128
"""Decode tokens of a rank that a solver on time places for, unless the scenario says."""

SOLVER_EFFORT = 0.06
"""Of a robust solver's work where a placement is solved on the way to a simulation: half a second instead of six."""


@dataclass(frozen=True)
class Groundwork:
    """What all plans of a scenario share: the model, the cluster, the loads to fit to and the loads to judge on.

    judged_on_fit: there was nothing to hold out, so the judge loads are those that the placement was fitted to.
    """

    scenario: Scenario
    model: ModelSpec
    cluster: ClusterSpec
    fit: tuple[RoutingCounts, ...]
    judge: tuple[RoutingCounts, ...]
    judged_on_fit: bool
    costs: CostModel


@dataclass(frozen=True)
class Deployment:
    """One plan on its cluster, checked and ready: `instances` copies of `setup`, side by side.

    prefill: the prefill role where there are roles; the rest is the decode role then.
    """

    ground: Groundwork
    scenario: Scenario
    setup: LayerSetup
    rules: EngineRules
    memory: MemoryLedger
    instances: int
    prefill: Deployment | None = None

    @property
    def parallel(self) -> ParallelSpec:
        """The parallelism of an instance; `setup` has that of one pipeline stage."""
        stages = self.setup.stages
        return self.setup.parallel if stages is None else self.setup.parallel.model_copy(update={"pp": stages.count})

    @property
    def serving(self) -> ServingSpec:
        """The serving part of the scenario; there is one, `groundwork` saw to it."""
        assert self.scenario.serving is not None
        return self.scenario.serving


def groundwork(scenario: Scenario) -> Groundwork:
    """Load everything that does not depend on the plan. Raises BadInput or Infeasible in one line."""
    scenario = apply_system(scenario)
    refuse_unsupported(scenario)
    return lay_groundwork(scenario)


def lay_groundwork(scenario: Scenario) -> Groundwork:
    """`groundwork` of a scenario that has been checked: serving or training, its system applied."""
    model = load_model(scenario.model)
    if scenario.serving is not None:
        refuse_drafts(scenario.serving, model)
    cluster = load_cluster(scenario.cluster)
    rng = np.random.default_rng([scenario.seed, 1])
    loads = cut_in_blocks(resolve_routing(scenario.routing, model, rng), scenario.routing.drift)
    fit, judge = split(loads, scenario.routing.holdout, np.random.default_rng([scenario.seed, 2]))
    own, judge, model = gated(scenario, model, tuple(fit) or tuple(loads), tuple(judge))
    by_file = scenario.routing.holdout.by == "file"
    fit = fit_expecting(own, judge if by_file else (), Expected.of(scenario.routing.expect, model.moe.top_k))
    costs: CostModel = plugins.load(plugins.COSTS, scenario.cost.source, where="cost.source")(scenario, model, cluster)
    return Groundwork(
        scenario=scenario,
        model=model,
        cluster=cluster,
        fit=fit,
        judge=judge or own,
        judged_on_fit=not judge,
        costs=costs,
    )


def refuse_unsupported(scenario: Scenario) -> None:
    """Name what the scenario asks for that this version does not simulate, before anything runs. Raises BadInput."""
    serving = scenario.serving
    if serving is None:
        raise BadInput(
            "this command takes no training run, only `moesim simulate` and `tune` do",
            where="training",
            mend="give `serving` instead",
        )
    if serving.batching.prefix_cache and serving.workload.file is None:
        raise BadInput(
            "prompts of fixed lengths share nothing",
            where="serving.batching.prefix_cache",
            mend="give a trace with block hashes as serving.workload.file, or leave it out",
        )
    check_keys(scenario)
    refuse_idle_keys(scenario)
    refuse_drift_with_holdout(scenario)
    gate_spec(scenario.policies.gate)


def gated(
    scenario: Scenario, model: ModelSpec, fit: tuple[RoutingCounts, ...], judge: tuple[RoutingCounts, ...]
) -> tuple[tuple[RoutingCounts, ...], tuple[RoutingCounts, ...], ModelSpec]:
    """The loads to fit to and to judge on, and the model, as they are under the scenario's gate. Raises BadInput."""
    loads, under = gate_loads((*fit, *judge), scenario.policies.gate, model, np.random.default_rng([scenario.seed, 9]))
    return loads[: len(fit)], loads[len(fit) :], under


def whole_cluster(cluster: ClusterSpec) -> ParallelSpec:
    """The parallelism of a scenario that gives none: attention DP and EP over every GPU."""
    return ParallelSpec(attention_dp=cluster.gpus, ep=cluster.gpus)


def check_plan(ground: Groundwork, scenario: Scenario) -> tuple[ParallelSpec, MemoryLedger]:
    """Whether a plan is legal and fits in memory, without solving its placement; cheap.

    Raises BadInput or Infeasible (with its counted reason) in one line.
    """
    assert scenario.serving is not None
    model, cluster = ground.model, ground.cluster
    parallel = scenario.parallel or whole_cluster(cluster)
    check_parallel(parallel, model, cluster, scenario.policies)
    check_stages(scenario, parallel, model, cluster)
    check_decode_cp(scenario, parallel, model, cluster)
    check_low_latency(scenario, parallel)
    capacity_rule(scenario.policies, model.moe.top_k)
    check_combination(scenario, model)
    stream_overlap(scenario.policies, cluster, of_a_stage(parallel), ground.costs)
    slots = model.moe.experts + scenario.placement.redundant_experts
    if slots % parallel.ep:
        short = -(-slots // parallel.ep) * parallel.ep - model.moe.experts
        raise Infeasible(
            f"{model.moe.experts} experts and {scenario.placement.redundant_experts} redundant ones do not divide by "
            f"ep {parallel.ep}",
            where="placement.redundant_experts",
            mend=f"use {short}",
            reason="slots_not_divisible",
        )
    counted = ledger(
        model,
        cluster,
        parallel,
        scenario.precision,
        slots_per_rank=slots // parallel.ep,
        batching=scenario.serving.batching,
        memory=scenario.serving.memory,
        policies=scenario.policies,
        max_context_tokens=lengths(scenario.serving.workload).longest_context + draft_tokens(scenario.serving),
        mtp=draft_tokens(scenario.serving) > 0,
        low_latency_max_tokens=low_latency_tokens(scenario.policies.dispatch.low_latency_tokens, scenario.engine.name),
        rebalance=scenario.placement.rebalance is not None,
        stages=None if parallel.pp == 1 else split_of(scenario, parallel, model),
    )
    return parallel, counted


def resolve(
    ground: Groundwork, scenario: Scenario | None = None, placement: ExpertPlacement | None = None
) -> Deployment:
    """Check one plan of the groundwork's scenario and make it ready to run.

    scenario: a variant that differs in parallel, placement, policies or batching only. placement: solved beforehand.
    Raises BadInput or Infeasible (with its counted reason) in one line.
    """
    scenario = scenario or ground.scenario
    if scenario.serving is not None and scenario.serving.roles is not None:
        if placement is not None:
            refuse_roles(scenario)
        return resolve_roles(ground, scenario, {})
    if placement is None and scenario.placement.file is not None:
        ranks = (scenario.parallel or whole_cluster(ground.cluster)).ep
        placement = read_placement(scenario.placement.file, MapFrame.of(ground.model, ranks))
    if placement is not None:
        budget = scenario.placement.model_copy(update={"redundant_experts": placement.redundant})
        scenario = scenario.model_copy(update={"placement": budget})
    whole, counted = check_plan(ground, scenario)
    parallel, cluster = of_a_stage(whole), ground.cluster
    if placement is None:
        placement = place(replace(ground, scenario=scenario), scenario.placement, parallel)
    check_placement(placement, ground.model, parallel)
    rules = rules_of(scenario, system=cluster.gpu.name)
    setup = LayerSetup(
        model=ground.model,
        parallel=parallel,
        precision=scenario.precision,
        policies=scenario.policies,
        placement=placement,
        nodes=-(-parallel.gpus // cluster.gpus_per_node),
        gpus_per_node=cluster.gpus_per_node,
        step=rules.step,
        layer=rules.layer,
        overhead_rel_sigma=rules.overhead_rel_sigma,
        storage=expert_storage(
            scenario, ground.model, cluster, parallel, placement, fit=ground.fit, judge=ground.judge
        ),
        overlap=stream_overlap(scenario.policies, cluster, parallel, ground.costs),
        network=instance_network(cluster, parallel.gpus, formula=takes_formulas(scenario)),
        stages=stages_of(scenario, whole, ground.model, cluster),
        context_by_all_to_all=scenario.engine.name in BY_ALL_TO_ALL,
    )
    return Deployment(ground, scenario, setup, rules, counted, cluster.gpus // whole.gpus)


def refuse_roles(scenario: Scenario) -> None:
    """For what compares plans or placements, which it does not by role. Raises BadInput."""
    if scenario.serving is not None and scenario.serving.roles is not None:
        raise BadInput(
            "placements and plans are not compared by role yet", where="serving.roles", mend="leave the roles out"
        )


def resolve_roles(ground: Groundwork, scenario: Scenario, placements: Mapping[str, ExpertPlacement]) -> Deployment:
    """`resolve` of a scenario with roles. placements: by role, solved beforehand; what is not there is solved."""
    found = {}
    for name, (part, cluster) in role_scenarios(scenario, ground.cluster).items():
        one = resolve(replace(ground, cluster=cluster), part, placements.get(name))
        found[name] = replace(one, ground=ground)
    return replace(found["decode"], prefill=found["prefill"])


def check_parallel(parallel: ParallelSpec, model: ModelSpec, cluster: ClusterSpec, policies: PoliciesSpec) -> None:
    """Whether a parallelism plan can run on the cluster. Raises Infeasible (its reason is counted) or BadInput."""
    where = "parallel"
    if parallel.cp > 1:
        raise BadInput(
            "context parallelism over GPUs of its own is not simulated in serving",
            where=f"{where}.cp",
            mend="set cp to 1; decode_cp splits contexts among the GPUs of a TP group",
        )
    order = [axis for axis in parallel.rank_order if axis in ("tp", "dp")]
    if order != ["tp", "dp"] and parallel.tp > 1 and parallel.attention_dp > 1:
        raise BadInput(
            "only TP ranks side by side are simulated yet", where="parallel.rank_order", mend="put tp before dp"
        )
    if parallel.gpus > cluster.gpus or cluster.gpus % parallel.gpus:
        raise Infeasible(
            f"{parallel.gpus} GPUs of an instance do not divide the cluster's {cluster.gpus}",
            where=where,
            mend=f"choose tp x attention_dp{' x pp' if parallel.pp > 1 else ''} that divides {cluster.gpus}",
            reason="gpus_not_divisible",
        )
    node = cluster.gpus_per_node
    if parallel.gpus > node and parallel.gpus % node:
        raise Infeasible(
            f"an instance of {parallel.gpus} GPUs does not fill whole nodes of {node}",
            where=where,
            mend=f"use a multiple of {node} GPUs",
            reason="nodes_not_filled",
        )
    if model.attention.heads % parallel.tp:
        raise Infeasible(
            f"{model.attention.heads} attention heads do not divide by tp {parallel.tp}",
            where=f"{where}.tp",
            mend="choose a tp that divides the heads",
            reason="heads_not_divisible",
        )
    kv_heads = model.attention.kv_heads
    if model.attention.kind == "gqa" and kv_heads % parallel.tp and parallel.tp % kv_heads:
        raise Infeasible(
            f"{kv_heads} KV heads neither divide by tp {parallel.tp} nor divide it",
            where=f"{where}.tp",
            mend="choose a tp that divides the KV heads, or a multiple of them",
            reason="heads_not_divisible",
        )
    if parallel.ep > model.moe.experts:
        raise Infeasible(
            f"ep {parallel.ep} is more than the {model.moe.experts} experts",
            where=f"{where}.ep",
            mend="lower ep",
            reason="more_ranks_than_experts",
        )
    if model.moe.intermediate % parallel.expert_tp:
        raise Infeasible(
            f"an expert's width {model.moe.intermediate} does not divide by expert_tp {parallel.expert_tp}",
            where=f"{where}.expert_tp",
            mend="choose an expert_tp that divides it",
            reason="expert_not_divisible",
        )
    check_dispatch(of_a_stage(parallel), cluster, policies.dispatch)
    backend = policies.dispatch.backend
    if backend in ("deepep", "alltoall") and (parallel.ep == 1 or parallel.expert_tp > 1):
        raise Infeasible(
            f"{backend} needs whole experts on several ranks, not ep {parallel.ep} with expert_tp {parallel.expert_tp}",
            where="policies.dispatch.backend",
            mend="use ep > 1 with expert_tp 1, or backend allreduce",
            reason="backend_needs_ep",
        )
    if backend == "allreduce" and parallel.attention_dp > 1:
        raise Infeasible(
            "allreduce combines the experts' output only where all ranks hold the same tokens",
            where="policies.dispatch.backend",
            mend="use attention_dp 1, or backend deepep or allgather_reducescatter",
            reason="backend_needs_same_tokens",
        )


def check_low_latency(scenario: Scenario, parallel: ParallelSpec) -> None:
    """Whether prompts fit DeepEP's low-latency kernels where a scenario forces them. Raises Infeasible.

    They refuse more tokens a GPU than their buffers were made for (deepseek-ai/DeepEP, low_latency_dispatch,
    `num_max_dispatch_tokens_per_rank`).
    """
    dispatch, serving = scenario.policies.dispatch, scenario.serving
    if serving is None or dispatch.backend != "deepep" or dispatch.mode != "low_latency":
        return
    most = low_latency_tokens(dispatch.low_latency_tokens, scenario.engine.name) * parallel.tp
    asked = serving.batching.max_batch_tokens_per_dp_rank
    if asked > most:
        raise Infeasible(
            f"low-latency dispatch takes at most {most} tokens of an attention-DP rank, a batch may hold {asked}",
            where="policies.dispatch.mode",
            mend=f"use mode auto, or set serving.batching.max_batch_tokens_per_dp_rank to {most}",
            reason="low_latency_limit",
        )


def check_placement(placement: ExpertPlacement, model: ModelSpec, parallel: ParallelSpec) -> None:
    """Whether a placement is one for this model and these ranks. Raises BadInput."""
    if placement.ranks != parallel.ep:
        raise BadInput(
            f"the placement is for {placement.ranks} ranks, the plan has ep {parallel.ep}",
            where="placement",
            mend="solve it for this plan",
        )
    if placement.experts != model.moe.experts or tuple(placement.layer_ids.tolist()) != model.moe.layer_ids:
        raise BadInput(
            f"the placement covers {placement.layers} layers of {placement.experts} experts, "
            f"{model.id} has {model.moe_layers} of {model.moe.experts}",
            where="placement",
            mend="solve it for this model",
        )


def place(ground: Groundwork, spec: PlacementSpec, parallel: ParallelSpec) -> ExpertPlacement:
    """Solve the placement of a plan, fitted to the groundwork's fit loads only."""
    return solve(
        ground,
        spec.solver or DEFAULT_SOLVER,
        slots=ground.model.moe.experts + spec.redundant_experts,
        parallel=parallel,
        groups=spec.groups,
        loads=ground.fit,
    )


def solve(
    ground: Groundwork, solver: str, *, slots: int, parallel: ParallelSpec, groups: int, loads: Sequence[RoutingCounts]
) -> ExpertPlacement:
    """Run a registered solver on the given loads, with little effort.

    Raises Infeasible for slots that do not fit the ranks.
    """
    profiles, weights = stack_profiles(loads)
    request = PlacementRequest(
        loads=profiles,
        weights=weights,
        layer_ids=np.asarray(ground.model.moe.layer_ids, dtype=np.int64),
        absolute_layers=ground.model.layers,
        slots=slots,
        ranks=parallel.ep,
        nodes=max(1, parallel.gpus // ground.cluster.gpus_per_node),
        groups=groups,
        seed=ground.scenario.seed,
        effort=SOLVER_EFFORT,
    )
    run: Callable[[PlacementRequest], ExpertPlacement] = plugins.load(plugins.SOLVERS, solver, where="placement.solver")
    if reads_cost(run) and ground.scenario.serving is not None:
        from moesim.engine.layer_cost import LayerCosts

        scenario = ground.scenario.model_copy(update={"parallel": parallel})
        tokens = scenario.placement.tokens_per_rank or TIMED_TOKENS
        request = replace(
            request, cost=LayerCosts(replace(ground, scenario=scenario), loads, scenario.seed).at(tokens).cost
        )
    return run(request)


def reads_cost(solver: Callable[[PlacementRequest], ExpertPlacement]) -> bool:
    """Whether a solver wants `PlacementRequest.cost`: it says so by an attribute of that name."""
    return bool(getattr(solver, "reads_cost", False))
