"""Judging a placement by the copies of tokens that cross between nodes, on tokens that it was not fitted to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.routing.picks import TokenPicks
from moesim.routing.trace import RoutingCounts
from moesim.spec.plan import ExpertPlacement, PlacementRequest, max_over_mean
from placement.compare import BASELINE, PLANNED, Split, refit
from placement.copies import CrossNodeCopies, count_copies
from placement.judge import DRAWS, LEVEL, Figure
from placement.problem import solve, without_redundancy

Floats = NDArray[np.float64]

REFERENCES = (BASELINE, "greedy", "eplb")
BLOCKS = 64
"""Runs of successive steps that the bootstrap draws: tokens of one request, which look alike, mostly fall in one."""

BALANCE_DRAWS = 400
"""Bootstrap draws of the balance, each of which lays out every block's counts anew."""


@dataclass(frozen=True)
class CrossNode:
    """Copies of a held-out token in a layer by contender and mode, balance, and what the plan gains over the others.

    gains: reference -> fewer normal copies. balance: contender -> max/mean on all held-out tokens. balance_gains: the
    same as gains, of max/mean. per_step: contender -> max/mean of a step. message_bytes: dispatch and combine of one
    copy in DeepEP's normal mode, None where the model is not known.
    """

    nodes: int
    replica: str
    tokens: int
    picks: float
    copies: dict[str, dict[str, float]]
    gains: dict[str, Figure]
    balance: dict[str, float]
    per_step: dict[str, float]
    balance_gains: dict[str, Figure]
    message_bytes: float | None = None

    def to_json(self) -> dict[str, Any]:
        """All of it, with bytes of a token and layer where a copy's are known."""
        out: dict[str, Any] = {
            "nodes": self.nodes,
            "replica": self.replica,
            "tokens": self.tokens,
            "picks": self.picks,
            "copies": self.copies,
            "gain": {name: gain.to_json() for name, gain in self.gains.items()},
            "max_over_mean": self.balance,
            "per_step_max_over_mean": self.per_step,
            "gain_in_balance": {name: gain.to_json() for name, gain in self.balance_gains.items()},
        }
        if self.message_bytes is not None:
            out["normal_bytes"] = {name: of["normal"] * self.message_bytes for name, of in self.copies.items()}
        return out

    def sentence(self, solver: str) -> str:
        """What `place` says of it."""
        planned = self.copies[PLANNED]
        others = ", ".join(f"{self.copies[name]['normal']:.3f} {name}" for name in REFERENCES)
        gain = self.gains["greedy"]
        even = self.balance_gains["greedy"]
        told = (
            f"On held-out tokens, {planned['normal']:.3f} copies of a token cross between {self.nodes} nodes in a "
            f"layer under {solver} ({others}): "
        )
        if gain.low > 0:
            told += f"{gain.value:.1%} fewer than greedy ({gain.level:.0%} interval {gain.low:.1%} to {gain.high:.1%})"
        elif gain.high < 0:
            told += (
                f"{-gain.value:.1%} more than greedy ({gain.level:.0%} interval {-gain.high:.1%} to {-gain.low:.1%})"
            )
        else:
            told += "no gain over greedy that can be told"
        told += (
            f", at max/mean {self.balance[PLANNED]:.3f} against {self.balance['greedy']:.3f} "
            f"(difference {-even.value:+.1%}, {-even.high:+.1%} to {-even.low:+.1%})"
        )
        return (
            f"{told}. DeepEP's normal mode sends these; low-latency and plain all-to-alls send "
            f"{planned['low_latency']:.3f}, one for each pick elsewhere."
        )


def judge_cross_node(
    split: Split, request: PlacementRequest, solver: str, *, replica: str = "equal", message_bytes: float | None = None
) -> CrossNode | None:
    """Fit contiguous, greedy, eplb and the solver to the split's first part, and count copies on the second.

    None where there is one node, ranks do not fill the nodes, or no held-out load tells which experts a token picks.
    """
    judge = [load for load in split.judge if load.tokens is not None]
    if request.nodes < 2 or request.ranks % request.nodes or not judge:
        return None
    fitted = refit(request, split.fit)
    found = {BASELINE: solve(without_redundancy(fitted), BASELINE).placement}
    found |= {name: solve(fitted, name).placement for name in REFERENCES[1:]}
    found[PLANNED] = found[solver] if solver in found else solve(fitted, solver).placement
    return compare_copies(found, judge, nodes=request.nodes, replica=replica, seed=request.seed, one=message_bytes)


