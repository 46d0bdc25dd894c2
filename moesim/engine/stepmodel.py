"""How long a planned step takes: by table, or by running either executor on the step itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import numpy as np
from numba import njit
from numpy.typing import NDArray

from moesim.engine import des, maxplus
from moesim.engine.batcher import Limits, Plan
from moesim.engine.deployment import Deployment
from moesim.engine.draws import Draw
from moesim.engine.graphs import CapturedGraphs, captured_graphs
from moesim.engine.routing_draws import RoutingDraws
from moesim.engine.steptable import GridAsked, PricedGrid, StepTable, price_grid, time_grid
from moesim.errors import BadInput
from moesim.graph.batch import StepBatch, step_batch
from moesim.graph.layer import build_step
from moesim.graph.pricing import Part, PricedStep, Pricer
from moesim.graph.task import StepTimes, TaskGraph

Floats = NDArray[np.float64]
Fidelity = Literal["table", "maxplus", "des"]
FIDELITIES: dict[str, Fidelity] = {"table": "table", "maxplus": "maxplus", "des": "des"}

# Points of the attention tables: a factor of two in context, graph sizes in sequences.
_SEQS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0)
_FEWEST_KV = 16.0


class StepModel:
    """Times the steps of one deployment; `under(draw)` gives the same model under another possible truth."""

    def __init__(self, deployment: Deployment, *, seed: int) -> None:
        self.deployment = deployment
        self.seed = seed
        self.pricer = Pricer(deployment.setup, deployment.ground.costs)
        self.routing = RoutingDraws(deployment.ground.judge, deployment.setup.model.moe.top_k)
        self.limits = batch_limits(deployment)
        self.graphs = graphs_of(deployment)
        workload = deployment.serving.workload
        self.longest_context = float((workload.isl or 1) + (workload.osl or 1))
        self.grids: dict[str, PricedGrid] = {}
        self._kernel_decode = self._price_decode_attention()
        self._prefill_parts: dict[tuple[int, float, float], Part] = {}
        self.base = TimedModel(self, None)

    def under(self, draw: Draw | None) -> TimedModel:
        """The model under one joint draw."""
        return self.base if draw is None else TimedModel(self, draw)

    def grid(self, kind: str) -> PricedGrid:
        """The priced grid of decode or prefill steps; priced once."""
        if kind not in self.grids:
            most = float(self.limits.max_running if kind == "decode" else self.limits.max_tokens)
            ranks = self.deployment.setup.parallel.attention_dp
            tokens = _axis(most, midpoints=kind == "decode")
            if kind == "decode":  # a lightly loaded group, down to one sequence in all
                tokens = np.concatenate([1.0 / _axis(float(ranks), midpoints=False)[:0:-1], tokens])
            hot = np.asarray([1.0]) if kind == "decode" else _axis(float(ranks), midpoints=False)
            asked = GridAsked(
                phase=kind,
                mode=exchange_mode(self.deployment, kind),
                graphed=kind == "decode" and bool(self.graphs.sizes),
                tokens=tokens,
                hot=hot,
                most_tokens=most,
                kv_tokens=self.longest_context,
                seed=self.seed,
            )
            self.grids[kind] = price_grid(self.pricer, self.routing, asked)
        return self.grids[kind]

    def _price_decode_attention(self) -> tuple[Floats, Floats, Part]:
        """Decode attention of one layer over sequences x mean context. Raises OutsideProfile."""
        most_seqs = float(self.limits.max_running)
        seqs = np.asarray([x for x in _SEQS if x < most_seqs] + [most_seqs])
        shares = 2.0 ** np.arange(0.0, math.log2(max(2.0, self.longest_context / _FEWEST_KV)), 1.0)
        kv = np.unique(np.append(_FEWEST_KV * shares, self.longest_context))
        batch = step_batch(
            ranks=len(kv), decode_seqs=np.repeat(seqs[:, None], len(kv), axis=1), decode_kv=np.tile(kv, (len(seqs), 1))
        )
        return seqs, kv, self.pricer.attention(batch)

    def prefill_attention(self, seqs: int, new: float, prefix: float) -> Part:
        """Attention of `seqs` prompts of `new` tokens after `prefix` each; remembered, as workloads repeat."""
        key = (seqs, round(new, 3), round(prefix, 3))
        if key not in self._prefill_parts:
            batch = step_batch(ranks=1, prefill_seqs=[[seqs]], prefill_new=[[new]], prefill_prefix=[[prefix]])
            half = self.deployment.setup.policies.schedule == "two_batch"
            self._prefill_parts[key] = self.pricer.attention(batch.half() if half else batch)
        return self._prefill_parts[key]


class TimedModel:
    """A StepModel under one draw: callable by the serving loop."""

    def __init__(self, model: StepModel, draw: Draw | None) -> None:
        self.model = model
        self.normal: Mapping[str, float] | None = None if draw is None else draw.normal
        self.load_weights = model.routing.weights if draw is None else draw.load_weights
        self.share = 0.5 if model.deployment.setup.policies.schedule == "two_batch" else 1.0
        seqs, kv, part = model._kernel_decode
        self.decode_seqs, self.decode_kv = seqs, kv
        self.decode_attention_s = np.ascontiguousarray(part.seconds(self.normal))
        self._prompts_s: dict[tuple[int, int, float], float] = {}
        self.slowdown: Floats | None = None  # [attention-DP ranks], of computing on ranks that are slow
        self._tables: dict[str, StepTable] = {}

    def table(self, kind: str) -> StepTable:
        """The timed table of decode or prefill steps; built when first asked for."""
        if kind not in self._tables:
            self._tables[kind] = time_grid(
                self.model.pricer,
                self.model.grid(kind),
                longest_attention_s=float(self.decode_attention_s.max()),
                normal=self.normal,
                load_weights=self.load_weights,
            )
        return self._tables[kind]

    def __call__(self, plan: Plan) -> float:
        """Seconds of a planned step, by table. Raises OutsideProfile."""
        total, most, prompts = _sizes(plan.decode_seqs, plan.prefill_tokens)
        reading, largest, mean = prompts > 0, float(most), total / len(plan.decode_seqs)
        table = self.table("prefill" if reading else "decode")
        attention_s = _decode_attention(
            plan.decode_seqs,
            plan.decode_kv,
            self.share,
            self.decode_seqs,
            self.decode_kv,
            self.decode_attention_s,
        )
        if reading:
            for rank in np.nonzero(plan.prefill_tokens)[0]:
                attention_s[rank] += self._prompt_attention(plan, int(rank))
        if self.slowdown is not None:
            attention_s = attention_s * self.slowdown
        if reading:
            return table.step_s(mean, largest / mean, float(attention_s.max()))
        graphs = self.model.graphs
        rows = float(graphs.padded(int(largest)))
        slowest = float(attention_s.max()) + max(0.0, table.before(rows) - table.before(mean))
        if graphs.sizes and not graphs.holds(int(largest)):
            slowest += self._eager_layer_s  # the grid is priced with graphs; every layer starts with this
        return table.step_s(mean, largest / mean, slowest)

    @property
    def _eager_layer_s(self) -> float:
        rules = self.model.deployment.rules
        error = 0.0 if self.normal is None else self.normal["overhead"]
        return float(rules.eager_layer_s * np.exp(rules.overhead_rel_sigma * error))

    def _prompt_attention(self, plan: Plan, rank: int) -> float:
        """Attention of the prompts that a rank reads, of one layer; remembered, as workloads repeat."""
        seqs, tokens = int(plan.prefill_seqs[rank]), int(plan.prefill_tokens[rank])
        key = (seqs, tokens, float(plan.prefill_prefix[rank]) / seqs)
        if key not in self._prompts_s:
            part = self.model.prefill_attention(seqs, tokens / seqs, key[2])
            self._prompts_s[key] = float(part.seconds(self.normal)[0, 0])
        return self._prompts_s[key]


class ExactModel:
    """Times each planned step by building its own graph and running an executor on it: slow, and the reference."""

    def __init__(self, model: StepModel, fidelity: Fidelity) -> None:
        self.model = model
        self.fidelity = fidelity
        self.rng = np.random.default_rng([model.seed, 5])
        self.routed: list[Floats] = []  # counts of the last step built, by micro-batch

    def __call__(self, plan: Plan) -> float:
        """Seconds of a planned step. Raises OutsideProfile."""
        _, times = self.run(batch_of_plan(self.model, plan), "prefill" if plan.prefill_tokens.any() else "decode")
        return float(times.step_s[0])

    def run(self, batch: StepBatch, kind: str, *, timeline: bool = False) -> tuple[TaskGraph, StepTimes]:
        """Draw routing for the steps of a batch, build their graph and run it."""
        graph, _ = self.build(batch, kind)
        if self.fidelity == "des":
            return graph, des.run(graph, step=0, sharing=True, timeline=timeline)
        return graph, maxplus.run(graph, timeline=timeline)

    def build(self, batch: StepBatch, kind: str) -> tuple[TaskGraph, list[PricedStep]]:
        """The graph of a batch under drawn routing, and its priced micro-batches."""
        model = self.model
        setup = model.deployment.setup
        mode = exchange_mode(model.deployment, kind)
        graphed = kind == "decode" and model.graphs.holds(int(batch.decode_seqs.max()))
        loads = model.routing.for_phase(kind)
        weights = model.routing.weights[loads] / model.routing.weights[loads].sum()
        parts = [batch.half(), batch.half()] if setup.policies.schedule == "two_batch" else [batch]
        priced = []
        self.routed = []
        for part in parts:
            load = int(self.rng.choice(loads, p=weights))
            counts = model.routing.counts(load, part.tokens.sum(axis=1), self.rng)
            self.routed.append(counts)
            priced.append(model.pricer.price(part, counts, mode=mode, graphed=graphed))
        return build_step(setup, priced), priced


# A light step: enough tokens on each rank for the smallest measured exchange.
_LIGHT_TOKENS = 8.0


def price_light_steps(deployment: Deployment) -> dict[str, PricedStep]:
    """Price a light decode step and the reading of a prompt by each rank, evenly routed. Raises OutsideProfile."""
    setup = deployment.setup
    workload = deployment.serving.workload
    pricer = Pricer(setup, deployment.ground.costs)
    prompt = float(min(workload.isl or 1, batch_limits(deployment).max_tokens))
    ranks = setup.parallel.attention_dp
    batches = {
        "decode": step_batch(ranks=ranks, decode_seqs=[[_LIGHT_TOKENS]], decode_kv=float(workload.isl or 1)),
        "prefill": step_batch(ranks=ranks, prefill_seqs=[[1.0]], prefill_new=prompt),
    }
    found = {}
    for kind, batch in batches.items():
        share = float(batch.tokens.sum()) * setup.model.moe.top_k / setup.model.moe.experts
        counts = np.full((1, setup.model.moe_layers, setup.model.moe.experts), share)
        graphed = kind == "decode" and bool(graphs_of(deployment).sizes)
        found[kind] = pricer.price(batch, counts, mode=exchange_mode(deployment, kind), graphed=graphed)
    return found


def batch_of_plan(model: StepModel, plan: Plan) -> StepBatch:
    """A planned step as a StepBatch of one step; decode batches are padded to the largest rank's captured size."""
    ranks = len(plan.decode_seqs)
    decode, prompts = plan.decode_seqs, plan.prefill_seqs
    padded = None
    if not plan.prefill_tokens.any():
        padded = np.full((1, ranks), float(model.graphs.padded(int(decode.max()))))
    return step_batch(
        ranks=ranks,
        decode_seqs=decode[None, :],
        decode_kv=(plan.decode_kv / np.maximum(decode, 1))[None, :],
        prefill_seqs=prompts[None, :],
        prefill_new=(plan.prefill_tokens / np.maximum(prompts, 1))[None, :],
        prefill_prefix=(plan.prefill_prefix / np.maximum(prompts, 1))[None, :],
        padded_tokens=padded,
    )


