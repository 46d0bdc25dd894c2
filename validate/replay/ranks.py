"""One process plays every rank of an expert-parallel layer in turn, each with exactly the rows its plan gives it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import CheckFailed
from validate.hardware.costs import Floats
from validate.hardware.group import Beat, CoreShare, need_torch
from validate.hardware.job import Job, PlacedCase
from validate.hardware.layer import expert_weights, gate, permute, reference, run_experts, unpermute
from validate.hardware.placements import scattered
from validate.hardware.probe import pace_points
from validate.hardware.rig import OUTPUT_LIMIT, Copies, Rig, build, generator
from validate.hardware.sampling import probe_sizes, run_point
from validate.replay.alone import Alone
from validate.replay.profile import LOCAL

Say = Callable[[str], None]


@dataclass(frozen=True)
class Sent:
    """Of one case and source rank: which (token, choice) each permuted row came from, and where each slot's rows begin.

    source: int64 tensor [tokens x top_k]. starts: int64 [slots + 1].
    """

    source: Any
    starts: NDArray[np.int64]


@dataclass(frozen=True)
class Stage:
    """All ranks of a job in one process: their rigs, and of each case what each rank sends: [cases][ranks]."""

    job: Job
    rigs: tuple[Rig, ...]
    sent: tuple[tuple[Sent, ...], ...]

    @property
    def counts(self) -> list[NDArray[np.int64]]:
        """Rows from each rank to each slot, int64 [ranks, slots], by case."""
        return [np.stack([np.diff(one.starts) for one in case]) for case in self.sent]

    def arrived(self, case: int, rank: int) -> tuple[Any, list[list[int]]]:
        """The rows that reach a rank, by (source rank, slot), and their counts[source][local slot]."""
        torch = need_torch()
        job = self.job
        tokens = job.cases()[case][1]
        local = len(self.rigs[rank].layers[case % len(job.placements)].weights)
        first = rank * local
        rows, counts = [], []
        for source, one in enumerate(self.sent[case]):
            mine = one.source[int(one.starts[first]) : int(one.starts[first + local])]
            rows.append(self.rigs[source].tokens[tokens].index_select(0, mine // job.shape.top_k))
            counts.append(np.diff(one.starts[first : first + local + 1]).tolist())
        return torch.cat(rows), counts


def set_up(job: Job, device: Any, beat: Beat, made: Copies) -> Stage:
    """Weights, tokens and routes of every rank; ranks share the weights of an expert, as they run in turn.

    made: weights that are there already; what is made is added.
    """
    rigs = tuple(build(job, Alone(rank, job.ranks, device, beat), made) for rank in range(job.ranks))
    sent = []
    for index, (_, tokens) in enumerate(job.cases()):
        by_rank = []
        for rig in rigs:
            layer = rig.layers[index % len(rig.layers)]
            ids, _ = gate(rig.tokens[tokens], layer.router, job.shape.top_k)
            permuted = permute(rig.tokens[tokens], ids, layer.routes)
            starts = np.concatenate([[0], np.cumsum(permuted.slot_counts.cpu().numpy())]).astype(np.int64)
            by_rank.append(Sent(permuted.source, starts))
        sent.append(tuple(by_rank))
    return Stage(job, rigs, tuple(sent))


def check(stage: Stage, say: Say) -> float:
    """Put every case's outputs together from the ranks' parts: the largest relative error against the reference.

    Raises CheckFailed where a row is lost or an output is wrong.
    """
    torch = need_torch()
    job, worst = stage.job, 0.0
    truths: dict[tuple[int, int], Any] = {}
    for index, (placement, tokens) in enumerate(job.cases()):
        say(f"checking {placement.name} at {tokens} tokens")
        back = [torch.empty(tokens * job.shape.top_k, job.shape.hidden).to(rig.tokens[tokens]) for rig in stage.rigs]
        for rank, rig in enumerate(stage.rigs):
            layer = rig.layers[index % len(rig.layers)]
            rows, counts = stage.arrived(index, rank)
            done = run_experts(rows, counts, layer)
            local, start = len(layer.weights), 0
            for source, one in enumerate(stage.sent[index]):
                begin, end = int(one.starts[rank * local]), int(one.starts[(rank + 1) * local])
                back[source][begin:end] = done[start : start + end - begin]
                start += end - begin
            if start != len(done):
                raise CheckFailed(f"{len(done)} rows came, {start} go back", where=placement.name, mend="report this")
        for rank, rig in enumerate(stage.rigs):
            x, router = rig.tokens[tokens], rig.layers[0].router
            if (rank, tokens) not in truths:

                def weights_of(expert: int, like: Any = x) -> Any:
                    return expert_weights(job.shape, expert, seed=job.seed, device=like.device, dtype=like.dtype)

                truths[rank, tokens] = reference(x, router, job.shape, weights_of)
            _, share = gate(x, router, job.shape.top_k)
            y, truth = unpermute(back[rank], stage.sent[index][rank].source, share), truths[rank, tokens]
            error = float(torch.linalg.vector_norm(y.float() - truth) / torch.linalg.vector_norm(truth))
            if not error <= OUTPUT_LIMIT[rig.dtype]:
                raise CheckFailed(
                    f"the layer's output differs from the float32 reference by {error:.2g}",
                    where=f"rank {rank}, placement {placement.name}, {tokens} tokens",
                    mend="nothing was timed; report this",
                )
            worst = max(worst, error)
    return worst


def understudies(stage: Stage, device: Any, made: Copies) -> Callable[[], None]:
    """Plays, at each call, a rank at random of a placement and of token counts that are not among the cases."""
    job = stage.job
    hottest = np.argsort(-np.asarray(job.profile), kind="stable").astype(np.int64)
    table = scattered(hottest, 2 * job.ranks, generator(job, 13))
    case = PlacedCase(name="understudy", slots=tuple(table.tolist()), replicas=len(table) - len(hottest))
    tokens = tuple(probe_sizes(min(job.tokens), max(job.tokens), len(job.tokens), set(job.tokens)))
    other = set_up(job.model_copy(update={"placements": (case,), "tokens": tokens}), device, Beat(None), made)
    rng = generator(job, 14)

    def play() -> None:
        _play(other, int(rng.integers(len(tokens))), int(rng.integers(job.ranks)), None)

    return play


def measure(stage: Stage, say: Say) -> tuple[Floats, float | None, float]:
    """Seconds of every rank's operations, [cases, ranks, repeats, operations] as in LOCAL, the share of a core, and the
    median seconds of the profile's pace sample.

    Within a repeat the cases and their ranks come in random turn; rows are gathered before an operation, unmeasured.
    """
    job = stage.job
    rng = generator(job, 4)
    cases = job.cases()
    found = np.zeros((len(cases), job.ranks, job.repeats, len(LOCAL)))
    share = CoreShare()
    pace, passed_s = pace_points(stage.rigs[0]), list[float]()
    for turn in range(-job.warmup, job.repeats):
        say("warming up" if turn < 0 else f"measuring, repeat {turn + 1} of {job.repeats}")
        for place in rng.permutation(len(cases) * job.ranks + len(pace)).tolist():
            if place >= len(cases) * job.ranks:
                passed = run_point(stage.rigs[0], pace[place - len(cases) * job.ranks])
                if turn >= 0:
                    passed_s.append(float(np.ptp(passed.read())))
                continue
            index, rank = divmod(place, job.ranks)
            moments = _play(stage, index, rank, share if turn >= 0 else None)
            if turn >= 0:
                found[index, rank, turn] = moments
    return found, stage.rigs[0].group.core_share(share), float(np.median(passed_s))


def _play(stage: Stage, index: int, rank: int, share: CoreShare | None) -> Floats:
    """One rank's part of a case, timed: seconds of its operations."""
    rig, tokens = stage.rigs[rank], stage.job.cases()[index][1]
    layer, x = rig.layers[index % len(rig.layers)], rig.tokens[tokens]
    rig.flush()
    marks = rig.group.marks()
    rig.group.start_together()
    marks.mark()
    ids, weights = gate(x, layer.router, stage.job.shape.top_k)
    marks.mark()
    permuted = permute(x, ids, layer.routes)
    marks.mark()
    rows, counts = stage.arrived(index, rank)  # as dispatch leaves them: just written
    marks.mark()
    run_experts(rows, counts, layer)
    marks.mark()
    back = permuted.rows.clone()  # as combine leaves them
    marks.mark()
    unpermute(back, permuted.source, weights)
    marks.mark()
    if share is not None:
        share.add(marks, (False, False, True, False, True, False))
    spent = np.diff(marks.read())
    return np.asarray(spent[[0, 1, 3, 5]], dtype=np.float64)
