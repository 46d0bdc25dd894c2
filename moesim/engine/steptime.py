"""Placements compared in time: the decode step of each at several batch sizes, paired on the same routing and costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

import numpy as np
from numpy.typing import NDArray

from moesim.cost.estimate import Tag
from moesim.engine.decode_batch import decode_mode, refused
from moesim.engine.deployment import Deployment, Groundwork, resolve
from moesim.engine.dispatch_checks import check_background
from moesim.engine.draws import Draw, joint_draws
from moesim.engine.graphs import captured_graphs
from moesim.engine.routing_draws import RoutingDraws
from moesim.engine.step_graph import step_seconds
from moesim.engine.workload import lengths
from moesim.errors import OutsideProfile
from moesim.graph.batch import step_batch
from moesim.graph.plan_pricer import PlanPricer
from moesim.graph.priced_step import Part, PricedStep
from moesim.graph.pricing import Pricer
from moesim.network.choice import CHOICES, STALE, following
from moesim.routing.trace import RoutingCounts
from moesim.spec.plan import ExpertPlacement, max_over_mean
from moesim.spec.scenario import Scenario

Floats = NDArray[np.float64]

# Independent steps drawn for each judged load: the step time's own scatter is averaged over them.
STEPS_PER_LOAD = 6


@dataclass(frozen=True)
class TimedPlacements:
    """Step times by placement at one batch size, all in the dispatch mode that the engine would run.

    step_s: name -> float64 [draws + 1]; entry 0 is as best known, the others are joint draws, the same for all names.
    balance: name -> mean over judged steps and layers of max/mean rank load. left_out: names that the profile does not
    cover at this size -> why. extrapolated: names priced beyond what was measured -> the cost families of such prices.
    refused: names whose deployment never runs such a batch -> why.
    """

    tokens_per_rank: int
    mode: str
    step_s: dict[str, Floats]
    balance: dict[str, float]
    left_out: dict[str, str] = field(default_factory=dict)
    extrapolated: dict[str, tuple[str, ...]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def timed_placements(
    ground: Groundwork,
    placements: Mapping[str, ExpertPlacement],
    judge: Sequence[RoutingCounts],
    tokens_per_rank: Sequence[int],
    draws: int,
    seed: int,
    *,
    mode: str | None = None,
) -> list[TimedPlacements]:
    """Step times of placements at each batch size.

    judge: loads that no placement was fitted to. tokens_per_rank: decode tokens of an attention-DP rank. All placements
    of a row run in the same dispatch mode: the engine's, or `mode`. One that the profile does not cover in it is left
    out of that row. Raises BadInput, Infeasible, and OutsideProfile where a row would hold nothing.
    """
    check_background(ground.cluster, fidelity="maxplus", draws=draws)
    deployments = {
        name: resolve(ground, variant_for(ground.scenario, placement), placement)
        for name, placement in placements.items()
    }
    routing = RoutingDraws(judge, ground.model.moe.top_k)
    truths: list[Draw | None] = [None, *joint_draws(draws, routing.weights, seed)]
    return [_timed(deployments, routing, tokens, truths, seed, mode) for tokens in tokens_per_rank]


def timed_choices(
    ground: Groundwork,
    placement: ExpertPlacement,
    judge: Sequence[RoutingCounts],
    tokens_per_rank: Sequence[int],
    draws: int,
    seed: int,
    *,
    choices: Sequence[str] = (*CHOICES, STALE),
) -> list[TimedPlacements]:
    """Step times of one placement under several replica choices; other arguments and errors as above.

    What looks at a batch's counts pays for its exchange of counts, its solve and its map in every layer, `stale_lp`
    for its map alone.
    """
    check_background(ground.cluster, fidelity="maxplus", draws=draws)
    spec = variant_for(ground.scenario, placement)
    deployments = {
        name: resolve(ground, with_choice(spec, "lp" if name == STALE else name), placement) for name in choices
    }
    routing = RoutingDraws(judge, ground.model.moe.top_k)
    truths: list[Draw | None] = [None, *joint_draws(draws, routing.weights, seed)]
    return [_timed(deployments, routing, tokens, truths, seed, None) for tokens in tokens_per_rank]


def with_choice(scenario: Scenario, replica: str) -> Scenario:
    """The scenario under another replica choice; a solve time of its own stays with choices that solve."""
    dispatch = scenario.policies.dispatch
    solve_s = dispatch.replica_solve_s if CHOICES[replica].exchanges_counts else None
    dispatch = dispatch.model_copy(update={"replica": replica, "replica_solve_s": solve_s})
    return scenario.model_copy(update={"policies": scenario.policies.model_copy(update={"dispatch": dispatch})})


def variant_for(scenario: Scenario, placement: ExpertPlacement) -> Scenario:
    """The scenario with the redundancy of a placement that was solved elsewhere."""
    spec = scenario.placement.model_copy(update={"redundant_experts": placement.redundant, "file": None})
    return scenario.model_copy(update={"placement": spec})


def _timed(
    deployments: Mapping[str, Deployment],
    routing: RoutingDraws,
    tokens: int,
    truths: Sequence[Draw | None],
    seed: int,
    asked: str | None,
) -> TimedPlacements:
    mode = asked if asked is not None else decode_mode(next(iter(deployments.values())), tokens)
    priced: dict[str, PricedStep] = {}
    left_out: dict[str, str] = {}
    for name, one in deployments.items():
        try:
            priced[name] = price_steps(one, routing, tokens, mode, seed, stale=name == STALE)
        except OutsideProfile as error:
            left_out[name] = error.line()
            outside = error
    if not priced:
        raise outside
    kept = {name: deployments[name] for name in priced}
    loads = routing.for_phase("decode")
    step_s = {}
    for name, one in kept.items():
        found = []
        for truth in truths:
            normal = None if truth is None else truth.normal
            micro = [priced[name]] * (2 if one.setup.policies.schedule == "two_batch" else 1)
            times = step_seconds(one.setup, micro, normal=normal)
            by_load = times.reshape(len(loads), STEPS_PER_LOAD).mean(axis=1)
            weights = (routing.weights if truth is None else truth.load_weights)[loads]
            found.append(float(by_load @ weights / weights.sum()))
        step_s[name] = np.asarray(found)
    return TimedPlacements(
        tokens,
        mode,
        step_s,
        _balance(kept, routing, tokens, seed),
        left_out,
        extrapolated={name: families for name, one in priced.items() if (families := _extrapolated(one))},
        refused={name: why for name, one in deployments.items() if (why := refused(one, tokens))},
    )


def _extrapolated(priced: PricedStep) -> tuple[str, ...]:
    """Cost families with a price beyond what was measured."""
    parts = [getattr(priced, each.name) for each in fields(priced)]
    found = {
        one.family
        for part in parts
        if isinstance(part, Part)
        for one in part.estimates
        if (one.tags == Tag.EXTRAPOLATED).any()
    }
    return tuple(sorted(found))


def price_steps(
    deployment: Deployment, routing: RoutingDraws, tokens: int, mode: str, seed: int, *, stale: bool = False
) -> PricedStep:
    """The priced decode steps of a deployment, STEPS_PER_LOAD of each load in turn. Raises OutsideProfile.

    stale: each step splits over replicas as `lp` would have split the one before.
    """
    setup = deployment.setup
    asked = lengths(deployment.serving.workload)
    context = asked.mean_isl + asked.mean_osl / 2
    steps = len(routing.for_phase("decode")) * STEPS_PER_LOAD
    graphs = captured_graphs(deployment.serving.batching, setup.policies, deployment.rules, mode=mode)
    batch = step_batch(
        ranks=setup.parallel.attention_dp,
        decode_seqs=np.full((steps, 1), float(tokens)),
        decode_kv=context,
        padded_tokens=float(graphs.padded(tokens)),
    )
    micro = batch.half() if setup.policies.schedule == "two_batch" else batch
    counts = step_counts(routing, float(micro.tokens[0].sum()), seed)
    pricer = PlanPricer(setup, deployment.ground.costs)
    if stale:
        pricer.replicas = following(pricer.replicas, _before(counts))
    return pricer.price(micro, counts, mode=mode, graphed=graphs.holds(tokens))


def _before(counts: Floats) -> Floats:
    """The counts of the step before each: steps of a load follow each other, its first one its last."""
    by_load = counts.reshape(-1, STEPS_PER_LOAD, *counts.shape[1:])
    return np.roll(by_load, 1, axis=1).reshape(counts.shape)


def step_counts(routing: RoutingDraws, group_tokens: float, seed: int) -> Floats:
    """The same counts for every placement: [judged loads of decode x steps, layers, experts]."""
    drawn = [
        routing.counts(load, np.full(STEPS_PER_LOAD, group_tokens), np.random.default_rng([seed, 8, load]))
        for load in routing.for_phase("decode")
    ]
    return np.concatenate(drawn)


def _balance(deployments: Mapping[str, Deployment], routing: RoutingDraws, tokens: int, seed: int) -> dict[str, float]:
    found = {}
    for name, one in deployments.items():
        counts = step_counts(routing, float(tokens * one.setup.parallel.attention_dp), seed)
        replicas = Pricer(one.setup, one.ground.costs).replicas
        if name == STALE:
            replicas = following(replicas, _before(counts))
        found[name] = float(max_over_mean(replicas.rank_loads(counts)).mean())
    return found
