"""One training step on one rank: the passes of the pipeline in the simulator's own order, gradients, Adam."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.graph.pipeline import Pass, PipelineProgram, layers_of_chunks, program
from moesim.network.rank_groups import Group as GroupKind
from validate.hardware.group import need_torch
from validate.training.job import Layout, TrainingJob
from validate.training.model import Decoder, Weights, batch_tokens, slices
from validate.training.ways import Made, Way, ways_of

# A step that changes nothing, so that every repeat routes its tokens alike: Adam costs the same at any rate.
RATE = 0.0
# Norms above are scaled down; far above what a step has, so that the product is done and changes nothing.
MOST_NORM = 1e6


@dataclass(frozen=True)
class Moments:
    """Seconds of one step on one rank, from its start: passes [passes of this rank] begin and end, then three ends."""

    passes: list[tuple[float, float]]
    piped_s: float
    reduced_s: float
    done_s: float


class Stepper:
    """All that one rank needs to run a step of a layout again and again.

    slots: of each expert over the EP ranks of a stage, [MoE layers, experts].
    """

    def __init__(self, job: TrainingJob, layout: Layout, made: Made, slots: NDArray[np.int64]) -> None:
        torch = need_torch()
        self.job, self.layout, self.beat = job, layout, made.beat
        self.ways: dict[GroupKind, Way] = ways_of(layout, made)
        self.whole = made.group(tuple(range(layout.ranks)))
        self.stage = self.ways["pp"].place
        self.chunks = layers_of_chunks(job.shape.layers, layout.pp * layout.virtual_stages, layout.layers)
        self.program: PipelineProgram = program(
            layout.schedule, layout.pp, job.micro_batches(layout), layout.virtual_stages
        )
        self.mine = np.flatnonzero(self.program.stage == self.stage)
        per_rank, ep = job.shape.experts // self.ways["ep"].size, self.ways["ep"].place
        held = [np.flatnonzero(row // per_rank == ep)[row[row // per_rank == ep].argsort()].tolist() for row in slots]
        listed = [
            one
            for index, chunk in enumerate(self.chunks)
            if index % layout.pp == self.stage
            for one in slices(job.shape, chunk, layout.tp, self.ways["tp"].place, held)
        ]
        self.weights = Weights(job, listed)
        self.decoder = Decoder(job, layout, self.weights, self.ways, slots)
        self.adam = torch.optim.AdamW(
            [one.requires_grad_() for one in self.weights.flat.values() if one.numel()], lr=RATE, weight_decay=0.0,
            fused=True,
        )  # fmt: skip
        for kind, flat in self.weights.flat.items():
            flat.grad = self.weights.gradients[kind]
        self.tokens = torch.as_tensor(batch_tokens(job))
        self.ranks = layout.dp * layout.instances
        self.first = self.ways["dp_cp"].place
        self.loss = 0.0
        self.routed: list[Any] = []

    def micro(self, number: int) -> Any:
        """Token ids of this data-parallel rank's micro-batch [sequences, length + 1]: the batch is dealt in turn."""
        size = self.job.micro_batch
        start = (number * self.ranks + self.first) * size
        return self.tokens[start : start + size]

    def run(self, doing: str = "running") -> Moments:
        """One step; every rank of the layout calls it at once. doing: what signs of life say."""
        torch = need_torch()
        distributed, told = torch.distributed, self.program
        self.loss, self.routed = 0.0, []
        begun = perf_counter()
        self.weights.clear()
        held: dict[tuple[int, int], tuple[Any, Any]] = {}
        sends: list[tuple[Any, Any]] = []
        passes = []
        for index in self.mine.tolist():
            kind, micro, chunk = Pass(told.kind[index]), int(told.micro[index]), int(told.chunk[index])
            self.beat.at(f"{doing}, {kind.name.lower()} pass of micro-batch {micro}")
            given = self._receive(index) if told.crosses[index] else None
            start = perf_counter()
            if kind == Pass.FORWARD:
                out, last = self._forward(micro, chunk, given), chunk == told.chunks - 1
                held[micro, chunk] = (given, out)
                if not last:
                    sends.append(self._send(out.detach(), kind, micro, chunk, chunk + 1))
            else:
                leaf, out = held.pop((micro, chunk))
                out.backward(given)
                if leaf is not None:
                    sends.append(self._send(leaf.grad, kind, micro, chunk, chunk - 1))
            passes.append((start - begun, perf_counter() - begun))
        self.ways["pp"].meet(lambda: [work.wait() for work, _ in sends])
        piped = perf_counter() - begun
        self.beat.at(f"{doing}, reducing gradients")
        self._reduce()
        reduced = perf_counter() - begun
        self.beat.at(f"{doing}, optimizer")
        norm = torch.stack([one.square().sum() for one in self.weights.gradients.values()]).sum()
        if self.whole is not None:
            self.ways["pp"].meet(lambda: distributed.all_reduce(norm, group=self.whole))
        scale = (MOST_NORM / norm.sqrt()).clamp(max=1.0)
        if float(scale) < 1.0:
            for one in self.weights.gradients.values():
                one.mul_(scale)
        self.adam.step()
        return Moments(passes, piped, reduced, perf_counter() - begun)

    def _forward(self, micro: int, chunk: int, given: Any) -> Any:
        ids, layers = self.micro(micro), self.chunks[chunk]
        x = self.decoder.embed(ids[:, :-1]) if layers.start == 0 else given
        for layer in layers:
            x = self.decoder.layer(layer, x)
            if layer in self.decoder.counted:
                self.routed.append((micro, layer, self.decoder.counted[layer]))
        if layers.stop < self.job.shape.layers:
            return x
        loss = self.decoder.loss(x, ids[:, 1:])
        self.loss += float(loss.detach())
        return loss

    def _tag(self, kind: Pass, micro: int, chunk: int) -> int:
        return (int(kind) * self.program.micro_batches + micro) * self.program.chunks + chunk

    def _send(self, tensor: Any, kind: Pass, micro: int, chunk: int, other: int) -> tuple[Any, Any]:
        """Send what another chunk waits for; the tensor is kept until it is gone."""
        tensor = tensor.contiguous()
        peer = self.ways["pp"].members[other % self.layout.pp]
        return need_torch().distributed.isend(tensor, peer, tag=self._tag(kind, micro, chunk)), tensor

    def _receive(self, index: int) -> Any:
        """The input of a pass, from the stage of the pass that it comes after."""
        torch, told = need_torch(), self.program
        source = int(told.after[index])
        kind, micro, chunk = Pass(told.kind[source]), int(told.micro[source]), int(told.chunk[source])
        rows = self.job.micro_batch * self.job.sequence_length // self.layout.tp
        got = torch.empty(rows, self.job.shape.hidden)
        way = self.ways["pp"]
        way.meet(lambda: torch.distributed.recv(got, way.members[chunk % way.size], tag=self._tag(kind, micro, chunk)))
        return got.requires_grad_() if told.kind[index] == Pass.FORWARD else got

    def _reduce(self) -> None:
        distributed, gradients = need_torch().distributed, self.weights.gradients
        for kind, over in (("whole", "tp"), ("whole", "dp_cp"), ("dense", "dp_cp"), ("experts", "expert_dp")):
            way = self.ways[over]  # type: ignore[index]
            mine = gradients[kind]
            if way.size > 1 and mine.numel():
                way.meet(lambda mine=mine, way=way: distributed.all_reduce(mine, group=way.group))  # type: ignore[misc]

    def gradients(self) -> dict[str, Any]:
        """Gradients by parameter, this rank's parts; after a step, before the next."""
        return {name: view.grad for name, view in self.weights.views.items()}
