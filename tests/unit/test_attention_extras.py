"""What some models' attention does beside its products: an indexer, norms across heads; priced from bytes by hand."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.cost.estimate import Estimate, Tag, estimate
from moesim.cost.host import HostTime
from moesim.cost.ops import Attention, Collective, Gemm, MemoryBound, MlaAttention, Operation
from moesim.engine.deployment import groundwork, resolve
from moesim.engine.stepmodel import StepModel
from moesim.graph.batch import StepBatch, step_batch
from moesim.graph.flows import phase_bytes
from moesim.graph.priced_step import LayerSetup, PricedStep
from moesim.graph.pricing import Pricer
from moesim.spec.hf import load_model
from moesim.spec.model import ModelSpec
from moesim.spec.parallel import ParallelSpec
from moesim.spec.plan import ExpertPlacement
from moesim.spec.scenario import PoliciesSpec, PrecisionSpec, Scenario, load_scenario
from tests.dispatch_plans import plan
from tests.scenarios import small, write

GLM, MINIMAX = "zai-org/GLM-5", "MiniMaxAI/MiniMax-M2.5"


@dataclass
class Listed:
    """A cost model in which bytes are seconds and other operations a second, and which keeps what it was asked."""

    asked: list[Operation] = field(default_factory=list)

    def estimate(self, operation: Operation) -> Estimate:
        """Price one operation."""
        self.asked.append(operation)
        match operation:
            case MemoryBound(bytes=size) | Collective(bytes=size):
                seconds = np.asarray(size, dtype=np.float64)
            case Gemm(m=m):
                seconds = np.ones(np.shape(m))
            case Attention(batch=batch) | MlaAttention(batch=batch):
                seconds = np.ones(np.shape(batch))
            case _:
                seconds = np.ones((1, 1))
        return estimate(seconds, Tag.ASSUMED, "gemm", 0.0, "by hand")

    def passes(self) -> dict[str, Any]:
        """Bytes by name of the memory-bound passes."""
        return {one.name: one.bytes for one in self.asked if isinstance(one, MemoryBound)}

    def products(self) -> Counter[tuple[int, int, str]]:
        """How often each product (n, k, type) was asked for."""
        return Counter((one.n, one.k, one.dtype) for one in self.asked if isinstance(one, Gemm))


def setup(model: ModelSpec, parallel: ParallelSpec, backend: str = "allreduce", **precision: Any) -> LayerSetup:
    layers, experts = model.moe_layers, model.moe.experts
    slots = np.tile(np.arange(experts), (layers, 1))
    return LayerSetup(
        model=model, parallel=parallel, precision=PrecisionSpec(**precision),
        policies=PoliciesSpec.read({"dispatch": {"backend": backend}}, where="test"),
        placement=ExpertPlacement(slots, np.arange(layers), experts, parallel.ep, experts),
        nodes=1, gpus_per_node=8, step=HostTime(0.0), layer=HostTime(0.0), overhead_rel_sigma=0.0,
    )  # fmt: skip


def priced(asked: LayerSetup, batch: StepBatch) -> tuple[PricedStep, Listed]:
    costs, moe = Listed(), asked.model.moe
    counts = np.full((batch.steps, asked.model.moe_layers, moe.experts), 1.0)
    return Pricer(asked, costs).price(batch, counts, mode="normal", graphed=True), costs


def without(model: ModelSpec, **changes: Any) -> ModelSpec:
    return model.model_copy(update={"attention": model.attention.model_copy(update=changes)})


DECODE = step_batch(ranks=1, decode_seqs=[[10.0], [40.0]], decode_kv=[[1000.0], [5000.0]])


@pytest.mark.parametrize("tp", [1, 4])
def test_a_norm_across_heads_is_three_passes_and_a_sum_over_tp(tp: int) -> None:
    """MiniMax-M2.5: 48 query and 8 key heads of 128, bf16, over TP ranks; two fp32 numbers a token between them."""
    model = load_model(MINIMAX)
    parallel = ParallelSpec(tp=tp, ep=1, expert_tp=tp)
    with_norm, _ = priced(setup(model, parallel), DECODE)
    plain, _ = priced(setup(without(model, norm_across_heads=False), parallel), DECODE)
    rows = np.array([[10.0], [40.0]])
    one_pass = rows * (48 + 8) / tp * 128 * 2
    np.testing.assert_allclose(with_norm.projections.seconds() - plain.projections.seconds(), 3 * one_pass)
    summed = with_norm.attention_sync.seconds() - plain.attention_sync.seconds()
    np.testing.assert_allclose(summed, rows * 2 * 4 if tp > 1 else 0.0)


def test_the_sum_of_the_norm_is_an_all_reduce_of_the_tp_group() -> None:
    _, costs = priced(setup(load_model(MINIMAX), ParallelSpec(tp=4, ep=1, expert_tp=4)), DECODE)
    small_ones = [one for one in costs.asked if isinstance(one, Collective) and float(np.max(one.bytes)) == 40 * 2 * 4]
    assert [(one.kind, one.gpus, one.nodes) for one in small_ones] == [("all_reduce", 4, 1)]


def test_models_that_normalise_each_head_have_no_such_passes() -> None:
    _, costs = priced(setup(load_model("Qwen/Qwen3-235B-A22B"), ParallelSpec(tp=4, ep=1, expert_tp=4)), DECODE)
    assert not {"squares", "head norm"} & set(costs.passes())
    assert sum(isinstance(one, Collective) for one in costs.asked) == 2  # after attention, after the experts


@pytest.mark.parametrize("tp", [1, 4])
def test_an_indexers_products_and_passes_are_whole_on_every_rank(tp: int) -> None:
    """GLM-5: 32 heads of 128 from the 2,048 compressed query elements; key and head weights from the hidden 6,144."""
    model = load_model(GLM)
    types = {"dense": "fp8_block", "attention": "fp8_block"}
    parallel = ParallelSpec(tp=tp, ep=1, expert_tp=tp)
    with_it, costs = priced(setup(model, parallel, **types), DECODE)
    plain, bare = priced(
        setup(without(model, index_heads=0, index_head_dim=0, index_top_k=0), parallel, **types), DECODE
    )
    products = {(4096, 2048, "fp8_block"): 1, (128, 6144, "fp8_block"): 1, (32, 6144, "bf16"): 1}
    assert costs.products() - bare.products() == products
    rows = np.array([[10.0], [40.0]])
    passes = rows * 128 * 2 * 2 + rows * 4096 * 2 * 2 + rows * 32 * 2 * 2  # bf16, read and written
    np.testing.assert_allclose(with_it.projections.seconds() - plain.projections.seconds(), passes + 3.0)


def test_an_indexer_scores_its_cache_and_attention_reads_what_it_chose() -> None:
    """A byte for each of 128 elements of a token's key, its score written and read as fp32; 2,048 tokens are kept."""
    model = load_model(GLM)
    step, costs = priced(setup(model, ParallelSpec(tp=8, ep=8)), DECODE)
    passes = costs.passes()
    tokens = np.array([[10 * 1000.0], [40 * 5000.0]])
    np.testing.assert_allclose(passes["index scores"], tokens * (128 + 4))
    np.testing.assert_allclose(passes["index top-k"], tokens * 4)
    (kernel,) = (one for one in costs.asked if isinstance(one, MlaAttention))
    np.testing.assert_allclose(kernel.prefix_tokens, [[1000.0], [2048.0]])
    np.testing.assert_allclose(step.attention.seconds(), 1.0 + tokens * (128 + 4 + 4))
    _, whole = priced(setup(without(model, index_top_k=0), ParallelSpec(tp=8, ep=8)), DECODE)
    (kernel,) = (one for one in whole.asked if isinstance(one, MlaAttention))
    np.testing.assert_allclose(kernel.prefix_tokens, [[1000.0], [5000.0]])


