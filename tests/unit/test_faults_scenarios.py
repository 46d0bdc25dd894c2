"""Faults as a user meets them: what is refused and how, what is printed, and dead ranks with surviving replicas."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.cli import run
from moesim.engine.deployment import groundwork, resolve
from moesim.engine.faults import check_faults, orphans
from moesim.engine.simulate import simulate
from moesim.errors import BadInput
from moesim.spec.plan import ExpertPlacement
from moesim.spec.scenario import Scenario
from moesim.spec.workload import BatchingSpec, SpeculativeSpec
from tests.property.test_fuzz_scenarios import mutate
from tests.scenarios import small, write

LAYERS, EXPERTS, RANKS = 16, 64, 8


def twice_placed(folder: Path) -> dict[str, Any]:
    """A scenario whose experts stand on two ranks each: contiguous, and again one rank on."""
    block = np.arange(EXPERTS).reshape(RANKS, -1)
    slots = np.concatenate([block, np.roll(block, 1, axis=0)], axis=1).reshape(1, -1)
    table = np.repeat(slots, LAYERS, axis=0)
    ExpertPlacement(table, np.arange(LAYERS), EXPERTS, RANKS, LAYERS).write(folder / "twice.json")
    return small(placement={"file": str(folder / "twice.json")})


def test_a_dead_rank_with_survivors_goes_on_without_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = twice_placed(tmp_path) | {"faults": [{"kind": "dead_rank", "gpu": 2, "from_s": 0.05}]}
    path = write(tmp_path, data)
    for fidelity in ("table", "maxplus"):
        assert run(["simulate", str(path), "--json", "--draws", "1", "--fidelity", fidelity]) == 0
        result = json.loads(capsys.readouterr().out)
        told, metrics = result["faults"], result["metrics"]
        assert 0 < told["requests_failed"] < 120 / RANKS + 1  # only what rank 2 had begun
        assert metrics["requests_completed"] == 120 - told["requests_failed"]
        assert told["without"]["requests_completed"] == 120
        assert metrics["output_tokens_per_s"] < told["without"]["output_tokens_per_s"]
        assert result["intervals"]["tpot_s.p50"]["high"] > 0
    without = twice_placed(tmp_path)
    assert run(["simulate", str(write(tmp_path, without)), "--json", "--draws", "0", "--fidelity", "maxplus"]) == 0
    healthy = json.loads(capsys.readouterr().out)
    assert "faults" not in healthy
    assert healthy["metrics"] == told["without"]  # the paired run is the run without


def test_the_experts_of_a_dead_rank_cost_the_others_more(tmp_path: Path) -> None:
    data = twice_placed(tmp_path)
    data["serving"]["workload"] |= {"arrivals": {"concurrency": 64}, "isl": 1024}
    data["faults"] = [{"kind": "dead_rank", "gpu": 2}]
    deployment = resolve(groundwork(Scenario.read(data, where="test")))
    table, found = (simulate(deployment, draws=0, fidelity=fidelity) for fidelity in ("table", "maxplus"))  # type: ignore[arg-type]
    assert found.without_faults is not None
    assert table.served.duration_s == pytest.approx(found.served.duration_s, rel=0.02)
    assert np.isfinite(found.served.finish_s).all()  # dead from the start: nothing had begun there
    assert found.served.duration_s > found.without_faults.duration_s


def test_orphans_are_found() -> None:
    table = np.asarray([[0, 1, 2, 3, 0, 1], [0, 1, 2, 3, 2, 3]])
    placement = ExpertPlacement(table, np.asarray([3, 4]), 4, 3, 5)
    assert orphans(placement, [0]) == (4, 0)
    assert orphans(placement, [1]) == (3, 2)
    assert orphans(placement, [2]) is None


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ({"kind": "slow_gpu", "gpu": 1}, "needs factor"),
        ({"kind": "slow_gpu", "gpu": 1, "factor": 0.5}, "greater than or equal to 1"),
        ({"kind": "slow_gpu", "gpu": 8, "factor": 2}, "GPU 8 of an instance of 8"),
        ({"kind": "slow_gpu", "gpu": 1, "factor": 2, "sigma": 1}, "has no sigma"),
        ({"kind": "slow_gpu", "gpu": 1, "factor": 2, "instance": 1}, "instance 1 of 1"),
        ({"kind": "slow_gpu", "gpu": 1, "factor": 2, "from_s": 3, "to_s": 2}, "to_s must be later"),
        ({"kind": "slow_link", "gpu": 1, "link": "nic", "factor": 2}, "runs on one node"),
        ({"kind": "dead_link", "gpu": 1, "link": "nic"}, "recovery_s"),
        ({"kind": "dead_link", "gpu": 1, "link": "nvlink", "reroute": True}, "only a dead nic"),
        ({"kind": "dead_rank", "gpu": 1}, "no replica of expert"),
        ({"kind": "dead_rank", "gpu": 1, "recovery_s": 1, "to_s": 3}, "not both"),
        ({"kind": "fire"}, "slow_gpu"),
        ({"kind": "jitter", "sigma": 0.1, "colour": 1}, "known keys here: kind"),
    ],
)
def test_what_cannot_happen_is_refused_in_one_line(
    fault: dict[str, Any], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["simulate", str(write(tmp_path, small(faults=[fault]))), "--draws", "0"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert says in line
    assert "faults.0" in line


def test_ranks_that_die_one_after_the_other_are_looked_at_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = twice_placed(tmp_path)
    data["faults"] = [{"kind": "dead_rank", "gpu": 2}, {"kind": "dead_rank", "gpu": 3, "from_s": 1}]
    assert run(["simulate", str(write(tmp_path, data))]) == 2
    assert "faults.1: without GPUs 2, 3 layer 0 has no replica" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["tune", "--trials", "2"], ["place"]])
def test_commands_that_compare_whole_plans_refuse_faults(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, small(faults=[{"kind": "jitter", "sigma": 0.1}]))
    assert run([command[0], str(path), *command[1:]]) == 2
    assert f"`moesim {command[0]}` compares plans that are whole" in capsys.readouterr().err


def test_a_person_sees_both_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, small(faults=[{"kind": "dead_rank", "gpu": 0, "from_s": 0.05, "recovery_s": 1}]))
    assert run(["simulate", str(path), "--draws", "0", "--report", str(tmp_path / "r.html")]) == 0
    printed = capsys.readouterr().out
    assert "With and without the faults (1)" in printed
    assert "requests failed" in printed


def test_mutated_faults_are_read_or_refused_in_one_line() -> None:
    whole = {
        "faults": [
            {"kind": "slow_gpu", "gpu": 1, "factor": 2.0, "from_s": 1.0, "to_s": 2.0},
            {"kind": "slow_link", "gpu": 2, "link": "nvlink", "factor": 3.0, "instance": 0},
            {"kind": "dead_link", "gpu": 2, "link": "nvlink", "recovery_s": 4.0},
            {"kind": "dead_rank", "gpu": 3, "recovery_s": 1.0},
            {"kind": "jitter", "sigma": 0.2},
        ]
    }
    deployment = resolve(groundwork(Scenario.read(small(), where="test")))
    read = 0
    for seed in range(300):
        changed = mutate(whole, random.Random(seed))
        try:
            check_faults(deployment, Scenario.read({**small(), **changed}, where="test").faults)
            read += 1
        except BadInput as error:
            assert "\n" not in error.line()
    assert 10 < read < 290


def two_nodes(*faults: dict[str, Any]) -> dict[str, Any]:
    data = small(
        cluster={"system": "h200_sxm", "nodes": 2, "gpus_per_node": 8},
        parallel={"attention_dp": 16, "ep": 16},
        placement={"solver": "greedy", "redundant_experts": 16},
        faults=list(faults),
    )
    data["serving"]["workload"] |= {"requests": 32, "arrivals": {"concurrency": 32}}
    return data


@pytest.mark.parametrize("fidelity", ["table", "maxplus"])
def test_a_rerouted_nic_is_one_that_is_half_as_fast(fidelity: Any) -> None:
    found = [
        simulate(resolve(groundwork(Scenario.read(two_nodes(fault), where="test"))), draws=0, fidelity=fidelity)
        for fault in (
            {"kind": "dead_link", "gpu": 3, "link": "nic", "reroute": True},
            {"kind": "slow_link", "gpu": 5, "link": "nic", "factor": 2},
        )
    ]
    np.testing.assert_array_equal(found[0].served.finish_s, found[1].served.finish_s)
    assert found[0].without_faults is not None
    assert found[0].served.duration_s > 1.05 * found[0].without_faults.duration_s


def test_over_nodes_exchanges_go_by_the_nics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fault = {"kind": "slow_link", "gpu": 3, "link": "nvlink", "factor": 2}
    assert run(["simulate", str(write(tmp_path, two_nodes(fault)))]) == 2
    assert "exchanges over nodes go by the NICs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"serving": {"roles": {"prefill": {"gpus": 4}, "decode": {"gpus": 4}}}}, "serving.roles"),
        ({"serving": {"balance": "shortest_queue"}}, "serving.balance"),
        ({"serving": {"memory": {"admission": "engine"}}}, "serving.memory.admission"),
        (
            {"cluster": {"background": [{"kind": "stream", "gpus": [0], "to": [1], "bytes_per_s": 1e9}]}},
            "cluster.background",
        ),
    ],
)
def test_runs_that_faults_cannot_be_timed_in_are_refused_by_name(
    changes: dict[str, Any], key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = small(faults=[{"kind": "jitter", "sigma": 0.1}])
    for name, more in changes.items():
        data[name] |= more
    if "roles" in data["serving"]:
        data["parallel"] = None
    assert run(["simulate", str(write(tmp_path, data)), "--draws", "0", "--fidelity", "des"]) == 2
    captured = capsys.readouterr()
    assert f"faults: faults are not modelled together with {key}" in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"speculative": SpeculativeSpec(draft_tokens=1, acceptance=0.5)}, "serving.speculative"),
        ({"batching": BatchingSpec(prefix_cache=True)}, "serving.batching.prefix_cache"),
    ],
)
def test_drafts_and_prefix_caches_are_refused_by_name(changes: dict[str, Any], key: str) -> None:
    scenario = Scenario.read(small(faults=[{"kind": "jitter", "sigma": 0.1}]), where="test")
    deployment = resolve(groundwork(scenario))
    assert scenario.serving is not None
    odd = scenario.model_copy(update={"serving": scenario.serving.model_copy(update=changes)})
    with pytest.raises(BadInput, match=key):
        check_faults(replace(deployment, scenario=odd), scenario.faults)


def test_a_rank_may_not_die_under_a_replica_choice_that_looks_at_each_batch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = twice_placed(tmp_path) | {"faults": [{"kind": "dead_rank", "gpu": 2}]}
    data["policies"] = {"dispatch": {"replica": "lp"}}
    assert run(["simulate", str(write(tmp_path, data)), "--draws", "0"]) == 2
    assert "faults.0: how replica choice lp goes on without a rank" in capsys.readouterr().err


@pytest.mark.parametrize(
    "policies",
    [
        {"schedule": "pipeline"},
        {"schedule": "pipeline", "overlap": {"chunks": 2, "slowdown": {"compute": 1.2, "communication": 1.3}}},
        {"storage": "offload"},
        {"dispatch": {"backend": "alltoall", "replica": "lp"}},
    ],
    ids=str,
)
def test_faults_act_under_every_kind_of_schedule_storage_and_choice(policies: dict[str, Any]) -> None:
    """Never earlier in a closed loop, whose batches do not depend on time; table and single steps agree."""
    slow = [
        {"kind": "slow_gpu", "gpu": 3, "factor": 1.5},
        {"kind": "slow_link", "gpu": 2, "link": "nvlink", "factor": 2.0},
    ]
    data = small(faults=slow, policies=policies)
    data["serving"]["workload"] |= {"requests": 16, "osl": 6, "arrivals": {"concurrency": 16}}
    deployment = resolve(groundwork(Scenario.read(data, where="test")))
    durations = []
    for fidelity in ("table", "maxplus"):
        found = simulate(deployment, draws=0, fidelity=fidelity)  # type: ignore[arg-type]
        assert found.without_faults is not None
        assert (found.served.finish_s >= found.without_faults.finish_s).all()
        assert found.served.duration_s > found.without_faults.duration_s  # by little where fetches hide the faults
        durations.append(found.served.duration_s)
    assert durations[0] == pytest.approx(durations[1], rel=0.06)
