"""Why the steps of a run take as long as they do: representative batches, drawn, traced, and run under what-ifs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moesim.engine import des, maxplus, whatif
from moesim.engine.batch_rules import exchange_mode, stage_count
from moesim.engine.critical import critical_path, waits
from moesim.engine.explain_stages import StepParts, one_after_another
from moesim.engine.explain_transfer import TransferExplained, explain_transfer
from moesim.engine.simulate import Simulation, typical_decode, weighted_mean
from moesim.engine.step_graph import step_graph
from moesim.engine.stepbytes import StepBytes, step_bytes
from moesim.engine.stepmodel import ExactModel
from moesim.errors import OutsideProfile
from moesim.graph.batch import StepBatch, step_batch
from moesim.graph.priced_step import PricedStep
from moesim.graph.pricing import Pricer
from moesim.graph.task import StepTimes, TaskGraph

Floats = NDArray[np.float64]
Kind = Literal["decode", "prefill"]
Execute = Callable[[TaskGraph], StepTimes]

# Steps that are drawn for each batch: `DRAWS` routings of `STEPS_PER_DRAW` steps, each routing from one judged load.
DRAWS, STEPS_PER_DRAW = 4, 2
EXCHANGES = frozenset({"dispatch", "combine"})
# Shares of the time in decode steps at whose batch the light and the heavy step stand.
LIGHT, HEAVY = 0.1, 0.9


@dataclass(frozen=True)
class HotLayer:
    """Where a MoE layer is hottest, over the drawn steps.

    layer: absolute. rank: with the most tokens in the mean, `rank_over_mean` times the mean rank's. slowest_rank: whose
    experts take longest, `slowest_over_mean` times the mean. per_step_max_over_mean: mean over steps of each step's own
    hottest rank. expert: with the most tokens, `expert_over_mean` times the mean, on `replicas` slots.
    """

    layer: int
    rank: int
    rank_over_mean: float
    slowest_rank: int
    slowest_over_mean: float
    per_step_max_over_mean: float
    expert: int
    expert_over_mean: float
    replicas: int


@dataclass(frozen=True)
class ExplainedStep:
    """One representative batch, every time a mean over its drawn steps.

    which: "light", "typical" or "heavy". role: whose step it is, None without roles. share_of_time: of the step time of
    the run, or of the role, in steps of this kind.
    tokens_per_dp_rank, reading_ranks: the batch. critical_path_s: operation -> seconds, sum `step_s`. busy_s: operation
    -> mean over ranks. exposed_s, waited_s: [ranks], time that a rank's compute stream stands still, and the part of it
    before collectives for ranks that come later. waited_for_operation_s: operation -> [ranks]; waited_for_rank_s:
    [ranks], seconds that the mean rank waited for this one; with pipeline stages the ranks of the first come first, and
    what they tell is of the time in which they have the batch. what_if_s: change -> step seconds. free_operation_s:
    operation -> step seconds without it. exchange_evened: whether `balanced` could also price an even exchange.
    stages: pipeline stages that the times are summed over.
    """

    kind: Kind
    which: str
    mode: str
    role: str | None
    share_of_time: float
    tokens_per_dp_rank: float
    reading_ranks: int
    steps: int
    step_s: float
    critical_path_s: dict[str, float]
    busy_s: dict[str, float]
    exposed_s: Floats
    waited_s: Floats
    waited_for_operation_s: dict[str, Floats]
    waited_for_rank_s: Floats
    layers: tuple[HotLayer, ...]
    what_if_s: dict[str, float]
    free_operation_s: dict[str, float]
    exchange_evened: bool
    traffic: StepBytes | None
    stages: int = 1


@dataclass(frozen=True)
class Explanation:
    """The explained steps, decode before prefill, and those without a price: "decode, heavy" -> what is missing.

    With roles: the decode role's before the prefill role's, and what moving KV cache between them cost.
    """

    steps: tuple[ExplainedStep, ...]
    not_priced: dict[str, str]
    transfer: TransferExplained | None = None


def explain(simulation: Simulation) -> Explanation:
    """Explain the run's representative steps, of each role where there are roles."""
    steps: list[ExplainedStep] = []
    not_priced: dict[str, str] = {}
    if simulation.deployment.ground.cluster.background:
        return Explanation((), {"every step": "other jobs are on its links, and no what-if says what they would do"})
    execute = _executor(simulation)
    for role, view in by_role(simulation):
        for kind, which, share, batch in representative_batches(view):
            try:
                steps.append(_explained(view, execute, kind, which, share, batch, role))
            except OutsideProfile as outside:
                not_priced[f"{kind}, {which}" if role is None else f"{role} role: {kind}, {which}"] = outside.line()
    return Explanation(tuple(steps), not_priced, explain_transfer(simulation))


