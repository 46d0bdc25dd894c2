"""Predicted against measured: signed errors, how far the measurement itself can be trusted, order and regret."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

SPLITS = 200
# A difference between two placements counts as measured when chance alone would show it less often than this.
CHANCE = 0.1
BLOCKS = 10


@dataclass(frozen=True)
class SplitHalf:
    """How well one half of the repeats foretells the other.

    gap: median over random splits and cases of |a - b| / ((a + b) / 2), a and b the halves' medians: no prediction can
    be shown to be closer than that. reliability: mean correlation over the cases of ln a and ln b, stepped up to
    the full number of repeats (Spearman 1910, Brown 1910); None with fewer than three cases or no spread among them.
    rank: mean rank correlation of the halves, not stepped up; None likewise.
    """

    gap: float
    reliability: float | None
    rank: float | None


@dataclass(frozen=True)
class PairOrder:
    """Pairs of cases: how many the measurement decides, and how many of those were foretold."""

    pairs: int
    decided: int
    agreed: int

    @property
    def undecided(self) -> int:
        """Pairs whose measured difference does not stand out of the scatter."""
        return self.pairs - self.decided


def signed_error(predicted: Floats, measured: Floats) -> Floats:
    """Predicted over measured, minus one: above zero when the prediction is too slow."""
    return np.asarray(predicted / measured - 1.0)


def mape(predicted: Floats, measured: Floats) -> float:
    """Mean absolute error relative to the measurement."""
    return float(np.abs(signed_error(predicted, measured)).mean())


def split_half(samples: Floats, rng: np.random.Generator) -> SplitHalf:
    """Agreement of random halves of the repeats: samples [cases, repeats], at least four repeats."""
    cases, repeats = samples.shape
    half = repeats // 2
    gaps, correlations, ranks = [], [], []
    for _ in range(SPLITS):
        order = rng.permutation(repeats)
        a = np.median(samples[:, order[:half]], axis=1)
        b = np.median(samples[:, order[half : 2 * half]], axis=1)
        gaps.append(np.abs(a - b) / ((a + b) / 2))
        if cases >= 3 and np.ptp(a) > 0 and np.ptp(b) > 0:
            correlations.append(np.corrcoef(np.log(a), np.log(b))[0, 1])
            ranks.append(rank_correlation(a, b))
    reliability = None
    if correlations:
        mean = float(np.mean(correlations))
        reliability = 2 * mean / (1 + mean) if mean > 0 else mean
    rank = float(np.mean(ranks)) if ranks else None
    return SplitHalf(gap=float(np.median(gaps)), reliability=reliability, rank=rank)


def rank_correlation(one: Floats, other: Floats) -> float:
    """Spearman's correlation of two series [cases], neither of them constant; ties share their mean rank."""
    from scipy.stats import rankdata

    return float(np.corrcoef(rankdata(one), rankdata(other))[0, 1])


def median_interval(samples: Floats) -> tuple[float, float]:
    """Two of the samples [repeats] between which the median of what they are drawn from lies, with 90 % or more.

    Order statistics: the number of samples below the median is binomial (n, 1/2). With fewer than five, all of them.
    """
    from scipy.stats import binom

    ordered = np.sort(samples)
    below = max(int(binom.ppf(CHANCE / 2, len(ordered), 0.5)) - 1, 0)
    return float(ordered[below]), float(ordered[-1 - below])


def spread_of_medians(samples: Floats) -> Floats:
    """How much the median of some repeats scatters: samples [cases, repeats], in order of time -> [cases].

    p90 - p10 of the medians of BLOCKS runs of repeats (fewer where there are fewer repeats).
    """
    blocks = np.array_split(np.arange(samples.shape[1]), min(BLOCKS, samples.shape[1]))
    low, high = np.quantile([np.median(samples[:, block], axis=1) for block in blocks], (0.1, 0.9), axis=0)
    return np.asarray(high - low)


