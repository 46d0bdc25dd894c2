"""Loads that were not seen, made from those that were: what a robust solver looks at besides the files themselves."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def even(loads: Floats) -> Floats:
    """The load on which all experts are alike: [1, layers, experts].

    Shares that were seen overstate how far the next ones lie apart (regression to the mean), so the next load leans
    towards this one.
    """
    return np.full((1, *loads.shape[1:]), 1.0 / loads.shape[2])


def drifted(loads: Floats, weights: Floats) -> Floats:
    """Loads on both sides of the files' mean along each direction in which the files differ, all at one distance.

    loads: [scenarios, layers, experts]; weights: [scenarios], sum 1; returns [2 x (scenarios - 1), layers, experts],
    each layer summing to 1; shares may be negative, which a cost of even power does not mind. Directions are the
    principal components of the shares over all layers at once. The distance is the standard deviation along the
    largest: a handful of files says little about which of their differences the next workload will show most of.
    """
    scenarios, layers, experts = loads.shape
    mean = np.tensordot(weights, loads, axes=1)
    off = ((loads - mean) * np.sqrt(weights)[:, None, None]).reshape(scenarios, -1)
    _, deviation, direction = np.linalg.svd(off, full_matrices=False)
    kept = deviation[:-1] > 1e-9 * max(float(deviation[0]), 1e-300)  # the last is nothing: the mean was taken off
    steps = deviation[0] * direction[:-1][kept].reshape(-1, layers, experts)
    return np.ascontiguousarray(np.concatenate([mean + steps, mean - steps]))


def bootstrapped(loads: Floats, weights: Floats, draws: int, rng: np.random.Generator) -> Floats:
    """Mixes of the files, the weights of each drawn from the Dirichlet distribution about `weights`: [draws, ...].

    The Bayesian bootstrap (Rubin, Annals of Statistics 9(1), 1981) over files: what the mix could have been.
    """
    alpha = np.maximum(weights * len(weights), 1e-6)
    return np.ascontiguousarray(np.tensordot(rng.dirichlet(alpha, size=draws), loads, axes=1))
