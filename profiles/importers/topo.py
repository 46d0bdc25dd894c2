"""Read `nvidia-smi topo -m`: how the GPUs of a node reach each other and its NICs, and what that means for moesim.

The matrix (its own legend): X itself, NV# so many bonded NVLinks, PIX at most one PCIe bridge, PXB several, PHB a host
bridge, NODE several host bridges of one NUMA node, SYS across NUMA nodes. Columns are GPUs, then NICs (`NIC0`, named in
a legend below; older drivers print `mlx5_0` itself), then CPU and NUMA affinity; parted by tabs or by spaces, the
header perhaps underlined. Where two GPUs share NVLink the matrix hides how PCIe joins them: what lies on one switch or
socket is then told by their NICs and their NUMA affinity. Needs nothing but the standard library.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from moesim.errors import BadInput
from profiles.importers.printed import numbered, whole

# From near to far; SOC is SYS and PSB is PIX of old drivers.
DISTANCE = {"PSB": 0, "PIX": 0, "PXB": 1, "PHB": 2, "NODE": 3, "SOC": 4, "SYS": 4}
SAME_SWITCH = 1  # PXB and nearer: no host bridge between
SAME_SOCKET = 3  # NODE and nearer
_NVLINK = re.compile(r"NV(\d{1,3})", re.ASCII)
_GPU = re.compile(r"GPU\d{1,3}", re.ASCII)
_NIC = re.compile(r"NIC\d{1,3}|(?:mlx|bnxt|roce|ib|rdma|hfi|efa|cxi|erdma|irdma)\w*\d\w*", re.ASCII)
_LEGEND = re.compile(r"^\s*(NIC\d{1,3}):\s+(\S+)\s*$", re.ASCII)
_AFFINITY = re.compile(r"N/A|\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*", re.ASCII)
MEND = "save the whole output of `nvidia-smi topo -m`"


@dataclass(frozen=True)
class GpuTopology:
    """The matrix of one node, checked: complete, and the same in both directions.

    gpus: labels (GPU0). nics: device names where the legend tells them. gpu_links: [gpus, gpus] and nic_links:
    [gpus, nics], words of the matrix. cpu_affinity, numa_affinity: [gpus], "" where the matrix has none.
    """

    gpus: tuple[str, ...]
    nics: tuple[str, ...]
    gpu_links: tuple[tuple[str, ...], ...]
    nic_links: tuple[tuple[str, ...], ...]
    cpu_affinity: tuple[str, ...]
    numa_affinity: tuple[str, ...]

    def nvlinks(self, one: int, other: int) -> int:
        """NVLinks between two GPUs; 0 where PCIe joins them."""
        found = _NVLINK.fullmatch(self.gpu_links[one][other])
        return int(found[1]) if found else 0

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """All pairs of GPUs, the lower number first."""
        count = len(self.gpus)
        return tuple((one, other) for one in range(count) for other in range(one + 1, count))

    @property
    def nvlink_domains(self) -> tuple[tuple[int, ...], ...]:
        """Groups of GPUs that NVLink joins, over others too; a GPU without NVLink is in none."""
        joined = _groups(len(self.gpus), [pair for pair in self.pairs if self.nvlinks(*pair)])
        return tuple(group for group in joined if len(group) > 1)

    @property
    def links_per_pair(self) -> dict[int, int]:
        """NVLinks of a pair -> how many pairs have so many; 0 for pairs without."""
        found: dict[int, int] = {}
        for pair in self.pairs:
            found[self.nvlinks(*pair)] = found.get(self.nvlinks(*pair), 0) + 1
        return dict(sorted(found.items(), reverse=True))

    @property
    def nearest(self) -> tuple[tuple[int, ...], ...]:
        """For each GPU the NICs at the least distance; empty where the node has none."""
        found = []
        for row in self.nic_links:
            least = min((DISTANCE[word] for word in row), default=0)
            found.append(tuple(nic for nic, word in enumerate(row) if DISTANCE[word] == least))
        return tuple(found)

    @property
    def gpu_nic(self) -> tuple[int, ...]:
        """The NIC that each GPU uses: one of its nearest, its own as far as there are enough; empty without NICs."""
        if not self.nics:
            return ()
        owner: dict[int, int] = {}
        for gpu in range(len(self.gpus)):
            _give(gpu, self.nearest, owner, set())
        own = {gpu: nic for nic, gpu in owner.items()}
        used = dict.fromkeys(range(len(self.nics)), 0) | dict.fromkeys(owner, 1)
        for gpu, near in enumerate(self.nearest):
            if gpu not in own:
                own[gpu] = min(near, key=lambda nic: (used[nic], nic))
                used[own[gpu]] += 1
        return tuple(own[gpu] for gpu in range(len(self.gpus)))

    @property
    def far_gpus(self) -> tuple[int, ...]:
        """GPUs whose nearest NIC lies beyond a host bridge, or that have none."""
        far = []
        for gpu, row in enumerate(self.nic_links):
            if min((DISTANCE[word] for word in row), default=DISTANCE["SYS"]) > SAME_SWITCH:
                far.append(gpu)
        return tuple(far)

    @property
    def shared_nics(self) -> dict[int, tuple[int, ...]]:
        """NIC -> the GPUs that use it, where more than one does."""
        chosen = self.gpu_nic
        by_nic = {nic: tuple(gpu for gpu, one in enumerate(chosen) if one == nic) for nic in sorted(set(chosen))}
        return {nic: gpus for nic, gpus in by_nic.items() if len(gpus) > 1}

    @property
    def switches(self) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
        """GPUs and NICs under one PCIe switch (PXB or nearer, over others too); each GPU and NIC is in one group."""
        return self._under(SAME_SWITCH)

    @property
    def sockets(self) -> tuple[tuple[int, ...], ...]:
        """GPUs of one NUMA node: by affinity where all have one, else by the matrix (NODE or nearer).

        Empty where the matrix tells neither: NVLink hides PCIe, and there is no NIC to go by.
        """
        if all(self.numa_affinity):
            return tuple(
                tuple(gpu for gpu, one in enumerate(self.numa_affinity) if one == name)
                for name in dict.fromkeys(self.numa_affinity)
            )
        if self.nvlink_domains and not self.nics:
            return ()
        return tuple(gpus for gpus, _ in self._under(SAME_SOCKET) if gpus)

    @property
    def cross_socket_pairs(self) -> tuple[tuple[int, int], ...]:
        """Pairs of GPUs in different NUMA nodes, as far as the matrix tells."""
        at = {gpu: number for number, gpus in enumerate(self.sockets) for gpu in gpus}
        return tuple(
            (one, other)
            for one, other in self.pairs
            if DISTANCE.get(self.gpu_links[one][other], 0) > SAME_SOCKET
            or (self.nvlinks(one, other) and at.get(one) != at.get(other))
        )

    def _under(self, most: int) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
        count = len(self.gpus)
        near = [pair for pair in self.pairs if DISTANCE.get(self.gpu_links[pair[0]][pair[1]], 99) <= most]
        near += [
            (gpu, count + nic)
            for gpu, row in enumerate(self.nic_links)
            for nic, word in enumerate(row)
            if DISTANCE[word] <= most
        ]
        groups = _groups(count + len(self.nics), near)
        return tuple(
            (tuple(one for one in group if one < count), tuple(one - count for one in group if one >= count))
            for group in groups
        )


def _give(gpu: int, nearest: tuple[tuple[int, ...], ...], owner: dict[int, int], asked: set[int]) -> bool:
    """Give the GPU a NIC of its own, moving others to another near one where that helps (augmenting paths)."""
    for nic in nearest[gpu]:
        if nic not in owner:
            owner[nic] = gpu
            return True
    for nic in nearest[gpu]:
        if nic not in asked:
            asked.add(nic)
            if _give(owner[nic], nearest, owner, asked):
                owner[nic] = gpu
                return True
    return False


def _groups(count: int, joined: list[tuple[int, int]]) -> tuple[tuple[int, ...], ...]:
    """The connected groups of 0..count-1, each sorted, by their first member."""
    leader = list(range(count))
    for one, other in joined:
        low, high = sorted((leader[one], leader[other]))
        leader = [low if at == high else at for at in leader]
    return tuple(tuple(at for at in range(count) if leader[at] == first) for first in sorted(set(leader)))


def read_topology(text: str, where: str = "nvidia-smi topo -m") -> GpuTopology:
    """The matrix in a text that may hold more. Raises BadInput that names the line.

    Refused: a word that is no link, a row that is missing, stands twice or is too short, two directions that differ.
    """
    labels: list[str] = []
    header_line = 0
    rows: dict[str, tuple[int, list[str], list[str]]] = {}
    legend: dict[str, str] = {}
    for at, line in numbered(text):
        words = line.split()
        if found := _LEGEND.match(line):
            legend[found[1]] = found[2]
        elif not labels:
            labels, header_line = _labels(words), at
        elif words and words[0] in labels:
            if words[0] in rows:
                raise BadInput(f"{words[0]} has two rows", where=f"{where}:{at}", mend=MEND)
            links = words[1 : 1 + len(labels)]
            _check_row(words[0], links, labels, f"{where}:{at}")
            rows[words[0]] = (at, links, words[1 + len(labels) :])
        elif words and _GPU.fullmatch(words[0]) and len(words) > 1:
            raise BadInput(f"{words[0]} has a row and no column", where=f"{where}:{at}", mend=MEND)
    gpus = [label for label in labels if _GPU.fullmatch(label)]
    if not gpus:
        raise BadInput("no matrix of GPUs here", where=where, mend=MEND)
    for label in gpus:
        if label not in rows:
            raise BadInput(f"{label} has a column and no row", where=f"{where}:{header_line}", mend=MEND)
    _check_both_ways(labels, rows, where)
    nics = [label for label in labels if label not in gpus]
    affinity = [_affinity(rows[label][2]) for label in gpus]
    at_label = {label: place for place, label in enumerate(labels)}
    return GpuTopology(
        gpus=tuple(gpus),
        nics=tuple(legend.get(label, label) for label in nics),
        gpu_links=tuple(tuple(rows[label][1][at_label[other]] for other in gpus) for label in gpus),
        nic_links=tuple(tuple(rows[label][1][at_label[nic]] for nic in nics) for label in gpus),
        cpu_affinity=tuple(cpu for cpu, _ in affinity),
        numa_affinity=tuple(numa for _, numa in affinity),
    )


def _labels(words: list[str]) -> list[str]:
    """The devices of the header; none where the line is no header."""
    labels: list[str] = []
    for word in words:
        if not _GPU.fullmatch(word) and not _NIC.fullmatch(word):
            break
        labels.append(word)
    stops_well = len(labels) == len(words) or words[len(labels)] in ("CPU", "NUMA", "GPU")
    unique = len(set(labels)) == len(labels)
    return labels if labels and labels[0].startswith("GPU") and stops_well and unique else []


def _check_row(label: str, links: list[str], labels: list[str], place: str) -> None:
    if len(links) < len(labels):
        raise BadInput(f"the row of {label} has {len(links)} of {len(labels)} links", where=place, mend=MEND)
    for other, word in zip(labels, links, strict=True):
        if (word == "X") != (other == label):
            raise BadInput(f"{label} to {other} is {word[:20]!r}", where=place, mend=MEND)
        nvlink = _NVLINK.fullmatch(word)
        both_gpus = bool(_GPU.fullmatch(label) and _GPU.fullmatch(other))
        if word != "X" and word not in DISTANCE and not (nvlink and whole(nvlink[1]) and both_gpus):
            raise BadInput(f"{label} to {other} is {word[:20]!r}, which is no link", where=place, mend=MEND)


def _check_both_ways(labels: list[str], rows: dict[str, tuple[int, list[str], list[str]]], where: str) -> None:
    for one, label in enumerate(labels):
        for other, second in enumerate(labels[:one]):
            if label in rows and second in rows and rows[label][1][other] != rows[second][1][one]:
                raise BadInput(
                    f"{label} to {second} is {rows[label][1][other]}, but back {rows[second][1][one]}",
                    where=f"{where}:{rows[label][0]}", mend=MEND,
                )  # fmt: skip


def _affinity(words: list[str]) -> tuple[str, str]:
    """CPU and NUMA affinity behind a row's links; "" for what it lacks."""
    cpu, numa = [*words[:2], "", ""][:2]
    known = [word if _AFFINITY.fullmatch(word) and word != "N/A" else "" for word in (cpu, numa)]
    return known[0], known[1]
