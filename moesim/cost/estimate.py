"""A cost: seconds, how unsure they are, and where they come from."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.cost.ops import Operation


class Tag(IntEnum):
    """Where a figure comes from, best first; a combination is as good as its worst part."""

    MEASURED = 0
    INTERPOLATED = 1
    EXTRAPOLATED = 2
    FORMULA = 3
    ASSUMED = 4

    @property
    def label(self) -> str:
        """The tag as outputs spell it."""
        return self.name.lower()


@dataclass(frozen=True)
class Estimate:
    """The price of one operation at many sizes.

    seconds: float64 [...], the broadcast shape of the operation's sizes.
    tags: int8, broadcastable to `seconds`, values of Tag.
    family: the shared cost parameter whose error these seconds carry ("experts", "gemm", "attention", "dispatch",
    "collective", "memory_bound", "overhead"): one joint draw scales all costs of a family together.
    rel_sigma: one standard deviation of ln(true / predicted) for the family's shared error.
    source: table, version and engine, for the report.
    """

    seconds: NDArray[np.float64]
    tags: NDArray[np.int8]
    family: str
    rel_sigma: float
    source: str


def estimate(seconds: ArrayLike, tag: Tag | NDArray[np.int8], family: str, rel_sigma: float, source: str) -> Estimate:
    """Build an Estimate from plain values."""
    return Estimate(
        seconds=np.asarray(seconds, dtype=np.float64),
        tags=np.asarray(tag, dtype=np.int8),
        family=family,
        rel_sigma=rel_sigma,
        source=source,
    )


class CostModel(Protocol):
    """Prices operations; implementations are registered as `moesim.costs`.

    `estimate` raises OutsideProfile where it has no measurement and may not extrapolate; the message names the missing
    point (family, key and range) and the command that measures it. It is a pure function of the operation.
    """

    def estimate(self, operation: Operation) -> Estimate:
        """Price one operation, vectorised over its sizes."""
        ...


@dataclass(frozen=True)
class PricedBy:
    """One of the profiles that a scenario names: where its rows come from, and whether it answered any price.

    name: as the scenario names it. gpus: what its rows say that they were measured on.
    """

    name: str
    system: str
    gpus: tuple[str, ...]
    answered: bool


@runtime_checkable
class TellsProfiles(Protocol):
    """A cost model that can tell which profiles its prices came from, and what to know of them."""

    def profiles_told(self) -> tuple[tuple[PricedBy, ...], tuple[str, ...]]:
        """The profiles in the order they are asked, as of the prices so far, and notes, a sentence each."""
        ...
