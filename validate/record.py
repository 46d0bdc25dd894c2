"""The record of a run: when, on what, what was predicted and measured, how they compare; and its printed table."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.units import MICRO, MILLI, human_bytes
from validate.compare import mape, pair_ordering, regret, signed_error, split_half
from validate.group import need_torch
from validate.job import Job
from validate.layer import COLLECTIVES, OPERATIONS
from validate.sampling import intervals

Floats = NDArray[np.float64]

# Below this share of its cores the table says that other work disturbed the run: a rank computes without pausing.
QUIET_SHARE = 0.95


def hardware(device: Any) -> dict[str, Any]:
    """What the run ran on; of the machine nothing that names its owner."""
    torch = need_torch()
    found: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "threads_per_rank": torch.get_num_threads(),
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["gpus"] = torch.cuda.device_count()
    return found


def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    torch = need_torch()
    found = {"python": platform.python_version(), "moesim": version("moesim"), "numpy": np.__version__}
    found["torch"] = str(torch.__version__)
    if torch.version.cuda is not None:
        found["cuda"] = str(torch.version.cuda)
    return found


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def layer_samples(moments: Floats) -> Floats:
    """Seconds of the whole layer: [cases, repeats] of [ranks, cases, repeats, operations + 1].

    Up to the first exchange the ranks do not touch each other, so that part is the longest of any rank, from its own
    start (on a busy machine the common start is missed by some milliseconds); the rest runs from the moment at which
    the last rank comes to the exchange to the last end of any rank.
    """
    meeting = moments[..., OPERATIONS.index(COLLECTIVES[0])]
    alone = (meeting - moments[..., 0]).max(axis=0)
    return np.asarray(alone + moments[..., -1].max(axis=0) - meeting.max(axis=0))


def _spread(samples: Floats) -> dict[str, float]:
    low, middle, high = np.quantile(samples, [0.1, 0.5, 0.9]).tolist()
    return {"median_s": middle, "p10_s": low, "p90_s": high}


def measured_json(job: Job, moments: Floats) -> list[dict[str, Any]]:
    """One entry for each case: the layer, and each operation and the waiting of each rank, with their spread.

    moments: [ranks, cases, repeats, operations + 1].
    """
    layer = layer_samples(moments)
    spent, waited = intervals(moments, [name in COLLECTIVES for name in OPERATIONS])
    entries = []
    for index, (placement, tokens) in enumerate(job.cases()):
        entries.append(
            {
                "placement": placement.name,
                "tokens_per_rank": tokens,
                "layer_s": _spread(layer[index]),
                "layer_samples_s": layer[index].tolist(),
                "operation_s": {
                    name: [_spread(spent[rank, index, :, column]) for rank in range(job.ranks)]
                    for column, name in enumerate(OPERATIONS)
                },
                "wait_s": [_spread(waited[rank, index].sum(axis=-1)) for rank in range(job.ranks)],
            }
        )
    return entries


def slowest(entry: dict[str, Any], name: str) -> dict[str, float]:
    """Spread of an operation on the rank whose median is the largest."""
    ranks: list[dict[str, float]] = entry["operation_s"][name]
    return max(ranks, key=lambda spread: spread["median_s"])


def comparison_json(
    job: Job, predicted: list[dict[str, Any]], measured: list[dict[str, Any]], rng: np.random.Generator
) -> dict[str, Any]:
    """Errors of layer and operations, the measurement's own reliability, pair order and regret."""
    samples = np.asarray([entry["layer_samples_s"] for entry in measured])
    layer_predicted = np.asarray([entry["layer_s"] for entry in predicted])
    layer_measured = np.median(samples, axis=1)
    groups = [tokens for _, tokens in job.cases()]
    errors = signed_error(layer_predicted, layer_measured)
    operations: dict[str, Any] = {}
    for name in OPERATIONS:
        foretold = np.asarray([max(entry["operation_s"][name]) for entry in predicted])
        found = np.asarray([slowest(entry, name)["median_s"] for entry in measured])
        operations[name] = {
            "signed_error": signed_error(foretold, found).tolist(),
            "mape": mape(foretold, found),
            "predicted_sum_s": float(foretold.sum()),
            "measured_sum_s": float(found.sum()),
        }
    order = pair_ordering(layer_predicted, samples, groups)
    return {
        "layer": {
            "signed_error": errors.tolist(),
            "mape": mape(layer_predicted, layer_measured),
            "mean_signed_error": float(errors.mean()),
            "largest_error": float(errors[np.abs(errors).argmax()]),
        },
        "operations": operations,
        "split_half": asdict(split_half(samples, rng)),
        "pair_order": {**asdict(order), "undecided": order.undecided},
        "regret": {str(group): value for group, value in regret(layer_predicted, layer_measured, groups).items()},
    }


