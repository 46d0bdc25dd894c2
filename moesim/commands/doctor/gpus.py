"""The NVIDIA GPUs of this machine through NVML (nvidia-ml-py): what they are, their links, and whether torch fits."""

from __future__ import annotations

import importlib.util
import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moesim.commands.doctor.findings import Finding
from moesim.commands.doctor.installation import version_of
from moesim.units import human_bytes

# nvml.h, nvmlGpuP2PStatus_t.
PEER_STATES = {
    1: "the chipset does not support it",
    2: "a GPU does not support it",
    3: "the way between them does not support it",
    4: "it is disabled by the driver's registry",
    5: "it is not supported",
}
PEER_OK = 0
# nvml.h, nvmlGpuP2PCapsIndex_t, NVML_P2P_CAPS_INDEX_READ; nvidia-ml-py 13 has a tuple in its place.
PEER_READ = 0


@dataclass(frozen=True)
class Gpu:
    """One GPU. generation, width: of its PCIe link, now and at most; nvlinks: which links are up; None: not told."""

    index: int
    name: str
    memory_bytes: int
    bus_id: str = ""
    generation: int | None = None
    most_generation: int | None = None
    width: int | None = None
    most_width: int | None = None
    nvlinks: tuple[bool, ...] = ()


@dataclass(frozen=True)
class Nvml:
    """What NVML told. cuda: the newest CUDA that the driver runs; peers: pair of indices -> nvmlGpuP2PStatus_t."""

    gpus: tuple[Gpu, ...]
    driver: str = ""
    cuda: tuple[int, int] | None = None
    peers: Mapping[tuple[int, int], int] = field(default_factory=dict)


def read_nvml() -> Nvml | Finding:
    """Ask NVML; a finding where it cannot be asked."""
    if version_of("nvidia-ml-py") is None:
        return Finding("gpu", "absent", "not looked for", "pip install '.[hardware]'")
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return Finding("gpu", "absent", f"no NVIDIA driver answers ({error})", "simulation needs none")
    try:
        return _read(pynvml)
    except pynvml.NVMLError as error:
        return Finding("gpu", "fault", f"the driver answers with an error ({error})", "check nvidia-smi")
    finally:
        pynvml.nvmlShutdown()


