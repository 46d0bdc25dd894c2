"""Capacity as engines execute it: masks and running sums over one rank's tokens, padded [experts, capacity] buffers.

Written apart from moesim.routing.capacity, which it is held against: frameworks keep tokens by a running sum over
one-hot masks (GShard, arXiv:2006.16668, and what descends from it: Switch, DeepSpeed's top-1 and top-2 gates) or by the
largest scores of each expert (Megatron's and DeepSpeed's drops by probability; DeepSpeed's random token selection with
random numbers for scores), and scatter them into a buffer of `capacity` rows for each expert.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from moesim.errors import BadInput
from validate.hardware.group import Group, need_torch
from validate.hardware.layer import Permuted, RankLayer, combine, dispatch, run_experts


@dataclass(frozen=True)
class Policy:
    """A capacity policy in an engine's terms.

    rule: gshard, switch, deepspeed, megatron or survey. keep: choice (by position, first choices first), token (by
    position, tokens in their order), probability or random. backup: none, random or next_best. pad: whole buffers
    travel and are computed.
    """

    rule: str
    factor: float
    keep: str
    backup: str = "none"
    pad: bool = False
    least: int = 4
    most: int = 2**40


@dataclass(frozen=True)
class Placed:
    """Which expert works on each pick, and its row there: int64 [tokens, choices], -1 where the pick is dropped."""

    expert: Any
    place: Any
    capacity: int


def capacity_of(policy: Policy, tokens: int, experts: int, top_k: int) -> int:
    """Places of one expert for a rank of `tokens` tokens, in decimal arithmetic. Raises BadInput on an unknown rule."""
    share = Decimal(tokens) * Decimal(str(policy.factor)) / experts
    if policy.rule == "gshard":
        return min(tokens, int(share))
    if policy.rule == "switch":
        return int(share)
    if policy.rule == "deepspeed":
        return max(_up(share * top_k), policy.least)
    if policy.rule == "megatron":
        return _up(share * top_k)
    if policy.rule == "survey":
        return min(int(share), policy.most)
    raise BadInput(f"unknown rule {policy.rule!r}", where="capacity", mend="use one that moesim simulates")


def capacity_in_floats(policy: Policy, tokens: int, experts: int, top_k: int) -> int:
    """The same as engines compute it, in doubles: where the product is a whole number it can miss by one."""
    share = tokens / experts * policy.factor
    if policy.rule == "deepspeed":
        return max(math.ceil(share * top_k), policy.least)
    if policy.rule == "megatron":
        return math.ceil(tokens * top_k / experts * policy.factor)
    places = int(tokens * policy.factor / experts)
    return {"gshard": min(tokens, places), "switch": places, "survey": min(places, policy.most)}[policy.rule]


def _up(value: Decimal) -> int:
    # A quotient of decimals is rounded in its 28th digit: what lies within that of a whole number is one.
    near = value.to_integral_value()
    return int(near) if abs(value - near) < Decimal("1e-20") else math.ceil(value)


def place(policy: Policy, ids: Any, probabilities: Any, scores: Any, turn: Any, second: Any) -> Placed:
    """Keep, drop and re-route the picks of one rank.

    ids: int64 [tokens, choices], -1 where a token asks for fewer experts; probabilities: their weights; scores:
    [tokens, experts], of all. turn, second: random numbers, see moesim.routing.capacity.on_ids.Chance.
    """
    torch = need_torch()
    tokens, choices = ids.shape
    experts = scores.shape[1]
    capacity = capacity_of(policy, tokens, experts, choices)
    picks = (
        torch.nn.functional.one_hot(ids.clamp(min=0), experts) * (ids >= 0)[:, :, None]
    )  # [tokens, choices, experts]
    if policy.keep in ("choice", "token"):
        kept = _by_running_sum(picks, capacity, choice_major=policy.keep == "choice")
    else:
        value = probabilities if policy.keep == "probability" else -turn.to(torch.float64)
        kept = _by_largest(picks, value, capacity)
    chosen = torch.where((picks * kept).sum(dim=2) > 0, ids, -1)
    filled = (picks * kept).sum(dim=(0, 1))
    if policy.backup == "random":
        _try_once(chosen, ids, second, filled, capacity)
    elif policy.backup == "next_best":
        _go_down(chosen, ids, scores, filled, capacity)
    return Placed(chosen, _locations(chosen, experts), capacity)


def _by_running_sum(picks: Any, capacity: int, *, choice_major: bool) -> Any:
    """A pick keeps its place while fewer than `capacity` came before it for that expert: bool [tokens, choices, e]."""
    tokens, choices, experts = picks.shape
    rows = picks.transpose(0, 1) if choice_major else picks
    flat = rows.reshape(tokens * choices, experts)
    before = flat.cumsum(dim=0) - flat
    kept = (before < capacity) & (flat > 0)
    shaped = kept.reshape(rows.shape)
    return shaped.transpose(0, 1) if choice_major else shaped


def _by_largest(picks: Any, value: Any, capacity: int) -> Any:
    """Each expert keeps the `capacity` picks of the largest value: bool [tokens, choices, experts]."""
    torch = need_torch()
    tokens, choices, experts = picks.shape
    mask = picks.reshape(tokens * choices, experts)
    masked = torch.where(mask > 0, value.reshape(-1, 1).to(torch.float64), -torch.inf)
    best = masked.topk(min(capacity, tokens * choices), dim=0).indices
    kept = torch.zeros_like(mask, dtype=torch.bool).scatter_(0, best, value=True)
    return (kept & (mask > 0)).reshape(picks.shape)


def _try_once(chosen: Any, ids: Any, second: Any, filled: Any, capacity: int) -> None:
    """Lost picks try one other expert each, first choices first; they stay lost where it is full or theirs already."""
    torch = need_torch()
    for choice in range(ids.shape[1]):
        wish = second[:, choice]
        asks = (ids[:, choice] >= 0) & (chosen[:, choice] < 0) & ~(chosen == wish[:, None]).any(dim=1)
        _admit(chosen, choice, torch.where(asks, wish, -1), filled, capacity)


def _go_down(chosen: Any, ids: Any, scores: Any, filled: Any, capacity: int) -> None:
    """Lost picks go to their token's best expert with room that it neither has nor asked for, until none has any."""
    torch = need_torch()
    for choice in range(ids.shape[1]):
        waiting = (ids[:, choice] >= 0) & (chosen[:, choice] < 0)
        while bool(waiting.any()):
            left = scores.to(torch.float64).clone()
            left[:, filled >= capacity] = -torch.inf
            for held in (ids, chosen):
                token, column = (held >= 0).nonzero(as_tuple=True)
                left[token, held[token, column]] = -torch.inf
            best = left.max(dim=1)
            waiting = waiting & torch.isfinite(best.values)
            _admit(chosen, choice, torch.where(waiting, best.indices, -1), filled, capacity)
            waiting = waiting & (chosen[:, choice] < 0)


