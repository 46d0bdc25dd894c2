"""Measure collectives with torch.distributed: NCCL on GPUs, gloo on CPUs; under torchrun, or with local ranks.

A size counts as nccl-tests count it: all_reduce the reduced buffer, all_gather and reduce_scatter the whole buffer,
all_to_all the send buffer of a rank (of an uneven one: their mean), send_recv one message. A repeat takes as long as
its slowest rank. On GPUs one repeat is a batch of operations in a row between two events, so that ranks which launch
late wait for each other once; on CPUs of one host all ranks start at one moment of the common clock.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from moesim.errors import BadInput, CheckFailed, MissingPart
from profiles import beside, groups
from profiles.capture import Line, Log, read_lines, statistics_of
from profiles.collective_points import BACKENDS, BESIDE, Job, Spot, counts_of, in_words, spots_of
from profiles.collective_work import ELEMENT_BYTES, Seat, Work, all_to_all, work_of
from profiles.device import WARM_UPS, conditions, device_name, load_torch, need_torch, readings
from profiles.groups import Partition
from profiles.launch import LocalRank, launch, serve
from profiles.traffic import Floats

LEAD_S = 1e-3  # for the news of a common start to reach every rank before any of them starts
BATCH = 20  # operations in a row between two events on a GPU, as many as nccl-tests time by default


def run_local(job: Job, ranks: int, say: Callable[[str], None]) -> int:
    """Measure with `ranks` processes on this machine; returns how many points are left for later.

    Raises MissingPart without torch, NCCL or enough GPUs.
    """
    check_parts(job.backend, ranks)
    Log(Path(job.out))  # a file of something else is refused before any rank starts
    return int(launch("profiles.collectives", asdict(job), ranks, stall_s=job.stall_s, say=say))


def run_under_torchrun(job: Job, say: Callable[[str], None]) -> int:
    """Measure as one rank of torchrun's, the first of which writes; returns how many points are left for later."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local, local_ranks = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", str(ranks)))
    torch = ready(job.backend, local_ranks)
    with joined(torch, job.backend, rank, ranks, local, None, job.stall_s) as device:
        return _measure(torch, job, rank, ranks, device, say)


def check_parts(backend: str, local_ranks: int) -> None:
    """What `ready` raises, in a process that needs torch for no more than that."""
    if backend == "gloo":
        need_torch()
    else:
        ready(backend, local_ranks)


def ready(backend: str, local_ranks: int) -> Any:
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
def joined(
    torch: Any, backend: str, rank: int, ranks: int, local: int, store: str | None, stall_s: float
) -> Iterator[Any]:
    """The process group, for as long as it is needed; yields the device. `store`: a file where the local ranks meet."""
    from torch import distributed

    if backend == "nccl":
        torch.cuda.set_device(local)
    device = torch.device("cuda", local) if backend == "nccl" else torch.device("cpu")
    found = None if store is None else distributed.FileStore(store, ranks)
    distributed.init_process_group(
        backend,
        store=found,
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=stall_s),
        device_id=device if backend == "nccl" else None,
    )
    try:
        yield device
    finally:
        distributed.destroy_process_group()


def _measure(torch: Any, job: Job, rank: int, ranks: int, device: Any, say: Callable[[str], None]) -> int:
    """Every point on all ranks; rank 0 says which ones are to do, and writes them. Returns how many are left."""
    from torch import distributed

    log = Log(Path(job.out)) if rank == 0 else None
    name = device_name(torch, str(device))
    hosts = groups.find_hosts(torch, rank, ranks, device, name)
    split = groups.partitions(hosts, job.groups)
    seats = {one.name: seat_of(torch, device, one, rank) for one in split}
    spots = spots_of(job, split, hosts, name)
    mask = [log is not None and spot.identity not in log.have for spot in spots]
    todo = torch.tensor(mask, dtype=torch.int32, device=device)
    distributed.broadcast(todo, src=0)
    begun, missed, left = time.monotonic(), 0, [spot for number, spot in enumerate(spots) if int(todo[number])]
    for number, spot in enumerate(left):
        if job.budget_s is not None:
            late = torch.tensor(int(time.monotonic() - begun > job.budget_s), device=device)
            distributed.broadcast(late, src=0)
            if int(late):
                return missed + len(left) - number
        if rank == 0:
            say(f"{in_words(spot)}, point {len(spots) - len(left) + number + 1} of {len(spots)}")
        before = readings(str(device))
        try:
            figures = _figures(torch, job, spot, seats[spot.partition.name], device)
        except beside.NeverTogether as failure:  # raised on every rank alike
            missed += 1
            if rank == 0:
                say(f"left out: {failure.what}")
            continue
        if log is not None:
            run = conditions(torch, str(device)) | {"backend": job.backend, "ranks": ranks}
            if device.type == "cuda":
                run |= {"before": before, "after": readings(str(device))}
            if groups.pretended_hosts():
                run[groups.PRETENDED] = groups.pretended_hosts()
            log.append({**spot.line, **figures, "run": run})
    return missed


def seat_of(torch: Any, device: Any, partition: Partition, rank: int) -> Seat:
    """This rank's place in its group; every rank makes every process group, in the same order."""
    from torch import distributed

    if partition.name == groups.ALL:
        return Seat(torch, device, None, partition.groups[0], rank)
    made = [distributed.new_group(list(members)) for members in partition.groups]
    members = partition.group_of(rank)
    return Seat(torch, device, made[partition.groups.index(members)], members, members.index(rank))


