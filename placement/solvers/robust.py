"""A placement for several loads at once, none of which a step will repeat: annealing over them and over draws."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moesim.spec.plan import ExpertPlacement, PlacementRequest, max_over_mean
from placement.problem import refuse_uneven_groups
from placement.solvers.anneal import anneal_layers
from placement.solvers.draws import bootstrapped, drifted, even
from placement.solvers.greedy import pack_mix
from placement.solvers.search import search_layers

Floats = NDArray[np.float64]

DOUBLINGS = 3
"""The last search lowers the sum of (rank load over mean)**8, as the annealing does.

Judged by leaving one workload out of the six DeepSeek-R1 files, powers from 4 to 32 are within 0.002 of each other."""

PASSES = 30
"""Sweeps of the last search over all moves of a layer, at full effort; in practice it ends by itself earlier."""

SEARCHED_FROM = 0.5
"""Least effort that ends with that search: a single sweep costs as much as annealing at an effort of 0.06, and what it
gains on unseen files is less than seeds differ by."""

SWEEPS = 30
"""Moves of a layer's annealing, over the pairs of slots, at full effort."""

MOST_MOVES = 2_500_000
"""Moves of a layer at most: 58 layers of 384 slots then take some 8 CPU seconds."""

FIRST, LAST = 0.01, 0.0003
"""Thresholds at the start and at the end, in the cost's unit: a rank at the mean costs 1, one 1 % above it 1.08."""

EVEN_WEIGHT = 0.1
"""Weight of the even load beside the files and draws."""

DRAWS_WEIGHT = 0.4
"""Weight of all draws together."""

ROUNDS = 4
"""Times that the weights of the files are set anew for CVaR and worst, each with a fresh part of the moves."""

STEEPNESS = 2.0
"""A round multiplies a file's weight by up to e to this: the weights of a power sum must lie far apart to matter."""


@dataclass(frozen=True)
class RobustOptions:
    """What a robust solver looks at. risk: of the files' balances, the mean, the mean of the worst part, or the worst.

    tail: that part, of the files' weight. draws: made-up loads beside the files: "drift" along their differences, or
    "bootstrap", `count` mixes of them. even: whether the even load counts, too.
    """

    risk: Literal["mean", "cvar", "worst"] = "mean"
    tail: float = 0.5
    draws: Literal["none", "drift", "bootstrap"] = "drift"
    count: int = 8
    even: bool = True


def solve(request: PlacementRequest) -> ExpertPlacement:
    """Lower the mean over files, drifted draws and the even load; see `place`."""
    return place(request, RobustOptions(), "robust")


def solve_cvar(request: PlacementRequest) -> ExpertPlacement:
    """Lower the mean over the worse half of the files (conditional value at risk); see `place`."""
    return place(request, RobustOptions(risk="cvar"), "robust_cvar")


def solve_worst(request: PlacementRequest) -> ExpertPlacement:
    """Lower the worst file; see `place`."""
    return place(request, RobustOptions(risk="worst"), "robust_worst")


def solve_bootstrap(request: PlacementRequest) -> ExpertPlacement:
    """Lower the mean over files, mixes drawn from them and the even load; see `place`."""
    return place(request, RobustOptions(draws="bootstrap"), "robust_bootstrap")


def place(request: PlacementRequest, options: RobustOptions, name: str) -> ExpertPlacement:
    """Start from the greedy placement of the mix, anneal on every load at once, end with a search.

    With one load there is nothing to hedge between, and this is greedy. No two replicas of an expert on a rank; groups
    stay on their node where groups > 1. Raises Infeasible where groups, nodes and ranks do not divide.
    """
    refuse_uneven_groups(request)
    table = pack_mix(request, request.mix())
    if len(request.loads) == 1:
        return request.placement(table, name)
    rng = np.random.default_rng([request.seed, 0x0B57])
    loads, weights = _scenarios(request, options, rng)
    node_ranks = request.ranks // request.nodes if request.groups > 1 else request.ranks
    by_layer = np.ascontiguousarray(loads.transpose(1, 0, 2))
    moves = int(request.effort * min(SWEEPS * request.slots**2, MOST_MOVES))
    passes = max(1, int(request.effort * PASSES))
    files = len(request.loads)
    rounds = 1 if options.risk == "mean" else ROUNDS
    tilt, lowest, best = request.weights, np.inf, table.copy()
    for turn in range(rounds):
        weights[:files] = tilt * weights[:files].sum()
        first = FIRST * (LAST / FIRST) ** (turn / (2 * rounds))  # later rounds keep more of what is there
        anneal_layers(table, by_layer, weights, request.ranks, node_ranks, moves // rounds, first, LAST, rng)
        each = np.ascontiguousarray(np.broadcast_to(weights, by_layer.shape[:2]))
        if request.effort >= SEARCHED_FROM:
            search_layers(table, by_layer, each, request.ranks, node_ranks, DOUBLINGS, passes)
        balance = max_over_mean(request.placement(table, name).rank_loads(request.loads)).mean(axis=1)
        figure = _risk(balance, request.weights, options)
        if figure < lowest:
            lowest, best = figure, table.copy()
        tilt = _tilted(tilt, balance, request.weights, 0.0 if options.risk == "worst" else options.tail)
    return request.placement(best, name)


def _risk(balance: Floats, weights: Floats, options: RobustOptions) -> float:
    """The figure of the files' balances that the options ask for."""
    if options.risk == "worst":
        return float(balance.max())
    tail = 1.0 if options.risk == "mean" else options.tail
    order = np.argsort(-balance)
    until = np.minimum(np.cumsum(weights[order]), tail)
    return float(np.diff(until, prepend=0.0) @ balance[order]) / tail


def _scenarios(request: PlacementRequest, options: RobustOptions, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Files, the even load and draws, with weights that sum to 1: [scenarios, layers, experts] and [scenarios]."""
    more = [(even(request.loads), EVEN_WEIGHT)] if options.even else []
    if options.draws == "drift":
        more.append((drifted(request.loads, request.weights), DRAWS_WEIGHT))
    elif options.draws == "bootstrap":
        more.append((bootstrapped(request.loads, request.weights, options.count, rng), DRAWS_WEIGHT))
    more = [(drawn, weight) for drawn, weight in more if len(drawn)]
    rest = 1.0 - sum(weight for _, weight in more)
    loads = [request.loads] + [drawn for drawn, _ in more]
    weights = [rest * request.weights] + [np.full(len(drawn), weight / len(drawn)) for drawn, weight in more]
    return np.concatenate(loads), np.concatenate(weights)


def _tilted(tilt: Floats, balance: Floats, weights: Floats, tail: float) -> Floats:
    """Weights moved towards the files that do worst, none above its own weight over `tail`.

    Multiplicative weights (Freund and Schapire, Games and Economic Behavior 29, 1999): their average solves the game
    in which the other side picks the files; the cap makes that side's best choice the conditional value at risk
    (Rockafellar and Uryasev, Journal of Risk 2(3), 2000).
    """
    excess = balance - 1.0
    new = tilt * np.exp(STEEPNESS * excess / max(float(excess.max()), 1e-12))
    most = weights / tail if tail > 0.0 else np.full(len(weights), 1.0)
    new /= new.sum()
    for _ in range(len(new)):
        over = new > most
        if not over.any() or over.all():
            break
        room = 1.0 - most[over].sum()
        new = np.where(over, most, new * room / new[~over].sum())
    return np.asarray(new)
