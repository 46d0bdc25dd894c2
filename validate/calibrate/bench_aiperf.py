"""AIPerf's records of single requests (profile_export.jsonl) as one run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moesim.errors import BadInput
from validate.calibrate.bench_run import AGREEMENT, MOST_S, MOST_TOKENS, BenchRun, shown

_SECONDS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "sec": 1.0, "s": 1.0}
_MEND = "give profile_export.jsonl of a streaming run, as AIPerf wrote it"
_EPOCH_NS = 1 << 62  # later than 2110


def run_of_records(objects: Sequence[tuple[int, dict[str, Any]]], where: str) -> BenchRun:
    """One run of all profiling records, in the order of their times. Raises BadInput that names the line.

    Times from the epoch in whole nanoseconds are taken from the first on before they become floats.
    """
    rows: list[tuple[int, int, int, float, float]] = []
    failed = 0
    for line, one in objects:
        place = f"{where}, line {line}"
        metadata, metrics = _mapping(one.get("metadata"), "metadata", place), one.get("metrics")
        if metadata.get("benchmark_phase", metadata.get("credit_phase", "profiling")) != "profiling":
            continue
        if metadata.get("turn_index") not in (None, 0):
            raise BadInput(
                "requests of one conversation share their prompts' beginnings, which is not replayed", where=place,
                mend="calibrate on single turns",
            )  # fmt: skip
        if one.get("error") is not None or metadata.get("was_cancelled") is True:
            failed += 1
            continue
        rows.append(_row(metadata, _mapping(metrics, "metrics", place), place))
    first = min((row[0] for row in rows), default=0)
    return BenchRun(
        format="aiperf",
        where=where,
        isl=np.asarray([row[1] for row in rows], dtype=np.int64),
        osl=np.asarray([row[2] for row in rows], dtype=np.int64),
        ttft_s=np.asarray([row[3] for row in rows], dtype=np.float64),
        decode_s=np.asarray([row[4] - row[3] for row in rows], dtype=np.float64),
        start_s=np.asarray([(row[0] - first) * 1e-9 for row in rows], dtype=np.float64),
        sent="at the times of the file",
        failed=failed,
    )


def _row(metadata: dict[str, Any], metrics: dict[str, Any], place: str) -> tuple[int, int, int, float, float]:
    """Start in ns, ISL, OSL, TTFT and latency in seconds of one record."""
    start = metadata.get("request_start_ns", metadata.get("timestamp_ns"))
    if isinstance(start, bool) or not isinstance(start, int) or not 0 <= start < _EPOCH_NS:
        raise BadInput(f"request_start_ns is {shown(start)}", where=place, mend=_MEND)
    isl = _tokens(metrics, "input_sequence_length", place)
    osl = _tokens(metrics, "output_sequence_length", place)
    ttft_s = _time(metrics, "time_to_first_token" if "time_to_first_token" in metrics else "ttft", place)
    latency_s = _time(metrics, "request_latency", place)
    if latency_s < ttft_s:
        raise BadInput("the last token came before the first", where=place, mend=_MEND)
    if osl > 1 and "inter_token_latency" in metrics:
        told, found = _time(metrics, "inter_token_latency", place), (latency_s - ttft_s) / (osl - 1)
        if abs(told - found) > AGREEMENT * found:
            raise BadInput(
                f"inter_token_latency is {told:g} s, latency and length make {found:g} s", where=place, mend=_MEND
            )
    return start, isl, osl, ttft_s, latency_s


def _mapping(value: Any, key: str, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadInput(f"the record has no {key}", where=place, mend=_MEND)
    return value


def _figure(metrics: dict[str, Any], key: str, place: str) -> tuple[float, Any]:
    one = metrics.get(key)
    value = one.get("value") if isinstance(one, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1e18:
        raise BadInput(f"{key} is {shown(value)}", where=place, mend=_MEND)
    return value, one.get("unit")  # type: ignore[union-attr]


def _time(metrics: dict[str, Any], key: str, place: str) -> float:
    value, unit = _figure(metrics, key, place)
    seconds = value * _SECONDS.get(unit, float("nan")) if isinstance(unit, str) else float("nan")
    if not seconds <= MOST_S:
        raise BadInput(f"{key} is {value:g} in {shown(unit)}", where=place, mend=f"use {', '.join(_SECONDS)}")
    return float(seconds)


def _tokens(metrics: dict[str, Any], key: str, place: str) -> int:
    value, unit = _figure(metrics, key, place)
    if unit != "tokens" or value != int(value) or not 1 <= value <= MOST_TOKENS:
        raise BadInput(f"{key} is {shown(value)} in {shown(unit)}", where=place, mend=_MEND)
    return int(value)
