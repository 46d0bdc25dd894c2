"""The verdict of a search on made-up finalists: each sentence says what the figures say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import yaml

from moesim.spec.parallel import ParallelSpec
from moesim.spec.scenario import Scenario
from placement.objective import Outcome
from placement.plans import Plan
from placement.ranking import LATENCY, Finalist, measured_yardstick, paired_gain, sure_of_levels, tied, verdict
from placement.tuner import Trial
from tests.scenarios import small

RATE = "output_tokens_per_s_per_gpu"
SPREAD = np.linspace(0.98, 1.02, 21)


def finalist(
    rate: float, tpot: float, *, draws: int = 20, solver: str = "greedy", outside: float = 0.0, stages: int = 1
) -> Finalist:
    parallel = ParallelSpec(attention_dp=8 // stages, ep=8 // stages, pp=stages)
    plan = Plan(parallel, "deepep", solver, 0, "sequential")
    trial = Trial(0, plan, Outcome("ok", {"extrapolated_share": outside}))
    return Finalist(trial, {RATE: rate * SPREAD[: draws + 1], LATENCY: tpot * SPREAD[: draws + 1]})


def judged(best: Finalist, base: Finalist | None, reason: str = "", *, gpus_per_node: int = 8) -> dict[str, Any]:
    scenario = Scenario.read(small(), where="test")
    return verdict(best, base, base_reason=reason, scenario=scenario, judged_on_fit=False, gpus_per_node=gpus_per_node)


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


def test_a_yardstick_beyond_the_profile_is_none() -> None:
    guess = finalist(100.0, 0.02, solver="contiguous", outside=0.6)
    found = judged(finalist(110.0, 0.01), guess)
    assert found["code"] == "withheld"
    assert "60% of the baseline's step time lies outside the profile" in found["text"]
    assert "measure or import the kernels that `moesim doctor` lists" in found["text"]
    assert found["text"].endswith("parallel: {attention_dp: 8, ep: 8}, policies: {dispatch: {backend: deepep}}.")
    little = finalist(100.0, 0.02, solver="contiguous", outside=0.05)
    assert judged(finalist(110.0, 0.01), little)["code"] == "gain"


def test_plans_over_several_nodes_say_that_nobody_validated_them() -> None:
    best = finalist(110.0, 0.01)
    assert "not validated on hardware" in judged(best, BASE, gpus_per_node=4)["text"]
    assert "not validated on hardware" not in judged(best, BASE)["text"]


def test_plans_in_stages_say_so_and_their_experts_stay_within_a_stage() -> None:
    best, plain = finalist(110.0, 0.01, stages=2), finalist(100.0, 0.02, solver="contiguous", stages=2)
    said = judged(best, plain, gpus_per_node=4)["text"]
    assert "Serving in pipeline stages is not validated on hardware." in said
    assert "Multi-node expert parallelism" not in said
    assert "Multi-node expert parallelism" in judged(best, BASE, gpus_per_node=4)["text"]


def test_levels_are_sure_only_at_the_far_end_of_the_interval() -> None:
    one = finalist(110.0, 0.02)
    assert sure_of_levels(one, {LATENCY: 0.03}) is True
    assert sure_of_levels(one, {LATENCY: 0.02}) is False
    assert sure_of_levels(one, {}) is None
    assert sure_of_levels(finalist(110.0, 0.02, draws=0), {LATENCY: 0.03}) is None


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


def test_the_layout_that_a_withheld_verdict_names_is_the_whole_layout() -> None:
    whole = ParallelSpec(tp=8, pp=2, expert_tp=8, decode_cp=4)
    told = measured_yardstick(Plan(whole, "allreduce", "greedy", 0, "sequential"))
    assert ParallelSpec(**yaml.safe_load(told.split("parallel: ")[1].split(", policies")[0])) == whole
