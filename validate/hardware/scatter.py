"""How the runs of an operation scatter around their median, kept from the profile, to be drawn from.

The median of a layer is not the sum of its operations' medians: exchanges have long tails, and ranks wait for the one
that happens to be late. So a layer is foretold by drawing its operations from the profile's own samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# A run is drawn from the profiled points that are nearest in size, as many as these (fewer where there are fewer).
NEAREST = 3


@dataclass(frozen=True)
class Lots:
    """Random numbers of one operation in [0, 1), the same for every case: which near point, which of its runs [draws].

    Cases drawn by the same lots are compared paired: what chance does to one, it does to the other.
    """

    near: Floats
    run: Floats

    @classmethod
    def drawn(cls, draws: int, rng: np.random.Generator) -> Lots:
        """Fresh ones."""
        return cls(rng.random(draws), rng.random(draws))


@dataclass(frozen=True)
class Scatter:
    """Runs around their point's median: sizes [points], around [points, runs, ranks].

    relative: as shares of the median (computing), else as seconds beyond it (exchanges, whose tails are waits for the
    scheduler and do not grow with the bytes). The ranks of one run stay together.
    """

    sizes: Floats
    around: Floats
    relative: bool

    def draw(self, size: Floats, median_s: Floats, lots: Lots) -> Floats:
        """Runs of a case: [draws, ranks]. size, median_s: [ranks], where its ranks lie and what they take."""
        ranks = len(median_s)
        near = np.abs(np.log(np.maximum(self.sizes, 1e-9)) - np.log(np.maximum(size, 1e-9))[:, None])  # [ranks, points]
        order = np.argsort(near, axis=1, kind="stable")[:, : min(NEAREST, len(self.sizes))]
        point = order[:, (lots.near * order.shape[1]).astype(np.int64)].T  # [draws, ranks]
        run = (lots.run * self.around.shape[1]).astype(np.int64)[:, None]
        around = self.around[point, run, np.arange(ranks)]
        return np.asarray(median_s * around if self.relative else np.maximum(median_s + around, 0.0))


def scatter(sizes: Sequence[float], samples: Sequence[Floats], *, relative: bool) -> Scatter:
    """From the samples of each point, [ranks, runs] in seconds; its median is over all of them."""
    stacked = np.stack([one.T for one in samples])
    middle = np.median(stacked, axis=(1, 2), keepdims=True)
    around = stacked / np.maximum(middle, 1e-12) if relative else stacked - middle
    return Scatter(np.asarray(sizes, dtype=np.float64), around, relative)
