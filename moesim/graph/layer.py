"""From priced parts to tasks: the steps of attention DP + EP and of tensor parallelism."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from moesim.errors import BadInput
from moesim.graph.batch import Floats
from moesim.graph.pricing import LayerSetup, Part, PricedStep
from moesim.graph.schedules import sequential, two_batch
from moesim.graph.task import Link, Stream, Task, TaskGraph


def build_step(
    setup: LayerSetup,
    priced: Sequence[PricedStep],
    *,
    normal: Mapping[str, float] | None = None,
    collapsed: bool = False,
) -> TaskGraph:
    """The task graph of one priced step, or of the two micro-batches of a two-batch step.

    Ranks are the GPUs of one instance, TP fastest. normal: a joint draw, see `Part.seconds`.
    collapsed: the parts have one rank only, which stands for the slowest at each stage.
    """
    steps, ranks = priced[0].batch.steps, 1 if collapsed else setup.parallel.gpus
    # What the host does between steps it does once, however many micro-batches there are.
    once = [priced[0], *(replace(part, overhead=Part()) for part in priced[1:])]
    lists = [_Builder(setup, part, normal, ranks).tasks() for part in once]
    if setup.policies.schedule == "two_batch":
        if len(lists) != 2:
            raise BadInput("a two-batch schedule needs two micro-batches", mend="price the two halves of the batch")
        return two_batch(lists[0], lists[1], steps, ranks)
    return sequential(lists[0], steps, ranks)


class _Builder:
    """Builds the task list of one micro-batch."""

    def __init__(self, setup: LayerSetup, priced: PricedStep, normal: Mapping[str, float] | None, ranks: int) -> None:
        self.setup = setup
        self.priced = priced
        self.normal = normal
        self.found: list[Task] = []
        parallel = setup.parallel
        gpu = np.arange(ranks)
        self.everyone: NDArray[np.int64] = np.zeros(ranks, dtype=np.int64)
        self.tp_group: NDArray[np.int64] = (gpu // parallel.tp).astype(np.int64)
        self.dp_rank = gpu // parallel.tp
        self.ep_rank = gpu // parallel.expert_tp
        spans_nodes = setup.nodes > 1
        self.exchange_links = ((Link.NIC, 1.0),) if spans_nodes else ((Link.NVLINK, 1.0),)

    def tasks(self) -> list[Task]:
        """The whole step, in order."""
        priced, model = self.priced, self.setup.model
        of = {
            name: self._spread(getattr(priced, name))
            for name in ("projections", "attention", "gate", "shared", "dense")
        }
        sync, gather, dense_sync = (
            self._whole(part) for part in (priced.attention_sync, priced.gather, priced.dense_sync)
        )
        eager, choice = self._whole(priced.eager), self._whole(priced.replica_choice)
        experts = self._by_layer(priced.experts, self.ep_rank)
        dispatch, combine = (self._by_layer(part, None) for part in (priced.dispatch, priced.combine))
        self._compute("step overhead", "engine_overhead", self._whole(priced.overhead))
        self._compute("embedding", "embedding", self._spread(priced.head))
        moe_row = {layer: row for row, layer in enumerate(model.moe.layer_ids)}
        for layer in range(model.layers):
            if priced.eager.estimates:
                self._compute("kernel launches", "engine_overhead", eager, layer)
            self._compute("projections", "attention_projections", of["projections"], layer)
            self._compute("attention", "attention", of["attention"], layer)
            if priced.attention_sync.estimates:
                self._meet("attention sync", "tp_collective", sync, layer, self.tp_group, ((Link.NVLINK, 1.0),))
            if layer not in moe_row:
                self._compute("dense", "dense", of["dense"], layer)
                if priced.dense_sync.estimates:
                    self._meet("dense sync", "tp_collective", dense_sync, layer, self.tp_group, ((Link.NVLINK, 1.0),))
                continue
            row = moe_row[layer]
            self._compute("gate", "gate", of["gate"], layer)
            if priced.shared.estimates:
                self._compute("shared expert", "shared_expert", of["shared"], layer)
            if priced.replica_choice.estimates:
                self._meet("replica choice", "replica_choice", choice, layer, self.everyone, self.exchange_links)
            if priced.dispatch.estimates:
                self._meet("dispatch", "dispatch", _row(dispatch, row), layer, self.everyone, self.exchange_links)
            self._compute("experts", "experts", _row(experts, row), layer)
            if priced.combine.estimates:
                self._meet("combine", "combine", _row(combine, row), layer, self.everyone, self.exchange_links)
            if priced.gather.estimates:
                self._meet("gather", "tp_collective", gather, layer, self.tp_group, ((Link.NVLINK, 1.0),))
        self._compute("logits", "lm_head", self._spread(priced.tail))
        return self.found

    def _spread(self, part: Part) -> Floats:
        """A part by attention-DP rank, repeated over its TP ranks: [steps, gpus]."""
        seconds = part.seconds(self.normal)
        return seconds[:, self.dp_rank] if seconds.shape[1] > 1 else seconds

    def _whole(self, part: Part) -> Floats:
        return part.seconds(self.normal)

    def _by_layer(self, part: Part, rank_of: NDArray[np.int64] | None) -> Floats:
        """A part by layer and EP rank, given to each GPU: [layers or 1, steps, gpus or 1], contiguous."""
        seconds = part.seconds(self.normal)
        if seconds.ndim == 2:
            seconds = seconds[:, None, :]
        moved = np.moveaxis(seconds, 1, 0)
        if rank_of is not None and moved.shape[2] > 1 and self.setup.parallel.expert_tp > 1:
            moved = moved[:, :, rank_of]
        return np.ascontiguousarray(moved)

    def _last(self) -> tuple[int, ...]:
        return (len(self.found) - 1,) if self.found else ()

    def _compute(self, name: str, operation: str, seconds: Floats, layer: int = -1) -> None:
        self.found.append(
            Task(
                name=name,
                operation=operation,
                stream=Stream.COMPUTE,
                duration_s=seconds,
                depends_on=self._last(),
                layer=layer,
            )
        )

    def _meet(
        self,
        name: str,
        operation: str,
        seconds: Floats,
        layer: int,
        groups: NDArray[np.int64],
        links: tuple[tuple[Link, float], ...],
    ) -> None:
        self.found.append(
            Task(
                name=name,
                operation=operation,
                stream=Stream.COMMUNICATION,
                duration_s=seconds,
                depends_on=self._last(),
                groups=groups,
                links=links,
                layer=layer,
            )
        )


def _row(by_layer: Floats, row: int) -> Floats:
    """One layer's durations; a part alike in all layers has one row."""
    return np.asarray(by_layer[row if by_layer.shape[0] > 1 else 0])