def exchange_mode(deployment: Deployment, kind: str) -> str:
    """DeepEP mode of a step: `auto` follows the engine, low-latency for pure decode, normal when any rank reads."""
    mode = deployment.setup.policies.dispatch.mode
    if deployment.setup.policies.dispatch.backend != "deepep":
        return "normal"
    if mode == "auto":
        return "low_latency" if kind == "decode" else "normal"
    return mode


def graphs_of(deployment: Deployment) -> CapturedGraphs:
    """The captured graphs of a deployment's decode steps."""
    return captured_graphs(
        deployment.serving.batching,
        deployment.setup.policies,
        deployment.rules,
        mode=exchange_mode(deployment, "decode"),
    )


def batch_limits(deployment: Deployment) -> Limits:
    """Batch limits of an attention-DP rank, after DeepEP's low-latency dispatch limit. Raises BadInput."""
    batching = deployment.serving.batching
    running = batching.max_running_requests_per_dp_rank
    setup = deployment.setup
    if setup.policies.dispatch.backend == "deepep" and exchange_mode(deployment, "decode") == "low_latency":
        running = min(running, deployment.rules.low_latency_tokens * setup.parallel.tp)
    if batching.max_batch_tokens_per_dp_rank <= running and deployment.rules.mixes:
        raise BadInput(
            f"{batching.max_batch_tokens_per_dp_rank} batch tokens leave no room for prompts beside {running} requests",
            where="serving.batching.max_batch_tokens_per_dp_rank",
            mend="raise it above the running requests",
        )
    return Limits(
        max_tokens=batching.max_batch_tokens_per_dp_rank,
        max_running=running,
        kv_tokens=deployment.memory.kv_capacity_tokens,
        chunked=batching.chunked_prefill,
        mixes=deployment.rules.mixes,
    )


