"""One rank of `validate training`: measures operations, or checks and times the steps of some layouts."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import numpy as np

from moesim.errors import CheckFailed
from moesim.files import read_text, write_text
from validate.hardware.group import Beat, need_torch, own_cores
from validate.hardware.process import Seat, serve
from validate.training.job import WHERE, Layout, TrainingJob
from validate.training.probe import Asked, measure
from validate.training.step import Moments, Stepper
from validate.training.ways import Made, Way

RESULT_FILE = "result.json"

# Largest relative error of a gradient, over all elements of a parameter, against one process that computes the whole
# batch: sums over thousands of tokens and six layers in float32 (unit roundoff 6e-8), in another order.
GRADIENT_LIMIT = 1e-4
LOSS_LIMIT = 1e-5
ONE = Layout(name="one process")


def contiguous(job: TrainingJob) -> Any:
    """Expert e in slot e, on every MoE layer: [MoE layers, experts]."""
    return np.tile(np.arange(job.shape.experts), (job.shape.layers - 1, 1))


def profile(job: TrainingJob, asked: Sequence[dict[str, Any]], made: Made, ranks: int) -> dict[str, Any]:
    """The samples of the operations asked for, and the share of a core that ranks had meanwhile."""
    points = [Asked(row["family"], tuple(row["key"]), row["size"]) for row in asked]
    found, share = measure(job, made, ranks, points)
    return {"samples": [row.samples.tolist() for row in found], "core_share": share}


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
    for turn in range(-job.warmup, job.repeats):
        for index in order.permutation(len(steppers)).tolist():
            stepper = steppers[index]
            met(distributed.barrier)
            found = stepper.run(f"measuring, repeat {turn + 1} of {job.repeats}: {stepper.layout.name}")
            everyone = _of_all(found, ranks, made)
            if turn >= 0:
                kept[index].append(everyone)
    return {"errors": worst.tolist(), "loss": loss, "moments": kept}


def _of_all(found: Moments, ranks: int, made: Made) -> list[dict[str, Any]]:
    """The moments of every rank, on every rank."""
    everyone: list[Any] = [None] * ranks
    gather = need_torch().distributed.all_gather_object
    Way((), 0, None, made.beat).meet(lambda: gather(everyone, vars(found)))
    return everyone


def _errors(stepper: Stepper, truth: dict[str, Any], loss: float) -> tuple[float, float]:
    """Largest relative error of any gradient of this rank, and of the loss (told by ranks with the head)."""
    torch = need_torch()
    worst = 0.0
    for name, found in stepper.gradients().items():
        right = stepper.weights.slices[name].of(truth[name])
        size = float(torch.linalg.vector_norm(right))
        gap = float(torch.linalg.vector_norm(found - right))
        # An expert that no token reached has no gradient at all, on either side.
        worst = max(worst, gap / size if size > 0 else (0.0 if gap == 0 else np.inf))
    total = torch.tensor([stepper.loss if stepper.ways["tp"].place == 0 else 0.0], dtype=torch.float64)
    stepper.ways["tp"].meet(lambda: torch.distributed.all_reduce(total))
    return worst, abs(float(total) / loss - 1.0)


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
