"""Copies of a token in an exchange under uniform routing, in closed form: what benchmarks of exchanges send.

For routing as it is (skewed, picked together), see `traffic`; here every set of `top_k` experts is as likely as any
other, as in the tests of DeepEP (tests/test_low_latency.py, tests/test_internode.py) and of Hybrid-EP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moesim.errors import BadInput

# How copies are made. "expert": one for each pick, over NVLink inside the domain; "expert_network": the same, over the
# NICs inside a domain too; "node": one to each domain, then one to each rank visited (in one domain: one to each rank);
# "peer": one message to every other rank, whatever is routed (a plain all-to-all).
CopyScheme = Literal["expert", "expert_network", "node", "peer"]
COPY_SCHEMES: tuple[CopyScheme, ...] = ("expert", "expert_network", "node", "peer")


@dataclass(frozen=True)
class Routed:
    """How tokens are routed: experts in all, or local_experts on every rank (one of them is 0); top_k picks a token.

    top_groups: domains that a token may visit at most (group-limited gates, one group to a domain), 0 = no limit. A
    gate scores a group by its best experts, so that a token picks from nearly every group that it chose.
    balanced: each token's picks lie on as many ranks as there are ("perfect router"), instead of at random.
    """

    top_k: int
    experts: int = 0
    local_experts: int = 0
    top_groups: int = 0
    balanced: bool = False

    def __post_init__(self) -> None:
        if (self.experts > 0) == (self.local_experts > 0):
            raise BadInput("either experts or local_experts", mend="give one of them")


@dataclass(frozen=True)
class Copies:
    """Per token: copies that leave over the NIC and over NVLink; ranks and domains visited, its own included.

    domains: how many take part. peers: ranks that a rank addresses itself.
    """

    nic: float
    nvlink: float
    ranks: float
    visited_domains: float
    domains: int
    peers: int


def visited(bins: float, experts: float, top_k: int) -> float:
    """Bins that hold at least one of top_k picks without replacement from experts spread evenly over bins."""
    if bins <= 1:
        return 1.0
    missed = 1.0
    for taken in range(min(top_k, int(experts))):
        missed *= max(experts - experts / bins - taken, 0.0) / (experts - taken)
    return bins * (1.0 - missed)


def uniform_copies(scheme: CopyScheme, routed: Routed, *, ranks: int, domain: int) -> Copies:
    """Copies of a token over `ranks` ranks in NVLink domains of `domain` GPUs.

    Ranks that do not fill whole domains count as parts of one more: 12 ranks in domains of 8 are 1.5 domains of 8.
    Raises BadInput for fewer than one rank.
    """
    if ranks < 1 or domain < 1:
        raise BadInput(f"{ranks} ranks in domains of {domain}", mend="give at least 1 of each")
    within = min(domain, ranks)
    domains = ranks / within
    experts = float(max(routed.experts or routed.local_experts * ranks, routed.top_k, ranks))
    at_ranks, at_domains = _visits(routed, ranks, domains, experts)
    away = 1.0 - 1.0 / domains
    picks = float(routed.top_k)
    if scheme == "expert":
        nic, nvlink = picks * away, picks * (1.0 / domains - 1.0 / ranks)
    elif scheme == "expert_network":
        nic, nvlink = picks * (1.0 - 1.0 / ranks), 0.0
    elif scheme == "node":
        nic, nvlink = at_domains * away, at_ranks * (1.0 - 1.0 / within)
    else:
        nic, nvlink = float(ranks - within), float(within - 1)
    peers = within - 1 + round(domains) - 1 if scheme == "node" else ranks - 1
    return Copies(nic, nvlink, at_ranks, at_domains, max(round(domains), 1), peers)


def _visits(routed: Routed, ranks: int, domains: float, experts: float) -> tuple[float, float]:
    """Ranks and domains that a token visits, its own included."""
    if routed.balanced:
        return float(min(ranks, routed.top_k)), float(min(domains, routed.top_k))
    if not routed.top_groups or domains <= routed.top_groups:
        return visited(ranks, experts, routed.top_k), visited(domains, experts, routed.top_k)
    part = routed.top_groups / domains
    return visited(ranks * part, experts * part, routed.top_k), float(min(routed.top_groups, routed.top_k))
