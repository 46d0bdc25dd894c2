"""Errors, split halves, pair order and regret on samples whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from validate.compare import (
    held_out_regret,
    mape,
    median_interval,
    order_beyond,
    pair_ordering,
    regret,
    regret_of_any,
    signed_error,
    span,
    split_half,
)


def test_signed_error_is_positive_when_the_prediction_is_too_slow() -> None:
    errors = signed_error(np.array([2.0, 0.5]), np.array([1.0, 1.0]))
    assert errors.tolist() == [1.0, -0.5]
    assert mape(np.array([2.0, 0.5]), np.array([1.0, 1.0])) == 0.75


def test_halves_of_a_measurement_without_scatter_agree_wholly() -> None:
    samples = np.repeat([[1.0], [2.0], [4.0]], 10, axis=1)
    found = split_half(samples, np.random.default_rng(0))
    assert found.gap == 0.0
    assert found.reliability == pytest.approx(1.0)


def test_halves_of_pure_scatter_tell_nothing() -> None:
    rng = np.random.default_rng(1)
    samples = np.exp(rng.normal(size=(400, 6)))
    found = split_half(samples, rng)
    assert found.gap > 0.3
    assert found.reliability is not None and abs(found.reliability) < 0.2


def test_two_cases_have_no_reliability() -> None:
    assert split_half(np.ones((2, 4)), np.random.default_rng(0)).reliability is None


def test_only_pairs_of_one_group_that_stand_out_are_decided() -> None:
    rng = np.random.default_rng(2)
    noise = rng.normal(scale=0.01, size=(4, 20))
    # Group 8: 1.0 against 2.0 (clear), 1.0 against 1.0 (a tie but for the noise); group 16: one case, no pair.
    samples = np.array([[1.0], [2.0], [1.0], [9.0]]) + noise
    samples[2] = samples[0] + np.where(np.arange(20) % 2, 0.01, -0.01)
    right = pair_ordering(np.array([1.0, 2.0, 1.5, 1.0]), samples, [8, 8, 8, 16])
    assert (right.pairs, right.decided, right.agreed, right.undecided) == (3, 2, 2, 1)
    wrong = pair_ordering(np.array([3.0, 2.0, 4.0, 1.0]), samples, [8, 8, 8, 16])
    assert (wrong.decided, wrong.agreed) == (2, 0)


def test_a_predicted_tie_does_not_count_as_foretold() -> None:
    samples = np.array([[1.0] * 10, [2.0] * 10])
    assert pair_ordering(np.array([1.0, 1.0]), samples, [8, 8]).agreed == 0


def test_regret_is_what_the_predicted_best_costs() -> None:
    predicted = np.array([1.0, 2.0, 5.0, 4.0])
    measured = np.array([1.2, 1.0, 3.0, 2.0])
    assert regret(predicted, measured, [8, 8, 16, 16]) == {8: pytest.approx(0.2), 16: 0.0}


@pytest.mark.parametrize("repeats", [5, 12, 25])
def test_the_interval_of_a_median_holds_it_as_often_as_it_says(repeats: int) -> None:
    rng = np.random.default_rng(2)
    found = [median_interval(rng.exponential(size=repeats)) for _ in range(2000)]
    share = np.mean([low <= np.log(2.0) <= high for low, high in found])
    # Three standard deviations of a share of 0.9 in 2,000 draws; above it, order statistics are coarse.
    assert 0.9 - 3 * (0.09 / 2000) ** 0.5 <= share <= 0.98


def test_the_interval_of_few_samples_is_all_of_them() -> None:
    assert median_interval(np.array([3.0, 1.0, 2.0])) == (1.0, 3.0)
    assert median_interval(np.array([1.0])) == (1.0, 1.0)


def test_only_pairs_of_one_group_are_ordered_and_only_beyond_twice_the_spread() -> None:
    measured, spread = np.array([1.0, 2.0, 2.1, 10.0]), np.array([0.1, 0.1, 0.1, 0.1])
    wrong = np.array([2.0, 1.0, 1.5, 0.1])
    assert order_beyond(wrong, measured, spread).decided == 5  # 2.0 and 2.1 are too near
    found = order_beyond(wrong, measured, spread, [8, 8, 8, 32])
    assert (found.pairs, found.decided, found.agreed, found.undecided) == (3, 2, 0, 1)
    assert order_beyond(measured, measured, spread, [8, 8, 8, 32]).agreed == 2


def test_span_and_blind_regret_are_of_each_group() -> None:
    seconds = np.array([1.0, 3.0, 10.0, 15.0])
    assert span(seconds, [8, 8, 32, 32]) == {8: 3.0, 32: 1.5}
    assert regret_of_any(seconds, [8, 8, 32, 32]) == {8: 1.0, 32: 0.25}


def test_the_luck_of_the_least_median_is_no_loss() -> None:
    rng = np.random.default_rng(3)
    samples = np.exp(rng.normal(0.0, 0.1, size=(20, 24)))  # twenty cases that are all alike
    lucky, judged = [], []
    for chosen in range(10):
        predicted = np.where(np.arange(20) == chosen, 1.0, 2.0)
        lucky.append(regret(predicted, np.median(samples, axis=1), [8] * 20)[8])
        judged.append(held_out_regret(predicted, samples, [8] * 20, rng)[8])
    assert np.mean(lucky) > 0.03
    assert abs(np.mean(judged)) < 0.02
    slower = np.concatenate([1.2 * samples[:1], samples[1:]])  # one that is slower, and was chosen
    first = np.where(np.arange(20) == 0, 1.0, 2.0)
    assert held_out_regret(first, slower, [8] * 20, rng)[8] > 0.1
