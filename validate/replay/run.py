"""`validate replay`: one GPU or CPU plays every rank of a layer in turn; what ranks compute is foretold and measured.

The order of events is that of `validate hardware`: profile, predictions written and synced, outputs checked, measured.
What travels between the ranks is not run, and no figure here holds it.
"""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import CheckFailed
from moesim.files import write_json
from validate.compare import mape, order_beyond, rank_correlation, regret, regret_of_any, signed_error, span, split_half
from validate.foretold import code, now, write_predictions
from validate.goals import at_most, pairs_in_order
from validate.hardware.costs import Floats
from validate.hardware.group import Beat, need_torch
from validate.hardware.job import Job
from validate.hardware.process import first_line, out_of_memory
from validate.hardware.record import hardware, versions
from validate.hardware.rig import Copies, device_of, generator
from validate.hardware.tables import pace_line
from validate.replay import profile as replay_profile
from validate.replay import ranks as replay_ranks
from validate.replay.profile import LOCAL, layer_s
from validate.replay.ranks import Say

PREDICTIONS_FILE, RECORD_FILE = "predictions.json", "record.json"
COMMUNICATION = "not run: what ranks exchange is in no figure here, and this validates no plan end to end"
# Runs of repeats whose medians tell how far a layer's time scatters.
BLOCKS = 5
# Goals by device: of a rank's time, mean absolute error; of the layer, what the predicted best loses.
RANK_MAPE = {"cpu": 0.10, "cuda": 0.05}
REGRET = 0.02
# Defaults: eight ranks of eight experts each; two CPU cores take about three minutes.
RANKS, EXPERTS, TOKENS, PLACEMENTS, REPEATS = 8, 64, (8, 32, 128), 10, 15


def run(job: Job, say: Say) -> dict[str, Any]:
    """The whole replay; returns the record, which is in the job's folder beside the predictions.

    job.backend says the device: "gloo" the CPU, one thread; "nccl" the first GPU. Raises CheckFailed when an output is
    wrong, before anything is timed, or memory runs out; MissingPart where there is no such device.
    """
    try:
        return _run(job, say)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise CheckFailed(
            f"out of memory: {first_line(error)}",
            where="validate replay",
            mend="use a smaller layer, fewer experts or fewer tokens",
        ) from None


def _run(job: Job, say: Say) -> dict[str, Any]:
    torch = need_torch()
    out = Path(job.out)
    for name in (PREDICTIONS_FILE, RECORD_FILE):
        (out / name).unlink(missing_ok=True)
    torch.set_num_threads(1)
    device = device_of(job.backend, 0, 0)
    with torch.inference_mode():
        say("making weights and tokens of every rank")
        made: Copies = {}
        stage = replay_ranks.set_up(job, device, Beat(None), made)
        counts, tokens = stage.counts, [count for _, count in job.cases()]
        say("profiling")
        between = replay_ranks.understudies(stage, device, made)
        profile = replay_profile.measure(stage.rigs[0], counts, between)
        foretold = replay_profile.predict(profile, tokens, counts, job.ranks)
        cases = [
            {
                "placement": placement.name,
                "tokens_per_rank": count,
                "layer_s": float(layer_s(foretold[index])),
                "rank_s": foretold[index].sum(axis=-1).tolist(),
                "operation_s": dict(zip(LOCAL, foretold[index].T.tolist(), strict=True)),
                "rows_by_rank": counts[index].sum(axis=0).reshape(job.ranks, -1).sum(axis=1).tolist(),
            }
            for index, (placement, count) in enumerate(job.cases())
        ]
        predictions = write_predictions(out / PREDICTIONS_FILE, {"cases": cases, "points": profile.points})
        error = replay_ranks.check(stage, say)
        started = now()
        spent, share, pace_s = replay_ranks.measure(stage, say)
    record = {
        "schema_version": 1,
        "kind": "validate-replay",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "code": code(),
        "hardware": hardware(device),
        "versions": versions(),
        "job": job.model_dump(mode="json", exclude={"out", "backend"}),
        "device": device.type,
        "dtype": stage.rigs[0].dtype,
        "communication": COMMUNICATION,
        "core_share": {"profile": profile.core_share, "measured": share},
        "pace_s": {"profile": profile.pace_s, "measured": pace_s},
        "predictions": predictions,
        "measured_from": started,
        "output_error": error,
        "predicted": cases,
        "measured": _measured(job, spent),
        "comparison": compare(job, foretold, spent, device.type),
    }
    write_json(out / RECORD_FILE, record, indent=1)
    return record


def _measured(job: Job, spent: Floats) -> list[dict[str, Any]]:
    """Of each case the layer of the ranks' medians, and each rank's operations: median, p10 and p90."""
    low, middle, high = np.quantile(spent, (0.1, 0.5, 0.9), axis=2)  # [cases, ranks, operations]
    spread = _spread(spent)
    return [
        {
            "placement": placement.name,
            "tokens_per_rank": tokens,
            "layer_s": float(layer_s(middle[index])),
            "spread_s": float(spread[index]),
            "rank_s": np.median(spent[index].sum(axis=-1), axis=1).tolist(),
            "operation_s": {
                name: [
                    {"median_s": float(middle[index, rank, column]), "p10_s": float(low[index, rank, column]),
                     "p90_s": float(high[index, rank, column])}
                    for rank in range(job.ranks)
                ]
                for column, name in enumerate(LOCAL)
            },
        }
        for index, (placement, tokens) in enumerate(job.cases())
    ]  # fmt: skip


