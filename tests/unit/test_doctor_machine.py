"""`moesim doctor` on a machine: NVML and the PCI tree, both made up."""

from __future__ import annotations

import dataclasses
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from moesim.commands.doctor import gpus as nvml_checks
from moesim.commands.doctor import machine
from moesim.commands.doctor.findings import Finding
from moesim.commands.doctor.gpus import Gpu, Nvml, bus_id, cuda_of, gpu_findings, read_nvml, torch_cuda, torch_findings
from moesim.commands.doctor.machine import tree_findings
from moesim.commands.doctor.pci import acs_redirects, cards, nearest, read_functions, way

WELL = Gpu(0, "NVIDIA H200", 150_754_820_096, "0000:1b:00.0", 5, 5, 16, 16, (True,) * 18)


class FakeNvml(types.ModuleType):
    """As much of pynvml as the check uses."""

    NVML_NVLINK_MAX_LINKS = 4

    class NVMLError(Exception):
        pass

    def __init__(self, *, devices: int, driver: bool = True, answers: bool = True, tells: bool = True) -> None:
        super().__init__("pynvml")
        self.devices, self.driver, self.answers, self.tells, self.closed = devices, driver, answers, tells, False

    def __getattr__(self, name: str) -> Any:
        """Every other question: answered, or refused where the driver does not tell."""
        if not name.startswith("nvml"):
            raise AttributeError(name)

        def question(*arguments: Any) -> Any:
            if not self.tells:
                raise self.NVMLError("Not Supported")
            return {
                "nvmlDeviceGetPciInfo": lambda handle: types.SimpleNamespace(busId=f"0000000{handle}:1B:00.0"),
                "nvmlDeviceGetNvLinkState": self._link,
                "nvmlDeviceGetCurrPcieLinkGeneration": lambda handle: 1,
                "nvmlDeviceGetMaxPcieLinkGeneration": lambda handle: 5,
                "nvmlDeviceGetCurrPcieLinkWidth": lambda handle: 8,
                "nvmlDeviceGetMaxPcieLinkWidth": lambda handle: 16,
                "nvmlDeviceGetP2PStatus": lambda one, other, index: 4 if index == 0 else 99,
                "nvmlSystemGetCudaDriverVersion_v2": lambda: 12080,
                "nvmlSystemGetDriverVersion": lambda: b"570.1",
            }[name](*arguments)

        return question

    def _link(self, handle: int, link: int) -> int:
        if link >= 2:
            raise self.NVMLError("Invalid Argument")
        return int(link == 0 or handle == 0)

    def nvmlInit(self) -> None:  # noqa: N802
        if not self.driver:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.closed = True

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return self.devices

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        if not self.answers:
            raise self.NVMLError("Unknown Error")
        return index

    def nvmlDeviceGetName(self, handle: int) -> str:  # noqa: N802
        return "NVIDIA H200"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:  # noqa: N802
        return types.SimpleNamespace(total=150_754_820_096)


