"""Which expert gets how many tokens in one forward pass: fast draws of counts, exact draws of ids.

Every draw is without replacement and keeps the measured shares (see inclusion.py). `counts` is exact up to EXACT_TOKENS
tokens; above, each expert's count is drawn on its own with the mean and variance that it has when tokens are drawn
exactly, and the small difference between their sum and tokens x top_k is spread over the experts by their variance.
Means below LOW_MEAN invert a binomial or negative binomial (Panjer's recursion, ASTIN Bulletin 12, 1981), the others a
normal with the Cornish-Fisher correction for skewness. tests/oracle/test_routing_sample.py compares with exact draws.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

from moesim.errors import BadInput
from moesim.routing.dispersion import NONE, Dispersion
from moesim.routing.inclusion import inclusion, solve_odds, suffix_polynomials, working_variance

Floats = NDArray[np.float64]

# Tokens of one pass up to which every token is drawn; there the exact draw costs no more than the approximation.
EXACT_TOKENS = 32
# Mean count below which the discrete distribution is inverted; at 5 the corrected normal is within 0.0018 of a Poisson
# in total variation, its variance within 0.1 % (tests/unit/test_routing_sample.py).
LOW_MEAN = 5.0
ROUNDING = 1.0 / 12.0 + 1.0 / 6.0  # variance that rounding a count (Sheppard), then its part of the remainder, adds
# Below this chance that top_k independent picks are all different, picking expert by expert is faster.
MIN_ACCEPTANCE = 0.1
# Intervals of the table of normal quantiles: all of (0, 1), then again its lowest interval.
QUANTILES = 4096
# Rows of the table that describes the distribution of each expert's count; see `_moments`.
SHAPES = 5
MEAN, A, B, C, PART = range(SHAPES)
LEAST_CHANCE = 1e-3  # an expert that nearly every token picks keeps this chance of not being picked
# 1 / n: a count of a mean below LOW_MEAN ends long before (a multiplication is a third of a division).
INVERSE = 1.0 / np.maximum(np.arange(256.0), 1.0)


@dataclass(frozen=True)
class RoutingSampler:
    """Prepared draws for one profile: chance, spread, odds float64 [layers, experts]; make it with `prepare`."""

    top_k: int
    chance: Floats
    spread: Floats
    odds: Floats
    acceptance: Floats

    def counts(
        self,
        tokens: ArrayLike,
        rng: np.random.Generator,
        dispersion: Dispersion = NONE,
        *,
        requests: ArrayLike | None = None,
    ) -> Floats:
        """Counts float64 [steps, layers, experts] of passes with `tokens` int [steps], all ranks together.

        Each layer of a step sums to tokens x top_k, and no expert gets more than `tokens`. requests: [steps] whose
        tokens these are (None: one token each, as in decode); they only matter to the dispersion.
        """
        steps = np.atleast_1d(np.asarray(tokens, dtype=np.int64))
        if steps.ndim != 1 or (steps < 0).any():
            raise BadInput("tokens of a step are negative or not a row", mend="give int [steps], each at least 0")
        layers, experts = self.chance.shape
        cv2 = np.broadcast_to(dispersion.step_cv2(steps if requests is None else requests), steps.shape)
        out = np.zeros((len(steps), layers, experts))
        coarse, fine = normal_quantiles()
        _fill_approximate(
            steps, np.ascontiguousarray(cv2), self.chance, self.spread, self.top_k, coarse, fine, rng, out
        )
        small = np.nonzero((steps > 0) & (steps <= EXACT_TOKENS))[0]
        shaken = small[cv2[small] > 0]
        even = small[cv2[small] <= 0]
        for layer in range(layers if len(small) else 0):
            odds, reject = self.odds[layer], bool(self.acceptance[layer] >= MIN_ACCEPTANCE)
            _fill_exact(even, steps, self.top_k, layer, odds, reject, rng, out)
            # Factors are drawn in NumPy: its gamma is not promised to be that of compiled code, digit for digit.
            factors = self._factors(cv2[shaken], rng)
            _fill_shaken(shaken, steps, self.top_k, layer, odds, factors, reject, rng, out)
        return out

    def ids(self, layer: int, tokens: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Experts int64 [tokens, top_k] that each token picks in row `layer`, all different, drawn exactly."""
        return _draw(self.odds[layer], self.acceptance[layer], tokens, self.top_k, rng)

    def _factors(self, cv2: Floats, rng: np.random.Generator) -> Floats:
        """Gamma factors [steps, experts] of mean 1 and the given cv2 [steps], all over 0."""
        shape = 1.0 / cv2[:, None]
        return np.maximum(rng.gamma(shape, cv2[:, None], size=(len(cv2), self.chance.shape[1])), 1e-12)


