"""One rank of `validate training`: routes the batch, measures operations, or checks and times the steps of layouts."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from time import perf_counter, process_time
from typing import Any

import numpy as np

from moesim.errors import CheckFailed
from moesim.files import read_text, write_text
from validate.hardware.group import Beat, Group, need_torch, own_cores
from validate.hardware.join import joined
from validate.hardware.process import Seat, serve
from validate.training.job import ONE, WHERE, TrainingJob
from validate.training.machine import busy_s, others_cores
from validate.training.memory import peak_bytes
from validate.training.probe import Asked, groups_of, measure
from validate.training.step import Moments, Stepper
from validate.training.ways import Made, links_of

RESULT_FILE = "result.json"

# Largest relative error of a gradient, over all elements of a parameter, against one process that computes the whole
# batch: sums over thousands of tokens and some layers in float32 (unit roundoff 6e-8), in another order. CPUs come to
# 1e-6. A GPU adds up in no order at all where rows meet (atomics), and its exponentials are good to two units in the
# last place instead of one, so some 1e-6, too; TF32, with a roundoff of 5e-4, is beyond it.
GRADIENT_LIMIT = 1e-4
LOSS_LIMIT = 1e-5
# Timed steps of one process for the host's time, after one that warms up.
ALONE_STEPS = 3


def contiguous(job: TrainingJob) -> Any:
    """Expert e in slot e, on every MoE layer: [MoE layers, experts]."""
    return np.tile(np.arange(job.shape.experts), (job.shape.layers - 1, 1))


def phase(content: dict[str, Any], job: TrainingJob, made: Made, hosts: Sequence[int]) -> Any:
    """One phase of a run on this rank, which has a part in it if it is among the first `ranks`; what it found.

    content: the phase, its ranks, and what it needs. hosts: the number of each rank's host.
    """
    ranks = int(content["ranks"])
    if made.device.type == "cuda":  # what an earlier phase used lies in blocks of its own sizes
        need_torch().cuda.empty_cache()
    if content["phase"] == "route":
        return route(job, made) if made.rank == 0 else None
    if content["phase"] == "profile":
        asked = [Asked(one["family"], tuple(one["key"]), one["size"], one["nodes"]) for one in content["asked"]]
        groups_of(asked, made, hosts[:ranks])
    else:
        job = job.model_copy(update={"layouts": tuple(one for one in job.layouts if one.name in content["slots"])})
        for layout in job.layouts:
            links_of(layout, made)
    group = made.everyone(ranks)
    if group is None:
        return None
    # Under what else a rank's groups would be made, ranks without a part could not join in.
    made.sealed = True
    try:
        if content["phase"] == "profile":
            return profile(job, asked, made, group, hosts[:ranks])
        return steps(job, content["slots"], made, group, hosts[:ranks])
    finally:
        made.sealed = False


def route(job: TrainingJob, made: Made) -> list[list[list[int]]]:
    """Rows that want each expert, as one process finds it: [micro-batches, MoE layers, experts]."""
    alone = Stepper(job, ONE, made.alone(), contiguous(job))
    alone.run("routing the batch")
    found = np.zeros((job.global_batch // job.micro_batch, job.shape.layers - 1, job.shape.experts), dtype=np.int64)
    for micro, layer, rows in alone.routed:
        found[micro, layer - 1] += rows.cpu().numpy()
    listed: list[list[list[int]]] = found.tolist()
    return listed


def profile(job: TrainingJob, asked: Sequence[Asked], made: Made, group: Group, hosts: Sequence[int]) -> dict[str, Any]:
    """The samples of the operations asked for, the share of a core that ranks had meanwhile, and `_alone_s`."""
    found, share = measure(job, made, group, hosts, asked)
    return {
        "samples": [row.samples.tolist() for row in found],
        "core_share": share,
        "alone_s": _alone_s(job, made, group),
    }


def _alone_s(job: TrainingJob, made: Made, group: Group) -> float:
    """Seconds of a micro-batch, forward and backward, where each rank runs the whole model by itself, all at once."""
    alone = Stepper(job, ONE, made.alone(), contiguous(job))
    samples = []
    for turn in range(-1, ALONE_STEPS):
        group.ready()
        found = alone.run("profiling one process")
        if turn >= 0:
            samples.append(sum(end - start for start, end in found.passes) / alone.program.micro_batches)
    return float(np.median(group.gather(np.asarray(samples))))


def steps(
    job: TrainingJob, slots: dict[str, list[list[int]]], made: Made, group: Group, hosts: Sequence[int]
) -> dict[str, Any]:
    """Check every layout against one process, then time them in turns: the moments of all ranks.

    slots: by layout, of each expert over the EP ranks [MoE layers, experts]. Raises CheckFailed on every rank alike.
    """
    alone = Stepper(job, ONE, made.alone(), contiguous(job))
    alone.run("computing the reference")
    truth = {name: value.clone() for name, value in alone.gradients().items()}
    loss, wanted = alone.loss, _wanted(alone)
    del alone
    steppers = [Stepper(job, layout, made, np.asarray(slots[layout.name])) for layout in job.layouts]
    errors = []
    for stepper in steppers:
        stepper.run(f"checking against one process: {stepper.layout.name}")
        other = float(np.abs(group.gather(_wanted(stepper)).sum(axis=0) - wanted).sum()) / 2
        errors.append([*_errors(stepper, truth, loss), other])
    worst = group.gather(np.asarray(errors)).max(axis=0)
    for stepper, (gradient, lost, other) in zip(steppers, worst.tolist(), strict=True):
        if not (gradient <= GRADIENT_LIMIT and lost <= LOSS_LIMIT):
            tie = f"; {other:.0f} picks of experts differ" if other else ""
            raise CheckFailed(
                f"gradients differ from one process's by {gradient:.2g} (limit {GRADIENT_LIMIT:g}), the loss by "
                f"{lost:.2g} (limit {LOSS_LIMIT:g}){tie}",
                where=f"layout {stepper.layout.name}",
                mend="nothing was timed; "
                + ("if those few tokens lie between two experts, another --seed has others" if tie else "report this"),
            )
    del truth
    order = np.random.default_rng([job.seed, 12])
    kept: list[list[Any]] = [[] for _ in steppers]
    begun, worked, busy = perf_counter(), process_time(), busy_s()
    for turn in range(-job.warmup, job.repeats):
        for index in order.permutation(len(steppers)).tolist():
            stepper = steppers[index]
            group.ready()
            found = stepper.run(f"measuring, repeat {turn + 1} of {job.repeats}: {stepper.layout.name}")
            everyone = _of_all(found, group)
            if turn >= 0:
                kept[index].append(everyone)
    own = group.gather(np.asarray([process_time() - worked]))[:, 0]
    here = np.asarray(hosts) == hosts[0]
    others = others_cores(busy, busy_s(), float(own[here].sum()), perf_counter() - begun)
    held = group.gather(np.asarray([peak_bytes(made.device)])).max()
    return {
        "errors": worst[:, :2].tolist(),
        "loss": loss,
        "moments": kept,
        "others_cores": others,
        "peak_bytes": float(held),
    }


def _wanted(stepper: Stepper) -> Any:
    """Rows that wanted each expert over the last step, as far as this rank gates them: [MoE layers, experts]."""
    found = np.zeros((stepper.job.shape.layers - 1, stepper.job.shape.experts))
    for _, layer, rows in stepper.routed:
        found[layer - 1] += rows.cpu().numpy()
    return found


def _of_all(found: Moments, group: Group) -> list[dict[str, Any]]:
    """The moments of every rank, on every rank; ranks of different stages run different numbers of passes."""
    most = int(group.gather(np.asarray([float(len(found.passes))])).max())
    mine = np.full(3 + 2 * most, np.nan)
    told = [found.piped_s, found.reduced_s, found.done_s, *(moment for one in found.passes for moment in one)]
    mine[: len(told)] = told
    everyone = []
    for row in group.gather(mine).tolist():
        piped, reduced, done, *passes = (value for value in row if not math.isnan(value))
        pairs = list(zip(passes[::2], passes[1::2], strict=True))
        everyone.append({"passes": pairs, "piped_s": piped, "reduced_s": reduced, "done_s": done})
    return everyone


def _errors(stepper: Stepper, truth: dict[str, Any], loss: float) -> tuple[float, float]:
    """Largest relative error of any gradient of this rank, and of the loss (told by ranks with the head)."""
    torch = need_torch()
    mine = stepper.loss if stepper.ways["tp"].place == 0 else 0.0
    total = torch.tensor([mine], dtype=torch.float64, device=stepper.made.device)
    stepper.ways["tp"].meet(lambda: torch.distributed.all_reduce(total, group=stepper.links.whole))
    lost = abs(float(total) / loss - 1.0)
    return gradient_error(stepper, truth), lost if math.isfinite(lost) else math.inf


def gradient_error(stepper: Stepper, truth: dict[str, Any]) -> float:
    """Largest relative error of any gradient of this rank; infinite where one is no number."""
    norm = need_torch().linalg.vector_norm
    worst = 0.0
    for name, found in stepper.gradients().items():
        right = stepper.weights.slices[name].of(truth[name])
        size, gap = float(norm(right)), float(norm(found - right))
        # An expert that no token reached has no gradient at all, on either side.
        error = gap / size if size > 0 else (0.0 if gap == 0 else math.inf)
        worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst


def main(arguments: list[str] | None = None) -> int:
    """Run one rank started by the command; rank 0 leaves what was found in the folder."""

    def work(seat: Seat, beat: Beat) -> None:
        given = json.loads(read_text(seat.job, what="job"))
        job, ranks = TrainingJob.read(given["job"], where=seat.job), int(given["ranks"])
        if job.backend == "gloo":
            own_cores(seat.rank, ranks)  # before torch starts its threads
        store = need_torch().distributed.FileStore(str(seat.folder / "store"), ranks)
        with joined(
            job.backend, store, rank=seat.rank, ranks=ranks, local_rank=seat.rank, beat=beat, stall_s=job.stall_s
        ) as group:
            found = phase(given, job, Made(seat.rank, beat, group.device, ranks), [0] * ranks)
            if seat.rank == 0:
                write_text(seat.folder / RESULT_FILE, json.dumps(found))

    return serve(WHERE, arguments, work)


if __name__ == "__main__":
    sys.exit(main())
