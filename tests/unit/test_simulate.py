"""`simulate` on a small scenario: the contract's keys, determinism, and fidelities that agree."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.cli import run
from moesim.engine.deployment import groundwork, resolve
from moesim.engine.draws import Draw
from moesim.engine.simulate import simulate
from moesim.engine.stepmodel import StepModel
from moesim.errors import OutsideProfile
from moesim.graph.pricing import Pricer
from moesim.spec.scenario import load_scenario
from tests.scenarios import small, write

RATES = ("input_tokens_per_s", "output_tokens_per_s", "total_tokens_per_s")
LATENCIES = ("ttft_s", "tpot_s", "itl_s", "e2e_s")


def simulated(path: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert run(["simulate", str(path), "--json", *arguments]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    found: dict[str, Any] = json.loads(printed)
    return found


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path, small())


def test_json_has_the_contracts_keys(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = simulated(path, capsys, "--draws", "4")
    metrics = result["metrics"]
    assert result["schema_version"] == 1
    assert metrics["requests_completed"] == 120
    claims = [one["claim"] for one in result["validation"]]
    assert claims == ["serving_time", "placement_gain", "exchange_time", "expert_time"]
    assert "validated" not in {one["status"] for one in result["validation"]}
    for rate in RATES:
        assert metrics[f"{rate}_per_gpu"] == pytest.approx(metrics[rate] / 8)
    for name in LATENCIES:
        assert set(metrics[name]) == {"mean", "p50", "p90", "p99"}
        assert metrics[name]["p50"] <= metrics[name]["p90"] <= metrics[name]["p99"]
        assert result["intervals"][f"{name}.p50"]["low"] <= result["intervals"][f"{name}.p50"]["high"]
    assert result["intervals"]["output_tokens_per_s"]["level"] == 0.9
    assert set(result["step"]) >= {"by_operation_s", "exposed_communication_s", "by_rank_s"}
    assert len(result["step"]["by_rank_s"]) == 8
    assert result["routing"]["max_over_mean"] >= 1
    assert result["routing"]["per_step_max_over_mean"] >= result["routing"]["max_over_mean"]
    assert result["routing"]["dropped_fraction"] == 0
    assert result["memory"]["peak_bytes"] <= result["memory"]["limit_bytes"]
    assert sum(result["memory"]["ledger"].values()) == pytest.approx(result["memory"]["limit_bytes"])
    assert sum(result["provenance"].values()) == pytest.approx(1.0)
    assert set(result["run"]) >= {"seed", "wall_s", "cpu_s", "steps", "events"}


def test_same_seed_same_result_but_for_run(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (simulated(path, capsys, "--draws", "3") for _ in range(2))
    other = simulated(path, capsys, "--draws", "3", "--seed", "5")
    for result in (first, second, other):
        result.pop("run")
    assert first == second
    assert first["metrics"] != other["metrics"]


def test_a_person_gets_tables(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["simulate", str(path), "--draws", "2", "--set", "objective.slo.ttft_p99_ms=1000"]) == 0
    printed = capsys.readouterr().out
    for wanted in ("output tokens/s/GPU", "TPOT p99 (ms)", "experts", "Memory", "formula", "SLO ttft_s.p99"):
        assert wanted in printed


def test_a_person_is_told_that_the_routing_is_made_up(path: Path, tmp_path: Path, capsys) -> None:
    said = "The routing is generated (lognormal), not recorded"
    assert run(["simulate", str(path), "--draws", "0"]) == 0
    assert capsys.readouterr().out.count(said) == 1
    counts = np.random.default_rng(0).integers(50, 100, (16, 64))
    (tmp_path / "a.json").write_text(json.dumps({"logical_count": counts.tolist()}))
    recorded = write(tmp_path, small(routing={"loads": [{"file": "a.json"}]}), "recorded.yaml")
    assert run(["simulate", str(recorded), "--draws", "0"]) == 0
    assert "is generated" not in capsys.readouterr().out


def test_no_draws_no_intervals(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert simulated(path, capsys, "--draws", "0")["intervals"] == {}


@pytest.mark.parametrize("schedule", ["sequential", "two_batch"])
def test_the_table_follows_maxplus(schedule: str, tmp_path: Path) -> None:
    """Two fidelities of the same run: median latencies agree to a few percent, as the table averages routing."""
    scenario = load_scenario(write(tmp_path, small(policies={"schedule": schedule})))
    deployment = resolve(groundwork(scenario))
    table = simulate(deployment, draws=0).served
    exact = simulate(deployment, draws=0, fidelity="maxplus").served

    def median_tpot(served: Any) -> float:
        return float(np.median((served.finish_s - served.first_token_s) / (served.osl - 1)))

    assert median_tpot(table) == pytest.approx(median_tpot(exact), rel=0.05)
    assert np.median(table.first_token_s - table.arrival_s) == pytest.approx(
        np.median(exact.first_token_s - exact.arrival_s), rel=0.1
    )


def test_the_timeline_is_a_trace_of_every_rank(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    simulated(path, capsys, "--draws", "0", "--timeline", str(tmp_path / "t.json.gz"))
    with gzip.open(tmp_path / "t.json.gz", "rt") as stream:
        events = json.load(stream)["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    shown = {names[event["pid"]] for event in events if event["ph"] == "X"}
    assert shown == {*(f"rank {rank}" for rank in range(8)), "critical path", "steps"}
    assert {names[event["pid"]] for event in events if event["ph"] in "Cb"} == {"batch", "requests"}
    assert sum(event["ph"] == "b" for event in events) == 3 * 120


@pytest.mark.parametrize(
    ("parallel", "backend"),
    [
        ({"tp": 8, "expert_tp": 8}, "allreduce"),
        ({"tp": 8, "ep": 8}, "allreduce"),
        ({"tp": 2, "attention_dp": 4, "ep": 8}, "deepep"),
        ({"attention_dp": 8, "ep": 8}, "allgather_reducescatter"),
        ({"attention_dp": 8, "ep": 8}, "alltoall"),
        ({"attention_dp": 4, "ep": 4}, "deepep"),
        ({"tp": 1}, "allreduce"),
    ],
)
@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_every_layout_runs(
    parallel: dict[str, int], backend: str, engine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = small(
        parallel=parallel,
        policies={"dispatch": {"backend": backend}},
        placement={"solver": "contiguous"},
        engine={"name": engine, "version": "1"},
    )
    result = simulated(write(tmp_path, data), capsys, "--draws", "0")
    assert result["metrics"]["requests_completed"] == 120
    gpus = parallel.get("tp", 1) * parallel.get("attention_dp", 1)
    assert result["plan"]["instances"] == 8 // gpus
    assert len(result["step"]["by_rank_s"]) == gpus


def test_more_load_is_served_faster_until_it_is_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rates, waits = [], []
    for rate in (50, 400, 3200):
        data = small()
        data["serving"]["workload"]["arrivals"] = {"poisson": {"requests_per_s": rate}}
        metrics = simulated(write(tmp_path, data), capsys, "--draws", "0")["metrics"]
        rates.append(metrics["output_tokens_per_s"])
        waits.append(metrics["ttft_s"]["p50"])
    assert rates == sorted(rates)
    assert waits == sorted(waits)


def test_a_closed_loop_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = small()
    data["serving"]["workload"]["arrivals"] = {"concurrency": 16}
    assert simulated(write(tmp_path, data), capsys, "--draws", "0")["metrics"]["requests_completed"] == 120


@pytest.mark.parametrize(
    ("changes", "code", "says"),
    [
        ({"policies": {"dispatch": {"mode": "low_latency"}}}, 1, "at most 128 tokens"),
        (
            {"parallel": {"tp": 2, "attention_dp": 4, "ep": 8, "rank_order": ["dp", "tp", "cp", "pp"]}},
            2,
            "parallel.rank_order",
        ),
        (
            {
                "model": "MiniMaxAI/MiniMax-M2.5",
                "cluster": {"system": "h200_sxm", "nodes": 1, "gpus_per_node": 3},
                "parallel": {"tp": 3, "ep": 1, "expert_tp": 3},
                "policies": {"dispatch": {"backend": "allreduce"}},
            },
            1,
            "8 KV heads",
        ),
    ],
)
def test_what_an_engine_refuses_is_refused(
    changes: dict[str, Any], code: int, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["simulate", str(write(tmp_path, small(**changes))), "--draws", "0"]) == code
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert says in line


def test_balance_is_of_the_load_that_the_dispatch_policy_makes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The steps are priced by it, and over nodes local-first is less even than equal shares."""
    found = {}
    for replica in ("local_first", "equal"):
        data = small(
            cluster={"system": "h200_sxm", "nodes": 2, "gpus_per_node": 8},
            parallel={"attention_dp": 16, "ep": 16},
            placement={"solver": "greedy", "redundant_experts": 16},
            policies={"dispatch": {"replica": replica}},
        )
        found[replica] = simulated(write(tmp_path, data), capsys, "--draws", "0")["routing"]
    assert found["local_first"]["max_over_mean"] > found["equal"]["max_over_mean"]
    assert found["local_first"]["per_step_max_over_mean"] > found["equal"]["per_step_max_over_mean"]


def test_a_step_below_the_priced_end_of_the_table_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    price = Pricer.price

    def refuse(self: Pricer, batch: Any, counts: Any, **more: Any) -> Any:
        if batch.tokens.sum(axis=1).min() < 8:
            raise OutsideProfile("too few tokens", where="test", mend="measure them")
        return price(self, batch, counts, **more)

    monkeypatch.setattr(Pricer, "price", refuse)
    with pytest.raises(OutsideProfile, match="too few tokens"):
        simulate(resolve(groundwork(load_scenario(path))), draws=0)


def test_a_draw_outside_the_profile_takes_the_interval_not_the_run(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = StepModel.under

    def under(self: StepModel, draw: Draw | None) -> Any:
        if draw is not None and draw.normal["gemm"] > 0:
            raise OutsideProfile("too dear", where="test", mend="measure it")
        return timed(self, draw)

    monkeypatch.setattr(StepModel, "under", under)
    result = simulated(path, capsys, "--draws", "8")
    assert result["intervals"] == {}
    assert 0 < result["run"]["draws_outside_profile"] < 8
    assert run(["simulate", str(path), "--draws", "8"]) == 0
    assert "leaves the profile" in capsys.readouterr().out
