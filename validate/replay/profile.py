"""The profile of a replay: the local operations of the layer, at shapes of its own, and what they foretell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from validate.hardware.costs import Curve, ExpertCost, Floats, fit_grouped, fit_loop, rising
from validate.hardware.group import need_torch
from validate.hardware.layer import Mark, run_experts
from validate.hardware.probe import (
    PACE_ROWS,
    PACE_TIMES,
    TOKEN_POINTS,
    even_histograms,
    expert_point,
    local_point,
    note,
    pace_points,
    random_histograms,
    with_fewer,
)
from validate.hardware.rig import Rig
from validate.hardware.sampling import Point, probe_sizes, sample

# What a rank does by itself, in the order of the layer; between permute and experts, and experts and unpermute, rows
# travel, which a replay leaves out.
LOCAL = ("gate", "permute", "experts", "unpermute")


@dataclass(frozen=True)
class LocalProfile:
    """Seconds of gate, permute and unpermute over a rank's tokens, and of its experts over their rows.

    idle: seconds over the slots of a rank of experts without a row: a loop looks at each slot of each source rank.
    core_share: how much of a processor the process had (None: a device computes). pace_s: median of the sample that the
    test runs, too. points: every measured median with its p10 and p90.
    """

    gate: Curve
    permute: Curve
    unpermute: Curve
    experts: ExpertCost
    idle: Curve
    core_share: float | None
    pace_s: float
    points: list[dict[str, Any]]


def measure(rig: Rig, counts: list[NDArray[np.int64]], between: Callable[[], None]) -> LocalProfile:
    """Profile the local operations: token counts between those of the test, about even (grouped: random) rows.

    rig: of a process that is alone. counts: rows of the test cases, [source ranks, slots] each; they only say how far
    the points must reach. between: run after each sample, unmeasured: it leaves caches and memory as played ranks do.
    """
    sizes = probe_sizes(0.6 * min(rig.job.tokens), 1.5 * max(rig.job.tokens), TOKEN_POINTS, set(rig.job.tokens))
    histograms = random_histograms(rig, counts) if rig.grouped else even_histograms(rig, counts)
    if not rig.grouped:
        histograms += with_fewer(histograms)
    shapes = [*(local_point(rig, size) for size in sizes), *(expert_point(rig, one) for one in histograms)]
    slots = sorted(set(rig.local_slots))[:: max(len(set(rig.local_slots)) - 1, 1)]
    shapes += [_idle_point(rig, rig.local_slots.index(one)) for one in slots]
    shapes += pace_points(rig)
    found, core_share = sample(rig, [_followed(shape, between) for shape in shapes])
    points: list[dict[str, Any]] = []
    found, pace = found[:-PACE_TIMES], found[-PACE_TIMES:]
    local, experts, idle = found[: len(sizes)], found[len(sizes) : -len(slots)], found[-len(slots) :]
    gate_s, permute_s, unpermute_s = (
        [note(points, name, {"tokens": size}, spent[..., column]) for size, spent in zip(sizes, local, strict=True)]
        for column, name in ((0, "gate"), (1, "permute"), (3, "unpermute"))
    )
    expert_s = [
        note(points, "experts", {"histogram": one.tolist()}, spent[..., 0])
        for one, spent in zip(histograms, experts, strict=True)
    ]
    idle_s = [
        0.0 if rig.grouped else note(points, "experts without rows", {"slots": one}, spent[..., 0])
        for one, spent in zip(slots, idle, strict=True)
    ]
    unused = rising([0, *slots], [0.0, *idle_s])
    if not rig.grouped:
        looked_s = unused.at(np.asarray([float(len(one)) for one in histograms]))[0]
        expert_s = [max(value - looked, 0.0) for value, looked in zip(expert_s, looked_s.tolist(), strict=True)]
    return LocalProfile(
        idle=unused,
        gate=rising(sizes, gate_s),
        permute=rising(sizes, permute_s),
        unpermute=rising(sizes, unpermute_s),
        experts=(fit_grouped if rig.grouped else fit_loop)(histograms, expert_s),
        core_share=core_share,
        pace_s=note(points, "pace", {"rows": PACE_ROWS}, np.concatenate(pace, axis=1)[..., 0]),
        points=points,
    )


def _idle_point(rig: Rig, index: int) -> Point:
    """The experts of the rig's placement `index` without a single row."""
    layer = rig.layers[index]
    rows = need_torch().empty(0, rig.job.shape.hidden).to(rig.tokens[rig.job.tokens[0]])
    counts = [[0] * len(layer.weights) for _ in range(rig.job.ranks)]

    def call(mark: Mark) -> None:
        mark()
        if not rig.grouped:
            run_experts(rows, counts, layer)
        mark()

    return Point(f"{len(layer.weights)} experts without rows", call, (False,))


def _followed(point: Point, between: Callable[[], None]) -> Point:
    def call(mark: Mark) -> None:
        point.call(mark)
        between()

    return replace(point, call=call)


def predict(profile: LocalProfile, tokens: Sequence[int], counts: Sequence[NDArray[np.int64]], ranks: int) -> Floats:
    """Seconds of each case, rank and local operation, [cases, ranks, operations] in the order of LOCAL.

    tokens: of a rank, by case. counts: rows from each source rank to each slot, int64 [ranks, slots], by case.
    """
    found = np.zeros((len(counts), ranks, len(LOCAL)))
    for index, (count, table) in enumerate(zip(tokens, counts, strict=True)):
        size = np.full(ranks, float(count))
        arriving = table.sum(axis=0).reshape(ranks, -1).astype(np.float64)
        found[index, :, 0] = profile.gate.at(size)[0]
        found[index, :, 1] = profile.permute.at(size)[0]
        local = np.full(ranks, float(arriving.shape[1]))
        found[index, :, 2] = profile.experts.at(arriving)[0] + profile.idle.at(local)[0]
        found[index, :, 3] = profile.unpermute.at(size)[0]
    return found


def layer_s(seconds: Floats) -> Floats:
    """The layer without its exchanges: ranks meet before and after the experts. [..., ranks, operations] -> [...].

    The slowest rank of gate and permute, then the slowest rank's experts, then the slowest unpermute.
    """
    before = seconds[..., 0] + seconds[..., 1]
    return np.asarray(before.max(axis=-1) + seconds[..., 2].max(axis=-1) + seconds[..., 3].max(axis=-1))
