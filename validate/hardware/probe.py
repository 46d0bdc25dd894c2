"""The profile taken on the spot, before anything is predicted: each operation of the layer at shapes of its own.

None of the shapes is one of the test runs': token counts lie between them, exchanges are even, experts are balanced
(or, for the grouped kernel, drawn at random).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from profiles.traffic import shared_with, traffic
from validate.hardware.costs import Curve, ExpertCost, Floats, fit_grouped, fit_loop, rising
from validate.hardware.group import need_torch
from validate.hardware.job import copies_held
from validate.hardware.layer import (
    Mark,
    Permuted,
    RankLayer,
    Weights,
    combine,
    dispatch,
    draw_tokens,
    gate,
    permute,
    run_experts,
    unpermute,
)
from validate.hardware.rig import Rig, generator
from validate.hardware.sampling import Point, probe_sizes, sample
from validate.hardware.scatter import Scatter, scatter

TOKEN_POINTS = 6
EXCHANGE_POINTS = 9
KEEP_POINTS = 4
ALONE_POINTS = 3  # of the expert points, from few rows to many
ONE_WAY_POINTS = 3  # the largest sizes, where bytes and not latency make the time
EXPERT_POINTS = 12
# Up to here every number of rows is profiled: libraries of matrix products take another path for each few of them (MKL
# on AVX-512: a step up at 4 rows, and 15 rows take a third longer than 16).
EVERY_ROW = 18
GROUPED_POINTS = 24
# Rows in one experts sample: many experts at small sizes (so that their weights do not stay in the near caches), few
# at large ones (so that a sample stays short).
SAMPLE_ROWS = 2048
SAMPLE_EXPERTS = 32
# So many sizes are sampled a second time with a part of the experts, to tell what the first of them takes longer.
START_POINTS, START_PART = 6, 8
# The machine's pace: a sample of so many experts of so many rows, so many times in each turn of profile and test.
PACE_EXPERTS, PACE_ROWS, PACE_TIMES = 4, 16, 6
# Rows of each expert when experts run only for what they do to the operation after them.
BETWEEN_ROWS = 4
# Ranks come to an exchange up to this late, each at random; in a skewed layer they do so by milliseconds.
LATENESS_S = 5e-3
# Dirichlet concentrations of the random histograms of the grouped kernel: one hot expert, uneven, nearly even.
CONCENTRATIONS = (0.1, 1.0, 10.0)


@dataclass(frozen=True)
class Profile:
    """What was measured on the spot, on all ranks at once.

    gate, permute, unpermute: seconds over tokens of a rank. dispatch, combine: seconds over the bytes that the busiest
    rank sends and receives. keep: extra seconds over the bytes that stay on a rank (copied, not sent). both_ways: how
    much of a rank's less busy direction adds to its time (0 to 1). alone: time of a rank's experts while the other
    ranks wait, over their time while all compute (at most 1). core_share: how much of a processor the ranks had while
    they computed (None: a device computes). pace_s: median of the sample that the test runs, too. scatter: how the
    runs of each operation lie around their median, by the size that its curve takes (experts: by the seconds). points:
    every measured median with its p10 and p90.
    """

    gate: Curve
    permute: Curve
    unpermute: Curve
    dispatch: Curve
    combine: Curve
    keep: Curve
    both_ways: float
    experts: ExpertCost
    alone: float
    core_share: float | None
    pace_s: float
    scatter: dict[str, Scatter]
    points: list[dict[str, Any]]


def measure(rig: Rig, counts: list[NDArray[np.int64]]) -> Profile:
    """Profile every operation, all ranks together.

    counts: rows of the test cases, [source ranks, slots] each; they only say how far the points must reach.
    """
    token_sizes = probe_sizes(0.6 * min(rig.job.tokens), 1.5 * max(rig.job.tokens), TOKEN_POINTS, set(rig.job.tokens))
    away_sizes, home_sizes = _exchange_sizes(rig, counts)
    histograms = random_histograms(rig, counts) if rig.grouped else even_histograms(rig, counts)
    expert_shapes = [*histograms, *(() if rig.grouped else with_fewer(histograms))]
    one_way_sizes = away_sizes[-ONE_WAY_POINTS:] if rig.job.ranks > 1 else []
    shapes = (
        [local_point(rig, size) for size in token_sizes],
        [_exchange_point(rig, away=size, home=0) for size in away_sizes],
        [_exchange_point(rig, away=0, home=size) for size in home_sizes],
        [_exchange_point(rig, away=size, home=0, one_way=True) for size in one_way_sizes],
        [expert_point(rig, histogram) for histogram in expert_shapes],
        [expert_point(rig, histograms[index], only=rank) for index, rank in _alone(rig, len(histograms))],
        pace_points(rig),
    )
    found, core_share = sample(rig, [point for group in shapes for point in group])
    ends = np.cumsum([len(group) for group in shapes])
    local, away, home, one_way, experts, lonely, pace = (
        found[end - len(group) : end] for end, group in zip(ends, shapes, strict=True)
    )

    points: list[dict[str, Any]] = []
    gate_s, permute_s, unpermute_s = (
        [
            note(points, name, {"tokens": size}, spent[..., column])
            for size, spent in zip(token_sizes, local, strict=True)
        ]
        for column, name in ((0, "gate"), (1, "permute"), (3, "unpermute"))
    )
    sent = [size * (rig.job.ranks - 1) * row_bytes(rig) for size in away_sizes]
    dispatch_s, combine_s = (
        [note(points, name, {"sent_bytes": size}, spent[..., column]) for size, spent in zip(sent, away, strict=True)]
        for column, name in ((0, "dispatch"), (2, "combine"))
    )
    kept = [size * row_bytes(rig) for size in home_sizes]
    stay_s = [note(points, "keep", {"kept_bytes": size}, spent[..., 2]) for size, spent in zip(kept, home, strict=True)]
    single = [size * (rig.job.ranks // 2) * row_bytes(rig) for size in one_way_sizes]
    single_s = [
        note(points, "one_way", {"sent_bytes": size}, _slowest(spent[..., 2]))
        for size, spent in zip(single, one_way, strict=True)
    ]
    combine_curve = rising(sent, combine_s)
    expert_s = [
        note(points, "experts", {"histogram": histogram.tolist()}, spent[..., 0])
        for histogram, spent in zip(expert_shapes, experts, strict=True)
    ]
    return Profile(
        gate=rising(token_sizes, gate_s),
        permute=rising(token_sizes, permute_s),
        unpermute=rising(token_sizes, unpermute_s),
        dispatch=rising(sent, dispatch_s),
        combine=combine_curve,
        keep=rising([0, *kept], [0.0, *(max(value - combine_s[0], 0.0) for value in stay_s)]),
        both_ways=shared_with(combine_curve.sizes, combine_curve.seconds, single, single_s),
        alone=_ratio(points, histograms, _alone(rig, len(histograms)), experts, lonely),
        experts=(fit_grouped if rig.grouped else fit_loop)(expert_shapes, expert_s),
        core_share=core_share,
        pace_s=note(points, "pace", {"rows": PACE_ROWS}, np.concatenate(pace, axis=1)[..., 0]),
        scatter={
            **{
                name: scatter(token_sizes, [spent[..., column] for spent in local], relative=True)
                for column, name in ((0, "gate"), (1, "permute"), (3, "unpermute"))
            },
            **{
                name: scatter(sent, [spent[..., column] for spent in away], relative=False)
                for column, name in ((0, "dispatch"), (2, "combine"))
            },
            "experts": scatter(expert_s, [spent[..., 0] for spent in experts], relative=True),
        },
        points=points,
    )


def note(points: list[dict[str, Any]], operation: str, shape: dict[str, Any], samples: Floats) -> float:
    """Keep a point's median, p10 and p90 over all ranks and repeats; return the median."""
    low, middle, high = np.quantile(samples, [0.1, 0.5, 0.9]).tolist()
    points.append({"operation": operation, **shape, "median_s": middle, "p10_s": low, "p90_s": high})
    return float(middle)