def _axis(most: float, *, midpoints: bool) -> Floats:
    """1, 2, 4 ... most, if asked with a midpoint in each octave above 8."""
    points = [1.0]
    while points[-1] * 2 < most:
        points.append(points[-1] * 2)
    mid = [x * 1.5 for x in points if x >= 8 and midpoints]
    return np.unique(np.asarray([x for x in points + mid if x < most] + [most]))


@njit(cache=True)
def _sizes(decode_seqs: NDArray[np.int64], prefill_tokens: NDArray[np.int64]) -> tuple[int, int, int]:
    """Tokens of all ranks, of the fullest rank, and of prompts."""
    total = most = prompts = 0
    for rank in range(len(decode_seqs)):
        tokens = decode_seqs[rank] + prefill_tokens[rank]
        total += tokens
        most = max(most, tokens)
        prompts += prefill_tokens[rank]
    return total, most, prompts


@njit(cache=True)
def _decode_attention(
    seqs: NDArray[np.int64], kv: Floats, share: float, seqs_axis: Floats, kv_axis: Floats, table: Floats
) -> Floats:
    """Decode attention of each rank [ranks]: bilinear in the logarithms of sequences and mean context."""
    found = np.zeros(len(seqs))
    for rank in range(len(seqs)):
        if seqs[rank] == 0:
            continue
        batch = max(seqs[rank] * share, seqs_axis[0])
        mean = kv[rank] / seqs[rank]
        i, u = _log_bracket(seqs_axis, batch)
        j, v = _log_bracket(kv_axis, mean)
        found[rank] = (
            table[i, j] * (1 - u) * (1 - v)
            + table[min(i + 1, len(seqs_axis) - 1), j] * u * (1 - v)
            + table[i, min(j + 1, len(kv_axis) - 1)] * (1 - u) * v
            + table[min(i + 1, len(seqs_axis) - 1), min(j + 1, len(kv_axis) - 1)] * u * v
        )
    return found


@njit(cache=True)
def _log_bracket(axis: Floats, value: float) -> tuple[int, float]:
    n = len(axis)
    if n == 1 or value <= axis[0]:
        return 0, 0.0
    if value >= axis[n - 1]:
        return n - 2, 1.0
    low = int(np.searchsorted(axis, value)) - 1
    return low, np.log(value / axis[low]) / np.log(axis[low + 1] / axis[low])
