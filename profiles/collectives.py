"""Measure collectives with torch.distributed: NCCL on GPUs, gloo on CPUs; under torchrun, or with local ranks.

A size counts as nccl-tests count it: all_reduce the reduced buffer, all_gather and reduce_scatter the whole buffer,
all_to_all the send buffer of a rank, send_recv one message. A repeat takes as long as its slowest rank. On GPUs one
repeat is a batch of operations in a row between two events, so that ranks which launch late wait for each other once;
on CPUs of one host all ranks start at one moment of the common clock.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moesim.errors import BadInput, CheckFailed, MissingPart, MoesimError
from profiles.capture import Line, Log, identity, read_lines, statistics_of
from profiles.device import WARM_UPS, conditions, device_name, load_torch, readings
from profiles.launch import end_with, launch, tell

KINDS = ("all_to_all", "all_gather", "reduce_scatter", "all_reduce", "send_recv")
BACKENDS = ("gloo", "nccl")
ELEMENT_BYTES = 4  # float32: sums are checked, and no type is faster in bytes per second
LEAD_S = 1e-3  # for the news of a common start to reach every rank before any of them starts
# An all-reduce in place multiplies its values by the ranks each time: from here a batch over 64 ranks stays finite.
SMALL = 1e-30
BATCH = 20  # operations in a row between two events on a GPU, as many as nccl-tests time by default


@dataclass(frozen=True)
class Job:
    """What to measure; sizes in bytes. shares: of each rank's send buffer by destination, for an uneven all_to_all."""

    backend: str
    kinds: tuple[str, ...]
    sizes: tuple[int, ...]
    repeats: int
    out: str
    shares: tuple[float, ...] = ()
    distribution: str = ""
    stall_s: float = 120.0


def sizes_between(low: int, high: int) -> tuple[int, ...]:
    """From `low` bytes in steps of two up to `high`, which is the last."""
    found = [low]
    while found[-1] * 2 <= high:
        found.append(found[-1] * 2)
    return tuple(dict.fromkeys([*found, high]))


def bytes_from(text: str, where: str) -> int:
    """`4096`, `1KB`, `256MB`, `1GB` (powers of 1024, as nccl-tests). Raises BadInput."""
    for unit, factor in (("KB", 2**10), ("MB", 2**20), ("GB", 2**30), ("B", 1), ("", 1)):
        number = text.upper().removesuffix(unit)
        if text.upper().endswith(unit) and number.isdecimal() and 0 < int(number) * factor <= 2**40:
            return int(number) * factor
    raise BadInput(f"{text!r} is no size", where=where, mend="write for instance 1KB or 256MB")


def run_local(job: Job, ranks: int, say: Callable[[str], None]) -> None:
    """Measure with `ranks` processes on this machine. Raises MissingPart without torch, NCCL or enough GPUs."""
    _ready(job.backend, ranks)
    Log(Path(job.out))  # a file of something else is refused before any rank starts
    launch("profiles.collectives", asdict(job), ranks, stall_s=job.stall_s, say=say)