def compare_copies(
    found: Mapping[str, ExpertPlacement],
    judge: Sequence[RoutingCounts],
    *,
    nodes: int,
    replica: str,
    seed: int,
    one: float | None = None,
) -> CrossNode:
    """Count the copies of the loads' tokens under each placement, and compare `planned` with every other, paired."""
    picks = [load.tokens for load in judge if load.tokens is not None]
    blocks = [min(BLOCKS, int(part.step.max()) + 1) for part in picks]
    counted = {name: _joined(placement, picks, blocks, nodes, replica) for name, placement in found.items()}
    rng = np.random.default_rng(seed)
    tokens = sum(len(part.step) for part in picks)
    times = rng.multinomial(sum(blocks), np.full(sum(blocks), 1.0 / sum(blocks)), size=DRAWS).astype(np.float64)
    crossing = {name: of.copies[:, :, 0].sum(axis=1) for name, of in counted.items()}
    counts = np.concatenate([_by_block(load, size) for load, size in zip(judge, blocks, strict=True)])
    balance = {name: _balance(placement, counts, times[:BALANCE_DRAWS]) for name, placement in found.items()}
    steps = {
        name: np.mean([max_over_mean(placement.rank_loads(load.counts)).mean() for load in judge])
        for name, placement in found.items()
    }
    others = [name for name in found if name != PLANNED]
    return CrossNode(
        nodes=nodes,
        replica=replica,
        tokens=tokens,
        picks=float(sum((part.ids >= 0).sum() for part in picks) / counted[PLANNED].tokens.sum()),
        copies={name: of.mean() for name, of in counted.items()},
        gains={
            name: _gain(
                crossing[PLANNED].sum() / max(crossing[name].sum(), 1e-300),
                (times @ crossing[PLANNED]) / np.maximum(times @ crossing[name], 1e-300),
            )
            for name in others
        },
        balance={name: float(values[0]) for name, values in balance.items()},
        per_step={name: float(value) for name, value in steps.items()},
        balance_gains={
            name: _gain(balance[PLANNED][0] / balance[name][0], balance[PLANNED][1:] / balance[name][1:])
            for name in others
        },
        message_bytes=one,
    )


def _joined(
    placement: ExpertPlacement, picks: Sequence[TokenPicks], blocks: Sequence[int], nodes: int, replica: str
) -> CrossNodeCopies:
    parts = [
        count_copies(placement, part, nodes=nodes, replica=replica, blocks=size)
        for part, size in zip(picks, blocks, strict=True)
    ]
    return CrossNodeCopies(
        np.concatenate([part.copies for part in parts]), np.concatenate([part.tokens for part in parts])
    )


def _by_block(load: RoutingCounts, blocks: int) -> Floats:
    """Counts of each block of successive steps: [blocks, layers, experts]."""
    steps = len(load.counts)
    out = np.zeros((blocks, *load.counts.shape[1:]))
    np.add.at(out, np.arange(steps) * blocks // steps, load.counts)
    return out


def _balance(placement: ExpertPlacement, counts: Floats, times: Floats) -> Floats:
    """max/mean of the sum of all blocks, then of each draw of them, mean over layers: [1 + draws]."""
    loads = placement.rank_loads(counts)
    drawn = np.tensordot(np.concatenate([np.ones((1, len(counts))), times]), loads, axes=1)
    return np.asarray(max_over_mean(drawn).mean(axis=-1))


def _gain(value: float, drawn: Floats) -> Figure:
    low, high = np.quantile(1.0 - drawn, [(1.0 - LEVEL) / 2.0, (1.0 + LEVEL) / 2.0])
    return Figure(float(1.0 - value), float(low), float(high), LEVEL)