def by_role(simulation: Simulation) -> list[tuple[str | None, Simulation]]:
    """(Role, the simulation as that role's pool alone saw it), decode first; without roles (None, the simulation)."""
    side, deployment = simulation.served.prefill, simulation.deployment
    if side is None:
        return [(None, simulation)]
    assert deployment.prefill is not None and simulation.prefill_model is not None
    views = [
        ("decode", replace(simulation, served=replace(simulation.served, prefill=None))),
        (
            "prefill",
            replace(simulation, deployment=deployment.prefill, model=simulation.prefill_model, served=side.served),
        ),
    ]
    return [(role, view) for role, view in views if view.served.steps > 0]


def _executor(simulation: Simulation) -> Execute:
    if simulation.fidelity == "des":
        return lambda graph: des.run(graph, timeline=True)
    return lambda graph: maxplus.run(graph, timeline=True)


def representative_batches(simulation: Simulation) -> list[tuple[Kind, str, float, StepBatch]]:
    """(Kind, which, share of the run's step time, batch of one step) of the steps that stand for a run."""
    served = simulation.served
    reading = served.step_prefill_tokens > 0
    whole = float(served.step_s.sum())
    found: list[tuple[Kind, str, float, StepBatch]] = []
    if (~reading).any():
        share = float(served.step_s[~reading].sum()) / whole
        middle = typical_decode(simulation)
        ends = _decode_ends(simulation, ~reading)
        per_rank = float(middle.decode_seqs[0, 0])
        lighter = [("light", ends[0])] if ends[0] < per_rank else []
        heavier = [("heavy", ends[1])] if ends[1] > per_rank else []
        for which, seqs in (*lighter, ("typical", per_rank), *heavier):
            found.append(("decode", which, share, _decode_like(simulation, middle, seqs)))
    if reading.any():
        share = float(served.step_s[reading].sum()) / whole
        found.append(("prefill", "typical", share, typical_prefill(simulation)))
    return found


def _decode_ends(simulation: Simulation, chosen: NDArray[np.bool_]) -> tuple[float, float]:
    """Sequences of a rank below which a share LIGHT and a share HEAVY of the decode time is spent."""
    served = simulation.served
    ranks = simulation.deployment.setup.parallel.attention_dp
    order = np.argsort(served.step_decode_seqs[chosen], kind="stable")
    seqs, seconds = served.step_decode_seqs[chosen][order], np.cumsum(served.step_s[chosen][order])
    low, high = (int(seqs[np.searchsorted(seconds, share * seconds[-1])]) for share in (LIGHT, HEAVY))
    each = 1 + simulation.model.drafts  # every token that is verified
    return float(max(1, round(low / ranks)) * each), float(max(1, round(high / ranks)) * each)


def _decode_like(simulation: Simulation, middle: StepBatch, per_rank: float) -> StepBatch:
    return step_batch(
        ranks=middle.decode_seqs.shape[1],
        decode_seqs=per_rank,
        decode_kv=middle.decode_kv,
        padded_tokens=float(simulation.model.graphs.padded(int(per_rank))),
    )


def typical_prefill(simulation: Simulation) -> StepBatch:
    """The step with prompts in it that the run spent its time in: tokens weighted by step time, on as few ranks as
    whole prompts (or chunks) fill; the other ranks decode, or all do where the engine mixes."""
    served, limits = simulation.served, simulation.model.limits
    ranks = simulation.deployment.setup.parallel.attention_dp
    reading = served.step_prefill_tokens > 0
    seconds = served.step_s[reading]
    tokens = weighted_mean(served.step_prefill_tokens[reading], seconds)
    decoding = weighted_mean(served.step_decode_seqs[reading], seconds)
    chunk = min(float(simulation.load.isl.mean()), float(limits.max_tokens))
    readers = min(ranks, max(1, round(tokens / chunk)))
    per_reader = tokens / readers
    prompts = max(1, round(per_reader / chunk))
    reads = np.arange(ranks) < readers
    decoders = np.ones(ranks, dtype=bool) if limits.mixes else ~reads
    context = float(simulation.load.isl.mean() + simulation.load.osl.mean() / 2)
    return step_batch(
        ranks=ranks,
        decode_seqs=np.where(decoders, decoding / max(int(decoders.sum()), 1), 0.0)[None, :],
        decode_kv=context,
        prefill_seqs=np.where(reads, float(prompts), 0.0)[None, :],
        prefill_new=np.where(reads, per_reader / prompts, 0.0)[None, :],
    )


