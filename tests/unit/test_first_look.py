"""A first look at many plans: what it finds is settled in full, and nothing else is ever the answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moesim.engine.deployment import groundwork
from moesim.engine.serving import Load
from moesim.engine.simulate import FEWEST_REQUESTS, first_requests
from moesim.spec.scenario import load_scenario
from placement import tuner
from placement.objective import Evaluator
from placement.ranking import pareto, ranked
from placement.settle import settled
from placement.space import enumerate_space
from placement.tuner import FIRST_LOOK_ABOVE, Search, Trial, takes_first_look
from tests.unit.test_tune import scenario, tried, tuned


def looked_at(tmp_path: Path, first_look: bool) -> tuple[Search, Evaluator, Any]:
    spec = load_scenario(scenario(tmp_path))
    ground = groundwork(spec)
    evaluator = Evaluator(ground, spec, first_look=first_look)
    plans = enumerate_space(ground, spec).plans[:20]
    trials = tuple(Trial(number, plan, evaluator.evaluate(plan)) for number, plan in enumerate(plans))
    return Search(trials, False, 0), evaluator, spec


class Workers:
    """Settles with a local evaluator and remembers what it was asked."""

    def __init__(self, evaluator: Evaluator) -> None:
        self.evaluator, self.asked = evaluator, 0

    def settle(self, plans: Any) -> list[Any]:
        self.asked += len(plans)
        return [self.evaluator.settle(plan) for plan in plans]


def test_answers_rest_on_full_runs(tmp_path: Path) -> None:
    found, evaluator, spec = looked_at(tmp_path, True)
    full, _, _ = looked_at(tmp_path, False)
    workers = Workers(evaluator)
    base = found.trials[0].plan
    done = settled(found, workers, spec, [base])  # type: ignore[arg-type]
    assert done.settled is not None
    assert workers.asked == len(done.settled) < len(found.trials)
    assert any(trial.plan == base for trial in done.answers)
    in_full = {trial.plan: trial.outcome for trial in full.trials}
    for trial in done.answers:
        assert trial.outcome == in_full[trial.plan]
    assert ranked(done, spec)[0].plan == ranked(full, spec)[0].plan
    assert all(trial in done.answers for trial in pareto(done, spec))


def test_where_no_leader_meets_the_levels_the_next_are_settled(tmp_path: Path) -> None:
    found, evaluator, _ = looked_at(tmp_path, True)
    strict = load_scenario(scenario(tmp_path, objective={"slo": {"ttft_p99_ms": 1e-3}}))
    workers = Workers(Evaluator(evaluator.ground, strict, first_look=True))
    trials = tuple(Trial(one.number, one.plan, workers.evaluator.evaluate(one.plan)) for one in found.trials)
    done = settled(Search(trials, False, 0), workers, strict, [])  # type: ignore[arg-type]
    assert done.settled == {trial.number for trial in trials if trial.outcome.status == "ok"}


def test_the_first_look_is_decided_once(tmp_path: Path) -> None:
    study = tuner.optuna.create_study(directions=["maximize", "minimize"])
    assert not takes_first_look(study, FIRST_LOOK_ABOVE)
    assert not takes_first_look(study, 10 * FIRST_LOOK_ABOVE)  # a resumed search goes on as it began
    assert takes_first_look(tuner.optuna.create_study(directions=["maximize", "minimize"]), FIRST_LOOK_ABOVE + 1)


def test_a_search_with_first_looks_resumes_and_runs_on_two_workers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuner, "FIRST_LOOK_ABOVE", 4)
    path = scenario(tmp_path)
    one = tuned(path, tmp_path / "one", capsys)
    assert one["settled"] < one["trials"]
    assert one["best"]["trial"] in {trial["trial"] for trial in one["trial_list"] if trial["in_full"]}
    two = tuned(path, tmp_path / "two", capsys, "--workers", "2")
    tuned(path, tmp_path / "resumed", capsys, "--trials", "9")
    resumed = tuned(path, tmp_path / "resumed", capsys, "--resume")
    for other in (two, resumed):
        assert tried(other) == tried(one)
        assert other["best"] == one["best"]


def test_a_first_look_keeps_enough_requests() -> None:
    lengths = Load([10] * 10_000, [10] * 10_000, concurrency=2_000)  # type: ignore[arg-type]
    assert len(first_requests(lengths).isl) == 8_000
    few = Load([10] * 300, [10] * 300, concurrency=2)  # type: ignore[arg-type]
    assert first_requests(few) is few
    assert len(first_requests(Load([1] * 500, [1] * 500, concurrency=1)).isl) == FEWEST_REQUESTS  # type: ignore[arg-type]
