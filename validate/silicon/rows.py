"""Measured serving runs in the layout of `silicon_sample.csv` (aiconfigurator-core), and how their columns are read.

Aggregated rows stand in `tp_size … moe_ep_size`, disaggregated ones in `prefill_*` and `decode_*`. Concurrency stands
as text in `silicon_data_source`. Empty and zero sizes mean 1.
"""

from __future__ import annotations

import csv
import hashlib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from moesim.errors import BadInput
from moesim.files import read_text

COLUMNS = (
    "id", "silicon_data_source", "backend", "backend_version", "model_path", "system", "precision", "mode", "isl",
    "osl", "gemm_quant_mode", "moe_quant_mode", "batch_size", "tp_size", "pp_size", "attention_dp_size", "moe_tp_size",
    "moe_ep_size",
)  # fmt: skip
MEASURED = ("silicon_ttft_ms", "silicon_tpot_ms")
_CONCURRENCY = re.compile(r"silicon_concurrency=(\d+)")
_DENSE = re.compile(r"llama|qwen3-32b", re.IGNORECASE)


@dataclass(frozen=True)
class Layout:
    """Sizes of an instance as the row tells them; GPUs = tp x pp x attention_dp."""

    tp: int
    pp: int
    attention_dp: int
    expert_tp: int
    ep: int

    @property
    def gpus(self) -> int:
        """GPUs of one instance."""
        return self.tp * self.pp * self.attention_dp


@dataclass(frozen=True)
class PoolRow:
    """A role's pool of a disaggregated row: `workers` instances of a layout (0: not told), each with a batch limit."""

    layout: Layout
    workers: int
    batch: int


@dataclass(frozen=True)
class SiliconRow:
    """One run. layout and batch are of aggregated rows, prefill and decode of disaggregated ones.

    concurrency: requests in flight over the whole deployment, None where the source does not say. ttft_ms, tpot_ms: as
    measured, None where the row leaves them out; milliseconds, so that repeats are equal to the last digit.
    """

    id: str
    source: str
    engine: str
    version: str
    model: str
    system: str
    precision: str
    mode: str
    isl: int
    osl: int
    dense: str
    experts: str
    layout: Layout
    batch: int
    concurrency: int | None
    prefill: PoolRow | None
    decode: PoolRow | None
    ttft_ms: float | None
    tpot_ms: float | None

    @property
    def gpus(self) -> int:
        """GPUs of the whole deployment."""
        if self.prefill is None or self.decode is None:
            return self.layout.gpus
        return sum(pool.workers * pool.layout.gpus for pool in (self.prefill, self.decode))

    @property
    def in_flight(self) -> int | None:
        """Requests in flight at one instance: `batch_size` x attention DP where the concurrency is a multiple of it.

        Nearly everywhere the two are equal; where they are not, `batch_size` is that of each of several replicas.
        """
        each = self.batch * self.layout.attention_dp
        several = self.concurrency is not None and self.batch > 1 and self.concurrency % each == 0
        return each if several and self.aggregated else self.concurrency

    @property
    def aggregated(self) -> bool:
        """Whether one pool serves both phases."""
        return self.mode == "agg"

    @property
    def moe(self) -> bool:
        """Whether the model has routed experts: all but the Llama models and Qwen3-32B."""
        return _DENSE.search(self.model) is None

    @property
    def cell(self) -> str:
        """`even` cells calibrate, `odd` ones are only ever scored; by the hash of model, system and engine."""
        digest = hashlib.sha256(f"{self.model}|{self.system}|{self.engine}".encode()).hexdigest()
        return "odd" if int(digest, 16) % 2 else "even"

    def throughput(self, ttft_s: float, tpot_s: float) -> float:
        """Output tokens/s/GPU at these latencies: in flight x OSL / (TTFT + TPOT x (OSL - 1)) / GPUs."""
        busy_s = ttft_s + tpot_s * (self.osl - 1)
        return (self.in_flight or 0) * self.osl / busy_s / self.gpus if busy_s > 0 and self.gpus else math.nan


def read_rows(path: Path) -> list[SiliconRow]:
    """All rows of a file, in order. Raises BadInput with the file and line."""
    lines = read_text(path, what="table of runs").splitlines()
    reader = csv.DictReader(lines)
    missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        raise BadInput(
            f"no column {', '.join(missing[:4])}", where=str(path), mend="give a table as silicon_sample.csv has it"
        )
    try:
        return [_row(record, f"{path}:{reader.line_num}") for record in reader]
    except csv.Error as error:
        raise BadInput(f"not a CSV ({error})", where=f"{path}:{reader.line_num}", mend="correct the line") from None