def prepare(profile: Floats, top_k: int, *, where: str = "routing") -> RoutingSampler:
    """Prepare draws for `profile` [layers, experts] (shares that sum to 1). Raises BadInput (see `inclusion`)."""
    chance = inclusion(np.atleast_2d(np.asarray(profile, dtype=np.float64)), top_k, where=where)
    odds = np.stack([solve_odds(row, top_k) for row in chance])
    target = chance * (1.0 - chance)
    spread = np.where(target > 0, working_variance(chance) / np.where(target > 0, target, 1.0), 1.0)
    acceptance = np.asarray([_acceptance(row, top_k) for row in odds])
    return RoutingSampler(top_k, np.ascontiguousarray(chance), np.ascontiguousarray(spread), odds, acceptance)


def sample_counts(
    profile: Floats,
    tokens: ArrayLike,
    top_k: int,
    rng: np.random.Generator,
    dispersion: Dispersion = NONE,
    *,
    requests: ArrayLike | None = None,
) -> Floats:
    """Counts float64 [steps, layers, experts] of passes with `tokens` [steps]; see RoutingSampler.counts."""
    return prepare(profile, top_k).counts(tokens, rng, dispersion, requests=requests)


def sample_counts_with_replacement(profile: Floats, tokens: ArrayLike, top_k: int, rng: np.random.Generator) -> Floats:
    """Counts [steps, layers, experts] when a token may pick an expert twice (multinomial), as no top-k router does."""
    picks = np.atleast_1d(np.asarray(tokens, dtype=np.int64)) * top_k
    shares = np.asarray(profile, dtype=np.float64)
    return np.asarray(rng.multinomial(picks[:, None], shares / shares.sum(axis=-1, keepdims=True)), dtype=np.float64)


