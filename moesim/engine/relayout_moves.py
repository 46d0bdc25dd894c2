"""What has to travel from one placement to another, between which GPUs, and how long that takes.

Only experts that are new to a rank travel, once, however many slots they get there; what it holds is copied where it
changes its slot. They come from a holder in the same NVLink domain where there is one, else from any; receivers are
dealt evenly over the holders. That is what SGLang (eplb/expert_location_updater.py) and vLLM
(distributed/eplb/rebalance_execute.py) do, both with point-to-point sends over the expert-parallel group, layer after
layer, into a buffer of one layer that is then copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.cost.estimate import Tag
from moesim.engine.memory import WEIGHT_BYTES_PER_ELEMENT
from moesim.graph.priced_step import LayerSetup
from moesim.network.instance import InstanceNetwork
from moesim.spec.plan import ExpertPlacement

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Moves:
    """Experts that travel: layer (row of the map), expert, source and destination (EP ranks), all [moves].

    copies: [layers, ranks], slots that change and that a rank fills from what it holds or receives.
    """

    layer: Ints
    expert: Ints
    source: Ints
    destination: Ints
    copies: Ints

    @property
    def count(self) -> int:
        """Experts that travel, each copy counted."""
        return len(self.layer)


@dataclass(frozen=True)
class MoveTime:
    """How long the moves of each layer take, one layer after the other.

    experts: that travel. transfer_s, copy_s: [layers], over the links, and from the buffer into place on the busiest
    GPU. pair_bytes: [layers, GPUs, GPUs]. bytes_by_level: "inside" the domain and "between" domains. copied_bytes:
    inside ranks. tag: of the link figures.
    """

    experts: int
    transfer_s: Floats
    copy_s: Floats
    pair_bytes: Floats
    bytes_by_level: dict[str, float]
    copied_bytes: float
    tag: Tag


def expert_bytes(setup: LayerSetup) -> float:
    """Weights of one expert of one layer, over all GPUs of its rank."""
    return float(setup.model.expert_parameters() * WEIGHT_BYTES_PER_ELEMENT[setup.precision.experts])


def plan_moves(old: ExpertPlacement, new: ExpertPlacement, domains: Sequence[int]) -> Moves:
    """The fewest transfers that turn one placement into another of as many slots; domains: of each EP rank."""
    before, after = (plan.physical_to_logical.reshape(plan.layers, plan.ranks, -1) for plan in (old, new))
    found: list[tuple[int, int, int, int]] = []
    copies = np.zeros((new.layers, new.ranks), dtype=np.int64)
    for layer in range(new.layers):
        held = [set(row.tolist()) for row in before[layer]]
        receivers: dict[int, list[int]] = {}
        for rank, row in enumerate(after[layer]):
            stays = before[layer, rank] == row
            lacking = sorted(set(row.tolist()) - held[rank])
            for expert in lacking:
                receivers.setdefault(expert, []).append(rank)
            copies[layer, rank] = len(row) - int(stays.sum()) - len(lacking)
        for expert, ranks in sorted(receivers.items()):
            holders = [rank for rank, experts in enumerate(held) if expert in experts]
            found += [(layer, expert, source, rank) for source, rank in _dealt(holders, ranks, domains)]
    rows = np.asarray(found, dtype=np.int64).reshape(-1, 4)
    return Moves(rows[:, 0], rows[:, 1], rows[:, 2], rows[:, 3], copies)


def _dealt(holders: Sequence[int], receivers: Sequence[int], domains: Sequence[int]) -> list[tuple[int, int]]:
    """(source, destination) of one expert: each domain with holders serves its own, all holders serve the others."""
    found, far = [], []
    for domain in sorted({domains[rank] for rank in receivers}):
        here = [rank for rank in receivers if domains[rank] == domain]
        near = [rank for rank in holders if domains[rank] == domain]
        if near:
            found += [(near[place * len(near) // len(here)], rank) for place, rank in enumerate(here)]
        else:
            far += here
    return found + [(holders[place * len(holders) // len(far)], rank) for place, rank in enumerate(far)]


def match_ranks(old: ExpertPlacement, new: ExpertPlacement, groups: Sequence[int]) -> ExpertPlacement:
    """The new placement with its ranks' parts dealt out so that most stays where it is; balance is the same.

    groups: of each rank; parts stay within their group (a node, where expert groups must lie on one). Assignment by the
    Hungarian method, layer by layer.
    """
    from scipy.optimize import linear_sum_assignment

    before, after = (plan.physical_to_logical.reshape(plan.layers, plan.ranks, -1) for plan in (old, new))
    found = after.copy()
    members = np.asarray(groups)
    for layer in range(new.layers):
        holds, wants = (_held(table[layer], new.experts) for table in (before, after))
        shared = wants @ holds.T
        for group in np.unique(members):
            ranks = np.flatnonzero(members == group)
            parts, places = linear_sum_assignment(shared[np.ix_(ranks, ranks)], maximize=True)
            found[layer, ranks[places]] = after[layer, ranks[parts]]
    return replace(new, physical_to_logical=found.reshape(new.layers, -1))


def _held(table: Ints, experts: int) -> Floats:
    """Whether each rank [ranks] holds each expert: [ranks, experts]."""
    found = np.zeros((len(table), experts))
    found[np.arange(len(table))[:, None], table] = 1.0
    return found


def pair_bytes(moves: Moves, setup: LayerSetup) -> Floats:
    """Bytes [layers, GPUs, GPUs] from row to column; a rank's expert-TP GPUs each send their part to their like."""
    split, gpus = setup.parallel.expert_tp, setup.parallel.gpus
    found = np.zeros((setup.placement.layers, gpus, gpus))
    for place in range(split):
        index = (moves.layer, moves.source * split + place, moves.destination * split + place)
        np.add.at(found, index, expert_bytes(setup) / split)
    return found


def move_time(moves: Moves, setup: LayerSetup, network: InstanceNetwork, hbm_bytes_per_s: float) -> MoveTime:
    """Time the moves by the links' rates and the memory's: `formula`, or `assumed` where a link's figure is.

    A layer takes what its busiest link takes, all GPUs sending at once (see moesim.network.exchange, scheme "flat");
    what arrived is then read from the buffer and written into its slot, as are copies of what was there.
    """
    pairs = pair_bytes(moves, setup)
    timed = network.paths("flat").time(pairs)
    split = setup.parallel.expert_tp
    written = pairs.sum(axis=1) + np.repeat(moves.copies, split, axis=1) * expert_bytes(setup) / split
    near = same_domain(setup.parallel.gpus, network.cluster.domain_gpus)
    return MoveTime(
        experts=moves.count,
        transfer_s=timed.seconds,
        copy_s=np.asarray(2.0 * written.max(axis=1) / hbm_bytes_per_s),
        pair_bytes=pairs,
        bytes_by_level={
            "inside": float((pairs * near).sum()),
            "between": float((pairs * ~near).sum()),
        },
        copied_bytes=float(moves.copies.sum() * expert_bytes(setup)),
        tag=timed.tag,
    )


def same_domain(gpus: int, domain_gpus: int) -> Any:
    """Whether two GPUs reach each other without a NIC: bool [GPUs, GPUs]."""
    domain = np.arange(gpus) // domain_gpus
    return domain[:, None] == domain[None, :]


def rank_domains(setup: LayerSetup, domain_gpus: int) -> list[int]:
    """The NVLink domain of each EP rank, by its first GPU."""
    return [rank * setup.parallel.expert_tp // domain_gpus for rank in range(setup.parallel.ep)]