def _read(nvml: Any) -> Nvml:
    def told(question: Callable[..., Any], *arguments: Any) -> Any:
        """An answer, or None: older drivers lack some, and a virtual machine hides others."""
        try:
            return question(*arguments)
        except nvml.NVMLError:
            return None

    handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    gpus = []
    for index, handle in enumerate(handles):
        name = nvml.nvmlDeviceGetName(handle)
        place = told(nvml.nvmlDeviceGetPciInfo, handle)
        links = [told(nvml.nvmlDeviceGetNvLinkState, handle, link) for link in range(nvml.NVML_NVLINK_MAX_LINKS)]
        gpus.append(
            Gpu(
                index=index,
                name=_text(name),
                memory_bytes=int(nvml.nvmlDeviceGetMemoryInfo(handle).total),
                bus_id="" if place is None else bus_id(_text(place.busId)),
                generation=told(nvml.nvmlDeviceGetCurrPcieLinkGeneration, handle),
                most_generation=told(nvml.nvmlDeviceGetMaxPcieLinkGeneration, handle),
                width=told(nvml.nvmlDeviceGetCurrPcieLinkWidth, handle),
                most_width=told(nvml.nvmlDeviceGetMaxPcieLinkWidth, handle),
                nvlinks=tuple(bool(link) for link in links if link is not None),
            )
        )
    peers = {}
    for one, other in itertools.combinations(range(len(handles)), 2):
        state = told(nvml.nvmlDeviceGetP2PStatus, handles[one], handles[other], PEER_READ)
        if state is not None:
            peers[one, other] = int(state)
    cuda = told(nvml.nvmlSystemGetCudaDriverVersion_v2)
    driver = told(nvml.nvmlSystemGetDriverVersion)
    return Nvml(
        tuple(gpus),
        "" if driver is None else _text(driver),
        None if cuda is None else (int(cuda) // 1000, int(cuda) % 1000 // 10),
        peers,
    )


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def bus_id(text: str) -> str:
    """A PCI address as sysfs writes it: NVML's `00000000:1B:00.0` is `0000:1b:00.0`."""
    domain, _, rest = text.partition(":")
    return f"{domain[-4:]:0>4}:{rest}".lower()


def gpu_findings(nvml: Nvml) -> list[Finding]:
    """Each GPU, its NVLink and PCIe links, and peer access between GPUs."""
    if not nvml.gpus:
        return [Finding("gpu", "absent", "the driver lists no GPU", "simulation needs none")]
    findings = []
    for gpu in nvml.gpus:
        memory = f"{human_bytes(gpu.memory_bytes)} ({gpu.memory_bytes} bytes)"
        findings.append(Finding(f"gpu {gpu.index}", "ok", f"{gpu.name}, {memory}"))
        findings += _pcie(gpu)
    return [*findings, *_nvlinks(nvml.gpus), *_peers(nvml)]


def _pcie(gpu: Gpu) -> list[Finding]:
    check = f"gpu {gpu.index} pcie"
    found = []
    if gpu.width and gpu.most_width and gpu.width < gpu.most_width:
        mend = "reseat the GPU or look at the slot's lanes in the BIOS"
        found.append(Finding(check, "warn", f"the link runs x{gpu.width}, the GPU can do x{gpu.most_width}", mend))
    if gpu.generation and gpu.most_generation and gpu.generation < gpu.most_generation:
        found.append(
            Finding(
                check,
                "warn",
                f"the link runs at generation {gpu.generation} of {gpu.most_generation}",
                "an idle GPU may rest at a lower one: look again under load, then at the BIOS",
            )
        )
    return found


def _nvlinks(gpus: tuple[Gpu, ...]) -> list[Finding]:
    with_links = [gpu for gpu in gpus if gpu.nvlinks]
    if not with_links:
        return [Finding("nvlink", "absent", "no GPU has NVLink links")]
    down = [(gpu, [link for link, up in enumerate(gpu.nvlinks) if not up]) for gpu in with_links]
    broken = [(gpu, links) for gpu, links in down if links]
    if not broken:
        counts = sorted({len(gpu.nvlinks) for gpu in with_links})
        return [Finding("nvlink", "ok", f"all links are up ({' or '.join(map(str, counts))} on each GPU)")]
    if len(gpus) == 1 and not any(gpus[0].nvlinks):
        return [Finding("nvlink", "absent", f"all {len(gpus[0].nvlinks)} links are down: one GPU alone has no peer")]
    mend = "look at nvidia-smi nvlink --status and at the fabric manager"
    return [
        Finding("nvlink", "warn", f"GPU {gpu.index}: link{'s' if len(links) > 1 else ''} {_list(links)} down", mend)
        for gpu, links in broken
    ]


def _peers(nvml: Nvml) -> list[Finding]:
    if not nvml.peers:
        return []
    lacking = {pair: state for pair, state in nvml.peers.items() if state != PEER_OK}
    if not lacking:
        return [Finding("peer access", "ok", f"all {len(nvml.peers)} pairs of GPUs read each other's memory")]
    by_state: dict[int, list[str]] = {}
    for (one, other), state in lacking.items():
        by_state.setdefault(state, []).append(f"{one}-{other}")
    mend = "collectives go through host memory there; look at nvidia-smi topo -p2p r"
    return [
        Finding("peer access", "warn", f"missing between {_list(pairs)} ({PEER_STATES.get(state, 'unknown')})", mend)
        for state, pairs in by_state.items()
    ]


def _list(values: list[Any]) -> str:
    shown = ", ".join(str(value) for value in values[:8])
    return shown + (f" and {len(values) - 8} more" if len(values) > 8 else "")


def torch_findings(nvml: Nvml, built_for: str | None) -> list[Finding]:
    """Whether torch was built for a CUDA that this driver runs.

    built_for: the CUDA of torch's build, "" for a CPU build, None where torch is not installed. A driver runs every
    minor version of its major one (NVIDIA, "CUDA Compatibility", minor version compatibility).
    """
    if built_for is None or not nvml.gpus:
        return []
    if not built_for:
        mend = "install torch from a CUDA index (leave constraints.txt out)"
        return [Finding("torch", "warn", "a CPU build, on a machine with GPUs", mend)]
    if nvml.cuda is None:
        return []
    major = int(built_for.split(".")[0])
    newest = ".".join(map(str, nvml.cuda))
    if major > nvml.cuda[0]:
        return [
            Finding(
                "torch",
                "fault",
                f"built for CUDA {built_for}, but driver {nvml.driver} runs CUDA up to {newest}",
                f"update the driver, or install a torch built for CUDA {nvml.cuda[0]}",
            )
        ]
    return [Finding("torch", "ok", f"built for CUDA {built_for}; driver {nvml.driver} runs CUDA up to {newest}")]


def torch_cuda() -> str | None:
    """The CUDA of torch's build, read from its version.py without importing it; "" for none; None without torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    return cuda_of(text)


def cuda_of(text: str) -> str:
    """The CUDA version that torch/version.py names; "" for none."""
    found = re.search(r"""^cuda\s*(?::[^=\n]*)?=\s*['"](\d+(?:\.\d+)*)['"]""", text, re.MULTILINE)
    return found.group(1) if found else ""
