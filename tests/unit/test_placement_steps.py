"""The verdict on step time: what is priced, left out and said, with an engine whose times are known."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from moesim import cli
from moesim.engine import deployment, steptime
from moesim.errors import OutsideProfile
from moesim.routing.trace import RoutingCounts
from moesim.spec.plan import ExpertPlacement, max_over_mean

DRAWS = 20


class KnownEngine:
    """A step takes the hottest rank's tokens plus a share for each slot of a rank: time is known by hand."""

    def __init__(
        self,
        slot_s: float,
        *,
        refuse: Sequence[int] = (),
        leaves: Mapping[int, Sequence[str]] | None = None,
        beyond: Mapping[int, Sequence[str]] | None = None,
    ) -> None:
        self.slot_s = slot_s
        self.leaves, self.beyond = leaves or {}, beyond or {}
        self.refuse = refuse
        self.judged: list[str] = []

    def timed(
        self,
        ground: object,
        placements: Mapping[str, ExpertPlacement],
        judge: Sequence[RoutingCounts],
        tokens_per_rank: Sequence[int],
        draws: int,
        seed: int,
    ) -> list[steptime.TimedPlacements]:
        (tokens,) = tokens_per_rank
        if tokens in self.refuse:
            raise OutsideProfile(f"nothing measured at {tokens}", where="profile", mend="measure it")
        self.judged = [load.name for load in judge]
        noise = np.random.default_rng(seed).normal(1.0, 0.05, DRAWS + 1)
        noise[0] = 1.0
        step_s, balance = {}, {}
        for name, placement in placements.items():
            hottest = np.mean([max_over_mean(placement.rank_loads(load.profile())).mean() for load in judge])
            step_s[name] = noise * 1e-6 * (tokens * float(hottest) + self.slot_s * placement.slots_per_rank)
            balance[name] = float(hottest)
        left_out = {name: "too hot" for name in self.leaves.get(tokens, ()) if step_s.pop(name, None) is not None}
        beyond = dict.fromkeys(self.beyond.get(tokens, ()), ("dispatch",))
        return [steptime.TimedPlacements(tokens, "normal", step_s, balance, left_out, beyond)]


@pytest.fixture
def scenario(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    shared = rng.lognormal(0.0, 0.7, (58, 256))
    loads = []
    for name, phase in (("p", "prefill"), ("q", "prefill"), ("d", "decode"), ("e", "decode")):
        counts = np.zeros((61, 256))
        counts[3:] = 1e4 * shared * rng.lognormal(0.0, 0.2, (58, 256))
        (tmp_path / f"{name}.json").write_text(json.dumps({"logical_count": counts.round().tolist()}))
        loads.append({"file": f"{name}.json", "phase": phase})
    data = {
        "model": "deepseek-ai/DeepSeek-V3",
        "cluster": {"system": "h200_sxm", "nodes": 4, "gpus_per_node": 8},
        "routing": {"loads": loads},
        "parallel": {"attention_dp": 32, "ep": 32},
        "placement": {"solver": "greedy", "redundant_experts": 32},
        "serving": {"workload": {"isl": 10, "osl": 10, "requests": 1, "arrivals": {"concurrency": 1}}},
    }
    path = tmp_path / "scenario.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def place(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], engine: KnownEngine, *arguments: str
) -> tuple[int, str]:
    monkeypatch.setattr(steptime, "timed_placements", engine.timed)
    monkeypatch.setattr(deployment, "groundwork", lambda scenario: None)
    code = cli.run(["place", *arguments])
    return code, capsys.readouterr().out


