"""Draws of counts and ids against exact enumeration and against exact draws of every token."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from moesim.errors import BadInput
from moesim.routing.dispersion import NONE, Dispersion
from moesim.routing.inclusion import chances, inclusion, solve_odds
from moesim.routing.sample import (
    EXACT_TOKENS,
    LOW_MEAN,
    _draw,
    _quantile,
    normal_quantiles,
    prepare,
    sample_counts,
    sample_counts_with_replacement,
    sample_topk_ids,
)


def skewed(experts: int, top_k: int, seed: int = 0, sigma: float = 0.8) -> np.ndarray:
    share = np.exp(sigma * np.random.default_rng(seed).standard_normal(experts))
    share /= share.sum()
    assert share.max() * top_k < 1
    return share


def enumerated(odds: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """Inclusion chances and covariance of conditional Poisson sampling by listing every set."""
    sets = list(itertools.combinations(range(len(odds)), top_k))
    weight = np.asarray([np.prod(odds[list(members)]) for members in sets])
    weight /= weight.sum()
    chosen = np.zeros((len(sets), len(odds)))
    for row, members in enumerate(sets):
        chosen[row, list(members)] = 1.0
    mean = weight @ chosen
    return mean, (chosen * weight[:, None]).T @ chosen - np.outer(mean, mean)


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (10, 3), (12, 6), (6, 5), (6, 6), (9, 1)])
def test_odds_give_the_wanted_chances_exactly(experts: int, top_k: int) -> None:
    share = skewed(experts, top_k, sigma=0.25) if top_k < experts else np.full(experts, 1 / experts)
    chance = inclusion(share, top_k)
    odds = solve_odds(chance, top_k)
    assert np.allclose(chances(odds, top_k), chance, atol=1e-8)
    assert np.allclose(enumerated(odds, top_k)[0], chance, atol=1e-8)


def test_odds_of_a_large_skewed_layer() -> None:
    chance = inclusion(skewed(256, 8), 8)
    assert np.abs(chances(solve_odds(chance, 8), 8) - chance).max() < 1e-8


@pytest.mark.parametrize(("experts", "top_k", "sigma"), [(8, 2, 0.4), (16, 8, 0.2), (64, 8, 0.6)])
def test_ids_are_different_experts_with_the_given_shares(experts: int, top_k: int, sigma: float) -> None:
    share = skewed(experts, top_k, sigma=sigma)
    tokens = 60_000
    ids = sample_topk_ids(share, tokens, top_k, np.random.default_rng(3))
    assert ids.shape == (tokens, top_k)
    assert (np.diff(np.sort(ids, axis=1), axis=1) > 0).all()
    chance = share * top_k
    found = np.bincount(ids.ravel(), minlength=experts) / tokens
    z = (found - chance) / np.sqrt(chance * (1 - chance) / tokens)
    assert np.abs(z).max() < 4.5


def test_both_exact_ways_of_drawing_agree_with_enumeration() -> None:
    # top-8 of 16 rejects nearly always, so it goes expert by expert; top-2 of 8 is drawn by rejection.
    for experts, top_k in ((8, 2), (16, 8)):
        share = skewed(experts, top_k, sigma=0.2, seed=2)
        sampler = prepare(share, top_k)
        assert (sampler.acceptance[0] < 0.1) == (experts == 16)
        ids = sampler.ids(0, 40_000, np.random.default_rng(1))
        chosen = np.zeros((len(ids), experts))
        np.put_along_axis(chosen, ids, 1.0, axis=1)
        mean, covariance = enumerated(sampler.odds[0], top_k)
        assert np.allclose(chosen.mean(axis=0), mean, atol=0.012)
        assert np.allclose(np.cov(chosen.T), covariance, atol=0.006)


CASES = [
    (256, 8, 0.65, 200),
    (256, 8, 0.65, 2000),
    (64, 8, 0.5, 50),
    (8, 2, 0.3, 100),
    (8, 2, 0.3, 40),
    (128, 4, 0.9, 400),
]


@pytest.mark.parametrize(("experts", "top_k", "sigma", "tokens"), CASES)
def test_approximate_counts_have_the_moments_of_exact_draws(
    experts: int, top_k: int, sigma: float, tokens: int
) -> None:
    share = skewed(experts, top_k, sigma=sigma, seed=5)
    assert tokens > EXACT_TOKENS
    steps = 20_000
    found = sample_counts(share[None], np.full(steps, tokens), top_k, np.random.default_rng(11))[:, 0]
    assert (found.sum(axis=1) == tokens * top_k).all()
    assert found.min() >= 0
    assert found.max() <= tokens
    chance = share * top_k
    mean, variance = tokens * chance, tokens * chance * (1 - chance)
    # 5 standard errors of a mean, plus what spreading the remainder may shift: 1 % of a count's standard deviation.
    assert (np.abs(found.mean(axis=0) - mean) < (5 / np.sqrt(steps) + 0.01) * np.sqrt(variance) + 0.004).all()
    ratio = found.var(axis=0) / variance
    assert np.abs(ratio - 1).max() < 0.08
    assert abs(ratio.mean() - 1) < 0.015
    # Ranks of contiguous experts: what a placement feels; exact draws give it.
    ranks = 4
    exact = prepare(share, top_k).ids(0, tokens * 1500, np.random.default_rng(12))
    by_rank = np.stack([((exact // (experts // ranks)) == rank).sum(axis=1) for rank in range(ranks)], axis=1)
    wanted = np.cov(by_rank.reshape(1500, tokens, ranks).sum(axis=1).T)
    got = np.cov(found.reshape(steps, ranks, -1).sum(axis=2).T)
    assert np.abs(got - wanted).max() < 0.16 * np.diag(wanted).max()  # 4 standard errors of 1,500 exact steps


def test_low_counts_follow_the_binomial() -> None:
    share = skewed(256, 8)
    tokens, steps = 100, 40_000
    found = sample_counts(share[None], np.full(steps, tokens), 8, np.random.default_rng(2))[:, 0]
    mean = tokens * share * 8
    for expert in np.argsort(mean)[[0, 64, 128, 200, 250]]:
        wanted = stats.binom.pmf(np.arange(40), tokens, share[expert] * 8)
        got = np.bincount(found[:, expert].astype(int), minlength=40)[:40] / steps
        assert 0.5 * np.abs(got - wanted).sum() < 0.012
    assert (mean < LOW_MEAN).mean() > 0.5


def test_up_to_the_limit_counts_are_exact_draws() -> None:
    share = skewed(16, 4, sigma=0.2)
    found = sample_counts(share[None], np.full(20_000, 3), 4, np.random.default_rng(2))[:, 0]
    assert (found.sum(axis=1) == 12).all()
    wanted = stats.binom.pmf(np.arange(4), 3, share[0] * 4)
    assert np.abs(np.bincount(found[:, 0].astype(int), minlength=4) / 20_000 - wanted).max() < 0.015


@pytest.mark.parametrize("tokens", [8, 200, 4000])
def test_dispersion_adds_its_variance(tokens: int) -> None:
    share = np.full((1, 64), 1 / 64)
    cv2 = 0.05
    dispersion = Dispersion(cv2 * 10, 0.0, 0.0, tag="assumed", source="test")
    found = sample_counts(
        share, np.full(20_000, tokens), 8, np.random.default_rng(6), dispersion, requests=np.full(20_000, 10)
    )[:, 0]
    assert (found.sum(axis=1) == tokens * 8).all()
    mean = tokens / 8
    assert found.mean(axis=0) == pytest.approx(np.full(64, mean), rel=0.03)
    wanted = mean * (1 - 1 / 8) + (mean**2 * cv2) * (1 - 1 / 64)
    # A token cannot pick an expert twice, which holds the shaken chances together a little.
    assert found.var(axis=0).mean() == pytest.approx(wanted, rel=0.12 if tokens == 8 else 0.05)


def test_same_seed_same_counts_and_idle_steps_are_empty() -> None:
    share = np.stack([skewed(64, 4, seed=seed) for seed in range(3)])
    tokens = np.asarray([0, 5, 100, 100, 3000])
    first = sample_counts(share, tokens, 4, np.random.default_rng(9))
    assert np.array_equal(first, sample_counts(share, tokens, 4, np.random.default_rng(9)))
    assert not first[0].any()
    assert (first.sum(axis=2) == tokens[:, None] * 4).all()
    assert not np.array_equal(first[2], first[3])


def test_with_replacement_is_multinomial() -> None:
    share = skewed(16, 2)[None]
    found = sample_counts_with_replacement(share, np.full(5000, 100), 2, np.random.default_rng(0))
    assert (found.sum(axis=2) == 200).all()
    assert found[:, 0].var(axis=0) == pytest.approx(200 * share[0] * (1 - share[0]), rel=0.15)


def test_impossible_shares_and_sizes_are_refused() -> None:
    with pytest.raises(BadInput, match="at most"):
        prepare(np.asarray([[0.9, 0.05, 0.05]]), 2)
    with pytest.raises(BadInput, match="top_k"):
        prepare(np.full((1, 4), 0.25), 5)
    with pytest.raises(BadInput, match="tokens"):
        prepare(np.full((1, 4), 0.25), 2).counts([-1], np.random.default_rng(0))


def test_the_table_of_normal_quantiles() -> None:
    coarse, fine = normal_quantiles()
    for u in (1e-7, 1e-5, 1e-4, 0.01, 0.3, 0.5, 0.77, 0.9999, 1 - 1e-6):
        assert _quantile(u, coarse, fine) == pytest.approx(stats.norm.ppf(u), abs=0.02)
    assert np.isfinite([_quantile(0.0, coarse, fine), _quantile(1 - 2**-53, coarse, fine)]).all()


def test_the_corrected_normal_at_the_limit() -> None:
    # The step formula of `_draw_apart` for a Poisson of mean LOW_MEAN, over a fine grid of quantiles.
    mean = LOW_MEAN
    z = stats.norm.ppf((np.arange(200_000) + 0.5) / 200_000)
    sd = np.sqrt(mean - 1 / 12)
    skew2 = 1 / mean / 72
    n = np.floor(mean + (z * z - 1) / 6 + z * sd * (1 + skew2 - skew2 * z * z) + 0.5)
    got = np.bincount(np.maximum(n, 0).astype(int), minlength=40)[:40] / len(z)
    assert 0.5 * np.abs(got - stats.poisson.pmf(np.arange(40), mean)).sum() < 0.0025
    assert n.var() == pytest.approx(mean, rel=2e-3)
    assert NONE.tag == "formula"


@pytest.mark.parametrize(("experts", "top_k"), [(32, 4), (16, 8)])  # by rejection, and expert by expert
def test_few_tokens_are_drawn_one_by_one_from_shaken_odds(experts: int, top_k: int) -> None:
    """The compiled loops draw what drawing each token in turn draws, from the same generator in the same order."""
    share = np.stack([skewed(experts, top_k, seed=seed, sigma=0.2) for seed in range(3)])
    sampler, shaken = prepare(share, top_k), Dispersion(0.3, 0.0, 0.0, tag="assumed", source="test")
    tokens = np.asarray([5, 0, EXACT_TOKENS, 1])
    for dispersion in (NONE, shaken):
        found = sampler.counts(tokens, np.random.default_rng(4), dispersion)
        rng, wanted = np.random.default_rng(4), np.zeros_like(found)
        some = np.nonzero(tokens)[0]
        for layer in range(len(share)):
            cv2 = dispersion.step_cv2(tokens[some])
            factors = np.ones((len(some), experts)) if dispersion is NONE else sampler._factors(cv2, rng)
            for step, factor in zip(some, factors, strict=True):
                ids = _draw(sampler.odds[layer] * factor, sampler.acceptance[layer], int(tokens[step]), top_k, rng)
                np.add.at(wanted[step, layer], ids.ravel(), 1.0)
        np.testing.assert_array_equal(found, wanted)
        assert (found.sum(axis=2) == (tokens * top_k)[:, None]).all()
