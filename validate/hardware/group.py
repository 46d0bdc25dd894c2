"""The ranks of a run as seen from one of them: collectives, a common start, marks in time, signs of life."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import os
import shutil
import signal
import socket
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from moesim.errors import MissingPart

# A status line is rewritten in place at this length, so that a reader never sees half of one.
STATUS_BYTES = 512
BEAT_EVERY_S = 0.2
# Time for the news of a common start to reach every rank before any of them starts (gloo's small messages take
# about 0.3 ms between two processes of one machine).
START_LEAD_S = 1e-3


def need_torch(command: str = "this validation") -> Any:
    """Import torch. Raises MissingPart where it is not installed."""
    if importlib.util.find_spec("torch") is None:
        raise MissingPart(f"{command} needs torch", mend="pip install '.[hardware]'")
    import torch
    import torch.distributed

    return torch


class Beat:
    """Says every 0.2 s, in a small file, that this rank lives, what it does, and whether it waits for the others.

    A thread of its own writes it, and the main thread whenever it comes to something else. With `parent` given, the
    process ends itself when that parent is gone, so that no rank outlives a killed command; with `folder` (where all
    ranks leave their statuses), it also ends the other ranks, stuck ones included, and removes the folder.
    """

    def __init__(self, path: Path | None, *, parent: int | None = None, folder: Path | None = None) -> None:
        self.label = "starting"
        self.count = 0
        self.waiting = False
        self._parent = parent
        self._folder = folder
        self._stop = threading.Event()
        self._lock = threading.Lock()  # so that no older line is written over a newer one
        self._handle: int | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        if path is not None:
            self._handle = os.open(path, os.O_CREAT | os.O_WRONLY, 0o644)
            self._thread.start()

    def at(self, label: str) -> None:
        """Note what the rank does now; each call counts as progress."""
        self.label = label
        self.count += 1
        self._write()

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()
        if self._handle is not None:
            self._thread.join()
            os.close(self._handle)
            self._handle = None

    def line(self) -> str:
        """What this rank does now, as others read it (`validate.hardware.ranks.Status`)."""
        return json.dumps(
            {
                "pid": os.getpid(),
                "time_s": time.monotonic(),
                "label": self.label,
                "count": self.count,
                "waiting": self.waiting,
            }
        )

    def _write(self) -> None:
        if self._handle is None:
            return
        with self._lock:
            os.pwrite(self._handle, self.line().encode()[:STATUS_BYTES].ljust(STATUS_BYTES), 0)

    def _run(self) -> None:
        while True:
            self._write()
            if self._parent is not None and os.getppid() != self._parent:
                self._end_all()
            if self._stop.wait(BEAT_EVERY_S):
                return

    def _end_all(self) -> None:
        """The command is gone: end what is left of the run, this process last."""
        if self._folder is not None:
            for path in self._folder.glob("rank*.status"):
                with contextlib.suppress(OSError, ValueError, KeyError):
                    other = int(json.loads(path.read_text(encoding="utf-8"))["pid"])
                    if other != os.getpid() and os.getpgid(other) == other:  # as ranks are, each in a group of its own
                        os.kill(other, signal.SIGKILL)
            shutil.rmtree(self._folder, ignore_errors=True)
        os._exit(1)


def continue_with_parent() -> None:
    """Have the kernel continue this process, were it stopped, when its parent dies: it can then end itself.

    Linux only (prctl(2), PR_SET_PDEATHSIG = 1); elsewhere nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, int(signal.SIGCONT))


def own_cores(rank: int, ranks: int) -> None:
    """Keep this process, with all its threads to come, to its own share of the cores, where there is one for each rank.

    Else a rank that leaves an exchange first computes on, and the transport's threads of a later one may wait behind it
    for the scheduler's slice (some milliseconds), on a core that is not theirs. Linux only.
    """
    with contextlib.suppress(OSError, AttributeError):
        cores = sorted(os.sched_getaffinity(0))
        each = len(cores) // ranks
        if each:
            os.sched_setaffinity(0, cores[rank * each : (rank + 1) * each])


class Marks(Protocol):
    """Notes moments of one run of the layer; on the host's clock, or as events of the device."""

    def mark(self) -> None:
        """Note this moment."""
        ...

    def read(self) -> list[float]:
        """Seconds of every moment, on this rank's clock."""
        ...

    def worked(self) -> list[float]:
        """Seconds of a processor that the rank's thread had used at every moment; empty where that says nothing."""
        ...


class HostMarks:
    """Moments on the host's monotonic clock: CPU work is done when the call returns."""

    def __init__(self) -> None:
        self._times: list[float] = []
        self._worked: list[float] = []

    def mark(self) -> None:
        """Note this moment."""
        self._worked.append(time.thread_time())
        self._times.append(time.perf_counter())

    def read(self) -> list[float]:
        """Seconds since the host's arbitrary zero."""
        return self._times

    def worked(self) -> list[float]:
        """Processor seconds of this thread."""
        return self._worked


class EventMarks:
    """Moments on the device's stream, as CUDA events; seconds since the first mark."""

    def __init__(self) -> None:
        self._torch = need_torch()
        self._events: list[Any] = []

    def mark(self) -> None:
        """Record an event on the current stream."""
        event = self._torch.cuda.Event(enable_timing=True)
        event.record()
        self._events.append(event)

    def read(self) -> list[float]:
        """Seconds since the first event, once all are done."""
        self._events[-1].synchronize()
        return [self._events[0].elapsed_time(event) / 1e3 for event in self._events]

    def worked(self) -> list[float]:
        """Empty: the device works, not the thread."""
        return []


