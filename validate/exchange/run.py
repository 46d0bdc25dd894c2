"""`validate exchange`: uneven all-to-alls against predictions written before, by a profile that holds none of them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moesim.errors import BadInput
from profiles.capture import Line, Log, read_lines, statistics_of
from profiles.collective_points import Job, Part, spots_of
from profiles.collective_work import ELEMENT_BYTES, Seat, all_to_all
from profiles.collectives import check, check_parts, interleaved, joined, ready, seat_of, work_at
from profiles.device import conditions, device_name
from profiles.groups import ALL, PRETENDED, find_hosts, partitions, pretended_hosts
from profiles.launch import LocalRank, launch, serve
from profiles.shares import KEPT, KEPT_BY_ONE, ONE_WAY, elements
from profiles.traffic import Floats, Ints, endpoint, traffic
from profiles.uneven import uneven_cost
from validate.hardware.record import hardware, versions

if TYPE_CHECKING:
    import polars as pl

WHERE = "validate exchange"
PROFILE_FILE, PREDICTIONS_FILE, RECORD_FILE = "profile.jsonl", "predictions.json", "record.json"
# Shares that the first and the second half of the ranks send away: both alike, and one busier than the other.
AWAY = ((0.05, 0.05), (0.25, 0.25), (0.4, 0.1), (0.6, 0.2), (0.7, 0.7), (0.8, 0.5), (0.95, 0.05), (0.95, 0.95))
# Points of the profile, which reaches beyond the cases by MARGIN on both sides.
EVEN_POINTS, KEPT_POINTS, TELLING_POINTS = 9, 5, 3
MARGIN = 1.2
STEPS = 5  # lines of progress
LEAST_KEPT = 4096  # bytes: an exchange of nothing but its latency


@dataclass(frozen=True)
class Case:
    """One uneven exchange: shares of a rank's mean send buffer, [source][destination], which sum to the ranks."""

    name: str
    shares: tuple[tuple[float, ...], ...]

    def counts(self, size: int) -> Ints:
        """Elements from each rank to each, where a rank sends `size` bytes on average."""
        return elements(np.asarray(self.shares), size // ELEMENT_BYTES)


@dataclass(frozen=True)
class ExchangeJob:
    """What to run; profile: a file of measured lines, "" to measure one first. size: bytes of a rank, the mean."""

    backend: str
    cases: tuple[Case, ...]
    size: int
    repeats: int
    seed: int
    out: str
    profile: str = ""
    stall_s: float = 120.0

    @classmethod
    def read(cls, text: str) -> ExchangeJob:
        """The job that `asdict` gave."""
        given = json.loads(text)
        cases = tuple(Case(one["name"], tuple(map(tuple, one["shares"]))) for one in given.pop("cases"))
        return cls(cases=cases, **given)


def away_case(first: float, second: float, ranks: int) -> Case:
    """The first half of the ranks sends `first` of its buffer away, the other ranks `second`, evenly to all others."""
    shares = np.zeros((ranks, ranks))
    for rank in range(ranks):
        away = first if rank < ranks // 2 else second
        shares[rank] = away / (ranks - 1)
        shares[rank, rank] = 1.0 - away
    return _case(f"{first:.0%} and {second:.0%} away", shares)


def routed_case(name: str, by_rank: Sequence[float]) -> Case:
    """Every rank's tokens go to the ranks by these shares, as routing and a placement make them."""
    shares = np.asarray(by_rank) / np.sum(by_rank)
    return _case(name, np.tile(shares, (len(shares), 1)))


def _case(name: str, shares: Floats) -> Case:
    return Case(name, tuple(tuple(float(value) for value in row) for row in shares))


def ten_cases(profile: Floats, ranks: int, *, source: str, own: Sequence[float] = ()) -> tuple[Case, ...]:
    """The ten skews: eight made ones, and two as routing makes them, contiguous and hottest experts first.

    profile: share of each expert [experts]. own: shares of the ranks under a placement of the user's, instead of the
    hottest first. Raises BadInput for fewer than two ranks, or experts that the ranks do not divide.
    """
    if ranks < 2:
        raise BadInput(f"{ranks} rank exchanges nothing", where="--ranks", mend="use at least 2")
    if len(profile) % ranks:
        raise BadInput(f"{len(profile)} experts do not divide by {ranks} ranks", where="--ranks", mend="use a divisor")
    made = [away_case(first, second, ranks) for first, second in AWAY]
    contiguous = profile.reshape(ranks, -1).sum(axis=1)
    hot_first = np.sort(profile)[::-1].reshape(ranks, -1).sum(axis=1)
    return (
        *made,
        routed_case(f"{source}, contiguous", contiguous.tolist()),
        routed_case(f"{source}, placed", own) if own else routed_case(f"{source}, hot first", hot_first.tolist()),
    )


def run(job: ExchangeJob, ranks: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Run with `ranks` processes on this machine; returns the record, which is also written."""
    check_parts(job.backend, ranks)
    record = Path(job.out) / RECORD_FILE
    record.unlink(missing_ok=True)
    launch("validate.exchange.run", asdict(job), ranks, stall_s=job.stall_s, say=say, where=WHERE)
    found: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
    return found


def run_under_torchrun(job: ExchangeJob, say: Callable[[str], None]) -> dict[str, Any] | None:
    """Run as one rank of torchrun's; the record on rank 0, None elsewhere."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local, local_ranks = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", str(ranks)))
    torch = ready(job.backend, local_ranks)
    with joined(torch, job.backend, rank, ranks, local, None, job.stall_s) as device:
        return session(torch, job, rank, ranks, device, say)


def session(
    torch: Any, job: ExchangeJob, rank: int, ranks: int, device: Any, say: Callable[[str], None]
) -> dict[str, Any] | None:
    """The whole run on one rank: profile, predictions (written and synced by rank 0), only then the skews."""
    from torch import distributed

    from validate.exchange.record import keep_predictions, record_of
    from validate.foretold import now

    say = say if rank == 0 else _silent
    hosts = find_hosts(torch, rank, ranks, device, device_name(torch, str(device)))
    seat = seat_of(torch, device, partitions(hosts, (ALL,))[0], rank)
    counts = [case.counts(job.size) for case in job.cases]
    path = Path(job.profile) if job.profile else Path(job.out) / PROFILE_FILE
    if not job.profile:
        measure_profile(torch, job, hosts, seat, device, path, say)
    written: dict[str, Any] = {}
    if rank == 0:
        say("predicting")
        lines = read_lines([path])
        refuse_known(lines, job, counts, hosts)
        written = keep_predictions(Path(job.out) / PREDICTIONS_FILE, job, predict(tables(lines), job, counts, hosts))
    distributed.barrier()
    works = [all_to_all(one, seat) for one in counts]
    for case, work in zip(job.cases, works, strict=True):
        check(torch, work, device, case.name)
    begun = now()
    tell = _progress(say, "the skews", job.repeats)
    samples = interleaved(torch, works, job.repeats, device, np.random.default_rng([job.seed, 2]), tell)
    if rank != 0:
        return None
    run_of = conditions(torch, str(device)) | {"device": device_name(torch, str(device)), "ranks": ranks}
    machine = {"hardware": hardware(device), "versions": versions(), PRETENDED: pretended_hosts()}
    return record_of(job, counts, hosts, written, begun, samples, run_of, machine)


def _silent(line: str) -> None:
    """Only rank 0 speaks."""


def _progress(say: Callable[[str], None], what: str, repeats: int) -> Callable[[int], None]:
    """Says now and then how far it is, which also counts as progress to whoever waits."""
    step = max(repeats // STEPS, 1)

    def tell(repeat: int) -> None:
        if repeat % step == 0:
            say(f"measuring {what}, repeat {max(repeat, 0)} of {repeats}")

    return tell


def measure_profile(
    torch: Any, job: ExchangeJob, hosts: Sequence[int], seat: Seat, device: Any, path: Path, say: Callable[[str], None]
) -> None:  # fmt: skip
    """Even exchanges, ones in which everything stays, and ones in one direction, to a fresh file on rank 0."""
    even, kept, alone, one_way = _reach(job, len(hosts))
    parts = (
        Part("all_to_all", even),
        Part("all_to_all", kept, pattern=KEPT),
        Part("all_to_all", alone, pattern=KEPT_BY_ONE),
        Part("all_to_all", one_way, pattern=ONE_WAY),
    )
    asked = Job(job.backend, parts, job.repeats, str(path), groups=(ALL,), stall_s=job.stall_s)
    spots = spots_of(asked, partitions(hosts, (ALL,)), hosts, device_name(torch, str(device)))
    works = [work_at(asked, spot, seat) for spot in spots]
    for spot, work in zip(spots, works, strict=True):
        check(torch, work, device, f"the profile's all_to_all of {spot.size} bytes")
    tell = _progress(say, "the profile", job.repeats)
    samples = interleaved(torch, works, job.repeats, device, np.random.default_rng([job.seed, 1]), tell)
    if seat.rank == 0:
        path.unlink(missing_ok=True)
        log = Log(path)
        run_of = conditions(torch, str(device)) | {"backend": job.backend, "ranks": seat.ranks}
        for spot, seconds in zip(spots, samples, strict=True):
            log.append({**spot.line, **statistics_of(seconds.tolist()), "run": run_of})


def _reach(job: ExchangeJob, ranks: int) -> tuple[tuple[int, ...], ...]:
    """Sizes of the profile's exchanges (even, kept, kept by one, one way), around those of the cases."""
    flows = [traffic(case.counts(job.size) * ELEMENT_BYTES) for case in job.cases]
    even = ranks / (ranks - 1)
    alike = [one.busiest(share) * even for one in flows for share in (0.0, 1.0)]
    stay = max(MARGIN * max(float(one.kept.max()) for one in flows), MARGIN**2 * max(alike) / ranks)
    most = max(one.busiest(0.0) for one in flows) * (ranks // 2) / ranks
    return (
        _sizes(min(alike) / MARGIN, max(alike) * MARGIN, EVEN_POINTS),
        (LEAST_KEPT, *_sizes(stay / 8, stay, KEPT_POINTS)),
        _sizes(stay / ranks / 2, stay / ranks, TELLING_POINTS),
        _sizes(most / 2, most * MARGIN, TELLING_POINTS),
    )


def _sizes(low: float, high: float, points: int) -> tuple[int, ...]:
    return tuple(int(size) for size in np.geomspace(low, high, points))


def tables(lines: Sequence[Line]) -> dict[str, pl.DataFrame]:
    """The lines as the tables of a profile."""
    from profiles.importers.measured import tables_of
    from profiles.whose import System

    return tables_of(lines, System("this machine"))


def refuse_known(lines: Sequence[Line], job: ExchangeJob, counts: Sequence[Ints], hosts: Sequence[int]) -> None:
    """Raises BadInput when the profile holds one of the skews: that would be no prediction."""
    for line in lines:
        if line.family != "uneven_all_to_all":
            continue
        for case, one in zip(job.cases, counts, strict=True):
            key = endpoint(one * ELEMENT_BYTES, hosts)
            if line.size["bytes"] == job.size and all(line.key[name] == value for name, value in key.items()):
                raise BadInput(
                    f"the profile holds the skew {case.name!r}", where="--profile", mend="give one without, or none"
                )


def predict(
    found: Mapping[str, pl.DataFrame], job: ExchangeJob, counts: Sequence[Ints], hosts: Sequence[int]
) -> dict[str, Any]:
    """Predicted seconds of each case, and what they lean on. Raises OutsideProfile, BadInput."""
    cost = uneven_cost(found, path=job.backend, ranks=len(hosts), nodes=len(set(hosts)))
    return {
        "seconds": [cost.seconds(one * ELEMENT_BYTES, hosts) for one in counts],
        "even_bytes_alike": [cost.equal_bytes(one * ELEMENT_BYTES, hosts) for one in counts],
        "both_ways": cost.both_ways,
        "together": cost.together,
        "tag": cost.tag.label,
    }


def main(arguments: Sequence[str]) -> int:
    """One local rank, as `launch.serve` runs it."""

    def work(one: LocalRank) -> str:
        job = ExchangeJob.read(one.job)
        torch = ready(job.backend, one.ranks)
        with joined(torch, job.backend, one.rank, one.ranks, one.rank, one.store, job.stall_s) as device:
            session(torch, job, one.rank, one.ranks, device, one.say)
        return ""

    return serve(arguments, work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
