"""`validate training`: profile operations, foretell the steps of every layout, check them, and only then time them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from moesim.files import write_json, write_text
from moesim.graph.pipeline import program
from moesim.routing.readers import write_npz
from moesim.routing.trace import RoutingCounts
from validate.compare import (
    mape,
    pair_ordering,
    rank_correlation,
    regret,
    regret_of_any,
    signed_error,
    span,
    split_half,
)
from validate.foretold import code, now, write_predictions
from validate.hardware import ranks as processes
from validate.hardware.group import need_torch
from validate.hardware.record import hardware, versions
from validate.training import predict as told
from validate.training.job import ONE, WHERE, Layout, TrainingJob
from validate.training.probe import Asked, Measured
from validate.training.rank import RESULT_FILE, contiguous
from validate.training.step import Stepper
from validate.training.ways import Made

Floats = NDArray[np.float64]
Say = Callable[[str], None]

TOLD = processes.Told(WHERE, "use fewer sequences of fewer tokens, or layouts of fewer ranks")
PREDICTIONS_FILE, RECORD_FILE = "predictions.json", "record.json"
PARTS = ("forward", "backward", "pipeline", "reduce", "optimizer")


def run(job: TrainingJob, say: Say) -> dict[str, Any]:
    """The whole validation; returns the record, which is in the job's folder with predictions, points and scenarios.

    Raises CheckFailed when a layout's gradients or loss are wrong (nothing is timed then) or a rank is lost,
    BadInput and Infeasible for layouts that cannot be.
    """
    torch = need_torch()
    torch.set_num_threads(1)
    out = Path(job.out)
    for layout in job.layouts:
        job.micro_batches(layout)
    write_json(out / told.CONFIG_FILE, job.shape.config(), indent=1)
    forget(out)
    say("routing the batch on one process")
    routed(job, out)
    counts = sorted({layout.ranks for layout in job.layouts})
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    slots: dict[str, list[list[int]]] = {}
    share: dict[str, float] = {}
    host: dict[str, dict[str, float]] = {}
    _write_yaml(out / told.cluster_file(ONE.ranks), told.cluster(ONE.ranks, memory))
    for ranks in counts:
        mine = [layout for layout in job.layouts if layout.ranks == ranks]
        _write_yaml(out / told.cluster_file(ranks), told.cluster(ranks, memory))
        asked, placed = told.asked_of(job, [*mine, ONE], out)
        slots |= {name: table.tolist() for name, table in placed.items()}
        measured, share[str(ranks)], alone_s = profile(job, asked, ranks, say)
        machine = hardware(torch.device("cpu"))
        _write_yaml(out / told.cluster_file(ranks), told.measured_cluster(ranks, memory, measured, machine["cpu"]))
        found = told.content(told.points_of(measured), now(), machine, versions())
        write_json(out / told.points_file(ranks), found, indent=1)
        host[str(ranks)] = told.host_time(job, out, told.points_file(ranks), alone_s)
    say("predicting")
    predicted = []
    for layout in job.layouts:
        points, host_s = told.points_file(layout.ranks), host[str(layout.ranks)]["layer_s"]
        _write_yaml(out / scenario_file(layout), told.scenario(job, layout, points=points, host_s=host_s))
        found = told.predict(job, layout, out, points=points, host_s=host_s)
        predicted.append(found | {"scenario": scenario_file(layout)})
    predictions = write_predictions(out / PREDICTIONS_FILE, {"layouts": predicted, "host": host})
    started = now()
    moments: dict[str, Any] = {}
    errors: dict[str, Any] = {}
    others: dict[str, float | None] = {}
    for ranks in counts:
        mine = [layout for layout in job.layouts if layout.ranks == ranks]
        content = {"phase": "steps", "slots": {layout.name: slots[layout.name] for layout in mine}}
        answer = started_ranks(job.model_copy(update={"layouts": tuple(mine)}), ranks, content, say)
        others[str(ranks)] = answer["others_cores"]
        for layout, error, found in zip(mine, answer["errors"], answer["moments"], strict=True):
            errors[layout.name], moments[layout.name] = error, found
    record = {
        "schema_version": 1,
        "kind": "validate-training",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "code": code(),
        "hardware": hardware(torch.device("cpu")),
        "versions": versions(),
        "job": job.model_dump(mode="json", exclude={"out"}),
        "core_share": share,
        "host": host,
        "others_cores": others,
        "predictions": predictions,
        "measured_from": started,
        "gradient_error": max(error[0] for error in errors.values()),
        "loss_error": max(error[1] for error in errors.values()),
        "predicted": predicted,
        "measured": [measured_of(job, layout, moments[layout.name]) for layout in job.layouts],
        "comparison": compare(job, predicted, [samples_of(moments[layout.name]) for layout in job.layouts]),
    }
    write_json(out / RECORD_FILE, record, indent=1)
    return record


def forget(out: Path) -> None:
    """Remove what an earlier run left in its folder, so that nothing there can be taken for this one's."""
    earlier: list[str] = []
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        told_before = json.loads((out / PREDICTIONS_FILE).read_text(encoding="utf-8"))["layouts"]
        earlier = [Path(one["scenario"]).name for one in told_before]
    for name in (PREDICTIONS_FILE, RECORD_FILE, *earlier):
        (out / name).unlink(missing_ok=True)