def clean(rows: Iterable[SiliconRow]) -> list[SiliconRow]:
    """Aggregated MoE rows that a score counts: repeats once, rows with expert-TP and EP both over 1 left out."""
    seen: set[tuple[object, ...]] = set()
    found = []
    for row in rows:
        if not (row.moe and row.aggregated):
            continue
        key = (row.model, row.system, row.engine, row.isl, row.osl, row.ttft_ms, row.tpot_ms)
        if row.ttft_ms is not None and key in seen:
            continue
        seen.add(key)
        if row.layout.expert_tp == 1 or row.layout.ep == 1:
            found.append(row)
    return found


def clean_disaggregated(rows: Iterable[SiliconRow]) -> list[SiliconRow]:
    """Measured MoE rows with two pools, repeats of a measurement once."""
    found: dict[tuple[object, ...], SiliconRow] = {}
    for row in rows:
        if row.moe and not row.aggregated and row.tpot_ms is not None and row.ttft_ms is not None:
            found.setdefault((row.model, row.system, row.engine, row.isl, row.osl, row.ttft_ms, row.tpot_ms), row)
    return list(found.values())


def choice_groups(rows: Sequence[SiliconRow]) -> dict[tuple[object, ...], list[int]]:
    """Indices of rows that differ in their layout alone: same model, system, engine, types, lengths, concurrency.

    Only groups of three or more layouts. The engine's version and the source are part of the key where given, since
    another version is another system.
    """
    groups: dict[tuple[object, ...], list[int]] = {}
    for index, row in enumerate(rows):
        key = (row.model, row.system, row.engine, row.precision, row.isl, row.osl, row.concurrency)
        groups.setdefault(key, []).append(index)
    return {key: found for key, found in groups.items() if len({rows[index].layout for index in found}) >= 3}


def _row(record: dict[str, str | None], where: str) -> SiliconRow:
    def text(name: str) -> str:
        return (record.get(name) or "").strip()

    def whole(name: str, least: int = 1) -> int:
        value = text(name)
        try:
            number = float(value) if value else float(least)
        except ValueError:
            number = math.nan
        if not (0 <= number < 1e9 and number == int(number)):
            raise BadInput(f"{name} {value[:40]!r} is not a whole number", where=where, mend="correct the row")
        return max(least, int(number))

    def milliseconds(name: str) -> float | None:
        value = text(name)
        if not value:
            return None
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not (0 < number < math.inf):
            raise BadInput(
                f"{name} {value[:40]!r} is not a time", where=where, mend="correct the row or leave it empty"
            )
        return number

    def layout(prefix: str) -> Layout:
        names = ("tp_size", "pp_size", "attention_dp_size", "moe_tp_size", "moe_ep_size")
        return Layout(*(whole(f"{prefix}{name}") for name in names))

    def pool(role: str) -> PoolRow | None:
        if not (text(f"{role}_num_workers") or text(f"{role}_tp_size")):
            return None
        return PoolRow(layout(f"{role}_"), whole(f"{role}_num_workers", 0), whole(f"{role}_batch_size"))

    if not text("id") or not text("model_path"):
        raise BadInput("a row has no id or no model_path", where=where, mend="correct the row")
    stated = _CONCURRENCY.search(text("silicon_data_source"))
    mode = text("mode") or "agg"
    batch, own = whole("batch_size"), layout("")
    concurrency = int(stated.group(1)) if stated else (batch * own.attention_dp if text("batch_size") else None)
    return SiliconRow(
        id=text("id"),
        source=text("silicon_data_source"),
        engine=text("backend"),
        version=text("backend_version"),
        model=text("model_path"),
        system=text("system"),
        precision=text("precision"),
        mode=mode,
        isl=whole("isl"),
        osl=whole("osl"),
        dense=text("gemm_quant_mode"),
        experts=text("moe_quant_mode"),
        layout=own,
        batch=batch,
        concurrency=concurrency,
        prefill=pool("prefill"),
        decode=pool("decode"),
        ttft_ms=milliseconds(MEASURED[0]),
        tpot_ms=milliseconds(MEASURED[1]),
    )
