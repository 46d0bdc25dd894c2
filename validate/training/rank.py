"""One rank of `validate training`: measures operations, or checks and times the steps of some layouts."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from moesim.errors import CheckFailed
from profiles.collectives import joined, ready
from profiles.launch import LocalRank, serve
from validate.hardware.group import need_torch, own_cores
from validate.training.job import Layout, TrainingJob
from validate.training.probe import Asked, measure
from validate.training.step import Moments, Stepper
from validate.training.ways import Made

# Largest relative error of a gradient, over all elements of a parameter, against one process that computes the whole
# batch: sums over thousands of tokens and six layers in float32 (unit roundoff 6e-8), in another order.
GRADIENT_LIMIT = 1e-4
LOSS_LIMIT = 1e-5
ONE = Layout(name="one process")


def contiguous(job: TrainingJob) -> Any:
    """Expert e in slot e, on every MoE layer: [MoE layers, experts]."""
    return np.tile(np.arange(job.shape.experts), (job.shape.layers - 1, 1))


def profile(job: TrainingJob, asked: Sequence[dict[str, Any]], one: LocalRank) -> str:
    """The samples of the operations asked for, and the share of a core that ranks had meanwhile, as JSON."""
    points = [Asked(row["family"], tuple(row["key"]), row["size"]) for row in asked]
    found, share = measure(job, Made(one.rank), one.ranks, points, one.say if one.rank == 0 else _quiet)
    return json.dumps({"samples": [row.samples.tolist() for row in found], "core_share": share})


def _quiet(line: str) -> None:
    pass


def steps(job: TrainingJob, slots: dict[str, list[list[int]]], one: LocalRank) -> str:
    """Check every layout against one process, then time them in turns: JSON of the moments of all ranks.

    slots: by layout, of each expert over the EP ranks [MoE layers, experts]. Raises CheckFailed on every rank alike.
    """
    torch = need_torch()
    say: Callable[[str], None] = one.say if one.rank == 0 else _quiet
    made = Made(one.rank)
    say("computing the reference")
    alone = Stepper(job, ONE, Made(0), contiguous(job))
    alone.run()
    truth = {name: value.clone() for name, value in alone.gradients().items()}
    loss = alone.loss
    del alone
    steppers = [Stepper(job, layout, made, np.asarray(slots[layout.name])) for layout in job.layouts]
    errors = []
    for stepper in steppers:
        say(f"checking {stepper.layout.name}")
        stepper.run()
        errors.append(_errors(stepper, truth, loss))
    worst = torch.tensor(errors, dtype=torch.float64)
    torch.distributed.all_reduce(worst, op=torch.distributed.ReduceOp.MAX)
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
            say(f"measuring {stepper.layout.name}, repeat {turn + 1} of {job.repeats}")
            torch.distributed.barrier()
            found = stepper.run()
            if turn >= 0:
                kept[index].append(_gathered(found, one.ranks))
    return json.dumps({"errors": worst.tolist(), "loss": loss, "moments": kept})


def _gathered(found: Moments, ranks: int) -> list[dict[str, Any]]:
    """The moments of every rank, on every rank."""
    everyone: list[Any] = [None] * ranks
    need_torch().distributed.all_gather_object(everyone, vars(found))
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
    torch.distributed.all_reduce(total)
    return worst, abs(float(total) / loss - 1.0)


def main(arguments: Sequence[str]) -> int:
    """One local rank, as `launch` runs it."""

    def work(one: LocalRank) -> str:
        given = json.loads(one.job)
        job = TrainingJob.model_validate(given["job"])
        torch = ready(job.backend, one.ranks)
        torch.set_num_threads(1)
        own_cores(one.rank, one.ranks)
        with joined(torch, job.backend, one.rank, one.ranks, one.rank, one.store, job.stall_s):
            if given["phase"] == "profile":
                return profile(job, given["asked"], one)
            return steps(job, given["slots"], one)

    return serve(arguments, work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
