"""A placement for time: local search on the expected seconds of a layer, weight reads and network in it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from moesim.spec.layer_cost import LayerCost, balance_cost
from moesim.spec.plan import ExpertPlacement, PlacementRequest
from placement.problem import refuse_uneven_groups
from placement.solvers import robust
from placement.solvers.timed_search import search_layers
from placement.solvers.timed_state import Terms

PASSES = 4
"""Sweeps over all moves of a layer: on DeepSeek-R1's counts 12 gain less than 0.5 % of a step over 4."""


LEAST_READS = 0.05
"""Experts of a rank that cold copies must save to be worth a search: less is below a percent of a rank's reading."""


def solve(request: PlacementRequest) -> ExpertPlacement:
    """Lower the expected seconds of `request.cost` over all loads, from two starts; the best is kept layer by layer.

    One start is `robust`. The other, where it reads fewer experts, is `robust` without replicas, the spare slots filled
    with the coldest experts: an engine needs them filled, and a copy of what is hardly ever picked costs no time. A
    gate's group that spreads over nodes is priced by the copies that it causes, not forbidden. Without a cost all that
    is known is tokens, and the hottest rank's are lowered; `notes["cost"]` says so. Where request.groups > 1 groups
    stay on their nodes. Raises Infeasible where groups, nodes and ranks do not divide.
    """
    refuse_uneven_groups(request)
    cost = request.cost if request.cost is not None else balance_cost()
    best = np.empty((request.layers, request.slots), dtype=np.int64)
    least = np.full(request.layers, np.inf)
    for table in starts(request, cost):
        seconds = improve(request, cost, table)
        better = seconds < least
        best[better], least[better] = table[better], seconds[better]
    fitted = "tokens only" if request.cost is None else f"{cost.tokens_per_rank:g} tokens per rank"
    return request.placement(best, "time", cost=fitted)


solve.reads_cost = True  # type: ignore[attr-defined]


def starts(request: PlacementRequest, cost: LayerCost) -> list[NDArray[np.int64]]:
    """Tables [layers, slots] to search from."""
    mix = request.mix()
    found = [robust.solve(request).physical_to_logical]
    if request.groups > 1:
        return found
    fewest = -(-request.experts // request.ranks) * request.ranks
    if cost.expert_s > 0.0 and request.slots > fewest:
        cold = cold_filled(request, mix, fewest)
        reads = [cost.visited(request.placement(t, "start"), mix, expected=True)[0].mean() for t in (found[0], cold)]
        if reads[1] < reads[0] - LEAST_READS:
            found.append(cold)
    return found


def cold_filled(request: PlacementRequest, mix: NDArray[np.float64], fewest: int) -> NDArray[np.int64]:
    """The greedy placement without spare slots, and in those the coldest experts: [layers, slots]."""
    plain = robust.solve(replace(request, slots=fewest)).physical_to_logical
    spare = (request.slots - fewest) // request.ranks
    coldest = np.argsort(mix, axis=-1, kind="stable")
    found = np.empty((request.layers, request.ranks, request.slots // request.ranks), dtype=np.int64)
    found[:, :, spare:] = plain.reshape(request.layers, request.ranks, -1)
    for layer in range(request.layers):
        at = 0
        for rank in range(request.ranks):
            held = set(found[layer, rank, spare:].tolist())
            for place in range(spare):
                while int(coldest[layer, at % request.experts]) in held:
                    at += 1
                expert = int(coldest[layer, at % request.experts])
                found[layer, rank, place] = expert
                held.add(expert)
                at += 1
    return found.reshape(request.layers, request.slots)


def improve(request: PlacementRequest, cost: LayerCost, tables: NDArray[np.int64]) -> NDArray[np.float64]:
    """Search from tables [layers, slots] in place; returns seconds by layer, in one unit for all tables [layers]."""
    ranks, experts = request.ranks, request.experts
    tokens = cost.tokens_per_rank * ranks * cost.top_k
    groups = cost.groups_of(experts) if cost.by_visit else 1
    nodes = cost.nodes if ranks % cost.nodes == 0 else 1
    by_group = request.loads.reshape(*request.loads.shape[:2], groups, -1)
    whole = by_group.sum(axis=-1, keepdims=True)
    parts = (by_group / np.where(whole > 0, whole, 1.0)).reshape(request.loads.shape)
    odds = cost.group_odds(request.loads) if cost.by_visit else np.ones((*request.loads.shape[:2], 1))
    # Seconds in units of an even rank's, so that powers stay near 1.
    token_s = cost.token_s if cost.by_visit else cost.token_s + cost.gpu_copy_s
    unit = cost.expert_s * request.slots / ranks + token_s * tokens / ranks
    step_tokens = cost.tokens_per_rank * ranks
    terms = Terms(
        cost.expert_s / unit,
        token_s / unit,
        cost.gpu_copy_s * step_tokens / unit if cost.by_visit else 0.0,
        cost.node_copy_s * step_tokens * nodes / ranks / unit if cost.by_visit else 0.0,
        cost.by_visit,
        np.ones((len(request.weights), groups)),
        cost.picks_of_a_group(experts),
        *cost.doublings(request.placement(tables, "start"), request.loads),
    )
    found = np.empty(len(tables))
    search_layers(
        tables,
        np.ascontiguousarray(request.loads.transpose(1, 2, 0)) * tokens,
        np.ascontiguousarray(parts.transpose(1, 2, 0)),
        np.ascontiguousarray(request.weights, dtype=np.float64),
        np.ascontiguousarray(odds.transpose(1, 0, 2)),
        terms,
        ranks,
        nodes,
        ranks // request.nodes if request.groups > 1 else ranks,
        PASSES,
        found,
    )
    return found * unit
