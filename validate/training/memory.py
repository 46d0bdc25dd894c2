"""Whether a run's weights fit into memory, told before anything starts, and how much its ranks held."""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Iterable
from typing import Any

from moesim.errors import Infeasible
from moesim.graph.pipeline import layers_of_chunks
from moesim.units import human_bytes
from validate.hardware.group import need_torch
from validate.hardware.ranks import free_bytes
from validate.training.job import ONE, WHERE, Layout, TrainingJob
from validate.training.model import slices
from validate.training.predict import Machine

# Bytes of a weight in float32 with its gradient and both moments of Adam; and of a reference's gradient.
TRAINED_BYTES, GRADIENT_BYTES = 16.0, 4.0


def weights_of(job: TrainingJob, layout: Layout) -> float:
    """Weights on the fullest rank of a layout."""
    shape, per_rank = job.shape, job.shape.experts // (layout.tp * layout.dp)
    held = [range(per_rank)] * (shape.layers - 1)
    by_stage = [0.0] * layout.pp
    chunks = layers_of_chunks(shape.layers, layout.pp * layout.virtual_stages, layout.layers)
    for index, chunk in enumerate(chunks):
        for one in slices(shape, chunk, layout.tp, 0, held):
            cut = 1.0 if one.rows is None else len(one.rows) / one.shape[one.axis]
            by_stage[index % layout.pp] += math.prod(one.shape) * cut
    return max(by_stage)


def needed_bytes(job: TrainingJob, layouts: Iterable[Layout]) -> float:
    """Bytes that a rank needs for weights: first the whole model, then its gradients beside all layouts together."""
    whole = weights_of(job, ONE)
    together = sum(weights_of(job, layout) for layout in layouts)
    return max(whole * TRAINED_BYTES, whole * GRADIENT_BYTES + together * TRAINED_BYTES)


def check_memory(job: TrainingJob, machine: Machine, device: Any) -> None:
    """Raise Infeasible where weights alone need more than a GPU has, or than this machine has left for its ranks."""
    cuda = device.type == "cuda"
    there = machine.memory_bytes if cuda else free_bytes() or machine.memory_bytes
    for ranks in sorted({layout.ranks for layout in job.layouts}):
        mine = [layout for layout in job.layouts if layout.ranks == ranks]
        needed = needed_bytes(job, mine) * (1 if cuda else machine.nodes(ranks)[1])
        if needed > there:
            raise Infeasible(
                f"the weights of {len(mine)} layouts of {ranks} ranks need {human_bytes(needed)}, and "
                f"{human_bytes(there)} of memory are {'there' if cuda else 'free'}",
                where=WHERE,
                mend="choose some of them by --layout",
                reason="memory",
            )


def peak_bytes(device: Any) -> float:
    """The most that this rank has held so far: of the device, or of the process."""
    if device.type == "cuda":
        return float(need_torch().cuda.max_memory_allocated(device))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in KiB, on macOS in bytes (getrusage(2))
    return float(most) * (1.0 if sys.platform == "darwin" else 1024.0)
