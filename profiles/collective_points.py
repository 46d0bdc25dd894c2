"""Which points `moesim profile collectives` measures: kinds, sizes, groups, uneven patterns, work beside."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moesim.errors import BadInput
from profiles import groups
from profiles.capture import identity
from profiles.collective_work import ELEMENT_BYTES
from profiles.groups import Partition
from profiles.shares import elements, pattern
from profiles.traffic import Ints, endpoint

KINDS = ("all_to_all", "all_gather", "reduce_scatter", "all_reduce", "send_recv")
BACKENDS = ("gloo", "nccl")
GIVEN = "given"  # the pattern whose shares the job holds
GEMM = "gemm"
# The product that runs beside: gate and up of one DeepSeek-V3 expert (its config.json), and one an eighth as wide.
BESIDE = {"cuda": ("bf16", 1024, 4096, 7168), "cpu": ("fp32", 256, 512, 896)}


@dataclass(frozen=True)
class Part:
    """Some points of a kind: sizes in bytes, the pattern of an uneven all_to_all, what runs beside."""

    kind: str
    sizes: tuple[int, ...]
    pattern: str = ""
    beside: str = ""


@dataclass(frozen=True)
class Job:
    """What to measure. shares: of each rank's send buffer by destination, for the pattern GIVEN, named distribution.

    budget_s: no point is begun after that long.
    """

    backend: str
    parts: tuple[Part, ...]
    repeats: int
    out: str
    groups: tuple[str, ...] = groups.DEFAULT
    shares: tuple[float, ...] = ()
    distribution: str = ""
    stall_s: float = 120.0
    budget_s: float | None = None

    @classmethod
    def read(cls, text: str) -> Job:
        """The job that `asdict` gave."""
        given = json.loads(text)
        parts = tuple(Part(**{**one, "sizes": tuple(one["sizes"])}) for one in given.pop("parts"))
        fields: dict[str, Any] = {key: tuple(one) if isinstance(one, list) else one for key, one in given.items()}
        return cls(parts=parts, **fields)


@dataclass(frozen=True)
class Spot:
    """One point: the part and size that it belongs to, the ranks that do it together, and its line without figures."""

    part: Part
    partition: Partition
    line: dict[str, Any]

    @property
    def size(self) -> int:
        """Bytes, as the kind counts them."""
        return int(self.line["size"]["bytes"])

    @property
    def identity(self) -> str:
        """What makes it the same point as a line of the file."""
        line = self.line
        return identity(line["family"], line["key"], line["size"], line["kernel"], line["device"])


def sizes_between(low: int, high: int, step: int = 2) -> tuple[int, ...]:
    """From `low` bytes in steps of `step` up to `high`, which is the last."""
    found = [low]
    while found[-1] * step <= high:
        found.append(found[-1] * step)
    return tuple(dict.fromkeys([*found, high]))


def bytes_from(text: str, where: str) -> int:
    """`4096`, `1KB`, `256MB`, `1GB` (powers of 1024, as nccl-tests). Raises BadInput."""
    for unit, factor in (("KB", 2**10), ("MB", 2**20), ("GB", 2**30), ("B", 1), ("", 1)):
        number = text.upper().removesuffix(unit)
        if text.upper().endswith(unit) and number.isdecimal() and 0 < int(number) * factor <= 2**40:
            return int(number) * factor
    raise BadInput(f"{text!r} is no size", where=where, mend="write for instance 1KB or 256MB")


def spots_of(job: Job, split: Sequence[Partition], hosts: Sequence[int], device: str) -> list[Spot]:
    """Every point, once; the patterns of an uneven exchange also in the smaller groups, given shares only in all."""
    found: dict[str, Spot] = {}
    for partition in split:
        for part in job.parts:
            if part.pattern == GIVEN and partition.ranks != len(job.shares):
                continue
            for size in part.sizes:
                spot = Spot(part, partition, _line(job, part, partition, size, hosts, device))
                found.setdefault(spot.identity, spot)
    return list(found.values())


def counts_of(job: Job, part: Part, ranks: int, size: int) -> Ints:
    """Elements from each rank to each of an uneven all_to_all [source, destination]."""
    shares = np.tile(np.asarray(job.shares), (ranks, 1)) if part.pattern == GIVEN else pattern(part.pattern, ranks)
    return elements(shares, size // ELEMENT_BYTES)


def _line(
    job: Job, part: Part, partition: Partition, size: int, hosts: Sequence[int], device: str
) -> dict[str, Any]:  # fmt: skip
    """What identifies a point. A size is rounded so that every rank gets whole elements."""
    ranks = partition.ranks
    unit = ELEMENT_BYTES * (ranks if part.kind in ("all_to_all", "all_gather", "reduce_scatter") else 1)
    rounded = -(-size // unit) * unit
    key: dict[str, str | int] = {"path": job.backend, "gpus": ranks, "nodes": partition.nodes}
    extra: dict[str, Any] = {"group": partition.name, "groups_at_once": len(partition.groups)}
    if part.pattern:
        counts = counts_of(job, part, ranks, rounded)
        key |= endpoint(counts * ELEMENT_BYTES, [hosts[rank] for rank in partition.groups[0]])
        extra["pattern"] = job.distribution if part.pattern == GIVEN else part.pattern
        family = "uneven_all_to_all"
    elif part.beside:
        key |= {"work": part.kind, "beside": beside_name(job.backend)}
        family = "overlap"
    else:
        key["kind"] = part.kind
        family = "collective"
    return {
        "family": family, "key": key, "size": {"bytes": float(rounded)}, "kernel": job.backend, "device": device,
        "extra": extra,
    }  # fmt: skip


def beside_name(backend: str) -> str:
    """The product that runs beside, in words."""
    dtype, m, n, k = BESIDE["cuda" if backend == "nccl" else "cpu"]
    return f"{GEMM} {dtype} m={m} n={n} k={k}"


def in_words(spot: Spot) -> str:
    """A point as progress and errors call it."""
    line = spot.line
    said = f"{line['extra'].get('pattern', '')} {spot.part.kind}".strip()
    besides = f" beside {line['key']['beside']}" if spot.part.beside else ""
    return (
        f"{said} of {spot.partition.ranks} ranks on {groups.in_hosts(spot.partition.nodes)}, {spot.size} bytes{besides}"
    )


def asked_for(
    *, kinds: str, low: str, high: str, patterns: tuple[str, ...], beside: str, groups: str, shares: tuple[float, ...],
    **rest: Any,
) -> Job:  # fmt: skip
    """The job of a command line; where all_to_all is uneven, only so. Raises BadInput."""
    wanted = tuple(dict.fromkeys(kinds.split(",")))
    for kind in wanted:
        if kind not in KINDS:
            raise BadInput(f"unknown kind {kind!r}", where="--kinds", mend=f"use {', '.join(KINDS)}")
    least, most = bytes_from(low, "--from"), bytes_from(high, "--to")
    if most < least:
        raise BadInput(f"{high} is less than {low}", where="--to", mend="give a larger size")
    sizes = sizes_between(least, most)
    uneven = (*patterns, *((GIVEN,) if shares else ()))
    for name in patterns:
        pattern(name, 2)
    if uneven and "all_to_all" not in wanted:
        raise BadInput("only all_to_all can be uneven", where="--kinds", mend="add all_to_all")
    if beside not in ("", GEMM):
        raise BadInput(f"unknown work {beside!r}", where="--beside", mend=f"use {GEMM}")
    if beside and uneven:
        raise BadInput("an uneven exchange is not measured beside other work", where="--beside", mend="leave one out")
    parts = [Part(kind, sizes, beside=beside) for kind in wanted if not (uneven and kind == "all_to_all")]
    parts += [Part("all_to_all", sizes, pattern=name) for name in uneven]
    split = tuple(dict.fromkeys(groups.split(",")))
    return Job(parts=tuple(parts), groups=split, shares=shares, **rest)
