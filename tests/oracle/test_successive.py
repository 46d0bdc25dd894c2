"""Gumbel top-k without its scores: chances by listing every order, draws against plain Gumbel scores."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from moesim.errors import BadInput
from moesim.routing.sample import prepare
from moesim.routing.successive import (
    gumbel_topk_ids,
    prepare_successive,
    successive_inclusion,
    successive_weights,
)

EXPERTS, TOP_K = 256, 8


def listed(weights: np.ndarray, top_k: int) -> np.ndarray:
    chance = np.zeros(len(weights))
    for order in itertools.permutations(range(len(weights)), top_k):
        left, product = float(weights.sum()), 1.0
        for e in order:
            product *= weights[e] / left
            left -= weights[e]
        chance[list(order)] += product
    return chance


@pytest.mark.parametrize(("experts", "top_k", "spread"), [(6, 3, 1.0), (8, 2, 2.0), (5, 4, 0.5), (4, 1, 1.0)])
def test_chances_are_those_of_all_orders(experts: int, top_k: int, spread: float) -> None:
    weights = np.exp(spread * np.random.default_rng(0).standard_normal(experts))
    assert successive_inclusion(weights, top_k) == pytest.approx(listed(weights, top_k), abs=1e-9)


@pytest.mark.parametrize("spread", [0.0, 0.65, 1.5])
def test_weights_give_the_wanted_chances_back(spread: float) -> None:
    weights = np.exp(spread * np.random.default_rng(1).standard_normal((3, EXPERTS)))
    weights /= weights.sum(axis=1, keepdims=True)
    chance = successive_inclusion(weights, TOP_K)
    assert chance.sum(axis=1) == pytest.approx(np.full(3, TOP_K), abs=1e-8)
    assert successive_weights(chance, TOP_K) == pytest.approx(weights, rel=1e-4)


@pytest.mark.parametrize("spread", [0.65, 1.2])
def test_inclusion_within_one_percent_of_gumbel_topk(spread: float) -> None:
    """The must of the sampler: Gumbel top-k's chances, to 1 %, for every expert that the draws can resolve."""
    rng = np.random.default_rng(2)
    logits = spread * rng.standard_normal(EXPERTS)
    tokens = 400_000
    exact = successive_inclusion(np.exp(logits), TOP_K)
    gumbel = np.zeros(EXPERTS)
    for _ in range(5):  # a tenth of the tokens: the plain way is slow
        ids = gumbel_topk_ids(np.broadcast_to(logits, (tokens // 50, EXPERTS)), TOP_K, rng)
        gumbel += np.bincount(ids.ravel(), minlength=EXPERTS)
    plain = tokens // 10
    z = (gumbel / plain - exact) / np.sqrt(exact * (1 - exact) / plain)
    assert np.abs(z).max() < 4.5  # the integral is Gumbel's chance
    fast = (
        np.bincount(prepare_successive(np.exp(logits), TOP_K).ids(0, tokens, rng).ravel(), minlength=EXPERTS) / tokens
    )
    poisson = np.bincount(prepare(exact[None] / TOP_K, TOP_K).ids(0, tokens, rng).ravel(), minlength=EXPERTS) / tokens
    error = 4.5 * np.sqrt((1 - exact) / (exact * tokens))
    for drawn in (fast, poisson):
        assert (np.abs(drawn / exact - 1) < np.maximum(0.01, error)).all()
        hot = error < 0.03
        assert hot.sum() > 20
        assert np.sqrt(np.mean((drawn / exact - 1)[hot] ** 2)) < 0.01


def test_pairs_go_together_as_under_gumbel_scores() -> None:
    rng = np.random.default_rng(3)
    logits = rng.standard_normal(10)
    tokens = 60_000
    both = []
    for ids in (
        prepare_successive(np.exp(logits), 3).ids(0, tokens, rng),
        gumbel_topk_ids(np.broadcast_to(logits, (tokens, 10)), 3, rng),
    ):
        chosen = np.zeros((tokens, 10))
        np.put_along_axis(chosen, ids.astype(np.int64), 1.0, axis=1)
        both.append((chosen.T @ chosen / tokens, np.bincount(ids[:, 0], minlength=10) / tokens))
    assert np.abs(both[0][0] - both[1][0]).max() < 0.01
    assert np.abs(both[0][1] - both[1][1]).max() < 0.01  # the first pick, too


def test_a_step_holds_different_experts_and_too_few_weights_are_refused() -> None:
    sampler = prepare_successive(np.random.default_rng(0).random((4, 32)), 5)
    ids = sampler.step(100, np.random.default_rng(1))
    assert ids.shape == (4, 100, 5)
    assert (np.diff(np.sort(ids, axis=2), axis=2) > 0).all()
    assert np.array_equal(ids, sampler.step(100, np.random.default_rng(1)))
    with pytest.raises(BadInput, match="positive weight"):
        prepare_successive(np.asarray([[1.0, 0.0, 0.0]]), 2)
