"""Results of `vllm bench serve`, `sglang.bench_serving` and AIPerf, as their clients write them.

Fields as in vllm/benchmarks/serve.py (`--save-result --save-detailed`; before it benchmarks/benchmark_serving.py) and
sglang's bench_serving.py (`--output-file --output-details`): one JSON object for each run, several one after another
where runs were appended; per request `input_lens`, `output_lens`, `ttfts`, `itls` and `errors`, newer ones of vLLM also
`start_times`; seconds. AIPerf's profile_export.jsonl holds one record for each request (docs/tutorials, "Working with
profile export files"): metrics with their units, times since the epoch in nanoseconds.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moesim.errors import BadInput
from moesim.files import kind_of, read_text
from validate.calibrate.bench_aiperf import run_of_records
from validate.calibrate.bench_run import (
    AGREEMENT,
    MOST_REQUESTS,
    MOST_S,
    MOST_TOKENS,
    BenchRun,
    checked,
    closed_loop_starts,
    shown,
)

MOST_BYTES, MOST_BURSTINESS = 2**30, 1e6
ARRAYS = ("input_lens", "output_lens", "ttfts", "itls")
_MEND = "give a result of `vllm bench serve`, `sglang.bench_serving` or AIPerf's profile_export.jsonl"
_DETAILS = "run it again with --save-detailed (vLLM) or --output-details (SGLang)"
# What only SGLang's client writes.
_SGLANG_KEYS = ("server_info", "accept_length", "dataset_name", "total_output_tokens_retokenized")


def read_runs(path: Path) -> list[BenchRun]:
    """The runs in a file. Raises BadInput in one line."""
    path = Path(path)
    where = str(path)
    if kind_of(path) == "file" and path.stat().st_size > MOST_BYTES:
        raise BadInput("the file is larger than any result", where=where, mend=_MEND)
    objects = _objects(read_text(path, what="benchmark result"), where)
    if any("metrics" in one and "metadata" in one for _, one in objects):
        runs = [run_of_records(objects, where)]
    else:
        runs = [
            _run_of_arrays(one, where if len(objects) == 1 else f"{where}, line {line}") for line, one in objects
        ]  # fmt: skip
    return [checked(run) for run in runs]


def sha256_of(path: Path) -> str:
    """Hash of a file's bytes."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _objects(text: str, where: str) -> list[tuple[int, dict[str, Any]]]:
    """The JSON objects of a file with their lines: one, or one on each line."""
    whole = _parsed(text)
    if isinstance(whole, dict):
        return [(1, whole)]
    found = []
    for line, part in enumerate(text.split("\n"), 1):
        if not part.strip():
            continue
        one = _parsed(part)
        if not isinstance(one, dict):
            fault = one if isinstance(one, str) else "not an object"
            raise BadInput(f"no JSON object ({fault})", where=f"{where}, line {line}", mend=_MEND)
        found.append((line, one))
    if not found:
        raise BadInput("the file is empty", where=where, mend=_MEND)
    return found


