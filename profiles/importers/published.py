"""Read CSVs of published figures that hold costs, each known by its header, and count every row: imported or left out.

A row is left out, with a reason, where it belongs to another GPU, where its source does not say what a size or a rate
counts, or where the store has no table for it. A row whose figures contradict each other, or are no figures, is refused
by line. Latency comes first; a bandwidth becomes seconds by the definition that `bw_kind` names.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesim.errors import BadInput
from moesim.spec.presets import presets
from moesim.units import MICRO, TERA
from profiles.importers.gathered import UNKNOWN
from profiles.importers.printed import agree, number, read_printed, rounding, whole
from profiles.record import LATENCY, PUBLISHED

MB = 1e6  # a figure's axis in MB; powers of ten, as its source says nothing else
RATE_SLACK = 0.01
DERIVED_SLACK = 0.02  # derived_time_us is given to a tenth of a microsecond, rates to whole TFLOP/s
DERIVED_ROUNDING_S = 0.05 * MICRO


@dataclass(frozen=True)
class Context:
    """For which system rows are taken: its chip, the GPUs of its node, and the experts where a source is silent."""

    system: str
    gpus_per_node: int | None
    experts: int | None = None

    @property
    def chip(self) -> str:
        """The word that names the system's GPU: H800."""
        return self.system.split("_")[0].upper()


@dataclass(frozen=True)
class Published:
    """One file: its rows with their family, what was left out (reason -> rows), and how many rows it holds."""

    name: str
    rows: tuple[tuple[str, dict[str, Any]], ...]
    left_out: dict[str, int]
    total: int


class LeftOut(Exception):
    """Why a row is left out."""


class Wrong(Exception):
    """What is wrong with a row."""


Record = dict[str, str]
Convert = Callable[[Record, Context], tuple[str, dict[str, Any]]]


def context_of(system: str, experts: int | None = None, gpus_per_node: int | None = None) -> Context:
    """The context of a system; a preset tells the GPUs of its node. Raises BadInput where the option says otherwise."""
    from moesim.spec.presets import load_cluster
    from moesim.spec.scenario import ClusterChoice

    if system not in presets():
        return Context(system, gpus_per_node, experts)
    node = load_cluster(ClusterChoice(system=system)).gpus_per_node
    if gpus_per_node not in (None, node):
        raise BadInput(
            f"a node of {system} carries {node} GPUs, not {gpus_per_node}", where="--gpus-per-node", mend="leave it out"
        )
    return Context(system, node, experts)


def read_published(path: Path, context: Context) -> Published:
    """Read one CSV. Raises BadInput that names the file and the line."""
    return published_of(read_printed(path, "published figures"), str(path), context)


def published_of(text: str, where: str, context: Context) -> Published:
    """The rows of a CSV's text; `where` names it in errors. Raises BadInput that names the line."""
    from profiles.importers.published_tables import KNOWN

    lines = records(text, where)
    _, header = next(lines, (1, []))
    converters = [convert for columns, convert in KNOWN if columns == tuple(header)]
    if not converters:
        raise BadInput(
            f"columns {', '.join(header)[:80]!r} are not those of a known table", where=f"{where}:1",
            mend="give the CSV with its header; docs/reference/profiles.md lists the headers",
        )  # fmt: skip
    rows: list[tuple[str, dict[str, Any]]] = []
    left_out: Counter[str] = Counter()
    total = 0
    for at, values in lines:
        total += 1
        place = f"{where}:{at}"
        if len(values) != len(header):
            raise BadInput(f"{len(values)} fields, the header has {len(header)}", where=place, mend="mend the line")
        try:
            rows.append(converters[0](dict(zip(header, (value.strip() for value in values), strict=True)), context))
        except LeftOut as reason:
            left_out[str(reason)] += 1
        except Wrong as fault:
            raise BadInput(str(fault), where=place, mend="correct the line from its source") from None
    if not total:
        raise BadInput("no row below the header", where=where, mend="give the whole table")
    return Published(Path(where).name, tuple(rows), dict(left_out), total)