def asked(fake: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> Nvml | Finding:
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(nvml_checks, "version_of", lambda name: "1")
    told = read_nvml()
    assert fake.closed == fake.driver
    return told


def test_what_nvml_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    told = asked(FakeNvml(devices=2), monkeypatch)
    assert isinstance(told, Nvml)
    assert [gpu.bus_id for gpu in told.gpus] == ["0000:1b:00.0", "0001:1b:00.0"]
    assert [gpu.nvlinks for gpu in told.gpus] == [(True, True), (True, False)]
    assert (told.driver, told.cuda, told.peers) == ("570.1", (12, 8), {(0, 1): 4})
    lines = [finding.line() for finding in gpu_findings(told)]
    assert lines[0] == "ok      gpu 0: NVIDIA H200, 151 GB (150754820096 bytes)"
    assert any("the link runs x8, the GPU can do x16" in line for line in lines)
    assert any("generation 1 of 5; an idle GPU may rest" in line for line in lines)
    assert any(line.startswith("warn    nvlink: GPU 1: link 1 down") for line in lines)
    assert any("missing between 0-1 (it is disabled by the driver's registry)" in line for line in lines)


def test_a_driver_that_tells_little_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    told = asked(FakeNvml(devices=2, tells=False), monkeypatch)
    assert isinstance(told, Nvml)
    assert [(finding.check, finding.state) for finding in gpu_findings(told)] == [
        ("gpu 0", "ok"), ("gpu 1", "ok"), ("nvlink", "absent"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("fake", "state", "text"),
    [
        (FakeNvml(devices=1, driver=False), "absent", "Driver Not Loaded"),
        (FakeNvml(devices=1, answers=False), "fault", "Unknown Error"),
    ],
)
def test_no_driver_and_a_broken_one(fake: FakeNvml, state: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told = asked(fake, monkeypatch)
    assert isinstance(told, Finding)
    assert told.state == state
    assert text in told.detail


def test_no_gpu_and_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    told = asked(FakeNvml(devices=0), monkeypatch)
    assert isinstance(told, Nvml)
    assert [(finding.state, finding.detail) for finding in gpu_findings(told)] == [
        ("absent", "the driver lists no GPU")
    ]
    monkeypatch.setattr(nvml_checks, "version_of", lambda name: None)
    missing = read_nvml()
    assert isinstance(missing, Finding)
    assert missing.state == "absent"


def test_a_well_machine_says_so() -> None:
    two = Nvml((WELL, dataclasses.replace(WELL, index=1)), "570", (12, 8), {(0, 1): 0})
    assert {finding.state for finding in gpu_findings(two)} == {"ok"}
    alone = Nvml((dataclasses.replace(WELL, nvlinks=(False,) * 18),))
    assert gpu_findings(alone)[-1].detail == "all 18 links are down: one GPU alone has no peer"


@pytest.mark.parametrize(
    ("built_for", "state"), [(None, None), ("", "warn"), ("12.1", "ok"), ("12.9", "ok"), ("13.0", "fault")]
)
def test_torch_against_the_driver(built_for: str | None, state: str | None) -> None:
    findings = torch_findings(Nvml((WELL,), "570", (12, 8)), built_for)
    assert [finding.state for finding in findings] == ([] if state is None else [state])
    assert torch_findings(Nvml(()), built_for) == []


def test_torchs_cuda_is_read_without_importing_it() -> None:
    assert cuda_of("__version__ = '2.8.0+cu128'\ncuda: Optional[str] = '12.8'\nhip: Optional[str] = None\n") == "12.8"
    assert cuda_of("cuda = '11.8'\n") == "11.8"
    assert cuda_of("cuda: Optional[str] = None\nhip: Optional[str] = '6.2'\n") == ""
    before = "torch" in sys.modules
    torch_cuda()
    assert ("torch" in sys.modules) == before


def test_a_bus_id_as_sysfs_writes_it() -> None:
    assert bus_id("00000000:1B:00.0") == "0000:1b:00.0"
    assert bus_id("0001:AF:00.0") == "0001:af:00.0"


# A made-up /sys: a server with two sockets. On socket 0 one switch with GPUs A and B and the two ports of a NIC, and a
# GPU C on a root port of its own; on socket 1 a GPU D alone.
GPU, NIC, BRIDGE = ("0x10de", "0x030200"), ("0x15b3", "0x020700"), ("0x10b5", "0x060400")
SWITCH = "pci0000:10/0000:10:01.0/0000:11:00.0"
TREE = {
    "pci0000:10/0000:10:01.0": BRIDGE,
    SWITCH: BRIDGE,
    f"{SWITCH}/0000:12:00.0": BRIDGE,
    f"{SWITCH}/0000:12:00.0/0000:13:00.0": GPU,
    f"{SWITCH}/0000:12:01.0": BRIDGE,
    f"{SWITCH}/0000:12:01.0/0000:14:00.0": GPU,
    f"{SWITCH}/0000:12:02.0": BRIDGE,
    f"{SWITCH}/0000:12:02.0/0000:15:00.0": NIC,
    f"{SWITCH}/0000:12:02.0/0000:15:00.1": NIC,
    "pci0000:20/0000:20:01.0": BRIDGE,
    "pci0000:20/0000:20:01.0/0000:21:00.0": GPU,
    "pci0000:80/0000:80:01.0": BRIDGE,
    "pci0000:80/0000:80:01.0/0000:81:00.0": GPU,
}
A, B, C, D, PORT = "0000:13:00.0", "0000:14:00.0", "0000:21:00.0", "0000:81:00.0", "0000:15:00.0"


def make(root: Path, tree: dict[str, tuple[str, str]] = TREE) -> Path:
    (root / "bus/pci/devices").mkdir(parents=True)
    for place, (vendor, kind) in tree.items():
        folder = root / "devices" / place
        folder.mkdir(parents=True, exist_ok=True)
        (root / "bus/pci/devices" / folder.name).symlink_to(folder)
        for name, text in {
            "vendor": vendor, "class": kind, "numa_node": "1" if place.startswith("pci0000:80") else "0",
            "current_link_speed": "32.0 GT/s PCIe", "max_link_speed": "32.0 GT/s PCIe",
            "current_link_width": "16", "max_link_width": "16",
        }.items():  # fmt: skip
            (folder / name).write_text(text + "\n")
        (folder / "config").write_bytes(bytes(64))  # what a user without root's rights may read
        if kind == NIC[1]:
            (folder / "infiniband" / f"mlx5_{folder.name[-1]}").mkdir(parents=True)
    return root


def place(root: Path, address: str) -> Path:
    return (root / "bus/pci/devices" / address).resolve()


def told(root: Path, **options: Any) -> list[str]:
    return [finding.line() for finding in tree_findings(read_functions(root), **options)]


def test_the_tree_is_read(tmp_path: Path) -> None:
    functions = {one.address: one for one in read_functions(make(tmp_path))}
    assert len(functions) == len(TREE)
    assert functions[A].path == ("0000:10:01.0", "0000:11:00.0", "0000:12:00.0")
    assert (functions[A].host, functions[D].numa) == ("pci0000:10", 1)
    assert [one.names for one in cards(list(functions.values()))] == [("mlx5_0", "mlx5_1")]


def test_ways_between_functions(tmp_path: Path) -> None:
    found = {one.address: one for one in read_functions(make(tmp_path))}
    assert [way(found[A], found[other]) for other in (B, PORT, C, D)] == ["PIX", "PIX", "NODE", "SYS"]
    far = dataclasses.replace(found[B], path=("0000:10:01.0", "0000:11:01.0", "0000:16:00.0", "0000:17:00.0"))
    assert way(found[A], far) == "PXB"
    assert way(found[A], dataclasses.replace(found[B], path=("0000:10:02.0",))) == "PHB"
    assert way(found[A], dataclasses.replace(found[D], numa=-1)) == "NODE"  # not told is not another socket
    assert [one.address for one in nearest(found[D], [found[PORT]])] == [PORT]


def test_what_is_shared_and_what_is_far(tmp_path: Path) -> None:
    lines = told(make(tmp_path))
    assert lines[0] == "ok      pci: 4 GPUs, 1 NIC with RDMA"
    assert "ok      pcie switch: GPUs 0, 1 share the PCIe link at 0000:10:01.0" in lines
    assert f"ok      nic of GPU 0: nearest mlx5_0/mlx5_1 ({PORT}), PIX" in lines
    assert f"ok      nic of GPU 2: nearest mlx5_0/mlx5_1 ({PORT}), NODE" in lines
    (crossing,) = [line for line in lines if line.startswith("warn    nic of")]
    assert "nic of GPU 3" in crossing
    assert "crosses sockets (NUMA node 1 to 0)" in crossing
    (shared,) = [line for line in lines if "shared nic" in line]
    assert "GPUs 0, 1, 2, 3 share mlx5_0/mlx5_1" in shared
    assert "1/4 of its rate" in shared
    assert "absent  acs: cannot be read without root's rights; run moesim doctor as root once" in lines
    assert lines[-1] == "ok      iommu: off for the GPUs"
    assert not [line for line in lines if "pcie link:" in line]


def test_gpus_carry_nvmls_numbers(tmp_path: Path) -> None:
    lines = told(make(tmp_path), indices={A: 3, B: 2, C: 1, D: 0})
    assert any("GPUs 3, 2 share the PCIe link" in line for line in lines)


def test_links_below_what_both_ends_can_do(tmp_path: Path) -> None:
    root = make(tmp_path)
    (place(root, A) / "current_link_width").write_text("8\n")
    (place(root, B) / "current_link_speed").write_text("2.5 GT/s PCIe\n")
    (place(root, C) / "current_link_width").write_text("8\n")  # in a slot that has no more
    (place(root, "0000:20:01.0") / "max_link_width").write_text("8\n")
    (place(root, PORT) / "current_link_speed").write_text("Unknown\n")
    lines = [line for line in told(root) if "pcie link:" in line]
    assert [line.partition(";")[0] for line in lines] == [
        "warn    pcie link: GPU 0 runs x8, both ends can do x16",
        "warn    pcie link: GPU 1 runs at generation 1, both ends can do generation 5",
        "warn    pcie link: GPU 2 runs x8 of x16: its slot has no more",
    ]
    assert not [line for line in told(root, gpu_links=False) if "pcie link:" in line]


def with_acs(control: int, *, at: int = 0x100, then: int = 0) -> bytes:
    config = bytearray(4096)
    config[at : at + 4] = (0x000D | 1 << 16 | then << 20).to_bytes(4, "little")
    config[at + 6 : at + 8] = control.to_bytes(2, "little")
    return bytes(config)


@pytest.mark.parametrize(
    ("config", "redirects"),
    [
        (bytes(64), None),
        (b"", None),
        (bytes(4096), False),
        (with_acs(0b1100), True),
        (with_acs(0b0001), False),
        (with_acs(0, then=0x20), False),  # a chain that leads back into the plain space
    ],
)
def test_access_control_services_in_the_configuration_space(config: bytes, redirects: bool | None) -> None:
    assert acs_redirects(config) is redirects


def test_access_control_behind_another_capability_and_a_ring() -> None:
    config = bytearray(with_acs(0b0100, at=0x200))
    config[0x100:0x104] = (0x0001 | 1 << 16 | 0x200 << 20).to_bytes(4, "little")
    assert acs_redirects(bytes(config)) is True
    config[0x100:0x104] = (0x0001 | 1 << 16 | 0x100 << 20).to_bytes(4, "little")
    assert acs_redirects(bytes(config)) is False  # it ends


def test_bridges_that_send_peers_through_the_root(tmp_path: Path) -> None:
    root = make(tmp_path)
    for address in ("0000:12:00.0", "0000:12:01.0"):
        (place(root, address) / "config").write_bytes(with_acs(0b1100))
    (line,) = [line for line in told(root) if " acs:" in line]
    assert line.startswith("warn    acs: 0000:12:00.0, 0000:12:01.0 send peers' traffic through the root complex")
    for address in ("0000:12:00.0", "0000:12:01.0"):
        (place(root, address) / "config").write_bytes(with_acs(0))
    (line,) = [line for line in told(root) if " acs:" in line]
    assert line == "ok      acs: none of 2 bridges above GPUs redirects peers' traffic"


@pytest.mark.parametrize(("kind", "state"), [("identity", "ok"), ("DMA-FQ", "warn")])
def test_the_iommu(tmp_path: Path, kind: str, state: str) -> None:
    root = make(tmp_path)
    (place(root, A) / "iommu_group").mkdir()
    (place(root, A) / "iommu_group" / "type").write_text(f"{kind}\n")
    found = tree_findings(read_functions(root))[-1]
    assert (found.check, found.state) == ("iommu", state)


def test_no_tree_no_gpu_and_no_nic_are_absent(tmp_path: Path) -> None:
    assert told(tmp_path) == ["absent  pci: no PCI tree here (/sys/bus/pci/devices)"]
    bare = make(tmp_path / "bare", {"pci0000:00/0000:00:01.0": NIC})
    assert told(bare) == ["absent  pci: no NVIDIA GPU among 1 PCI functions"]
    alone = make(tmp_path / "alone", {"pci0000:00/0000:00:01.0": GPU})
    assert "absent  nic: no NIC: nothing leaves this machine fast" in told(alone)


def test_nics_without_rdma_and_virtual_ones(tmp_path: Path) -> None:
    root = make(tmp_path, {"pci0000:00/0000:00:01.0": GPU, "pci0000:00/0000:00:02.0": ("0x8086", "0x020000")})
    (place(root, "0000:00:02.0") / "net" / "eth0").mkdir(parents=True)
    assert told(root)[0] == "ok      pci: 1 GPU, 1 NIC, none with RDMA"
    (place(root, "0000:00:02.0") / "physfn").mkdir()
    assert told(root)[0] == "ok      pci: 1 GPU, 0 NICs"


def test_unreadable_entries_are_not_told(tmp_path: Path) -> None:
    root = make(tmp_path)
    for name in ("vendor", "class", "numa_node", "current_link_speed", "max_link_width"):
        (place(root, A) / name).write_bytes(b"\xff\xfe nonsense")
    functions = {one.address: one for one in read_functions(root)}
    assert (functions[A].vendor, functions[A].kind, functions[A].numa) == (0, 0, -1)
    assert told(root)[0].startswith("ok      pci: 3 GPUs")


def test_this_machine_is_read_without_an_error() -> None:
    findings = machine.machine()
    assert "pci" in [finding.check for finding in findings]


def test_the_machine_joins_nvml_and_the_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = tuple(dataclasses.replace(WELL, index=index, bus_id=bus) for index, bus in enumerate((D, C, B, A)))
    monkeypatch.setattr(machine, "read_nvml", lambda: Nvml(gpus, "570", (12, 8)))
    monkeypatch.setattr(machine, "torch_cuda", lambda: "13.0")
    root = make(tmp_path)
    (place(root, A) / "current_link_width").write_text("8\n")  # NVML has told of the GPUs' links
    lines = [finding.line() for finding in machine.machine(root)]
    assert any("GPUs 3, 2 share the PCIe link" in line for line in lines)
    assert any(line.startswith("FAULT   torch: built for CUDA 13.0") for line in lines)
    assert not [line for line in lines if "pcie link:" in line]