def order_beyond(predicted: Floats, measured: Floats, spread: Floats, groups: Sequence[int] | None = None) -> PairOrder:
    """Whether the faster of two cases was foretold, over pairs that differ by more than twice the larger spread.

    groups: [cases]; only pairs of one group count (all pairs without).
    """
    pairs = decided = agreed = 0
    for first in range(len(measured)):
        for second in range(first + 1, len(measured)):
            if groups is not None and groups[first] != groups[second]:
                continue
            pairs += 1
            difference = measured[first] - measured[second]
            if abs(difference) > 2.0 * max(spread[first], spread[second]):
                decided += 1
                agreed += int((predicted[first] - predicted[second]) * difference > 0)
    return PairOrder(pairs, decided, agreed)


def pair_ordering(predicted: Floats, samples: Floats, groups: Sequence[int]) -> PairOrder:
    """Whether the faster of two placements was foretold, over all pairs of cases of one group (token count).

    predicted: [cases]; samples: [cases, repeats], repeats measured in turn, so they are compared pair by pair; groups:
    [cases]. A pair is decided when an exact sign test of the paired differences rejects chance (two-sided, 10 %).
    """
    from scipy.stats import binomtest

    pairs = decided = agreed = 0
    for first in range(len(groups)):
        for second in range(first + 1, len(groups)):
            if groups[first] != groups[second]:
                continue
            pairs += 1
            slower = int((samples[first] > samples[second]).sum())
            quicker = int((samples[first] < samples[second]).sum())
            if slower + quicker and binomtest(slower, slower + quicker).pvalue < CHANCE:
                decided += 1
                agreed += int(
                    predicted[first] != predicted[second]
                    and (predicted[first] > predicted[second]) == (slower > quicker)
                )
    return PairOrder(pairs, decided, agreed)


def regret(predicted: Floats, measured: Floats, groups: Sequence[int]) -> dict[int, float]:
    """For each group, how much slower the predicted best was than the measured best, relative to the latter."""
    found: dict[int, float] = {}
    labels = np.asarray(groups)
    for group in dict.fromkeys(groups):
        mine = np.nonzero(labels == group)[0]
        chosen = mine[int(predicted[mine].argmin())]
        found[int(group)] = float(measured[chosen] / measured[mine].min() - 1.0)
    return found


def held_out_regret(
    predicted: Floats, samples: Floats, groups: Sequence[int], rng: np.random.Generator
) -> dict[int, float]:
    """For each group, how much slower the predicted best is than the one that half of the repeats shows to be the best.

    predicted: [cases]; samples: [cases, repeats]. Both are judged by the other half, over random splits (the median),
    so that the least of several near-equal medians, which is partly luck, does not count as a loss. Below zero where
    the prediction chooses better than half of the repeats do.
    """
    repeats = samples.shape[1]
    labels, half = np.asarray(groups), repeats // 2
    losses: dict[int, list[float]] = {int(group): [] for group in dict.fromkeys(groups)}
    for _ in range(SPLITS):
        order = rng.permutation(repeats)
        shown = np.median(samples[:, order[:half]], axis=1)
        judged = np.median(samples[:, order[half:]], axis=1)
        for group, found in losses.items():
            mine = np.nonzero(labels == group)[0]
            chosen, best = mine[int(predicted[mine].argmin())], mine[int(shown[mine].argmin())]
            found.append(float(judged[chosen] / judged[best] - 1.0))
    return {group: float(np.median(found)) for group, found in losses.items()}


def regret_of_any(measured: Floats, groups: Sequence[int]) -> dict[int, float]:
    """For each group, how much slower than the best its cases are on average: the regret of choosing blindly."""
    labels = np.asarray(groups)
    return {
        int(group): float(measured[labels == group].mean() / measured[labels == group].min() - 1.0)
        for group in dict.fromkeys(groups)
    }


def span(seconds: Floats, groups: Sequence[int]) -> dict[int, float]:
    """For each group, its slowest case over its quickest."""
    labels = np.asarray(groups)
    return {
        int(group): float(seconds[labels == group].max() / seconds[labels == group].min())
        for group in dict.fromkeys(groups)
    }
