"""One rank of `validate training`: measures operations, or checks and times the steps of some layouts."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from datetime import timedelta
from time import perf_counter, process_time
from typing import Any

import numpy as np

from moesim.errors import CheckFailed
from moesim.files import read_text, write_text
from validate.hardware.group import Beat, need_torch, own_cores
from validate.hardware.process import Seat, serve
from validate.training.job import ONE, WHERE, TrainingJob
from validate.training.machine import busy_s, others_cores
from validate.training.probe import Asked, measure
from validate.training.step import Moments, Stepper
from validate.training.ways import Made, Way

RESULT_FILE = "result.json"

# Largest relative error of a gradient, over all elements of a parameter, against one process that computes the whole
# batch: sums over thousands of tokens and six layers in float32 (unit roundoff 6e-8), in another order.
GRADIENT_LIMIT = 1e-4
LOSS_LIMIT = 1e-5
# Timed steps of one process for the host's time, after one that warms up.
ALONE_STEPS = 3


def contiguous(job: TrainingJob) -> Any:
    """Expert e in slot e, on every MoE layer: [MoE layers, experts]."""
    return np.tile(np.arange(job.shape.experts), (job.shape.layers - 1, 1))


def profile(job: TrainingJob, asked: Sequence[dict[str, Any]], made: Made, ranks: int) -> dict[str, Any]:
    """The samples of the operations asked for, the share of a core that ranks had meanwhile, and `_alone_s`."""
    points = [Asked(row["family"], tuple(row["key"]), row["size"]) for row in asked]
    found, share = measure(job, made, ranks, points)
    return {
        "samples": [row.samples.tolist() for row in found],
        "core_share": share,
        "alone_s": _alone_s(job, made, ranks),
    }


def _alone_s(job: TrainingJob, made: Made, ranks: int) -> float:
    """Seconds of a micro-batch, forward and backward, where each rank runs the whole model by itself, all at once."""
    torch = need_torch()
    distributed, met = torch.distributed, Way((), 0, None, made.beat).meet
    alone = Stepper(job, ONE, Made(0, made.beat), contiguous(job))
    samples = []
    for turn in range(-1, ALONE_STEPS):
        met(distributed.barrier)
        found = alone.run("profiling one process")
        if turn >= 0:
            samples.append(sum(end - start for start, end in found.passes) / alone.program.micro_batches)
    gathered = [torch.zeros(len(samples), dtype=torch.float64) for _ in range(ranks)]
    met(lambda: distributed.all_gather(gathered, torch.tensor(samples, dtype=torch.float64)))
    return float(np.median([one.numpy() for one in gathered]))


def steps(job: TrainingJob, slots: dict[str, list[list[int]]], made: Made, ranks: int) -> dict[str, Any]:
    """Check every layout against one process, then time them in turns: the moments of all ranks.

    slots: by layout, of each expert over the EP ranks [MoE layers, experts]. Raises CheckFailed on every rank alike.
    """
    torch = need_torch()
    distributed, met = torch.distributed, Way((), 0, None, made.beat).meet
    alone = Stepper(job, ONE, Made(0, made.beat), contiguous(job))
    alone.run("computing the reference")
    truth = {name: value.clone() for name, value in alone.gradients().items()}
    loss = alone.loss
    del alone
    steppers = [Stepper(job, layout, made, np.asarray(slots[layout.name])) for layout in job.layouts]
    errors = []
    for stepper in steppers:
        stepper.run(f"checking against one process: {stepper.layout.name}")
        errors.append(_errors(stepper, truth, loss))
    worst = torch.tensor(errors, dtype=torch.float64)
    met(lambda: distributed.all_reduce(worst, op=distributed.ReduceOp.MAX))
    for stepper, (gradient, lost) in zip(steppers, worst.tolist(), strict=True):
        if not (gradient <= GRADIENT_LIMIT and lost <= LOSS_LIMIT):
            raise CheckFailed(
                f"gradients differ from one process's by {gradient:.2g} (limit {GRADIENT_LIMIT:g}), the loss by "
                f"{lost:.2g} (limit {LOSS_LIMIT:g})",
                where=f"layout {stepper.layout.name}",
                mend="nothing was timed; report this",
            )
    del truth
    order = np.random.default_rng([job.seed, 12])
    kept: list[list[Any]] = [[] for _ in steppers]
    begun, worked, busy = perf_counter(), process_time(), busy_s()
    for turn in range(-job.warmup, job.repeats):
        for index in order.permutation(len(steppers)).tolist():
            stepper = steppers[index]
            met(distributed.barrier)
            found = stepper.run(f"measuring, repeat {turn + 1} of {job.repeats}: {stepper.layout.name}")
            everyone = _of_all(found, ranks, made)
            if turn >= 0:
                kept[index].append(everyone)
    own = torch.tensor([process_time() - worked], dtype=torch.float64)
    met(lambda: distributed.all_reduce(own))
    others = others_cores(busy, busy_s(), float(own), perf_counter() - begun)
    return {"errors": worst.tolist(), "loss": loss, "moments": kept, "others_cores": others}


def _of_all(found: Moments, ranks: int, made: Made) -> list[dict[str, Any]]:
    """The moments of every rank, on every rank."""
    everyone: list[Any] = [None] * ranks
    gather = need_torch().distributed.all_gather_object
    Way((), 0, None, made.beat).meet(lambda: gather(everyone, vars(found)))
    return everyone


def _errors(stepper: Stepper, truth: dict[str, Any], loss: float) -> tuple[float, float]:
    """Largest relative error of any gradient of this rank, and of the loss (told by ranks with the head)."""
    torch = need_torch()
    total = torch.tensor([stepper.loss if stepper.ways["tp"].place == 0 else 0.0], dtype=torch.float64)
    stepper.ways["tp"].meet(lambda: torch.distributed.all_reduce(total))
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
        own_cores(seat.rank, ranks)  # before torch starts its threads
        torch = need_torch()
        torch.set_num_threads(1)
        beat.at("joining the process group")
        beat.waiting = True
        torch.distributed.init_process_group(
            job.backend,
            store=torch.distributed.FileStore(str(seat.folder / "store"), ranks),
            rank=seat.rank,
            world_size=ranks,
            timeout=timedelta(seconds=job.stall_s),
        )
        beat.waiting = False
        try:
            made = Made(seat.rank, beat)
            profiling = given["phase"] == "profile"
            found = profile(job, given["asked"], made, ranks) if profiling else steps(job, given["slots"], made, ranks)
            if seat.rank == 0:
                write_text(seat.folder / RESULT_FILE, json.dumps(found))
        finally:
            torch.distributed.destroy_process_group()

    return serve(WHERE, arguments, work)


if __name__ == "__main__":
    sys.exit(main())