@dataclass(frozen=True)
class _Drawn:
    """Steps of one routing: the graph, what it was built from, and how it ran."""

    graph: TaskGraph
    priced: list[PricedStep]
    routed: list[tuple[StepBatch, Floats]]
    times: StepTimes
    stage: int = 0


def _explained(
    simulation: Simulation,
    execute: Execute,
    kind: Kind,
    which: str,
    share: float,
    batch: StepBatch,
    role: str | None = None,
) -> ExplainedStep:
    exact = ExactModel(simulation.model, "maxplus")
    several = StepBatch(*(np.repeat(axis, STEPS_PER_DRAW, axis=0) for axis in vars(batch).values()))
    setup, pricer = simulation.deployment.setup, simulation.model.pricer
    by_stage: list[list[_Drawn]] = [[] for _ in range(stage_count(setup))]
    sent_s = 0.0
    for _ in range(DRAWS):
        priced = exact.price(several, kind)
        for stage, (graph, chosen) in enumerate(exact.stage_graphs(priced)):
            by_stage[stage].append(_Drawn(graph, chosen, list(exact.routed), execute(graph), stage))
        sent_s += float(sum(one.mean() for one in exact.transfers(priced))) / DRAWS
    mode = exchange_mode(simulation.deployment, kind)
    parts = [_parts(pricer, drawn, execute) for drawn in by_stage]
    times = parts[0] if len(parts) == 1 else one_after_another(parts, sent_s)
    return ExplainedStep(
        kind=kind,
        which=which,
        mode=mode,
        role=role,
        share_of_time=share,
        tokens_per_dp_rank=float(batch.tokens.mean()),
        reading_ranks=int((batch.prefill_seqs > 0).sum()),
        steps=DRAWS * STEPS_PER_DRAW,
        layers=_hot_layers(simulation, by_stage),
        traffic=_traffic(pricer, by_stage[0], mode),
        stages=len(parts),
        **vars(times),
    )


def _parts(pricer: Pricer, drawn: Sequence[_Drawn], execute: Execute) -> StepParts:
    evened = [_even_exchange(pricer, one) for one in drawn]
    found = [waits(one.graph, one.times) for one in drawn]
    names = list(dict.fromkeys(name for one in drawn for name in one.times.busy_s))
    ranks = drawn[0].graph.ranks
    return StepParts(
        step_s=_mean([one.times.step_s for one in drawn]),
        critical_path_s=_paths(drawn),
        busy_s={name: _mean([one.times.busy_s[name] for one in drawn]) for name in names},
        exposed_s=_by_rank([one.times.exposed_communication_s() for one in drawn]),
        waited_s=_by_rank([one.times.wait_s for one in drawn]),
        waited_for_operation_s={
            name: _by_rank([one.for_operation_s.get(name, np.zeros((STEPS_PER_DRAW, ranks))) for one in found])
            for name in dict.fromkeys(name for one in found for name in one.for_operation_s)
        },
        waited_for_rank_s=_by_rank([one.for_rank_s for one in found]) / ranks,
        what_if_s=_what_ifs(drawn, evened, execute),
        free_operation_s={
            name: _mean([execute(whatif.without_operation(one.graph, name)).step_s for one in drawn]) for name in names
        },
        exchange_evened=all(graph is not None for graph in evened),
    )


def _what_ifs(drawn: Sequence[_Drawn], evened: Sequence[TaskGraph | None], execute: Execute) -> dict[str, float]:
    changes: dict[str, Callable[[TaskGraph], TaskGraph]] = {
        "infinite_network": whatif.infinite_network,
        "perfect_overlap": whatif.overlapped,
        "no_host_overhead": whatif.no_host_overhead,
    }
    even = [
        whatif.balanced(one.graph if other is None else whatif.at_most(one.graph, other, EXCHANGES))
        for one, other in zip(drawn, evened, strict=True)
    ]
    return {
        "perfect_balance": _mean([execute(graph).step_s for graph in even]),
        **{name: _mean([execute(change(one.graph)).step_s for one in drawn]) for name, change in changes.items()},
    }