def _layers(spent: Floats, blocks: int) -> Floats:
    """The layer of the ranks' medians in runs of repeats that follow each other: [cases, blocks]."""
    parts = np.array_split(np.arange(spent.shape[2]), min(blocks, spent.shape[2]))
    return np.stack([layer_s(np.median(spent[:, :, part], axis=2)) for part in parts], axis=1)


def _spread(spent: Floats) -> Floats:
    """How far the layer scatters between runs of repeats, p90 - p10: [cases]."""
    low, high = np.quantile(_layers(spent, BLOCKS), (0.1, 0.9), axis=1)
    return np.asarray(high - low)


def compare(job: Job, foretold: Floats, spent: Floats, device: str) -> dict[str, Any]:
    """Errors by rank and layer, pair order, regret, and what is held against which goal.

    foretold: [cases, ranks, operations]; spent: [cases, ranks, repeats, operations].
    """
    groups = [tokens for _, tokens in job.cases()]
    middle = np.median(spent, axis=2)
    rank_predicted, rank_measured = foretold.sum(axis=-1).ravel(), np.median(spent.sum(axis=-1), axis=2).ravel()
    predicted, measured = layer_s(foretold), layer_s(middle)
    order = order_beyond(predicted, measured, _spread(spent), groups)
    lost = regret(predicted, measured, groups)
    halves = split_half(spent.sum(axis=-1).reshape(-1, spent.shape[2]), generator(job, 5))
    by_tokens = {str(tokens): _correlation(predicted, measured, np.asarray(groups) == tokens) for tokens in job.tokens}
    error = mape(rank_predicted, rank_measured)
    return {
        "rank": {
            "mape": error,
            "mean_signed_error": float(signed_error(rank_predicted, rank_measured).mean()),
            "by_operation": {
                name: mape(foretold[..., column], middle[..., column]) for column, name in enumerate(LOCAL)
            },
        },
        "layer": {"mape": mape(predicted, measured), "signed_error": signed_error(predicted, measured).tolist()},
        "split_half": asdict(halves),
        "span": {str(group): value for group, value in span(measured, groups).items()},
        "rank_correlation": by_tokens,
        "beyond_twice_the_spread": {**asdict(order), "undecided": order.undecided},
        "regret": {str(group): value for group, value in lost.items()},
        "regret_of_any": {str(group): value for group, value in regret_of_any(measured, groups).items()},
        "goals": [
            at_most("rank time, mean absolute error", error, RANK_MAPE[device]),
            pairs_in_order(order.agreed, order.decided),
            at_most("regret of the predicted best", max(lost.values()), REGRET),
        ],
    }


def _correlation(predicted: Floats, measured: Floats, mine: NDArray[np.bool_]) -> float | None:
    """Rank correlation of the cases chosen; None where they do not differ (one placement, one rank)."""
    apart = np.ptp(predicted[mine]) > 0 and np.ptp(measured[mine]) > 0
    return rank_correlation(predicted[mine], measured[mine]) if apart else None


def table(record: dict[str, Any]) -> str:
    """The record for a person: the layer of each case, its slowest rank's rows, errors, order, regret, goals."""
    job, compared = record["job"], record["comparison"]
    shape = job["shape"]
    lines = [
        f"{job['ranks']} ranks played in turn on one {record['device']}, {record['dtype']}: hidden {shape['hidden']}, "
        f"intermediate {shape['intermediate']}, {shape['experts']} experts, top-{shape['top_k']}; {job['repeats']} "
        f"repeats; routing: {job['profile_source']}",
        f"on {record['hardware'].get('gpu', record['hardware']['cpu'])}; communication {record['communication']}",
        f"predictions written {record['predictions']['written']}, measured from {record['measured_from']}; outputs "
        f"within {record['output_error']:.1g} of the float32 reference",
        "",
        f"{'placement':<22}{'tokens':>7}{'most rows':>11}{'predicted':>12}{'measured':>11}{'spread':>9}{'error':>8} ms",
    ]
    for foretold, found in zip(record["predicted"], record["measured"], strict=True):
        lines.append(
            f"{found['placement']:<22}{found['tokens_per_rank']:>7}{max(foretold['rows_by_rank']):>11}"
            f"{1e3 * foretold['layer_s']:>12.2f}{1e3 * found['layer_s']:>11.2f}{1e3 * found['spread_s']:>9.2f}"
            f"{foretold['layer_s'] / found['layer_s'] - 1:>+8.1%}"
        )
    parts = ", ".join(f"{name} {value:.1%}" for name, value in compared["rank"]["by_operation"].items())
    half = compared["split_half"]
    lines += [
        "",
        f"rank time: mean absolute error {compared['rank']['mape']:.1%}, signed "
        f"{compared['rank']['mean_signed_error']:+.1%}; by operation: {parts}",
        f"halves of the repeats differ by {half['gap']:.1%}, reliability "
        + ("not told" if half["reliability"] is None else f"{half['reliability']:.3f}"),
        *(
            f"at {tokens} tokens: slowest over quickest {compared['span'][tokens]:.2f}, rank correlation "
            f"{'not told' if value is None else f'{value:.3f}'}, "
            f"regret {compared['regret'][tokens]:.1%} (of any placement {compared['regret_of_any'][tokens]:.1%})"
            for tokens, value in compared["rank_correlation"].items()
        ),
        pace_line(record["pace_s"]),
        *(
            f"{goal['goal']}: {goal['told']} ({goal['limit']}){'' if goal['holds'] else ', missed'}"
            for goal in compared["goals"]
        ),
    ]
    return "\n".join(lines)
