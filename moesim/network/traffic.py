"""Who sends how much over which leg in an expert-parallel dispatch or combine, by backend and mode.

DeepEP (deepseek-ai/DeepEP, README and csrc/kernels): low-latency sends one copy of a token for each expert that it
picks, straight to the expert's rank. Normal mode sends it once to each other node that it visits, to the rank with the
sender's own index there, which forwards it over NVLink once to each rank that it visits. A combine is its dispatch
backwards: same copies, directions swapped. Copies that stay on their rank cross no link.

Low-latency copies follow from counts (tag "formula"). How many ranks and nodes a token visits depends on which experts
it picks together, which counts do not tell: `visit_chances` is a model (tag "assumed"), `visits_from_ids` is exact.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numba import njit
from numpy.typing import NDArray

from moesim.cost.estimate import Tag
from moesim.errors import BadInput
from moesim.routing.inclusion import cap_shares, solve_odds
from moesim.spec.plan import ExpertPlacement
from moesim.units import BYTES_PER_ELEMENT

Floats = NDArray[np.float64]
Mode = Literal["normal", "low_latency"]

# Bytes beside the hidden vector (csrc/config.hpp `LowLatencyLayout`, csrc/kernels/internode.cu `SourceMeta` and
# `get_num_bytes_per_rdma_token`, DeepEP 1.x): one int4 header; two ints; expert id and weight of each pick; messages
# are aligned to an int4; one float32 scale for 128 fp8 elements.
HEADER_BYTES = 16
SOURCE_META_BYTES = 8
PICK_ID_BYTES = 4
PICK_WEIGHT_BYTES = 4
ALIGN_BYTES = 16
SCALE_BYTES = 4
SCALE_BLOCK = 128
# A chance of missing a rank is kept above this, so that its logarithm exists.
LEAST_MISS = 1e-12
# A group's share of the picks is kept above this, so that a set of groups can always be drawn.
LEAST_SHARE = 1e-9


@dataclass(frozen=True)
class LegCopies:
    """Token copies that each rank sends (out) and receives (in) over each leg: all float64 [..., ranks]."""

    nic_out: Floats
    nic_in: Floats
    nvlink_out: Floats
    nvlink_in: Floats


def fan_out_tag(mode: Mode) -> Tag:
    """Where the number of copies comes from: counts alone in low-latency mode, a model of co-selection in normal."""
    return Tag.FORMULA if mode == "low_latency" else Tag.ASSUMED


def message_bytes(step: Literal["dispatch", "combine"], mode: Mode, *, hidden: int, dtype: str, top_k: int) -> float:
    """Bytes of one copy of a token with scales and metadata, as DeepEP lays it out."""
    width = BYTES_PER_ELEMENT["fp8"] if dtype == "fp8_block" else BYTES_PER_ELEMENT[dtype]
    payload = hidden * width
    if step == "dispatch" and dtype in ("fp8", "fp8_block"):
        payload += -(-hidden // SCALE_BLOCK) * SCALE_BYTES
    if mode == "low_latency":
        return payload + (HEADER_BYTES if step == "dispatch" else 0)
    ids = PICK_ID_BYTES * top_k if step == "dispatch" else 0
    whole = payload + SOURCE_META_BYTES + ids + PICK_WEIGHT_BYTES * top_k
    return float(-(-whole // ALIGN_BYTES) * ALIGN_BYTES)


def low_latency_copies(tokens: Floats, rank_loads: Floats, *, nodes: int) -> LegCopies:
    """Copies by leg when each pick is sent on its own.

    tokens: [..., ranks], tokens that each rank sends; rank_loads: [..., ranks], copies that arrive on each rank; their
    leading axes broadcast. Which rank's tokens go where is taken as independent.
    """
    tokens, loads = np.broadcast_arrays(np.asarray(tokens, np.float64), np.asarray(rank_loads, np.float64))
    source = _part(tokens)
    sent = loads.sum(axis=-1, keepdims=True) * source
    target = _part(loads)
    source_node, target_node = _of_own_node(source, nodes), _of_own_node(target, nodes)
    return LegCopies(
        nic_out=sent * _positive(1.0 - target_node),
        nic_in=loads * _positive(1.0 - source_node),
        nvlink_out=sent * _positive(target_node - target),
        nvlink_in=loads * _positive(source_node - source),
    )


def normal_copies(tokens: Floats, rank_visits: Floats, node_visits: Floats) -> LegCopies:
    """Copies by leg when a token goes once to each node and is forwarded once to each rank there.

    tokens: [..., ranks]; rank_visits: [..., ranks] and node_visits: [..., nodes], the chance that a token visits it,
    alike for all senders; leading axes broadcast.
    """
    tokens, rank_visits = np.broadcast_arrays(np.asarray(tokens, np.float64), np.asarray(rank_visits, np.float64))
    lead, ranks, nodes = tokens.shape[:-1], tokens.shape[-1], node_visits.shape[-1]
    grid = (*lead, nodes, _per_node(ranks, nodes))
    held, visits = tokens.reshape(grid), rank_visits.reshape(grid)
    node = np.broadcast_to(node_visits, (*lead, nodes))[..., None]
    by_index = held.sum(axis=-2, keepdims=True)  # [..., 1, index]: what all nodes' ranks of this index send
    return LegCopies(
        nic_out=(held * (node.sum(axis=-2, keepdims=True) - node)).reshape(tokens.shape),
        nic_in=((by_index - held) * node).reshape(tokens.shape),
        nvlink_out=(by_index * (visits.sum(axis=-1, keepdims=True) - visits)).reshape(tokens.shape),
        nvlink_in=((by_index.sum(axis=-1, keepdims=True) - by_index) * visits).reshape(tokens.shape),
    )


def pair_copies(tokens: Floats, rank_loads: Floats) -> Floats:
    """Low-latency copies [..., source, target], those that stay on their rank included."""
    tokens, loads = np.broadcast_arrays(np.asarray(tokens, np.float64), np.asarray(rank_loads, np.float64))
    return np.asarray(_part(tokens)[..., :, None] * loads[..., None, :])


def visits_from_ids(
    ids: NDArray[np.int64], expert_to_rank: NDArray[np.int64], ranks: int, nodes: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tokens that visit each rank int64 [ranks] and each node [nodes], counted from ids [tokens, top_k].

    expert_to_rank: [experts] (or of physical slots, where ids are those). Raises BadInput on ids or ranks outside.
    """
    if ids.size and (ids.min() < 0 or ids.max() >= len(expert_to_rank)):
        raise BadInput(f"an id lies outside 0 to {len(expert_to_rank) - 1}", mend="give ids of this placement")
    if len(expert_to_rank) and (expert_to_rank.min() < 0 or expert_to_rank.max() >= ranks):
        raise BadInput(f"a rank lies outside 0 to {ranks - 1}", mend="correct expert_to_rank")
    per_node = _per_node(ranks, nodes)
    seen = np.zeros((len(ids), ranks), dtype=bool)
    seen[np.arange(len(ids))[:, None], expert_to_rank[ids]] = True
    by_node = seen.reshape(len(ids), nodes, per_node).any(axis=2)
    return seen.sum(axis=0, dtype=np.int64), by_node.sum(axis=0, dtype=np.int64)


