"""Records of every kind in the compact form: what each says it covers, its cases, its checks, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moesim.cli import run
from moesim.errors import BadInput, CheckFailed
from moesim.spec.evidence import Evidence
from tests.silicon_rows import row
from validate.foretold import code
from validate.records import store
from validate.records.evidence import of_paths
from validate.records.table import markdown
from validate.silicon import coverage
from validate.silicon.groups import summary
from validate.silicon.price import Prediction

HEAD = {
    "date": "2026-11-26T08:00:00+00:00", "code": "0123456789abcdef+", "hardware": {"cpu": "a processor", "cpus": 2},
    "versions": {"torch": "2.13.0"}, "measured_from": "2026-11-26T07:59:00+00:00",
    "predictions": {"file": "predictions.json", "written": "2026-11-26T07:58:59+00:00", "sha256": "ab"},
}  # fmt: skip


def lab(name: str, nodes: int, measured: float = 0.1) -> dict[str, Any]:
    """A lab of four patterns under both schemes and two exchanges at once; predictions 10 % high."""
    patterns = ["even", "skewed", "routed_contiguous", "routed_planned"]
    rows = [
        {"patterns": [one], "part": 0, "scheme": scheme, "predicted_s": 1.1 * measured, "median_s": measured,
         "p10_s": measured, "p90_s": measured}
        for one in patterns for scheme in ("flat", "two_level")
    ]  # fmt: skip
    rows += [{**rows[0], "patterns": ["even", "skewed"], "part": part} for part in (0, 1)]
    spec = {
        "name": name, "nodes": nodes, "ranks_per_node": 2, "bytes_per_rank": 10**6, "repeats": 8, "patterns": patterns,
    }  # fmt: skip
    return {"lab": spec, "cases": rows}


def fabric(**compared: Any) -> dict[str, Any]:
    won = {"contests": 3, "decided": 2, "right": 2, "wrong": []}
    found = {"error": {"median": 0.1, "p90": 0.1}, "split_half": None, "schemes": won, "placements": won, **compared}
    return {**HEAD, "kind": "validate-fabric", "labs": [lab("two", 2), lab("four", 4)], "comparison": found}


def replay(device: str = "cpu") -> dict[str, Any]:
    cases = [{"placement": name, "tokens_per_rank": tokens, "layer_s": 0.1} for name in "ab" for tokens in (8, 32)]
    goal = {"goal": "regret", "told": "9%", "limit": "at most 2%", "holds": False, "figure": 0.09}
    gpu = {"gpu": "NVIDIA H200"} if device == "cuda" else {}
    return {
        **HEAD, "kind": "validate-replay", "device": device, "dtype": "bfloat16", "communication": "not run",
        "hardware": {**HEAD["hardware"], **gpu}, "core_share": {"profile": 1.0, "measured": None},
        "job": {
            "ranks": 8, "shape": {"hidden": 512, "intermediate": 1024, "experts": 64, "top_k": 4}, "tokens": [8, 32],
            "placements": ["a", "b"], "profile_source": "synthetic", "repeats": 15,
        },
        "predicted": cases, "measured": cases,
        "comparison": {"split_half": {"reliability": 0.99}, "goals": [goal]},
    }  # fmt: skip


def exchange(**other: Any) -> dict[str, Any]:
    case = {"case": "skew", "predicted_s": 0.2, "median_s": 0.1, "p10_s": 0.1, "p90_s": 0.1}
    found = {"split_half": {"reliability": None}, "beyond_twice_the_spread": {"agreed": 2, "decided": 3}}
    return {
        **HEAD, "kind": "validate-exchange", "backend": "gloo", "ranks": 4, "hosts": 2, "pretended_hosts": 0,
        "bytes": 2**20, "repeats": 12, "cases": [case], "comparison": found, **other,
    }  # fmt: skip


def capacity(differences: list[str] | None = None) -> dict[str, Any]:
    names = [
        "gshard 0.5, top-1, keep by choice; contiguous",
        "gshard 0.8, top-2, keep by choice; replicas, equal",
        "survey 1, top-4, keep by random, backup next_best, padded; contiguous",
    ]
    outcomes = [
        {"name": one, "dropped": {"simulated": 5, "executed": 5}, "differences": differences or []} for one in names
    ]
    return {
        **HEAD, "kind": "validate-capacity", "backend": "gloo", "ranks": 2, "tokens": [48, 37], "cases": 3,
        "cases_that_differ": 3 if differences else 0, "counts": {"held": 3}, "outcomes": outcomes,
    }  # fmt: skip


def training() -> dict[str, Any]:
    layouts = [
        {"name": "TP2", "tp": 2},
        {"name": "two", "dp": 2, "instances": 2, "schedule": "interleaved", "virtual_stages": 3},
    ]
    shape = {"layers": 6, "hidden": 256, "experts": 12, "intermediate": 256, "top_k": 2}
    steps = [{"step_s": 1.5}, {"step_s": 0.9}]
    found = [{"step_s": {"median_s": value, "p10_s": value, "p90_s": value}} for value in (1.0, 1.0)]
    order = {"agreed": 1, "decided": 2}
    return {
        **HEAD, "kind": "validate-training", "core_share": {"2": 0.9, "4": 0.5}, "predicted": steps, "measured": found,
        "job": {
            "backend": "gloo", "layouts": layouts, "shape": shape, "global_batch": 12, "sequence_length": 256,
            "repeats": 9,
        },
        "comparison": {"split_half": {"reliability": 0.99}, "pairs": order},
        "gradient_error": 1e-6, "loss_error": 1e-8,
    }  # fmt: skip


def shown(record: dict[str, Any]) -> list[Evidence]:
    return store.compact(record).evidence("one.json")


def test_each_lab_and_scheme_covers_its_own_nodes_and_ranks() -> None:
    found = shown(fabric())
    told = [(one.claim, one.traits["exchange"], one.traits["nodes"], one.traits["ranks"], one.cases) for one in found]
    assert told == [
        ("exchange_time", "gloo alltoall", 2, 4, 6), ("placement_gain", "gloo alltoall", 2, 4, 2),
        ("exchange_time", "gloo two_level", 2, 4, 4), ("placement_gain", "gloo two_level", 2, 4, 2),
        ("exchange_time", "gloo alltoall", 4, 8, 6), ("placement_gain", "gloo alltoall", 4, 8, 2),
        ("exchange_time", "gloo two_level", 4, 8, 4), ("placement_gain", "gloo two_level", 4, 8, 2),
    ]  # fmt: skip
    assert all(error == pytest.approx(0.1) for one in found for error in one.errors)
    assert found[1].between == pytest.approx((0.0, 0.0))  # all 10 % high: what tells placements apart is right
    assert {one.traits["gpu"] for one in found} == {"CPU"} and "cluster" not in found[0].traits


def test_what_a_lab_missed_is_kept() -> None:
    lost = {"contests": 3, "decided": 2, "right": 1, "wrong": [{"lab": "two", "of": "even", "apart": 0.2}]}
    record = store.compact(fabric(error={"median": 0.11, "p90": 0.2}, schemes=lost))
    assert [one.holds for one in record.checks] == [False, True, False, True]
    assert record.checks[2].told == "1 of 2; wrong: two even"
    text = markdown([record])
    assert text.count("**missed**") == 2 and "`0123456789+`" in text and "20, 8" in text


def test_replay_covers_what_its_device_computes_and_no_exchange() -> None:
    (cpu,), (gpu,) = shown(replay()), shown(replay("cuda"))
    assert (cpu.claim, cpu.traits["gpu"], gpu.traits["gpu"]) == ("expert_time", "CPU", "H200")
    assert cpu.traits["tokens_per_rank"] == (8, 32) and cpu.traits["experts_dtype"] == "bf16"
    assert cpu.missed == ("one.json: regret: 9% (at most 2%)",)
    without, told = (
        markdown([store.compact(replay() | more)]) for more in ({}, {"pace_s": {"profile": 4e-3, "measured": 3.9e-3}})
    )
    assert "pace -2.5%" in told and "pace" not in without
    for odd in ({"profile": 1e-3}, {"profile": 0.0, "measured": 1.0}):
        with pytest.raises(BadInput, match="needs profile and measured, both above 0"):
            store.compact(replay() | {"pace_s": odd})


def test_an_exchange_covers_its_hosts_unless_they_were_pretended() -> None:
    (found,) = shown(exchange())
    assert (found.traits["nodes"], found.traits["rank_bytes"], found.errors) == (2, (2**20, 2**20), (1.0,))
    (pretended,) = shown(exchange(pretended_hosts=2))
    assert "nodes" not in pretended.traits


def test_dropped_tokens_are_kept_by_policy() -> None:
    gshard, survey = shown(capacity())
    assert gshard.traits == {"rule": "gshard", "drop": "choice", "backup": "none", "pad": "false"}
    assert survey.traits == {"rule": "survey", "drop": "random", "backup": "next_best", "pad": "true"}
    assert (gshard.cases, survey.cases, gshard.mean_absolute) == (2, 1, 0.0)
    wrong, _ = shown(capacity(["rank 0, token 3"]))
    assert (wrong.mean_absolute, len(wrong.missed)) == (1.0, 1)
    text = markdown([store.compact(capacity())])
    assert "| 3 | 0 | 15, 15 |" in text


def test_a_training_step_covers_its_layout_alone() -> None:
    first, second = shown(training())
    assert (first.claim, first.traits["layout"], first.errors) == ("training_step", "TP2 EP2 alltoall", (0.5,))
    assert (second.traits["layout"], second.traits["model"]) == ("DP2 EP2 alltoall, interleaved by 3", "small-moe")
    assert (first.traits["ranks"], second.traits["ranks"]) == (2, 4)
    assert len(first.missed) == 1
    assert "profile of 4 ranks 50%" in markdown([store.compact(training())])
    assert (first.traits["gpu"], first.traits["exchange"], first.traits["nodes"]) == ("CPU", "gloo alltoall", 1)


def test_steps_on_gpus_of_several_nodes_cover_those_and_pretended_nodes_none() -> None:
    made = training() | {"nodes": {"2": 1, "4": 2}, "pretended_hosts": 0, "core_share": {"2": None, "4": None}}
    made["hardware"] = made["hardware"] | {"gpu": "NVIDIA H100 80GB HBM3", "gpus": 8}
    made["job"] = made["job"] | {"backend": "nccl"}
    first, second = shown(made)
    assert (first.traits["nodes"], second.traits["nodes"]) == (1, 2)
    assert first.traits["exchange"] == "nccl alltoall" and "H100" in str(first.traits["gpu"])
    assert all("nodes" not in one.traits for one in shown(made | {"pretended_hosts": 2}))


def test_records_of_several_nodes_can_name_their_cluster(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text(json.dumps(exchange()))
    kept = tmp_path / "kept"
    assert run(["validate", "records", "--folder", str(kept), "--add", str(path), "--cluster", "h200_sxm"]) == 0
    (found,) = of_paths([kept])
    assert found.traits["cluster"] == "h200_sxm"
    (bare,) = of_paths([path])
    assert "cluster" not in bare.traits


@pytest.mark.parametrize("kind", ["fabric", "replay", "exchange", "capacity", "training"])
def test_every_kind_is_added_and_read_back(kind: str, tmp_path: Path) -> None:
    made = {"fabric": fabric, "replay": replay, "exchange": exchange, "capacity": capacity, "training": training}
    record = made[kind]()
    path = tmp_path / "record.json"
    path.write_text(json.dumps(record))
    (added,) = store.add([path], tmp_path / "kept")
    assert store.read_all(tmp_path / "kept") == [added.record]
    assert f"`validate {kind}`" in markdown([added.record])


def test_what_a_scenario_names_has_to_be_records(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="no record in this folder"):
        of_paths([tmp_path / "empty"])
    with pytest.raises(BadInput, match="cannot read the record"):
        of_paths([tmp_path / "absent.json"])
    late = replay()
    late["predictions"] = {**late["predictions"], "written": late["measured_from"]}
    (tmp_path / "late.json").write_text(json.dumps(late))
    with pytest.raises(BadInput, match="not older than measurements"):
        of_paths([tmp_path / "late.json"])


def test_a_record_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    whole = store.compact(exchange()).model_dump(mode="json")
    path = tmp_path / "record.json"
    for change, said in (
        ({"written": None}, "timed cases need written"),
        ({"covers": []}, "which `covers` does not tell"),
        ({"cases": []}, "there are no cases"),
        ({"covers": whole["covers"] * 2}, "have one name"),
        ({"schema_version": 3}, "schema version 3"),
    ):
        path.write_text(json.dumps({**whole, **change}))
        with pytest.raises(BadInput, match=said):
            store.read(path)
    # Records of the first version say nothing of what they cover: they are shown, and nothing cites them.
    first = {**whole, "schema_version": 1, "covers": [], "cases": [{**whole["cases"][0], "covers": []}]}
    path.write_text(json.dumps(first))
    assert store.read(path).evidence("x") == []


def test_the_commit_is_known_in_a_checkout_only(repo: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = code()
    if (repo / ".git").exists():
        assert found is not None and len(found.rstrip("+")) == 40
    monkeypatch.setattr("validate.foretold.__file__", str(tmp_path / "validate" / "foretold.py"))
    assert code() is None


def test_measured_runs_are_summed_up_by_deployment(tmp_path: Path) -> None:
    many = [Prediction(replace(row(number), isl=512 * (1 + number)), 0.2, 0.011) for number in range(6)]
    few = [Prediction(replace(row(9), model="openai/gpt-oss-120b"), 0.2, 0.02)]
    told = summary([*many, *few], "ab", "0.12.0")
    large, small = told.groups
    assert (large.runs, large.isl, large.layout, large.tpot) == (6, (512, 3072), "TP8 ETP8 allreduce", 0.1)
    assert (small.runs, small.tpot, small.ttft) == (1, None, None)  # of so few, only that they are
    coverage.write(tmp_path, told)
    coverage.check(tmp_path, told)
    assert [one.cases for one in coverage.evidence(tmp_path)] == [6, 1]
    with pytest.raises(CheckFailed, match="not the record's"):
        coverage.check(tmp_path, summary(many, "ab", "0.12.0"))
    assert coverage.evidence(tmp_path / "absent") == []
    (tmp_path / coverage.FILE).write_text("{}")
    with pytest.raises(BadInput, match="moesim-silicon-coverage"):
        coverage.read(tmp_path)


def test_the_summary_that_ships_tells_no_figure_of_few_runs() -> None:
    for one in coverage.read().groups:
        assert (one.tpot is None) == (one.runs < 5)