def _slowest(samples: Floats) -> Floats:
    """Samples of the rank with the largest median: [ranks, repeats] -> [repeats]."""
    return np.asarray(samples[int(np.median(samples, axis=1).argmax())])


def local_point(rig: Rig, size: int) -> Point:
    """Gate, permute and unpermute of `size` tokens, experts between the last two: four operations, the third idle."""
    torch = need_torch()
    job, layer = rig.job, rig.layers[0]
    drawn = draw_tokens(size, rig.basis, np.asarray(job.profile), generator(job, 2, rig.group.rank, size))
    x = torch.as_tensor(drawn).to(rig.group.device, rig.tokens[job.tokens[0]].dtype)

    experts_between = _experts_between(rig)

    def call(mark: Mark) -> None:
        mark()
        ids, weights = gate(x, layer.router, job.shape.top_k)
        mark()
        permuted = permute(x, ids, layer.routes)
        mark()
        experts_between()
        back = permuted.rows.clone()  # as combine leaves them: just written
        mark()
        unpermute(back, permuted.source, weights)
        mark()

    return Point(f"gate and permute at {size} tokens", call, (False, False, False, False))


def row_bytes(rig: Rig) -> int:
    """Bytes of one token's row as it travels."""
    return int(rig.job.shape.hidden * rig.tokens[rig.job.tokens[0]].element_size())


