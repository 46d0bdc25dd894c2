"""The verdict of a search on made-up finalists: each sentence says what the figures say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moesim.spec.parallel import ParallelSpec
from moesim.spec.scenario import Scenario
from placement.objective import Outcome
from placement.ranking import LATENCY, Finalist, paired_gain, tied, verdict
from placement.space import Plan
from placement.tuner import Trial
from tests.scenarios import small

RATE = "output_tokens_per_s_per_gpu"
SPREAD = np.linspace(0.98, 1.02, 21)


def finalist(rate: float, tpot: float, *, draws: int = 20, solver: str = "greedy") -> Finalist:
    plan = Plan(ParallelSpec(attention_dp=8, ep=8), "deepep", solver, 0, "sequential")
    trial = Trial(0, plan, Outcome("ok", {"extrapolated_share": 0.0}))
    return Finalist(trial, {RATE: rate * SPREAD[: draws + 1], LATENCY: tpot * SPREAD[: draws + 1]})


def judged(best: Finalist, base: Finalist | None, reason: str = "") -> dict[str, Any]:
    scenario = Scenario.read(small(), where="test")
    return verdict(best, base, base_reason=reason, scenario=scenario, judged_on_fit=False, nodes=1)


BASE = finalist(100.0, 0.02, solver="contiguous")


@pytest.mark.parametrize(
    ("rate", "tpot", "reason", "code", "says"),
    [
        (110.0, 0.02, "", "gain", "Worth it."),
        (100.0, 0.01, "", "latency_gain", "Throughput ties, latency gains."),
        (99.0, 0.01, "", "latency_gain", "Throughput loses, latency gains."),
        (100.0, 0.02, "", "tie", "don't bother"),
        (99.0, 0.03, "", "dont", "Don't bother."),
        (100.0, 0.02, "40% over", "baseline_fails", "Worth it for the service levels."),
    ],
)
def test_the_sentence_says_what_the_figures_say(rate: float, tpot: float, reason: str, code: str, says: str) -> None:
    found = judged(finalist(rate, tpot), BASE, reason)
    assert found["code"] == code
    assert says in found["text"]


def test_without_draws_there_is_no_verdict_and_nothing_tells_two_plans_apart() -> None:
    alone = finalist(110.0, 0.01, draws=0)
    assert judged(alone, BASE)["code"] == "withheld"
    assert judged(finalist(110.0, 0.01), finalist(100.0, 0.02, draws=0, solver="contiguous"))["code"] == "withheld"
    assert tied(alone, BASE, RATE)


def test_draws_are_never_paired_with_a_best_known_value() -> None:
    gain = paired_gain(finalist(110.0, 0.01, draws=0), BASE, RATE)
    assert gain["low"] == gain["value"] == gain["high"] == pytest.approx(0.1)


def test_a_baseline_that_leaves_the_profile_withholds_the_verdict() -> None:
    assert judged(finalist(110.0, 0.01), None, "outside_profile")["code"] == "withheld"
    assert judged(finalist(110.0, 0.01), None, "slo")["code"] == "baseline_fails"
