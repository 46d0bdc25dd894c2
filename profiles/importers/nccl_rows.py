"""Runs of nccl-tests become rows of the `collective` family; options fill what a log does not tell, nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesim.errors import BadInput
from profiles.importers.gathered import UNKNOWN
from profiles.importers.nccl_tests import KINDS, NcclRun, kind_meant, read_nccl_log
from profiles.record import LATENCY
from profiles.whose import System

PATH = "nccl"  # RCCL has NCCL's interface and stands in its place
KERNELS = {"nccl": "NCCL", "rccl": "RCCL"}


@dataclass(frozen=True)
class Given:
    """What the command line says of all logs; None where it says nothing."""

    kind: str | None = None
    gpus: int | None = None
    nodes: int | None = None


@dataclass(frozen=True)
class CollectiveRows:
    """Rows with their family, what was left out (reason -> lines), and the conditions of each run."""

    rows: tuple[tuple[str, dict[str, Any]], ...]
    left_out: dict[str, int]
    measured: tuple[dict[str, Any], ...]

    @property
    def engine(self) -> str:
        """Whose library ran."""
        return " and ".join(sorted({str(row["engine"]) for _, row in self.rows}))


def read_collectives(paths: Sequence[Path], system: System, given: Given) -> CollectiveRows:
    """The rows of all logs at these paths, as `collectives_of`."""
    return collectives_of([(str(path), read_nccl_log(path)) for path in paths], system, given)


def collectives_of(logs: Sequence[tuple[str, Sequence[NcclRun]]], system: System, given: Given) -> CollectiveRows:
    """The rows of all logs, each with its path. Raises BadInput that names the file and, where there is one, the line.

    Refused: what neither the log nor an option tells, an option that the log contradicts, GPUs of several kinds or of
    another kind than the system's.
    """
    rows: list[tuple[str, dict[str, Any]]] = []
    left_out: Counter[str] = Counter()
    measured: list[dict[str, Any]] = []
    devices: set[str] = set()
    asked = None if given.kind is None else kind_meant(given.kind)
    for path, runs in logs:
        for run in runs:
            place = f"{path}:{run.lines[0]}"
            if run.empty_sizes:
                left_out["sizes of 0 bytes"] += run.empty_sizes
            if run.program and run.kind is None:
                left_out[f"{run.program} has no table"] += len(run.points)
                continue
            kind = str(_agreed("kind", run.kind, asked, place))
            gpus = int(_agreed("gpus", run.ranks, given.gpus, place))
            nodes = int(_agreed("nodes", run.hosts, given.nodes, place))
            _check(run, kind, gpus, nodes, path)
            devices.add(run.device or UNKNOWN)
            if len(devices - {UNKNOWN}) > 1:
                raise BadInput(
                    f"the logs are of {' and of '.join(sorted(devices - {UNKNOWN}))}", where=place,
                    mend="import the logs of each kind of GPU into a folder of its own",
                )  # fmt: skip
            system.refuse_other(run.device, place)
            row = _provenance(run, system.name)
            key = {"kind": kind, "path": PATH, "gpus": gpus, "nodes": nodes}
            rows += [("collective", {**key, "bytes": size, LATENCY: seconds, **row}) for size, seconds in run.points]
            measured.append({"file": Path(path).name, **key, **_conditions(run)})
    if not rows:
        told = "; ".join(f"{count} lines: {reason}" for reason, count in left_out.items())
        raise BadInput(f"nothing to import ({told})", where=logs[0][0], mend=f"run one of {', '.join(KINDS)}")
    return CollectiveRows(tuple(rows), dict(left_out), tuple(measured))


def _agreed(name: str, read: str | int | None, option: str | int | None, place: str) -> str | int:
    """What the log says, or the option where the log says nothing; the two may not differ."""
    if read and option is not None and read != option:
        raise BadInput(f"the log says {name} {read}, not {option}", where=place, mend=f"leave --{name} out")
    if not read and option is None:
        raise BadInput(f"the log does not tell its {name}", where=place, mend=f"give --{name}")
    return read or option or 0


def _check(run: NcclRun, kind: str, gpus: int, nodes: int, path: str) -> None:
    place = f"{path}:{run.lines[0]}"
    if kind not in KINDS.values():
        raise BadInput(f"unknown kind {kind!r}", where="--kind", mend=f"use one of: {', '.join(KINDS.values())}")
    if gpus < 2:
        raise BadInput("one rank alone exchanges nothing", where=place, mend="run over two GPUs or more")
    if gpus % nodes:
        raise BadInput(f"{gpus} GPUs are not equal parts on {nodes} nodes", where=place, mend="correct --nodes")
    line = run.fits(kind, gpus)
    if line is not None:
        raise BadInput(
            f"busbw is not that of {kind} over {gpus} GPUs", where=f"{path}:{line}",
            mend="correct --kind or --gpus, or keep the log as printed",
        )  # fmt: skip


def _provenance(run: NcclRun, system: str) -> dict[str, Any]:
    return {
        "system": system,
        "engine": run.engine,
        "version": run.version or UNKNOWN,
        "kernel": KERNELS[run.engine],
        "device": run.device or UNKNOWN,
        "package": f"{run.engine}-tests",
        "package_version": run.suite_version or UNKNOWN,
        "tag": "measured",
    }


def _conditions(run: NcclRun) -> dict[str, Any]:
    told = {"device": run.device, "version": run.version, "date": run.date}
    return {"times": "out of place", **{name: value for name, value in told.items() if value}}
