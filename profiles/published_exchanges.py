"""Published measurements of exchanges, as CSV: rows to series of EP size and seconds.

For the leave-out alone, which needs no more than how rows of one source relate: what a row does not say is assumed, and
told. `importers/published_tables.py` makes prices of the same files, and leaves such rows out.

Columns: backend, gpu, nic, mode, op, ep, tokens_per_rank, hidden, topk, dtype, sms, latency_us, bw_GBps, bw_kind, note;
src and commit where there are some. A latency is taken where there is one. A bandwidth is bytes over seconds, and
bw_kind says whose bytes:

- RDMA or IB of a low-latency kernel: every pick of every token (DeepEP tests/test_low_latency.py);
- RDMA or IB of a normal kernel: tokens times the nodes that they visit, their own included (tests/test_internode.py;
  docs/README_Hybrid-EP.md calls it algorithm bandwidth);
- NVLink, or algorithm bandwidth inside one NVLink domain: tokens times the ranks that they visit, their own included
  (tests/test_intranode.py, tests/test_hybrid_ep.py);
- logical, `bs*min(ep,topk)`: as many copies as ranks or picks, whichever are fewer (TensorRT-LLM, tech_blog/blog18).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from moesim.errors import BadInput
from moesim.files import read_text
from moesim.network.uniform import CopyScheme, Routed
from moesim.spec.presets import load_cluster
from moesim.spec.scenario import ClusterChoice
from moesim.units import BYTES_PER_ELEMENT, GIGA, MICRO
from profiles.ep_scaling import ExchangeKind
from profiles.importers.deepep_bytes import LOW_LATENCY_HEADER_BYTES
from profiles.importers.printed import rounding
from profiles.importers.published import records

NEEDED = ("backend", "mode", "op", "ep", "latency_us")
SAME = ("src", "commit", "backend", "gpu", "nic", "mode", "op", "tokens_per_rank", "hidden", "topk", "dtype", "sms")
# What a row that does not say is taken for: DeepSeek-V3's shape, the one that such benchmarks run, and the tokens that
# DeepEP's tests send in normal and in low-latency mode.
HIDDEN, TOP_K, EXPERTS = 7168, 8, 256
TOKENS = {"node": 4096.0}
FEW_TOKENS = 128.0
# The element type that a name holds, most particular first.
DTYPES = (("fp4", "nvfp4"), ("fp8", "fp8_block"), ("int8", "int8"), ("fp32", "fp32"), ("16", "bf16"))
# The preset whose link rates a GPU's name stands for, most particular name first; h100_sxm for any other.
PRESETS = (
    ("gb300", "gb200_nvl72"), ("gb200", "gb200_nvl72"), ("nvl72", "gb200_nvl72"), ("b300", "b200_sxm"),
    ("b200", "b200_sxm"), ("h200", "h200_sxm"), ("h800", "h800"), ("h20", "h20"), ("a100", "a100_sxm"),
)  # fmt: skip
_SPREAD = re.compile(r"\+-\s*(\d+(?:\.\d+)?)")
_LOCAL = re.compile(r"(\d+) local experts")
_GROUPS = re.compile(r"top-(\d+) groups")


@dataclass(frozen=True)
class Point:
    """One row: seconds, and how far off they may be: half the last digit printed, or the spread that was told.

    counted_bytes: where the source printed a bandwidth, the bytes that it counts; else 0.
    """

    ep: int
    seconds: float
    within_s: float
    counted_bytes: float = 0.0

    def printed(self, seconds: float) -> float:
        """What the source would print for these seconds: bytes/s, or seconds."""
        return self.counted_bytes / seconds if self.counted_bytes else seconds


@dataclass(frozen=True)
class Series:
    """Rows that differ in EP size only. assumed: what no row said."""

    name: str
    kind: ExchangeKind
    tokens: float
    points: tuple[Point, ...]
    assumed: tuple[str, ...]


@dataclass
class PublishedSeries:
    """All series of a file, and rows that could not be read as seconds: reason -> count."""

    series: list[Series] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)


def read_series(path: Path) -> PublishedSeries:
    """Read a file. Raises BadInput that names the file and line."""
    lines = records(read_text(path, what="table of exchanges"), str(path))
    _, header = next(lines, (1, []))
    lacking = [name for name in NEEDED if name not in header]
    if lacking:
        raise BadInput(
            f"columns are missing: {', '.join(lacking)}", where=str(path), mend="give them in the first line"
        )
    groups: dict[tuple[str, ...], list[tuple[dict[str, str], str]]] = {}
    for at, values in lines:
        where = f"{path}:{at}"
        if len(values) != len(header):
            raise BadInput("not as many values as columns", where=where, mend="correct the line")
        row = dict(zip(header, values, strict=True))
        kept = _SPREAD.sub("", row.get("note", "")).strip()
        key = (*(row.get(name, "").strip() for name in SAME), kept)
        groups.setdefault(key, []).append((row, where))
    found = PublishedSeries()
    for rows in groups.values():
        _add(found, rows)
    return found


def _add(found: PublishedSeries, rows: list[tuple[dict[str, str], str]]) -> None:
    first, where = rows[0]
    kind, assumed = _kind(first, where)
    if first.get("tokens_per_rank", "").strip():
        tokens = _number(first, "tokens_per_rank", where)
    else:
        tokens, assumed = TOKENS.get(kind.scheme, FEW_TOKENS), (*assumed, "tokens_per_rank")
    points: dict[int, list[Point]] = {}
    for row, place in rows:
        point = _point(row, place, kind, tokens)
        if isinstance(point, str):
            found.left_out[point] = found.left_out.get(point, 0) + 1
        else:
            points.setdefault(point.ep, []).append(point)
    if points:
        middle = [sorted(same, key=lambda one: one.seconds)[len(same) // 2] for _, same in sorted(points.items())]
        words = [first.get(name, "").strip() for name in ("backend", "gpu", "mode", "op", "dtype")]
        sms = first.get("sms", "").strip()
        name = " ".join([word for word in words if word] + ([f"{sms} SMs"] if sms else []) + [f"{tokens:g} tokens"])
        found.series.append(Series(name, kind, tokens, tuple(middle), assumed))


def _kind(row: dict[str, str], where: str) -> tuple[ExchangeKind, tuple[str, ...]]:
    """How the row's kernel copies, on what hardware; and what the row does not say."""
    text = row.get("dtype", "").lower()
    dtype = next((name for word, name in DTYPES if word in text), None)
    assumed = tuple(name for name in ("hidden", "topk") if not row.get(name, "").strip())
    hidden = HIDDEN if "hidden" in assumed else _number(row, "hidden", where)
    top_k = TOP_K if "topk" in assumed else _leading(row["topk"], where)
    if dtype is None:
        dtype, assumed = "bf16", (*assumed, "dtype")
    note, scheme = row.get("note", ""), scheme_of(row["backend"], row["mode"], row["op"])
    local, groups = _LOCAL.search(note), _GROUPS.search(row.get("topk", ""))
    routed = Routed(
        top_k=top_k,
        experts=0 if local else EXPERTS,
        local_experts=int(local[1]) if local else 0,
        top_groups=int(groups[1]) if groups else 0,
        balanced="perfect_router" in note,
    )
    gpu = row.get("gpu", "").lower()
    preset = next((system for word, system in PRESETS if word in gpu), "h100_sxm")
    cluster = load_cluster(ClusterChoice(system=preset))
    header = LOW_LATENCY_HEADER_BYTES if scheme.startswith("expert") and dtype == "fp8_block" else 0
    copy_bytes = hidden * BYTES_PER_ELEMENT[dtype] + header
    rates = cluster.nic_bytes_per_s, cluster.nvlink_bytes_per_s
    return ExchangeKind(scheme, routed, copy_bytes, cluster.domain_gpus, *rates), assumed


