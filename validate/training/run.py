"""`validate training`: profile operations, foretell the steps of every layout, check them, and only then time them."""

from __future__ import annotations

import contextlib
import json
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
from moesim.units import human_bytes
from profiles.groups import PRETENDED, pretended_hosts
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
from validate.hardware.group import Group
from validate.hardware.join import join
from validate.hardware.record import RECORD_FILE, finished, hardware, versions
from validate.training import predict as told
from validate.training.company import TOLD, Company, Joined, Say
from validate.training.job import ONE, WHERE, Layout, TrainingJob
from validate.training.memory import check_memory
from validate.training.probe import Asked, Measured

Floats = NDArray[np.float64]

PREDICTIONS_FILE = "predictions.json"
PARTS = ("forward", "backward", "pipeline", "reduce", "optimizer")


def run(job: TrainingJob, company: Company, *, keep: bool = False) -> dict[str, Any]:
    """The whole validation; returns the record, which is in the job's folder with predictions, points and scenarios.

    keep: hand back the record of this very job that an earlier go left, if one did. Raises CheckFailed when a layout's
    gradients or loss are wrong (nothing is timed then) or a rank is lost, BadInput and Infeasible for layouts that
    cannot be.
    """
    earlier = finished(job, job.out) if keep else None
    if earlier is not None:
        return earlier
    out, machine = Path(job.out), company.machine
    counts = sorted({layout.ranks for layout in job.layouts})
    for layout in job.layouts:
        job.micro_batches(layout)
    check_memory(job, machine, company.device)
    nodes = {str(ranks): machine.nodes(ranks)[0] for ranks in counts}
    write_json(out / told.CONFIG_FILE, job.shape.config(), indent=1)
    forget(out)
    company.at("routing the batch on one process")
    routed(job, out, company)
    slots: dict[str, list[list[int]]] = {}
    share: dict[str, float | None] = {}
    host: dict[str, dict[str, float]] = {}
    points: dict[int, list[str]] = {}
    _write_yaml(out / told.cluster_file(ONE.ranks), told.cluster(ONE.ranks, machine))
    for ranks in counts:
        mine = [layout for layout in job.layouts if layout.ranks == ranks]
        _write_yaml(out / told.cluster_file(ranks), told.cluster(ranks, machine))
        asked, placed = told.asked_of(job, [*mine, ONE], out)
        slots |= {name: table.tolist() for name, table in placed.items()}
        measured, share[str(ranks)], alone_s = profile(asked, ranks, company)
        _write_yaml(out / told.cluster_file(ranks), told.measured_cluster(ranks, machine, measured))
        points[ranks] = []
        for over, found in told.points_of(measured).items():
            points[ranks].append(told.points_file(ranks, over))
            content = told.content(found, over, now(), hardware(company.device), versions())
            write_json(out / points[ranks][-1], content, indent=1)
        host[str(ranks)] = told.host_time(job, out, points[ranks], alone_s)
    predicted = []
    for layout in job.layouts:
        company.at(f"predicting: {layout.name}")
        files, host_s = points[layout.ranks], host[str(layout.ranks)]["layer_s"]
        _write_yaml(out / scenario_file(layout), told.scenario(job, layout, points=files, host_s=host_s))
        foretold = told.predict(job, layout, out, points=files, host_s=host_s)
        predicted.append(foretold | {"scenario": scenario_file(layout)})
    predictions = write_predictions(out / PREDICTIONS_FILE, {"layouts": predicted, "host": host})
    started = now()
    moments: dict[str, Any] = {}
    errors: dict[str, Any] = {}
    others: dict[str, float | None] = {}
    held: dict[str, float] = {}
    for ranks in counts:
        mine = [layout for layout in job.layouts if layout.ranks == ranks]
        answer = company.phase(
            {"phase": "steps", "ranks": ranks, "slots": {layout.name: slots[layout.name] for layout in mine}}
        )
        others[str(ranks)], held[str(ranks)] = answer["others_cores"], answer["peak_bytes"]
        for layout, error, timed in zip(mine, answer["errors"], answer["moments"], strict=True):
            errors[layout.name], moments[layout.name] = error, timed
    record = {
        "schema_version": 1,
        "kind": "validate-training",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "code": code(),
        "hardware": hardware(company.device),
        "versions": versions(),
        "job": job.model_dump(mode="json", exclude={"out"}),
        "nodes": nodes,
        PRETENDED: pretended_hosts(),
        "core_share": share,
        "host": host,
        "others_cores": others,
        "peak_bytes": held,
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


def run_under_torchrun(make: Callable[[int], TrainingJob], say: Say, *, keep: bool = False) -> dict[str, Any] | None:
    """The same on the ranks that torchrun started: the record on rank 0, None on the others. make: of so many ranks."""

    def work(job: TrainingJob, group: Group, store: Any) -> dict[str, Any] | None:
        company = Joined(job, group, store, say)
        if group.rank:
            company.follow()
            return None
        try:
            return run(job, company, keep=keep)
        finally:
            company.dismiss()

    return join(WHERE, make, TrainingJob.model_validate_json, work, stall_s=lambda job: job.stall_s, told=TOLD)


def forget(out: Path) -> None:
    """Remove what an earlier run left in its folder, so that nothing there can be taken for this one's."""
    earlier: list[str] = []
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        told_before = json.loads((out / PREDICTIONS_FILE).read_text(encoding="utf-8"))["layouts"]
        earlier = [Path(one["scenario"]).name for one in told_before]
    for name in (PREDICTIONS_FILE, RECORD_FILE, *earlier):
        (out / name).unlink(missing_ok=True)


def routed(job: TrainingJob, out: Path, company: Company) -> None:
    """Write the routing that the batch has, by micro-batch, as one process finds it."""
    counts = np.asarray(company.phase({"phase": "route", "ranks": 1}), dtype=np.float64)
    layers = np.arange(1, job.shape.layers)
    write_npz(
        out / told.ROUTING_FILE,
        RoutingCounts(counts, layers, job.shape.layers, "the batch", per_step=True),
    )


def profile(asked: Sequence[Asked], ranks: int, company: Company) -> tuple[list[Measured], float | None, float]:
    """Measure operations on so many ranks; the share of a core that each had, and a micro-batch on one process."""
    company.at(f"profiling {len(asked)} operations on {ranks} ranks")
    answer = company.phase({"phase": "profile", "ranks": ranks, "asked": [asdict(one) for one in asked]})
    found = [Measured(one, np.asarray(each)) for one, each in zip(asked, answer["samples"], strict=True)]
    return found, answer["core_share"], float(answer["alone_s"])


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
        f"on {record['hardware'].get('gpu', record['hardware']['cpu'])}, {record['hardware']['cpus']} CPUs"
        + _nodes(record)
        + "; "
        + _shares(record["core_share"])
        + "other processes kept "
        + ", ".join("?" if cores is None else f"{cores:.2f}" for cores in record["others_cores"].values())
        + " cores busy while steps were timed",
        "host's time of a layer: "
        + ", ".join(f"{1e3 * one['layer_s']:.2f} ms (of {ranks})" for ranks, one in record["host"].items())
        + "; a rank held up to "
        + ", ".join(f"{human_bytes(most)} (of {ranks})" for ranks, most in record["peak_bytes"].items()),
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


def _nodes(record: dict[str, Any]) -> str:
    """Nodes of several, in words."""
    several = [f"{ranks} ranks on {nodes} nodes" for ranks, nodes in record["nodes"].items() if nodes > 1]
    return ", " + ", ".join(several) + (" (pretended)" if record[PRETENDED] else "") if several else ""


def _shares(core_share: dict[str, float | None]) -> str:
    """What ranks had of their cores; nothing where devices computed."""
    told = [f"{share:.0%} (of {ranks})" for ranks, share in core_share.items() if share is not None]
    return f"of a core each rank had {', '.join(told)} while operations were profiled; " if told else ""


def _told(value: float | None) -> str:
    return "not told" if value is None else f"{value:.3f}"


def _milli(value: float | Sequence[float]) -> str:
    """Milliseconds; of several stages the largest."""
    return f"{1e3 * (value if isinstance(value, float) else max(value)):.3g}"
