"""Why the best plan is the best, and what would change it: by hand, and through the command and its page."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim import cli
from moesim.cost.estimate import Tag, estimate
from moesim.cost.ops import Gemm
from moesim.engine.deployment import Groundwork, groundwork
from moesim.routing.trace import RoutingCounts
from moesim.spec.parallel import ParallelSpec
from moesim.spec.scenario import Scenario, load_scenario
from placement import whatif
from placement.answers import binding_json, choices_json, choices_text
from placement.objective import Evaluator, Outcome
from placement.plans import Plan
from placement.tuner import Search, Trial
from placement.whatif import HALVINGS, Scaled, World, tempered, times, what_if, worlds_of
from tests.unit.test_tune import scenario, tuned

METRIC = "output_tokens_per_s_per_gpu"


def plan(tp: int, solver: str = "greedy", schedule: str = "sequential") -> Plan:
    return Plan(ParallelSpec(tp=tp, attention_dp=8 // tp, ep=8), "deepep", solver, 0, schedule)


def trial(number: int, of: Plan, rate: float, tpot_s: float, violation: float = -0.5, outside: float = 0.0) -> Trial:
    metrics = {METRIC: rate, "tpot_s.p50": tpot_s, "tpot_s.p99": tpot_s, "extrapolated_share": outside}
    return Trial(number, of, Outcome("ok", metrics | {"kv_cache_share": 0.97}, violation))


@pytest.fixture
def spec(tmp_path: Path) -> Scenario:
    return load_scenario(scenario(tmp_path, objective={"slo": {"tpot_p99_ms": 50}}))


def test_a_choice_is_worth_what_the_best_plan_without_it_loses(spec: Scenario) -> None:
    best = trial(0, plan(1), 100.0, 0.03)
    trials = (
        best,
        trial(1, plan(1, "robust"), 99.0, 0.033),
        trial(2, plan(2, "robust"), 80.0, 0.02),
        trial(3, plan(2), 90.0, 0.04),
        trial(4, plan(4), 200.0, 0.09, violation=0.8),  # misses a level
        trial(5, plan(8), 300.0, 0.01, outside=0.5),  # mostly a guess
        Trial(6, plan(8, schedule="two_batch"), Outcome("out_of_memory")),
    )
    found = {one["choice"]: one for one in choices_json(Search(trials, False, 0), spec, best)}
    assert found["layout"]["loss"] == pytest.approx(0.1)
    assert found["layout"]["plan"] == plan(2).label()
    assert found["placement"]["loss"] == pytest.approx(0.01)
    assert found["placement"]["latency"] == pytest.approx(0.1)
    assert found["placement"]["instead"] == "robust +0"
    assert found["schedule"]["loss"] is None
    assert not found["layout"]["exact"]
    text = choices_text(list(found.values()), METRIC, levels=True)
    assert "10.0% less output tokens/s/GPU" in text
    assert "without schedule sequential, nothing else tried ran" in text
    assert [one["exact"] for one in choices_json(Search(trials, True, 0), spec, best)] == [True] * 3


def test_placement_is_worth_nothing_where_there_is_nothing_to_place(spec: Scenario) -> None:
    """Whole experts in every rank: plans without this placement are plans of another layout."""
    alone = Plan(ParallelSpec(tp=8, expert_tp=8), "allreduce", "contiguous", 0, "sequential")
    best = trial(0, alone, 100.0, 0.03)
    trials = (best, trial(1, plan(1), 90.0, 0.035))
    assert [one["choice"] for one in choices_json(Search(trials, True, 0), spec, best)] == ["layout"]


def test_what_a_choice_is_worth_reads_as_a_loss_and_names_only_levels_that_there_are() -> None:
    known = {"choice": "placement", "value": "greedy +0", "tried": 3, "instead": "eplb +32"}
    slower = known | {"loss": 0.001, "latency": 0.101}
    text = choices_text([slower], METRIC, levels=False)
    assert "without placement greedy +0, median TPOT 10.1% longer (eplb +32 instead)" in text
    assert "median TPOT 2.0% shorter" in choices_text([known | {"loss": 0.0, "latency": -0.02}], METRIC, levels=False)
    assert not choices_text([], METRIC, levels=False)
    nothing = known | {"loss": None, "latency": None, "instead": None}
    assert "meets the service levels" in choices_text([nothing], METRIC, levels=True)
    assert "level" not in choices_text([nothing], METRIC, levels=False)
    assert "nothing else tried ran" in choices_text([nothing | {"tried": 0}], METRIC, levels=True)


def test_the_closest_limit_comes_first(spec: Scenario) -> None:
    found = binding_json(trial(0, plan(1), 100.0, 0.049), spec)
    assert [one["limit"] for one in found] == ["tpot_s.p99", "kv_cache"]
    assert found[0]["room"] == pytest.approx(0.02)
    assert [one["binds"] for one in found] == [True, True]
    assert not binding_json(trial(0, plan(1), 100.0, 0.04), spec)[1]["binds"]


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 1.5, 4.0])
def test_tempered_routing_keeps_tokens_and_no_expert_gets_more_than_every_token(exponent: float) -> None:
    counts = np.random.default_rng(0).lognormal(0.0, 1.5, (2, 3, 16))
    counts[0, 0] = [800.0, *([0.0] * 14), 1.0]
    counts[1, 2] = np.linspace(1.0, 2.0, 16)
    share = counts / counts.sum(axis=-1, keepdims=True)
    load = RoutingCounts(counts, np.arange(3), 3, "x")
    found = tempered(load, exponent, 0.25)
    np.testing.assert_allclose(found.counts.sum(axis=-1), counts.sum(axis=-1))
    new = found.counts / counts.sum(axis=-1, keepdims=True)
    assert new.max() <= 0.25 * (1.0 + 1e-9)
    if exponent == 0.0:
        np.testing.assert_allclose(new, 1.0 / 16.0)
    order = np.argsort(share[1, 1])
    assert (np.diff(new[1, 1][order]) >= -1e-12).all()
    below = share.max(axis=-1) <= 0.25
    assert below.any() and not below.all()
    if exponent == 1.0:
        np.testing.assert_allclose(new[below], share[below])


def test_scaled_costs_scale_their_family_alone() -> None:
    class Known:
        def estimate(self, operation: Any) -> Any:
            return estimate([1.0, 2.0], Tag.MEASURED, operation, 0.1, "known")

    scaled = Scaled(Known(), {"dispatch": 3.0})
    assert scaled.estimate("dispatch").seconds.tolist() == [3.0, 6.0]  # type: ignore[arg-type]
    assert scaled.estimate("experts").seconds.tolist() == [1.0, 2.0]  # type: ignore[arg-type]
    assert scaled.overlap("gemm", 8, 1) is None


class Known:
    """Stands in for Evaluator: plan TP1 makes 100 x factor**-1, TP2 80, and TP4 misses its level."""

    def __init__(self, factor: float, spec: Any) -> None:
        self.ground, self.scenario, self.factor = factor, spec, factor
        self.solved: dict[Any, Any] = {}

    def placement(self, of: Plan) -> None:
        pass

    def settle(self, of: Plan) -> Outcome:
        rate, violation = {1: (100.0 / self.factor, -0.1), 2: (80.0, -0.1), 4: (500.0, 0.3)}[of.parallel.tp]
        return trial(0, of, rate, 0.03, violation).outcome


@dataclasses.dataclass
class Ground:
    scenario: Any
    factor: float


def test_where_the_answer_turns_is_found(monkeypatch: pytest.MonkeyPatch, spec: Scenario) -> None:
    monkeypatch.setattr(whatif, "Evaluator", lambda ground, of: Known(ground.factor, of))
    here = Known(1.0, spec)
    world = World("network", times("the network"), (0.5, 1.1, 4.0), lambda _, factor: Ground(spec, factor))  # type: ignore[arg-type, return-value]
    plans: Sequence[Plan] = [plan(1), plan(2), plan(4)]
    found = what_if(here, plans, [world])  # type: ignore[arg-type]
    half, little, four = found["changes"]
    assert not half["changed"] and not little["changed"]
    assert half["best"] == little["best"] == plans[0].label()
    assert four["changed"] and four["best"] == plans[1].label()
    # TP2 leads by more than 2 % where 80 > 1.02 x 100 / f, from f = 1.275 on.
    step = 4.0 ** (1.0 / 2**HALVINGS)
    assert 1.275 <= four["turns_at"] <= 1.275 * step
    assert [row["meets_slo"] for row in four["plans"]] == [True, True, False]
    assert "4 x the network: " + plans[1].label() in found["text"]
    assert "It stays with 0.5 x the network; 1.1 x the network." in found["text"]


def test_a_world_that_contradicts_a_plan_costs_it_its_place_alone(tmp_path: Path) -> None:
    """Routing that gives one expert more than every token's one pick is refused as bad input where it is priced."""
    spec = load_scenario(scenario(tmp_path))
    ground = groundwork(spec)

    def impossible(there: Groundwork, exponent: float) -> Groundwork:
        return dataclasses.replace(there, judge=tuple(tempered(load, exponent, 1.0) for load in there.judge))

    found = what_if(Evaluator(ground, spec), [plan(1)], [World("skew", times("the skew"), (9.0,), impossible)])
    (change,) = found["changes"]
    assert change["plans"][0]["status"] == "contradictory"
    assert change["best"] is None
    assert "no finalist meets the service levels" in found["text"]