def routed(job: TrainingJob, out: Path) -> None:
    """Write the routing that the batch has, by micro-batch, as one process finds it."""
    alone = Stepper(job, ONE, Made(0), contiguous(job))
    alone.run()
    counts = told.counted(alone.routed, job)
    layers = np.arange(1, job.shape.layers)
    write_npz(
        out / told.ROUTING_FILE,
        RoutingCounts(counts, layers, job.shape.layers, "the batch", per_step=True),
    )


def profile(job: TrainingJob, asked: Sequence[Asked], ranks: int, say: Say) -> tuple[list[Measured], float, float]:
    """Measure operations on so many ranks; the share of a core that each had, and a micro-batch on one process."""
    say(f"profiling {len(asked)} operations on {ranks} ranks")
    answer = started_ranks(job, ranks, {"phase": "profile", "asked": [asdict(one) for one in asked]}, say)
    found = [Measured(one, np.asarray(each)) for one, each in zip(asked, answer["samples"], strict=True)]
    return found, float(answer["core_share"]), float(answer["alone_s"])


def started_ranks(job: TrainingJob, ranks: int, content: dict[str, Any], say: Say) -> Any:
    """Run local ranks on one phase of the job; what rank 0 found. Raises CheckFailed that names a rank that failed."""
    folder = Path(tempfile.mkdtemp(prefix="moesim-ranks-"))
    last = ""

    def tell(label: str) -> None:
        nonlocal last
        phase = label.partition(":")[0]
        if phase != last:
            say(label)
            last = phase

    try:
        given = {"job": job.model_dump(mode="json"), "ranks": ranks, **content}
        write_json(folder / "job.json", given)
        lines = processes.commands(folder / "job.json", folder, ranks, "validate.training.rank")
        processes.launch(lines, folder, stall_limit_s=job.stall_s, tell=tell, told=TOLD)
        return json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def scenario_file(layout: Layout) -> str:
    """Name of a layout's scenario in the run's folder: `moesim simulate` on it gives the prediction again."""
    return "".join(letter if letter.isalnum() else "-" for letter in layout.name).strip("-").lower() + ".yaml"


def _write_yaml(path: Path, content: dict[str, Any]) -> None:
    write_text(path, yaml.safe_dump(content, sort_keys=False))


def samples_of(moments: Sequence[Sequence[dict[str, Any]]]) -> Floats:
    """Seconds of each repeat of a step, of the rank that is done last: [repeats]."""
    return np.asarray([max(one["done_s"] for one in repeat) for repeat in moments])