def run_under_torchrun(job: Job, say: Callable[[str], None]) -> bool:
    """Measure as one rank of torchrun's; true on the rank that wrote the file."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local, local_ranks = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", str(ranks)))
    torch = _ready(job.backend, local_ranks)
    nodes = -(-ranks // local_ranks)
    with _joined(torch, job, rank, ranks, local, None) as device:
        _measure(torch, job, rank, ranks, nodes, device, say)
    return rank == 0


def _ready(backend: str, local_ranks: int) -> Any:
    """Torch, when the backend can run. Raises MissingPart, BadInput."""
    if backend not in BACKENDS:
        raise BadInput(f"unknown backend {backend!r}", where="--backend", mend=f"use one of: {', '.join(BACKENDS)}")
    torch = load_torch("cpu")
    if backend == "gloo":
        return torch
    from torch import distributed

    if not torch.cuda.is_available() or not distributed.is_nccl_available():
        raise MissingPart(
            "NCCL needs a CUDA GPU and a torch built with it", where="--backend",
            mend="run on a GPU with `pip install '.[hardware]'`, or use --backend gloo",
        )  # fmt: skip
    if torch.cuda.device_count() < local_ranks:
        raise MissingPart(
            f"{local_ranks} ranks need as many GPUs; {torch.cuda.device_count()} are here", where="--ranks",
            mend=f"use --ranks {torch.cuda.device_count()}, or torchrun over more nodes",
        )  # fmt: skip
    return torch


@contextlib.contextmanager
def _joined(torch: Any, job: Job, rank: int, ranks: int, local: int, store: str | None) -> Any:
    """The process group, for as long as it is needed; yields the device. `store`: a file where the local ranks meet."""
    from torch import distributed

    if job.backend == "nccl":
        torch.cuda.set_device(local)
    device = torch.device("cuda", local) if job.backend == "nccl" else torch.device("cpu")
    found = None if store is None else distributed.FileStore(store, ranks)
    distributed.init_process_group(
        job.backend,
        store=found,
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=job.stall_s),
        device_id=device if job.backend == "nccl" else None,
    )
    try:
        yield device
    finally:
        distributed.destroy_process_group()


def _measure(torch: Any, job: Job, rank: int, ranks: int, nodes: int, device: Any, say: Callable[[str], None]) -> None:
    """Every point on all ranks; rank 0 says which ones are to do, and writes them."""
    from torch import distributed

    log = Log(Path(job.out)) if rank == 0 else None
    name = device_name(torch, str(device))
    points = [_point(job, kind, size, ranks, nodes, name) for kind in job.kinds for size in job.sizes]
    mask = [log is not None and _identity(point) not in log.have for point in points]
    todo = torch.tensor(mask, dtype=torch.int32, device=device)
    distributed.broadcast(todo, src=0)
    for number, point in enumerate(points):
        if not int(todo[number]):
            continue
        if rank == 0:
            say(f"{point['key']['kind']} {point['size']['bytes']:.0f} bytes, point {number + 1} of {len(points)}")
        before = readings(str(device))
        seconds, wrong = _time(torch, job, str(point["key"]["kind"]), int(point["size"]["bytes"]), rank, ranks, device)
        if wrong:
            raise CheckFailed(
                f"{point['key']['kind']} of {point['size']['bytes']:.0f} bytes gave a wrong result",
                where="profile collectives",
                mend="nothing is recorded of this point; check the network and the driver",
            )
        if log is not None:
            run = conditions(torch, str(device)) | {"backend": job.backend, "ranks": ranks}
            if device.type == "cuda":
                run |= {"before": before, "after": readings(str(device))}
            log.append({**point, **statistics_of(seconds), "run": run})


def _point(job: Job, kind: str, size: int, ranks: int, nodes: int, device: str) -> dict[str, Any]:
    """What identifies a point. A size is rounded so that every rank gets whole elements."""
    unit = ELEMENT_BYTES * (ranks if kind in ("all_to_all", "all_gather", "reduce_scatter") else 1)
    key: dict[str, str | int] = {"kind": kind, "path": job.backend, "gpus": ranks, "nodes": nodes}
    uneven = kind == "all_to_all" and bool(job.shares)
    if uneven:
        key["distribution"] = job.distribution
    return {
        "family": "uneven_all_to_all" if uneven else "collective",
        "key": key,
        "size": {"bytes": float(-(-size // unit) * unit)},
        "kernel": job.backend,
        "device": device,
        "extra": {"shares": list(job.shares)} if uneven else {},
    }


def _identity(point: dict[str, Any]) -> str:
    return identity(point["family"], point["key"], point["size"], point["kernel"], point["device"])


def _time(torch: Any, job: Job, kind: str, size: int, rank: int, ranks: int, device: Any) -> tuple[list[float], bool]:
    """Seconds of each repeat, the slowest rank's, on every rank; and whether any rank saw a wrong result."""
    from torch import distributed

    work, check, reset = _work(torch, job, kind, size // ELEMENT_BYTES, rank, ranks, device)
    work()
    wrong = torch.tensor([0 if check() else 1], dtype=torch.int32, device=device)
    distributed.all_reduce(wrong)
    if int(wrong.item()):
        return [], True
    for _ in range(WARM_UPS):
        work()
    cuda = device.type == "cuda"
    found = torch.zeros(job.repeats, dtype=torch.float64, device=device)
    for repeat in range(job.repeats):
        reset()
        if cuda:
            distributed.barrier()
            torch.cuda.synchronize()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(BATCH):
                work()
            end.record()
            end.synchronize()
            found[repeat] = begin.elapsed_time(end) * 1e-3 / BATCH
        else:
            begun = _together(torch)
            work()
            found[repeat] = time.perf_counter() - begun
    distributed.all_reduce(found, op=distributed.ReduceOp.MAX)
    return [float(value) for value in found.tolist()], False


def _together(torch: Any) -> float:
    """Start at one moment on all ranks of this host's clock; returns that moment.

    Ranks on other hosts read other clocks: there the barrier inside is all that holds them together.
    """
    from torch import distributed

    now = time.perf_counter()
    latest = torch.tensor([now], dtype=torch.float64)
    distributed.all_reduce(latest, op=distributed.ReduceOp.MAX)
    start = float(latest.item()) + LEAD_S
    here = time.perf_counter()
    if not 0.0 < start - here <= LEAD_S:  # another clock, or the news came late
        return here
    while time.perf_counter() < start:
        pass
    return start


def _work(
    torch: Any, job: Job, kind: str, elements: int, rank: int, ranks: int, device: Any
) -> tuple[Callable[[], Any], Callable[[], bool], Callable[[], None]]:
    """The operation on its buffers, whether what it gave is right (asked after the first run), and what resets it."""
    from torch import distributed

    def tagged(owner: int, count: int) -> Any:
        """Numbers that tell whose they are: small whole ones, so that sums are exact."""
        return (torch.arange(count, device=device, dtype=torch.float32) % 97) + float(owner)

    if kind == "all_reduce":
        buffer = tagged(rank, elements)
        right = sum(tagged(owner, elements) for owner in range(ranks))
        fresh = tagged(rank, elements) * SMALL

        def reset() -> None:
            buffer.copy_(fresh)

        return lambda: distributed.all_reduce(buffer), lambda: bool(torch.equal(buffer, right)), reset
    if kind == "all_gather":
        each = elements // ranks
        mine, whole = tagged(rank, each), torch.zeros(elements, device=device)
        return (
            lambda: distributed.all_gather_into_tensor(whole, mine),
            lambda: all(torch.equal(part, tagged(owner, each)) for owner, part in enumerate(whole.chunk(ranks))),
            _nothing,
        )
    if kind == "reduce_scatter":
        each = elements // ranks
        sent, got = tagged(rank, elements), torch.zeros(each, device=device)
        part = slice(rank * each, (rank + 1) * each)
        total = sum(tagged(owner, elements)[part] for owner in range(ranks))
        return lambda: distributed.reduce_scatter_tensor(got, sent), lambda: bool(torch.equal(got, total)), _nothing
    if kind == "all_to_all":
        split = _splits(job.shares, elements, ranks)
        sent = tagged(rank, elements)
        got = torch.zeros(split[rank] * ranks, device=device)
        receive = [split[rank]] * ranks
        start = sum(split[:rank])
        return (
            lambda: distributed.all_to_all_single(got, sent, receive, split),
            lambda: all(
                torch.equal(part, tagged(owner, elements)[start : start + split[rank]])
                for owner, part in enumerate(got.split(receive))
            ),
            _nothing,
        )
    return _ring(torch, distributed, tagged, elements, rank, ranks, device)


def _ring(
    torch: Any, distributed: Any, tagged: Callable[[int, int], Any], elements: int, rank: int, ranks: int, device: Any
) -> tuple[Callable[[], Any], Callable[[], bool], Callable[[], None]]:
    """send_recv: every rank sends to the next and receives from the one before, at the same time."""
    sent, got = tagged(rank, elements), torch.zeros(elements, device=device)
    if ranks == 1:
        return lambda: got.copy_(sent), lambda: bool(torch.equal(got, sent)), _nothing

    def pass_on() -> None:
        both = [
            distributed.P2POp(distributed.isend, sent, (rank + 1) % ranks),
            distributed.P2POp(distributed.irecv, got, (rank - 1) % ranks),
        ]
        for request in distributed.batch_isend_irecv(both):
            request.wait()

    return pass_on, lambda: bool(torch.equal(got, tagged((rank - 1) % ranks, elements))), _nothing


def _nothing() -> None:
    """Between repeats nothing has to be put back."""


def _splits(shares: Sequence[float], elements: int, ranks: int) -> list[int]:
    """Elements to each destination: even, or by the shares in whole elements (largest remainder)."""
    if not shares:
        return [elements // ranks] * ranks
    exact = np.asarray(shares) * elements
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: elements - int(counts.sum())]] += 1
    return [int(count) for count in counts]


