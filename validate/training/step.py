"""One training step on one rank: the passes of the pipeline in the simulator's own order, gradients, Adam."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.graph.pipeline import Pass, PipelineProgram, layers_of_chunks, program
from moesim.network.rank_groups import Group as GroupKind
from validate.hardware.group import need_torch
from validate.training.job import Layout, TrainingJob
from validate.training.model import Decoder, Weights, batch_tokens, slices
from validate.training.ways import Made, Way, links_of

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


# The pass that made what is sent, its micro-batch and its chunk.
Message = tuple[Pass, int, int]


def messages(told: PipelineProgram, stage: int, other: int, kind: Pass) -> list[Message]:
    """What one stage sends to another by its passes of a kind, in the order in which it sends it."""
    found = []
    step = 1 if kind == Pass.FORWARD else -1
    for index in np.flatnonzero((told.stage == stage) & (told.kind == kind)).tolist():
        onto = int(told.chunk[index]) + step
        if 0 <= onto < told.chunks and onto % told.stages == other:
            found.append((kind, int(told.micro[index]), int(told.chunk[index])))
    return found


class Stepper:
    """All that one rank needs to run a step of a layout again and again.

    slots: of each expert over the EP ranks of a stage, [MoE layers, experts].
    """

    def __init__(self, job: TrainingJob, layout: Layout, made: Made, slots: NDArray[np.int64]) -> None:
        torch = need_torch()
        self.job, self.layout, self.made, self.beat = job, layout, made, made.beat
        self.links = links_of(layout, made)
        self.ways: dict[GroupKind, Way] = self.links.ways
        self.stage = self.ways["pp"].place
        self.chunks = layers_of_chunks(job.shape.layers, layout.pp * layout.virtual_stages, layout.layers)
        self.program: PipelineProgram = program(
            layout.schedule, layout.pp, job.micro_batches(layout), layout.virtual_stages
        )
        self.mine = np.flatnonzero(self.program.stage == self.stage)
        self.due = {
            (one, kind): messages(self.program, one, other, kind)
            for one, other, kind in self.links.channels
            if other == self.stage
        }
        per_rank, ep = job.shape.experts // self.ways["ep"].size, self.ways["ep"].place
        held = [np.flatnonzero(row // per_rank == ep)[row[row // per_rank == ep].argsort()].tolist() for row in slots]
        listed = [
            one
            for index, chunk in enumerate(self.chunks)
            if index % layout.pp == self.stage
            for one in slices(job.shape, chunk, layout.tp, self.ways["tp"].place, held)
        ]
        self.weights = Weights(job, listed, made)
        self.decoder = Decoder(job, layout, self.weights, self.ways, slots, made.device)
        self.adam = torch.optim.AdamW(
            [one.requires_grad_() for one in self.weights.flat.values() if one.numel()], lr=RATE, weight_decay=0.0,
            fused=True,
        )  # fmt: skip
        for kind, flat in self.weights.flat.items():
            flat.grad = self.weights.gradients[kind]
        self.tokens = torch.as_tensor(batch_tokens(job), device=made.device)
        self.ranks = layout.dp * layout.instances
        self.first = self.ways["dp_cp"].place
        self._losses: list[Any] = []
        self.routed: list[Any] = []

    @property
    def loss(self) -> float:
        """The loss of the last step, as far as this rank has the head."""
        return sum(float(one) for one in self._losses)

    def micro(self, number: int) -> Any:
        """Token ids of this data-parallel rank's micro-batch [sequences, length + 1]: the batch is dealt in turn."""
        size = self.job.micro_batch
        start = (number * self.ranks + self.first) * size
        return self.tokens[start : start + size]

    def run(self, doing: str = "running") -> Moments:
        """One step; every rank of the layout calls it at once. doing: what signs of life say.

        Moments are the device's own: on a GPU, when it came to a mark, not when the host had queued what is before it.
        """
        torch = need_torch()
        distributed, told = torch.distributed, self.program
        self._losses, self.routed = [], []
        arrived: dict[tuple[Pass, int, int], Any] = {}
        due = {name: iter(listed) for name, listed in self.due.items()}
        marks = self.made.marks()
        marks.mark()
        self.weights.clear()
        held: dict[tuple[int, int], tuple[Any, Any]] = {}
        sends: list[tuple[Any, Any]] = []
        for index in self.mine.tolist():
            kind, micro, chunk = Pass(told.kind[index]), int(told.micro[index]), int(told.chunk[index])
            self.beat.at(f"{doing}, {kind.name.lower()} pass of micro-batch {micro}")
            given = self._receive(index, due, arrived) if told.crosses[index] else None
            marks.mark()
            if kind == Pass.FORWARD:
                out, last = self._forward(micro, chunk, given), chunk == told.chunks - 1
                held[micro, chunk] = (given, out)
                if not last:
                    sends.append(self._send(out.detach(), kind, chunk + 1))
            else:
                leaf, out = held.pop((micro, chunk))
                out.backward(given)
                if leaf is not None:
                    sends.append(self._send(leaf.grad, kind, chunk - 1))
            marks.mark()
        self.ways["pp"].meet(lambda: [work.wait() for work, _ in sends])
        marks.mark()
        self.beat.at(f"{doing}, reducing gradients")
        self._reduce()
        marks.mark()
        self.beat.at(f"{doing}, optimizer")
        norm = torch.stack([one.square().sum() for one in self.weights.gradients.values()]).sum()
        if self.links.whole is not None:
            self.ways["pp"].meet(lambda: distributed.all_reduce(norm, group=self.links.whole))
        scale = (MOST_NORM / norm.sqrt()).clamp(max=1.0)
        if self.ways["pp"].meet(lambda: float(scale)) < 1.0:
            for one in self.weights.gradients.values():
                one.mul_(scale)
        self.adam.step()
        marks.mark()
        begun, *ends = self.ways["pp"].meet(marks.read)
        *passes, piped, reduced, done = [end - begun for end in ends]
        return Moments(list(zip(passes[::2], passes[1::2], strict=True)), piped, reduced, done)

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
        self._losses.append(loss.detach())
        return loss

    def _send(self, tensor: Any, kind: Pass, other: int) -> tuple[Any, Any]:
        """Send what another chunk waits for; the tensor is kept until it is gone."""
        tensor = tensor.contiguous()
        return self.links.channels[self.stage, other % self.layout.pp, kind].send(tensor), tensor

    def _receive(self, index: int, due: dict[tuple[int, Pass], Iterator[Message]], arrived: dict[Message, Any]) -> Any:
        """The input of a pass, from the stage of the pass that it comes after.

        due: what a stage sends by its channel of a pass, in order. arrived: what came before it was wanted.
        """
        torch, told = need_torch(), self.program
        source = int(told.after[index])
        wanted = (Pass(told.kind[source]), int(told.micro[source]), int(told.chunk[source]))
        stage = int(told.stage[source])
        rows = self.job.micro_batch * self.job.sequence_length // self.layout.tp
        while wanted not in arrived:
            got = torch.empty(rows, self.job.shape.hidden, device=self.made.device)
            self.links.channels[stage, self.stage, wanted[0]].receive(got)
            arrived[next(due[stage, wanted[0]])] = got
        got = arrived.pop(wanted)
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
