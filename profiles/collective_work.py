"""The collectives themselves: an operation on its buffers, and whether what it gave is right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from profiles.traffic import Ints

ELEMENT_BYTES = 4  # float32: sums are checked, and no type is faster in bytes per second
# An all-reduce in place multiplies its values by the ranks each time: from here a batch over 64 ranks stays finite.
SMALL = 1e-30


@dataclass(frozen=True)
class Seat:
    """One rank of a group: torch, the process group (None: of all ranks), its members, this one's place among them."""

    torch: Any
    device: Any
    group: Any
    members: tuple[int, ...]
    rank: int

    @property
    def ranks(self) -> int:
        """Ranks of the group."""
        return len(self.members)

    def tagged(self, owner: int, count: int) -> Any:
        """Numbers that tell whose they are: small whole ones, so that sums are exact."""
        return (self.torch.arange(count, device=self.device, dtype=self.torch.float32) % 97) + float(owner)

    def zeros(self, count: int) -> Any:
        """A buffer to receive into."""
        return self.torch.zeros(count, device=self.device)


@dataclass(frozen=True)
class Work:
    """run: the operation. right: whether it gave what it should, asked after the first run. reset: between repeats."""

    run: Callable[[], Any]
    right: Callable[[], bool]
    reset: Callable[[], None] = lambda: None


def work_of(kind: str, elements: int, seat: Seat) -> Work:
    """A collective of `elements` as nccl-tests count a size; all_to_all evenly."""
    if kind == "all_to_all":
        import numpy as np

        return all_to_all(np.full((seat.ranks, seat.ranks), elements // seat.ranks, dtype=np.int64), seat)
    made: dict[str, Callable[[int, Seat], Work]] = {
        "all_reduce": _all_reduce, "all_gather": _all_gather, "reduce_scatter": _reduce_scatter, "send_recv": _ring,
    }  # fmt: skip
    return made[kind](elements, seat)


def all_to_all(counts: Ints, seat: Seat) -> Work:
    """Elements from each rank to each: counts [source, destination]."""
    from torch import distributed

    torch, rank = seat.torch, seat.rank
    send, receive = counts[rank].tolist(), counts[:, rank].tolist()
    sent, got = seat.tagged(rank, sum(send)), seat.zeros(sum(receive))
    before = counts[:, :rank].sum(axis=1).tolist()  # where this rank's part begins in each one's buffer

    def right() -> bool:
        return all(
            torch.equal(part, seat.tagged(owner, before[owner] + receive[owner])[before[owner] :])
            for owner, part in enumerate(got.split(receive))
        )

    return Work(lambda: distributed.all_to_all_single(got, sent, receive, send, group=seat.group), right)


def _all_reduce(elements: int, seat: Seat) -> Work:
    from torch import distributed

    buffer = seat.tagged(seat.rank, elements)
    total = sum(seat.tagged(owner, elements) for owner in range(seat.ranks))
    fresh = seat.tagged(seat.rank, elements) * SMALL
    return Work(
        lambda: distributed.all_reduce(buffer, group=seat.group),
        lambda: bool(seat.torch.equal(buffer, total)),
        lambda: buffer.copy_(fresh),
    )


def _all_gather(elements: int, seat: Seat) -> Work:
    from torch import distributed

    each = elements // seat.ranks
    mine, whole = seat.tagged(seat.rank, each), seat.zeros(elements)
    return Work(
        lambda: distributed.all_gather_into_tensor(whole, mine, group=seat.group),
        lambda: all(seat.torch.equal(part, seat.tagged(owner, each)) for owner, part in enumerate(whole.split(each))),
    )


def _reduce_scatter(elements: int, seat: Seat) -> Work:
    from torch import distributed

    each = elements // seat.ranks
    sent, got = seat.tagged(seat.rank, elements), seat.zeros(each)
    part = slice(seat.rank * each, (seat.rank + 1) * each)
    total = sum(seat.tagged(owner, elements)[part] for owner in range(seat.ranks))
    return Work(
        lambda: distributed.reduce_scatter_tensor(got, sent, group=seat.group),
        lambda: bool(seat.torch.equal(got, total)),
    )


def _ring(elements: int, seat: Seat) -> Work:
    """send_recv: every rank sends to the next and receives from the one before, at the same time."""
    from torch import distributed

    sent, got = seat.tagged(seat.rank, elements), seat.zeros(elements)
    if seat.ranks == 1:
        return Work(lambda: got.copy_(sent), lambda: bool(seat.torch.equal(got, sent)))
    after, before = (seat.rank + 1) % seat.ranks, (seat.rank - 1) % seat.ranks

    def pass_on() -> None:
        both = [
            distributed.P2POp(distributed.isend, sent, seat.members[after], group=seat.group),
            distributed.P2POp(distributed.irecv, got, seat.members[before], group=seat.group),
        ]
        for request in distributed.batch_isend_irecv(both):
            request.wait()

    return Work(pass_on, lambda: bool(seat.torch.equal(got, seat.tagged(before, elements))))