def _even_exchange(pricer: Pricer, drawn: _Drawn) -> TaskGraph | None:
    """The steps' graph with exchanges as if every slot got the same tokens, and every rank sent the same.

    The placement stays, and with it which nodes hold which expert. None where such an exchange has no price.
    """
    setup = pricer.setup
    dispatch = setup.policies.dispatch.model_copy(update={"replica": "equal"})
    policies = setup.policies.model_copy(update={"dispatch": dispatch})
    even = Pricer(replace(setup, policies=policies), pricer.costs)
    replicas = setup.placement.replica_counts().astype(np.float64)
    priced = []
    try:
        for one, (_, counts) in zip(drawn.priced, drawn.routed, strict=True):
            batch = one.batch
            picks = counts.sum(axis=-1, keepdims=True) * replicas / setup.placement.slots
            mean = batch.tokens.mean(axis=1, keepdims=True)
            rows = batch.padded_tokens.mean(axis=1, keepdims=True)
            level = step_batch(ranks=batch.tokens.shape[1], decode_seqs=mean, decode_kv=1.0, padded_tokens=rows)
            part = level if one.chunks == 1 else level.chunk(one.chunks)
            graphed = not one.eager.estimates
            found = even.price(part, picks / one.chunks, mode=one.mode, graphed=graphed, attention=False)
            priced.append(replace(one, dispatch=found.dispatch, combine=found.combine))
    except OutsideProfile:
        return None
    return step_graph(setup, priced, stage=drawn.stage)


def _paths(drawn: Sequence[_Drawn]) -> dict[str, float]:
    found: dict[str, float] = {}
    for one in drawn:
        for step in range(STEPS_PER_DRAW):
            for name, seconds in critical_path(one.graph, one.times, step=step).by_operation_s(one.graph).items():
                found[name] = found.get(name, 0.0) + seconds / (DRAWS * STEPS_PER_DRAW)
    return found


def _hot_layers(simulation: Simulation, by_stage: Sequence[Sequence[_Drawn]]) -> tuple[HotLayer, ...]:
    placement, drawn = simulation.deployment.setup.placement, by_stage[0]  # every stage has the same routing
    counts, loads = _counts(drawn), _rank_loads(simulation.model.pricer, drawn)
    replicas = placement.replica_counts()
    every = [one for stage in by_stage for one in stage]
    taken = np.sum([_expert_seconds(one, placement.layer_ids) for one in every], axis=0) / len(drawn)  # [layers, ranks]
    found = []
    for row, layer in enumerate(placement.layer_ids.tolist()):
        mean_loads, mean_counts = loads[:, row].mean(axis=0), counts[:, row].mean(axis=0)
        rank, expert, slowest = int(mean_loads.argmax()), int(mean_counts.argmax()), int(taken[row].argmax())
        found.append(
            HotLayer(
                layer=layer,
                rank=rank,
                rank_over_mean=float(mean_loads[rank] / mean_loads.mean()),
                slowest_rank=slowest,
                slowest_over_mean=float(taken[row, slowest] / taken[row].mean()) if taken[row].any() else 1.0,
                per_step_max_over_mean=float((loads[:, row].max(axis=1) / loads[:, row].mean(axis=1)).mean()),
                expert=expert,
                expert_over_mean=float(mean_counts[expert] / mean_counts.mean()),
                replicas=int(replicas[row, expert]),
            )
        )
    return tuple(found)


def _expert_seconds(drawn: _Drawn, layer_ids: NDArray[np.int64]) -> Floats:
    """Seconds of the experts of each MoE layer on each rank, mean over steps: [layers, ranks]."""
    graph = drawn.graph
    row = {layer: index for index, layer in enumerate(layer_ids.tolist())}
    found = np.zeros((len(row), graph.ranks))
    for task in graph.tasks:
        if task.operation == "experts" and task.layer in row:
            found[row[task.layer]] += np.broadcast_to(task.duration_s, (graph.steps, graph.ranks)).mean(axis=0)
    return found


def _counts(drawn: Sequence[_Drawn]) -> Floats:
    """Tokens of each expert in the drawn steps, micro-batches together: [steps, layers, experts]."""
    return np.concatenate([np.sum([counts for _, counts in one.routed], axis=0) for one in drawn])


def _rank_loads(pricer: Pricer, drawn: Sequence[_Drawn]) -> Floats:
    """Rows that each EP rank computes in the drawn steps, micro-batches together: [steps, layers, ranks]."""
    return np.concatenate([np.sum([pricer.rank_loads(*part) for part in one.routed], axis=0) for one in drawn])


def _traffic(pricer: Pricer, drawn: Sequence[_Drawn], mode: str) -> StepBytes | None:
    """Bytes of the mean drawn step."""
    micro = [
        (
            StepBatch(
                *(np.concatenate(axes) for axes in zip(*(vars(batch).values() for batch, _ in part), strict=True))
            ),
            np.concatenate([counts for _, counts in part]),
        )
        for part in zip(*(one.routed for one in drawn), strict=True)
    ]
    return step_bytes(pricer, micro, mode)


def _mean(values: Sequence[Floats]) -> float:
    return float(np.mean([value.mean() for value in values]))


def _by_rank(values: Sequence[Floats]) -> Floats:
    return np.asarray(np.mean([value.mean(axis=0) for value in values], axis=0))