def report(out: Path) -> list[str]:
    """What a person reads at the end: one line for each kind and group."""
    groups: dict[str, list[Line]] = {}
    for line in read_lines([out]):
        if "gpus" in line.key:
            groups.setdefault(" ".join(str(value) for value in line.key.values()), []).append(line)
    found = [f"{out}: {sum(len(lines) for lines in groups.values())} points (kind, backend, ranks, nodes)"]
    for name, lines in groups.items():
        ordered = sorted(lines, key=lambda line: line.size["bytes"])
        spread = float(np.median([(line.p90_s - line.p10_s) / line.latency_s for line in lines]))
        first, last = ordered[0], ordered[-1]
        found.append(
            f"  {name}: {first.size['bytes']:.0f} bytes {first.latency_s * 1e6:.1f} us, "
            f"{last.size['bytes']:.0f} bytes {last.latency_s * 1e6:.0f} us, spread (p90 - p10) {spread:.0%}"
        )
    return found


def main(arguments: Sequence[str]) -> int:
    """One local rank: the job's folder, the rank, and the parent that it must not outlive."""
    folder, rank, parent = Path(arguments[0]), int(arguments[1]), int(arguments[2])
    end_with(parent)
    given = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    fields: dict[str, Any] = {name: tuple(one) if isinstance(one, list) else one for name, one in given.items()}
    job = Job(**fields)
    ranks = int(os.environ["MOESIM_RANKS"])

    def say(line: str) -> None:
        (folder / "progress").write_text(line, encoding="utf-8")

    try:
        torch = _ready(job.backend, ranks)
        with _joined(torch, job, rank, ranks, rank, str(folder / "meet")) as device:
            _measure(torch, job, rank, ranks, 1, device, say)
    except MoesimError as error:
        tell(folder, rank, error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
