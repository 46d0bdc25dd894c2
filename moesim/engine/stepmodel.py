"""How long a planned step takes: by table, or by running either executor on the step itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moesim.cost.links import at_reached_rates
from moesim.engine import des, maxplus
from moesim.engine.batch_rules import captures_prompts, exchange_mode, graphs_of, low_latency_sequences, stage_count
from moesim.engine.batch_times import BatchTimes
from moesim.engine.batcher import Limits, Plan
from moesim.engine.deployment import Deployment
from moesim.engine.draws import Draw
from moesim.engine.linkuse import LinkUse, exchange_links, link_use, streams_of
from moesim.engine.lookups import DecodeAttention, Drafting, Graphs, attention_of_ranks, sizes_of
from moesim.engine.memory_rules import memory_rule
from moesim.engine.mixtures import routing_of
from moesim.engine.speculative import draft_tokens, pass_seconds, projection, verified
from moesim.engine.step_graph import best_step
from moesim.engine.steptable import FULL, Detail, GridAsked, PricedGrid, StepTable, price_grid, time_grid
from moesim.engine.workload import lengths
from moesim.errors import BadInput
from moesim.graph.batch import StepBatch, step_batch
from moesim.graph.plan_pricer import PlanPricer
from moesim.graph.priced_step import Part, PricedStep
from moesim.graph.stages import joined
from moesim.graph.task import StepTimes, TaskGraph

Floats = NDArray[np.float64]
Fidelity = Literal["table", "maxplus", "des"]
FIDELITIES: dict[str, Fidelity] = {"table": "table", "maxplus": "maxplus", "des": "des"}

# Points of the attention tables: a factor of two in context, graph sizes in sequences.
_SEQS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0)
_FEWEST_KV = 16.0
_NOTHING = np.zeros(0)


class StepModel:
    """Times the steps of one deployment; `under(draw)` gives the same model under another possible truth."""

    def __init__(self, deployment: Deployment, *, seed: int, detail: Detail = FULL) -> None:
        self.deployment = deployment
        self.seed = seed
        self.detail = detail
        self.pricer = PlanPricer(deployment.setup, deployment.ground.costs)
        self.routing = routing_of(deployment)
        self.limits = batch_limits(deployment)
        most = low_latency_sequences(deployment)
        self.most_running = self.limits.max_running if most is None else min(self.limits.max_running, most)
        self.graphs = graphs_of(deployment)
        self.captures_prompts = captures_prompts(deployment)
        self.drafts = draft_tokens(deployment.serving)
        self.longest_context = float(lengths(deployment.serving.workload).longest_context)
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
            most = float(self.most_running * (1 + self.drafts) if kind == "decode" else self.limits.max_tokens)
            ranks = self.deployment.setup.parallel.attention_dp
            step, decode = self.detail.factor, kind == "decode"
            tokens = _axis(most, 2.0 if decode else step, midpoints=decode and self.detail.midpoints)
            if decode:  # a lightly loaded group, down to one sequence in all
                tokens = np.concatenate([1.0 / _axis(float(ranks), step)[:0:-1], tokens])
            hot = np.asarray([1.0]) if decode else _axis(float(ranks), step)
            asked = GridAsked(
                phase=kind,
                mode=exchange_mode(self.deployment, kind),
                graphed=(kind == "decode" or self.captures_prompts) and bool(self.graphs.sizes),
                tokens=tokens,
                hot=hot,
                most_tokens=most,
                kv_tokens=self.longest_context,
                seed=self.seed,
                detail=self.detail,
            )
            self.grids[kind] = price_grid(self.pricer, self.routing, asked)
        return self.grids[kind]

    def _price_decode_attention(self) -> tuple[Floats, Floats, Part]:
        """Decode attention of one layer over sequences x mean context. Raises OutsideProfile."""
        seqs, kv, batch = self._decode_batch()
        return seqs, kv, self.pricer.attending(batch)

    def decode_exchange(self) -> Part:
        """What of it ranks that share contexts spend exchanging."""
        return self.pricer.exchanging(self._decode_batch()[2])

    def _decode_batch(self) -> tuple[Floats, Floats, StepBatch]:
        most_seqs = float(self.most_running * (1 + self.drafts))
        seqs = np.asarray([x for x in _SEQS if x < most_seqs] + [most_seqs])
        shares = 2.0 ** np.arange(0.0, math.log2(max(2.0, self.longest_context / _FEWEST_KV)), 1.0)
        kv = np.unique(np.append(_FEWEST_KV * shares, self.longest_context))
        batch = step_batch(
            ranks=len(kv), decode_seqs=np.repeat(seqs[:, None], len(kv), axis=1), decode_kv=np.tile(kv, (len(seqs), 1))
        )
        return seqs, kv, batch

    def prefill_attention(self, seqs: int, new: float, prefix: float) -> Part:
        """Attention of `seqs` prompts of `new` tokens after `prefix` each; remembered, as workloads repeat."""
        key = (seqs, round(new, 3), round(prefix, 3))
        if key not in self._prefill_parts:
            half = self.deployment.setup.policies.schedule == "two_batch"
            batch = _prompts(seqs, new, prefix)
            self._prefill_parts[key] = self.pricer.attending(batch.half() if half else batch)
        return self._prefill_parts[key]

    def prefill_exchange(self, seqs: int, new: float, prefix: float) -> Part:
        """What of it ranks that share contexts spend exchanging."""
        return self.pricer.exchanging(_prompts(seqs, new, prefix))


class TimedModel:
    """A StepModel under one draw: callable by the serving loop."""

    def __init__(self, model: StepModel, draw: Draw | None) -> None:
        self.model = model
        self.normal: Mapping[str, float] | None = None if draw is None else draw.normal
        self.load_weights = model.routing.weights if draw is None else draw.load_weights
        self.share = 0.5 if model.deployment.setup.policies.schedule == "two_batch" else 1.0
        seqs, kv, part = model._kernel_decode
        self._attention = DecodeAttention(seqs, kv, np.ascontiguousarray(part.seconds(self.normal)), self.share)
        self._prompts_s: dict[tuple[int, int, float], float] = {}
        self._tables: dict[str, StepTable] = {}
        self._stages = stage_count(model.deployment.setup)
        self._hops: tuple[Floats, Floats] | None = None  # seconds of each hop without tokens and for each token
        self._dp = model.deployment.setup.parallel.attention_dp
        self._drafting: tuple[Floats, Floats] | None = None  # logits and projection of a draft, by the grid's tokens

    def table(self, kind: str) -> StepTable:
        """The timed table of decode or prefill steps, on the first of several stages; built when first asked for."""
        return self._table(kind, 0)

    def _table(self, kind: str, stage: int) -> StepTable:
        key = f"{kind} {stage}"
        if key not in self._tables:
            self._tables[key] = time_grid(
                self.model.pricer,
                self.model.grid(kind),
                longest_attention_s=float(self._attention.seconds.max()),
                normal=self.normal,
                load_weights=self.load_weights,
                detail=self.model.detail,
                stage=stage,
            )
        return self._tables[key]

    def stages(self, plan: Plan) -> BatchTimes:
        """Seconds of a planned batch on each pipeline stage, by table; the last one drafts. Raises OutsideProfile."""
        host_s, drafts = self._step_overhead_s, self.model.drafts
        asked = verified(plan, drafts)
        found = [self._step_s(asked, stage) for stage in range(self._stages)]
        if drafts:
            found[-1] = self._with_drafts(plan, sum(found), found[-1])
        found[0] -= host_s
        return BatchTimes(host_s, found, self._transfers_s(asked))

    def stage_tables(self, kind: str) -> list[StepTable]:
        """The timed table of each pipeline stage."""
        return [self.table(kind), *(self._table(kind, stage) for stage in range(1, self._stages))]

    def hops(self) -> tuple[float, Floats, Floats]:
        """Host seconds of a batch; seconds of each hop between stages without tokens, and for each row."""
        if self._hops is None:
            pricer = self.model.pricer
            none, one = (pricer.transfer(np.full((1, 1), rows)).seconds(self.normal)[0, :, 0] for rows in (0.0, 1.0))
            self._hops = np.ascontiguousarray(none), np.ascontiguousarray(one - none)
        return self._step_overhead_s, *self._hops

    def _transfers_s(self, plan: Plan) -> list[float]:
        if self._stages == 1:
            return []
        _, fixed_s, each_s = self.hops()
        rows = rows_of_plan(self.model, plan)
        return [float(fixed + rows * each) for fixed, each in zip(fixed_s, each_s, strict=True)]

    def __call__(self, plan: Plan) -> float:
        """Seconds of a planned step, by table, drafting included. Raises OutsideProfile."""
        drafts = self.model.drafts
        if self._stages > 1:
            return self.stages(plan).alone_s
        if drafts == 0:
            return self._step_s(plan)
        step_s = self._step_s(verified(plan, drafts))
        return self._with_drafts(plan, step_s, step_s)

    def _with_drafts(self, plan: Plan, step_s: float, found: float) -> float:
        """`found` and what drafting takes beside a verifying step of `step_s` through all layers."""
        layers = self.model.deployment.setup.model.layers
        if plan.prefill_tokens.any():  # the prompt fills the cache of the drafting layer too
            found += (step_s - self._step_overhead_s) / layers
        if plan.decode_seqs.any():
            alone = plan._replace(prefill_seqs=plan.prefill_seqs * 0, prefill_tokens=plan.prefill_tokens * 0)
            rows = float(plan.decode_seqs.max())
            alone_s = sum(self._step_s(alone, stage) for stage in range(self._stages))
            one = pass_seconds(alone_s, self._step_overhead_s, self._logits_s(rows), layers)
            found += self.model.drafts * (one + self._projection_s(rows))
        return found

    @property
    def _step_overhead_s(self) -> float:
        return self.model.deployment.rules.step.under(self.normal)

    def _logits_s(self, rows: float) -> float:
        grid = self.model.grid("decode")
        if self._drafting is None:
            points = len(grid.tokens)
            logits = np.broadcast_to(grid.priced.tail.seconds(self.normal), (grid.priced.batch.steps, self._dp))
            setup, costs = self.model.deployment.setup, self.model.deployment.ground.costs
            joined = projection(setup, costs, np.maximum(grid.tokens, 1.0)[:, None]).seconds(self.normal)
            self._drafting = (logits[:points].max(axis=1) / self.share, np.ascontiguousarray(joined[:, 0]))
        return float(np.interp(rows, grid.tokens, self._drafting[0]))

    def _projection_s(self, rows: float) -> float:
        assert self._drafting is not None
        return float(np.interp(rows, self.model.grid("decode").tokens, self._drafting[1]))

    def slowed(self, plan: Plan, attention_s: Floats) -> Floats:
        """The attention of a plan's ranks, of one layer, as a fault leaves it: here as it was."""
        del plan
        return attention_s

    def _step_s(self, plan: Plan, stage: int = 0) -> float:
        total, most, prompts = sizes_of(plan.decode_seqs, plan.prefill_tokens)
        reading, largest, mean = prompts > 0, float(most), total / len(plan.decode_seqs)
        kind = "prefill" if reading else "decode"
        table = self._table(kind, stage) if stage else self.table(kind)
        attention_s = attention_of_ranks(plan.decode_seqs, plan.decode_kv, self.attention())
        if reading:
            for rank in np.nonzero(plan.prefill_tokens)[0]:
                seqs, tokens = int(plan.prefill_seqs[rank]), int(plan.prefill_tokens[rank])
                attention_s[rank] += self.prompt_s(seqs, tokens, float(plan.prefill_prefix[rank]) / seqs)
        attention_s = self.slowed(plan, attention_s)
        if reading and not self.model.captures_prompts:
            return table.step_s(mean, largest / mean, float(attention_s.max()))
        graphs = self.model.graphs
        rows = float(graphs.padded(int(largest)))
        priced = largest if reading else mean  # the rows that the grid's point was priced with
        slowest = float(attention_s.max()) + max(0.0, table.before(rows) - table.before(priced))
        if graphs.sizes and not graphs.holds(int(largest)):
            slowest += self._eager_layer_s  # the grid is priced with graphs; every layer starts with this
        return table.step_s(mean, largest / mean, slowest)

    @property
    def _eager_layer_s(self) -> float:
        return self.model.deployment.rules.layer.under(self.normal)

    def prompt_s(self, seqs: int, tokens: int, prefix: float) -> float:
        """Attention of the prompts that a rank reads, of one layer; remembered, as workloads repeat."""
        key = (seqs, tokens, prefix)
        if key not in self._prompts_s:
            part = self.model.prefill_attention(seqs, tokens / seqs, prefix)
            self._prompts_s[key] = float(part.seconds(self.normal)[0, 0])
        return self._prompts_s[key]

    @property
    def compilable(self) -> bool:
        """Whether `compiled` times steps as this model does: it knows no captured prompts, no drafts and one stage."""
        return not self.model.captures_prompts and self.model.drafts == 0 and self._stages == 1

    @property
    def flow_compilable(self) -> bool:
        """Whether `compiled_flow` times batches as this model does: it knows no captured prompts and no drafts."""
        return not self.model.captures_prompts and self.model.drafts == 0 and self._stages > 1

    @property
    def role_compilable(self) -> bool:
        """Whether `compiled_roles` times steps as this model does: it knows no captured prompts and one stage."""
        return not self.model.captures_prompts and self._stages == 1

    def drafting(self) -> Drafting:
        """What drafting costs beside a verifying step; its table is priced when first asked for."""
        drafts, layers = self.model.drafts, self.model.deployment.setup.model.layers
        if drafts == 0:
            return Drafting(0, 0.0, layers, _NOTHING, _NOTHING, _NOTHING)
        self._logits_s(1.0)
        assert self._drafting is not None
        return Drafting(drafts, self._step_overhead_s, layers, self.model.grid("decode").tokens, *self._drafting)

    def attention(self) -> DecodeAttention:
        """Decode attention of one layer."""
        return self._attention

    def graphs_taken(self) -> Graphs:
        """The captured sizes, and what a layer takes more beside them."""
        return Graphs(np.asarray(self.model.graphs.sizes, dtype=np.int64), self._eager_layer_s)


