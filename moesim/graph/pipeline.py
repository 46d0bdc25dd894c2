"""Pipeline schedules of training: which pass of which micro-batch each stage runs, in order, and what it waits for.

A schedule is a dict entry name -> function of (stages, micro-batches, virtual stages) that lists each stage's passes.
Model chunk c (of stages x virtual stages) lies on stage c mod stages, as in Megatron-LM's interleaved schedule.

Sources: 1F1B and its interleaved form, D. Narayanan et al., arXiv:2104.04473, section 2.2 (warm-up counts as in
Megatron-LM, megatron/core/pipeline_parallel/schedules.py); zero bubble ZB-H1, P. Qi et al., arXiv:2401.10241, section
2: the backward pass is split into the gradient of the input (B) and that of the weights (W), and W is put off where a
stage would wait.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from moesim.errors import BadInput

Ints = NDArray[np.int64]


class Pass(IntEnum):
    """What a stage does with a micro-batch of one of its chunks."""

    FORWARD = 0
    BACKWARD = 1  # of the input; of input and weights together where a schedule does not split them
    WEIGHT = 2


# (pass, micro-batch, chunk) in the order in which a stage runs them.
Order = list[tuple[Pass, int, int]]
Schedule = Callable[[int, int, int], list[Order]]


@dataclass(frozen=True, eq=False)
class PipelineProgram:
    """All passes of one global batch, each after what it waits for.

    kind, micro, chunk, stage: int64 [passes]. before: the pass before it on its stage, -1 = none. after: the pass of
    another chunk (or, at the turn, of the same) that its input comes from, -1 = none. crosses: whether that input comes
    from another stage. split: whether weights have passes of their own.
    """

    stages: int
    micro_batches: int
    chunks: int
    split: bool
    kind: Ints
    micro: Ints
    chunk: Ints
    stage: Ints
    before: Ints
    after: Ints
    crosses: NDArray[np.bool_]

    def held(self, stage: int) -> Ints:
        """Micro-batches whose activations each chunk of a stage holds at their joint peak: [virtual stages].

        Activations live from the forward pass to the last pass that reads them. The peak is of the sum over chunks;
        chunks of unequal size make it an approximation.
        """
        mine = np.flatnonzero(self.stage == stage)
        last = Pass.WEIGHT if self.split else Pass.BACKWARD
        step = np.where(self.kind[mine] == Pass.FORWARD, 1, np.where(self.kind[mine] == last, -1, 0))
        virtual = self.chunks // self.stages
        by_chunk = np.zeros((virtual, len(mine)), dtype=np.int64)
        by_chunk[self.chunk[mine] // self.stages, np.arange(len(mine))] = step
        level = by_chunk.cumsum(axis=1)
        return np.asarray(level[:, level.sum(axis=0).argmax()])


def one_f_one_b(stages: int, micro_batches: int, virtual: int) -> list[Order]:
    """Warm-up forwards, then forward and backward in turn, then the backwards that are left."""
    found = []
    for stage in range(stages):
        ahead = min(stages - stage - 1, micro_batches)
        order: Order = [(Pass.FORWARD, micro, stage) for micro in range(ahead)]
        for micro in range(micro_batches - ahead):
            order.append((Pass.FORWARD, ahead + micro, stage))
            order.append((Pass.BACKWARD, micro, stage))
        order += [(Pass.BACKWARD, micro, stage) for micro in range(micro_batches - ahead, micro_batches)]
        found.append(order)
    return found


def interleaved(stages: int, micro_batches: int, virtual: int) -> list[Order]:
    """1F1B over the virtual stages, micro-batches in groups of `stages` (Megatron-LM)."""
    total = micro_batches * virtual

    def forward(number: int, stage: int) -> tuple[Pass, int, int]:
        group, inside = divmod(number, stages * virtual)
        return Pass.FORWARD, group * stages + inside % stages, (inside // stages) * stages + stage

    def backward(number: int, stage: int) -> tuple[Pass, int, int]:
        group, inside = divmod(number, stages * virtual)
        return Pass.BACKWARD, group * stages + inside % stages, (virtual - 1 - inside // stages) * stages + stage

    found = []
    for stage in range(stages):
        ahead = min(2 * (stages - stage - 1) + (virtual - 1) * stages, total)
        order: Order = [forward(number, stage) for number in range(ahead)]
        for number in range(total - ahead):
            order += [forward(ahead + number, stage), backward(number, stage)]
        order += [backward(number, stage) for number in range(total - ahead, total)]
        found.append(order)
    return found


def zero_bubble(stages: int, micro_batches: int, virtual: int) -> list[Order]:
    """ZB-H1: the order of 1F1B with the weights' gradients put off, by `stage` micro-batches at most.

    Stage s lags s micro-batches behind with its weights, so that the last stage hands gradients back soonest and no
    stage holds more activations than the first does under 1F1B (arXiv:2401.10241, section 2.2).
    """
    found = []
    for stage, plain in enumerate(one_f_one_b(stages, micro_batches, 1)):
        order: Order = []
        done = owed = 0
        for kind, micro, chunk in plain:
            order.append((kind, micro, chunk))
            if kind == Pass.BACKWARD:
                owed += 1
                if owed - done > stage:
                    order.append((Pass.WEIGHT, done, chunk))
                    done += 1
        order += [(Pass.WEIGHT, micro, stage) for micro in range(done, micro_batches)]
        found.append(order)
    return found


SCHEDULES: dict[str, Schedule] = {"1f1b": one_f_one_b, "interleaved": interleaved, "zero_bubble": zero_bubble}
SPLIT = frozenset({"zero_bubble"})


def check_pipeline(schedule: str, stages: int, micro_batches: int, virtual: int) -> None:
    """Whether a schedule can run so. Raises BadInput."""
    where = "training.pipeline"
    if schedule not in SCHEDULES:
        raise BadInput(f"unknown schedule {schedule!r}", where=where, mend=f"use one of: {', '.join(SCHEDULES)}")
    if schedule != "interleaved" and virtual > 1:
        raise BadInput(
            f"{schedule} has no virtual stages",
            where=f"{where}.virtual_stages",
            mend="use schedule: interleaved, or virtual_stages: 1",
        )
    if schedule == "interleaved" and stages == 1:
        raise BadInput("interleaving needs pipeline stages", where=where, mend="raise parallel.pp, or use 1f1b")
    if schedule == "interleaved" and micro_batches % stages:
        raise BadInput(
            f"{micro_batches} micro-batches do not divide by {stages} stages, in whose groups interleaving runs them",
            where=where,
            mend="choose a global_batch so that they do, or use 1f1b",
        )


@lru_cache(maxsize=16)
def program(schedule: str, stages: int, micro_batches: int, virtual: int = 1) -> PipelineProgram:
    """The passes of one global batch in an order that a single sweep can time. Raises BadInput."""
    check_pipeline(schedule, stages, micro_batches, virtual)
    orders = SCHEDULES[schedule](stages, micro_batches, virtual)
    chunks = stages * virtual
    rows: list[tuple[int, int, int, int, int, int, bool]] = []
    place: dict[tuple[Pass, int, int], int] = {}
    cursor, last = [0] * stages, [-1] * stages
    total = sum(len(order) for order in orders)
    while len(rows) < total:
        moved = False
        for stage, order in enumerate(orders):
            while cursor[stage] < len(order):
                kind, micro, chunk = order[cursor[stage]]
                source = _source(kind, micro, chunk, chunks)
                if source is not None and source not in place:
                    break
                after = -1 if source is None else place[source]
                crosses = source is not None and source[2] % stages != stage
                place[(kind, micro, chunk)] = len(rows)
                rows.append((int(kind), micro, chunk, stage, last[stage], after, crosses))
                last[stage] = len(rows) - 1
                cursor[stage] += 1
                moved = True
        if not moved:
            raise BadInput(
                f"schedule {schedule} of {stages} stages and {micro_batches} micro-batches waits for itself",
                where="training.pipeline",
                mend="use 1f1b",
            )
    numbers = np.asarray([row[:6] for row in rows], dtype=np.int64).T
    return PipelineProgram(
        stages=stages,
        micro_batches=micro_batches,
        chunks=chunks,
        split=schedule in SPLIT,
        kind=numbers[0],
        micro=numbers[1],
        chunk=numbers[2],
        stage=numbers[3],
        before=numbers[4],
        after=numbers[5],
        crosses=np.asarray([row[6] for row in rows], dtype=np.bool_),
    )


def _source(kind: Pass, micro: int, chunk: int, chunks: int) -> tuple[Pass, int, int] | None:
    """The pass that a pass gets its input from; what comes before it on its own stage is implied."""
    if kind == Pass.FORWARD:
        return (Pass.FORWARD, micro, chunk - 1) if chunk else None
    if kind == Pass.BACKWARD:
        return (Pass.BACKWARD, micro, chunk + 1) if chunk < chunks - 1 else (Pass.FORWARD, micro, chunk)
    return (Pass.BACKWARD, micro, chunk)


def layers_of_chunks(layers: int, chunks: int, given: tuple[int, ...] | None = None) -> tuple[range, ...]:
    """The layers of each model chunk, in order.

    given: how many each chunk gets. Without it chunks differ by one layer at most, and the last chunk (it has the head)
    and the first ones (the embedding) get the fewer. Raises BadInput.
    """
    if given is not None:
        if len(given) != chunks or sum(given) != layers or min(given) < 1:
            raise BadInput(
                f"{len(given)} chunks of {sum(given)} layers, not {chunks} of {layers}, each of at least one",
                where="training.pipeline.layers",
                mend=f"list {chunks} numbers that sum to {layers}",
            )
        sizes = list(given)
    else:
        base, more = divmod(layers, chunks)
        if base == 0:
            raise BadInput(
                f"{layers} layers cannot fill {chunks} pipeline chunks",
                where="training.pipeline",
                mend="lower parallel.pp or virtual_stages",
            )
        sizes = [base + 1] * chunks
        short = [chunks - 1, *range(chunks - 1)][: (chunks - more) % chunks or (0 if more else chunks)]
        for chunk in short:
            sizes[chunk] = base
    edges = np.concatenate([[0], np.cumsum(sizes)])
    return tuple(range(int(a), int(b)) for a, b in pairwise(edges))
