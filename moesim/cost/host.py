"""Time that the host takes, which no kernel hides: a figure, how unsure it is, and where it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moesim.cost.estimate import Estimate, Tag, estimate

FAMILY = "overhead"


@dataclass(frozen=True)
class HostTime:
    """Seconds of the host. rel_sigma: one standard deviation of their logarithm. source: for the report."""

    seconds: float
    rel_sigma: float = 0.0
    tag: Tag = Tag.ASSUMED
    source: str = "engine rules"

    def under(self, normal: Mapping[str, float] | None) -> float:
        """Seconds under one joint draw of the cost families' errors; None is the best known."""
        return self.seconds if normal is None else float(self.seconds * np.exp(self.rel_sigma * normal[FAMILY]))

    def estimate(self) -> Estimate:
        """As a cost of shape [1, 1]."""
        return estimate(np.full((1, 1), self.seconds), self.tag, FAMILY, self.rel_sigma, self.source)
