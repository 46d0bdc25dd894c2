"""The task graphs of one micro-batch on one model chunk: forward pass, backward pass, gradient of the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.cost.estimate import CostModel, Estimate, Tag, estimate
from moesim.graph.backward import Costed, priced
from moesim.graph.pipeline import Pass
from moesim.graph.priced_step import Part
from moesim.graph.task import Link, Stream, Task, TaskGraph
from moesim.graph.training_layer import LayerPieces, Piece, TrainingSetup

Floats = NDArray[np.float64]

# One standard deviation of ln of the host's time, as for serving engines (moesim/engine/rules.py): a factor of 1.6.
HOST_REL_SIGMA = 0.5
# Operations of the exchanges of tokens.
EXCHANGES = ("dispatch", "combine")


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
    """The priced pieces of every kind of layer. attention: by window; steps: micro-batches of the drawn routing.

    host: what the host adds to every layer; nothing where it adds nothing.
    """

    setup: TrainingSetup
    steps: int
    embedding: tuple[PricedPiece, ...]
    attention: dict[int, tuple[PricedPiece, ...]]
    dense: tuple[PricedPiece, ...]
    moe: tuple[PricedPiece, ...]
    head: tuple[PricedPiece, ...]
    host: tuple[PricedPiece, ...] = ()

    def layer(self, layer: int) -> tuple[PricedPiece, ...]:
        """The pieces of one layer in the order of its forward pass."""
        model = self.setup.model
        window = model.attention.window if layer in model.attention.windowed_layers else 0
        return self.host + self.attention[window] + (self.moe if layer in model.moe.layer_ids else self.dense)


def recomputed(piece: Piece, mode: str, modules: tuple[str, ...]) -> tuple[Costed, ...]:
    """What a recompute mode does again of a piece: all of it, or what the chosen modules cover (each once)."""
    if mode == "none":
        return ()
    if mode == "full":
        return piece.forward
    chosen = [work for module, work in piece.redo.items() if module in modules]
    return max(chosen, key=len, default=())


def price_layers(setup: TrainingSetup, costs: CostModel, counts: Floats, kept: Floats | None = None) -> PricedLayers:
    """Price every kind of layer; counts, kept: of an instance, see `LayerPieces.moe`. Raises OutsideProfile."""
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

    windows = {
        model.attention.window if layer in model.attention.windowed_layers else 0 for layer in range(model.layers)
    }
    return PricedLayers(
        setup=setup,
        steps=len(counts),
        embedding=of(pieces.embedding(), layer=False),
        attention={window: of(pieces.attention(window)) for window in sorted(windows)},
        dense=of(pieces.dense()) if model.dense_layers else (),
        moe=of(pieces.moe(counts, kept)),
        head=of(pieces.head(), layer=False),
        host=_host(training.host.layer_s),
    )


def _host(layer_s: float) -> tuple[PricedPiece, ...]:
    """The host's time with a layer, a third in each of the three passes: one launch each for every product."""
    if layer_s == 0.0:
        return ()
    each = estimate(np.full((1, 1), layer_s / 3), Tag.ASSUMED, "overhead", HOST_REL_SIGMA, "training.host")
    part = Part((each,))
    return (PricedPiece(Piece("host", "engine_overhead", (), ()), part, part, part, Part()),)


@dataclass(frozen=True)
class _Step:
    """A task to be: its name and key, its price, where ranks meet, and its layer (-1: none)."""

    name: str
    operation: str
    part: Part
    meets: bool
    layer: int


def passes_of(split: bool) -> tuple[Pass, ...]:
    """The passes that have a graph of their own; without a split the backward pass makes the weights' gradients too."""
    return tuple(Pass) if split else (Pass.FORWARD, Pass.BACKWARD)


def chunk_steps(layers: PricedLayers, chunk: range, kind: Pass, *, split: bool) -> Iterator[_Step]:
    """The tasks of a pass over a chunk of layers, in order; the first chunk embeds, the last one has the head.

    split: the weights' gradients have a pass of their own. Else each follows its input's gradient at once.
    """
    first, last = chunk.start == 0, chunk.stop == layers.setup.model.layers
    if kind == Pass.FORWARD:
        if first:
            yield from _steps(layers.embedding, ("forward",), -1)
        for layer in chunk:
            yield from _steps(layers.layer(layer), ("forward",), layer)
        if last:
            yield from _steps(layers.head, ("forward",), -1)
        return
    names = ("weight",) if kind == Pass.WEIGHT else ("data",) if split else ("data", "weight")
    if last:
        yield from _steps(layers.head[::-1], names, -1)
    for layer in reversed(chunk):
        found = layers.layer(layer)
        if kind == Pass.BACKWARD:
            yield from _steps(found, ("again",), layer)
        yield from _steps(found[::-1], names, layer)
    if first:
        yield from _steps(layers.embedding[::-1], names, -1)