def measured_of(job: TrainingJob, layout: Layout, moments: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """Median, p10, p90 and samples of a layout's step, and its parts."""
    samples = samples_of(moments)
    low, middle, high = np.quantile(samples, (0.1, 0.5, 0.9)).tolist()
    made = program(layout.schedule, layout.pp, job.micro_batches(layout), layout.virtual_stages)
    kinds = [made.kind[made.stage == stage].tolist() for stage in range(layout.pp)]
    return {
        "layout": layout.name,
        "step_s": {"median_s": middle, "p10_s": low, "p90_s": high, "samples_s": samples.tolist()},
        "parts_s": told.measured_parts(layout, moments, kinds),
    }


def compare(job: TrainingJob, predicted: Sequence[dict[str, Any]], samples: Sequence[Floats]) -> dict[str, Any]:
    """Errors, order and regret of the steps; layouts of as many ranks are compared with each other."""
    foretold = np.asarray([one["step_s"] for one in predicted])
    table = np.stack(samples)
    found = np.median(table, axis=1)
    groups = [layout.ranks for layout in job.layouts]
    order = pair_ordering(foretold, table, groups)
    inside = [one["low_s"] <= float(middle) <= one["high_s"] for one, middle in zip(predicted, found, strict=True)]
    correlation = {}
    for ranks in sorted(set(groups)):
        mine = np.asarray(groups) == ranks
        if mine.sum() >= 3:
            correlation[str(ranks)] = rank_correlation(foretold[mine], found[mine])
    by_ranks = {str(ranks): mape(foretold[np.asarray(groups) == ranks], found[np.asarray(groups) == ranks])
                for ranks in sorted(set(groups))}  # fmt: skip
    return {
        "step": {
            "mape": mape(foretold, found),
            "mape_by_ranks": by_ranks,
            "signed_error": signed_error(foretold, found).tolist(),
            "within_interval": sum(inside),
        },
        "split_half": asdict(split_half(table, np.random.default_rng([job.seed, 5]))),
        "span": {str(group): value for group, value in span(found, groups).items()},
        "rank_correlation": correlation,
        "pairs": {**asdict(order), "undecided": order.undecided},
        "regret": {str(group): value for group, value in regret(foretold, found, groups).items()},
        "regret_of_any": {str(group): value for group, value in regret_of_any(found, groups).items()},
    }


def table(record: dict[str, Any]) -> str:
    """The record for a person: each layout's step and parts, errors, order and regret."""
    job, compared = record["job"], record["comparison"]
    shape = job["shape"]
    lines = [
        f"{job['backend']}, fp32: {shape['layers']} layers of {shape['hidden']}, {shape['experts']} experts of "
        f"{shape['intermediate']}, top-{shape['top_k']}; {job['global_batch']} sequences of {job['sequence_length']} "
        f"tokens a step; {job['repeats']} repeats",
        f"on {record['hardware']['cpu']}, {record['hardware']['cpus']} CPUs; of a core each rank had "
        + ", ".join(f"{share:.0%} (of {ranks})" for ranks, share in record["core_share"].items())
        + " while operations were profiled; other processes kept "
        + ", ".join("?" if cores is None else f"{cores:.2f}" for cores in record["others_cores"].values())
        + " cores busy while steps were timed",
        "host's time of a layer: "
        + ", ".join(f"{1e3 * one['layer_s']:.2f} ms (of {ranks})" for ranks, one in record["host"].items()),
        f"predictions written {record['predictions']['written']}, measured from {record['measured_from']}; gradients "
        f"within {record['gradient_error']:.1g} of one process's",
        "",
        f"{'layout':<20}{'ranks':>6}{'predicted':>11}{'measured':>11}{'p10 to p90':>16}{'error':>8}   parts, predicted "
        "over measured (ms)",
    ]
    for foretold, found in zip(record["predicted"], record["measured"], strict=True):
        step = found["step_s"]
        parts = ", ".join(
            f"{name} {_milli(foretold['parts_s'][name])}/{_milli(found['parts_s'][name])}" for name in PARTS
        )
        lines.append(
            f"{foretold['layout']:<20}{foretold['ranks']:>6}{1e3 * foretold['step_s']:>11.0f}"
            f"{1e3 * step['median_s']:>11.0f}{1e3 * step['p10_s']:>9.0f} to {1e3 * step['p90_s']:<5.0f}"
            f"{foretold['step_s'] / step['median_s'] - 1:>+7.1%}   {parts}"
        )
    step, order, half = compared["step"], compared["pairs"], compared["split_half"]
    by_ranks = ", ".join(f"{value:.1%} on {ranks}" for ranks, value in step["mape_by_ranks"].items())
    lines += [
        "",
        f"step time: mean absolute error {step['mape']:.1%} ({by_ranks} ranks); within the interval in "
        f"{step['within_interval']} of {len(record['predicted'])}",
        f"halves of the repeats differ by {half['gap']:.1%}, reliability "
        + ("not told" if half["reliability"] is None else f"{half['reliability']:.3f}"),
        f"pairs of layouts of as many ranks that differ by more than chance (sign test, 10 %): {order['agreed']} of "
        f"{order['decided']} ordered right, {order['undecided']} undecided",
        *(
            f"on {ranks} ranks: slowest over quickest {compared['span'][ranks]:.2f}, rank correlation "
            f"{_told(compared['rank_correlation'].get(ranks))}, regret {value:.1%} (of any layout "
            f"{compared['regret_of_any'][ranks]:.1%})"
            for ranks, value in compared["regret"].items()
        ),
    ]
    return "\n".join(lines)


def _told(value: float | None) -> str:
    return "not told" if value is None else f"{value:.3f}"


def _milli(value: float | Sequence[float]) -> str:
    """Milliseconds; of several stages the largest."""
    return f"{1e3 * (value if isinstance(value, float) else max(value)):.3g}"
