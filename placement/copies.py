"""Copies of tokens that cross between nodes, counted from the tokens' own picks, by the way a system sends them.

Where a token comes from is taken as even over the nodes and independent of its picks: a scheduler of attention-DP ranks
looks at neither. A combine is its dispatch backwards, with as many copies, but where a token stays.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from moesim.errors import BadInput
from moesim.routing.picks import TokenPicks
from moesim.spec.plan import ExpertPlacement

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MODES = ("normal", "low_latency", "home_by_request", "stay")
"""normal: once to each other node that it visits (DeepEP normal). low_latency: once for each pick on another node
(DeepEP low-latency, plain all-to-all). home_by_request: normal, if every request were served on the node that its
tokens visit most, which nobody knows beforehand: a bound. stay: normal, but the token does not return, it waits for
the next layer at one of its picks, each alike (ExFlow); the mean of dispatch and combine."""


@dataclass(frozen=True)
class CrossNodeCopies:
    """Sums by block of tokens: copies float64 [blocks, layers, modes], tokens [blocks, layers]; NaN = not known."""

    copies: Floats
    tokens: Floats

    def mean(self) -> dict[str, float]:
        """Copies of a token in a layer, by mode, of those that are known."""
        total = self.copies.sum(axis=(0, 1)) / self.tokens.sum()
        return {mode: float(value) for mode, value in zip(MODES, total, strict=True) if np.isfinite(value)}


def count_copies(
    placement: ExpertPlacement, picks: TokenPicks, *, nodes: int, replica: str, blocks: int
) -> CrossNodeCopies:
    """Count the copies of every token, in `blocks` runs of successive steps.

    replica: "local_first" (a replica on the token's node, else all by turns) or "equal" (all by turns). Raises BadInput
    where ranks do not fill the nodes, or picks are of another model.
    """
    if placement.ranks % nodes:
        raise BadInput(f"{placement.ranks} ranks do not fill {nodes} nodes evenly", mend="use a multiple of the nodes")
    tokens, layers, _ = picks.ids.shape
    if layers != placement.layers or (tokens and picks.ids.max() >= placement.experts):
        raise BadInput("the picks are of another model than the placement", mend="give a map and a trace of one model")
    where, count = _replica_nodes(placement, nodes)
    block = picks.step * blocks // (int(picks.step.max(initial=0)) + 1)
    request = np.full(tokens, -1, dtype=np.int64) if picks.request is None else picks.request
    homes = np.zeros(int(request.max(initial=-1)) + 1, dtype=np.int64)
    local = replica == "local_first"
    if picks.request is not None:
        homes = _most_visited(picks.ids, request, where, count, nodes, len(homes))
    copies, seen = _count(picks.ids, block, request, homes, where, count, nodes, blocks, local)
    copies[:, :, 2] = copies[:, :, 2] if picks.request is not None else np.nan
    copies[:, :, 3] = copies[:, :, 3] if picks.follows else np.nan
    return CrossNodeCopies(copies, seen)


def _replica_nodes(placement: ExpertPlacement, nodes: int) -> tuple[Ints, Ints]:
    """Node of each replica [layers, experts, most replicas], -1 beyond its last, and replicas [layers, experts]."""
    count = placement.replica_counts()
    where = np.full((placement.layers, placement.experts, int(count.max())), -1, dtype=np.int64)
    filled = np.zeros_like(count)
    for slot in range(placement.slots):
        rows, expert = np.arange(placement.layers), placement.physical_to_logical[:, slot]
        where[rows, expert, filled[rows, expert]] = slot // (placement.slots // nodes)
        filled[rows, expert] += 1
    return where, count


@njit(cache=True)
def _node(where: Ints, count: int, home: int, token: int, expert: int, local: bool) -> int:
    """The node that serves a pick: the token's own where it may and can be, else one replica's by turns."""
    if local:
        for replica in range(count):
            if where[replica] == home:
                return home
    return int(where[(token + expert) % count])


@njit(cache=True)
def _most_visited(
    ids: NDArray[np.int16], request: Ints, where: Ints, count: Ints, nodes: int, requests: int
) -> Ints:  # fmt: skip
    """The node that each request's picks are on most: [requests]."""
    tokens, layers, top_k = ids.shape
    visits = np.zeros((requests, nodes), dtype=np.int64)
    for token in range(tokens):
        for layer in range(layers):
            for pick in range(top_k):
                expert = ids[token, layer, pick]
                if expert >= 0:
                    visits[
                        request[token], _node(where[layer, expert], count[layer, expert], -1, token, expert, False)
                    ] += 1
    out = np.empty(requests, dtype=np.int64)
    for row in range(requests):
        out[row] = np.argmax(visits[row])
    return out


@njit(cache=True)
def _visited(
    picks: NDArray[np.int16], where: Ints, count: Ints, home: int, token: int, local: bool, stamp: Ints, mark: int
) -> tuple[int, int, bool]:
    """Nodes that a token visits from `home`, picks that are on other nodes, and whether it visits its home."""
    visited, away, at_home = 0, 0, False
    for pick in range(len(picks)):
        expert = picks[pick]
        if expert < 0:
            continue
        node = _node(where[expert], count[expert], home, token, expert, local)
        away += node != home
        at_home = at_home or node == home
        if stamp[node] != mark:
            stamp[node] = mark
            visited += 1
    return visited, away, at_home


@njit(cache=True)
def _count(
    ids: NDArray[np.int16], block: Ints, request: Ints, homes: Ints, where: Ints, count: Ints, nodes: int, blocks: int,
    local: bool,
) -> tuple[Floats, Floats]:  # fmt: skip
    tokens, layers, top_k = ids.shape
    out = np.zeros((blocks, layers, 4))
    seen = np.zeros((blocks, layers))
    stamp = np.full(nodes, -1, dtype=np.int64)
    mark = 0
    for token in range(tokens):
        for layer in range(layers):
            picks = ids[token, layer]
            if picks.max() < 0:
                continue
            row = out[block[token], layer]
            seen[block[token], layer] += 1.0
            normal, combine = 0.0, 0.0
            for home in range(nodes):
                mark += 1
                visited, away, at_home = _visited(picks, where[layer], count[layer], home, token, local, stamp, mark)
                normal += (visited - at_home) / nodes
                combine += (visited - 1) / nodes
                row[1] += away / nodes
            row[0] += normal
            if request[token] >= 0:
                mark += 1
                visited, away, at_home = _visited(
                    picks, where[layer], count[layer], homes[request[token]], token, local, stamp, mark
                )
                row[2] += visited - at_home
            before = ids[token, layer - 1] if layer > 0 else picks
            sources = 0
            for pick in range(top_k):
                sources += before[pick] >= 0
            if layer == 0 or sources == 0:
                row[3] += 0.5 * (normal + combine)
                continue
            for pick in range(top_k):
                expert = before[pick]
                if expert < 0:
                    continue
                home = _node(where[layer - 1, expert], count[layer - 1, expert], -1, token, expert, False)
                mark += 1
                visited, away, at_home = _visited(picks, where[layer], count[layer], home, token, local, stamp, mark)
                row[3] += 0.5 * ((visited - at_home) + (visited - 1)) / sources
    return out, seen
