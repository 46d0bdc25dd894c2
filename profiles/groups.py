"""Which ranks do a collective together: all, those of a host, one of each host (a rail), or neighbours inside a host.

Groups of one partition run at the same time, as a two-level exchange runs them, and the slowest one's time counts.
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesim.errors import BadInput

# For tests on one machine: ranks pretend to sit, in equal blocks, on this many hosts. Their lines say so (PRETENDED),
# and no profile takes them.
PRETEND = "MOESIM_PRETEND_HOSTS"
PRETENDED = "pretended_hosts"
ALL, INSIDE, RAIL = "all", "inside", "rail"
DEFAULT = (ALL, INSIDE, RAIL)


@dataclass(frozen=True)
class Partition:
    """Every rank in one group of equal size. nodes: hosts that one group spans."""

    name: str
    groups: tuple[tuple[int, ...], ...]
    nodes: int

    @property
    def ranks(self) -> int:
        """Ranks of one group."""
        return len(self.groups[0])

    def group_of(self, rank: int) -> tuple[int, ...]:
        """The ranks that `rank` works with, itself included."""
        return next(group for group in self.groups if rank in group)


def in_hosts(count: int) -> str:
    """So many hosts, in words."""
    return f"{count} host{'' if count == 1 else 's'}"


def pretended_hosts() -> int:
    """Hosts that the environment tells to pretend; 0 for none. Raises BadInput."""
    text = os.environ.get(PRETEND, "")
    if text and not (text.isdecimal() and int(text) > 0):
        raise BadInput(f"{text!r} is no number of hosts", where=PRETEND, mend="unset it, or set it to 2")
    return int(text or 0)


def find_hosts(
    torch: Any, rank: int, ranks: int, device: Any, name: str, *, where: str = "profile collectives"
) -> tuple[int, ...]:
    """The number of each rank's host [ranks], from host names and boot ids; the same on every rank.

    name: of this rank's device. where: the command. Raises BadInput where the ranks' devices differ: their times are
    not one machine's.
    """
    from torch import distributed

    pretended = pretended_hosts()
    own = f"pretended {rank * pretended // ranks}" if pretended else f"{socket.gethostname()} {_boot()}"
    mine = torch.tensor([_number(own), _number(name)], dtype=torch.int64, device=device)
    every = [torch.empty_like(mine) for _ in range(ranks)]
    distributed.all_gather(every, mine)
    found = [tuple(int(value) for value in one.tolist()) for one in every]
    if len({one[1] for one in found}) > 1:
        raise BadInput(
            "the ranks run on devices of different names", where=where,
            mend="measure each kind of machine on its own",
        )  # fmt: skip
    seen = list(dict.fromkeys(one[0] for one in found))
    return tuple(seen.index(one[0]) for one in found)


def _number(text: str) -> int:
    """63 bits that two texts share by chance only."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def partitions(hosts: Sequence[int], wanted: Sequence[str]) -> list[Partition]:
    """The partitions by name: `all`, `inside` (a host), `rail` (one rank of each host), N (neighbours inside a host).

    Left out: groups of one rank (unless there is one only), and what an earlier name has given already. Raises BadInput
    for an unknown name, N that does not divide a host's ranks, and hosts with different numbers of ranks.
    """
    ranks = len(hosts)
    by_host = [tuple(rank for rank in range(ranks) if hosts[rank] == host) for host in dict.fromkeys(hosts)]
    found: dict[tuple[tuple[int, ...], ...], Partition] = {}
    for name in wanted:
        groups = _groups(name, ranks, by_host)
        if len(groups[0]) > 1 or ranks == 1:
            nodes = max(len({hosts[rank] for rank in group}) for group in groups)
            found.setdefault(groups, Partition(name, groups, nodes))
    if not found:
        raise BadInput("no group has two ranks", where="--groups", mend=f"add {ALL}")
    return list(found.values())


def _groups(name: str, ranks: int, by_host: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    if name == ALL:
        return (tuple(range(ranks)),)
    if name not in (INSIDE, RAIL) and not (name.isdecimal() and int(name) > 0):
        raise BadInput(f"unknown group {name!r}", where="--groups", mend=f"use {ALL}, {INSIDE}, {RAIL} or a number")
    each = len(by_host[0])
    if any(len(host) != each for host in by_host):
        raise BadInput(
            "the hosts hold different numbers of ranks", where="--groups", mend=f"use --groups {ALL}, or equal hosts"
        )
    if name == RAIL:
        return tuple(zip(*by_host, strict=True))
    size = each if name == INSIDE else int(name)
    if each % size:
        raise BadInput(f"{each} ranks of a host do not divide by {size}", where="--groups", mend="use a divisor")
    return tuple(host[start : start + size] for host in by_host for start in range(0, each, size))
