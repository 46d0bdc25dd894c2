"""Attention to contexts that the GPUs of a TP group split, by hand: what is read, gathered and merged, and its time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from moesim.cost.links import LAUNCH_S
from moesim.cost.reach import link_reach, reach
from moesim.cost.roofline import Roofline
from moesim.graph.batch import StepBatch, step_batch
from moesim.graph.decode_context import exchanged
from moesim.graph.priced_step import LayerSetup
from moesim.graph.pricing import Pricer
from moesim.spec.hf import load_model
from moesim.spec.parallel import ParallelSpec
from tests.costs_cluster import h200
from tests.priced_steps import setup

DEEPSEEK, QWEN = load_model("deepseek-ai/DeepSeek-V3"), load_model("Qwen/Qwen3-235B-A22B")
SEQS, CONTEXT = 64.0, 32768.0
DECODE = step_batch(ranks=1, decode_seqs=SEQS, decode_kv=CONTEXT)


def layer(model: Any, parallel: ParallelSpec, **more: Any) -> LayerSetup:
    plain = setup(2, {})
    return replace(plain, model=model, parallel=parallel, placement=replace(plain.placement, ranks=1), **more)


def sizes(model: Any, parallel: ParallelSpec, batch: StepBatch, **more: Any) -> dict[str, list[float]]:
    found = exchanged(layer(model, parallel, **more), batch)
    return {
        "before": [float(size[0, 0]) for _, size in found.before],
        "passes": [float(size[0, 0]) for _, size in found.passes],
        "after": [float(size[0, 0]) for _, size in found.after],
    }


def test_latent_attention_gathers_queries_and_scatters_outputs() -> None:
    """TP 8 has 16 heads on a GPU; four GPUs share a context, so each attends with 64 heads to a quarter of it."""
    found = sizes(DEEPSEEK, ParallelSpec(tp=8, ep=8, decode_cp=4), DECODE)
    rows = SEQS * 64
    assert found == {
        "before": [rows * (512 + 64) * 2],  # absorbed queries in bf16, of all heads of the group
        "passes": [rows * 512 * 2 * 2],  # outputs read and written, scaled
        "after": [rows * 4 * 4, rows * 512 * 2],  # four fp32 sums of each head; the outputs to be summed
    }


def test_one_all_to_all_carries_outputs_and_sums() -> None:
    found = sizes(DEEPSEEK, ParallelSpec(tp=8, ep=8, decode_cp=4), DECODE, context_by_all_to_all=True)
    rows = SEQS * 64
    packed = rows * (512 * 2 + 4)
    assert found["before"] == [rows * 576 * 2]
    assert found["passes"] == [packed * 2, packed + rows * 512 * 2 / 4]
    assert found["after"] == [packed]


def test_prompts_of_latent_attention_gather_the_context_before_them() -> None:
    parallel = ParallelSpec(tp=8, ep=8, decode_cp=4)
    fresh = step_batch(ranks=1, prefill_seqs=2.0, prefill_new=1024.0)
    assert sizes(DEEPSEEK, parallel, fresh) == {"before": [], "passes": [], "after": []}
    later = step_batch(ranks=1, prefill_seqs=2.0, prefill_new=1024.0, prefill_prefix=4096.0)
    latents = 2 * 4096 * 576 * 2
    assert sizes(DEEPSEEK, parallel, later) == {"before": [latents], "passes": [latents * 4], "after": []}


def test_grouped_queries_are_gathered_for_prompts_too() -> None:
    """TP 8 keeps each of Qwen3-235B's 4 KV heads twice: two GPUs of 8 query heads share a context."""
    parallel = ParallelSpec(tp=8, ep=8, decode_cp=2)
    decode, prompts = DECODE, step_batch(ranks=1, prefill_seqs=2.0, prefill_new=512.0)
    for batch, tokens, own in ((decode, SEQS, 0.0), (prompts, 1024.0, 1.0)):
        rows = tokens * 16
        found = sizes(QWEN, parallel, batch)
        assert found["before"] == [rows * 128 * 2]
        assert found["passes"] == [rows * 128 * 2 * 2, *([rows / 2 * 128 * 2 * 3] if own else [])]
        assert found["after"] == [rows * 2 * 4, rows * 128 * 2]


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_a_gpu_reads_its_share_and_computes_for_all_heads_of_the_group(parts: int) -> None:
    """Latent attention in decode by roofline: FLOP stay, bytes of the cache fall, exchanges come on top."""
    cluster = h200(1)
    pricer = Pricer(layer(DEEPSEEK, ParallelSpec(tp=8, ep=8, decode_cp=parts)), Roofline(cluster))
    heads, length = 16 * parts, CONTEXT / parts
    flops = 2 * SEQS * heads * (576 + 512) * (length + 1)
    moved = SEQS * ((length + 1) * 576 * 2 + heads * (576 + 512) * 2)
    reached = reach("mla decode", "bf16/bf16")
    hbm = cluster.gpu.hbm_bytes_per_s
    busy = max(flops / (reached.compute * cluster.gpu.peak("bf16")), moved / (reached.hbm * hbm))
    kernel, rate = busy + reached.floor_s, hbm * 4.15 / 4.8
    passes = 0.0 if parts == 1 else SEQS * heads * 512 * 2 * 2 / rate + LAUNCH_S
    assert pricer.attention(DECODE).seconds()[0, 0] == pytest.approx(kernel + passes)

    def collective(kind: str, size: float) -> float:
        own = link_reach(f"collective {kind}")
        moved = (parts - 1) / parts * size / (own.near * cluster.nvlink_bytes_per_s)
        return moved + cluster.near_latency_s * float(np.log2(parts)) + own.floor_s

    exchanges = 0.0
    if parts > 1:
        rows = SEQS * heads
        exchanges = collective("all_gather", rows * 576 * 2) + collective("all_gather", rows * 4 * parts)
        exchanges += collective("reduce_scatter", rows * 512 * 2)
    assert pricer.exchanging(DECODE).seconds()[0, 0] == pytest.approx(exchanges)
    assert pricer.attending(DECODE).seconds()[0, 0] == pytest.approx(kernel + passes + exchanges)


def test_each_attention_dp_rank_exchanges_what_its_own_sequences_ask() -> None:
    batch = step_batch(ranks=2, decode_seqs=[[10.0, 0.0]], decode_kv=1000.0)
    found = exchanged(layer(DEEPSEEK, ParallelSpec(tp=4, attention_dp=2, ep=8, decode_cp=2)), batch)
    assert found.before[0][1].tolist() == [[10 * 64 * 576 * 2.0, 0.0]]
    pricer = Pricer(layer(DEEPSEEK, ParallelSpec(tp=4, attention_dp=2, ep=8, decode_cp=2)), Roofline(h200(1)))
    assert pricer.exchanging(batch).seconds()[0, 1] == 0.0