def test_every_world_differs_in_its_own_thing(tmp_path: Path) -> None:
    spec = load_scenario(scenario(tmp_path))
    ground = groundwork(spec)
    assert ground.scenario.serving is not None
    before = ground.scenario.serving.workload
    for world in worlds_of(ground.scenario):
        for factor in world.factors:
            there = world.apply(ground, factor)
            assert there.scenario.serving is not None
            after = there.scenario.serving.workload
            changed = {name for name in ("isl", "osl", "arrivals") if getattr(after, name) != getattr(before, name)}
            wanted = {"load": {"arrivals"}, "isl": {"isl"}, "osl": {"osl"}}.get(world.name, set())
            assert changed == wanted
            assert (there.judge is not ground.judge) == (world.name == "skew")
            assert (there.costs is not ground.costs) == (world.name in ("network", "experts", "host"))
            assert there.fit is ground.fit
            Scenario.read(there.scenario.model_dump(mode="json", exclude_none=True), where="changed")
    gemm = Gemm(np.asarray([64.0]), 4096, 4096, "bf16")
    networked = next(one for one in worlds_of(ground.scenario) if one.name == "network").apply(ground, 2.0)
    assert networked.costs.estimate(gemm).seconds == pytest.approx(ground.costs.estimate(gemm).seconds)


