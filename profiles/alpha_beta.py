"""Alpha and beta of a cluster's links from measured collectives: seconds a message, bytes/s, each with an error bar.

For each level: seconds = launch + alpha x messages that follow each other + x + 2 sqrt(fill x), where x is the bytes
through the busiest link over beta. A ring passes p - 1 messages (twice that for an all-reduce), a send one, and NCCL
posts an all-to-all's sends at once (Thakur, Rabenseifner, Gropp 2005; bytes by the bus factors of nccl-tests,
doc/PERFORMANCE.md). Between domains a ring leaves each of its D domains once, over all of its NICs together, and an
all-to-all's bytes for other domains leave over the sender's own NIC. The square root is what a transfer in pieces pays
for filling its pipeline, with pieces of the best size (Sanders, Speck, Träff 2009). Launch and fill are the library's:
they are reported, and are no figures of a cluster.

Four numbers for each level cannot follow NCCL's changes of protocol: the residuals say how far off they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from moesim.errors import BadInput
from moesim.spec.cluster import ClusterSpec, LinkFigure, MeasuredFigure
from profiles.lookup import newness
from profiles.record import LATENCY

if TYPE_CHECKING:
    import polars as pl

Floats = NDArray[np.float64]
# Loopback: gloo between the processes of one host, which is no link of a cluster.
Level = Literal["nvlink", "pcie", "nic", "loopback"]
RINGS = {"all_gather": 1.0, "reduce_scatter": 1.0, "all_reduce": 2.0}
# The cluster's figures of each level.
FIGURES: dict[Level, tuple[LinkFigure, LinkFigure]] = {
    "nvlink": ("nvlink_latency_s", "nvlink_bytes_per_s"),
    "pcie": ("pcie_latency_s", "pcie_bytes_per_s"),
    "nic": ("nic_latency_s", "nic_bytes_per_s"),
}
KINDS = (*RINGS, "all_to_all", "send_recv")
# Fewer measured points than this pin no four numbers.
LEAST_POINTS = 8
# Where a latency starts that the cluster says is nothing.
LEAST_S = 1e-7
# Residuals beyond this many times the usual one count linearly: one bad run does not move a fit.
OUTLIER = 0.2


@dataclass(frozen=True)
class Group:
    """One collective among some GPUs: bytes as nccl-tests count them, and seconds, both [n]."""

    kind: str
    gpus: int
    nodes: int
    path: str
    version: str
    bytes: Floats
    seconds: Floats


@dataclass(frozen=True)
class Fitted:
    """One level's launch, alpha, beta and fill.

    sigma: one standard deviation of ln(true / figure) for launch, alpha, beta and fill: how the figures move when any
    one collective and number of GPUs is left out (jackknife). residuals, left_out: ln(fitted / measured) of all points,
    the latter each from a fit without its own group, empty where there are fewer than three. apart: whether launch and
    alpha could be told apart (else launch is 0, and alpha holds both).
    """

    level: Level
    launch_s: float
    latency_s: float
    bytes_per_s: float
    fill_s: float
    sigma: tuple[float, ...]
    residuals: Floats
    left_out: Floats
    groups: int
    apart: bool


def groups_of(table: pl.DataFrame, path: str) -> list[Group]:
    """The groups of a profile's `collective` table over one path, newest version of each; sizes and seconds rising."""
    import polars as pl

    found = []
    rows = table.filter((pl.col("path") == path) & pl.col("kind").is_in(list(KINDS)) & (pl.col("gpus") > 1))
    for (kind, gpus, nodes), part in rows.partition_by(["kind", "gpus", "nodes"], as_dict=True).items():
        newest = max(part["version"].unique().to_list(), key=newness)
        own = part.filter(pl.col("version") == newest).sort("bytes")
        sizes, seconds = own["bytes"].to_numpy(), own[LATENCY].to_numpy()
        found.append(Group(str(kind), int(gpus), int(nodes), path, str(newest), sizes, seconds))
    return sorted(found, key=lambda group: (group.nodes, group.kind, group.gpus))


def level_of(group: Group, cluster: ClusterSpec) -> Level:
    """The level that bounds a group: its domain's links, or the NICs where it spans several domains."""
    if group.gpus > cluster.domain_gpus or (group.nodes > 1 and cluster.domain_gpus <= cluster.gpus_per_node):
        return "nic"
    if group.path == "gloo":
        return "loopback"
    return "nvlink" if cluster.nvlink_bytes_per_s else "pcie"


def fit_levels(groups: list[Group], cluster: ClusterSpec) -> list[Fitted]:
    """Launch, alpha and beta of every level that the groups tell of. Raises BadInput where there are too few points."""
    levels: dict[Level, list[Group]] = {}
    for group in groups:
        levels.setdefault(level_of(group, cluster), []).append(group)
    if not any(_points(own) >= LEAST_POINTS for own in levels.values()):
        raise BadInput(
            f"only {_points(groups)} points of collectives among several GPUs",
            mend=f"measure {LEAST_POINTS} or more with `moesim profile collectives`",
        )
    return [_fit_level(level, own, cluster) for level, own in levels.items() if _points(own) >= LEAST_POINTS]


