"""What the serving loop asks of faults, and how it loses requests to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from moesim.engine.batch_state import NONE, Plan, Ranks, Requests
from moesim.engine.kv_memory import give_back


@dataclass(frozen=True)
class Strike:
    """What faults take from an instance now: requests of these attention-DP ranks; whether their queues move on."""

    ranks: tuple[int, ...]
    queues_move: bool


class Faults(Protocol):
    """The faults of one run; `outages.FaultClock` is them."""

    def step_s(self, plan: Plan, instance: int, now_s: float) -> float:
        """Seconds of a planned step that an instance begins now."""

    def down_until(self, instance: int, now_s: float) -> float:
        """When the instance is back; now, where it is not down."""

    def strike(self, instance: int, now_s: float) -> list[Strike]:
        """What faults that have begun since the last call take from an instance; each is told once."""

    def route(self, instance: int, rank: int, now_s: float) -> tuple[int, int]:
        """Instance and rank that a request goes to which was meant for these."""


def drop_rank(requests: Requests, group: Ranks, rank: int) -> list[int]:
    """Lose the requests that a rank has begun, running or half read, and free its memory; returns their ids."""
    lost = [int(request) for request in group.running[rank, : group.running_seqs[rank]]]
    if group.reading[rank] != NONE:
        lost.append(int(group.reading[rank]))
    for request in lost:
        give_back(requests, group, rank, request)
        _leave(requests, group, rank, request)
    group.running_seqs[rank] = 0
    group.context[rank] = NONE
    group.reading[rank] = NONE
    return lost


def empty_queue(requests: Requests, group: Ranks, rank: int) -> list[int]:
    """Take all waiting requests from a rank, in their order."""
    waiting, request = [], int(group.head[rank])
    while request != NONE:
        waiting.append(request)
        _leave(requests, group, rank, request)
        after = int(requests.following[request])
        requests.following[request] = NONE
        request = after
    group.head[rank] = group.tail[rank] = NONE
    return waiting


def _leave(requests: Requests, group: Ranks, rank: int, request: int) -> None:
    """Count a request as no longer at a rank; the other half of `arrive`."""
    group.requests_in[rank] -= 1
    group.tokens_in[rank] -= requests.isl[request] + requests.generated[request]
