"""Predicted times of the layer: the profile of the spot, the plan's row counts, and moesim's own task graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.cost.estimate import Tag
from moesim.graph.task import Stream, Task, TaskGraph
from profiles.traffic import traffic
from validate.hardware.costs import in_company
from validate.hardware.job import Job
from validate.hardware.layer import COLLECTIVES, OPERATIONS
from validate.hardware.probe import Profile
from validate.hardware.scatter import Lots

Floats = NDArray[np.float64]

# Runs drawn of each case: the median of 1,000 scatters by 1.25 / sqrt(1000) = 4 % of the runs' own scatter.
DRAWS = 1000


@dataclass(frozen=True)
class Prediction:
    """Predicted times of all cases.

    layer_s: [cases, 3], p10, median and p90 of the layer. of_medians_s: [cases], the layer whose operations all take
    their medians. operation_s: [cases, ranks, operations], the median of each rank's operations; spread_s: [cases,
    ranks, operations, 2], their p10 and p90. wait_s: [cases, ranks], median of what a rank waits for slower ones.
    tags: int8 [cases, operations], the worst tag over the ranks.
    """

    layer_s: Floats
    of_medians_s: Floats
    operation_s: Floats
    spread_s: Floats
    wait_s: Floats
    tags: NDArray[np.int8]


def predict(
    job: Job, profile: Profile, counts: list[NDArray[np.int64]], bytes_per_row: int, rng: np.random.Generator
) -> Prediction:
    """Price each case, draw its runs from the profile's scatter, and put them through the max-plus executor.

    counts: for each case, rows from each source rank to each slot, int64 [ranks, slots]. An exchange takes the time of
    an even one that loads every rank as this one loads its busiest, plus the copy of what stays on the rank. Experts go
    on quicker once other ranks are done with theirs, by what the profile says. All cases are drawn by the same lots.
    """
    cases = job.cases()
    seconds = np.zeros((len(cases), job.ranks, len(OPERATIONS)))
    runs = np.zeros((len(cases), DRAWS, job.ranks, len(OPERATIONS)))
    tags = np.zeros((len(cases), len(OPERATIONS)), dtype=np.int8)
    lots = {name: Lots.drawn(DRAWS, rng) for name in OPERATIONS}
    for index, ((_, tokens), table) in enumerate(zip(cases, counts, strict=True)):
        size = np.full(job.ranks, float(tokens))
        rows = traffic(table)
        busiest = np.full(job.ranks, rows.busiest(profile.both_ways) * bytes_per_row)
        stay_s, stay_tag = profile.keep.at(rows.kept.astype(np.float64) * bytes_per_row)
        arriving = table.sum(axis=0).reshape(job.ranks, -1).astype(np.float64)
        out_s, out_tag = profile.dispatch.at(busiest)
        back_s, back_tag = profile.combine.at(busiest)
        work_s, work_tag = profile.experts.at(arriving)
        priced = {
            "gate": (*profile.gate.at(size), size),
            "permute": (*profile.permute.at(size), size),
            "dispatch": (out_s + stay_s, np.maximum(out_tag, stay_tag), busiest),
            "experts": (work_s, work_tag, work_s),
            "combine": (back_s + stay_s, np.maximum(back_tag, stay_tag), busiest),
            "unpermute": (*profile.unpermute.at(size), size),
        }
        for column, name in enumerate(OPERATIONS):
            median_s, tag, where = priced[name]
            drawn = profile.scatter[name].draw(where, median_s, lots[name])
            if name == "experts":
                median_s, drawn = in_company(median_s, profile.alone), in_company(drawn, profile.alone)
            seconds[index, :, column] = median_s
            runs[index, ..., column] = drawn
            tags[index, column] = np.max(tag)
    return execute(seconds, runs, tags)


def execute(seconds: Floats, runs: Floats, tags: NDArray[np.int8]) -> Prediction:
    """Run the layer's task graph, one step for each draw: seconds [cases, ranks, operations], the medians; runs [cases,
    draws, ranks, operations].
    """
    from moesim.engine import maxplus

    cases, draws, ranks, operations = runs.shape
    times = maxplus.run(layer_graph(runs.reshape(cases * draws, ranks, operations)))
    return Prediction(
        layer_s=np.quantile(times.step_s.reshape(cases, draws), (0.1, 0.5, 0.9), axis=1).T,
        of_medians_s=maxplus.run(layer_graph(seconds)).step_s,
        operation_s=np.median(runs, axis=1),
        spread_s=np.moveaxis(np.quantile(runs, (0.1, 0.9), axis=1), 0, -1),
        wait_s=np.median(times.wait_s.reshape(cases, draws, ranks), axis=1),
        tags=tags,
    )


def layer_graph(seconds: Floats) -> TaskGraph:
    """The layer as a chain of six tasks, two of them collectives of all ranks: seconds [cases, ranks, operations]."""
    cases, ranks, _ = seconds.shape
    everyone = np.zeros(ranks, dtype=np.int64)
    tasks = tuple(
        Task(
            name=name,
            operation=name,
            stream=Stream.COMMUNICATION if name in COLLECTIVES else Stream.COMPUTE,
            duration_s=seconds[:, :, index],
            depends_on=(index - 1,) if index else (),
            groups=everyone if name in COLLECTIVES else None,
            layer=0,
        )
        for index, name in enumerate(OPERATIONS)
    )
    return TaskGraph(steps=cases, ranks=ranks, tasks=tasks)


def prediction_json(job: Job, prediction: Prediction, counts: list[NDArray[np.int64]]) -> list[dict[str, Any]]:
    """One entry for each case: what is predicted, from which rows."""
    return [
        {
            "placement": placement.name,
            "tokens_per_rank": tokens,
            "layer_s": float(prediction.layer_s[index, 1]),
            "layer_p10_s": float(prediction.layer_s[index, 0]),
            "layer_p90_s": float(prediction.layer_s[index, 2]),
            "layer_of_medians_s": float(prediction.of_medians_s[index]),
            "operation_s": dict(zip(OPERATIONS, prediction.operation_s[index].T.tolist(), strict=True)),
            "operation_p10_p90_s": {
                name: prediction.spread_s[index, :, column].tolist() for column, name in enumerate(OPERATIONS)
            },
            "wait_s": prediction.wait_s[index].tolist(),
            "tags": {name: Tag(int(tag)).label for name, tag in zip(OPERATIONS, prediction.tags[index], strict=True)},
            "rows_by_rank": counts[index].sum(axis=0).reshape(job.ranks, -1).sum(axis=1).tolist(),
        }
        for index, (placement, tokens) in enumerate(job.cases())
    ]


def predictions_json(cases: list[dict[str, Any]], profile: Profile) -> dict[str, Any]:
    """What predictions.json holds: the cases, and the profile that they come from."""
    return {
        "cases": cases,
        "profile": {
            "both_ways": profile.both_ways,
            "alone": profile.alone,
            "core_share": profile.core_share,
            "pace_s": profile.pace_s,
            "points": profile.points,
        },
    }
