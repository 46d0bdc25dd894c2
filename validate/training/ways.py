"""Process groups of a layout as one rank sees them, and the collectives of a training step with their gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from moesim.graph.pipeline import Pass
from moesim.network.rank_groups import Group as GroupKind
from validate.hardware.group import Beat, EventMarks, Group, HostMarks, Marks, need_torch
from validate.training.job import Layout

KINDS: tuple[GroupKind, ...] = ("tp", "ep", "dp_cp", "expert_dp", "pp")


@dataclass
class Made:
    """Process groups made so far by their members; every rank makes all of them, in the same order.

    rank: this one among all. device: of this rank; none = the CPU. beat: told while this rank waits for others. world:
    ranks of the default group. sealed: nothing more may be made, as ranks without a part in what runs are gone.
    """

    rank: int
    beat: Beat = field(default_factory=lambda: Beat(None))
    device: Any = None
    world: int = 1
    groups: dict[tuple[Any, ...], Any] = field(default_factory=dict)
    sealed: bool = False

    def __post_init__(self) -> None:
        self.device = need_torch().device("cpu") if self.device is None else self.device

    def alone(self) -> Made:
        """The same rank and device, for what it runs by itself."""
        return Made(0, self.beat, self.device)

    def marks(self) -> Marks:
        """A fresh set of marks in time, of the device's kind."""
        return EventMarks() if self.device.type == "cuda" else HostMarks()

    def group(self, members: tuple[int, ...], use: str = "") -> Any:
        """The process group of some ranks; None for a rank alone. use: groups of the same ranks for several uses."""
        if len(members) < 2:
            return None
        if (members, use) not in self.groups:
            if self.sealed:
                raise RuntimeError(f"no group of ranks {members} was made beforehand")
            self.beat.at(f"making groups: ranks {', '.join(map(str, members))}")
            self.beat.waiting = True
            self.groups[members, use] = need_torch().distributed.new_group(list(members))
            self.beat.waiting = False
        return self.groups[members, use]

    def everyone(self, ranks: int) -> Group | None:
        """The first `ranks` of all ranks; called by all alike, None on the others."""
        group = None if ranks == self.world else self.group(tuple(range(ranks)), "everyone")
        return Group(self.rank, ranks, self.device, self.beat, group) if self.rank < ranks else None

    def channel(self, source: int, target: int, use: str) -> Channel:
        """Messages of one use from one rank to another; asked for by all ranks alike. It has been tried when made."""
        pair = (min(source, target), max(source, target))
        use = f"{use} from {source}"
        fresh = (pair, use) not in self.groups
        found = Channel(source, target, self.group(pair, use), self.device, self.beat)
        if fresh and self.rank in pair:
            found.tried(self.rank)
        return found


@dataclass(frozen=True)
class Channel:
    """Messages from one rank to another, received in the order in which they were sent.

    It has a process group of its own. NCCL matches messages by their order, not by tags, and runs all calls of a
    communicator one after another: on one that both ranks send by, each could wait for the other to receive first.
    """

    source: int
    target: int
    group: Any
    device: Any
    beat: Beat

    def send(self, tensor: Any) -> Any:
        """Begin to send; the tensor must be kept until the work that is returned is done."""
        return need_torch().distributed.isend(tensor, self.target, group=self.group)

    def receive(self, into: Any) -> None:
        """Receive the next message."""
        self.beat.waiting = True
        need_torch().distributed.recv(into, self.source, group=self.group)
        self.beat.waiting = False

    def tried(self, rank: int) -> None:
        """Send one number, so that the connection is there before it is timed or waited for."""
        torch = need_torch()
        one = torch.zeros(1, device=self.device)
        if rank == self.target:
            self.receive(one)
        else:
            self.beat.waiting = True
            self.send(one).wait()
            self.beat.waiting = False
        if self.device.type == "cuda":
            torch.cuda.synchronize()


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


@dataclass(frozen=True)
class Links:
    """What the ranks of a layout are joined by, as one of them sees it.

    ways: its group of every kind. whole: all ranks of the layout. channels: (stage, other stage, pass) -> where what
    that pass makes goes from its stage to the other one.
    """

    ways: dict[GroupKind, Way]
    whole: Any
    channels: dict[tuple[int, int, Pass], Channel]


def links_of(layout: Layout, made: Made) -> Links:
    """Make the groups of a layout; called by all ranks alike, also by those that have no part in it."""
    ways: dict[GroupKind, Way] = {}
    for kind in KINDS:
        for row in layout.grid.members(kind).tolist():
            members = tuple(row)
            group = made.group(members)
            if made.rank in members:
                ways[kind] = Way(members, members.index(made.rank), group, made.beat)
    whole = made.group(tuple(range(layout.ranks)))
    channels: dict[tuple[int, int, Pass], Channel] = {}
    stages = range(layout.pp if layout.virtual_stages > 1 else layout.pp - 1)  # the last hands on to the first, too
    for row in layout.grid.members("pp").tolist() if layout.pp > 1 else ():
        for stage in stages:
            after = (stage + 1) % layout.pp
            for one, other, makes in ((stage, after, Pass.FORWARD), (after, stage, Pass.BACKWARD)):
                channel = made.channel(row[one], row[other], makes.name.lower())
                if made.rank in row:
                    channels[one, other, makes] = channel
    return Links(ways, whole, channels)


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