class ExactModel:
    """Times each planned step by building its own graph and running an executor on it: slow, and the reference."""

    def __init__(self, model: StepModel, fidelity: Fidelity) -> None:
        self.model = model
        self.fidelity = fidelity
        self.rng = np.random.default_rng([model.seed, 5])
        self.routed: list[tuple[StepBatch, Floats]] = []  # the micro-batches built last, with their counts

    def stages(self, plan: Plan) -> BatchTimes:
        """Seconds of a planned batch on each pipeline stage. Raises OutsideProfile."""
        drafts, reading = self.model.drafts, bool(plan.prefill_tokens.any())
        priced = self.price(batch_of_plan(self.model, verified(plan, drafts)), "prefill" if reading else "decode")
        found = [float(self._run(graph).step_s[0]) for graph, _ in self.stage_graphs(priced)]
        if drafts:
            found[-1] += self._drafting_s(plan, sum(found), reading)
        host_s = self.model.deployment.rules.step_overhead_s
        return BatchTimes(host_s, [found[0] - host_s, *found[1:]], [float(one[0, 0]) for one in self.transfers(priced)])

    def __call__(self, plan: Plan) -> float:
        """Seconds of a planned step, drafting included. Raises OutsideProfile."""
        drafts, reading = self.model.drafts, bool(plan.prefill_tokens.any())
        _, times = self.run(batch_of_plan(self.model, verified(plan, drafts)), "prefill" if reading else "decode")
        step_s = float(times.step_s[0])
        return step_s if drafts == 0 else step_s + self._drafting_s(plan, step_s, reading)

    def _drafting_s(self, plan: Plan, step_s: float, reading: bool) -> float:
        setup, overhead_s = self.model.deployment.setup, self.model.deployment.rules.step_overhead_s
        found = (step_s - overhead_s) / setup.model.layers if reading else 0.0
        if plan.decode_seqs.any():
            alone = plan._replace(prefill_seqs=plan.prefill_seqs * 0, prefill_tokens=plan.prefill_tokens * 0)
            graph, priced = self.build(batch_of_plan(self.model, alone), "decode")
            logits_s = sum(float(part.tail.seconds().max()) for part in priced)
            times = des.run(graph, step=0, sharing=True) if self.fidelity == "des" else maxplus.run(graph)
            alone_s = float(times.step_s[0]) - sum(float(sent[0, 0]) for sent in self.transfers(priced))
            one = pass_seconds(alone_s, overhead_s, logits_s, setup.model.layers)
            rows = np.full((1, 1), float(plan.decode_seqs.max()))
            joined = projection(setup, self.model.deployment.ground.costs, rows).seconds()
            found += self.model.drafts * (one + float(joined[0, 0]))
        return found

    def run(self, batch: StepBatch, kind: str, *, timeline: bool = False) -> tuple[TaskGraph, StepTimes]:
        """Draw routing for the steps of a batch, build their graph and run it."""
        graph, _ = self.build(batch, kind)
        return graph, self._run(graph, timeline=timeline, network=self._network(graph, kind))

    def _run(self, graph: TaskGraph, *, timeline: bool = False, network: LinkUse | None = None) -> StepTimes:
        if self.fidelity == "des":
            return des.run(graph, step=0, sharing=True, timeline=timeline, network=network)
        return maxplus.run(graph, timeline=timeline)

    def build(self, batch: StepBatch, kind: str) -> tuple[TaskGraph, list[PricedStep]]:
        """The graph of a batch under drawn routing, and its priced micro-batches."""
        return self.graph(self.price(batch, kind))

    def price(self, batch: StepBatch, kind: str) -> list[PricedStep]:
        """Price a batch's micro-batches under drawn routing."""
        model = self.model
        setup = model.deployment.setup
        mode = exchange_mode(model.deployment, kind)
        graphed = kind == "decode" and model.graphs.holds(int(batch.decode_seqs.max()))
        graphed |= model.captures_prompts and model.graphs.holds(int(batch.tokens.max()))
        loads = model.routing.for_phase(kind)
        weights = model.routing.weights[loads] / model.routing.weights[loads].sum()
        parts = [batch.half(), batch.half()] if setup.policies.schedule == "two_batch" else [batch]
        priced = []
        self.routed = []
        for part in parts:
            load = int(self.rng.choice(loads, p=weights))
            counts = model.routing.counts(load, part.tokens.sum(axis=1), self.rng)
            self.routed.append((part, counts))
            priced.append(model.pricer.price(part, counts, mode=mode, graphed=graphed))
        return priced

    def graph(self, priced: Sequence[PricedStep]) -> tuple[TaskGraph, list[PricedStep]]:
        """The graph of priced micro-batches, all stages together, and its number of chunks, see `best_step`."""
        setup = self.model.deployment.setup
        if setup.stages is None:
            return best_step(setup, priced)
        graphs = [graph for graph, _ in self.stage_graphs(priced)]
        return joined(graphs, self.transfers(priced), setup.stages.hops), list(priced)

    def stage_graphs(self, priced: Sequence[PricedStep]) -> list[tuple[TaskGraph, list[PricedStep]]]:
        """The graph of each pipeline stage, and its number of chunks."""
        setup = self.model.deployment.setup
        return [best_step(setup, priced, stage=stage) for stage in range(stage_count(setup))]

    def transfers(self, priced: Sequence[PricedStep]) -> list[Floats]:
        """Seconds of each hop between stages, for all micro-batches at once: [steps, 1] each."""
        rows = np.asarray(np.sum([one.batch.padded_tokens for one in priced], axis=0))
        seconds = self.model.pricer.transfer(rows).seconds()
        return [seconds[:, hop] for hop in range(stage_count(self.model.deployment.setup) - 1)]

    def _network(self, graph: TaskGraph, kind: str) -> LinkUse | None:
        """The cluster's links, where other jobs are on them; None where a step meets only itself."""
        deployment = self.model.deployment
        if not deployment.ground.cluster.background:
            return None
        cluster = at_reached_rates(deployment.ground.cluster)
        mode = exchange_mode(deployment, kind)
        topology, exchanges = exchange_links(self.model.pricer, self.routed, mode, cluster)
        return link_use(graph, topology, exchanges, streams_of(cluster, topology))