class CoreShare:
    """Adds up how much of a processor a rank had while it computed: 1 on a free machine, less where others run too."""

    def __init__(self) -> None:
        self.worked_s = 0.0
        self.passed_s = 0.0

    def add(self, marks: Marks, collective: Sequence[bool]) -> None:
        """Count the operations between the marks that are local ones."""
        moments, worked = marks.read(), marks.worked()
        if worked:
            for index, meeting in enumerate(collective):
                if not meeting:
                    self.worked_s += worked[index + 1] - worked[index]
                    self.passed_s += moments[index + 1] - moments[index]


class Group:
    """Collectives among the ranks; each notes that the rank waits while it runs.

    Wraps an initialised torch.distributed group, the default one unless another is given. `shared_clock`: all ranks
    read one host clock, so their moments can be compared; else each rank's moments count from its own first mark after
    a barrier.
    """

    def __init__(self, rank: int, ranks: int, device: Any, beat: Beat, process_group: Any = None) -> None:
        self.torch = need_torch()
        self.rank = rank
        self.ranks = ranks
        self.device = device
        self.beat = beat
        self.process_group = process_group
        self._cuda = device.type == "cuda"
        self.shared_clock = not self._cuda and bool(
            (np.diff(self.gather(np.asarray([float(_clock_identity())]))[:, 0]) == 0).all()
        )

    def hosts(self) -> int:
        """Machines that the ranks run on, by host name and boot; asked on every rank."""
        name = f"{socket.gethostname()} {_boot()}"
        return len(np.unique(self.gather(np.asarray([float(zlib.crc32(name.encode()))]))))

    def marks(self) -> Marks:
        """A fresh set of marks, of the device's kind."""
        return EventMarks() if self._cuda else HostMarks()

    def wait(self, call: Callable[[], Any]) -> Any:
        """Run a collective, noting that this rank waits for the others; what it returns."""
        self.beat.waiting = True
        found = call()
        self.beat.waiting = False
        return found

    def exchange(self, rows: Any, send: list[int], receive: list[int]) -> Any:
        """Uneven all-to-all along the first axis: `send` rows to each rank, `receive` rows from each."""
        torch = self.torch
        got = rows.new_empty((sum(receive), *rows.shape[1:]))
        self.wait(lambda: torch.distributed.all_to_all_single(got, rows, receive, send, group=self.process_group))
        return got

    def exchange_counts(self, counts: Any) -> Any:
        """Even all-to-all of int64 [ranks, n]: row r goes to rank r; row s of the result, on the host, is rank s's."""
        torch = self.torch
        got = torch.empty_like(counts)

        def call() -> Any:
            torch.distributed.all_to_all_single(got, counts, group=self.process_group)
            return got.cpu()  # where a rank on a GPU really waits: the call only queues the exchange

        return self.wait(call)

    def gather(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Values of all ranks, on every rank: [...] -> [ranks, ...]; every rank gives the same shape."""
        torch = self.torch
        mine = torch.as_tensor(np.ascontiguousarray(values, dtype=np.float64)).to(self.device)
        parts = [torch.empty_like(mine) for _ in range(self.ranks)]

        def call() -> NDArray[np.float64]:
            torch.distributed.all_gather(parts, mine, group=self.process_group)
            return np.stack([part.cpu().numpy() for part in parts])

        found: NDArray[np.float64] = self.wait(call)
        return found

    def ready(self) -> None:
        """Return once every rank has come here, with its device idle."""
        if self._cuda:
            self.torch.cuda.synchronize()

        def call() -> None:
            self.torch.distributed.barrier(group=self.process_group)
            if self._cuda:
                self.torch.cuda.synchronize()

        self.wait(call)

    def linger(self, seconds: float) -> None:
        """Keep this rank busy for a while."""
        if self._cuda:
            self.torch.cuda.synchronize()
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            pass

    def core_share(self, share: CoreShare) -> float | None:
        """The share over all ranks, on every rank; None where it says nothing (a device does the work)."""
        worked, passed = self.gather(np.asarray([share.worked_s, share.passed_s])).sum(axis=0).tolist()
        return float(worked / passed) if passed > 0 else None

    def start_together(self) -> None:
        """Return at the same moment on all ranks (on one clock), or just after a barrier (on several)."""
        torch = self.torch
        if self._cuda:
            torch.cuda.synchronize()
        now = torch.tensor([time.perf_counter()], dtype=torch.float64, device=self.device)

        def call() -> None:
            torch.distributed.all_reduce(now, op=torch.distributed.ReduceOp.MAX, group=self.process_group)
            if self._cuda:
                torch.cuda.synchronize()

        self.wait(call)
        if self.shared_clock:
            start = float(now.item()) + START_LEAD_S
            while time.perf_counter() < start:
                pass


def _clock_identity() -> int:
    """A number that two processes share when they read the same monotonic clock (boot and time namespace)."""
    try:
        space = str(Path("/proc/self/ns/time").readlink())
    except OSError:
        return os.getpid()
    boot = _boot()
    return zlib.crc32(f"{boot} {space}".encode()) if boot else os.getpid()


def _boot() -> str:
    """The kernel's number of this boot; empty where it has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""
