"""Who sends which rows to whom: a lab's patterns as tokens, flat and two-level.

A pattern is, for each rank, tokens and the ranks that each goes to, one for each expert that it picks. Flat: one row
for each pick, straight to its rank. Two-level, as DeepEP's normal kernels do it (deepseek-ai/DeepEP, README): one row
to each other node that the token visits, to the rank with the sender's own place there, which passes it on once to each
rank of its node that the token visits; the sender does so itself in its own node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from validate.fabric.spec import LabSpec, Pattern
from validate.hardware.job import PlacedCase, file_profile, synthetic_profile
from validate.hardware.layer import replica_routes
from validate.hardware.placements import family

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
# Spread of ln(weight) of the skewed pattern's senders and receivers: the busiest of eight has about twice the mean.
SKEW_SIGMA = 0.6
# Slots of the planned placement beyond one for each expert, by rank.
REPLICAS_PER_RANK = 2


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokens of a pattern: of rank r, targets[r] [tokens, picks], the rank of each pick."""

    name: str
    targets: tuple[Ints, ...]

    @property
    def ranks(self) -> int:
        """Ranks that send."""
        return len(self.targets)

    def flat(self) -> Ints:
        """Rows from each rank to each, one for a pick: [source, target]."""
        return np.stack([np.bincount(one.ravel(), minlength=self.ranks) for one in self.targets]).astype(np.int64)

    def visits(self) -> tuple[NDArray[np.bool_], ...]:
        """Whether each token of a rank visits each rank: [tokens, ranks] for each source."""
        found = []
        for one in self.targets:
            seen = np.zeros((len(one), self.ranks), dtype=bool)
            seen[np.arange(len(one))[:, None], one] = True
            found.append(seen)
        return tuple(found)

    def rank_copies(self) -> Ints:
        """Rows when a token goes once to each rank that it visits: [source, target]."""
        return np.stack([seen.sum(axis=0) for seen in self.visits()]).astype(np.int64)

    def node_copies(self, nodes: int) -> Ints:
        """Rows when a token goes once to each node that it visits: [source, node]."""
        each = self.ranks // nodes
        return np.stack(
            [seen.reshape(len(seen), nodes, each).any(axis=2).sum(axis=0) for seen in self.visits()]
        ).astype(np.int64)