def test_the_scenario_fills_in_what_is_not_given(scenario: Path, monkeypatch, capsys) -> None:
    engine = KnownEngine(0.0)
    code, said = place(monkeypatch, capsys, engine, str(scenario), "--json")
    report: dict[str, Any] = json.loads(said)
    assert code == 0
    assert (report["gpus"], report["nodes"], report["slots"], report["solver"]) == (32, 4, 288, "greedy")
    assert [row["tokens_per_rank"] for row in report["step_time"]["rows"]] == [8, 32, 128, 512]
    # Judged on decode loads only, each of which was held out of the fit.
    assert report["step_time"]["judged_on"] == engine.judged
    assert set(engine.judged) <= {"d", "e"}
    assert len(engine.judged) == 1
    assert report["gain"]["by"] == "step_time"
    assert report["gain"]["tokens_per_rank"] == 128
    assert report["verdict"]["code"] == "gain"
    row = report["step_time"]["rows"][0]
    time = row["step_s"]
    assert row["gain"]["value"] == pytest.approx(1 - time["planned"]["value"] / time["contiguous"]["value"])
    # The noise is shared by all contenders, so it cancels in the gain.
    assert row["gain"]["high"] == pytest.approx(row["gain"]["low"])


def test_the_verdict_says_where_replicas_do_not_pay(scenario: Path, monkeypatch, capsys) -> None:
    # A slot that costs as much as some tokens: replicas lose where tokens are few, and gain where they are many.
    _, said = place(monkeypatch, capsys, KnownEngine(4.0), str(scenario), "--json")
    report = json.loads(said)
    signs = {row["tokens_per_rank"]: row["gain_from_replicas"]["value"] > 0 for row in report["step_time"]["rows"]}
    assert signs[8] is False
    assert signs[512] is True
    assert "the replicas pay at" in report["verdict"]["text"]
    assert "make the step slower at 8" in report["verdict"]["text"]


def test_points_outside_the_profile_are_left_out_and_named(scenario: Path, monkeypatch, capsys) -> None:
    _, said = place(monkeypatch, capsys, KnownEngine(0.0, refuse=(512,)), str(scenario), "--json")
    report = json.loads(said)
    assert [row["tokens_per_rank"] for row in report["step_time"]["rows"]] == [8, 32, 128]
    assert report["step_time"]["unpriced"][0]["tokens_per_rank"] == 512
    assert "512 tokens per rank lie outside the profile" in report["verdict"]["text"]
    code, said = place(monkeypatch, capsys, KnownEngine(0.0, refuse=(8, 32, 128, 512)), str(scenario), "--json")
    assert (code, said) == (2, "")


def test_a_contender_outside_the_profile_is_left_out_by_name(
    scenario: Path, monkeypatch, capsys, tmp_path: Path
) -> None:
    engine = KnownEngine(4.0, leaves={8: ("contiguous",), 512: ("planned",)}, beyond={32: ("contiguous",)})
    page = tmp_path / "place.html"
    _, said = place(monkeypatch, capsys, engine, str(scenario), "--json", "--report", str(page))
    report = json.loads(said)
    first, second, _, last = report["step_time"]["rows"]
    assert (first["gain"], first["left_out"]) == (None, {"contiguous": "too hot"})
    assert first["gain_from_replicas"]["value"] < 0
    assert (last["gain"], list(last["step_s"])) == (None, ["contiguous", "planned_without_replicas"])
    assert second["extrapolated"] == {"contiguous": ["dispatch"]}
    text = report["verdict"]["text"]
    assert "left out: contiguous at 8, planned at 512 tokens per rank" in text
    assert "xtrapolated beyond the profile: contiguous at 32 tokens per rank" in text
    assert " 8: +" not in text and "make the step slower at 8" in text
    assert "Not priced: contiguous at 8, planned at 512" in page.read_text()
    _, said = place(monkeypatch, capsys, engine, str(scenario))
    assert "not priced: contiguous at 8, planned at 512 tokens per GPU; the first: too hot" in said
    assert "~ extrapolated beyond what was measured (dispatch): contiguous at 32 tokens per GPU" in said
    everywhere = KnownEngine(0.0, leaves=dict.fromkeys((8, 32, 128, 512), ("contiguous",)))
    _, said = place(monkeypatch, capsys, everywhere, str(scenario), "--json", "--report", str(page))
    report = json.loads(said)
    assert (report["verdict"]["code"], report["gain"]["value"]) == ("withheld", None)
    assert "Against the same solver without replicas" in report["verdict"]["text"]


