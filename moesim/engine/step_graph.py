"""The task graph that a step really runs: at its best number of chunks, with what its streams cost each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from moesim.engine import maxplus
from moesim.engine.collapsed import collapsed_seconds
from moesim.engine.stretch import stretched
from moesim.graph.layer import build_step
from moesim.graph.priced_step import LayerSetup, PricedStep
from moesim.graph.task import TaskGraph

Change = Callable[[TaskGraph], TaskGraph]


def options(priced: Sequence[PricedStep]) -> Iterator[list[PricedStep]]:
    """The micro-batches of a step at each number of chunks that its schedule may choose."""
    yield list(priced)
    for others in zip(*(one.others for one in priced), strict=True):
        yield list(others)


def step_graph(
    setup: LayerSetup,
    priced: Sequence[PricedStep],
    *,
    normal: Mapping[str, float] | None = None,
    collapsed: bool = False,
    change: Change | None = None,
    stage: int | None = None,
) -> TaskGraph:
    """The graph of priced micro-batches at their own number of chunks, see `build_step`; overlapping work slowed.

    change: of durations, before what overlaps is slowed. stage: which pipeline stage, where there are several.
    """
    graph = build_step(setup, priced, normal=normal, collapsed=collapsed, stage=stage)
    if change is not None:
        graph = change(graph)
    return graph if setup.overlap is None else stretched(graph, setup.overlap.of(priced[0].mode))


def best_step(
    setup: LayerSetup, priced: Sequence[PricedStep], change: Change | None = None, stage: int | None = None
) -> tuple[TaskGraph, list[PricedStep]]:
    """The graph of the option whose steps take least in the mean, and its micro-batches. change: see `step_graph`."""
    found = [(step_graph(setup, one, change=change, stage=stage), one) for one in options(priced)]
    if len(found) == 1:
        return found[0]
    return min(found, key=lambda option: float(maxplus.run(option[0]).step_s.mean()))


def step_seconds(
    setup: LayerSetup,
    priced: Sequence[PricedStep],
    *,
    normal: Mapping[str, float] | None = None,
    collapsed: bool = False,
    stage: int | None = None,
) -> NDArray[np.float64]:
    """Seconds of each step, each at the number of chunks that is best for it: [steps].

    stage: of one pipeline stage; None: of the way through all of them.
    """
    if stage is None and setup.stages is not None:
        sent_s = sum(one.transfer.seconds(normal).sum(axis=(1, 2)) for one in priced)
        each = [
            step_seconds(setup, priced, normal=normal, collapsed=collapsed, stage=one)
            for one in range(setup.stages.count)
        ]
        return np.asarray(np.sum(each, axis=0) + sent_s)
    if collapsed:
        found_s = [collapsed_seconds(setup, one, normal, stage) for one in options(priced)]
        known = [seconds for seconds in found_s if seconds is not None]
        if len(known) == 1 + len(priced[0].others):
            return np.asarray(np.min(known, axis=0))
    graphs = [step_graph(setup, one, normal=normal, collapsed=collapsed, stage=stage) for one in options(priced)]
    found = [maxplus.run(graph).step_s for graph in graphs]
    return np.asarray(np.min(found, axis=0))