# A light step: enough tokens on each rank for the smallest measured exchange.
_LIGHT_TOKENS = 8.0


def price_light_steps(deployment: Deployment, kinds: Sequence[str] = ("decode", "prefill")) -> dict[str, PricedStep]:
    """Price a light decode step and the reading of a prompt by each rank, evenly routed. Raises OutsideProfile."""
    setup = deployment.setup
    asked = lengths(deployment.serving.workload)
    pricer = PlanPricer(setup, deployment.ground.costs)
    prompt = min(asked.mean_isl, float(batch_limits(deployment).max_tokens))
    ranks = setup.parallel.attention_dp
    batches = {
        "decode": step_batch(ranks=ranks, decode_seqs=[[_LIGHT_TOKENS]], decode_kv=asked.mean_isl),
        "prefill": step_batch(ranks=ranks, prefill_seqs=[[1.0]], prefill_new=prompt),
    }
    found = {}
    for kind in kinds:
        batch = batches[kind]
        share = float(batch.tokens.sum()) * setup.model.moe.top_k / setup.model.moe.experts
        counts = np.full((1, setup.model.moe_layers, setup.model.moe.experts), share)
        graphed = kind == "decode" and bool(graphs_of(deployment).sizes)
        found[kind] = pricer.price(batch, counts, mode=exchange_mode(deployment, kind), graphed=graphed)
    return found


