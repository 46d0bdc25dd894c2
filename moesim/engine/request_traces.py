"""Request traces from files: when requests came, how long they were, and which prompt blocks they share.

Columns as published: Azure (`TIMESTAMP,ContextTokens,GeneratedTokens`; Azure/AzurePublicDataset), BurstGPT
(`Timestamp,…,Request tokens,Response tokens,…`; arXiv:2401.17644) and Mooncake (JSON lines with `timestamp` in ms,
`input_length`, `output_length` and `hash_ids` of 512 tokens each; arXiv:2407.00079).
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.engine.serving import PromptBlocks
from moesim.errors import BadInput
from moesim.files import read_text

MOONCAKE_BLOCK_TOKENS = 512
# No request of any published trace comes near; a larger figure is a damaged one.
MOST_TOKENS = 10_000_000

_MEND = "a trace is Azure's or BurstGPT's CSV or Mooncake's JSON lines"
_AZURE_TIME = re.compile(r"(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d:\d\d)(\.\d+)?(Z|[+-]\d\d:\d\d)?")


@dataclass(frozen=True)
class RequestTrace:
    """Requests in the order of their times.

    arrival_s [requests], the first at 0; isl, osl [requests] in tokens. blocks: of prompts, where the file has hashes.
    layout: "azure", "burstgpt" or "mooncake". failed: requests left out because they failed (BurstGPT's, with no
    response).
    """

    arrival_s: NDArray[np.float64]
    isl: NDArray[np.int64]
    osl: NDArray[np.int64]
    blocks: PromptBlocks | None
    layout: str
    failed: int


@dataclass(frozen=True)
class _Row:
    time_s: float
    isl: int
    osl: int
    hashes: tuple[int, ...] = ()


def read_request_trace(path: Path) -> RequestTrace:
    """Read a trace whose layout its first line tells. Raises BadInput with file and line."""
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise BadInput(
            f"cannot read the request trace ({getattr(error, 'strerror', None) or error})",
            where=str(path),
            mend="give a path to a readable file",
        ) from None
    return _read(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=4)
def _read(path: Path, _changed_ns: int, _size: int) -> RequestTrace:
    text = read_text(path, what="request trace").removeprefix("\ufeff")
    if text.lstrip()[:1] == "{":
        return _trace(list(_mooncake_rows(text, path)), "mooncake", 0, path)
    rows, layout, failed = _csv_rows(text, path)
    return _trace(rows, layout, failed, path)


def _trace(rows: list[_Row], layout: str, failed: int, path: Path) -> RequestTrace:
    if not rows:
        raise BadInput("the trace has no requests", where=str(path), mend=_MEND)
    rows = sorted(rows, key=lambda row: row.time_s)  # stable: requests of one instant stay in the file's order
    times = np.asarray([row.time_s for row in rows])
    blocks = None
    if layout == "mooncake":
        offsets = np.concatenate([[0], np.cumsum([len(row.hashes) for row in rows])]).astype(np.int64)
        hashes = np.asarray([one for row in rows for one in row.hashes], dtype=np.int64)
        blocks = PromptBlocks(MOONCAKE_BLOCK_TOKENS, offsets, hashes)
    return RequestTrace(
        arrival_s=times - times[0],
        isl=np.asarray([row.isl for row in rows], dtype=np.int64),
        osl=np.asarray([row.osl for row in rows], dtype=np.int64),
        blocks=blocks,
        layout=layout,
        failed=failed,
    )


def _csv_rows(text: str, path: Path) -> tuple[list[_Row], str, int]:
    """Rows of a CSV trace, its layout, and how many failed requests were left out."""
    reader = csv.reader(text.split("\n"), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        found = [layout for layout in _LAYOUTS if set(layout.names) <= set(header)]
        if not found:
            raise BadInput("no known columns in the first line", where=f"{path}:1", mend=_MEND)
        layout = found[0]
        at = [header.index(name) for name in layout.names]
        rows, failed = [], 0
        for cells in reader:
            where = f"{path}:{reader.line_num}"
            if not cells or cells == [""]:
                continue
            if len(cells) != len(header):
                raise BadInput(f"{len(cells)} cells under {len(header)} columns", where=where, mend="mend the line")
            time, isl, osl = (cells[place].strip() for place in at)
            if layout.name == "burstgpt" and osl == "0":
                failed += 1
                continue
            rows.append(
                _Row(
                    _value(layout.time_of, time, layout.names[0], where),
                    _count(isl, layout.names[1], where),
                    _count(osl, layout.names[2], where),
                )
            )
    except csv.Error as error:
        raise BadInput(f"not valid CSV: {error}", where=f"{path}:{reader.line_num}", mend="mend the line") from None
    return rows, layout.name, failed


def _mooncake_rows(text: str, path: Path) -> Iterator[_Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            data: Any = json.loads(line)
        except (ValueError, RecursionError):
            raise BadInput("not a JSON object", where=where, mend="each line is one request") from None
        if not isinstance(data, dict):
            raise BadInput("not a JSON object", where=where, mend="each line is one request")
        missing = [name for name in ("timestamp", "input_length", "output_length") if name not in data]
        if missing:
            raise BadInput(f"{', '.join(missing)} missing", where=where, mend=_MEND)
        isl, osl = (_count(data[name], name, where) for name in ("input_length", "output_length"))
        hashes = data.get("hash_ids", [])
        if not isinstance(hashes, list) or not all(type(one) is int and 0 <= one < 2**62 for one in hashes):
            raise BadInput("hash_ids is no list of whole numbers", where=where, mend="mend the line")
        if len(hashes) > -(-isl // MOONCAKE_BLOCK_TOKENS):
            raise BadInput(
                f"{len(hashes)} hash_ids for {isl} tokens: blocks are of {MOONCAKE_BLOCK_TOKENS} tokens",
                where=where,
                mend="mend the line",
            )
        yield _Row(_value(float, data["timestamp"], "timestamp", where) / 1e3, isl, osl, tuple(hashes))


def _value(read: Callable[[Any], float], given: Any, name: str, where: str) -> float:
    try:
        found = read(given) if not isinstance(given, bool) else math.nan
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found) or abs(found) > 1e15:
        raise BadInput(f"{name} is no time: {given!r:.40}", where=where, mend="mend the line")
    return found


def _count(given: Any, name: str, where: str) -> int:
    """A whole number of tokens, at least 1; `374`, `374.0` and JSON numbers are read."""
    try:
        found = float(given) if not isinstance(given, bool) else math.nan
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not (1 <= found <= MOST_TOKENS and found == int(found)):
        raise BadInput(f"{name} is no number of tokens from 1 on: {given!r:.40}", where=where, mend="mend the line")
    return int(found)


def _seconds(given: str) -> float:
    return float(given)


def _azure_time(given: str) -> float:
    """Seconds of `2023-11-16 18:15:46.6805900`, with or without an offset from UTC."""
    found = _AZURE_TIME.fullmatch(given)
    if found is None:
        raise ValueError(given)
    day, clock, fraction, zone = found.groups()
    offset = "+00:00" if zone in (None, "Z") else zone
    return datetime.fromisoformat(f"{day}T{clock}{offset}").timestamp() + float(fraction or 0)


class _Layout(NamedTuple):
    """Columns of time, input and output tokens in a CSV trace."""

    name: str
    names: tuple[str, str, str]
    time_of: Callable[[str], float]


_LAYOUTS = (
    _Layout("azure", ("TIMESTAMP", "ContextTokens", "GeneratedTokens"), _azure_time),
    _Layout("burstgpt", ("Timestamp", "Request tokens", "Response tokens"), _seconds),
)
