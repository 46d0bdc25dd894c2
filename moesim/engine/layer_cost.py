"""A scenario's cost of one MoE layer, fitted to what its own cost model says of sample placements."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moesim.engine.decode_batch import decode_mode
from moesim.engine.deployment import Deployment, Groundwork, resolve
from moesim.engine.routing_draws import RoutingDraws
from moesim.engine.step_graph import step_seconds
from moesim.engine.steptime import STEPS_PER_LOAD, price_steps, step_counts, variant_for
from moesim.errors import Infeasible, OutsideProfile
from moesim.graph.priced_step import PricedStep
from moesim.routing.trace import RoutingCounts, stack_profiles
from moesim.spec.layer_cost import LayerCost
from moesim.spec.parallel import ParallelSpec
from moesim.spec.plan import ExpertPlacement

Floats = NDArray[np.float64]

EXTRA_SLOTS = (0, 1, 4)
"""Slots of a rank beyond the fewest in the sample placements: what another expert costs shows only between them."""

NODE_TO_GPU = np.concatenate([[0.0], np.geomspace(0.02, 50.0, 60)])
"""Ratios of what a copy costs at the hottest node to what it costs at the hottest GPU, of which the best is kept."""

PLAIN_ERROR = 0.02
"""A step that is its layers' seconds and a constant to within this share shows all of them; others hide some."""

SHOWN_AT_MOST = 2.0
"""A step of two micro-batches shows each one's layers at most twice."""


@dataclass(frozen=True)
class FittedCost:
    """A cost, the dispatch mode that it is of, and its relative error (root mean square) over the sample steps."""

    cost: LayerCost
    mode: str
    rel_error: float


@dataclass(frozen=True)
class _Sample:
    """A priced sample placement: experts_s [steps, layers, ranks], exchange_s [steps, layers], step_s [steps]."""

    placement: ExpertPlacement
    shares: Floats
    experts_s: Floats
    exchange_s: Floats
    step_s: Floats


class LayerCosts:
    """The costs of a scenario's layers at any batch size, fitted to the same sample placements.

    Samples lie in order, at random, packed by load, and packed with every gate group on a node, each with the fewest
    slots and some more; none is the result of a solver. loads: that steps are drawn from.
    """

    def __init__(self, ground: Groundwork, loads: Sequence[RoutingCounts], seed: int) -> None:
        self._loads = tuple(loads)
        self._seed = seed
        self._routing = RoutingDraws(loads, ground.model.moe.top_k)
        self._deployments = list(_deployments(ground, loads, seed))
        self._found: dict[tuple[int, str | None], FittedCost] = {}

    def at(self, tokens_per_rank: int, mode: str | None = None) -> FittedCost:
        """The cost by least squares of the relative error, at decode tokens of an attention-DP rank.

        mode: of DeepEP's dispatch; without it the one that the engine would run. Samples that the profile does not
        cover in it are left out. Raises OutsideProfile where it covers none.
        """
        key = (tokens_per_rank, mode)
        if key not in self._found:
            first = self._deployments[0]
            asked = decode_mode(first, tokens_per_rank) if mode is None else mode
            samples, micro = _priced(self._deployments, self._routing, tokens_per_rank, asked, self._seed)
            placements = [one.setup.placement for one in self._deployments]
            at_random = next(one for one in placements if one.solver == "at random")
            self._found[key] = _fitted(first, samples, micro, asked, self._loads, at_random)
        return self._found[key]