def _steps(pieces: tuple[PricedPiece, ...], kinds: tuple[str, ...], layer: int) -> Iterator[_Step]:
    for one in pieces:
        for kind in kinds:
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
    split: bool,
    normal: Mapping[str, float] | None = None,
    exchanges_apart: bool = False,
) -> TaskGraph:
    """The graph of one pass of a chunk over the micro-batches of the drawn routing, on the ranks of a stage's instance.

    normal: a joint draw, see `Part.seconds`. exchanges_apart: only dispatch and combine are on the communication
    stream, for a schedule that sets another pass beside them; alone the pass takes as long.
    """
    setup = layers.setup
    ranks = setup.parallel.ep * setup.parallel.expert_tp
    everyone = np.zeros(ranks, dtype=np.int64)
    ep_rank = np.arange(ranks) // setup.parallel.expert_tp
    link = Link.NIC if setup.grid.domains("exchange") > 1 else Link.NVLINK

    def apart(step: _Step) -> bool:
        return step.meets and (step.operation in EXCHANGES or not exchanges_apart)

    tasks: list[Task] = []
    for step, seconds in _durations(layers, chunk, kind, split, normal):
        tasks.append(
            Task(
                name=step.name,
                operation=step.operation,
                stream=Stream.COMMUNICATION if apart(step) else Stream.COMPUTE,
                duration_s=np.ascontiguousarray(seconds[:, ep_rank] if seconds.shape[1] > 1 else seconds),
                depends_on=(len(tasks) - 1,) if tasks else (),
                groups=everyone if step.meets else None,
                links=((link, 1.0),) if step.meets else (),
                layer=step.layer,
            )
        )
    return TaskGraph(layers.steps, ranks, tuple(tasks))


def chunk_seconds(
    layers: PricedLayers, chunk: range, kind: Pass, *, split: bool, normal: Mapping[str, float] | None = None
) -> Floats:
    """What `chunk_graph` takes, in closed form: [micro-batches].

    All ranks meet at every collective and tasks run one after another, so each stretch between two meetings takes as
    long as on its slowest rank.
    """
    total: Floats = np.zeros(layers.steps)
    stretch: Floats = np.zeros((1, 1))
    for step, seconds in _durations(layers, chunk, kind, split, normal):
        if step.meets:
            total = total + stretch.max(axis=1) + seconds.max(axis=1)
            stretch = np.zeros((1, 1))
        else:
            stretch = stretch + seconds
    return np.asarray(total + stretch.max(axis=1))


def _durations(
    layers: PricedLayers, chunk: range, kind: Pass, split: bool, normal: Mapping[str, float] | None
) -> Iterator[tuple[_Step, Floats]]:
    """Every task of a pass with its seconds [1 or micro-batches, 1 or EP ranks]."""
    row = {layer: index for index, layer in enumerate(layers.setup.model.moe.layer_ids)}
    seconds_of = _remembered(normal)
    for step in chunk_steps(layers, chunk, kind, split=split):
        seconds = seconds_of(step.part)
        if seconds.ndim == 3:
            seconds = seconds[:, row[step.layer] if seconds.shape[1] > 1 else 0]
        yield step, seconds


def _remembered(normal: Mapping[str, float] | None) -> Callable[[Part], Floats]:
    """`Part.seconds` under a draw, each part once: layers share their parts."""
    known: dict[int, Floats] = {}

    def seconds(part: Part) -> Floats:
        if id(part) not in known:
            known[id(part)] = part.seconds(normal)
        return known[id(part)]

    return seconds


def chunk_estimates(layers: PricedLayers, chunk: range, *, split: bool) -> Iterator[tuple[Estimate, int | None]]:
    """Every price of a micro-batch on a chunk, all passes, with its row of the MoE layers where it has one."""
    row = {layer: index for index, layer in enumerate(layers.setup.model.moe.layer_ids)}
    for kind in passes_of(split):
        for step in chunk_steps(layers, chunk, kind, split=split):
            for one in step.part.estimates:
                yield one, row.get(step.layer) if one.seconds.ndim == 3 else None
