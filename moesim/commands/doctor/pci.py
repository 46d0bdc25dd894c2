"""The PCI tree of this machine as sysfs shows it: GPUs, NICs, and the bridges that they share.

Pure functions over a folder laid out like /sys, so that a saved or made-up tree is read in the same way.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

SYS = Path("/sys")
NVIDIA = 0x10DE
# PCI base class and subclass (PCI Code and ID Assignment Specification): display and 3D controllers; network.
GPU_CLASSES = (0x0300, 0x0302)
NETWORK_BASE = 0x02
BRIDGE_CLASS = 0x0604
ADDRESS = re.compile(r"^[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]$")
# PCI Express Base Specification: extended capabilities start at 0x100; ACS is number 0x000D, its control register lies
# 6 bytes in; bits 2 and 3 redirect requests and completions between peers up to the root.
EXTENDED_START, ACS_NUMBER, ACS_CONTROL, ACS_REDIRECT = 0x100, 0x000D, 6, 0b1100


@dataclass(frozen=True)
class Link:
    """A PCIe link: transfers per second and lane in GT/s, and lanes; now and at most. None where sysfs is silent."""

    speed: float | None = None
    most_speed: float | None = None
    width: int | None = None
    most_width: int | None = None


@dataclass(frozen=True)
class Function:
    """A PCI function.

    path: the addresses of the bridges above it, from the root port down; host: its host bridge (`pci0000:00`). numa:
    the node of its socket, -1 where the machine does not say. names: of its RDMA or network devices. acs_redirects: of
    a bridge, whether it sends traffic between peers up to the root; None where it cannot be read. iommu: the type of
    its IOMMU domain, "" without.
    """

    address: str
    vendor: int
    kind: int
    host: str
    path: tuple[str, ...]
    numa: int
    link: Link
    names: tuple[str, ...] = ()
    rdma: bool = False
    virtual: bool = False
    acs_redirects: bool | None = None
    iommu: str = ""

    @property
    def is_gpu(self) -> bool:
        """Whether this is an NVIDIA GPU."""
        return self.vendor == NVIDIA and self.kind in GPU_CLASSES

    @property
    def is_nic(self) -> bool:
        """Whether this is a physical network function: Ethernet or InfiniBand, behind a PCIe link."""
        return self.kind >> 8 == NETWORK_BASE and not self.virtual

    @property
    def device(self) -> str:
        """The card: the address without the function; two ports of one NIC share it."""
        return self.address.rpartition(".")[0]


def read_functions(sys: Path = SYS) -> list[Function]:
    """All PCI functions in order of address; empty where there is no PCI tree (a container without /sys)."""
    folder = Path(sys) / "bus" / "pci" / "devices"
    try:
        places = sorted(place for place in folder.iterdir() if ADDRESS.match(place.name))
    except OSError:
        return []
    return [_function(place) for place in places]


def _function(place: Path) -> Function:
    above = [part for part in place.resolve().parts[:-1] if ADDRESS.match(part)]
    host = next((part for part in place.resolve().parts if re.match(r"^pci[0-9a-f]{4,8}:[0-9a-f]{2}$", part)), "")
    rdma, network = _children(place / "infiniband"), _children(place / "net")
    kind = _hex(place / "class") >> 8
    return Function(
        address=place.name,
        vendor=_hex(place / "vendor"),
        kind=kind,
        host=host,
        path=tuple(above),
        numa=_whole(place / "numa_node", -1),
        link=Link(
            speed=_speed(place / "current_link_speed"),
            most_speed=_speed(place / "max_link_speed"),
            width=_lanes(place / "current_link_width"),
            most_width=_lanes(place / "max_link_width"),
        ),
        names=rdma or network,
        rdma=bool(rdma),
        virtual=(place / "physfn").exists(),
        acs_redirects=acs_redirects(_bytes(place / "config")) if kind == BRIDGE_CLASS else None,
        iommu=_text(place / "iommu_group" / "type"),
    )


def acs_redirects(config: bytes) -> bool | None:
    """Whether a bridge's access control services send traffic between peers up to the root.

    config: the function's configuration space; without root's rights sysfs gives its first 64 bytes only: None.
    """
    if len(config) <= EXTENDED_START:
        return None
    at = EXTENDED_START
    for _ in range(64):  # a chain of capabilities, ended by 0; no longer than the space has room for
        if at < EXTENDED_START or at + ACS_CONTROL + 2 > len(config):
            return False
        head = int.from_bytes(config[at : at + 4], "little")
        if head & 0xFFFF == ACS_NUMBER:
            control = int.from_bytes(config[at + ACS_CONTROL : at + ACS_CONTROL + 2], "little")
            return bool(control & ACS_REDIRECT)
        at = head >> 20
    return False


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _children(path: Path) -> tuple[str, ...]:
    try:
        return tuple(sorted(child.name for child in path.iterdir()))
    except OSError:
        return ()


def _hex(path: Path) -> int:
    text = _text(path)
    return int(text, 16) if re.fullmatch(r"0x[0-9a-fA-F]+", text) else 0


def _whole(path: Path, default: int) -> int:
    text = _text(path)
    return int(text) if re.fullmatch(r"-?\d+", text) else default


def _speed(path: Path) -> float | None:
    found = re.match(r"(\d+(?:\.\d+)?) GT/s", _text(path))  # "Unknown" where there is no link
    return float(found.group(1)) if found else None


def _lanes(path: Path) -> int | None:
    lanes = _whole(path, 0)
    return lanes if 0 < lanes < 255 else None  # 255 and 0 stand for no link


def cards(functions: Sequence[Function]) -> list[Function]:
    """NICs by card: the first port stands for all, with the names of all."""
    found: dict[str, Function] = {}
    for one in functions:
        if not one.is_nic:
            continue
        first = found.get(one.device)
        found[one.device] = (
            one if first is None else replace(first, names=first.names + one.names, rdma=first.rdma or one.rdma)
        )
    return list(found.values())


# From near to far, as `nvidia-smi topo` names ways: within one switch; over several; through the host bridge; between
# host bridges of one socket; between sockets.
WAYS = ("PIX", "PXB", "PHB", "NODE", "SYS")


def way(one: Function, other: Function) -> str:
    """How two functions reach each other: one of WAYS."""
    shared = shared_bridge(one, other)
    if shared is not None:
        below = max(len(own.path) - own.path.index(shared) - 1 for own in (one, other))
        return "PIX" if below <= 1 else "PXB"
    if one.host and one.host == other.host:
        return "PHB"
    return "NODE" if one.numa == other.numa or -1 in (one.numa, other.numa) else "SYS"


def shared_bridge(one: Function, other: Function) -> str | None:
    """The deepest bridge above both, None where they meet at the host bridge or beyond."""
    common = [a for a, b in zip(one.path, other.path, strict=False) if a == b]
    return common[-1] if common else None


def nearest(gpu: Function, nics: Sequence[Function]) -> list[Function]:
    """The NICs that a GPU reaches over the shortest way; several where they are alike."""
    if not nics:
        return []
    least = min(WAYS.index(way(gpu, nic)) for nic in nics)
    return [nic for nic in nics if WAYS.index(way(gpu, nic)) == least]


def bridges_above(functions: Sequence[Function], below: Function) -> Iterator[Function]:
    """The bridges above a function, from the root down."""
    by_address = {one.address: one for one in functions}
    return (by_address[address] for address in below.path if address in by_address)
