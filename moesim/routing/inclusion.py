"""From measured shares to a top-k draw without replacement that reproduces them.

A router that picks top_k different experts gives expert e the share s_e = pi_e / top_k of all picks, where pi_e is the
chance that a token picks e: so pi_e = top_k * s_e, at most 1. Counts say nothing about which experts go together; the
draw with the largest entropy under these pi is conditional Poisson sampling: independent coin flips with odds w_e, kept
when exactly top_k heads come up (Hajek 1981; Chen, Dempster and Liu, Biometrika 81(3), 1994). The odds are found by the
fixed point of the latter, in the form of Tille, Sampling Algorithms (2006), section 5.2: pi(w) is exact, from products
of elementary symmetric polynomials, and odds(w) is scaled by odds(pi) / odds(pi(w)) until they agree.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from moesim.errors import BadInput

# A chance of 1 would need infinite odds; the closest to 0 and 1 that is told apart. Far below any measured share.
EDGE = 1e-9
# The fixed point stops here; it contracts fast, so the limit of rounds is there for hopeless input only.
TOLERANCE = 1e-10
MAX_ROUNDS = 500
# Room for the rounding of shares that were computed from counts.
SLACK = 1e-6


def inclusion(profile: NDArray[np.float64], top_k: int, *, where: str = "routing") -> NDArray[np.float64]:
    """Chance that a token picks each expert: [..., experts] from shares that sum to 1, each row summing to top_k.

    Raises BadInput when top_k is more than the experts, or a share is more than 1 / top_k: no router without
    replacement can give it.
    """
    experts = profile.shape[-1]
    if not 0 < top_k <= experts:
        raise BadInput(f"top_k is {top_k} with {experts} experts", where=where, mend="give 1 to the number of experts")
    chance = profile * float(top_k)
    worst = float(chance.max(initial=0.0))
    if worst > 1.0 + SLACK:
        raise BadInput(
            f"an expert has {worst / top_k:.4f} of its layer's counts, but a top-{top_k} router gives one at most "
            f"{1.0 / top_k:.4f}",
            where=where,
            mend="check that top_k and the counts belong to one model",
        )
    return np.asarray(np.clip(chance, 0.0, 1.0))


def cap_shares(profile: NDArray[np.float64], top_k: int) -> NDArray[np.float64]:
    """Shares [..., experts] with none over 1 / top_k; what is cut goes to the others in proportion."""
    limit = 1.0 / top_k
    shares = profile / profile.sum(axis=-1, keepdims=True)
    capped = np.zeros(shares.shape, dtype=bool)
    for _ in range(shares.shape[-1]):
        over = (shares > limit * (1.0 + 1e-12)) & ~capped
        if not over.any():
            break
        capped |= over
        free = np.where(capped, 0.0, shares)
        rest = 1.0 - limit * capped.sum(axis=-1, keepdims=True)
        total = free.sum(axis=-1, keepdims=True)
        shares = np.where(capped, limit, free * np.where(total > 0, rest / np.where(total > 0, total, 1.0), 0.0))
    return np.asarray(shares)


def working_variance(chance: NDArray[np.float64]) -> NDArray[np.float64]:
    """Variances v [..., experts] of independent draws that leave pi (1 - pi) once their sum is pinned.

    Pinning the sum of independent variables takes v_e^2 / sum(v) off each variance; v - v^2 / sum(v) = pi (1 - pi) is
    solved by its fixed point (the Hajek approximation of the covariance of conditional Poisson sampling: Hajek,
    Sampling from a Finite Population, 1981; Deville and Tille, J. Stat. Plan. Inference 128, 2005).
    """
    target = chance * (1.0 - chance)
    value = target.copy()
    for _ in range(200):
        total = value.sum(axis=-1, keepdims=True)
        # With one expert above half of the spread there is no solution; half is the closest.
        part = np.minimum(value / np.where(total > 0, total, 1.0), 0.5)
        renewed = target / (1.0 - part)
        if np.abs(renewed - value).max(initial=0.0) < TOLERANCE:
            break
        value = renewed
    return np.asarray(value)


@njit(cache=True)
def suffix_polynomials(odds: NDArray[np.float64], top_k: int) -> NDArray[np.float64]:
    """Elementary symmetric polynomials of the odds from e on: [experts + 1, top_k + 1]."""
    experts = odds.shape[0]
    table = np.zeros((experts + 1, top_k + 1))
    table[experts, 0] = 1.0
    for e in range(experts - 1, -1, -1):
        table[e, 0] = 1.0
        for j in range(1, top_k + 1):
            table[e, j] = table[e + 1, j] + odds[e] * table[e + 1, j - 1]
    return table


@njit(cache=True)
def _chances(odds: NDArray[np.float64], top_k: int, out: NDArray[np.float64]) -> None:
    experts = odds.shape[0]
    suffix = suffix_polynomials(odds, top_k)
    prefix = np.zeros(top_k + 1)
    prefix[0] = 1.0
    total = suffix[0, top_k]
    for e in range(experts):
        without = 0.0
        for j in range(top_k):
            without += prefix[j] * suffix[e + 1, top_k - 1 - j]
        out[e] = odds[e] * without / total
        for j in range(top_k, 0, -1):
            prefix[j] += odds[e] * prefix[j - 1]


@njit(cache=True)
def _solve_odds(
    chance: NDArray[np.float64], top_k: int, tolerance: float, rounds: int, edge: float
) -> NDArray[np.float64]:
    experts = chance.shape[0]
    target = np.empty(experts)
    for e in range(experts):
        held = min(max(chance[e], edge), 1.0 - edge)
        target[e] = held / (1.0 - held)
    odds = target.copy()
    found = np.empty(experts)
    for _ in range(rounds):
        _chances(odds, top_k, found)
        worst = 0.0
        for e in range(experts):
            gap = abs(found[e] - chance[e])
            worst = max(worst, gap)
            held = min(max(found[e], edge), 1.0 - edge)
            odds[e] *= target[e] * (1.0 - held) / held
        if worst < tolerance:
            break
    return odds


def solve_odds(chance: NDArray[np.float64], top_k: int) -> NDArray[np.float64]:
    """Odds [experts] of conditional Poisson sampling whose chances of inclusion are `chance` (sum top_k)."""
    if top_k == chance.shape[0]:
        return np.ones_like(chance)
    odds = _solve_odds(np.ascontiguousarray(chance), top_k, TOLERANCE, MAX_ROUNDS, EDGE)
    return np.asarray(odds)


def chances(odds: NDArray[np.float64], top_k: int) -> NDArray[np.float64]:
    """Exact chance of inclusion [experts] of conditional Poisson sampling with these odds."""
    out = np.empty_like(odds)
    _chances(odds, top_k, out)
    return out
