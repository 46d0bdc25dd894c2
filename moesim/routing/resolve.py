"""From the scenario's `routing` to expert counts that fit its model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from moesim.errors import BadInput
from moesim.routing.holdout import refuse_repeats
from moesim.routing.readers import read_loads
from moesim.routing.synth import generate
from moesim.routing.trace import RoutingCounts
from moesim.routing.traces import read_trace
from moesim.spec.model import ModelSpec
from moesim.spec.scenario import RoutingSpec


def resolve_routing(
    routing: RoutingSpec, model: ModelSpec, rng: np.random.Generator, *, tokens: bool = False
) -> tuple[RoutingCounts, ...]:
    """Load the files, read the trace, or draw the synthetic loads; rows are the model's MoE layers, in order.

    tokens: as `read_loads` takes it. Raises BadInput that names the file and what the model has.
    """
    moe = model.moe
    if routing.synthetic is not None:
        seed = routing.synthetic.seed
        return generate(
            routing.synthetic,
            layer_ids=moe.layer_ids,
            absolute_layers=model.layers,
            experts=moe.experts,
            top_k=moe.top_k,
            groups=moe.groups,
            rng=rng if seed is None else np.random.default_rng(seed),
        )
    if routing.trace is not None:
        return (
            fit_to_model(read_trace(routing.trace, experts=moe.experts, tokens=tokens), model, where=routing.trace),
        )
    assert routing.loads is not None
    found = tuple(
        replace(
            fit_to_model(
                read_loads(load.file, phase=load.phase, weight=load.weight, experts=moe.experts, tokens=tokens),
                model,
                where=load.file,
            ),
            prompt_tokens=load.prompt_tokens,
        )
        for load in routing.loads
    )
    refuse_repeats(found, where="routing.loads")
    return found


def fit_to_model(loads: RoutingCounts, model: ModelSpec, *, where: Path | str) -> RoutingCounts:
    """Check that the counts are of this model; MoE-relative rows (0, 1, 2 …) get their absolute layers.

    Multi-token-prediction layers, which TensorRT-LLM numbers after the model's own and counts too, are left out.
    Raises BadInput on other experts, layers that the model does not route in, layers without counts, or a share that
    the model's top-k cannot give.
    """
    moe = model.moe
    place = str(where)
    if loads.experts != moe.experts:
        raise BadInput(
            f"the counts are of {loads.experts} experts, {model.id} has {moe.experts}",
            where=place,
            mend="give counts of this model",
        )
    wanted = np.asarray(moe.layer_ids, dtype=np.int64)
    loads = _without(loads, range(model.layers, model.layers + model.mtp_layers))
    given = loads.layer_ids
    relative = np.array_equal(given, np.arange(len(wanted))) and loads.absolute_layers == len(wanted)
    if not np.array_equal(given, wanted) and not relative:
        strange = sorted(set(given.tolist()) - set(wanted.tolist()))
        lacking = sorted(set(wanted.tolist()) - set(given.tolist()))
        fault = (
            f"layer {strange[0]} has counts, but is no MoE layer of {model.id}"
            if strange
            else f"MoE layer {lacking[0]} of {model.id} has no counts"
        )
        raise BadInput(
            fault, where=place, mend=f"give its {len(wanted)} MoE layers, {int(wanted[0])} to {int(wanted[-1])}"
        )
    highest = float(loads.profile().max())
    if highest * moe.top_k > 1.0 + 1e-6:
        raise BadInput(
            f"one expert has {highest:.1%} of its layer's counts; picked at most once a token, top-{moe.top_k} gives "
            f"it at most {1 / moe.top_k:.1%}",
            where=place,
            mend=f"give counts of {model.id}",
        )
    return replace(loads, layer_ids=wanted, absolute_layers=model.layers)


def _without(loads: RoutingCounts, layers: range) -> RoutingCounts:
    """The counts without some absolute layers, where there are others."""
    kept = ~np.isin(loads.layer_ids, layers)
    if kept.all() or not kept.any():
        return loads
    records = loads.records
    return replace(
        loads,
        counts=np.ascontiguousarray(loads.counts[:, kept]),
        layer_ids=loads.layer_ids[kept],
        records=None if records is None else replace(records, counts=records.counts[:, kept]),
    )
