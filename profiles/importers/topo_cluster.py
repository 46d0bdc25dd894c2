"""What a node's matrix means for moesim: in words, as JSON, and as the `node` of a cluster file."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import Any

from moesim.errors import BadInput
from moesim.files import read_text, write_text
from moesim.spec.cluster import ClusterSpec
from moesim.spec.cluster_units import check_units
from moesim.spec.presets import presets
from moesim.spec.yaml_text import FAULTS, parse_yaml, yaml_fault
from profiles.importers.topo import DISTANCE, SAME_SOCKET, GpuTopology

_NODE_BLOCK = re.compile(r"^node:.*\n(?:(?:[ \t].*)?\n)*?(?=\S|\Z)", re.MULTILINE)


def layout(topology: GpuTopology) -> dict[str, list[int]]:
    """The `node` of a cluster file: only NICs in use, numbered by first use; empty where no NIC is nearer than SYS.

    Without `switch_socket` where the matrix does not tell the sockets of all switches.
    """
    nearest = [min((DISTANCE[word] for word in row), default=DISTANCE["SYS"]) for row in topology.nic_links]
    if min(nearest) >= DISTANCE["SYS"]:
        return {}
    used = list(dict.fromkeys(topology.gpu_nic))
    groups = [group for group in topology.switches if group[0] or set(group[1]) & set(used)]
    switch_of_gpu = {gpu: number for number, (gpus, _) in enumerate(groups) for gpu in gpus}
    switch_of_nic = {nic: number for number, (_, nics) in enumerate(groups) for nic in nics}
    found = {
        "gpu_nic": [used.index(nic) for nic in topology.gpu_nic],
        "gpu_switch": [switch_of_gpu[gpu] for gpu in range(len(topology.gpus))],
        "nic_switch": [switch_of_nic[nic] for nic in used],
    }
    sockets = [_socket(topology, gpus, nics) for gpus, nics in groups]
    known = [socket for socket in sockets if socket is not None]
    return {**found, "switch_socket": known} if len(known) == len(sockets) else found


def _socket(topology: GpuTopology, gpus: tuple[int, ...], nics: tuple[int, ...]) -> int | None:
    """The socket of a switch: that of its GPUs, or of the GPUs that reach its NICs within one."""
    near = gpus or tuple(
        gpu for gpu, row in enumerate(topology.nic_links) for nic in nics if DISTANCE[row[nic]] <= SAME_SOCKET
    )
    found = {number for number, group in enumerate(topology.sockets) for gpu in near if gpu in group}
    return found.pop() if len(found) == 1 else None


def as_json(topology: GpuTopology) -> dict[str, Any]:
    """Everything the matrix means, by labels and names."""
    chosen = topology.gpu_nic
    return {
        "gpus": list(topology.gpus),
        "nics": list(topology.nics),
        "nvlink_domains": [_labels(topology, group) for group in topology.nvlink_domains],
        "nvlinks_per_pair": {str(links): pairs for links, pairs in topology.links_per_pair.items()},
        "gpu_nic": [
            {"gpu": label, "nic": topology.nics[nic], "link": topology.nic_links[gpu][nic]}
            for gpu, (label, nic) in enumerate(zip(topology.gpus, chosen, strict=False))
        ],
        "shared_nics": {topology.nics[nic]: _labels(topology, gpus) for nic, gpus in topology.shared_nics.items()},
        "gpus_without_near_nic": _labels(topology, topology.far_gpus),
        "pcie_switches": [
            {"gpus": _labels(topology, gpus), "nics": [topology.nics[nic] for nic in nics]}
            for gpus, nics in topology.switches
        ],
        "sockets": [_labels(topology, gpus) for gpus in topology.sockets],
        "cross_socket_pairs": [_labels(topology, pair) for pair in topology.cross_socket_pairs],
        "cpu_affinity": dict(zip(topology.gpus, topology.cpu_affinity, strict=True)),
        "node": layout(topology),
    }


def _labels(topology: GpuTopology, gpus: tuple[int, ...]) -> list[str]:
    return [topology.gpus[gpu] for gpu in gpus]


def in_words(topology: GpuTopology) -> list[str]:
    """The same for a person, one matter a line."""
    told = as_json(topology)
    lines = [f"{len(topology.gpus)} GPUs, {len(topology.nics)} NICs"]
    for domain in topology.nvlink_domains:
        within = {topology.nvlinks(*pair) for pair in topology.pairs if set(pair) <= set(domain)}
        lines.append(f"NVLink joins {_names(_labels(topology, domain))}: {_counts(within)} links a pair")
    if not topology.nvlink_domains:
        lines.append("no NVLink: the GPUs meet over PCIe")
    if not topology.nics:
        return [*lines, "no NIC in the matrix: nothing to pair", *_socket_words(topology)]
    paired = ", ".join(f"{one['gpu']} {one['nic']} ({one['link']})" for one in told["gpu_nic"])
    lines.append(f"nearest NIC: {paired}")
    if not told["node"]:
        lines.append("no NIC is nearer to one GPU than to another (all SYS): the pairs above are by number only")
    for nic, gpus in told["shared_nics"].items():
        lines.append(f"share {nic}: {_names(gpus)}")
    if told["gpus_without_near_nic"]:
        lines.append(f"no NIC on their PCIe switch: {_names(told['gpus_without_near_nic'])}")
    lines += [
        f"share a PCIe switch: {_names(switch['gpus'])}, with {_names(switch['nics']) or 'no NIC'}"
        for switch in told["pcie_switches"]
        if len(switch["gpus"]) > 1
    ]
    return [*lines, *_socket_words(topology)]


def _socket_words(topology: GpuTopology) -> list[str]:
    if not topology.sockets:
        return ["NUMA nodes: not told"]
    nodes = "; ".join(_names(_labels(topology, gpus)) for gpus in topology.sockets)
    return [f"NUMA nodes: {nodes}; {len(topology.cross_socket_pairs)} of {len(topology.pairs)} pairs lie across"]


def _names(labels: list[str]) -> str:
    return ", ".join(labels)


def _counts(numbers: set[int]) -> str:
    return " or ".join(str(one) for one in sorted(numbers, reverse=True))


def write_cluster(topology: GpuTopology, path: Path, system: str | None, source: str) -> None:
    """Write the layout into a cluster file: the one at `path`, else a copy of the preset `system`; whole or not at all.

    Everything else in the file stays as it stands, comments too. Raises BadInput where the matrix places no NIC, where
    it contradicts the file (GPUs of a node, NVLink), and where the result would be no cluster.
    """
    found = layout(topology)
    if not found:
        raise BadInput(
            "the matrix says no more of the NICs than their number", where=source,
            mend="leave --out away, or write `node` into the cluster file by hand",
        )  # fmt: skip
    text = _text(path, system)
    data = _mapping(text, path)
    gpus, in_file = len(topology.gpus), data.get("gpus_per_node", 8)
    if in_file != gpus:
        raise BadInput(
            f"the matrix has {gpus} GPUs, the node {in_file}", where=f"{path}: gpus_per_node", mend="correct it"
        )
    if bool(topology.nvlink_domains) != bool(data.get("nvlink_bytes_per_s")):
        says = "NVLink" if topology.nvlink_domains else "no NVLink"
        raise BadInput(
            f"the matrix shows {says}", where=f"{path}: nvlink_bytes_per_s", mend="correct it (0 means no NVLink)"
        )
    names = ", ".join(topology.nics[nic] for nic in dict.fromkeys(topology.gpu_nic))
    block = [f"node:  # {' '.join(source.split())}; NICs from 0: {names}"]
    block += [f"  {name}: {numbers}" for name, numbers in found.items()]
    rest = _NODE_BLOCK.sub("", text if text.endswith("\n") else text + "\n")
    merged = rest + "\n".join(block) + "\n"
    check_units(ClusterSpec.read(_mapping(merged, path), where=path), where=path)
    write_text(path, merged)


def _mapping(text: str, path: Path) -> dict[str, Any]:
    try:
        data = parse_yaml(text)
    except FAULTS as error:
        raise BadInput(f"not valid YAML: {yaml_fault(error)}", where=str(path), mend="correct the YAML") from None
    if not isinstance(data, dict):
        raise BadInput("a cluster file is a mapping of keys", where=str(path), mend="see docs/reference/clusters.md")
    return data


def _text(path: Path, system: str | None) -> str:
    if path.exists():
        if system is not None:
            raise BadInput(
                "there is a cluster file already", where=str(path), mend="leave --system out, or name another"
            )
        return read_text(path, what="cluster file")
    if system is None:
        raise BadInput("no cluster file here", where=str(path), mend="give --system PRESET to start from one")
    if system not in presets():
        raise BadInput(f"unknown preset {system!r}", where="--system", mend=f"use one of {', '.join(presets())}")
    return (resources.files("moesim.spec") / "clusters" / f"{system}.yaml").read_text(encoding="utf-8")