def visit_chances(
    counts: Floats, placement: ExpertPlacement, *, top_k: int, groups: int = 1, top_groups: int = 1, nodes: int = 1
) -> tuple[Floats, Floats]:
    """Chance that a token visits each rank [layers, ranks] and each node [layers, nodes], modelled from counts alone.

    counts: [layers, experts]. Picks are spread over an expert's replicas evenly. The model: under group-limited gating
    a token opens `top_groups` groups, each with top_groups x its share of picks as chance; its top_k picks are then
    drawn without replacement from experts of equal size in the open groups. Assumed: exact draws of a group-limited
    gate with skewed shares visit up to 6 % more ranks and 12 % more nodes (tests/oracle/test_traffic_visits.py).
    """
    slots = placement.slot_loads(np.asarray(counts, dtype=np.float64))
    share = slots / slots.sum(axis=-1, keepdims=True)
    groups = groups if placement.experts % groups == 0 else 1
    group = placement.physical_to_logical // (placement.experts // groups)
    rank = np.arange(placement.slots) // placement.slots_per_rank
    mass = np.zeros((placement.layers, placement.ranks, groups))
    np.add.at(mass, (np.arange(placement.layers)[:, None], rank[None, :], group), share)
    limits = (top_k, groups, top_groups, placement.experts)
    opened = _opened(mass, limits)
    return 1.0 - _miss(mass, limits, opened), 1.0 - _miss(_by_node(mass, nodes), limits, opened)


