"""Running a pipeline program: the max-plus recursion over its passes, compiled, for many instances at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from moesim.graph.pipeline import PipelineProgram

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class PipelineTimes:
    """When the stages are done.

    end_s: [instances, stages]; busy_s: [instances, stages], time in passes; start_s, duration_s: [instances, passes].
    """

    end_s: Floats
    busy_s: Floats
    start_s: Floats
    duration_s: Floats

    @property
    def bubble_s(self) -> Floats:
        """Time of each stage, up to the end of the whole pipeline, that it spends in no pass: [instances, stages]."""
        return np.asarray(self.end_s.max(axis=1, keepdims=True) - self.busy_s)


def run(program: PipelineProgram, pass_s: Floats, transfer_s: float | Floats = 0.0) -> PipelineTimes:
    """Time one global batch.

    pass_s: [instances, 3, micro-batches, chunks], seconds of a forward, backward and weight pass; a schedule that does
    not split the backward pass adds the two. transfer_s: from a stage to its neighbour, while which both go on; one, or
    of the send before each pass [instances, passes].
    """
    seconds = np.asarray(pass_s, dtype=np.float64)
    if not program.split:
        seconds = np.stack([seconds[:, 0], seconds[:, 1] + seconds[:, 2]], axis=1)
    duration = np.ascontiguousarray(seconds[:, program.kind, program.micro, program.chunk])
    wait_s = np.ascontiguousarray(np.broadcast_to(np.where(program.crosses, transfer_s, 0.0), duration.shape))
    start = np.zeros_like(duration)
    end = np.zeros((len(duration), program.stages))
    busy = np.zeros((len(duration), program.stages))
    _sweep(duration, program.before, program.after, wait_s, program.stage, start, end, busy)
    return PipelineTimes(end, busy, start, duration)


@njit(cache=True)
def _sweep(
    duration: Floats, before: Ints, after: Ints, wait_s: Floats, stage: Ints, start: Floats, end: Floats, busy: Floats
) -> None:
    """A pass starts at the later of the end of the one before it on its stage and the arrival of its input."""
    passes = duration.shape[1]
    done = np.zeros(passes)
    for instance in range(duration.shape[0]):
        for one in range(passes):
            ready = done[before[one]] if before[one] >= 0 else 0.0
            if after[one] >= 0:
                ready = max(ready, done[after[one]] + wait_s[instance, one])
            start[instance, one] = ready
            done[one] = ready + duration[instance, one]
            end[instance, stage[one]] = done[one]
            busy[instance, stage[one]] += duration[instance, one]
