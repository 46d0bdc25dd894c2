"""The record of a run: when, on what, what was predicted and measured, and how they compare."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.spec.base import Spec
from validate.compare import (
    held_out_regret,
    mape,
    median_interval,
    order_beyond,
    pair_ordering,
    regret,
    regret_of_any,
    signed_error,
    span,
    split_half,
    spread_of_medians,
)
from validate.foretold import code
from validate.goals import goals
from validate.hardware.group import need_torch
from validate.hardware.job import Job
from validate.hardware.layer import COLLECTIVES, OPERATIONS
from validate.hardware.sampling import intervals

Floats = NDArray[np.float64]

RECORD_FILE = "record.json"


def finished(job: Spec, out: str) -> dict[str, Any] | None:
    """The record of this very job that an earlier go of its command left in its folder, None where there is none."""
    try:
        record: dict[str, Any] = json.loads((Path(out) / RECORD_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if record.get("job") == job.model_dump(mode="json", exclude={"out"}) else None


def hardware(device: Any) -> dict[str, Any]:
    """What the run ran on; of the machine nothing that names its owner."""
    torch = need_torch()
    found: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "threads_per_rank": torch.get_num_threads(),
        "cores_of_a_rank": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
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
    """Median, p10 and p90 of the repeats [repeats], and between what the median lies (90 %)."""
    low, middle, high = np.quantile(samples, [0.1, 0.5, 0.9]).tolist()
    least, most = median_interval(samples)
    return {"median_s": middle, "p10_s": low, "p90_s": high, "median_low_s": least, "median_high_s": most}


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
                "spread_s": float(spread_of_medians(layer[index : index + 1])[0]),
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
    spread = np.asarray([entry["spread_s"] for entry in measured])
    beyond = order_beyond(layer_predicted, layer_measured, spread, groups)
    inside = [
        foretold["layer_p10_s"] <= value <= foretold["layer_p90_s"]
        for foretold, value in zip(predicted, layer_measured.tolist(), strict=True)
    ]
    compared = {
        "layer": {
            "signed_error": errors.tolist(),
            "mape": mape(layer_predicted, layer_measured),
            "mean_signed_error": float(errors.mean()),
            "largest_error": float(errors[np.abs(errors).argmax()]),
            "of_medians_mape": mape(np.asarray([entry["layer_of_medians_s"] for entry in predicted]), layer_measured),
            "inside_p10_p90": float(np.mean(inside)),
        },
        "operations": operations,
        "split_half": asdict(split_half(samples, rng)),
        "span": {"predicted": _keyed(span(layer_predicted, groups)), "measured": _keyed(span(layer_measured, groups))},
        "beyond_twice_the_spread": {**asdict(beyond), "undecided": beyond.undecided},
        "pair_order": {**asdict(order), "undecided": order.undecided},
        "regret": _keyed(regret(layer_predicted, layer_measured, groups)),
        "regret_held_out": _keyed(held_out_regret(layer_predicted, samples, groups, rng)),
        "regret_of_any": _keyed(regret_of_any(layer_measured, groups)),
    }
    return {**compared, "goals": goals(compared)}


def _keyed(by_group: dict[int, float]) -> dict[str, float]:
    return {str(group): value for group, value in by_group.items()}


def record_json(
    job: Job,
    *,
    device: Any,
    dtype: str,
    hosts: int,
    clock: str,
    core_share: dict[str, float | None],
    pace_s: dict[str, float],
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
        "code": code(),
        "hardware": hardware(device),
        "versions": versions(),
        "job": job.model_dump(mode="json", exclude={"out"}),
        "dtype": dtype,
        "hosts": hosts,
        "clock": clock,
        "core_share": core_share,
        "pace_s": pace_s,
        "predictions": prediction_file,
        "measured_from": measured_from,
        "output_error": output_error,
        "predicted": predicted,
        "measured": measured,
        "comparison": comparison,
    }