def scheme_of(backend: str, mode: str, op: str) -> CopyScheme:
    """How a kernel copies, from its backend and mode as published tables name them."""
    words = f"{backend} {mode}".lower()
    if "all_to_all" in op.lower() or "alltoall" in op.lower():
        return "peer"
    if "normal" in mode.lower() or "sided" in words or "throughput" in words:
        return "node"
    return "expert_network" if "pure-rdma" in words or "pure rdma" in words else "expert"


def _point(row: dict[str, str], where: str, kind: ExchangeKind, tokens: float) -> Point | str:
    """The row as seconds, or why it cannot be told."""
    ep = _number(row, "ep", where)
    if ep != int(ep):
        raise BadInput(f"EP size {row['ep']}", where=where, mend="give a whole number")
    spread = _SPREAD.search(row.get("note", ""))
    if row["latency_us"].strip():
        value = _number(row, "latency_us", where)
        within = max(_half_digit(row["latency_us"]), float(spread[1]) if spread else 0.0)
        return Point(int(ep), value * MICRO, within * MICRO)
    if not row.get("bw_GBps", "").strip():
        return "neither latency nor bandwidth"
    bw_kind = row.get("bw_kind", "").strip()
    copies = _counted(bw_kind, kind, int(ep))
    if copies is None:
        return f"a bandwidth of unknown kind {bw_kind!r} and no latency"
    value, counted = _number(row, "bw_GBps", where), tokens * copies * kind.copy_bytes
    seconds = counted / (value * GIGA)
    return Point(int(ep), seconds, seconds * _half_digit(row["bw_GBps"]) / value, counted)


def _counted(bw_kind: str, kind: ExchangeKind, ep: int) -> float | None:
    """Copies of a token whose bytes a published bandwidth counts; None for a kind that is not known."""
    text, copies, picks = bw_kind.lower(), kind.copies(ep), kind.routed.top_k
    if "min(ep,topk)" in text:
        return float(min(ep, picks))
    if kind.scheme.startswith("expert"):
        return float(picks) if any(word in text for word in ("rdma", "logical", "algorithm", "nvlink")) else None
    if "rdma" in text or "(ib)" in text:
        return copies.visited_domains if copies.domains > 1 else copies.ranks
    if "nvlink" in text or (text.startswith("algorithm") and copies.domains == 1):
        return copies.ranks
    return None


def _half_digit(text: str) -> float:
    """Half of the last digit printed; tables that were retyped end whole numbers in `.0`."""
    return rounding(text.strip().removesuffix(".0"))


def _leading(text: str, where: str) -> int:
    number = re.match(r"\s*(\d+)", text)
    if not number or not 0 < int(number[1]) < 10_000:
        raise BadInput(f"topk {text!r} does not begin with a count", where=where, mend="write for instance 8")
    return int(number[1])


def _number(row: dict[str, str], name: str, where: str) -> float:
    """A finite number above 0."""
    try:
        value = float(row.get(name, ""))
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and 0.0 < value < 1e15):
        raise BadInput(f"{name} is {row.get(name, '')!r}", where=where, mend="give a number above 0")
    return value
