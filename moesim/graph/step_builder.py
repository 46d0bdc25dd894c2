"""Adds the priced operations of one micro-batch to a task list, each on its stream, after what it depends on."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from moesim.graph.batch import Floats
from moesim.graph.decode_context import CONTEXT
from moesim.graph.priced_step import LayerSetup, Part, PricedStep
from moesim.graph.storage import Fetches
from moesim.graph.task import Link, Stream, Task

# Parts with one figure for each attention-DP rank, and with one for the whole group; all others are by layer.
BY_DP_RANK = (
    "head", "projections", "attention", "gate", "shared", "dense", "tail", "context_gather", "context_merge",
)  # fmt: skip
BY_GROUP = ("attention_sync", "dense_sync", "gather", "replica_choice", "overhead", "eager", "arrival")


class StepBuilder:
    """The task list of one micro-batch while it is built.

    tasks: what was added so far; sources: the part and MoE layer whose time each takes. last: indices that the next
    task waits for, unless it names others; adding a task makes it the last one. layer: the layer that new tasks belong
    to. fetches: of weights that are not on the GPU.
    """

    def __init__(self, setup: LayerSetup, priced: PricedStep, normal: Mapping[str, float] | None, ranks: int) -> None:
        self.setup = setup
        self.priced = priced
        self.normal = normal
        self.tasks: list[Task] = []
        self.sources: list[tuple[str, int]] = []
        self._asked = ("", 0)
        self.last: tuple[int, ...] = ()
        self.layer = -1
        self._seconds: dict[str, Floats] = {}
        parallel = setup.parallel
        gpu = np.arange(ranks)
        self.everyone: NDArray[np.int64] = np.zeros(ranks, dtype=np.int64)
        self.tp_group: NDArray[np.int64] = (gpu // parallel.tp).astype(np.int64)
        self.context_group: NDArray[np.int64] = (gpu // parallel.decode_cp).astype(np.int64)
        self.dp_rank = gpu // parallel.tp
        self.ep_rank = gpu // parallel.expert_tp
        storage = setup.storage
        self.exchange_links: tuple[tuple[Link, float], ...] = ((Link.NVLINK, 1.0),)
        if setup.domains > 1:
            self.exchange_links = ((Link.NIC, 1.0),)
            if storage is not None and storage.shared_with_nic > 0:
                self.exchange_links += ((Link.PCIE, storage.shared_with_nic),)
        self.fetches: Fetches | None = None
        if storage is not None:
            self.fetches = Fetches(storage.kind, len(setup.model.moe.layer_ids), self._fetch)

    def has(self, part: str) -> bool:
        """Whether the part was priced at all."""
        return bool(getattr(self.priced, part).estimates)

    def compute(
        self, name: str, operation: str, part: str | Floats, *, row: int = 0, after: tuple[int, ...] | None = None
    ) -> int:
        """Add a computation; its index. row: of the MoE layer, for parts by layer."""
        seconds = self.seconds(part, row) if isinstance(part, str) else part
        return self._add(name, operation, Stream.COMPUTE, seconds, after)

    def dispatch(self, row: int, *, after: tuple[int, ...] | None = None) -> tuple[int, ...]:
        """Add the dispatch of MoE layer `row`, where there is one; what its experts then wait for."""
        if not self.has("dispatch"):
            return self.last if after is None else after
        return (self.exchange("dispatch", row, after=after),)

    def combine(self, row: int, experts: int) -> tuple[int, ...]:
        """Add the combine of MoE layer `row` after its experts, where there is one; what then is over."""
        if not self.has("combine"):
            return (experts,)
        return (self.exchange("combine", row, after=(experts,)),)

    def exchange(self, part: str, row: int, *, after: tuple[int, ...] | None = None) -> int:
        """Add a dispatch or combine of MoE layer `row`, where all ranks meet."""
        return self._meet(part, part, self.seconds(part, row), after)

    def _meet(self, name: str, operation: str, seconds: Floats, after: tuple[int, ...] | None) -> int:
        """Add what all ranks meet in, over the links of an exchange."""
        return self._add(name, operation, Stream.COMMUNICATION, seconds, after, self.everyone, self.exchange_links)

    def meet_tp(
        self, name: str, part: str, *, operation: str = "tp_collective", after: tuple[int, ...] | None = None
    ) -> int:
        """Add a collective of each tensor-parallel group."""
        return self._among(name, operation, part, self.tp_group, after)

    def _among(
        self, name: str, operation: str, part: str, groups: NDArray[np.int64], after: tuple[int, ...] | None = None
    ) -> int:
        links = ((Link.NVLINK, 1.0),)
        return self._add(name, operation, Stream.COMMUNICATION, self.seconds(part, 0), after, groups, links)

    def attend(self) -> None:
        """Add a layer's attention, with its projections and the synchronisation of its tensor-parallel group.

        Ranks that share a context gather before the kernel and merge after it.
        """
        self.compute("projections", "attention_projections", "projections")
        if self.has("context_gather"):
            self._among("context gather", CONTEXT, "context_gather", self.context_group)
        self.compute("attention", "attention", "attention")
        if self.has("context_merge"):
            self._among("context merge", CONTEXT, "context_merge", self.context_group)
        if self.has("attention_sync"):
            self.meet_tp("attention sync", "attention_sync")

    def gate(self, row: int) -> int:
        """Add the gate of MoE layer `row`, and the fetches that it decides."""
        gate = self.compute("gate", "gate", "gate")
        if self.fetches is not None:
            self.fetches.gated(row, gate)
        if self.has("replica_choice"):
            self._meet("replica choice", "replica_choice", self.seconds("replica_choice", row), None)
        return gate

    def experts(self, row: int, *, after: tuple[int, ...], final: bool = True) -> int:
        """Add the experts of MoE layer `row`. final: no further chunk needs their weights."""
        wanted = after if self.fetches is None else (*after, *self.fetches.before_experts(row))
        experts = self.compute("experts", "experts", "experts", row=row, after=wanted)
        if self.fetches is not None and final:
            self.fetches.used(row, experts)
        return experts

    def seconds(self, name: str, row: int) -> Floats:
        """Durations of a part: [steps, gpus or 1]."""
        self._asked = (name, 0 if name in BY_DP_RANK or name in BY_GROUP else row)
        found = self._seconds.get(name)
        if found is None:
            found = self._seconds[name] = self._spread(name, getattr(self.priced, name))
        return found if name in BY_DP_RANK or name in BY_GROUP else _row(found, row)

    def shared_halves(self) -> tuple[Floats, Floats]:
        """The shared expert up to its activation, and its product down again: [steps, gpus or 1] each."""
        estimates = self.priced.shared.estimates
        cut = 1 + next(index for index, one in enumerate(estimates) if one.family == "memory_bound")
        up, down = Part(estimates[:cut]), Part(estimates[cut:])
        return self._spread("shared", up), self._spread("shared", down)

    def _spread(self, name: str, part: Part) -> Floats:
        """A part's seconds given to each GPU; by layer: [layers or 1, steps, gpus or 1], contiguous."""
        seconds = part.seconds(self.normal)
        if name in BY_GROUP:
            return seconds
        if name in BY_DP_RANK:
            return seconds[:, self.dp_rank] if seconds.shape[1] > 1 else seconds
        if seconds.ndim == 2:
            seconds = seconds[:, None, :]
        moved = np.moveaxis(seconds, 1, 0)
        if name in ("experts", "fetch") and moved.shape[2] > 1 and self.setup.parallel.expert_tp > 1:
            moved = moved[:, :, self.ep_rank]
        return np.ascontiguousarray(moved)

    def _fetch(self, row: int, after: tuple[int, ...]) -> int:
        kept, layer = self.last, self.layer
        self.layer = self.setup.model.moe.layer_ids[row]
        seconds = self.seconds("fetch", row)
        found = self._add("expert fetch", "expert_fetch", Stream.COPY, seconds, after, None, ((Link.PCIE, 1.0),))
        self.last, self.layer = kept, layer
        return found

    def _add(
        self,
        name: str,
        operation: str,
        stream: Stream,
        seconds: Floats,
        after: tuple[int, ...] | None,
        groups: NDArray[np.int64] | None = None,
        links: tuple[tuple[Link, float], ...] = (),
    ) -> int:
        waits = self.last if after is None else after
        self.sources.append(self._asked)
        self.tasks.append(Task(name, operation, stream, seconds, waits, groups, links, self.layer))
        index = len(self.tasks) - 1
        self.last = (index,)
        return index


def _row(by_layer: Floats, row: int) -> Floats:
    """One layer's durations; a part alike in all layers has one row."""
    return np.asarray(by_layer[row if by_layer.shape[0] > 1 else 0])
