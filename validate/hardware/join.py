"""Joining the ranks of a run: those that a command started, and those that torchrun (or anything like it) started.

Where a command starts its ranks it also watches them (`ranks.launch`). Under torchrun nobody does: its agents notice a
rank that ends, but not one that hangs, and only the rank itself knows what it was at. So there the ranks tell each
other, over the store where they met, that they live, what they do and why they failed.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any, Protocol, TypeVar

from moesim.errors import CheckFailed, MoesimError
from validate.hardware.group import Beat, Group, need_torch
from validate.hardware.process import first_line, out_of_memory
from validate.hardware.ranks import GRACE_S, HARDWARE, SILENCE_S, SLOW, Status, Told, Watch, silence_of
from validate.hardware.rig import device_of

# Collectives give up this long after a run counts as hung, so that whoever watches can say first which rank it was.
PATIENCE_S = 30.0
LOOK_S = 0.5
NEVER = timedelta(days=7)
# What a store raises that went with its host (torch.distributed.DistError is a RuntimeError), or a socket.
STORE_GONE = (RuntimeError, OSError)


class Asked(Protocol):
    """A job as it travels to the ranks."""

    @property
    def backend(self) -> str:
        """Of torch.distributed."""
        ...

    def model_dump_json(self) -> str:
        """The job as text."""
        ...


J = TypeVar("J", bound=Asked)
R = TypeVar("R")


@contextlib.contextmanager
def joined(
    backend: str, store: Any, *, rank: int, ranks: int, local_rank: int, beat: Beat, stall_s: float
) -> Iterator[Group]:
    """This process as a rank of the run's process group, with one thread; left again at the end.

    Products in float32 are computed in float32: containers with GPU libraries may set TF32, whose ten bits of mantissa
    would route other tokens than the reference does.
    """
    torch = need_torch()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")
    beat.at("taking its device")
    device = device_of(backend, rank, local_rank)
    beat.at("joining the process group")
    beat.waiting = True
    torch.distributed.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=stall_s + PATIENCE_S),
        **({"device_id": device} if device.type == "cuda" else {}),
    )
    beat.waiting = False
    try:
        yield Group(rank, ranks, device, beat)
    except BaseException:
        _give_up(device)
        raise
    torch.distributed.destroy_process_group()


def _give_up(device: Any) -> None:
    """Leave a group that failed. NCCL's would wait for what is under way, which no other rank may finish any more."""
    torch = need_torch()
    leave: Any = torch.distributed.destroy_process_group
    if device.type == "cuda":  # torch has it since 2.6; without it the end of the process does
        leave = getattr(torch.distributed.distributed_c10d, "_abort_process_group", None)
    if leave is not None:
        with contextlib.suppress(RuntimeError, ValueError, AssertionError):
            leave()