def record_json(
    job: Job,
    *,
    device: Any,
    dtype: str,
    clock: str,
    core_share: dict[str, float | None],
    prediction_file: dict[str, str],
    predicted: list[dict[str, Any]],
    measured_from: str,
    measured: list[dict[str, Any]],
    output_error: float,
    comparison: dict[str, Any],
) -> dict[str, Any]:
    """The whole record, ready to be written."""
    return {
        "schema_version": 1,
        "kind": "validate-hardware",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware(device),
        "versions": versions(),
        "job": job.model_dump(mode="json", exclude={"out"}),
        "dtype": dtype,
        "clock": clock,
        "core_share": core_share,
        "predictions": prediction_file,
        "measured_from": measured_from,
        "output_error": output_error,
        "predicted": predicted,
        "measured": measured,
        "comparison": comparison,
    }


def table(record: dict[str, Any]) -> str:
    """The record for a person: a block for each token count, predicted / measured, [p10 to p90], signed error."""
    job = record["job"]
    shape = job["shape"]
    lines = [
        f"{job['backend']}, {job['ranks']} ranks, {record['dtype']}: hidden {shape['hidden']}, intermediate "
        f"{shape['intermediate']}, {shape['experts']} experts, top-{shape['top_k']}; {job['repeats']} repeats",
        f"on {record['hardware'].get('gpu', record['hardware']['cpu'])} ({record['hardware']['cpus']} CPUs, "
        f"{human_bytes(record['hardware']['memory_bytes'])}); routing: {job['profile_source']}",
        f"predictions written {record['predictions']['written']}, measured from {record['measured_from']}; "
        f"outputs within {record['output_error']:.1g} of the float32 reference",
        "predicted / measured median [p10 to p90], error; tokens of one rank; operations on their slowest rank",
    ]
    for tokens in job["tokens"]:
        pairs = [
            (predicted, measured)
            for predicted, measured in zip(record["predicted"], record["measured"], strict=True)
            if predicted["tokens_per_rank"] == tokens
        ]
        lines += ["", _row(f"{tokens} tokens", [predicted["placement"] for predicted, _ in pairs])]
        for name in OPERATIONS:
            cells = [_cell(max(p["operation_s"][name]), slowest(m, name)) for p, m in pairs]
            lines.append(_row(f"  {name}", cells))
        lines.append(_row("  layer", [_cell(p["layer_s"], m["layer_s"]) for p, m in pairs]))
    return "\n".join([*lines, "", *_summary(record["comparison"]), *_machine(record["core_share"])])


def _machine(core_share: dict[str, float | None]) -> list[str]:
    profiled, measured = core_share["profile"], core_share["measured"]
    if profiled is None or measured is None:
        return []
    disturbed = "; other work disturbed the run" if min(profiled, measured) < QUIET_SHARE else ""
    return [
        f"the machine: computing ranks had {profiled:.0%} of their cores while profiled, {measured:.0%} while measured"
        + disturbed
    ]


def _row(name: str, cells: list[str]) -> str:
    return (f"{name:<12}" + "".join(f"{cell:<38}" for cell in cells)).rstrip()


def _cell(predicted_s: float, spread: dict[str, float]) -> str:
    """In ms or µs, whichever suits the measured median: `1.23 / 1.31 ms [1.2 to 1.6] -6%`."""
    scale, unit = (MILLI, "ms") if spread["median_s"] >= MILLI else (MICRO, "µs")

    def figure(value_s: float) -> str:
        value = value_s / scale
        return f"{value:.0f}" if value >= 100 else f"{value:.3g}"

    error = predicted_s / spread["median_s"] - 1.0
    low, high = figure(spread["p10_s"]), figure(spread["p90_s"])
    return f"{figure(predicted_s)} / {figure(spread['median_s'])} {unit} [{low} to {high}] {error:+.0%}"


def _summary(comparison: dict[str, Any]) -> list[str]:
    layer, half, order = comparison["layer"], comparison["split_half"], comparison["pair_order"]
    by_operation = ", ".join(f"{name} {entry['mape']:.0%}" for name, entry in comparison["operations"].items())
    reliability = "-" if half["reliability"] is None else f"{half['reliability']:.3f}"
    regrets = ", ".join(f"{value:.1%} at {tokens}" for tokens, value in comparison["regret"].items())
    return [
        f"layer error: mean {layer['mean_signed_error']:+.1%}, absolute {layer['mape']:.1%}, "
        f"largest {layer['largest_error']:+.1%}",
        f"absolute error by operation: {by_operation}",
        f"the measurement itself: halves of the repeats differ by {half['gap']:.1%}, reliability {reliability}",
        f"order of placements: {order['agreed']} of {order['decided']} decided pairs foretold "
        f"({order['undecided']} undecided); regret of the predicted best: {regrets} tokens",
    ]
