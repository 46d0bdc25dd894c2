"""The `table` fidelity: step time over a grid, priced once by `maxplus`, looked up at every step of the serving loop.

Ranks meet at every dispatch and combine, so what a step takes depends on the slowest rank of each stage. The grid is
priced on one collapsed rank that has, at each stage, the duration of the slowest: exact for the sequential schedule
where one rank is the slowest throughout, an approximation otherwise (`simulate --fidelity maxplus` checks it).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.cost.estimate import Estimate, Tag, estimate
from moesim.engine.lookups import interpolated, trilinear
from moesim.engine.routing_draws import RoutingDraws
from moesim.engine.step_graph import step_seconds
from moesim.errors import OutsideProfile
from moesim.graph.batch import StepBatch, step_batch
from moesim.graph.priced_step import Part, PricedStep
from moesim.graph.pricing import Pricer

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Detail:
    """How finely step tables are made.

    draws: independent steps per grid point and load, whose mean is the table's value; prompts bring many tokens, whose
    counts scatter little. loads: most judged loads of a phase that are drawn from. factor: between neighbouring token
    counts and hot factors of the grid; midpoints: whether decode has one more in each octave above 8. attention:
    attention times of the grid as shares of the longest, where something overlaps.
    """

    draws: Mapping[str, int]
    loads: int
    factor: float
    midpoints: bool
    attention: tuple[float, ...]


FULL = Detail({"decode": 3, "prefill": 1}, 2**30, 2.0, True, (0.0, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0))
# For a first look at many plans; docs/how-to/tune.md says how far it is from the full one.
COARSE = Detail({"decode": 2, "prefill": 1}, 1, 8.0, False, (0.0, 0.1, 1.0))
# Attention times of the grid, as shares of the longest: two points are exact where nothing overlaps (linear).
LINEAR = ("sequential", "whole_graph")
_SHARES_SEQUENTIAL = (0.0, 1.0)


@dataclass(frozen=True)
class PricedGrid:
    """Grid points of one kind of step, priced but not yet timed.

    tokens: [nt] mean tokens of an attention-DP rank; hot: [nh] largest over mean; steps run over loads, draws, tokens,
    hot (slowest first). loads: indices of the judged loads. lower, upper: the errors that end the grid, if any do.
    """

    tokens: Floats
    hot: Floats
    loads: list[int]
    draws: int
    priced: PricedStep
    lower: OutsideProfile | None
    upper: OutsideProfile | None

    def steps_near(self, mean_tokens: float, hot: float) -> NDArray[np.int64]:
        """Indices of the priced steps, over all loads and draws, at the grid point nearest to this load."""
        i = int(np.abs(np.log(self.tokens / max(mean_tokens, 1e-9))).argmin())
        j = int(np.abs(np.log(self.hot / max(hot, 1.0))).argmin())
        repeats = np.arange(len(self.loads) * self.draws)
        return (repeats * len(self.tokens) + i) * len(self.hot) + j


@dataclass(frozen=True)
class StepTable:
    """Timed grid of one kind of step: seconds [nt, nh, nx] over mean tokens, hot factor and attention time per layer.

    before_s: [nt] time per layer of a rank before dispatch without its attention kernel, at rows = `tokens`.
    """

    tokens: Floats
    hot: Floats
    attention_s: Floats
    seconds: Floats
    before_s: Floats
    lower: OutsideProfile | None
    upper: OutsideProfile | None

    def step_s(self, mean_tokens: float, hot: float, attention_s: float) -> float:
        """Seconds of one step. Raises OutsideProfile past either priced end of the grid."""
        if mean_tokens < self.tokens[0] * (1 - 1e-9) and self.lower is not None:
            raise self.lower
        if mean_tokens > self.tokens[-1] * (1 + 1e-9) and self.upper is not None:
            raise self.upper
        return float(trilinear(self.tokens, self.hot, self.attention_s, self.seconds, mean_tokens, hot, attention_s))

    def before(self, rows: float) -> float:
        """Seconds per layer before dispatch, without the attention kernel, for a batch of `rows` tokens."""
        return float(interpolated(self.tokens, self.before_s, rows))


@dataclass(frozen=True)
class GridAsked:
    """What a grid is asked for.

    phase: "decode" or "prefill" (the hot rank reads prompts). tokens, hot: the axes, see PricedGrid. most_tokens: cap
    on a rank's tokens. kv_tokens: context at which the grid's attention is priced (its time is a grid axis, so this
    only has to be inside the profile).
    """

    phase: str
    mode: str
    graphed: bool
    tokens: Floats
    hot: Floats
    most_tokens: float
    kv_tokens: float
    seed: int
    detail: Detail = FULL


def price_grid(pricer: Pricer, routing: RoutingDraws, asked: GridAsked) -> PricedGrid:
    """Price all grid points that the cost model can; the grid ends, below and above, where it cannot.

    Raises OutsideProfile when not even one point can be priced.
    """
    loads, draws = routing.for_phase(asked.phase)[: asked.detail.loads], asked.detail.draws[asked.phase]
    try:
        return PricedGrid(
            asked.tokens, asked.hot, loads, draws, _price(pricer, routing, asked, asked.tokens), None, None
        )
    except OutsideProfile:
        pass
    good: list[float] = []
    below: OutsideProfile | None = None
    above: OutsideProfile | None = None
    for point in asked.tokens:
        try:
            _price(pricer, routing, asked, np.asarray([point]))
            good.append(float(point))
        except OutsideProfile as outside:
            if good:
                above = outside
                break
            below = outside
    if not good and below is not None:
        raise below
    kept = np.asarray(good)
    return PricedGrid(kept, asked.hot, loads, draws, _price(pricer, routing, asked, kept), below, above)


def _price(pricer: Pricer, routing: RoutingDraws, asked: GridAsked, tokens: Floats) -> PricedStep:
    ranks = pricer.setup.parallel.attention_dp
    mean, factor = (axis.ravel() for axis in np.meshgrid(tokens, asked.hot, indexing="ij"))
    largest = np.minimum(mean * factor, np.maximum(asked.most_tokens, mean))
    others = (mean * ranks - largest) / (ranks - 1) if ranks > 1 else largest
    share = 0.5 if pricer.setup.policies.schedule == "two_batch" else 1.0
    rows = np.repeat(others[:, None], ranks, axis=1)
    rows[:, 0] = largest
    loads = routing.for_phase(asked.phase)[: asked.detail.loads]
    draws = asked.detail.draws[asked.phase]
    repeats = len(loads) * draws
    rows = np.tile(rows, (repeats, 1)) * share
    group_tokens = rows.sum(axis=1)
    counts = []
    points = len(mean)
    for position, load in enumerate(loads):
        of_load = slice(position * draws * points, (position + 1) * draws * points)
        counts.append(routing.seeded_counts(load, group_tokens[of_load], (asked.seed, 4, position)))
    if asked.phase == "prefill":
        batch = step_batch(ranks=ranks, prefill_seqs=1.0, prefill_new=rows)
    else:
        # Products run on one row at least; fewer tokens in the mean are a group of which some ranks have none.
        batch = step_batch(
            ranks=ranks, decode_seqs=rows, decode_kv=asked.kv_tokens, padded_tokens=np.maximum(rows, share)
        )
    return pricer.price(batch, np.concatenate(counts), mode=asked.mode, graphed=asked.graphed, attention=False)


def time_grid(
    pricer: Pricer,
    grid: PricedGrid,
    *,
    longest_attention_s: float,
    normal: Mapping[str, float] | None,
    load_weights: Floats,
    detail: Detail = FULL,
    stage: int = 0,
) -> StepTable:
    """Time a priced grid under one draw: normals as in `Part.seconds`, weights over all judged loads (sum 1).

    stage: which pipeline stage's time the table tells.
    """
    setup = pricer.setup
    overlapped = setup.policies.schedule not in LINEAR or setup.storage is not None
    shares = np.asarray(detail.attention if overlapped else _SHARES_SEQUENTIAL)
    attention_s = shares * max(longest_attention_s, 1e-9)
    times = len(shares)
    collapsed = _collapse(grid.priced, times)
    steps = collapsed.batch.steps
    kernel = estimate(np.tile(attention_s, steps // times)[:, None], Tag.INTERPOLATED, "grid", 0.0, "grid axis")
    collapsed = replace(
        collapsed,
        attention=Part((kernel,)),
        others=tuple(replace(one, attention=Part((kernel,))) for one in collapsed.others),
    )
    micro = [collapsed, collapsed] if setup.policies.schedule == "two_batch" else [collapsed]
    seconds = step_seconds(setup, micro, normal=normal, collapsed=True, stage=stage)
    shaped = seconds.reshape(len(grid.loads), grid.draws, len(grid.tokens), len(grid.hot), times)
    weights = load_weights[grid.loads]
    weights = weights / weights.sum() if weights.sum() > 0 else np.full(len(weights), 1.0 / len(weights))
    mean = np.tensordot(weights, shaped.mean(axis=1), axes=1)
    before = (grid.priced.projections + grid.priced.gate + grid.priced.shared).seconds(normal)
    points = len(grid.tokens) * len(grid.hot)
    by_point = np.broadcast_to(before, (grid.priced.batch.steps, before.shape[1]))[:points]
    largest = by_point.max(axis=1).reshape(len(grid.tokens), len(grid.hot))[:, 0]
    return StepTable(
        tokens=grid.tokens,
        hot=grid.hot,
        attention_s=attention_s,
        seconds=np.ascontiguousarray(mean),
        before_s=np.maximum.accumulate(largest),
        lower=grid.lower,
        upper=grid.upper,
    )


def _collapse(priced: PricedStep, times: int) -> PricedStep:
    """Keep the slowest rank of every part, and repeat each step for each attention time."""

    def of(part: Part) -> Part:
        return Part(tuple(_slowest(one, times) for one in part.estimates))

    names = [name for name, value in vars(priced).items() if isinstance(value, Part)]
    parts: dict[str, Any] = {name: of(getattr(priced, name)) for name in names}
    batch = priced.batch
    one = StepBatch(*(np.repeat(axis.max(axis=1, keepdims=True), times, axis=0) for axis in vars(batch).values()))
    return replace(priced, batch=one, others=tuple(_collapse(other, times) for other in priced.others), **parts)


def _slowest(one: Estimate, times: int) -> Estimate:
    seconds = one.seconds.max(axis=-1, keepdims=True)
    if seconds.shape[0] > 1:
        seconds = np.repeat(seconds, times, axis=0)
    return estimate(seconds, np.int8(0), one.family, one.rel_sigma, one.source)  # type: ignore[arg-type]