def test_the_command_tells_and_shows_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = scenario(tmp_path)
    result = tuned(path, tmp_path / "run", capsys, "--trials", "24", "--what-if")
    assert result["best"]["binding"]
    assert {one["choice"] for one in result["choices"]} >= {"layout", "placement"}
    changes = result["what_if"]["changes"]
    assert {one["what"] for one in changes} >= {"load", "isl", "osl", "skew", "network", "experts", "host"}
    assert all(len(one["plans"]) == len(result["what_if"]["plans"]) for one in changes)
    assert result["what_if"]["plans"][0] == result["best"]["label"]
    page = (tmp_path / "run" / "report.html").read_text()
    for name in ("choices", "what-if"):
        assert f'<section id="{name}"' in page
    part = page.split('<section id="what-if"')[1].split("</section>")[0]
    assert part.count("<tr") == len(changes) + 1
    for change in changes:
        for row in change["plans"]:
            if row["status"] == "ok":
                assert f'<data value="{row["metrics"][METRIC]!r}">' in part
    # Dearer networks never make a plan faster.
    by_factor = {one["factor"]: one["plans"] for one in changes if one["what"] == "network"}
    for cheap, dear in zip(by_factor[0.5], by_factor[4.0], strict=True):
        if cheap["status"] == dear["status"] == "ok":
            assert dear["metrics"]["tpot_s.p50"] >= cheap["metrics"]["tpot_s.p50"] * (1 - 1e-9)


def test_training_has_no_other_worlds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["tune", "notebooks/scenarios/training.yaml", "--trials", "4", "--out", str(tmp_path / "run")]
    assert cli.run([*arguments, "--what-if"]) == 2
    said = capsys.readouterr().err
    assert "--what-if" in said and len(said.strip().splitlines()) == 1


def test_the_worlds_evaluator_keeps_the_placements(tmp_path: Path) -> None:
    """Routing that a plan meets may change; what it was placed for does not."""
    spec = load_scenario(scenario(tmp_path))
    evaluator = Evaluator(groundwork(spec), spec)
    of = plan(1)
    skew = next(one for one in worlds_of(spec) if one.name == "skew")
    what_if(evaluator, [of], [dataclasses.replace(skew, factors=(0.5,))])
    (placed,) = evaluator.solved.values()
    assert placed is evaluator.placement(of)