class Roll:
    """Signs of life of all ranks over their store; ends this process when the run hangs, with the rank that hangs.

    Rank 0 watches all, the others rank 0; all look whether one left word that it failed. ending: told the reason
    before rank 0 ends; what it returns stands in the error. silence_s: how long a rank may show no sign of life.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        ranks: int,
        beat: Beat,
        *,
        stall_s: float,
        told: Told,
        ending: Callable[[str], str | None],
        silence_s: float = SILENCE_S,
    ) -> None:
        self._store, self._rank, self._beat, self._told, self._ending = store, rank, beat, told, ending
        self._watched = range(ranks) if rank == 0 else range(1)
        self._stall_s, self._silence_s = stall_s, silence_s
        self._seen: dict[int, tuple[bytes, Status | None]] = {}
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """This rank is done: nobody need wait for it."""
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(*STORE_GONE):
            self._store.set(f"status{self._rank}", b"{}")

    def leave(self, error: MoesimError) -> None:
        """Leave word of why this rank fails."""
        with contextlib.suppress(*STORE_GONE), self._lock:
            self._store.set("failed", json.dumps([error.what, error.mend]))

    def cause(self, wait_s: float = GRACE_S) -> CheckFailed | None:
        """What a rank left that failed by itself, if one does within a moment."""
        until = time.monotonic() + wait_s
        while True:
            with contextlib.suppress(*STORE_GONE), self._lock:
                if self._store.check(["failed"]):
                    what, mend = json.loads(self._store.get("failed"))
                    return CheckFailed(what, where=self._told.where, mend=mend)
            if time.monotonic() > until:
                return None
            time.sleep(LOOK_S / 5)

    def _run(self) -> None:
        watch = Watch(self._stall_s, time.monotonic(), self._silence_s)
        while not self._stop.wait(LOOK_S):
            try:
                with self._lock:
                    self._store.set(f"status{self._rank}", self._beat.line())
                seen = {rank: self._status(rank) for rank in self._watched}
            except STORE_GONE:  # the store went with its host; whoever waits for that rank will say so
                return
            now = time.monotonic()
            alive = {rank: status for rank, (raw, status) in seen.items() if raw != b"{}"}
            reason = watch.hung(alive, now) if self._rank == 0 else self._silent(alive, now)
            if reason is not None:
                self._end(CheckFailed(reason, where=self._told.where, mend=SLOW))
            failed = self.cause(0.0)
            if failed is not None and not self._stop.wait(3 * GRACE_S):  # where waiting for the lost rank has no end
                self._end(failed)

    def _status(self, rank: int) -> tuple[bytes, Status | None]:
        """What a rank told last, with the moment at which this one first saw it: clocks of two hosts differ."""
        key = f"status{rank}"
        with self._lock:
            raw = bytes(self._store.get(key)) if self._store.check([key]) else b""
        if raw != self._seen.get(rank, (b"", None))[0]:
            status = None if raw == b"{}" else replace(Status(**json.loads(raw)), time_s=time.monotonic())
            self._seen[rank] = raw, status
        return self._seen.get(rank, (raw, None))

    def _silent(self, statuses: dict[int, Status | None], now_s: float) -> str | None:
        """Rank 0 as another rank sees it, twice as patient as rank 0 is with the others."""
        for rank, status in statuses.items():
            if status is not None and now_s - status.time_s > 2 * self._silence_s:
                return f"rank {rank} hangs: no sign of life for {now_s - status.time_s:.0f} s, while {status.label}"
        return None

    def _end(self, error: CheckFailed) -> None:
        kept = self._ending(error.what) if self._rank == 0 else None
        first = True
        with contextlib.suppress(*STORE_GONE), self._lock:
            first = int(self._store.add("ended", 1)) == 1
        if first:
            line = CheckFailed(error.what, where=error.where, mend="; ".join(filter(None, [error.mend, kept]))).line()
            sys.stderr.write(f"error: {line}\n")
            sys.stderr.flush()
        os._exit(1)


def join(
    command: str,
    make: Callable[[int], J],
    read: Callable[[str], J],
    work: Callable[[J, Group, Any], R],
    *,
    stall_s: Callable[[J], float],
    told: Told = HARDWARE,
    ending: Callable[[J, str], str | None] = lambda job, reason: None,
) -> R:
    """Join the ranks that something else started: rank 0 makes the job (`make(ranks)`) and hands it to the others.

    work: gets the job, the group, and a store that all ranks share. ending: what is kept when a run ends too early, on
    rank 0. Raises what `work` raises, and CheckFailed with the rank and the reason where one fails.
    """
    torch = need_torch(command)
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", str(rank)))
    found, _, _ = next(torch.distributed.rendezvous("env://", rank=rank, world_size=ranks))
    prefix = f"moesim {command}"
    store = torch.distributed.PrefixStore(prefix, found)
    if rank == 0:
        try:
            store.set("job", make(ranks).model_dump_json())
        except MoesimError:
            store.set("job", "")
            raise
    text = store.get("job").decode()
    if not text:
        raise CheckFailed("rank 0 could not make the job", where=f"rank {rank}", mend="see what rank 0 says")
    job = read(text)
    beat = Beat(None)
    calls = torch.distributed.PrefixStore(f"{prefix} roll", _another(found))
    roll = Roll(
        calls, rank, ranks, beat, stall_s=stall_s(job), told=told, ending=lambda reason: ending(job, reason),
        silence_s=silence_of(job.backend),
    )  # fmt: skip
    try:
        with joined(
            job.backend, store, rank=rank, ranks=ranks, local_rank=local_rank, beat=beat, stall_s=stall_s(job)
        ) as group:
            return work(job, group, store)
    except (RuntimeError, MemoryError) as error:
        failed = _told_by(error, rank, beat, roll, told)
        kept = ending(job, failed.what) if rank == 0 else None
        mend = "; ".join(filter(None, [failed.mend, kept]))
        raise CheckFailed(failed.what, where=failed.where, mend=mend) from None
    except MoesimError:
        raise
    except Exception as error:  # a mistake of this program: told as it is here, and to whoever waits for this rank
        _told_by(error, rank, beat, roll, told)
        raise
    finally:
        roll.stop()


def _told_by(error: BaseException, rank: int, beat: Beat, roll: Roll, told: Told) -> CheckFailed:
    """Why a rank ends that met an error: its own, or that of the rank which left it alone."""
    short = out_of_memory(error)
    if beat.waiting and not short:
        other = roll.cause()
        if other is not None:
            return other
        what = f"rank {rank} lost the others while {beat.label}: {first_line(error)}"
        return CheckFailed(what, where=told.where, mend="see what they, or whoever started them, say")
    how = "ran out of memory" if short else "failed"
    failed = CheckFailed(
        f"rank {rank} {how} while {beat.label}: {first_line(error)}", where=told.where,
        mend=told.smaller if short else "mend that and run again",
    )  # fmt: skip
    roll.leave(failed)
    return failed


def _another(store: Any) -> Any:
    """A connection of its own to the same store: a thread that tells must not wait behind one that gets."""
    with contextlib.suppress(AttributeError, NotImplementedError, RuntimeError):
        return store.clone()
    torch = need_torch()
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return torch.distributed.TCPStore(address, port, is_master=False, wait_for_workers=False)
