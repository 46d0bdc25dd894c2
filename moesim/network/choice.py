"""Replica choices by name: how the tokens of a batch split over the replicas of their experts, and what that costs.

"local_first" and "equal" are fixed shares (`replicas`). The others look at each batch: "round_robin" deals every
expert's tokens out in turns; "fewest_activated" gives an expert's tokens to one replica, so that no rank reads more
experts' weights than it must; "lp" makes the busiest rank least busy. Every choice gives each token to one replica of
its expert; fixed shares do so on average. "stale_lp" splits a batch as "lp" would have split the one before, and waits
for nothing but the new map. It needs steps that follow each other: `following` makes it, and no scenario names it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from moesim.errors import BadInput
from moesim.network.balance import spread
from moesim.network.replicas import replica_shares
from moesim.spec.plan import ExpertPlacement

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
_Prepared = tuple[Floats | None, Ints, Ints, Ints]

# Seconds of one layer's choice for each expert slot, on one CPU core, compiled code warm (256 experts in 288 and 384
# slots on 32 ranks, 4,096 tokens; tests/bench/test_bench_replicas.py prints it). Measured on the machine that runs the
# tests, assumed elsewhere: `policies.dispatch.replica_solve_s` takes a figure of one's own, of a GPU kernel for one.
SOLVE_S_PER_SLOT = {"fewest_activated": 3.5e-8, "lp": 1.2e-7}
STALE = "stale_lp"
# Tokens that an average over many batches is scaled to before a choice that deals whole tokens is asked.
AVERAGE_TOKENS = 2.0**32

Rule = Callable[["Replicas", Floats], Floats]


@dataclass(frozen=True)
class Choice:
    """A replica choice. exchanges_counts: every rank must know all ranks' counts before it can send."""

    name: str
    split: Rule
    fixed: bool
    exchanges_counts: bool

    @property
    def updates_map(self) -> bool:
        """Whether every step has a map of its own to write and to look up."""
        return self.exchanges_counts or self.name == STALE


@dataclass(frozen=True, eq=False)
class Replicas:
    """A placement under a replica choice, ready for any number of batches; `prepare` makes it.

    shares: [layers, slots] of a fixed choice, [steps, layers, slots] of a stale one. held, slot: [layers, pairs], the
    ranks that hold each expert and the slot there; starts: [layers, experts + 1].
    """

    placement: ExpertPlacement
    choice: Choice
    shares: Floats | None
    held: Ints = field(repr=False)
    slot: Ints = field(repr=False)
    starts: Ints = field(repr=False)

    def slot_loads(self, counts: Floats) -> Floats:
        """Tokens of each slot [..., layers, slots] of batches with counts [..., layers, experts]."""
        return self.choice.split(self, np.asarray(counts, dtype=np.float64))

    def rank_loads(self, counts: Floats) -> Floats:
        """Tokens of each rank [..., layers, ranks] of batches with counts [..., layers, experts]."""
        if self.shares is not None:
            return self.placement.rank_loads(counts, self.shares)
        slots = self.slot_loads(counts)
        grid = (*slots.shape[:-1], self.placement.ranks, self.placement.slots_per_rank)
        return np.asarray(slots.reshape(grid).sum(axis=-1))

    def average_rank_loads(self, profile: Floats) -> Floats:
        """Load of each rank [..., layers, ranks] of a profile: counts of very many tokens, scaled to any sum."""
        if self.shares is not None:
            return self.rank_loads(profile)
        total = profile.sum(axis=-1, keepdims=True)
        scale = np.where(total > 0, AVERAGE_TOKENS / np.where(total > 0, total, 1.0), 0.0)
        loads = self.rank_loads(np.rint(profile * scale))
        return np.asarray(loads * np.where(total > 0, total, 0.0) / AVERAGE_TOKENS)

    def solve_s(self) -> float:
        """Seconds that one layer's choice takes on a CPU core; 0 where nothing is solved."""
        return SOLVE_S_PER_SLOT.get(self.choice.name, 0.0) * self.placement.slots


