"""From priced parts to tasks: the steps of attention DP + EP and of tensor parallelism."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from moesim.errors import BadInput
from moesim.graph.moe_layer import LAYERS
from moesim.graph.priced_step import LayerSetup, Part, PricedStep
from moesim.graph.schedules import sequential, two_batch
from moesim.graph.stages import TRANSFER
from moesim.graph.step_builder import StepBuilder
from moesim.graph.task import Task, TaskGraph


def build_step(
    setup: LayerSetup,
    priced: Sequence[PricedStep],
    *,
    normal: Mapping[str, float] | None = None,
    collapsed: bool = False,
    stage: int | None = None,
) -> TaskGraph:
    """The task graph of one priced step, or of the two micro-batches of a two-batch step; of one pipeline stage.

    Ranks are the GPUs of one stage, TP fastest. normal: a joint draw, see `Part.seconds`.
    collapsed: the parts have one rank only, which stands for the slowest at each stage.
    """
    ranks = 1 if collapsed else setup.parallel.gpus
    lists = [build.tasks for build in build_lists(setup, priced, normal, ranks, tasks=True, stage=stage)]
    return schedule_lists(setup, lists, priced[0].batch.steps, ranks)


def build_lists(
    setup: LayerSetup,
    priced: Sequence[PricedStep],
    normal: Mapping[str, float] | None,
    ranks: int,
    *,
    tasks: bool = False,
    stage: int | None = None,
) -> list[StepBuilder]:
    """A builder for each micro-batch; tasks: with its task list built.

    What the host does between steps it does once, however many micro-batches there are.
    """
    once = [priced[0], *(replace(part, overhead=Part()) for part in priced[1:])]
    builders = [StepBuilder(setup, part, normal, ranks) for part in once]
    for build in builders if tasks else ():
        _list_tasks(build, stage)
    return builders


def schedule_lists(setup: LayerSetup, lists: Sequence[Sequence[Task]], steps: int, ranks: int) -> TaskGraph:
    """One graph of the micro-batches' task lists, in the schedule's order. Raises BadInput."""
    if setup.policies.schedule == "two_batch":
        if len(lists) != 2:
            raise BadInput("a two-batch schedule needs two micro-batches", mend="price the two halves of the batch")
        return two_batch(lists[0], lists[1], steps, ranks)
    return sequential(lists[0], steps, ranks)


def _list_tasks(build: StepBuilder, stage: int | None) -> None:
    """Add the tasks of one micro-batch in order; the schedule decides how a MoE layer is laid out."""
    setup, stages = build.setup, build.setup.stages
    moe_layer = LAYERS[setup.policies.schedule]
    assert stages is None or stage is not None, "one graph is of one stage"
    layers = range(setup.model.layers) if stages is None or stage is None else stages.layers[stage]
    if layers.start == 0:
        build.compute("step overhead", "engine_overhead", "overhead")
        if build.fetches is not None:
            build.fetches.begin()
        build.compute("embedding", "embedding", "head")
    elif build.has("arrival"):
        build.meet_tp("arrival", "arrival", operation=TRANSFER)
    moe_row = {layer: row for row, layer in enumerate(setup.model.moe.layer_ids)}
    for layer in layers:
        build.layer = layer
        if build.has("eager"):
            build.compute("kernel launches", "engine_overhead", "eager")
        if layer in moe_row:
            moe_layer(build, moe_row[layer])
            continue
        build.attend()
        build.compute("dense", "dense", "dense")
        if build.has("dense_sync"):
            build.meet_tp("dense sync", "dense_sync")
    build.layer = -1
    if layers.stop == setup.model.layers:
        build.compute("logits", "lm_head", "tail")
