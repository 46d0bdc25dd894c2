"""How the loads of a serving run change over simulated time."""

from __future__ import annotations

import itertools
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from moesim.spec.base import Spec


class ShiftSpec(Spec):
    """From `at_s` on, the deployment meets these judged loads: part of a load's name -> weight."""

    at_s: float = Field(ge=0)
    loads: dict[str, Annotated[float, Field(gt=0)]] = Field(min_length=1)


class DriftPoint(Spec):
    """Which load is served with which weight at one time."""

    at_s: float = Field(ge=0)
    weights: tuple[Annotated[float, Field(ge=0)], ...] = Field(min_length=1, description="one for each load, in order")


class DriftSpec(Spec):
    """Exactly one of `points`, weights of the loads over time, and `blocks`, the order in which a file was recorded."""

    points: tuple[DriftPoint, ...] | None = Field(default=None, min_length=1)
    between: Literal["hold", "linear"] = Field(default="hold", description="weights between two points")
    blocks: int | None = Field(default=None, ge=2, le=64, description="equal parts that each file's steps are cut in")
    block_s: float | None = Field(default=None, gt=0, description="of blocks: how long each is served")
    repeat_s: float | None = Field(default=None, gt=0, description="of points: when they start again")
    repeat: bool = Field(default=False, description="of blocks: start again after the last, which else goes on")

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.points is None) == (self.blocks is None):
            raise ValueError("give exactly one of points and blocks")
        if self.points is None:
            if self.block_s is None:
                raise ValueError("blocks need block_s")
            if self.repeat_s is not None or self.between != "hold":
                raise ValueError("repeat_s and between are for points: blocks follow one another, and may `repeat`")
            return self
        if self.block_s is not None or self.repeat:
            raise ValueError("block_s and repeat are for blocks: points have at_s and repeat_s")
        times = [point.at_s for point in self.points]
        if times[0] != 0 or any(one >= other for one, other in itertools.pairwise(times)):
            raise ValueError("at_s of the points starts at 0 and rises")
        if len({len(point.weights) for point in self.points}) > 1:
            raise ValueError("every point has one weight for each load")
        if self.repeat_s is not None and self.repeat_s <= times[-1]:
            raise ValueError("repeat_s must be later than the last point")
        return self