def _fixed(replicas: Replicas, counts: Floats) -> Floats:
    return replicas.placement.slot_loads(counts, replicas.shares)


def _by_batch(which: int) -> Rule:
    def split(replicas: Replicas, counts: Floats) -> Floats:
        plan = replicas.placement
        flat = np.ascontiguousarray(counts.reshape(-1, plan.layers, plan.experts))
        found = np.zeros((len(flat), plan.layers, plan.slots))
        whole = bool((flat == np.rint(flat)).all())
        spread(which, flat, replicas.held, replicas.starts, replicas.slot, plan.ranks, whole, found)
        return found.reshape(*counts.shape[:-1], plan.slots)

    return split


CHOICES: dict[str, Choice] = {
    choice.name: choice
    for choice in (
        Choice("local_first", _fixed, fixed=True, exchanges_counts=False),
        Choice("equal", _fixed, fixed=True, exchanges_counts=False),
        Choice("round_robin", _by_batch(0), fixed=False, exchanges_counts=False),
        Choice("fewest_activated", _by_batch(1), fixed=False, exchanges_counts=True),
        Choice("lp", _by_batch(2), fixed=False, exchanges_counts=True),
    )
}


# What was prepared, for as long as its placement lives: a search prices many plans over one.
_PREPARED: WeakKeyDictionary[ExpertPlacement, dict[tuple[str, int], _Prepared]] = WeakKeyDictionary()


def prepare(placement: ExpertPlacement, *, policy: str, nodes: int) -> Replicas:
    """A placement under a replica choice; worked out once. Raises BadInput for a choice that there is not."""
    if policy not in CHOICES:
        raise BadInput(
            f"unknown replica policy {policy!r}",
            where="policies.dispatch.replica",
            mend=f"use one of {', '.join(CHOICES)}",
        )
    choice = CHOICES[policy]
    kept = _PREPARED.setdefault(placement, {})
    if (policy, nodes) not in kept:
        shares = replica_shares(placement, policy=policy, nodes=nodes) if choice.fixed else None
        kept[policy, nodes] = (shares, *_holders(placement))
    return Replicas(placement, choice, *kept[policy, nodes])


def following(replicas: Replicas, previous: Floats) -> Replicas:
    """The choice `stale_lp`: each step splits as `lp` would have split the counts of the step before it.

    replicas: prepared for `lp`. previous: [steps, layers, experts]; an expert without tokens there is split evenly.
    What comes back is for these steps alone.
    """
    plan = replicas.placement
    split = replicas.slot_loads(previous)
    rows = np.arange(plan.layers)[:, None]
    whole = previous[:, rows, plan.physical_to_logical]
    even = np.broadcast_to(1.0 / plan.replica_counts()[rows, plan.physical_to_logical], whole.shape)
    shares = np.divide(split, whole, out=np.array(even), where=whole > 0)
    return replace(replicas, choice=Choice(STALE, _fixed, fixed=False, exchanges_counts=False), shares=shares)


def _holders(placement: ExpertPlacement) -> tuple[Ints, Ints, Ints]:
    """Ranks that hold each expert, once each, and the first slot there: held, slot [layers, slots], starts."""
    layers, slots, experts = placement.layers, placement.slots, placement.experts
    held, slot = np.zeros((layers, slots), dtype=np.int64), np.zeros((layers, slots), dtype=np.int64)
    starts = np.zeros((layers, experts + 1), dtype=np.int64)
    rank = np.arange(slots) // placement.slots_per_rank
    for layer, row in enumerate(placement.physical_to_logical):
        _, first = np.unique(row * placement.ranks + rank, return_index=True)  # sorted by expert, then rank
        held[layer, : len(first)], slot[layer, : len(first)] = rank[first], first
        starts[layer, 1:] = np.cumsum(np.bincount(row[first], minlength=experts))
    return held, slot, starts