def _deployments(ground: Groundwork, loads: Sequence[RoutingCounts], seed: int) -> Iterator[Deployment]:
    parallel = ground.scenario.parallel or ParallelSpec(attention_dp=ground.cluster.gpus, ep=ground.cluster.gpus)
    experts, ranks, groups = ground.model.moe.experts, parallel.ep, ground.model.moe.groups
    nodes = max(1, parallel.gpus // ground.cluster.gpus_per_node)
    profiles, weights = stack_profiles(loads)
    mix = np.tensordot(weights, profiles, axes=1)
    rng = np.random.default_rng([seed, 12])
    fewest = -(-experts // ranks)
    found = 0
    for extra in EXTRA_SLOTS:
        slots = (fewest + extra) * ranks
        if slots > experts * ranks:
            break
        row = np.arange(slots) % experts
        tables = {
            "in order": np.tile(row, (len(mix), 1)),
            "at random": np.stack([rng.permutation(experts)[row] for _ in mix]),
            "packed": packed(mix, slots, ranks),
        }
        if 1 < nodes <= groups and groups % nodes == 0 and ranks % nodes == 0 and experts % groups == 0:
            tables["packed on nodes"] = _packed_on_nodes(mix, slots, ranks, groups, nodes)
        for name, table in tables.items():
            placement = ExpertPlacement(
                np.ascontiguousarray(table, dtype=np.int64),
                np.asarray(ground.model.moe.layer_ids, dtype=np.int64),
                experts,
                ranks,
                ground.model.layers,
                solver=name,
            )
            try:
                yield resolve(ground, variant_for(ground.scenario, placement), placement)
                found += 1
            except Infeasible:  # more slots than memory holds: the others tell enough
                if not found:
                    raise


def packed(weight: Floats, slots: int, ranks: int) -> NDArray[np.int64]:
    """Heaviest first to the lightest rank with room, spare slots by turns to the heaviest; all rows at once.

    weight: [rows, experts]; returns [rows, slots], in order of ranks. A rank may hold an expert twice.
    """
    rows, experts = weight.shape
    heaviest_first = np.argsort(-weight, axis=-1, kind="stable")
    spare = np.arange(slots - experts) % experts
    items = np.concatenate([heaviest_first, heaviest_first[:, spare]], axis=1)
    each = np.arange(rows)[:, None]
    count = np.zeros((rows, experts))
    np.add.at(count, (each, items), 1.0)
    share = (weight / count)[each, items]
    order = np.argsort(-share, axis=-1, kind="stable")
    load, used = np.zeros((rows, ranks)), np.zeros((rows, ranks), dtype=np.int64)
    room = slots // ranks
    table = np.zeros((rows, slots), dtype=np.int64)
    row = np.arange(rows)
    for place in range(slots):
        item = order[:, place]
        rank = np.where(used < room, load, np.inf).argmin(axis=1)
        table[row, rank * room + used[row, rank]] = items[row, item]
        load[row, rank] += share[row, item]
        used[row, rank] += 1
    return table


def _packed_on_nodes(mix: Floats, slots: int, ranks: int, groups: int, nodes: int) -> NDArray[np.int64]:
    layers, experts = mix.shape
    size = experts // groups
    group_at = packed(mix.reshape(layers, groups, size).sum(axis=-1), groups, nodes)
    members = (group_at[:, :, None] * size + np.arange(size)).reshape(layers * nodes, -1)
    load = np.take_along_axis(mix, members.reshape(layers, experts), axis=-1).reshape(members.shape)
    local = packed(load, slots // nodes, ranks // nodes)
    return np.asarray(np.take_along_axis(members, local, axis=-1).reshape(layers, slots))


def _priced(
    deployments: Sequence[Deployment], routing: RoutingDraws, tokens: int, mode: str, seed: int
) -> tuple[list[_Sample], float]:
    """Samples that the profile covers, and a pass's tokens a rank. Raises OutsideProfile where it covers none."""
    found: list[_Sample] = []
    micro = float(tokens)
    for one in deployments:
        setup = one.setup
        try:
            priced = price_steps(one, routing, tokens, mode, seed)
        except OutsideProfile as error:
            outside = error
            continue
        batch = priced.batch
        micro = float(batch.tokens[0].sum()) / setup.placement.ranks
        counts = step_counts(routing, float(batch.tokens[0].sum()), seed)
        shape = (*counts.shape[:2], setup.placement.ranks)
        passes = 2 if setup.policies.schedule == "two_batch" else 1
        found.append(
            _Sample(
                placement=setup.placement,
                shares=counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1.0),
                experts_s=np.asarray(np.broadcast_to(priced.experts.seconds(), shape)),
                exchange_s=_exchange_s(priced, shape[:2]),
                step_s=step_seconds(setup, [priced] * passes),
            )
        )
    if not found:
        raise outside
    return found, micro


def _exchange_s(priced: PricedStep, shape: tuple[int, ...]) -> Floats:
    both = np.asarray(priced.dispatch.seconds() + priced.combine.seconds())
    both = both.reshape(both.shape[0], -1, both.shape[-1])[..., 0] if both.ndim > 2 else both
    return np.asarray(np.broadcast_to(both, shape)) * priced.chunks


def _fitted(
    first: Deployment,
    samples: Sequence[_Sample],
    tokens: float,
    mode: str,
    loads: Sequence[RoutingCounts],
    at_random: ExpertPlacement,
) -> FittedCost:
    setup, moe = first.setup, first.setup.model.moe
    unit = LayerCost(
        tokens_per_rank=tokens,
        top_k=moe.top_k,
        nodes=setup.domains,
        expert_s=0.0,
        token_s=0.0,
        gpu_copy_s=0.0,
        groups=moe.groups,
        top_groups=moe.top_groups,
        by_visit=setup.policies.dispatch.backend == "deepep" and mode != "low_latency",
    )
    visited = [unit.visited(one.placement, one.shares, expected=False) for one in samples]
    copies = [
        unit.copies(one.placement, one.shares, arriving) for one, (_, arriving) in zip(samples, visited, strict=True)
    ]
    experts_s, expert_s, token_s = _least_squares(
        [np.concatenate([part[which].ravel() for part in visited]) for which in (0, 1)],
        np.concatenate([one.experts_s.ravel() for one in samples]),
    )
    gpu = np.concatenate([part[0].max(axis=-1).ravel() for part in copies])
    node = np.concatenate([part[1].max(axis=-1).ravel() for part in copies])
    exchange = np.concatenate([one.exchange_s.ravel() for one in samples])
    exchange_s, gpu_copy_s, node_copy_s = _hottest(gpu, node, exchange)
    cost = replace(
        unit,
        expert_s=expert_s,
        token_s=token_s,
        gpu_copy_s=gpu_copy_s,
        node_copy_s=node_copy_s,
        experts_s=experts_s,
        exchange_s=exchange_s,
        step_scatter=_step_scatter(samples),
        load_scatter=_load_scatter(at_random, loads),
    )
    return _in_the_step(cost, samples, mode)


def _in_the_step(cost: LayerCost, samples: Sequence[_Sample], mode: str) -> FittedCost:
    """What of a layer's seconds the step shows, as a schedule may hide some or run them twice, and the step's rest."""
    experts, exchange = [], []
    for one in samples:
        work, gpus, nodes = cost.parts(one.placement, one.shares, expected=False)
        experts.append((cost.experts_s + work.max(axis=-1)).sum(axis=-1))
        exchange.append((cost.exchange_s + np.maximum(gpus.max(axis=-1), nodes.max(axis=-1))).sum(axis=-1))
    step = np.concatenate([one.step_s for one in samples])
    both = [np.concatenate(experts), np.concatenate(exchange)]
    plain = step - both[0] - both[1]  # a sequential schedule shows each once
    other_s, of_experts, of_exchange = float(plain.mean()), 1.0, 1.0
    error = (both[0] + both[1] + other_s) / step - 1.0
    if other_s < 0.0 or np.sqrt((error**2).mean()) > PLAIN_ERROR:
        other_s, of_experts, of_exchange = _least_squares(both, step, most=SHOWN_AT_MOST)
        error = (other_s + of_experts * both[0] + of_exchange * both[1]) / step - 1.0
    shown = replace(
        cost,
        expert_s=cost.expert_s * of_experts,
        token_s=cost.token_s * of_experts,
        experts_s=cost.experts_s * of_experts,
        gpu_copy_s=cost.gpu_copy_s * of_exchange,
        node_copy_s=cost.node_copy_s * of_exchange,
        exchange_s=cost.exchange_s * of_exchange,
        other_s=other_s,
    )
    return FittedCost(shown, mode, float(np.sqrt((error**2).mean())))


def _hottest(gpu: Floats, node: Floats, seconds: Floats) -> tuple[float, float, float]:
    """Constant, seconds a copy at the GPU and at the node where the slower of the two sets the time."""
    best = (np.inf, 0.0, 0.0, 0.0)
    for ratio in NODE_TO_GPU if node.any() else (0.0,):
        busiest = np.maximum(gpu, ratio * node)
        constant, each = _least_squares([busiest], seconds)
        error = float((((constant + each * busiest) / seconds - 1.0) ** 2).sum())
        if error < best[0] * (1.0 - 1e-9):
            best = (error, constant, each, each * float(ratio))
    return best[1], best[2], best[3]


def _least_squares(columns: Sequence[Floats], seconds: Floats, most: float = np.inf) -> tuple[float, ...]:
    """A constant and a factor (at most `most`) of each column, none negative, by least squares of relative errors."""
    from scipy.optimize import lsq_linear

    kept = seconds > 0
    if not kept.any():
        return (0.0,) * (len(columns) + 1)
    table = np.stack([np.ones(int(kept.sum())), *(column[kept] for column in columns)], axis=1)
    scale = np.maximum(np.abs(table).max(axis=0), 1e-300)
    above = np.concatenate([[np.inf], np.full(len(columns), most)]) * scale
    found = lsq_linear(table / scale / seconds[kept, None], np.ones(len(table)), (0.0, above), method="bvls")
    return tuple(float(max(factor, 0.0)) for factor in found.x / scale)


def _step_scatter(samples: Sequence[_Sample]) -> float:
    """Relative standard deviation of a rank's share between steps of one load, root mean square over all."""
    one = samples[0]
    ranks = one.placement.rank_loads(one.shares)
    by_load = ranks.reshape(-1, STEPS_PER_LOAD, *ranks.shape[1:])
    return float(np.sqrt(by_load.var(axis=1, ddof=1).mean()) * one.placement.ranks)


def _load_scatter(at_random: ExpertPlacement, loads: Sequence[RoutingCounts]) -> float:
    """The same between loads, of experts that lie at random; 0 with one load."""
    if len(loads) < 2:
        return 0.0
    profiles, _ = stack_profiles(loads)
    return float(np.sqrt(at_random.rank_loads(profiles).var(axis=0, ddof=1).mean()) * at_random.ranks)