def _prompts(seqs: int, new: float, prefix: float) -> StepBatch:
    return step_batch(ranks=1, prefill_seqs=[[seqs]], prefill_new=[[new]], prefill_prefix=[[prefix]])


def batch_of_plan(model: StepModel, plan: Plan) -> StepBatch:
    """A planned step as a StepBatch of one step; decode batches are padded to the largest rank's captured size."""
    ranks = len(plan.decode_seqs)
    decode, prompts = plan.decode_seqs, plan.prefill_seqs
    padded = None
    if not plan.prefill_tokens.any():
        padded = np.full((1, ranks), float(model.graphs.padded(int(decode.max()))))
    elif model.captures_prompts:
        padded = np.full((1, ranks), float(model.graphs.padded(int((decode + plan.prefill_tokens).max()))))
    return step_batch(
        ranks=ranks,
        decode_seqs=decode[None, :],
        decode_kv=(plan.decode_kv / np.maximum(decode, 1))[None, :],
        prefill_seqs=prompts[None, :],
        prefill_new=(plan.prefill_tokens / np.maximum(prompts, 1))[None, :],
        prefill_prefix=(plan.prefill_prefix / np.maximum(prompts, 1))[None, :],
        padded_tokens=padded,
    )


def rows_of_plan(model: StepModel, plan: Plan) -> float:
    """Rows of the fullest rank after padding: what a stage sends to the next."""
    most = int((plan.decode_seqs + plan.prefill_tokens).max())
    padded = model.captures_prompts or not plan.prefill_tokens.any()
    return float(model.graphs.padded(most)) if padded else float(most)


