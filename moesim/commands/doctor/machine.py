"""The machine: its GPUs, and which PCIe bridges, sockets and NICs they share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from moesim.commands.doctor import pci
from moesim.commands.doctor.findings import Finding
from moesim.commands.doctor.gpus import Nvml, gpu_findings, read_nvml, torch_cuda, torch_findings
from moesim.commands.doctor.pci import Function, bridges_above, nearest, shared_bridge, way

# PCIe 1 to 6: transfers per second and lane in GT/s, as sysfs writes them.
GENERATIONS = {2.5: 1, 5.0: 2, 8.0: 3, 16.0: 4, 32.0: 5, 64.0: 6}


def machine(sys: Path = pci.SYS) -> list[Finding]:
    """GPUs by NVML, torch's build against the driver, and the PCI tree."""
    asked = read_nvml()
    if isinstance(asked, Finding):
        indices: dict[str, int] = {}
        findings = [asked]
    else:
        indices = {gpu.bus_id: gpu.index for gpu in asked.gpus}
        findings = [*gpu_findings(asked), *torch_findings(asked, torch_cuda())]
    told = isinstance(asked, Nvml) and any(gpu.width for gpu in asked.gpus)
    return [*findings, *tree_findings(pci.read_functions(sys), indices, gpu_links=not told)]


def tree_findings(
    functions: Sequence[Function], indices: Mapping[str, int] | None = None, *, gpu_links: bool = True
) -> list[Finding]:
    """What the PCI tree says of GPUs and NICs.

    indices: address -> NVML's index of a GPU; gpu_links: whether to look at the GPUs' own links (NVML may have).
    """
    if not functions:
        return [Finding("pci", "absent", "no PCI tree here (/sys/bus/pci/devices)")]
    gpus, nics = [one for one in functions if one.is_gpu], _usable(pci.cards(functions))
    if not gpus:
        return [Finding("pci", "absent", f"no NVIDIA GPU among {len(functions)} PCI functions")]
    names = _names(gpus, indices or {})
    count = f"{len(gpus)} GPU{'s' if len(gpus) > 1 else ''}, {len(nics)} NIC{'s' if len(nics) != 1 else ''}"
    rdma = "" if not nics else " with RDMA" if nics[0].rdma else ", none with RDMA"
    return [
        Finding("pci", "ok", count + rdma),
        *_switches(gpus, names),
        *_nics_of(gpus, nics, names),
        *_shared_nics(gpus, nics, names),
        *_links([*(gpus if gpu_links else []), *nics], functions, names),
        *_redirects(gpus, nics, functions, names),
        *_iommu(gpus),
    ]


def _usable(nics: Sequence[Function]) -> list[Function]:
    """NICs with RDMA where there are any: the others carry no traffic of GPUs."""
    return [nic for nic in nics if nic.rdma] or list(nics)


def _names(gpus: Sequence[Function], indices: Mapping[str, int]) -> dict[str, str]:
    known = all(gpu.address in indices for gpu in gpus)
    numbered = {gpu.address: indices[gpu.address] if known else place for place, gpu in enumerate(gpus)}
    return {address: f"GPU {number}" for address, number in numbered.items()}


def _nic(nic: Function) -> str:
    return f"{'/'.join(nic.names)} ({nic.address})" if nic.names else nic.address


def _switches(gpus: Sequence[Function], names: Mapping[str, str]) -> list[Finding]:
    """Groups of GPUs below one bridge: they share its way to the socket."""
    groups: dict[str, list[Function]] = {}
    for gpu in gpus:
        mates = [other for other in gpus if other is not gpu and shared_bridge(gpu, other) is not None]
        if mates:
            top = next(bridge for bridge in gpu.path if any(bridge in mate.path for mate in mates))
            groups.setdefault(top, []).append(gpu)
    return [
        Finding("pcie switch", "ok", f"{_list([names[gpu.address] for gpu in group])} share the PCIe link at {bridge}")
        for bridge, group in groups.items()
    ]


def _nics_of(gpus: Sequence[Function], nics: Sequence[Function], names: Mapping[str, str]) -> list[Finding]:
    if not nics:
        return [Finding("nic", "absent", "no NIC: nothing leaves this machine fast")]
    findings = []
    for gpu in gpus:
        near = nearest(gpu, nics)
        how = way(gpu, near[0])
        detail = f"nearest {_list([_nic(nic) for nic in near])}, {how}"
        if how == "SYS":
            mend = f"the way crosses sockets (NUMA node {gpu.numa} to {near[0].numa}); use a NIC of the GPU's socket"
            findings.append(Finding(f"nic of {names[gpu.address]}", "warn", detail, mend))
        else:
            findings.append(Finding(f"nic of {names[gpu.address]}", "ok", detail))
    return findings