def tokens_of(lab: LabSpec, pattern: Pattern) -> Tokens:
    """The tokens of one pattern of a lab, drawn by its seed. Raises BadInput, Infeasible."""
    rows = lab.bytes_per_rank // lab.row_bytes
    if pattern == "even":
        turns = np.arange(rows, dtype=np.int64) % lab.ranks
        return Tokens(pattern, tuple(turns[:, None] for _ in range(lab.ranks)))
    if pattern == "skewed":
        return Tokens(pattern, skewed(lab.ranks, rows, np.random.default_rng([lab.seed, 1])))
    profile, _ = profile_of(lab)
    rng = np.random.default_rng([lab.seed, 2])  # both placements carry the same tokens
    picks = draw(profile, lab.routed.top_k, (lab.ranks, max(rows // lab.routed.top_k, 1)), rng)
    return Tokens(pattern, targets_of(picks, case_of(lab, pattern), ranks=lab.ranks))


def skewed(ranks: int, rows: int, rng: np.random.Generator) -> tuple[Ints, ...]:
    """Every rank sends and gets its own lognormal share: rows of each source, in turns over the targets."""
    send, receive = rng.lognormal(sigma=SKEW_SIGMA, size=(2, ranks))
    whole = np.outer(send / send.sum(), receive / receive.sum()) * rows * ranks
    return tuple(rng.permutation(np.repeat(np.arange(ranks), np.rint(row).astype(int)))[:, None] for row in whole)


def profile_of(lab: LabSpec) -> tuple[Floats, str]:
    """Share of each expert, and where it comes from. Raises BadInput."""
    if lab.routed.loads is None:
        return synthetic_profile(lab.routed.experts, np.random.default_rng([lab.seed, 9])), "synthetic, lognormal"
    profile, layer = file_profile(lab.routed.loads, lab.routed.layer)
    return profile, f"layer {layer} of {lab.routed.loads.name}"


def draw(profile: Floats, top_k: int, shape: tuple[int, int], rng: np.random.Generator) -> Ints:
    """Experts of tokens [ranks, tokens, top_k], without replacement by their shares (Gumbel top-k)."""
    from moesim.routing.successive import prepare_successive

    ids = prepare_successive(profile, top_k).ids(0, shape[0] * shape[1], rng)
    return ids.reshape(*shape, top_k).astype(np.int64)


def case_of(lab: LabSpec, pattern: Pattern) -> PlacedCase:
    """The placement of a routed pattern. Raises Infeasible, MissingPart."""
    profile, _ = profile_of(lab)
    slots = min(len(profile) + REPLICAS_PER_RANK * lab.ranks, len(profile) * lab.ranks)
    # The family begins with contiguous and planned.
    count = 1 + (pattern == "routed_planned")
    return family(profile, ranks=lab.ranks, slots=slots, count=count, seed=lab.seed)[-1]


def targets_of(picks: Ints, case: PlacedCase, *, ranks: int) -> tuple[Ints, ...]:
    """Rank of every pick: a rank's own replica, else all replicas by turns: picks [ranks, tokens, top_k]."""
    table = np.asarray(case.slots, dtype=np.int64)
    found = []
    for rank, own in enumerate(picks):
        slots, count = replica_routes(
            table, experts=int(table.max()) + 1, ranks=ranks, rank=rank, replica="local_first"
        )
        turn = np.arange(len(own))[:, None] % count[own]
        found.append(slots[own, turn] // (len(table) // ranks))
    return tuple(found)


@dataclass(frozen=True, eq=False)
class Stage:
    """One all-to-all as a rank runs it: rows of its buffer to send, in order, and how many to and from each member.

    take: [rows], of what the rank holds. send, receive: [members].
    """

    take: Ints
    send: Ints
    receive: Ints


@dataclass(frozen=True, eq=False)
class RankPlan:
    """What one rank does: stages one after the other; rows: what it holds at first, [rows, 2] source and token.

    expected: [rows, 2], source and token of what it has in the end, in order.
    """

    rows: Ints
    stages: tuple[Stage, ...]
    expected: Ints


def flat_plans(tokens: Tokens) -> list[RankPlan]:
    """One row for each pick, straight to its rank."""
    counts = tokens.flat()
    held, sent = [], []
    for source, target in enumerate(tokens.targets):
        names = np.stack([np.full(len(target), source), np.arange(len(target))], axis=1)
        order = np.argsort(target.ravel(), kind="stable")
        held.append(names)
        sent.append(order // target.shape[1])
    arrived = _arrivals([names[take] for names, take in zip(held, sent, strict=True)], counts)
    return [
        RankPlan(held[rank], (Stage(sent[rank], counts[rank], counts[:, rank]),), arrived[rank])
        for rank in range(tokens.ranks)
    ]


def two_level_plans(tokens: Tokens, nodes: int) -> list[RankPlan]:
    """One row to each other node along the sender's place, then one to each rank there; see the module."""
    ranks, each = tokens.ranks, tokens.ranks // nodes
    visits = tokens.visits()
    held = [np.stack([np.full(len(seen), rank), np.arange(len(seen))], axis=1) for rank, seen in enumerate(visits)]
    first: list[Stage] = []
    holding: list[Ints] = []  # what each rank has to pass on: its own tokens, then what came
    for rank in range(ranks):
        node, place = divmod(rank, each)
        by_node = [np.asarray(seen.reshape(len(seen), nodes, each).any(axis=2)) for seen in visits]
        takes = [np.flatnonzero(by_node[rank][:, other]) if other != node else _none() for other in range(nodes)]
        came = [
            held[peer][by_node[peer][:, node]] if other != node else np.zeros((0, 2), np.int64)
            for other in range(nodes)
            for peer in [other * each + place]
        ]
        first.append(Stage(np.concatenate(takes), _lengths(takes), _lengths(came)))
        holding.append(np.concatenate([held[rank], *came]))
    second_takes: list[list[Ints]] = []
    for rank in range(ranks):
        node = rank // each
        source, token = holding[rank].T
        goes = np.zeros((len(source), each), dtype=bool)
        for other in range(ranks):
            mine = source == other
            goes[mine] = visits[other][token[mine], node * each : (node + 1) * each]
        second_takes.append([np.flatnonzero(goes[:, place]) for place in range(each)])
    plans = []
    for rank in range(ranks):
        node, place = divmod(rank, each)
        peers = range(node * each, (node + 1) * each)
        came = [holding[peer][second_takes[peer][place]] for peer in peers]
        takes = second_takes[rank]
        stage = Stage(np.concatenate(takes), _lengths(takes), _lengths(came))
        plans.append(RankPlan(held[rank], (first[rank], stage), np.concatenate(came)))
    return plans


def _arrivals(sent: Sequence[Ints], counts: Ints) -> list[Ints]:
    """What each rank gets, source after source: sent [rows, 2] of each source, in the order of the targets."""
    edges = np.concatenate([np.zeros((len(counts), 1), np.int64), np.cumsum(counts, axis=1)], axis=1)
    return [
        np.concatenate([sent[source][edges[source, rank] : edges[source, rank + 1]] for source in range(len(counts))])
        for rank in range(len(counts))
    ]


def _none() -> Ints:
    return np.zeros(0, dtype=np.int64)


def _lengths(parts: Sequence[Ints]) -> Ints:
    return np.asarray([len(part) for part in parts], dtype=np.int64)


def plans_of(tokens: Tokens, scheme: str, nodes: int) -> list[RankPlan]:
    """The plan of every rank under `flat` or `two_level`."""
    return flat_plans(tokens) if scheme == "flat" else two_level_plans(tokens, nodes)