def test_models_without_an_indexer_read_all() -> None:
    _, costs = priced(setup(load_model("deepseek-ai/DeepSeek-V3"), ParallelSpec(tp=8, ep=8)), DECODE)
    assert not [name for name in costs.passes() if name.startswith("index")]
    (kernel,) = (one for one in costs.asked if isinstance(one, MlaAttention))
    np.testing.assert_allclose(kernel.prefix_tokens, [[1000.0], [5000.0]])


def test_sparse_attention_saves_time_at_long_contexts_in_the_serving_tables(tmp_path: Path) -> None:
    """The table of decode attention: as without top-k up to 2,048 tokens, cheaper above, still rising with them."""
    seconds = []
    for top_k in (2048, 0):
        data = small(
            model=GLM, placement={"solver": "contiguous"}, parallel={"attention_dp": 32, "ep": 32},
            precision={"dense": "fp8_block", "experts": "fp8_block"},
            cluster={"system": "h200_sxm", "nodes": 4, "gpus_per_node": 8},
        )  # fmt: skip
        data["serving"]["workload"] |= {"isl": 30000}
        ground = groundwork(load_scenario(write(tmp_path, data)))
        ground = replace(ground, model=without(ground.model, index_top_k=top_k))
        seconds.append(StepModel(resolve(ground), seed=0).under(None).attention())
    sparse, whole = seconds
    np.testing.assert_array_equal(sparse.kv, whole.kv)
    short = sparse.kv <= 2048
    assert short.any()
    assert (~short).any()
    np.testing.assert_allclose(sparse.seconds[:, short], whole.seconds[:, short])
    assert (sparse.seconds[:, ~short] < whole.seconds[:, ~short]).all()
    assert (np.diff(sparse.seconds, axis=1) > 0).all()


@pytest.mark.parametrize(("gather", "width"), [(None, 2.0), ("bf16", 2.0), ("fp8", 1.0), ("nvfp4", 0.5625)])
def test_an_all_gather_dispatches_its_own_type(gather: str | None, width: float) -> None:
    """Eight ranks of 40 tokens of MiniMax's 3,072 elements are gathered; what is scattered back stays bf16."""
    batch = step_batch(ranks=8, decode_seqs=40.0, decode_kv=100.0)
    asked = setup(load_model(MINIMAX), ParallelSpec(attention_dp=8, ep=8), "allgather_reducescatter", gather=gather)
    step, _ = priced(asked, batch)
    np.testing.assert_allclose(step.dispatch.seconds(), 8 * 40 * 3072 * width)
    np.testing.assert_allclose(step.combine.seconds(), 8 * 40 * 3072 * 2.0)


def test_the_bytes_that_are_told_are_those_that_are_priced() -> None:
    sums = {}
    for gather in (None, "nvfp4"):
        deployment = resolve(groundwork(Scenario.read(plan("allgather_reducescatter"), where="test")))
        asked = replace(deployment.setup, precision=deployment.setup.precision.model_copy(update={"gather": gather}))
        batch = step_batch(ranks=asked.parallel.attention_dp, decode_seqs=32.0, decode_kv=100.0)
        counts = np.ones((1, asked.model.moe_layers, asked.model.moe.experts))
        sums[gather] = Counter[str]()
        for phase in phase_bytes(Pricer(asked, Listed()), batch, counts, "normal"):
            sums[gather][phase.step] += float(phase.pairs.sum())
    assert sums["nvfp4"]["dispatch"] == pytest.approx(sums[None]["dispatch"] * 0.5625 / 2.0)
    assert sums["nvfp4"]["combine"] == sums[None]["combine"]