def step_visits(
    loads: Floats,
    counts: Floats,
    placement: ExpertPlacement,
    *,
    top_k: int,
    groups: int = 1,
    top_groups: int = 1,
    nodes: int = 1,
    kept: Floats | None = None,
) -> tuple[Floats, Floats]:
    """Chance that a token visits each rank [steps, layers, ranks] and each node [steps, layers, nodes] in each step.

    loads: [steps, layers, ranks], copies that arrive; counts: [steps, layers, experts]. The steps' mean counts give the
    chances of `visit_chances`; a step's own follow from its loads by 1 - (1 - visit)^(load / mean load). kept: as
    `equivalent_tokens` takes it.
    """
    mean = np.asarray(counts, dtype=np.float64).mean(axis=0)
    whole = np.where(mean.sum(-1, keepdims=True) > 0, mean, 1.0)
    by_rank, by_node = visit_chances(whole, placement, top_k=top_k, groups=groups, top_groups=top_groups, nodes=nodes)
    node_loads = loads.reshape(_grid(loads, nodes)).sum(axis=-1)
    return _scaled(by_rank, loads, kept), _scaled(by_node, node_loads, kept)


def balanced_visits(
    *, ranks: int, nodes: int, experts: int, top_k: int, groups: int = 1, top_groups: int = 1
) -> tuple[float, float]:
    """Chance that a token visits a given rank, a given node, under uniform routing and contiguous experts."""
    groups = groups if experts % groups == 0 else 1
    edges = np.arange(ranks + 1) / ranks
    borders = np.arange(groups + 1) / groups
    overlap = np.minimum(edges[1:, None], borders[None, 1:]) - np.maximum(edges[:-1, None], borders[None, :-1])
    mass = _positive(overlap)[None]
    limits = (top_k, groups, top_groups, experts)
    opened = _opened(mass, limits)
    by_rank, by_node = 1.0 - _miss(mass, limits, opened), 1.0 - _miss(_by_node(mass, nodes), limits, opened)
    return float(by_rank.mean()), float(by_node.mean())


def equivalent_tokens(
    *,
    mode: Mode,
    tokens: Floats,
    rank_loads: Floats,
    placement: ExpertPlacement,
    counts: Floats,
    top_k: int,
    groups: int = 1,
    top_groups: int = 1,
    nodes: int = 1,
    kept: Floats | None = None,
) -> Floats:
    """Tokens per rank of the balanced exchange whose busiest endpoint carries as much as this one's: [steps, layers].

    tokens: [steps, ranks]; rank_loads: [steps, layers, ranks]; counts: [steps, layers, experts]. Balanced means uniform
    routing over contiguous experts under the same gate, and as many tokens on each rank. An endpoint is one rank's
    sending or receiving side of one leg; legs are compared each with itself, and the worst ratio counts, so the result
    errs on the slow side where another leg is the bottleneck. On one rank nothing travels: the mean tokens.
    In normal mode a rank's visits follow from its mean visits by 1 - (1 - visit)^(load / mean load), exact for many
    independent picks. kept: [steps, layers], share of the top_k picks that is left where some were dropped (None: all);
    the exponent shrinks with it.
    """
    tokens = np.asarray(tokens, dtype=np.float64)[:, None, :]
    loads = np.asarray(rank_loads, dtype=np.float64)
    ranks = loads.shape[-1]
    if ranks == 1:
        return np.asarray(np.broadcast_to(tokens[..., 0], loads.shape[:-1]).copy())
    per_node = _per_node(ranks, nodes)
    senders = np.ascontiguousarray(np.broadcast_to(tokens[:, 0], (len(loads), ranks)))
    if mode == "low_latency":
        one = low_latency_copies(np.ones(ranks), np.full(ranks, float(top_k)), nodes=nodes)
        busiest = _busiest_low_latency(senders, np.ascontiguousarray(loads), per_node)
    else:
        gate = {"top_k": top_k, "groups": groups, "top_groups": top_groups, "nodes": nodes}
        by_rank, by_node = step_visits(loads, counts, placement, kept=kept, **gate)
        rank, node = balanced_visits(ranks=ranks, experts=placement.experts, **gate)
        one = normal_copies(np.ones(ranks), np.full(ranks, rank), np.full(nodes, node))
        busiest = _busiest_normal(senders, by_rank, by_node, per_node)
    units = np.asarray([one.nic_out.max(), one.nic_in.max(), one.nvlink_out.max(), one.nvlink_in.max()])
    used = units > 0.0
    return np.asarray((busiest[..., used] / units[used]).max(axis=-1, initial=0.0))