def batch_limits(deployment: Deployment) -> Limits:
    """Batch limits of an attention-DP rank, after DeepEP's low-latency dispatch limit. Raises BadInput."""
    batching = deployment.serving.batching
    running = batching.max_running_requests_per_dp_rank
    speculative = deployment.serving.speculative
    queries = 1 + draft_tokens(deployment.serving)
    most = low_latency_sequences(deployment)
    if most is not None:
        if most == 0:
            raise BadInput(
                f"low-latency dispatch takes fewer tokens than the {queries} that one sequence verifies",
                where="serving.speculative.draft_tokens",
                mend="draft fewer, or use policies.dispatch.mode normal",
            )
        if stage_count(deployment.setup) == 1:  # of several batches under way each has this limit, see `flow_of`
            running = min(running, most)
    mixes = deployment.rules.mixes if batching.mixed_chunk is None else batching.mixed_chunk
    if batching.max_batch_tokens_per_dp_rank <= running * queries and mixes:
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
        mixes=mixes,
        rule=memory_rule(
            deployment.serving.memory.admission, deployment.rules.name, deployment.setup.parallel.decode_cp
        ),
        draft_tokens=queries - 1,
        acceptance=0.0 if speculative is None else speculative.acceptance,
        draft_seed=deployment.scenario.seed,
        poll_steps=batching.poll_steps,
        hold_steps=batching.hold_steps if deployment.setup.parallel.attention_dp > 1 else 0,
        gather_steps=batching.gather_steps,
        wait_steps=batching.wait_steps if deployment.setup.parallel.attention_dp == 1 else 0,
        wait_tokens=batching.wait_share * batching.max_batch_tokens_per_dp_rank,
    )


def _axis(most: float, step: float = 2.0, *, midpoints: bool = False) -> Floats:
    """1, step, step squared ... most, if asked with a midpoint in each octave above 8."""
    points = [1.0]
    while points[-1] * step < most:
        points.append(points[-1] * step)
    mid = [x * 1.5 for x in points if x >= 8 and midpoints]
    return np.unique(np.asarray([x for x in points + mid if x < most] + [most]))