def test_a_person_reads_the_step_times(scenario: Path, monkeypatch, capsys) -> None:
    code, said = place(monkeypatch, capsys, KnownEngine(1.0, refuse=(512,)), str(scenario))
    assert code == 0
    assert "step time in ms by tokens per GPU" in said
    assert "not priced at 512 tokens per GPU" in said
    assert "not validated on hardware" in said
    assert "strays from these aggregate counts is assumed" in said


def test_gpus_that_contradict_the_scenario_are_refused(scenario: Path, capsys) -> None:
    assert cli.run(["place", str(scenario), "--gpus", "16"]) == 2
    assert "leave --gpus out" in capsys.readouterr().err


def record_over_nodes(folder: Path, **other: Any) -> Path:
    """A made-up record of the scenario's own exchanges and placements on its own cluster."""
    over = {"gpu": "H200", "exchange": "DeepEP", "nodes": 4, "cluster": "h200_sxm", "ranks": 32, **other}
    layer = {"layer": "256 experts of 7168 x 2048, top-8", "experts_dtype": "fp8_block", "tokens_per_rank": [1, 4096]}
    case = {"case": "a", "covers": ["gain", "exchange"], "predicted_s": 1.1, "measured_s": 1.0}
    content = {
        "format": "moesim-validation", "schema_version": 2, "command": "our own", "date": "2026-11-26", "what": "x",
        "hardware": {}, "versions": {}, "written": "1", "measured_from": "2", "predictions_sha256": "ab", "checks": [],
        "covers": [
            {"name": "gain", "claim": "placement_gain", "traits": {**over, **layer}},
            {"name": "exchange", "claim": "exchange_time", "traits": {**over, "rank_bytes": [1000, 10**9]}},
        ],
        "cases": [case],
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "ours.json").write_text(json.dumps(content))
    return folder


def test_the_verdict_cites_records_or_says_that_there_are_none(scenario: Path, monkeypatch, capsys) -> None:
    _, said = place(monkeypatch, capsys, KnownEngine(0.0), str(scenario), "--json")
    report = json.loads(said)
    found = {one["claim"]: one for one in report["validation"]}
    assert set(found) == {"placement_gain", "exchange_time", "expert_time"}
    assert found["placement_gain"]["status"] == "nearest"
    assert found["placement_gain"]["commands"] == ["validate fabric"]
    assert found["placement_gain"]["error"]["cases"] > 0
    assert "exchange: gloo alltoall or gloo two_level instead of DeepEP" in found["placement_gain"]["differs"]
    assert "expert parallelism over several nodes is not validated" in report["verdict"]["text"].lower()
    _, said = place(monkeypatch, capsys, KnownEngine(0.0), str(scenario))
    assert "Not validated on hardware: placement gain over 4 nodes (nearest: validate fabric, CPU, gloo" in said


def test_a_record_of_ones_own_validates_what_it_covers(scenario: Path, monkeypatch, capsys, tmp_path: Path) -> None:
    page = tmp_path / "place.html"
    record_over_nodes(tmp_path / "records")
    asked = (str(scenario), "--set", "records=[records]")
    _, said = place(monkeypatch, capsys, KnownEngine(0.0), *asked, "--json", "--report", str(page))
    report = json.loads(said)
    found = {one["claim"]: one for one in report["validation"]}
    assert (found["placement_gain"]["status"], found["placement_gain"]["records"]) == ("validated", ["ours.json"])
    assert found["exchange_time"]["status"] == "validated"
    assert "several nodes" not in report["verdict"]["text"]
    assert "ours.json" in page.read_text() and "no hardware that this project" not in page.read_text()
    # The same on two nodes covers nothing over four.
    record_over_nodes(tmp_path / "records", nodes=2)
    _, said = place(monkeypatch, capsys, KnownEngine(0.0), *asked, "--json")
    report = json.loads(said)
    assert {one["status"] for one in report["validation"]} == {"nearest"}
    assert "over several nodes is not validated" in report["verdict"]["text"]


def test_records_that_cannot_be_read_are_one_line(scenario: Path, capsys) -> None:
    assert cli.run(["place", str(scenario), "--set", "records=[absent.json]"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "absent.json: cannot read the record" in said
    assert cli.run(["doctor", str(scenario), "--set", "records=[absent.json]"]) == 2