def _figures(torch: Any, job: Job, spot: Spot, seat: Seat, device: Any) -> dict[str, Any]:
    """The seconds of a point, the slowest rank's. Raises CheckFailed on every rank where any saw a wrong result."""
    work = work_at(job, spot, seat)
    check(torch, work, device, in_words(spot))
    if not spot.part.beside:
        order = np.random.default_rng(0)
        return statistics_of(interleaved(torch, [work], job.repeats, device, order)[0].tolist())
    both = beside.measure(
        torch, device, work.run, _product(torch, device), repeats=job.repeats, pace=_pace(torch, device),
        reset=work.reset,
    )  # fmt: skip
    extra = {
        **spot.line["extra"],
        "alone": statistics_of(both.alone_s),
        "product_beside": statistics_of(both.product_beside_s),
    }
    return {**statistics_of(both.beside_s), "values": both.slowdowns(), "extra": extra}


def work_at(job: Job, spot: Spot, seat: Seat) -> Work:
    """The operation of a point on its buffers."""
    if spot.part.pattern:
        return all_to_all(counts_of(job, spot.part, seat.ranks, spot.size), seat)
    return work_of(spot.part.kind, spot.size // ELEMENT_BYTES, seat)


def check(torch: Any, work: Work, device: Any, what: str) -> None:
    """Run an operation once and look at what it gave. Raises CheckFailed on every rank where any saw a wrong result."""
    from torch import distributed

    work.run()
    wrong = torch.tensor([0 if work.right() else 1], dtype=torch.int32, device=device)
    distributed.all_reduce(wrong)
    if int(wrong.item()):
        raise CheckFailed(
            f"{what} gave a wrong result", where="profile collectives",
            mend="nothing is recorded of this point; check the network and the driver",
        )  # fmt: skip


def _product(torch: Any, device: Any) -> Callable[[], Any]:
    """The product that runs beside, on random values."""
    dtype, m, n, k = BESIDE[device.type]
    kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    a, b = torch.randn(m, k, device=device).to(kind), torch.randn(n, k, device=device).to(kind)
    return lambda: torch.mm(a, b.t())


def _pace(torch: Any, device: Any) -> beside.Pace:
    from torch import distributed

    def start() -> None:
        if device.type == "cuda":
            distributed.barrier()
            torch.cuda.synchronize()
        else:
            together(torch)

    def most(value: float) -> float:
        found = torch.tensor([value], dtype=torch.float64, device=device)
        distributed.all_reduce(found, op=distributed.ReduceOp.MAX)
        return float(found.item())

    return beside.Pace(start, most)


def interleaved(
    torch: Any, works: Sequence[Work], repeats: int, device: Any, order: np.random.Generator,
    tell: Callable[[int], object] = lambda repeat: None,
) -> Floats:  # fmt: skip
    """Seconds of each repeat of each operation [works, repeats], the slowest rank's, on every rank.

    The operations take turns in random order (`order` must draw alike on every rank), so that a change in the machine's
    load falls on all of them. tell: gets the number of each repeat before it begins (below 0 while warming up).
    """
    from torch import distributed

    cuda = device.type == "cuda"
    found = torch.zeros(len(works), repeats, dtype=torch.float64, device=device)
    for repeat in range(-WARM_UPS, repeats):
        tell(repeat)
        for index in order.permutation(len(works)).tolist():
            work = works[index]
            work.reset()
            if cuda:
                distributed.barrier()
                torch.cuda.synchronize()
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                for _ in range(BATCH):
                    work.run()
                end.record()
                end.synchronize()
                seconds = begin.elapsed_time(end) * 1e-3 / BATCH
            else:
                begun = together(torch)
                work.run()
                seconds = time.perf_counter() - begun
            if repeat >= 0:
                found[index, repeat] = seconds
    distributed.all_reduce(found, op=distributed.ReduceOp.MAX)
    return np.asarray(found.cpu().numpy(), dtype=np.float64)


def together(torch: Any) -> float:
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


def report(out: Path) -> list[str]:
    """What a person reads at the end: one line for each kind and group."""
    groups_of: dict[str, list[Line]] = {}
    for line in read_lines([out]):
        if "gpus" in line.key:
            key, what = line.key, line.key.get("kind", line.key.get("work", f"{line.extra.get('pattern')} all_to_all"))
            name = f"{what} {key['path']} {key['gpus']} {key['nodes']}"
            name += f" beside {key['beside']}" if "beside" in key else ""
            groups_of.setdefault(name, []).append(line)
    found = [f"{out}: {sum(len(lines) for lines in groups_of.values())} points (kind, backend, ranks, nodes)"]
    for name, lines in groups_of.items():
        ordered = sorted(lines, key=lambda line: line.size["bytes"])
        spread = float(np.median([(line.p90_s - line.p10_s) / line.latency_s for line in lines]))
        first, last = ordered[0], ordered[-1]
        slower = ""
        if last.values:
            slower = "; at the largest {slowdown:.2f} times as long, the product {beside_slowdown:.2f}"
        found.append(
            f"  {name}: {first.size['bytes']:.0f} bytes {first.latency_s * 1e6:.1f} us, "
            f"{last.size['bytes']:.0f} bytes {last.latency_s * 1e6:.0f} us, spread (p90 - p10) {spread:.0%}"
            + slower.format(**last.values)
        )
    return found


def main(arguments: Sequence[str]) -> int:
    """One local rank, as `launch.serve` runs it."""

    def work(one: LocalRank) -> str:
        job = Job.read(one.job)
        torch = ready(job.backend, one.ranks)
        with joined(torch, job.backend, one.rank, one.ranks, one.rank, one.store, job.stall_s) as device:
            return str(_measure(torch, job, one.rank, one.ranks, device, one.say))

    return serve(arguments, work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
