"""Reading benchmark results: several runs in a file, failed requests, older names of AIPerf, rates and limits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.errors import BadInput
from tests import bench_writers as written
from validate.calibrate.bench_files import read_runs
from validate.calibrate.bench_run import closed_loop_starts

REQUESTS = 30


def client(seed: int = 0) -> written.Client:
    rng = np.random.default_rng(seed)
    osl = rng.integers(2, 6, REQUESTS).tolist()
    itls = [rng.uniform(0.01, 0.02, tokens - 1).tolist() for tokens in osl]
    isl = rng.integers(10, 90, REQUESTS).tolist()
    return written.Client(isl, osl, np.sort(rng.uniform(0, 3, REQUESTS)), rng.uniform(0.05, 0.1, REQUESTS), itls)


def test_appended_runs_are_read_one_by_one(tmp_path: Path) -> None:
    """`--append-result` of vLLM and every second run of SGLang's client add a line."""
    lines = [written.vllm(client(seed), concurrency=None) for seed in (1, 2)]
    runs = read_runs(written.write(tmp_path / "two.json", lines))
    assert [run.where.rpartition(", ")[2] for run in runs] == ["line 1", "line 2"]
    assert runs[0].isl.tolist() == client(1).isl
    assert runs[1].isl.tolist() == client(2).isl
    lines.append(lines[0] | {"itls": None})
    with pytest.raises(BadInput, match=r"line 3: itls is no list"):
        read_runs(written.write(tmp_path / "three.json", lines))


def test_a_failed_request_is_left_out(tmp_path: Path) -> None:
    one = client()
    data = written.vllm(one, concurrency=None)
    for key, value in (("output_lens", 0), ("ttfts", 0.0), ("itls", []), ("errors", "timeout")):
        data[key][7] = value
    data |= {"completed": REQUESTS - 1, "failed": 1, "total_output_tokens": sum(data["output_lens"])}
    data["mean_ttft_ms"] = float(np.delete(one.ttft_s, 7).mean() * 1e3)
    run = read_runs(written.write(tmp_path / "one.json", data))[0]
    assert (run.requests, run.failed) == (REQUESTS - 1, 1)
    assert run.isl.tolist() == one.isl[:7] + one.isl[8:]


def test_one_output_token_has_no_token_time(tmp_path: Path) -> None:
    data = written.sglang(client(), concurrency=3)
    data["total_output_tokens"] -= data["output_lens"][0] - 1
    data["output_lens"][0], data["itls"][0] = 1, []
    run = read_runs(written.write(tmp_path / "one.json", data))[0]
    assert np.isnan(run.tpot_s[0])
    assert np.isfinite(run.tpot_s[1:]).all()


@pytest.mark.parametrize(
    ("rate", "concurrency", "sent", "paired"),
    [
        ("inf", None, "30 at a time", True),
        (float("inf"), 4, "4 at a time", True),
        (12.5, None, "at 12.5 a second, times drawn", False),
    ],
)
def test_how_requests_were_sent_without_times(
    rate: Any, concurrency: int | None, sent: str, paired: bool, tmp_path: Path
) -> None:
    one = client()
    run = read_runs(written.write(tmp_path / "one.json", written.sglang(one, concurrency=concurrency, rate=rate)))[0]
    assert run.sent == sent
    assert run.paired is paired
    if paired:
        assert run.start_s is not None
        np.testing.assert_allclose(run.start_s, closed_loop_starts(one.latency_s, concurrency or REQUESTS))


def test_times_of_the_file_count_whatever_the_rate_and_the_limit(tmp_path: Path) -> None:
    data = written.vllm(client(), concurrency=5, rate=9.0)
    run = read_runs(written.write(tmp_path / "one.json", data))[0]
    assert run.start_s is not None
    np.testing.assert_allclose(run.start_s, client().start_s - client().start_s[0], atol=1e-9)
    assert run.sent == "at the times of the file"


def test_older_names_warm_ups_and_cancelled_requests_of_aiperf(tmp_path: Path) -> None:
    """Of 2025: timestamp_ns, ttft, credit_phase. Records of another phase are no part of the run."""
    records = written.aiperf(client())
    for record in records:
        metadata, metrics = record["metadata"], record["metrics"]
        metadata["timestamp_ns"] = metadata.pop("request_start_ns")
        metadata["credit_phase"] = metadata.pop("benchmark_phase")
        metrics["ttft"] = metrics.pop("time_to_first_token")
        metrics["request_latency"] = {"value": metrics["request_latency"]["value"] / 1e3, "unit": "sec"}
    warm = json.loads(json.dumps(records[0]))
    warm["metadata"]["credit_phase"] = "warmup"
    lost = json.loads(json.dumps(records[3]))
    lost |= {
        "metrics": {"error_isl": {"value": 5, "unit": "tokens"}},
        "error": {"code": 499, "type": "x", "message": ""},
    }
    run = read_runs(written.write(tmp_path / "old.jsonl", [warm, *records, lost]))[0]
    assert (run.format, run.requests, run.failed) == ("aiperf", REQUESTS, 1)
    order = np.argsort(client().start_s)
    np.testing.assert_allclose(run.ttft_s, client().ttft_s[order])
    np.testing.assert_allclose(run.ttft_s + run.decode_s, client().latency_s[order])