def sample_topk_ids(profile_row: Floats, tokens: int, top_k: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Experts int64 [tokens, top_k] of one layer without replacement, inclusion exactly top_k x share."""
    return prepare(profile_row, top_k).ids(0, tokens, rng)


@functools.cache
def normal_quantiles() -> tuple[Floats, Floats]:
    """Quantiles of the standard normal at the borders of QUANTILES intervals of (0, 1), and of its lowest interval."""
    from scipy.special import ndtri

    grid = np.arange(QUANTILES + 1) / QUANTILES
    coarse = ndtri(np.clip(grid, 0.5 / QUANTILES**2, 1 - 0.5 / QUANTILES**2))
    fine = ndtri(np.maximum(grid, 0.5 / QUANTILES) / QUANTILES)
    return coarse, fine


def _acceptance(odds: Floats, top_k: int) -> float:
    """Chance that top_k independent picks by `odds` are all different: top_k! e_k(odds) / (sum of odds)^top_k."""
    share = odds / odds.sum()
    return float(suffix_polynomials(share, top_k)[0, top_k] * np.prod(np.arange(1, top_k + 1, dtype=np.float64)))


def _draw(odds: Floats, acceptance: float, tokens: int, top_k: int, rng: np.random.Generator) -> NDArray[np.int64]:
    out = np.empty((tokens, top_k), dtype=np.int64)
    if tokens and acceptance >= MIN_ACCEPTANCE:
        limit, other = _alias(odds)
        _draw_by_rejection(limit, other, rng, out)
    elif tokens:
        _draw_in_order(np.ascontiguousarray(odds), suffix_polynomials(odds, top_k), rng, out)
    return out


@njit(cache=True)
def _alias(odds: Floats) -> tuple[Floats, NDArray[np.int64]]:
    """Walker's alias table (Vose, IEEE Trans. Software Eng. 17(9), 1991)."""
    experts = odds.shape[0]
    limit = odds / odds.sum() * experts
    other = np.arange(experts)
    small = np.empty(experts, np.int64)
    large = np.empty(experts, np.int64)
    smalls = 0
    larges = 0
    for e in range(experts):
        if limit[e] < 1.0:
            small[smalls] = e
            smalls += 1
        else:
            large[larges] = e
            larges += 1
    while smalls > 0 and larges > 0:
        smalls -= 1
        less = small[smalls]
        more = large[larges - 1]
        other[less] = more
        limit[more] -= 1.0 - limit[less]
        if limit[more] < 1.0:
            larges -= 1
            small[smalls] = more
            smalls += 1
    return limit, other


@njit(cache=True)
def _draw_by_rejection(
    limit: Floats, other: NDArray[np.int64], rng: np.random.Generator, out: NDArray[np.int64]
) -> None:
    """Pick top_k times independently, start the token anew on a repeat: conditional Poisson sampling, exactly."""
    tokens, top_k = out.shape
    experts = limit.shape[0]
    seen = np.full(experts, -1, np.int64)
    mark = 0
    for token in range(tokens):
        taken = 0
        mark += 1
        while taken < top_k:
            u = rng.random() * experts
            e = int(u)
            if u - e >= limit[e]:
                e = other[e]
            if seen[e] == mark:
                taken = 0
                mark += 1
                continue
            seen[e] = mark
            out[token, taken] = e
            taken += 1


@njit(cache=True)
def _draw_in_order(odds: Floats, suffix: Floats, rng: np.random.Generator, out: NDArray[np.int64]) -> None:
    """Decide expert by expert, each given what is still to be picked: the same distribution, no rejection."""
    tokens, top_k = out.shape
    experts = odds.shape[0]
    for token in range(tokens):
        left = top_k
        for e in range(experts):
            if left == 0:
                break
            if rng.random() * suffix[e, left] < odds[e] * suffix[e + 1, left - 1]:
                out[token, top_k - left] = e
                left -= 1


@njit(cache=True)
def _quantile(u: float, coarse: Floats, fine: Floats) -> float:
    """Standard normal quantile by linear interpolation; the outermost intervals by the finer table."""
    intervals = coarse.shape[0] - 1
    place = u * intervals
    index = int(place)
    if index == 0:
        inner = place * intervals
        index = int(inner)
        value = fine[index] + (inner - index) * (fine[index + 1] - fine[index])
    elif index == intervals - 1:
        inner = (intervals - place) * intervals
        index = min(int(inner), intervals - 1)
        value = -(fine[index] + (inner - index) * (fine[index + 1] - fine[index]))
    else:
        value = coarse[index] + (place - index) * (coarse[index + 1] - coarse[index])
    return float(value)


@njit(cache=True)
def _fill_exact(
    steps: NDArray[np.int64], tokens: NDArray[np.int64], top_k: int, layer: int, odds: Floats, reject: bool,
    rng: np.random.Generator, out: Floats,
) -> None:  # fmt: skip
    """Add the exactly drawn tokens of `steps`, all of the same odds, to one layer of `out`."""
    if len(steps) == 0:
        return
    limit, other, suffix = odds, steps, odds.reshape((1, -1))
    if reject:
        limit, other = _alias(odds)
    else:
        suffix = suffix_polynomials(odds, top_k)
    for step in steps:
        ids = np.empty((tokens[step], top_k), np.int64)
        if reject:
            _draw_by_rejection(limit, other, rng, ids)
        else:
            _draw_in_order(odds, suffix, rng, ids)
        for e in ids.ravel():
            out[step, layer, e] += 1.0


@njit(cache=True)
def _fill_shaken(
    steps: NDArray[np.int64], tokens: NDArray[np.int64], top_k: int, layer: int, odds: Floats, factors: Floats,
    reject: bool, rng: np.random.Generator, out: Floats,
) -> None:  # fmt: skip
    """The same for steps whose odds are each shaken by factors of their own [steps, experts]."""
    for index in range(len(steps)):
        _fill_exact(steps[index : index + 1], tokens, top_k, layer, odds * factors[index], reject, rng, out)


@njit(cache=True)
def _fill_approximate(
    tokens: NDArray[np.int64], cv2: Floats, chance: Floats, spread: Floats, top_k: int,
    coarse: Floats, fine: Floats, rng: np.random.Generator, out: Floats,
) -> None:  # fmt: skip
    """Fill the steps of more than EXACT_TOKENS tokens."""
    layers, experts = chance.shape
    shape = np.empty((SHAPES, experts))
    weight = np.empty(experts)
    for layer in range(layers):
        last_tokens = -1
        last_cv2 = -1.0
        for step in range(tokens.shape[0]):
            held = tokens[step]
            if held <= EXACT_TOKENS:
                continue
            if held != last_tokens or cv2[step] != last_cv2:
                last_tokens = held
                last_cv2 = cv2[step]
                _moments(float(held), last_cv2, chance[layer], spread[layer], shape)
            row = out[step, layer]
            total = _draw_apart(row, float(held), shape, coarse, fine, rng)
            _pin_sum(row, float(held), float(held * top_k) - total, chance[layer], shape, weight, rng.random())


@njit(cache=True)
def _draw_apart(
    row: Floats, held: float, shape: Floats, coarse: Floats, fine: Floats, rng: np.random.Generator
) -> float:
    """Draw each expert's count on its own; returns their sum."""
    total = 0.0
    last = min(int(held), INVERSE.shape[0] - 1)
    for e in range(row.shape[0]):
        u = rng.random()
        if shape[MEAN, e] >= LOW_MEAN:
            z = _quantile(u, coarse, fine)
            n = shape[MEAN, e] + shape[A, e] * (z * z - 1.0) + z * (shape[B, e] + shape[C, e] * z * z)
            n = max(np.floor(n + 0.5), 0.0)
        else:
            part = shape[A, e]
            u -= part
            a = shape[B, e]
            b = shape[C, e]
            i = 0
            while u > 0.0 and part > 0.0 and i < last:
                i += 1
                part *= a + b * INVERSE[i]
                u -= part
            n = float(i)
        n = min(n, held)
        row[e] = n
        total += n
    return total


@njit(cache=True)
def _moments(held: float, cv2: float, chance: Floats, spread: Floats, shape: Floats) -> None:
    """Describe each expert's count: binomial, its chance shaken by a gamma factor of `cv2`.

    shape [SHAPES, experts]: the mean; A, B, C: quadratic, linear, cubic coefficient of the Cornish-Fisher expansion
    (excess kurtosis set to the squared skewness, as it is for a Poisson), or below LOW_MEAN the chance of 0 and
    Panjer's a and b; and the part it takes in pinning the sum: its variance, or below LOW_MEAN the factor by which
    shaking swells it.
    """
    for e in range(chance.shape[0]):
        m = held * chance[e]
        apart = m * (1.0 - chance[e])
        variance = apart * spread[e] + m * m * cv2
        shape[MEAN, e] = m
        if m >= LOW_MEAN:
            shape[PART, e] = variance
            third = apart * (1.0 - 2.0 * chance[e]) + m * m * cv2 * (3.0 + 2.0 * m * cv2)
            sd = np.sqrt(max(variance - ROUNDING, 0.0))
            over = 1.0 / variance if variance > 0.0 else 0.0
            quadratic = third * over / 6.0
            skew2 = 0.5 * quadratic * quadratic * over  # squared skewness / 72
            shape[A, e] = quadratic
            shape[B, e] = sd * (1.0 + skew2)
            shape[C, e] = -sd * skew2
            continue
        shape[PART, e] = 1.0 + m * cv2 / max(1.0 - chance[e], LEAST_CHANCE)
        if m <= 0.0:
            shape[A, e], shape[B, e], shape[C, e] = 1.0, 0.0, 0.0
        else:
            ratio = variance / m
            if ratio < 1.0 - 1e-9:
                slope = 1.0 - 1.0 / ratio
                start = np.exp(m / (1.0 - ratio) * np.log(ratio))
                shift = -(m / (1.0 - ratio) + 1.0) * slope
            elif ratio > 1.0 + 1e-9:
                slope = 1.0 - 1.0 / ratio
                start = np.exp(-m / (ratio - 1.0) * np.log(ratio))
                shift = (m / (ratio - 1.0) - 1.0) * slope
            else:
                slope, start, shift = 0.0, np.exp(-m), m
            shape[A, e], shape[B, e], shape[C, e] = start, slope, shift


@njit(cache=True)
def _pin_sum(
    row: Floats, held: float, rest: float, chance: Floats, shape: Floats, weight: Floats, offset: float
) -> None:
    """Spread `rest` over the row in proportion to the experts' variances, by systematic rounding from `offset`."""
    if rest == 0.0:
        return
    experts = row.shape[0]
    total = 0.0
    for e in range(experts):
        # A low count takes part by what it has (or lacks): the same on average, and an empty expert stays as it is. A
        # high one takes part by its variance alone, as a share of its own count would narrow it.
        weight[e] = shape[PART, e]
        if shape[MEAN, e] < LOW_MEAN:
            weight[e] *= (held - row[e]) * chance[e] if rest > 0.0 else row[e] * (1.0 - chance[e])
        total += weight[e]
    size = abs(rest)
    sign = 1.0 if rest > 0.0 else -1.0
    given = 0.0
    if total > 0.0:
        reached = offset
        scale = size / total
        for e in range(experts):
            reached += weight[e] * scale
            room = held - row[e] if sign > 0.0 else row[e]
            change = min(max(np.floor(reached) - given, 0.0), room, size - given)
            row[e] += sign * change
            given += change
    for e in range(experts):  # what clipping and rounding left over: at most a few tokens
        if given >= size:
            break
        room = held - row[e] if sign > 0.0 else row[e]
        change = min(room, size - given)
        row[e] += sign * change
        given += change
