"""How a collective's seconds run between two measured sizes: straight while one protocol runs, a step where it changes.

A protocol takes a latency and a rate. The library changes it where its own model of them says so (NVIDIA/nccl,
src/graph/tuning.cc), which costs nothing where that model is right and a step where it is not. Of the gap between two
sizes three lines tell: the chord, the line before the gap carried on (the old protocol still runs) and the line after
it carried back (the new one runs already).

- Both above the chord: the cheaper protocol runs, so seconds follow the lower of the two. Both below: the latency still
  hides the bytes, and they follow the higher. Both at once: the median of the three lines.
- One above and one below: the chord, unless the new line lies above the old one by a whole step. Then the old protocol
  is the likelier one up to most of the gap.

All of it stays between the two measured points and rises with the size.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from profiles.refine import NODES_PER_DOUBLING, Rule

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Chosen on A100, L40S, RTX Pro 6000, B300, GB200 and GB300, every second size left out.
# How far from the chord to the median of the three lines: these are carried over a gap of noise and bends. 0.6 to 0.7
# are alike.
LEAN = 2.0 / 3.0
# New line over old line in the middle of a gap from which on it is a step: 1.5 to 1.7 are alike. Below, the middle is
# nearer to the new line as often as to the old one. Above, it was at a tenth of the way, nearer to the old one in 61 of
# 64 gaps.
STEP = 1.6
# The chance that the new protocol runs at a share u of the gap (of its logarithm) is u to this power; 3 to 4 are alike.
LATE = 3.0
# What a measurement may lie above another one of the same exchange (in ln) before it counts as held up: 2 to 5 % are
# alike.
HELD_UP = 0.03

# Collectives that only move bytes, whatever these hold; the others also add them up, and slower in 8 bits than in 16.
MOVING = ("all_gather", "all_to_all", "send_recv")
# Collectives made of sends and receives: these leave LL for Simple at a fixed size a channel, while the others take the
# algorithm and protocol that the library's model says is the fastest (NVIDIA/nccl, src/enqueue.cc: P2pLLThreshold
# against topoGetAlgoInfo).
POINT_TO_POINT = ("all_to_all", "send_recv")


def rule_of_collective(kind: str, path: str) -> Rule:
    """How seconds run between a collective's sizes: `lines`, with `steps`, or a `chord` where it is not NCCL's."""
    if path != "nccl":
        return "chord"
    return "lines" if kind in POINT_TO_POINT else "steps"


def combined(places: Ints, seconds: Floats) -> Floats:
    """One time for all measurements of one exchange: their geometric mean, at most HELD_UP above the fastest.

    A rank that waits makes a repeat slower, and nothing makes it faster.

    places: [rows], equal where the exchange is; seconds: [rows]. Returns [rows].
    """
    _, where = np.unique(places, return_inverse=True)
    logs = np.log(seconds)
    counts = np.bincount(where)
    fastest = np.full(len(counts), np.inf)
    np.minimum.at(fastest, where, logs)
    means = np.bincount(where, weights=logs) / counts
    out: Floats = np.exp(np.minimum(means, fastest + HELD_UP))[where]
    return out


def protocol_nodes(xs: Floats, seconds: Floats, rule: Rule) -> tuple[Floats, Floats]:
    """Nodes through measured sizes and between them, rising: (sizes, seconds).

    xs: sizes above zero, rising. seconds: rising. rule: `lines`, or `steps` for steps, too.
    """
    slopes = np.diff(seconds) / np.diff(xs)
    nodes, values = [xs[:1]], [seconds[:1]]
    for gap in range(len(slopes)):
        before = slopes[gap - 1] if gap > 0 else slopes[gap]
        after = slopes[gap + 1] if gap + 1 < len(slopes) else slopes[gap]
        ends, times = xs[gap : gap + 2], seconds[gap : gap + 2]
        count = int(np.ceil(NODES_PER_DOUBLING * np.log2(ends[1] / ends[0])))
        at = np.geomspace(ends[0], ends[1], count + 1)[1:-1]
        nodes += [at, ends[1:]]
        values += [_between(ends, times, float(before), float(after), at, rule), times[1:]]
    return np.concatenate(nodes), np.concatenate(values)


def _between(ends: Floats, times: Floats, before: float, after: float, at: Floats, rule: Rule) -> Floats:
    """Seconds at sizes inside one gap; before, after: the slopes of the gaps around it."""
    middle = np.sqrt(ends.prod())
    old, chord, new = _lines(ends, times, before, after, np.array([middle]))
    if rule == "steps" and old[0] < chord[0] < new[0] and new[0] >= STEP * old[0]:
        old, _, new = _lines(ends, times, before, after, at)
        changed = (np.log(at / ends[0]) / np.log(ends[1] / ends[0])) ** LATE
        stepped: Floats = old ** (1.0 - changed) * new**changed
        return stepped
    lines = _lines(ends, times, before, after, at)
    out: Floats = lines[1] + LEAN * (np.median(lines, axis=0) - lines[1])
    return out


def _lines(ends: Floats, times: Floats, before: float, after: float, at: Floats) -> Floats:
    """The old protocol's line, the chord and the new one's, within the two times: [3, sizes]."""
    chord = times[0] + (times[1] - times[0]) / (ends[1] - ends[0]) * (at - ends[0])
    old, new = times[0] + before * (at - ends[0]), times[1] - after * (ends[1] - at)
    within: Floats = np.clip(np.stack([old, chord, new]), times[0], times[1])
    return within
