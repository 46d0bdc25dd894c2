"""Serving options as a user asks for them: from the scenario file to the figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moesim.cli import run
from tests.scenarios import small, write


def request(n: int) -> dict[str, Any]:
    """One of two first blocks, and a second one of its own."""
    return {"timestamp": 40 * n, "input_length": 700 + n % 5, "output_length": 8 + n % 3, "hash_ids": [n % 2, 9 + n]}


MOONCAKE = "".join(json.dumps(request(n)) + "\n" for n in range(60))


def simulated(tmp_path: Path, capsys: pytest.CaptureFixture[str], *sets: str, **serving: Any) -> dict[str, Any]:
    data = small()
    data["serving"].update(serving)
    asked = ["simulate", str(write(tmp_path, data)), "--json", "--draws", "0"]
    assert run([*asked, *(part for one in sets for part in ("--set", one))]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_trace_with_and_without_its_prefixes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "trace.jsonl").write_text(MOONCAKE)
    work = {"file": "trace.jsonl"}
    plain = simulated(tmp_path, capsys, workload=work)
    assert plain["metrics"]["requests_completed"] == 60
    assert plain["serving"]["prefix_hit_rate"] is None
    assert plain["load"]["offered_output_tokens_per_s_per_gpu"] > 0
    cached = simulated(tmp_path, capsys, "serving.batching.prefix_cache=true", workload=work)
    # Two first blocks over eight ranks in turn: a rank sees one of them again and again, and computes it once.
    assert cached["serving"]["prefix_hit_rate"] == pytest.approx(52 * 512 / sum(700 + n % 5 for n in range(60)))
    assert cached["metrics"]["ttft_s"]["mean"] < plain["metrics"]["ttft_s"]["mean"]


def test_short_memory_by_the_engines_rule(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = {"isl": 256, "osl": 400, "requests": 200, "arrivals": {"concurrency": 200}}
    whole = simulated(tmp_path, capsys, workload=work)
    capacity = whole["memory"]["kv_capacity_tokens_per_dp_rank"]
    per_token = whole["memory"]["ledger"]["kv_cache"] / capacity
    reserved = (capacity - 6000) * per_token  # leaves 6,000 tokens: nine whole contexts
    found = {
        admission: simulated(
            tmp_path, capsys, f"serving.memory.reserved_bytes={reserved}", f"serving.memory.admission={admission}",
            workload=work,
        )
        for admission in ("reserve", "engine")
    }  # fmt: skip
    assert found["reserve"]["serving"]["preemptions"] == 0
    assert found["engine"]["serving"]["preemptions"] > 0
    assert found["engine"]["serving"]["recomputed_tokens"] > 0
    for one in found.values():
        assert one["metrics"]["requests_completed"] == 200
        assert one["memory"]["peak_bytes"] <= one["memory"]["limit_bytes"] * (1 + 1e-9)
    assert whole["metrics"]["tpot_s"] != found["reserve"]["metrics"]["tpot_s"]


def test_balancing_bursts_and_mixed_chunks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gamma = {"gamma": {"requests_per_s": 400, "burstiness": 0.2}}
    work = {"isl": 256, "osl": 24, "requests": 120, "arrivals": gamma}
    in_turn = simulated(tmp_path, capsys, workload=work)
    assert in_turn["load"]["offered_output_tokens_per_s_per_gpu"] == pytest.approx(400 * 24 / 8)
    for option in ("serving.balance=fewest_tokens", "serving.batching.mixed_chunk=true"):
        other = simulated(tmp_path, capsys, option, workload=work)
        assert other["metrics"]["requests_completed"] == 120
    assert other["metrics"]["itl_s"]["p99"] < in_turn["metrics"]["itl_s"]["p99"]


@pytest.mark.parametrize(
    ("sets", "told"),
    [
        (["serving.batching.prefix_cache=true"], "serving.batching.prefix_cache"),
        (["serving.workload={file: none.csv}"], "none.csv"),
        (["serving.workload.speed=2"], "speed"),
        (["serving.workload.arrivals={gamma: {requests_per_s: 1, burstiness: 0}}"], "burstiness"),
        (["serving.balance=fair"], "serving.balance"),
        (["serving.memory.admission=all"], "serving.memory.admission"),
    ],
)
def test_what_cannot_be_is_refused(
    sets: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["simulate", str(write(tmp_path, small())), *(part for one in sets for part in ("--set", one))]
    assert run(asked) == 2
    said = capsys.readouterr().err.strip()
    assert told in said
    assert "\n" not in said
