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


@dataclass(frozen=True)
class SplitHalf:
    """How well one half of the repeats foretells the other.

    gap: median over random splits and cases of |a - b| / ((a + b) / 2), a and b the halves' medians: no prediction can
    be shown to be closer than that. reliability: mean correlation over the cases of ln a and ln b, stepped up to
    the full number of repeats (Spearman 1910, Brown 1910); None with fewer than three cases or no spread among them.
    """

    gap: float
    reliability: float | None


@dataclass(frozen=True)
class PairOrder:
    """Pairs of placements at one token count: how many the measurement decides, and how many of those were foretold."""

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
    gaps, correlations = [], []
    for _ in range(SPLITS):
        order = rng.permutation(repeats)
        a = np.median(samples[:, order[:half]], axis=1)
        b = np.median(samples[:, order[half : 2 * half]], axis=1)
        gaps.append(np.abs(a - b) / ((a + b) / 2))
        if cases >= 3 and np.ptp(a) > 0 and np.ptp(b) > 0:
            correlations.append(np.corrcoef(np.log(a), np.log(b))[0, 1])
    reliability = None
    if correlations:
        mean = float(np.mean(correlations))
        reliability = 2 * mean / (1 + mean) if mean > 0 else mean
    return SplitHalf(gap=float(np.median(gaps)), reliability=reliability)


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