def _exchange_sizes(rig: Rig, counts: list[NDArray[np.int64]]) -> tuple[list[int], list[int]]:
    """Rows to each other rank (0 among them), and rows kept, that span those of the test cases."""
    peers = rig.job.ranks - 1
    busiest = [int(traffic(case).busiest(0.0)) for case in counts]
    kept = [int(traffic(case).kept.max()) for case in counts]
    away = [0]
    if peers:
        avoid = {rows // peers for rows in busiest if rows % peers == 0}
        away += probe_sizes(1, 1.3 * max(busiest) / peers, EXCHANGE_POINTS, avoid)
    return away, probe_sizes(1, 1.3 * max([*kept, 1]), KEEP_POINTS, set(kept))


def _exchange_point(rig: Rig, *, away: int, home: int, one_way: bool = False) -> Point:
    """Dispatch and combine with `away` rows to each other rank and `home` rows kept; between them, rows are written.

    `one_way`: only the first half of the ranks sends (and only to the second half) in dispatch, only the second half in
    combine.
    The ranks come to both at different moments, as they do in the layer: one that waited must be woken first.
    """
    torch = need_torch()
    group, like = rig.group, rig.tokens[rig.job.tokens[0]]
    ranks, local = rig.job.ranks, rig.local_slots[0]
    to_rank = np.full(ranks, away)
    if one_way:
        middle = ranks // 2
        to_rank[:middle] = 0
        to_rank[middle:] *= int(group.rank < middle)
    to_rank[group.rank] = home
    slots = np.stack([np.bincount(np.arange(rows) % local, minlength=local) for rows in to_rank])
    source = torch.randn(int(to_rank.sum()), rig.job.shape.hidden).to(like.device, like.dtype)
    slot_counts = torch.as_tensor(slots.reshape(-1)).to(like.device)
    before = rig.tokens[min(rig.tokens)]
    experts_between = _experts_between(rig)
    rng = generator(rig.job, 7, group.rank, away, home, int(one_way))

    def call(mark: Mark) -> None:
        ids, _ = gate(before, rig.layers[0].router, rig.job.shape.top_k)  # so that dispatch is not the first to run
        permute(before, ids, rig.layers[0].routes)
        rows = source.clone()  # as permute leaves them: just written
        group.linger(rng.uniform(0.0, LATENESS_S))
        mark()
        arrived = dispatch(Permuted(rows, None, slot_counts), group)
        mark()
        experts_between()
        done = arrived.rows.clone()  # as the experts leave them
        group.linger(rng.uniform(0.0, LATENESS_S))
        mark()
        combine(done, arrived, group)
        mark()

    return Point(
        f"all-to-all of {away} rows to each rank{', one way' * one_way}, {home} kept", call, (True, False, True)
    )


def _experts_between(rig: Rig) -> Callable[[], None]:
    """A short run of some experts: in the layer, what follows them finds the caches and the clocks they leave."""
    torch = need_torch()
    like, local = rig.tokens[rig.job.tokens[0]], rig.local_slots[0]
    used = min(local, SAMPLE_EXPERTS)
    counts = [[BETWEEN_ROWS] * used + [0] * (local - used), *([[0] * local] * (rig.job.ranks - 1))]
    rows = torch.randn(BETWEEN_ROWS * used, rig.job.shape.hidden).to(like.device, like.dtype)
    some = _some_experts(rig, local)

    def call() -> None:
        run_experts(rows, counts, some())

    return call


def _some_experts(rig: Rig, count: int) -> Callable[[], RankLayer]:
    """A layer of `count` experts, drawn from all that this rank holds, anew each time.

    Repeating one placement's experts would leave their weights in a shared last-level cache; the test cases, which
    take turns, find them as cold as a rank's whole set of weights makes them. (The grouped kernel has its weights in
    one tensor and keeps the first placement's.)
    """
    layer, pool = rig.layers[0], _held(rig)
    rng = generator(rig.job, 12, rig.group.rank)
    if layer.stacked is not None:
        return lambda: layer
    return lambda: replace(layer, weights=tuple(pool[index] for index in rng.choice(len(pool), count, replace=False)))


def _held(rig: Rig) -> list[Weights]:
    """The weights of every copy of an expert that this rank holds under any placement."""
    return list({id(pair[0]): pair for each in rig.layers for pair in each.weights}.values())


def _held_by_all(rig: Rig) -> int:
    """How many of them the rank with the fewest has: all ranks run the same samples."""
    return min(one.total() for one in copies_held(rig.job))


def _alone(rig: Rig, count: int) -> list[tuple[int, int]]:
    """Which of `count` expert points which ranks run alone, in turns: none with one rank."""
    picked = np.linspace(0, count - 1, ALONE_POINTS + 2).round().astype(int)[1:-1]
    return [(int(index), rank) for index in picked for rank in range(rig.job.ranks)] if rig.job.ranks > 1 else []


def _ratio(
    points: list[dict[str, Any]],
    histograms: list[NDArray[np.int64]],
    which: list[tuple[int, int]],
    together: list[Floats],
    alone: list[Floats],
) -> float:
    """The median over the points that ranks ran alone of their time over the same rank's with all; at most 1."""
    ratios = []
    for (index, rank), spent in zip(which, alone, strict=True):
        shape = {"histogram": histograms[index].tolist(), "rank": rank}
        median_s = note(points, "experts_alone", shape, spent[rank, :, 0])
        ratios.append(median_s / float(np.median(together[index][rank, :, 0])))
    return min(float(np.median(ratios)), 1.0) if ratios else 1.0


def expert_point(rig: Rig, histogram: NDArray[np.int64], *, only: int | None = None) -> Point:
    """Experts with `histogram` [experts] rows each, from source ranks drawn anew each time; rows just written.

    only: the one rank that runs them, while the others wait in a collective.
    """
    torch = need_torch()
    like, ranks = rig.tokens[rig.job.tokens[0]], rig.job.ranks
    source = torch.randn(int(histogram.sum()), rig.job.shape.hidden).to(like.device, like.dtype)
    some = _some_experts(rig, len(histogram))
    rng = generator(rig.job, 15, rig.group.rank, int(histogram.sum()), len(histogram))

    def call(mark: Mark) -> None:
        layer = some()
        counts = rng.multinomial(histogram, np.full(ranks, 1.0 / ranks)).T.tolist()
        rows = source.clone()  # as dispatch leaves them
        mark()
        if only in (None, rig.group.rank):
            run_experts(rows, counts, layer)
        mark()
        if only is not None:
            rig.group.gather(np.zeros(1))

    lonely = "" if only is None else f", rank {only} alone"
    return Point(f"{len(histogram)} experts at up to {int(histogram.max())} tokens each{lonely}", call, (False,))


def pace_points(rig: Rig) -> list[Point]:
    """The sample that profile and test both run: what its time does says how fast the machine was in either."""
    count = rig.local_slots[0] if rig.grouped else min(_held_by_all(rig), PACE_EXPERTS)
    return [expert_point(rig, np.full(count, PACE_ROWS))] * PACE_TIMES


def even_histograms(rig: Rig, counts: list[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
    """About the same number of rows for each expert, [experts], from 1 to beyond the most that one gets in a test case.

    Up to EVERY_ROW exactly the same; beyond, spread evenly over half of the way to the nearer of its neighbours, as
    products of a few rows more or less differ by more than a line between points tells; the last is not spread. Their
    mean is the point. Alike on all ranks.
    """
    held = min(_held_by_all(rig), SAMPLE_EXPERTS)
    most = max(int(case.sum(axis=0).max()) for case in counts)
    sizes = sorted({*range(1, EVERY_ROW + 1), *probe_sizes(EVERY_ROW, 1.2 * most, EXPERT_POINTS, set())})
    reach = np.minimum(np.diff(sizes, prepend=sizes[0]), np.diff(sizes, append=sizes[-1] + 1)) // 2
    used = [min(max(1, SAMPLE_ROWS // size), held) for size in sizes]
    return [around(size, by, count) for size, by, count in zip(sizes, reach.tolist(), used, strict=True)]


def around(size: int, reach: int, count: int) -> NDArray[np.int64]:
    """Sizes [count], evenly from `size` - `reach` to `size` + `reach`; their mean is `size`."""
    upper = np.rint(np.linspace(-reach, reach, count)[count - count // 2 :])
    return np.asarray(size + np.concatenate([-upper[::-1], np.zeros(count % 2), upper]), dtype=np.int64)


def with_fewer(histograms: list[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
    """START_POINTS of the histograms with a START_PARTth of their experts, at the same mean rows."""
    wide = [one for one in histograms if len(one) >= START_PART]
    if not wide:
        return []
    picked = np.unique(np.linspace(0, len(wide) - 1, START_POINTS).round().astype(int)).tolist()
    return [
        around(round(float(one.mean())), int(np.ptp(one)) // 2, len(one) // START_PART)
        for one in (wide[index] for index in picked)
    ]


def random_histograms(rig: Rig, counts: list[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
    """Random rows for each expert, from even to one hot expert; the same on every rank."""
    local = rig.local_slots[0]
    most = max(int(case.sum(axis=0).reshape(rig.job.ranks, -1).sum(axis=1).max()) for case in counts)
    rng = generator(rig.job, 3)
    totals = np.geomspace(2, 1.2 * most, GROUPED_POINTS).round().astype(np.int64).tolist()
    return [
        rng.multinomial(total, rng.dirichlet(np.full(local, rng.choice(CONCENTRATIONS)))).astype(np.int64)
        for total in totals
    ]