def _parsed(text: str) -> Any:
    """The JSON value, or what is wrong with it as text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return str(error).split("\n", maxsplit=1)[0][:80]
    return value if isinstance(value, dict) else "not an object"


def _run_of_arrays(data: dict[str, Any], where: str) -> BenchRun:
    """A run of vLLM's or SGLang's client."""
    if "duration" not in data or "completed" not in data:
        aiperf = "input_config" in data or "records" in data
        raise BadInput(
            "AIPerf's totals hold no single requests" if aiperf else "not a benchmark's result", where=where,
            mend="give profile_export.jsonl, which lies beside it" if aiperf else _MEND,
        )  # fmt: skip
    if any(key not in data for key in ARRAYS):
        raise BadInput("the result holds no single requests", where=where, mend=_DETAILS)
    rows = {key: _list(data[key], key, where) for key in ARRAYS}
    count = len(rows["ttfts"])
    for key in ("errors", "start_times"):
        if data.get(key) is not None:
            rows[key] = _list(data[key], key, where)
    for key, row in rows.items():
        if len(row) != count:
            raise BadInput(
                f"{key} holds {len(row)} requests, ttfts {count}", where=where, mend="the file is damaged: run it again"
            )
    good = [index for index in range(count) if not _failed(rows, index)]
    isl = _whole([rows["input_lens"][i] for i in good], "input_lens", where)
    osl = _whole([rows["output_lens"][i] for i in good], "output_lens", where)
    ttft_s = _seconds([rows["ttfts"][i] for i in good], "ttfts", where)
    decode_s = np.asarray([_seconds(_list(rows["itls"][i], "itls", where), "itls", where).sum() for i in good])
    _hold(data, "completed", len(good), where)
    _hold(data, "total_output_tokens", int(osl.sum()), where)
    _hold(data, "mean_ttft_ms", float(ttft_s.mean() * 1e3) if good else None, where)
    start_s, sent = None, "at the times of the file"
    concurrency, rate = _limit(data, where), _rate(data, where)
    if "start_times" in rows:
        start_s = _seconds([rows["start_times"][i] for i in good], "start_times", where, most=math.inf)
    elif rate is None or (rate < math.inf and concurrency is not None) or data.get("ramp_up_strategy") is not None:
        raise BadInput(
            "the file does not tell when requests came", where=where,
            mend="run it with one of --request-rate and --max-concurrency, or with a client that tells start_times",
        )  # fmt: skip
    elif rate == math.inf:
        latency_s = np.zeros(count)
        latency_s[good] = ttft_s + decode_s
        start_s, sent = closed_loop_starts(latency_s, concurrency or count)[good], f"{concurrency or count} at a time"
    else:
        sent = f"at {rate:g} a second, times drawn"
    sglang = any(key in data for key in _SGLANG_KEYS)
    return BenchRun(
        format="sglang" if sglang else "vllm",
        where=where,
        isl=isl,
        osl=osl,
        ttft_s=ttft_s,
        decode_s=decode_s,
        start_s=start_s,
        sent=sent,
        requests_per_s=0.0 if rate is None else rate,
        burstiness=_burstiness(data, where),
        failed=count - len(good),
        told=_told(data),
    )


def _failed(rows: dict[str, list[Any]], index: int) -> bool:
    """Failed requests have an error, and no output tokens."""
    error = rows["errors"][index] if "errors" in rows else ""
    return bool(error) or rows["output_lens"][index] == 0


def _told(data: dict[str, Any]) -> dict[str, Any]:
    server = data.get("server_info")
    server = server if isinstance(server, dict) else {}
    pairs = {
        "client_backend": data.get("backend"),
        "model": data.get("model_id") or server.get("model_path"),
        "engine_version": server.get("version") or data.get("version"),
        "date": data.get("date"),
    }
    return {key: value[:200] for key, value in pairs.items() if isinstance(value, str)}


def _list(value: Any, key: str, where: str) -> list[Any]:
    if not isinstance(value, list) or len(value) > MOST_REQUESTS:
        raise BadInput(f"{key} is no list of requests", where=where, mend="the file is damaged: run it again")
    return value


def _whole(values: Sequence[Any], key: str, where: str) -> Any:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST_TOKENS:
            raise BadInput(f"{key} holds {shown(value)}", where=where, mend="tokens are whole numbers from 1 on")
    return np.asarray(values, dtype=np.int64)


def _seconds(values: Sequence[Any], key: str, where: str, most: float = MOST_S) -> Any:
    for value in values:
        good = not isinstance(value, bool) and isinstance(value, int | float) and 0 <= value <= min(most, 1e18)
        if not good:
            raise BadInput(f"{key} holds {shown(value)}", where=where, mend="times are seconds from 0 on")
    return np.asarray(values, dtype=np.float64)


def _hold(data: dict[str, Any], key: str, found: float | None, where: str) -> None:
    """Whether a total of the file agrees with its single requests. Raises BadInput."""
    told = data.get(key)
    if told is None or found is None:
        return
    number = not isinstance(told, bool) and isinstance(told, int | float) and -1e18 <= told <= 1e18
    if not number or not abs(told - found) <= AGREEMENT * abs(found):
        raise BadInput(
            f"{key} is {shown(told)}, the single requests make {found:g}", where=where,
            mend="the file is damaged: run it again",
        )  # fmt: skip


def _limit(data: dict[str, Any], where: str) -> int | None:
    value = data.get("max_concurrency")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST_REQUESTS:
        raise BadInput(f"max_concurrency is {shown(value)}", where=where, mend="give a whole number from 1 on")
    return value


def _rate(data: dict[str, Any], where: str) -> float | None:
    """Requests a second; infinite where all are sent at once, None where the client kept times of its own."""
    value = data.get("request_rate", math.inf)
    if value == "trace":
        return None
    if value == "inf":
        return math.inf
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 1e-6:
        raise BadInput(f"request_rate is {shown(value)}", where=where, mend="give requests a second, or inf")
    return float(value) if value < 1e9 else math.inf


def _burstiness(data: dict[str, Any], where: str) -> float:
    value = data.get("burstiness", 1.0)
    if value == math.inf:  # even gaps
        return MOST_BURSTINESS
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1e-3 <= value <= MOST_BURSTINESS:
        raise BadInput(f"burstiness is {shown(value)}", where=where, mend="give a number above 0")
    return float(value)
