"""One rank of a validation: profile, predict (rank 0), check the outputs, measure, record (rank 0)."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import CheckFailed
from moesim.files import read_text, write_json
from validate.foretold import now, write_predictions
from validate.hardware import probe, record, unfinished
from validate.hardware.group import Beat, CoreShare, Group, need_torch, own_cores
from validate.hardware.job import Job
from validate.hardware.join import join, joined
from validate.hardware.layer import COLLECTIVES, OPERATIONS, forward
from validate.hardware.predict import predict, prediction_json, predictions_json
from validate.hardware.probe import pace_points
from validate.hardware.process import Seat, serve
from validate.hardware.rig import Rig, build, check_outputs, generator, routed_counts
from validate.hardware.sampling import run_point

PREDICTIONS_FILE = "predictions.json"
RECORD_FILE = record.RECORD_FILE


def session(job: Job, group: Group) -> dict[str, Any] | None:
    """The whole run on one rank; rank 0 returns the record, the others None.

    The order is the point: the profile and the predictions, written and synced, come before the first timed run of any
    test case; the outputs are checked before they are timed. Raises CheckFailed on every rank when outputs are wrong.
    """
    torch = need_torch()
    beat = group.beat
    with torch.inference_mode():
        rig = build(job, group)
        counts = routed_counts(rig)
        profile = probe.measure(rig, counts)
        predicted: list[dict[str, Any]] = []
        written: dict[str, str] = {}
        if group.rank == 0:
            beat.at("predicting")
            prediction = predict(job, profile, counts, probe.row_bytes(rig), generator(job, 8))
            predicted = prediction_json(job, prediction, counts)
            written = write_predictions(Path(job.out) / PREDICTIONS_FILE, predictions_json(predicted, profile))
        group.start_together()
        output_error = check(rig, counts)
        hosts = group.hosts()
        started = now()
        moments, core_share, pace_s = measure(rig, started)
    if group.rank != 0:
        return None
    beat.at("comparing")
    measured = record.measured_json(job, moments)
    found = record.record_json(
        job,
        device=group.device,
        dtype=rig.dtype,
        hosts=hosts,
        clock="shared" if group.shared_clock else "each rank's own",
        core_share={"profile": profile.core_share, "measured": core_share},
        pace_s={"profile": profile.pace_s, "measured": pace_s},
        prediction_file=written,
        predicted=predicted,
        measured_from=started,
        measured=measured,
        output_error=output_error,
        comparison=record.comparison_json(job, predicted, measured, generator(job, 5)),
    )
    write_json(Path(job.out) / RECORD_FILE, found, indent=1)
    unfinished.forget(Path(job.out))
    return found


def forget(out: Path) -> None:
    """Remove what an earlier run left in its folder, so that nothing there can be taken for this one's."""
    unfinished.forget(out)
    for name in (PREDICTIONS_FILE, RECORD_FILE):
        (out / name).unlink(missing_ok=True)


def check(rig: Rig, counts: list[NDArray[np.int64]]) -> float:
    """Run every case once; no row may get lost, and every output must match the reference: the largest error.

    Raises CheckFailed on every rank alike.
    """
    job, group = rig.job, rig.group
    outputs: dict[int, list[Any]] = {tokens: [] for tokens in job.tokens}
    arrived = []
    for index, (placement, tokens) in enumerate(job.cases()):
        group.beat.at(f"checking {placement.name} at {tokens} tokens")
        layer = rig.layers[index % len(rig.layers)]
        y, got = forward(rig.tokens[tokens], layer, group, lambda: None)
        outputs[tokens].append(y)
        arrived.append([float(sum(got.received)), float(sum(map(sum, got.counts)))])
    everywhere = group.gather(np.asarray(arrived)).sum(axis=0)
    for index, (placement, tokens) in enumerate(job.cases()):
        expected = job.ranks * tokens * job.shape.top_k
        if not (everywhere[index] == expected).all() or counts[index].sum() != expected:
            raise CheckFailed(
                f"{expected} rows were sent, {int(everywhere[index][0])} arrived",
                where=f"placement {placement.name}, {tokens} tokens",
                mend="nothing was timed; report this",
            )
    return check_outputs(rig, outputs)


def measure(rig: Rig, started: str) -> tuple[NDArray[np.float64], float | None, float]:
    """Moments of every timed run, [ranks, cases, repeats, operations + 1], the share of a core that ranks had, and the
    median seconds of the profile's pace sample.

    Within a repeat the cases come in random turn, the same on every rank; after each, rank 0 keeps what there is.
    """
    job, group = rig.job, rig.group
    cases = job.cases()
    rng = generator(job, 4)
    share = CoreShare()
    rounds: list[NDArray[np.float64]] = []
    pace, passed_s = pace_points(rig), list[float]()
    for turn in range(-job.warmup, job.repeats):
        moments = np.zeros((len(cases), len(OPERATIONS) + 1))
        for index in rng.permutation(len(cases) + len(pace)).tolist():
            if index >= len(cases):
                passed = run_point(rig, pace[index - len(cases)])
                if turn >= 0:
                    passed_s.append(float(np.ptp(passed.read())))
                continue
            placement, tokens = cases[index]
            group.beat.at(f"measuring {placement.name} at {tokens} tokens, repeat {turn + 1} of {job.repeats}")
            rig.flush()
            marks = group.marks()
            group.start_together()
            forward(rig.tokens[tokens], rig.layers[index % len(rig.layers)], group, marks.mark)
            if turn >= 0:
                moments[index] = marks.read()
                share.add(marks, [name in COLLECTIVES for name in OPERATIONS])
        if turn >= 0:
            rounds.append(group.gather(moments))
            if group.rank == 0:
                unfinished.keep(Path(job.out), np.stack(rounds, axis=2), repeats=job.repeats, started=started)
    return np.stack(rounds, axis=2), group.core_share(share), float(np.median(group.gather(np.asarray(passed_s))))


def join_torchrun(make_job: Callable[[int], Job]) -> dict[str, Any] | None:
    """Join the ranks that torchrun started (see `join`); returns the record on rank 0, None elsewhere."""

    def make(ranks: int) -> Job:
        made = make_job(ranks)
        forget(Path(made.out))
        return made

    return join(
        "validate hardware",
        make,
        Job.model_validate_json,
        lambda job, group, store: session(job, group),
        stall_s=lambda job: job.stall_limit_s,
        ending=lambda job, reason: unfinished.tell(Path(job.out), job, reason),
    )


def main(arguments: list[str] | None = None) -> int:
    """Run one rank started by the command: read the job, join over the file store, write what went wrong, if it did."""

    def work(rank: Seat, beat: Beat) -> None:
        job = Job.read(json.loads(read_text(rank.job, what="job")), where=rank.job)
        if job.backend == "gloo":
            own_cores(rank.rank, job.ranks)  # before torch starts its threads
        torch = need_torch()
        store = torch.distributed.FileStore(str(rank.folder / "store"), job.ranks)
        with joined(
            job.backend, store, rank=rank.rank, ranks=job.ranks, local_rank=rank.rank, beat=beat,
            stall_s=job.stall_limit_s,
        ) as group:  # fmt: skip
            session(job, group)

    return serve("validate hardware", arguments, work)


if __name__ == "__main__":
    sys.exit(main())
