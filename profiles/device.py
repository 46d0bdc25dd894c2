"""The device under test: finding it, timing work on it, and noting the conditions (NVML, versions, processor)."""

from __future__ import annotations

import contextlib
import datetime
import importlib
import importlib.util
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moesim.errors import BadInput, MissingPart

WARM_UPS = 3
# Enough to push everything out of the largest L2 of today (B200: 126 MB).
FLUSH_BYTES = 256 * 2**20
FEWEST_REPEATS = 5


def need_torch() -> None:
    """Raises MissingPart without torch; does not import it, which takes a second."""
    if importlib.util.find_spec("torch") is None:
        raise MissingPart("torch is not installed", where="--device", mend="pip install '.[hardware]'")


def load_torch(device: str) -> Any:
    """Import torch for a device. Raises MissingPart without torch or the GPU, BadInput for an unknown device."""
    need_torch()
    import torch

    kind, _, number = device.partition(":")
    if kind not in ("cpu", "cuda") or (number and (kind == "cpu" or not number.isdigit())):
        raise BadInput(f"unknown device {device!r}", where="--device", mend="use cpu, cuda or cuda:N")
    if kind == "cuda" and not torch.cuda.is_available():
        raise MissingPart("no CUDA device is visible", where="--device", mend="run on a GPU, or use --device cpu")
    if number and int(number) >= torch.cuda.device_count():
        raise MissingPart(f"there is no {device}", where="--device", mend=f"use 0 to {torch.cuda.device_count() - 1}")
    if kind == "cuda":
        torch.cuda.set_device(int(number or 0))
    return torch


def device_name(torch: Any, device: str) -> str:
    """What the device calls itself: the GPU's name, or the processor's model."""
    if device.startswith("cuda"):
        return str(torch.cuda.get_device_name())
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def conditions(torch: Any, device: str) -> dict[str, Any]:
    """Versions, date and machine: what a line's `run` holds besides the readings."""
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "cpu": device_name(torch, "cpu"),
        "threads": torch.get_num_threads(),
    }
    if device.startswith("cuda"):
        found |= {"cuda": str(torch.version.cuda), "nccl": nccl_version(torch)}
    return found


def nccl_version(torch: Any) -> str:
    """NCCL as torch was built with it, `2.27.3`; empty where it has none."""
    try:
        version = torch.cuda.nccl.version()
    except (AttributeError, RuntimeError, ImportError):
        return ""
    return ".".join(str(part) for part in version) if isinstance(version, tuple) else str(version)


def readings(device: str) -> dict[str, Any]:
    """Clocks, power, temperature and driver as NVML tells them now; empty on a CPU, a note without pynvml."""
    if not device.startswith("cuda"):
        return {}
    if importlib.util.find_spec("pynvml") is None:
        return {"nvml": "pynvml is not installed"}
    nvml = importlib.import_module("pynvml")
    try:
        nvml.nvmlInit()
        handle = _handle(nvml, device)
        driver = nvml.nvmlSystemGetDriverVersion()
        return {
            "driver": driver.decode() if isinstance(driver, bytes) else str(driver),
            "sm_clock_hz": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM) * 1e6,
            "memory_clock_hz": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM) * 1e6,
            "power_w": nvml.nvmlDeviceGetPowerUsage(handle) * 1e-3,
            "temperature_c": nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
        }
    except nvml.NVMLError as error:
        return {"nvml": str(error)}


def _handle(nvml: Any, device: str) -> Any:
    """NVML's handle of torch's device: by UUID, as CUDA_VISIBLE_DEVICES renumbers."""
    import torch

    index = int(device.partition(":")[2] or 0)
    uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)
    if uuid is not None:
        with contextlib.suppress(nvml.NVMLError):
            return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    return nvml.nvmlDeviceGetHandleByIndex(index)


def free_bytes(torch: Any, device: str) -> float:
    """Memory that can still be taken on the device."""
    if device.startswith("cuda"):
        return float(torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated())
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return float(line.split()[1]) * 1024
    return 4e9


class Stopwatch:
    """Times one piece of work many times: on a GPU by events, the L2 flushed before each; on a CPU by the clock.

    limit_s: no more repeats are begun after this long, but at least FEWEST_REPEATS are made.
    """

    def __init__(self, torch: Any, device: str, *, repeats: int, limit_s: float) -> None:
        self.torch = torch
        self.device = device
        self.repeats = repeats
        self.limit_s = limit_s
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if device.startswith("cuda") else None

    def time(self, run: Callable[[], object], *, graph: bool = True) -> tuple[list[float], str]:
        """Seconds of each repeat, and how they were taken: `graph`, `eager` (both flushed) or `host` (caches warm)."""
        if self._flush is None:
            return self._on_host(run), "host"
        torch = self.torch
        for _ in range(WARM_UPS):
            run()
        torch.cuda.synchronize()
        replay = self._captured(run) if graph else None
        work = run if replay is None else replay
        found: list[float] = []
        start = time.perf_counter()
        while len(found) < self.repeats and (len(found) < FEWEST_REPEATS or time.perf_counter() - start < self.limit_s):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.zero_()
            begin.record()
            work()
            end.record()
            end.synchronize()
            found.append(begin.elapsed_time(end) * 1e-3)
        return found, "eager" if replay is None else "graph"

    def _captured(self, run: Callable[[], object]) -> Callable[[], object] | None:
        """The work as a CUDA graph, as engines replay it in decode; None where it cannot be captured."""
        torch = self.torch
        stream = torch.cuda.current_stream()
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
            graph.replay()
            torch.cuda.synchronize()
        except RuntimeError:
            torch.cuda.set_stream(stream)  # a capture that fails leaves its own stream behind
            torch.cuda.synchronize()
            return None
        replay: Callable[[], object] = graph.replay
        return replay

    def _on_host(self, run: Callable[[], object]) -> list[float]:
        begun = time.perf_counter()
        for done in range(WARM_UPS):
            if done and time.perf_counter() - begun > self.limit_s:
                break
            run()
        found: list[float] = []
        start = time.perf_counter()
        while len(found) < self.repeats and (len(found) < FEWEST_REPEATS or time.perf_counter() - start < self.limit_s):
            begin = time.perf_counter()
            run()
            found.append(time.perf_counter() - begin)
        return found