def records(text: str, where: str) -> Iterator[tuple[int, list[str]]]:
    """The fields of each record with the line it begins in; blank lines are passed over."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    begins = 1
    while True:
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise BadInput(
                f"not CSV ({error})", where=f"{where}:{max(reader.line_num, 1)}", mend="mend the quotes of the line"
            ) from None
        if values:
            yield begins, values
        begins = reader.line_num + 1


def positive(row: Record, name: str) -> float:
    """A figure above zero. Raises Wrong."""
    value = number(row[name])
    if not value:
        raise Wrong(f"{name} is {row[name][:20]!r}, no finite figure above zero")
    return value


def count(row: Record, name: str) -> int:
    """A whole number above zero. Raises Wrong."""
    value = whole(row[name])
    if not value:
        raise Wrong(f"{name} is {row[name][:20]!r}, no whole number above zero")
    return value


def optional(row: Record, name: str) -> float | None:
    """A figure, 0 included, or None where the field is empty. Raises Wrong."""
    if not row[name]:
        return None
    value = number(row[name])
    if value is None:
        raise Wrong(f"{name} is {row[name][:20]!r}, no finite figure")
    return value


def near(one: float, row: Record, name: str, *computed_from: str) -> None:
    """Raise Wrong where a computed figure is not the one in the row, within the rounding of all figures in play."""
    blur = sum(rounding(row[source]) / float(row[source]) for source in computed_from)
    if optional(row, name) is not None and not agree(one, row[name], RATE_SLACK, blur):
        raise Wrong(f"{name} is {row[name]}, but {' and '.join(computed_from)} make {one:.4g}")


def same_seconds(seconds: float, row: Record) -> None:
    """Raise Wrong where `derived_time_us` is not the rate's time."""
    derived = positive(row, "derived_time_us") * MICRO
    if abs(derived - seconds) > DERIVED_ROUNDING_S + DERIVED_SLACK * seconds:
        raise Wrong(f"derived_time_us is {row['derived_time_us']}, but the rate makes {seconds * 1e6:.4g}")


def of_this_gpu(text: str, context: Context) -> str:
    """The text that names the GPU. Raises LeftOut where it is another's, or the source names none."""
    if re.search(r"\bnot (?:stated|printed)\b", text):
        raise LeftOut("the source does not name the GPU")
    if not re.search(rf"(?<![A-Za-z0-9]){re.escape(context.chip)}(?![0-9])", text):
        raise LeftOut("of another GPU")
    return text


def nodes_of(gpus: int, context: Context) -> int:
    """Nodes that so many GPUs fill. Raises LeftOut where the GPUs of a node are not known."""
    if context.gpus_per_node is None:
        raise LeftOut("the GPUs of a node are not known (give --gpus-per-node)")
    return -(-gpus // context.gpus_per_node)


def product(row: Record, context: Context, *, m: str, dtype: str, device: str, kernel: str) -> dict[str, Any]:
    """A row of `gemm` from a rate: 2 m n k floating-point operations over it."""
    rows, n, k = (count(row, name) for name in (m, "n", "k"))
    seconds = 2.0 * rows * n * k / (positive(row, "tflops") * TERA)
    return {
        "dtype": dtype, "n": n, "k": k, "m": float(rows), LATENCY: seconds,
        **provenance(row, context, engine=PUBLISHED, device=device, kernel=kernel),
    }  # fmt: skip


def provenance(
    row: Record, context: Context, *, engine: str, device: str, kernel: str, version: str = ""
) -> dict[str, Any]:
    """Where a row comes from; `package` is its source."""
    return {
        "system": context.system, "engine": engine, "version": version or UNKNOWN, "kernel": kernel, "device": device,
        "package": row["src"], "package_version": row.get("commit") or UNKNOWN, "tag": "measured",
    }  # fmt: skip


def reasons(files: Sequence[Published]) -> dict[str, dict[str, Any]]:
    """By file: rows that it holds, rows imported, rows left out by reason."""
    return {one.name: {"rows": one.total, "imported": len(one.rows), "left_out": one.left_out} for one in files}