def _admit(chosen: Any, choice: int, wish: Any, filled: Any, capacity: int) -> None:
    """Let tokens in, in their order, while their expert (-1: none) has room; changes `chosen` and `filled`."""
    torch = need_torch()
    asks = torch.nn.functional.one_hot(wish.clamp(min=0), len(filled)) * (wish >= 0)[:, None]
    before = asks.cumsum(dim=0) - asks + filled
    got = ((before < capacity) & (asks > 0)).any(dim=1)
    chosen[got, choice] = wish[got]
    filled += asks[got].sum(dim=0)


def _locations(chosen: Any, experts: int) -> Any:
    """The row of each kept pick in its expert's buffer, tokens in their order: int64 [tokens, choices], -1 dropped."""
    torch = need_torch()
    flat = chosen.reshape(-1)
    masks = torch.nn.functional.one_hot(flat.clamp(min=0), experts) * (flat >= 0)[:, None]
    row = ((masks.cumsum(dim=0) - masks) * masks).sum(dim=1)
    return torch.where(flat >= 0, row, -1).reshape(chosen.shape)


def forward(
    x: Any, weights: Any, placed: Placed, layer: RankLayer, group: Group, *, pad: bool
) -> tuple[Any, list[int]]:
    """Run the layer on this rank's tokens [tokens, hidden]; returns the output and the rows of each local slot.

    Kept picks are scattered into [experts, capacity, hidden]; rows (all of them under `pad`) go to their expert's
    replicas in turn, through a real uneven all-to-all, and come back the same way.
    """
    torch = need_torch()
    experts, hidden = layer.shape.experts, x.shape[1]
    kept = placed.expert >= 0
    token, choice = kept.nonzero(as_tuple=True)
    expert, row = placed.expert[token, choice], placed.place[token, choice]
    buffer = x.new_zeros((experts, max(placed.capacity, 1), hidden))
    buffer[expert, row] = x[token]
    there = torch.zeros(buffer.shape[:2], dtype=torch.bool)
    there[expert, row] = True
    if pad:
        there[:, : placed.capacity] = True
    of_expert, of_row = there.nonzero(as_tuple=True)
    slot = layer.routes.slots[of_expert, of_row % layer.routes.count[of_expert]]
    order = slot.argsort(stable=True)
    counts = torch.bincount(slot, minlength=layer.routes.total_slots)
    arrived = dispatch(Permuted(buffer[of_expert, of_row][order], order, counts), group)
    back = combine(run_experts(arrived.rows, arrived.counts, layer), arrived, group)
    done = torch.zeros_like(buffer)
    done[of_expert[order], of_row[order]] = back
    y = torch.zeros_like(x)
    y.index_add_(0, token, weights[token, choice, None] * done[expert, row])
    return y, [sum(source[slot] for source in arrived.counts) for slot in range(len(layer.weights))]


def worked_on(y: Any, contributions: Any) -> Any:
    """The weight with which each expert worked on each token, from the real output alone: float64 [tokens, experts].

    contributions: float64 [tokens, experts, hidden], what each expert makes of each token by itself. The output is
    their weighted sum, and with more columns than experts the weights follow by least squares.
    """
    torch = need_torch()
    return torch.linalg.lstsq(contributions.transpose(1, 2), y.double()[:, :, None]).solution[:, :, 0]