def _points(groups: list[Group]) -> int:
    return sum(len(group.bytes) for group in groups)


def _fit_level(level: Level, groups: list[Group], cluster: ClusterSpec) -> Fitted:
    apart = len({_messages(group, level, cluster) for group in groups}) > 1
    logs = _fit(level, groups, cluster, apart)
    residuals = _residuals(logs, level, groups, cluster, apart)
    left_out = np.empty(0)
    if len(groups) > 2:
        others = [_fit(level, [*groups[:index], *groups[index + 1 :]], cluster, apart) for index in range(len(groups))]
        moved = np.asarray(others)
        spread = ((moved - moved.mean(axis=0)) ** 2).sum(axis=0) * (len(groups) - 1) / len(groups)
        sigma = np.sqrt(spread)
        pairs = zip(others, groups, strict=True)
        left_out = np.concatenate([_residuals(one, level, [group], cluster, apart) for one, group in pairs])
    else:
        sigma = np.full(4, float(np.sqrt(np.mean(residuals**2))))
    launch, latency, rate, fill = (float(value) for value in np.exp(logs))
    spreads = tuple(float(value) for value in sigma)
    return Fitted(
        level, launch if apart else 0.0, latency, rate, fill, spreads, residuals, left_out, len(groups), apart
    )  # fmt: skip


def _fit(level: Level, groups: list[Group], cluster: ClusterSpec, apart: bool) -> Floats:
    """ln of launch, alpha, beta and fill that fit best in the logarithm of seconds."""
    from scipy.optimize import least_squares

    near = level != "nic"
    latency = cluster.near_latency_s if near else cluster.nic_latency_s
    rate = cluster.near_bytes_per_s if near else cluster.nic_bytes_per_s
    start = np.log([max(latency, LEAST_S), max(latency, LEAST_S), rate, max(latency, LEAST_S)])

    def misses(logs: Floats) -> Floats:
        return _residuals(logs, level, groups, cluster, apart)

    found = least_squares(misses, start, loss="soft_l1", f_scale=OUTLIER)
    return np.asarray(found.x, dtype=np.float64)


def _residuals(logs: Floats, level: Level, groups: list[Group], cluster: ClusterSpec, apart: bool) -> Floats:
    launch, latency, rate, fill = np.exp(logs)
    parts = []
    for group in groups:
        moving = group.bytes * _share(group, level, cluster) / rate
        fixed = (launch if apart else 0.0) + latency * _messages(group, level, cluster)
        parts.append(np.log((fixed + moving + 2.0 * np.sqrt(fill * moving)) / group.seconds))
    return np.concatenate(parts)


def _messages(group: Group, level: Level, cluster: ClusterSpec) -> float:
    """Messages of this level that follow one another."""
    if group.kind not in RINGS:
        return 1.0
    return RINGS[group.kind] * ((_domains(group, cluster) if level == "nic" else group.gpus) - 1)


def _share(group: Group, level: Level, cluster: ClusterSpec) -> float:
    """Bytes through the busiest link of this level for each byte of size."""
    if group.kind == "send_recv":
        return 1.0
    if level != "nic":
        return RINGS.get(group.kind, 1.0) * (group.gpus - 1) / group.gpus
    domains = _domains(group, cluster)
    if group.kind == "all_to_all":
        return (domains - 1) / domains
    nics = min(cluster.nics_per_node, group.gpus // domains)
    return RINGS[group.kind] * (group.gpus - 1) / group.gpus / nics


def _domains(group: Group, cluster: ClusterSpec) -> int:
    return max(group.nodes, -(-group.gpus // cluster.domain_gpus))


def measured_cluster(cluster: ClusterSpec, fitted: list[Fitted], source: str) -> ClusterSpec:
    """The cluster with what was fitted in place of its figures, each marked as measured, with its error and source.

    A latency that holds the library's launch is none of the link's: exchanges that launch otherwise (DeepEP's) would
    pay for NCCL's. The cluster's own stays then, unmeasured.

    Raises BadInput where nothing was fitted that is a link of a cluster.
    """
    if all(one.level == "loopback" for one in fitted):
        raise BadInput("loopback inside one host is no link of a cluster", where="--out", mend="use --path nccl")
    figures: dict[str, float] = {}
    measured, sources = dict(cluster.measured), dict(cluster.sources)
    for one in fitted:
        if one.level == "loopback":
            continue
        latency, rate = FIGURES[one.level]
        of_links = [(rate, one.bytes_per_s, one.sigma[2])]
        if one.apart:
            of_links.append((latency, one.latency_s, one.sigma[1]))
        for name, value, sigma in of_links:
            figures[name] = float(f"{value:.4g}")
            rounded = float(f"{sigma:.2g}")
            measured[name] = MeasuredFigure(rel_sigma=rounded, points=len(one.residuals), source=source)
            sources[name] = source
    return cluster.model_copy(update={**figures, "measured": measured, "sources": sources})