def _shared_nics(gpus: Sequence[Function], nics: Sequence[Function], names: Mapping[str, str]) -> list[Finding]:
    """NICs that are the only nearest one of several GPUs."""
    sharing: dict[str, list[Function]] = {}
    by_address = {nic.address: nic for nic in nics}
    for gpu in gpus:
        near = nearest(gpu, nics)
        if len(near) == 1:
            sharing.setdefault(near[0].address, []).append(gpu)
    return [
        Finding(
            "shared nic",
            "warn",
            f"{_list([names[gpu.address] for gpu in group])} share {_nic(by_address[address])}",
            f"each gets 1/{len(group)} of its rate when all send: `moesim profile topology --out FILE` notes it",
        )
        for address, group in sharing.items()
        if len(group) > 1
    ]


def _links(ends: Sequence[Function], functions: Sequence[Function], names: Mapping[str, str]) -> list[Finding]:
    """Links narrower or slower than both of their ends can do."""
    findings = []
    for end in ends:
        above = list(bridges_above(functions, end))
        port = above[-1].link if above else None
        width = min([most for most in (end.link.most_width, port and port.most_width) if most], default=None)
        speed = min([most for most in (end.link.most_speed, port and port.most_speed) if most], default=None)
        name = names.get(end.address) or _nic(end)
        if end.link.width and width and end.link.width < width:
            mend = "reseat the card or look at the slot's lanes in the BIOS"
            detail = f"{name} runs x{end.link.width}, both ends can do x{width}"
            findings.append(Finding("pcie link", "warn", detail, mend))
        elif end.link.width and end.link.most_width and end.link.width < end.link.most_width:
            detail = f"{name} runs x{end.link.width} of x{end.link.most_width}: its slot has no more"
            findings.append(Finding("pcie link", "warn", detail, "move it to a wider slot"))
        if end.link.speed and speed and end.link.speed < speed:
            detail = f"{name} runs at {_generation(end.link.speed)}, both ends can do {_generation(speed)}"
            mend = "an idle link may rest at a lower one: look again under load, then at the BIOS"
            findings.append(Finding("pcie link", "warn", detail, mend))
    return findings


def _generation(speed: float) -> str:
    return f"generation {GENERATIONS[speed]}" if speed in GENERATIONS else f"{speed:g} GT/s"


def _redirects(
    gpus: Sequence[Function], nics: Sequence[Function], functions: Sequence[Function], names: Mapping[str, str]
) -> list[Finding]:
    """Bridges between a GPU and a NIC or GPU of its switch whose ACS sends their traffic up to the root."""
    bridges: dict[str, Function] = {}
    for gpu in gpus:
        for other in [*nics, *gpus]:
            shared = None if other is gpu else shared_bridge(gpu, other)
            if shared is None:
                continue
            for bridge in bridges_above(functions, gpu):
                if gpu.path.index(bridge.address) > gpu.path.index(shared):
                    bridges[bridge.address] = bridge
    if not bridges:
        return []
    on = [address for address, bridge in bridges.items() if bridge.acs_redirects]
    if on:
        mend = "outside virtual machines, turn ACS off in the BIOS or with setpci (NCCL user guide, troubleshooting)"
        return [Finding("acs", "warn", f"{_list(on)} send peers' traffic through the root complex", mend)]
    if any(bridge.acs_redirects is None for bridge in bridges.values()):
        return [Finding("acs", "absent", "cannot be read without root's rights", "run moesim doctor as root once")]
    return [Finding("acs", "ok", f"none of {len(bridges)} bridges above GPUs redirects peers' traffic")]


def _iommu(gpus: Sequence[Function]) -> list[Finding]:
    kinds = sorted({gpu.iommu for gpu in gpus if gpu.iommu})
    if not kinds:
        return [Finding("iommu", "ok", "off for the GPUs")]
    if kinds == ["identity"]:
        return [Finding("iommu", "ok", "on, and passes addresses through")]
    mend = "boot with iommu=pt, so that GPUs and NICs reach each other directly"
    return [Finding("iommu", "warn", f"translates the GPUs' addresses ({_list(kinds)})", mend)]


def _list(values: Sequence[str]) -> str:
    """Names in a row; GPUs by their numbers: `GPUs 0, 1`."""
    if len(values) > 1 and all(value.startswith("GPU ") for value in values):
        return "GPUs " + ", ".join(value.removeprefix("GPU ") for value in values)
    return ", ".join(values[:8]) + (f" and {len(values) - 8} more" if len(values) > 8 else "")
