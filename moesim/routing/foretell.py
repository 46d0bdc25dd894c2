"""The load of a workload that was described and not measured: foretold from measured ones, by phase and prompt length.

Expert shares move with the length of prompts, nearly along a line in its logarithm, and differ between prefill and
decode. So the logarithms of the shares are kriged over both: what is foretold is a product of powers of the measured
shares, with powers that sum to 1 and depend on the descriptions alone, the same for every expert. A phase's only file
stands for it; several files of one length are averaged; beyond the measured lengths the line goes on, less far the less
the files tell of it.

Ordinary kriging: C. E. Rasmussen, C. K. I. Williams, Gaussian Processes for Machine Learning (2006), section 2.7.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moesim.errors import BadInput
from moesim.routing.trace import RoutingCounts, at_most
from moesim.spec.scenario import ExpectSpec

Floats = NDArray[np.float64]

# Variances of ln(share), of which only the ratios count. They were set with the six DeepSeek-R1 files in view; at a
# third and three times each of them those files are foretold as well (tests/regression/test_foretold_loads.py).
OF_PHASE = 0.08
OF_DOUBLING = 0.03
OF_FILE = 0.01
# Added to shares before their logarithm, in parts of an even share: an expert that counted nothing has no logarithm.
FLOOR = 0.025


@dataclass(frozen=True)
class Described:
    """What is known of a workload: prefill or decode, and the tokens of its prompts (None: not told)."""

    phase: str
    prompt_tokens: float | None

    @classmethod
    def of(cls, load: RoutingCounts) -> Described:
        """What a load file says of itself."""
        return cls(load.phase, load.prompt_tokens)

    def __str__(self) -> str:
        length = "" if self.prompt_tokens is None else f" of {self.prompt_tokens:,.0f} tokens"
        return f"{self.phase}{length}"


def powers(known: Sequence[Described], asked: Described) -> Floats:
    """The power of each known workload's shares in the asked one's: [known], sum 1; below 0 where a line goes on.

    Raises BadInput where none of the known ones is of the asked phase.
    """
    if asked.phase not in {one.phase for one in known}:
        raise BadInput(
            f"no load is of the phase {asked.phase}", where="routing.expect", mend="say `phase` under routing.loads"
        )
    middle = {phase: _middle(known, phase) for phase in {one.phase for one in known}}

    def doublings(one: Described) -> float:
        return 0.0 if one.prompt_tokens is None else math.log2(one.prompt_tokens) - middle[one.phase]

    def alike(one: Described, other: Described) -> float:
        if one.phase != other.phase:
            return 0.0
        return OF_PHASE + OF_DOUBLING * doublings(one) * doublings(other)

    among = np.asarray([[alike(one, other) for other in known] for one in known]) + OF_FILE * np.eye(len(known))
    towards = np.asarray([alike(one, asked) for one in known])
    ones = np.ones(len(known))
    solved, even = np.linalg.solve(among, towards), np.linalg.solve(among, ones)
    return np.asarray(solved + even * (1.0 - ones @ solved) / (ones @ even))


def _middle(known: Sequence[Described], phase: str) -> float:
    told = [math.log2(one.prompt_tokens) for one in known if one.phase == phase and one.prompt_tokens is not None]
    return float(np.mean(told)) if told else 0.0


def foretold(loads: Sequence[RoutingCounts], asked: Described, top_k: int) -> Floats:
    """Shares [layers, experts] of a workload, each row summing to 1, none above one pick of every token.

    Raises BadInput as `powers` does.
    """
    shares = np.stack([load.profile() for load in loads])
    logs = np.log(shares + FLOOR / shares.shape[-1])
    found = np.exp(np.tensordot(powers([Described.of(load) for load in loads], asked), logs, axes=1))
    return at_most(found / found.sum(axis=-1, keepdims=True), 1.0 / top_k)


@dataclass(frozen=True)
class Expected:
    """Workloads to place for, their share of a fit's weight, and the experts that a token picks."""

    workloads: tuple[Described, ...]
    share: float
    top_k: int

    @classmethod
    def of(cls, spec: ExpectSpec | None, top_k: int) -> Expected | None:
        """As the scenario has them; None where it expects nothing."""
        if spec is None:
            return None
        return cls(tuple(Described(one.phase, one.prompt_tokens) for one in spec.workloads), spec.share, top_k)


def expecting(loads: Sequence[RoutingCounts], expected: Expected) -> tuple[RoutingCounts, ...]:
    """The loads with the expected workloads' foretold ones beside them. Raises BadInput as `powers` does."""
    weight = sum(load.weight for load in loads) * expected.share / (1.0 - expected.share)
    first = loads[0]
    made = [
        RoutingCounts(
            counts=foretold(loads, one, expected.top_k)[None],
            layer_ids=first.layer_ids,
            absolute_layers=first.absolute_layers,
            name=f"foretold: {one}",
            phase=one.phase,
            weight=weight / len(expected.workloads),
            law=first.law,
            picks=first.picks,
            prompt_tokens=one.prompt_tokens,
        )
        for one in expected.workloads
    ]
    return (*loads, *made)


def fit_expecting(
    fit: Sequence[RoutingCounts], judge: Sequence[RoutingCounts], expected: Expected | None
) -> tuple[RoutingCounts, ...]:
    """The loads to fit to where something is expected; `fit` themselves where nothing is.

    judge: whole files that the fit is judged on, none of its own. It is then told what those workloads are, and nothing
    of their loads: what the scenario expects may be something else, and nobody could say how well that was met. A
    judged file of a phase that no fit file has is not foretold. Raises BadInput as `powers` does.
    """
    if expected is None:
        return tuple(fit)
    if judge:
        phases = {load.phase for load in fit}
        others = tuple(dict.fromkeys(Described.of(load) for load in judge if load.phase in phases))
        expected = replace(expected, workloads=others)
    return expecting(fit, expected) if expected.workloads else tuple(fit)


@dataclass(frozen=True)
class Missed:
    """How far a file lies from what the others foretell of it, and from the nearest and the mean of the others.

    Root mean square over experts of the difference in shares, over an even share; mean over layers.
    """

    name: str
    foretold: float
    mean: float
    nearest: float


def leave_out(loads: Sequence[RoutingCounts], top_k: int) -> list[Missed]:
    """Each file foretold from the others, where one of those is of its phase."""
    found = []
    for place, load in enumerate(loads):
        others = [*loads[:place], *loads[place + 1 :]]
        if load.phase not in {one.phase for one in others}:
            continue
        own = load.profile()
        rest = np.stack([one.profile() for one in others])
        apart = [_distance(own, one) for one in (foretold(others, Described.of(load), top_k), rest.mean(axis=0), *rest)]
        found.append(Missed(load.name, apart[0], apart[1], min(apart[2:])))
    return found


def _distance(one: Floats, other: Floats) -> float:
    return float(np.sqrt(((one - other) ** 2).mean(axis=-1)).mean() * one.shape[-1])
