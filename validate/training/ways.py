"""Process groups of a layout as one rank sees them, and the collectives of a training step with their gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from moesim.network.rank_groups import Group as GroupKind
from validate.hardware.group import Beat, need_torch
from validate.training.job import Layout

KINDS: tuple[GroupKind, ...] = ("tp", "ep", "dp_cp", "expert_dp", "pp")


@dataclass
class Made:
    """Process groups made so far by their members; every rank makes all of them, in the same order.

    beat: told while this rank waits for others.
    """

    rank: int
    beat: Beat = field(default_factory=lambda: Beat(None))
    groups: dict[tuple[int, ...], Any] = field(default_factory=dict)

    def group(self, members: tuple[int, ...]) -> Any:
        """The process group of some ranks; None for a rank alone."""
        if len(members) < 2:
            return None
        if members not in self.groups:
            self.groups[members] = need_torch().distributed.new_group(list(members))
        return self.groups[members]


@dataclass(frozen=True)
class Way:
    """One group that this rank is in: its members in order, this rank's place among them, its process group."""

    members: tuple[int, ...]
    place: int
    group: Any
    beat: Beat

    def meet(self, call: Callable[[], Any]) -> Any:
        """Run a collective, noting that this rank waits for the others."""
        self.beat.waiting = True
        found = call()
        self.beat.waiting = False
        return found

    @property
    def size(self) -> int:
        """Ranks of the group."""
        return len(self.members)


def ways_of(layout: Layout, made: Made) -> dict[GroupKind, Way]:
    """This rank's group of every kind under a layout."""
    found: dict[GroupKind, Way] = {}
    for kind in KINDS:
        for row in layout.grid.members(kind).tolist():
            members = tuple(row)
            group = made.group(members)
            if made.rank in members:
                found[kind] = Way(members, members.index(made.rank), group, made.beat)
    return found


def all_gather(mine: Any, group: Any, ranks: int) -> Any:
    """Rows of all ranks of a group in order: [n, ...] -> [ranks x n, ...]."""
    torch = need_torch()
    whole = mine.new_empty((mine.shape[0] * ranks, *mine.shape[1:]))
    named(torch.distributed, "all_gather_single", "all_gather_into_tensor")(whole, mine.contiguous(), group=group)
    return whole


def reduce_scatter(whole: Any, group: Any, ranks: int) -> Any:
    """This rank's share of the sum over a group: [ranks x n, ...] -> [n, ...]."""
    torch = need_torch()
    mine = whole.new_empty((whole.shape[0] // ranks, *whole.shape[1:]))
    named(torch.distributed, "reduce_scatter_single", "reduce_scatter_tensor")(mine, whole.contiguous(), group=group)
    return mine


def all_to_all(rows: Any, send: list[int], receive: list[int], group: Any) -> Any:
    """`send` rows to each rank of a group, `receive` rows from each."""
    torch = need_torch()
    got = rows.new_empty((sum(receive), *rows.shape[1:]))
    torch.distributed.all_to_all_single(got, rows.contiguous(), receive, send, group=group)
    return got


def named(module: Any, *names: str) -> Callable[..., Any]:
    """The first of some names that a module has: torch renamed its collectives of one tensor in 2.13."""
    found: Callable[..., Any] = next(getattr(module, name) for name in names if hasattr(module, name))
    return found


def functions() -> tuple[Any, Any, Any]:
    """Gather, scatter and exchange as functions of autograd: each one's gradient is the other's, or its own reversed.

    A function of this kind, since torch is imported only where it is needed: `gather(x, way)`, `scatter(x, way)`,
    `exchange(rows, send, receive, way)`.
    """
    torch = need_torch()

    base: Any = torch.autograd.Function

    class Gather(base):  # type: ignore[misc, valid-type]
        @staticmethod
        def forward(ctx: Any, mine: Any, way: Way) -> Any:
            ctx.way = way
            return way.meet(lambda: all_gather(mine, way.group, way.size))

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            way = ctx.way
            return way.meet(lambda: reduce_scatter(gradient, way.group, way.size)), None

    class Scatter(base):  # type: ignore[misc, valid-type]
        @staticmethod
        def forward(ctx: Any, whole: Any, way: Way) -> Any:
            ctx.way = way
            return way.meet(lambda: reduce_scatter(whole, way.group, way.size))

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            way = ctx.way
            return way.meet(lambda: all_gather(gradient, way.group, way.size)), None

    class Exchange(base):  # type: ignore[misc, valid-type]
        @staticmethod
        def forward(ctx: Any, rows: Any, send: list[int], receive: list[int], way: Way) -> Any:
            ctx.send, ctx.receive, ctx.way = send, receive, way
            return way.meet(lambda: all_to_all(rows, send, receive, way.group))

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            way = ctx.way
            back = way.meet(lambda: all_to_all(gradient, ctx.receive, ctx.send, way.group))
            return back, None, None, None

    def alone(function: Any) -> Any:
        return lambda rows, *rest: rows if rest[-1].size == 1 else function.apply(rows, *rest)

    return alone(Gather), alone(Scatter), alone(Exchange)
