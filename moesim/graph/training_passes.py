"""The task graphs of one micro-batch on one model chunk: its forward pass, its backward pass and its weights' gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.cost.estimate import CostModel, Estimate
from moesim.graph.backward import Costed, priced
from moesim.graph.pipeline import Pass
from moesim.graph.pricing import Part
from moesim.graph.task import Link, Stream, Task, TaskGraph
from moesim.graph.training_layer import LayerPieces, Piece, TrainingSetup

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class PricedPiece:
    """A piece with its prices by pass; `again` is what recomputation adds before the backward pass.

    Parts are [1, 1], or [micro-batches, MoE layers, EP ranks or 1] where they depend on routing.
    """

    piece: Piece
    forward: Part
    data: Part
    weight: Part
    again: Part


@dataclass(frozen=True)
class PricedLayers:
    """The priced pieces of every kind of layer. attention: by window; steps: micro-batches of the drawn routing."""

    setup: TrainingSetup
    steps: int
    embedding: tuple[PricedPiece, ...]
    attention: dict[int, tuple[PricedPiece, ...]]
    dense: tuple[PricedPiece, ...]
    moe: tuple[PricedPiece, ...]
    head: tuple[PricedPiece, ...]

    def layer(self, layer: int) -> tuple[PricedPiece, ...]:
        """The pieces of one layer in the order of its forward pass."""
        model = self.setup.model
        window = model.attention.window if layer in model.attention.windowed_layers else 0
        return self.attention[window] + (self.moe if layer in model.moe.layer_ids else self.dense)


def recomputed(piece: Piece, mode: str, modules: tuple[str, ...]) -> tuple[Costed, ...]:
    """What a recompute mode does again of a piece: all of it, or what the chosen modules cover (each once)."""
    if mode == "none":
        return ()
    if mode == "full":
        return piece.forward
    chosen = [work for module, work in piece.redo.items() if module in modules]
    return max(chosen, key=len, default=())


def price_layers(setup: TrainingSetup, costs: CostModel, counts: Floats) -> PricedLayers:
    """Price every kind of layer; counts: [micro-batches, MoE layers, experts] of an instance. Raises OutsideProfile."""
    pieces = LayerPieces(setup)
    training, model = setup.training, setup.model

    def of(listed: list[Piece], *, layer: bool = True) -> tuple[PricedPiece, ...]:
        return tuple(
            PricedPiece(
                piece,
                priced(costs, piece.forward),
                priced(costs, piece.data),
                priced(costs, piece.weight),
                priced(costs, recomputed(piece, training.recompute, training.recompute_modules) if layer else ()),
            )
            for piece in listed
        )

    windows = {model.attention.window if layer in model.attention.windowed_layers else 0 for layer in range(model.layers)}
    return PricedLayers(
        setup=setup,
        steps=len(counts),
        embedding=of(pieces.embedding(), layer=False),
        attention={window: of(pieces.attention(window)) for window in sorted(windows)},
        dense=of(pieces.dense()) if model.dense_layers else (),
        moe=of(pieces.moe(counts)),
        head=of(pieces.head(), layer=False),
    )


@dataclass(frozen=True)
class _Step:
    """A task to be: its name and key, its price, where ranks meet, and its layer (-1: none)."""

    name: str
    operation: str
    part: Part
    meets: bool
    layer: int


def chunk_steps(layers: PricedLayers, chunk: range, kind: Pass) -> Iterator[_Step]:
    """The tasks of a pass over a chunk of layers, in order; the first chunk embeds, the last one has the head."""
    first, last = chunk.start == 0, chunk.stop == layers.setup.model.layers
    if kind == Pass.FORWARD:
        if first:
            yield from _steps(layers.embedding, "forward", -1)
        for layer in chunk:
            yield from _steps(layers.layer(layer), "forward", layer)
        if last:
            yield from _steps(layers.head, "forward", -1)
        return
    name = "data" if kind == Pass.BACKWARD else "weight"
    if last:
        yield from _steps(layers.head[::-1], name, -1)
    for layer in reversed(chunk):
        found = layers.layer(layer)
        if kind == Pass.BACKWARD:
            yield from _steps(found, "again", layer)
        yield from _steps(found[::-1], name, layer)
    if first:
        yield from _steps(layers.embedding[::-1], name, -1)


def _steps(pieces: tuple[PricedPiece, ...], kind: str, layer: int) -> Iterator[_Step]:
    for one in pieces:
        part: Part = getattr(one, kind)
        if not part.estimates:
            continue
        meets = one.piece.group is not None
        key = "recompute" if kind == "again" and not meets else one.piece.operation
        yield _Step(f"{one.piece.name}, {_NAMES[kind]}", key, part, meets, layer)


_NAMES = {"forward": "forward", "data": "backward", "weight": "weights", "again": "recomputed"}


def chunk_graph(
    layers: PricedLayers,
    chunk: range,
    kind: Pass,
    *,
    normal: Mapping[str, float] | None = None,
    collapsed: bool = False,
) -> TaskGraph:
    """The graph of one pass of a chunk over the micro-batches of the drawn routing, on the ranks of a stage's instance.

    collapsed: one rank, at each task as slow as the slowest; the last end is the same, as ranks that differ (experts)
    meet right after. normal: a joint draw, see `Part.seconds`.
    """
    setup = layers.setup
    ranks = 1 if collapsed else setup.parallel.ep * setup.parallel.expert_tp
    everyone = np.zeros(ranks, dtype=np.int64)
    ep_rank = np.arange(ranks) // setup.parallel.expert_tp
    link = Link.NIC if setup.grid.nodes("exchange") > 1 else Link.NVLINK
    row = {layer: index for index, layer in enumerate(setup.model.moe.layer_ids)}
    seconds_of = _remembered(normal)
    tasks: list[Task] = []
    for step in chunk_steps(layers, chunk, kind):
        seconds = seconds_of(step.part)
        if seconds.ndim == 3:
            seconds = seconds[:, row[step.layer] if seconds.shape[1] > 1 else 0]
        if seconds.shape[1] > 1:
            seconds = seconds.max(axis=1, keepdims=True) if collapsed else seconds[:, ep_rank]
        tasks.append(
            Task(
                name=step.name,
                operation=step.operation,
                stream=Stream.COMMUNICATION if step.meets else Stream.COMPUTE,
                duration_s=np.ascontiguousarray(seconds),
                depends_on=(len(tasks) - 1,) if tasks else (),
                groups=everyone if step.meets else None,
                links=((link, 1.0),) if step.meets else (),
                layer=step.layer,
            )
        )
    return TaskGraph(layers.steps, ranks, tuple(tasks))


def _remembered(normal: Mapping[str, float] | None) -> Callable[[Part], Floats]:
    """`Part.seconds` under a draw, each part once: layers share their parts."""
    known: dict[int, Floats] = {}

    def seconds(part: Part) -> Floats:
        if id(part) not in known:
            known[id(part)] = part.seconds(normal)
        return known[id(part)]

    return seconds


def chunk_estimates(layers: PricedLayers, chunk: range) -> Iterator[tuple[Estimate, int | None]]:
    """Every price of a micro-batch on a chunk, all passes, with its row of the MoE layers where it has one."""
    row = {layer: index for index, layer in enumerate(layers.setup.model.moe.layer_ids)}
    for kind in Pass:
        for step in chunk_steps(layers, chunk, kind):
            for one in step.part.estimates:
                yield one, row.get(step.layer) if one.seconds.ndim == 3 else None
