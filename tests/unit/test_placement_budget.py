"""Replica budgets in step time: what is recommended, refused and told, with an engine whose times are known by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim import cli
from moesim.engine import decode_batch, steptime
from moesim.engine.deployment import resolve
from moesim.engine.steptime import variant_for
from moesim.errors import OutsideProfile
from moesim.routing.trace import RoutingCounts
from moesim.spec.plan import ExpertPlacement, max_over_mean
from placement import budget
from placement.planning import budget_list
from tests.scenarios import small, write


class KnownEngine:
    """A step takes its hottest rank's tokens and `slot_s` for each slot of a rank; draws scatter alike for all.

    leaves: batch size -> names that the profile does not cover. limits: whether the deployment's own limits count.
    """

    def __init__(
        self,
        slot_s: float,
        refuse: Sequence[int] = (),
        leaves: Mapping[int, Sequence[str]] | None = None,
        *,
        limits: bool = False,
    ) -> None:
        self.slot_s = slot_s
        self.refuse = refuse
        self.leaves = leaves or {}
        self.limits = limits

    def timed(
        self,
        ground: Any,
        placements: Mapping[str, ExpertPlacement],
        judge: Sequence[RoutingCounts],
        tokens_per_rank: Sequence[int],
        draws: int,
        seed: int,
    ) -> list[steptime.TimedPlacements]:
        (tokens,) = tokens_per_rank
        if tokens in self.refuse:
            raise OutsideProfile(f"nothing measured at {tokens}", where="profile", mend="measure it")
        noise = np.random.default_rng(seed).normal(1.0, 0.05, draws + 1)
        noise[0] = 1.0
        step_s = {}
        for name, plan in placements.items():
            hottest = np.mean([max_over_mean(plan.rank_loads(load.profile())).mean() for load in judge])
            step_s[name] = noise * 1e-6 * (tokens * float(hottest) + self.slot_s * plan.slots_per_rank)
        left_out = {name: "too hot" for name in self.leaves.get(tokens, ()) if step_s.pop(name, None) is not None}
        refused = {
            name: why
            for name, plan in placements.items()
            if self.limits
            and (why := decode_batch.refused(resolve(ground, variant_for(ground.scenario, plan), plan), tokens))
        }
        balance = dict.fromkeys(step_s, 1.0)
        return [steptime.TimedPlacements(tokens, "normal", step_s, balance, left_out, refused=refused)]


def place(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], engine: KnownEngine, *arguments: str
) -> tuple[int, str, str]:
    monkeypatch.setattr(steptime, "timed_placements", engine.timed)
    code = cli.run(["place", *arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.fixture
def scenario(tmp_path: Path) -> Path:
    return write(tmp_path, small())


def rows(said: str) -> dict[int, dict[str, Any]]:
    return {row["tokens_per_rank"]: row for row in json.loads(said)["budgets"]["rows"]}


def test_free_replicas_are_taken_and_dear_ones_are_not(
    scenario: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said, _ = place(monkeypatch, capsys, KnownEngine(0.0), str(scenario), "--budgets", "0,8,16", "--json")
    assert code == 0
    assert all(row["recommended_redundant_experts"] > 0 for row in rows(said).values())
    _, said, _ = place(monkeypatch, capsys, KnownEngine(1e6), str(scenario), "--budgets", "0,8,16", "--json")
    assert all(row["recommended_redundant_experts"] == 0 for row in rows(said).values())
    assert "no replicas" in json.loads(said)["budgets"]["text"]


def test_the_budget_depends_on_the_batch(
    scenario: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Eight replicas more even out 1e-4 of a rank here: 0.0008 of 8 tokens, 0.05 of 512, against 0.01 for the slot.
    _, said, _ = place(monkeypatch, capsys, KnownEngine(0.01), str(scenario), "--budgets", "0,8,16,32", "--json")
    chosen = {tokens: row["recommended_redundant_experts"] for tokens, row in rows(said).items()}
    assert chosen[8] == 0
    assert chosen[512] > 0
    row = rows(said)[512]["budgets"]
    by_budget = {one["redundant_experts"]: one for one in row}
    for one in row:
        assert one["gain"]["value"] == pytest.approx(1 - one["step_s"]["value"] / by_budget[0]["step_s"]["value"])
        assert one["gain"]["low"] <= one["gain"]["value"] + 1e-9


def test_what_replicas_take_is_told(
    scenario: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, said, _ = place(monkeypatch, capsys, KnownEngine(0.0), str(scenario), "--budgets", "0,8", "--json")
    none, some = json.loads(said)["budgets"]["memory"]
    # OLMoE: 16 layers, one slot more on each of 8 ranks, 3 x 2,048 x 1,024 weights of 2 bytes.
    assert none["replica_bytes_per_gpu"] == 0
    assert some["replica_bytes_per_gpu"] == 16 * 3 * 2048 * 1024 * 2
    assert some["kv_capacity_tokens"] < none["kv_capacity_tokens"]


def test_a_budget_without_room_for_the_batch_is_not_recommended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = small()
    data["serving"]["workload"] = {"isl": 4000, "osl": 24, "requests": 4, "arrivals": {"concurrency": 1}}
    data["serving"]["batching"]["max_batch_tokens_per_dp_rank"] = 4096
    data["policies"] = {"dispatch": {"backend": "deepep", "mode": "normal"}}
    data["serving"]["batching"]["max_running_requests_per_dp_rank"] = 1024
    engine, path = KnownEngine(0.0, limits=True), str(write(tmp_path, data))
    _, said, _ = place(monkeypatch, capsys, engine, path, "--budgets", "0,8", "--json")
    capacity = {one["redundant_experts"]: one["kv_capacity_tokens"] for one in json.loads(said)["budgets"]["memory"]}
    for tokens, row in rows(said).items():
        for one in row["budgets"]:
            assert one["holds_the_batch"] == (capacity[one["redundant_experts"]] >= tokens * 4012)
    assert rows(said)[512]["recommended_redundant_experts"] is None
    # What the table of budgets refuses is no part of the verdict, with budgets or without.
    report = json.loads(said)
    (last,) = [row for row in report["step_time"]["rows"] if row["tokens_per_rank"] == 512]
    assert last["runs"] is False
    assert "need a KV cache of" in last["does_not_run"]
    assert "512: +" not in report["verdict"]["text"]
    assert "512 tokens per rank do not run here" in report["verdict"]["text"]
    _, said, _ = place(monkeypatch, capsys, engine, path)
    assert "does not run at 512 tokens per GPU: 512 requests need a KV cache of" in said


def test_the_limit_on_running_requests_is_no_verdict_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = small(policies={"dispatch": {"backend": "deepep", "mode": "normal"}})
    data["serving"]["batching"]["max_running_requests_per_dp_rank"] = 64
    engine, path, page = KnownEngine(0.0, limits=True), str(write(tmp_path, data)), tmp_path / "page.html"
    _, said, _ = place(monkeypatch, capsys, engine, path, "--budgets", "0,8", "--json", "--report", str(page))
    report = json.loads(said)
    assert [row["runs"] for row in report["step_time"]["rows"]] == [True, True, False, False]
    assert report["gain"]["tokens_per_rank"] == 32
    assert "128 and 512 tokens per rank do not run here" in report["verdict"]["text"]
    assert "runs at most 64 requests" in report["budgets"]["text"]
    assert page.read_text().count("does not run") >= 4
    data["serving"]["batching"]["max_running_requests_per_dp_rank"] = 4
    _, said, _ = place(monkeypatch, capsys, engine, str(write(tmp_path, data)), "--json", "--report", str(page))
    report = json.loads(said)
    assert (report["verdict"]["code"], report["gain"]["value"]) == ("withheld", None)


def test_a_budget_outside_the_profile_is_left_out_by_name_and_nothing_is_recommended_without_another(
    scenario: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine, page = KnownEngine(0.0, leaves={8: ("0",), 32: ("0", "8"), 128: ("8",)}), tmp_path / "page.html"
    asked = (str(scenario), "--budgets", "0,8,16", "--report", str(page))
    _, said, _ = place(monkeypatch, capsys, engine, *asked, "--json")
    found = rows(said)
    assert found[8]["left_out"] == [{"redundant_experts": 0, "reason": "too hot"}]
    assert [one["redundant_experts"] for one in found[8]["budgets"]] == [8, 16]
    assert found[32]["recommended_redundant_experts"] is None
    assert found[128]["recommended_redundant_experts"] == 16
    assert "At 32 tokens per rank nothing is recommended" in json.loads(said)["budgets"]["text"]
    assert "Not priced at 8 tokens per rank: 0 redundant experts; too hot" in page.read_text()
    _, said, _ = place(monkeypatch, capsys, engine, *asked)
    assert "not priced at 8 tokens per GPU: 0 redundant experts" in said
    assert "Budgets are judged on synthetic-lognormal-" in said


def test_budgets_that_do_not_fit_are_named(
    scenario: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said, _ = place(monkeypatch, capsys, KnownEngine(0.0), str(scenario), "--budgets", "0,3")
    assert code == 0
    assert "does not fit: 3: " in said
    code, _, said = place(monkeypatch, capsys, KnownEngine(0.0), str(scenario), "--budgets", "3")
    assert code == 1
    assert "no budget fits" in said


def test_batch_sizes_outside_the_profile_are_left_out(
    scenario: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = KnownEngine(0.0, refuse=(512,))
    code, said, _ = place(monkeypatch, capsys, engine, str(scenario), "--budgets", "0,8")
    assert code == 0
    assert "not priced at 512 tokens per GPU" in said
    assert "At 128 tokens per rank" in said


def test_the_page_shows_the_budgets(
    scenario: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    engine = KnownEngine(0.01, refuse=(32,))
    arguments = ("--budgets", "0,3,8,16", "--report", str(page), "--json")
    code, said, _ = place(monkeypatch, capsys, engine, str(scenario), *arguments)
    assert code == 0
    budgets = json.loads(said)["budgets"]
    part = page.read_text().split('<section id="budgets"')[1].split("</section>")[0]
    for row in budgets["rows"]:
        for one in row["budgets"]:
            assert f'<data value="{one["step_s"]["value"]!r}">' in part
            assert f"{row['tokens_per_rank']} tokens per rank, {one['redundant_experts']} redundant experts" in part
    assert part.count("<polyline") == len(budgets["rows"]) == 3
    assert part.count("* <data") == 3
    assert "Not priced at 32 tokens" in part
    assert "Does not fit: 3: " in part


@pytest.mark.parametrize("text", ["", "a", "0,-8", "1.5"])
def test_what_is_no_list_of_budgets_is_one_line(text: str, scenario: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["place", str(scenario), "--budgets", text]) == 2
    said = capsys.readouterr().err
    assert "--budgets" in said
    assert len(said.strip().splitlines()) == 1


def test_budgets_need_a_scenario(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loads = tmp_path / "a.json"
    loads.write_text(json.dumps({"logical_count": [[1, 2, 3, 4]]}))
    assert cli.run(["place", "--loads", str(loads), "--gpus", "2", "--slots", "4", "--budgets", "0,2"]) == 2
    assert "scenario" in capsys.readouterr().err


def test_budgets_rise_and_come_once() -> None:
    assert budget_list("64,0,32,0") == (0, 32, 64)
    assert budget_list(None) == ()


def test_the_smallest_that_none_beats_is_recommended() -> None:
    # Draws: 8 is always 10 % faster than 0; 16 cannot be told from 8.
    noise = np.random.default_rng(0).normal(0.0, 0.02, 200)
    times = np.ones((1, 3, 201))
    times[0, 1] = 0.9
    times[0, 2, 1:] = 0.9 * (1 + noise)
    times[0, 2, 0] = 0.899
    row = budget._row(8, "normal", [0, 8, 16], times, {}, 0)
    assert row.recommended == 8
    assert budget._row(8, "normal", [0, 8, 16], times, {8: "no room"}, 0).recommended == 16
    assert budget._row(8, "normal", [0, 8, 16], times, dict.fromkeys((0, 8, 16), "no room"), 0).recommended is None
