"""Balance by hand, the paired bootstrap, splits, and what the verdict says."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.errors import BadInput
from moesim.routing.trace import RoutingCounts
from moesim.spec.plan import ExpertPlacement
from moesim.spec.scenario import HoldoutSpec
from placement.compare import BASELINE, PLANNED, WITHOUT_REPLICAS, contenders, judge_splits, make_splits
from placement.judge import Figure, balance, paired_gain
from placement.problem import request_from_loads
from placement.verdict import on_balance, on_step_time, tokens_list, withheld


def load(rows: list[list[float]], name: str = "a", weight: float = 1.0) -> RoutingCounts:
    counts = np.asarray([rows], dtype=np.float64)
    return RoutingCounts(counts, np.arange(len(rows), dtype=np.int64), len(rows), name, weight=weight)


def random_loads(number: int, *, layers: int = 4, experts: int = 32, steps: int = 1) -> list[RoutingCounts]:
    rng = np.random.default_rng(number)
    shared = rng.lognormal(0.0, 1.0, (layers, experts))
    return [
        RoutingCounts(
            1e6 * shared * rng.lognormal(0.0, 0.3, (steps, layers, experts)),
            np.arange(layers, dtype=np.int64),
            layers,
            f"load{index}",
            per_step=steps > 1,
        )
        for index in range(number)
    ]


def test_balance_by_hand() -> None:
    # Expert 0 has half of all tokens and two replicas: both ranks get a quarter of its layer from it.
    placement = ExpertPlacement(np.asarray([[0, 1, 0, 2]]), np.arange(1), experts=3, ranks=2, absolute_layers=1)
    found = balance(placement, [load([[4, 3, 1]]), load([[1, 1, 2]], "b", weight=3.0)])
    assert found.by_load[:, 0] == pytest.approx([2 * 5 / 8, 2 * 2.5 / 4])
    # The mix: 0.25 x (4, 3, 1) / 8 + 0.75 x (1, 1, 2) / 4.
    mix = 0.25 * np.asarray([4, 3, 1]) / 8 + 0.75 * np.asarray([1, 1, 2]) / 4
    assert found.mean == pytest.approx(2 * max(mix[0] / 2 + mix[1], mix[0] / 2 + mix[2]))
    assert found.each == pytest.approx(1.25)
    assert found.to_json()["by_workload"] == pytest.approx({"a": 1.25, "b": 1.25})


def test_two_files_of_one_name_both_count() -> None:
    placement = ExpertPlacement(np.asarray([[0, 1]]), np.arange(1), experts=2, ranks=2, absolute_layers=1)
    assert balance(placement, [load([[1, 1]]), load([[3, 1]])]).to_json()["by_workload"] == {"a": 1.0, "a (2)": 1.5}


def test_loads_of_another_model_are_refused() -> None:
    placement = ExpertPlacement(np.asarray([[0, 1]]), np.arange(1), experts=2, ranks=2, absolute_layers=1)
    with pytest.raises(BadInput, match="of one model"):
        balance(placement, [load([[1, 1, 1]])])


def test_the_paired_gain_is_exact_where_the_ratio_is() -> None:
    base = np.random.default_rng(0).uniform(1.0, 2.0, (5, 20))
    gain = paired_gain(base, 0.9 * base, np.ones(5), np.random.default_rng(1))
    assert (gain.value, gain.low, gain.high) == pytest.approx((0.1, 0.1, 0.1))


def test_the_interval_holds_0_where_there_is_no_difference() -> None:
    rng = np.random.default_rng(0)
    base, other = rng.uniform(1.0, 2.0, (2, 8, 20))
    gain = paired_gain(base, other, np.ones(8), np.random.default_rng(1))
    assert gain.low < 0 < gain.high
    again = paired_gain(base, other, np.ones(8), np.random.default_rng(1))
    assert gain == again
    wide = paired_gain(base, other, np.ones(8), np.random.default_rng(1), level=0.99)
    assert wide.low < gain.low < gain.high < wide.high


def test_the_bootstrap_covers_the_true_gain_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(5)
    held = 0
    for _ in range(100):
        base = rng.normal(2.0, 0.2, (12, 1)) + rng.normal(0.0, 0.1, (12, 30))
        cand = base * 0.8 + rng.normal(0.0, 0.1, (12, 1))
        gain = paired_gain(base, cand, np.ones(12), rng, draws=400)
        held += gain.low <= 0.2 <= gain.high
    assert 78 <= held <= 98  # 90 % asked for; 12 loads make a bootstrap a little too sure


def test_splits_hold_out_files_or_steps_or_nothing() -> None:
    rng = np.random.default_rng(0)
    files = random_loads(6)
    splits = make_splits(files, HoldoutSpec(), rng)
    assert 2 <= len(splits) <= 4
    for part in splits:
        assert {load.name for load in part.fit} | {load.name for load in part.judge} == {load.name for load in files}
        assert not {load.name for load in part.fit} & {load.name for load in part.judge}
    assert make_splits(files, HoldoutSpec(by="none"), rng) == []
    # Of two files either can be held out, and both are.
    for seed in range(20):
        assert len(make_splits(files[:2], HoldoutSpec(), np.random.default_rng(seed))) == 2
    assert make_splits(files[:1], HoldoutSpec(), rng) == []
    steps = make_splits(random_loads(1, steps=8), HoldoutSpec(by="step"), rng)
    assert steps
    assert len(steps[0].fit[0].counts) == len(steps[0].judge[0].counts) == 4


def test_a_plan_is_judged_on_what_it_was_not_fitted_to() -> None:
    files = random_loads(6)
    request = request_from_loads(files, slots=40, ranks=8)
    splits = make_splits(files, HoldoutSpec(), np.random.default_rng(0))
    held = judge_splits(splits, request, "greedy", HoldoutSpec())
    in_sample = balance(contenders(request, "greedy")[PLANNED], files).each
    assert held.each[PLANNED] > in_sample
    assert held.each[BASELINE] > held.each[WITHOUT_REPLICAS] > held.each[PLANNED]
    assert held.gain.low > 0
    assert held.replicas is not None
    assert on_balance(held, "greedy").code == "gain"
    same = judge_splits(splits, request, "contiguous", HoldoutSpec())
    assert on_balance(same, "contiguous").code in ("gain", "tie", "dont")
    bare = request_from_loads(files, slots=32, ranks=8)
    nothing = judge_splits(splits, bare, "contiguous", HoldoutSpec())
    assert nothing.replicas is None
    assert nothing.gain.value == 0.0
    assert on_balance(nothing, "contiguous").code == "tie"


def figure(value: float, half: float = 0.01) -> Figure:
    return Figure(value, value - half, value + half)


@pytest.mark.parametrize(
    ("gains", "code"),
    [
        ({8: 0.1, 32: 0.2}, "gain"),
        ({8: 0.0, 32: 0.2}, "gain"),
        ({8: -0.1, 32: 0.2}, "mixed"),
        ({8: -0.1, 32: 0.0}, "dont"),
        ({8: 0.0, 32: 0.001}, "tie"),
    ],
)
def test_the_verdict_on_time_follows_the_intervals(gains: dict[int, float], code: str) -> None:
    verdict = on_step_time({tokens: figure(gain) for tokens, gain in gains.items()}, {}, "greedy", judged="judged on b")
    assert verdict.code == code
    assert "judged on b" in verdict.text


def test_the_verdict_says_where_replicas_do_not_pay() -> None:
    gains = {tokens: figure(0.2) for tokens in (8, 32, 128)}
    replicas = {8: figure(-0.05), 32: figure(0.0), 128: figure(0.04)}
    text = on_step_time(gains, replicas, "greedy", judged="judged on b").text
    assert "pay at 128 tokens per rank and make the step slower at 8 and change nothing that can be told at 32" in text
    none = on_step_time(gains, {8: figure(-0.05)}, "greedy", judged="judged on b").text
    assert "0 replicas suffice" in none


def test_withheld_names_its_reason() -> None:
    verdict = withheld("one snapshot: no split, no verdict")
    assert verdict.code == "withheld"
    assert "one snapshot: no split, no verdict" in verdict.text


def test_lists_read_as_a_person_writes_them() -> None:
    assert tokens_list([8]) == "8"
    assert tokens_list([8, 32]) == "8 and 32"
    assert tokens_list([8, 32, 128]) == "8, 32 and 128"