@njit(cache=True)
def _busiest_low_latency(tokens: Floats, loads: Floats, per_node: int) -> Floats:
    """Largest of each leg of `low_latency_copies` [steps, layers, 4], without the arrays in between.

    tokens: [steps, ranks]; loads: [steps, layers, ranks].
    """
    steps, layers, ranks = loads.shape
    out = np.zeros((steps, layers, 4))
    source_node = np.empty(ranks // per_node)
    target_node = np.empty(ranks // per_node)
    for step in range(steps):
        sent = max(tokens[step].sum(), 1e-300)
        for node in range(len(source_node)):
            source_node[node] = tokens[step, node * per_node : (node + 1) * per_node].sum() / sent
        for layer in range(layers):
            row = loads[step, layer]
            for node in range(len(target_node)):
                target_node[node] = row[node * per_node : (node + 1) * per_node].sum()
            total = target_node.sum()
            best = out[step, layer]
            for rank in range(ranks):
                node = rank // per_node
                source = tokens[step, rank] / sent
                best[0] = max(best[0], source * (total - target_node[node]))
                best[1] = max(best[1], row[rank] * (1.0 - source_node[node]))
                best[2] = max(best[2], source * (target_node[node] - row[rank]))
                best[3] = max(best[3], row[rank] * (source_node[node] - source))
    return out


@njit(cache=True)
def _busiest_normal(tokens: Floats, rank_visits: Floats, node_visits: Floats, per_node: int) -> Floats:
    """Largest of each leg of `normal_copies` [steps, layers, 4], without the arrays in between.

    tokens: [steps, ranks]; rank_visits: [steps, layers, ranks]; node_visits: [steps, layers, nodes].
    """
    steps, layers, ranks = rank_visits.shape
    out = np.zeros((steps, layers, 4))
    by_index = np.empty(per_node)
    for step in range(steps):
        by_index[:] = 0.0
        for rank in range(ranks):
            by_index[rank % per_node] += tokens[step, rank]
        sent = by_index.sum()
        for layer in range(layers):
            nodes = node_visits[step, layer]
            all_nodes = nodes.sum()
            best = out[step, layer]
            for node in range(ranks // per_node):
                inside = rank_visits[step, layer, node * per_node : (node + 1) * per_node]
                whole = inside.sum()
                for index in range(per_node):
                    held = tokens[step, node * per_node + index]
                    best[0] = max(best[0], held * (all_nodes - nodes[node]))
                    best[1] = max(best[1], (by_index[index] - held) * nodes[node])
                    best[2] = max(best[2], by_index[index] * (whole - inside[index]))
                    best[3] = max(best[3], (sent - by_index[index]) * inside[index])
    return out


def _scaled(visits: Floats, loads: Floats, kept: Floats | None) -> Floats:
    """Visits of single steps [steps, layers, n] from the visits of all steps together [layers, n] and their loads."""
    usual = _part(loads.sum(axis=0))
    ratio = _part(loads) / np.where(usual > 0, usual, 1.0)
    if kept is not None:
        ratio = ratio * kept[..., None]
    return np.asarray(-np.expm1(np.log(np.maximum(1.0 - visits, LEAST_MISS)) * ratio))


def _opened(mass: Floats, limits: tuple[int, int, int, int]) -> tuple[Floats, Floats] | None:
    """The sets of groups that a token may open and their chances, see `_group_sets`; None where it opens all."""
    _, groups, top_groups, _ = limits
    return None if groups == 1 or top_groups >= groups else _group_sets(mass.sum(axis=1), top_groups)


def _miss(mass: Floats, limits: tuple[int, int, int, int], opened: tuple[Floats, Floats] | None) -> Floats:
    """Chance that a token picks nothing of a set [layers, sets]; mass [layers, sets, groups]: its part of all picks."""
    top_k, groups, top_groups, experts = limits
    whole = mass.sum(axis=1)  # [layers, groups]
    if opened is None:
        return _miss_of_part(mass.sum(axis=2), top_k, float(experts))
    open_groups, chance = opened
    taken = np.where(whole > 0, np.minimum(whole * top_groups, 1.0), 1.0)
    reachable = np.einsum("lsg,ng->lns", mass / taken[:, None, :], open_groups)
    total = ((whole / taken) @ open_groups.T)[..., None]
    part = reachable / np.where(total > 0, total, 1.0)
    missed = _miss_of_part(part, top_k, float(experts // groups * top_groups))
    return np.asarray(np.minimum(np.einsum("ln,lns->ls", chance, missed), 1.0))


def _group_sets(whole: Floats, top_groups: int) -> tuple[Floats, Floats]:
    """All sets of top_groups groups as 0/1 rows [sets, groups], and the chance of each in each layer [layers, sets].

    Conditional Poisson sampling of groups, each included with its share of picks x top_groups. A token opens as many
    groups as the gate says even where fewer were picked from (a step of a few tokens): the others share the rest.
    """
    groups = whole.shape[1]
    sets = np.asarray(list(itertools.combinations(range(groups), top_groups)))
    rows = np.zeros((len(sets), groups))
    np.put_along_axis(rows, sets, 1.0, axis=1)
    shares = cap_shares(np.maximum(whole, LEAST_SHARE), top_groups)
    odds = np.stack([solve_odds(row, top_groups) for row in np.minimum(shares * top_groups, 1.0)])
    log_weight = np.log(odds) @ rows.T
    weight = np.exp(log_weight - log_weight.max(axis=1, keepdims=True))
    return rows, np.asarray(weight / weight.sum(axis=1, keepdims=True))


def _miss_of_part(part: Floats, picks: int, size: float) -> Floats:
    """Chance that `picks` without replacement from `size` equal experts miss a part [...] of them.

    C(size (1 - part), picks) / C(size, picks), as a product that holds for sizes that are not whole.
    """
    missed = np.empty(part.shape)
    _fill_missed(np.ascontiguousarray(part).ravel(), min(picks, int(size)), size, missed.ravel())
    return missed


@njit(cache=True, error_model="numpy")
def _fill_missed(part: Floats, picks: int, size: float, missed: Floats) -> None:
    for i in range(len(part)):
        outside = size * (1.0 - min(max(part[i], 0.0), 1.0))
        chance = 1.0
        for taken in range(picks):
            chance = chance * max(outside - taken, 0.0) / (size - taken)
        missed[i] = chance


def _part(values: Floats) -> Floats:
    """Each value over the sum of its last axis; 0 where that is 0."""
    total = values.sum(axis=-1, keepdims=True)
    return np.asarray(values / np.where(total > 0, total, 1.0))


def _positive(values: Floats) -> Floats:
    return np.asarray(np.maximum(values, 0.0))


def _per_node(ranks: int, nodes: int) -> int:
    if nodes < 1 or ranks % nodes:
        raise BadInput(f"{ranks} ranks do not fill {nodes} nodes evenly", mend="use a multiple of the nodes")
    return ranks // nodes


def _grid(values: Floats, nodes: int) -> tuple[int, ...]:
    return (*values.shape[:-1], nodes, _per_node(values.shape[-1], nodes))


def _of_own_node(part: Floats, nodes: int) -> Floats:
    """Sum over the own node: [..., ranks]."""
    summed = part.reshape(_grid(part, nodes)).sum(axis=-1)
    return np.repeat(summed, part.shape[-1] // nodes, axis=-1)


def _by_node(mass: Floats, nodes: int) -> Floats:
    """[layers, ranks, groups] -> [layers, nodes, groups]."""
    layers, ranks, groups = mass.shape
    return np.asarray(mass.reshape(layers, nodes, _per_node(ranks, nodes), groups).sum(axis=2))
