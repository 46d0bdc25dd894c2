"""One long prompt among 31 decoding ranks: the whole group's step follows it, worked out by hand.

Every operation has a price that can be multiplied out by hand. All ranks meet at the dispatch and the combine of each
layer, so a layer takes the longest attention of any rank, and any rank's prompt makes the exchange DeepEP's normal one
and the step eager for everyone (SGLang: `is_extend_in_batch` is agreed on by all DP ranks, `deepep_mode: auto` resolves
to normal for it and the graph is not used; vLLM: DP ranks agree on the batch descriptor).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moesim.cost.estimate import Estimate, Tag, estimate
from moesim.cost.ops import Attention, ExpertGemm, Gemm, MemoryBound, MoeExchange, Operation
from moesim.engine.deployment import groundwork, resolve
from moesim.engine.serving import Load, serve
from moesim.engine.stepmodel import ExactModel, StepModel
from moesim.spec.scenario import load_scenario
from tests.scenarios import small, write

US = 1e-6
RANKS, LAYERS, BUDGET, PROMPT, OUTPUTS = 32, 16, 2048, 4096, 12
PROMPT_TOKEN, DECODE_TOKEN, EXPERTS = 1.0 * US, 0.1 * US, 3.0 * US
EXCHANGE = {"normal": 50.0 * US, "low_latency": 10.0 * US}
EAGER_LAYER = 20.0 * US  # as the rules of both engines have it
STEP_OVERHEAD = {"sglang": 500.0 * US, "vllm": 100.0 * US}


class ByHand:
    """Attention by tokens, experts and exchanges at fixed times, everything else for nothing."""

    def estimate(self, operation: Operation) -> Estimate:
        match operation:
            case Attention(phase="prefill"):
                seconds = operation.batch * operation.new_tokens * PROMPT_TOKEN
            case Attention():
                seconds = operation.batch * DECODE_TOKEN * np.ones_like(operation.prefix_tokens)
            case MoeExchange():
                seconds = np.full_like(operation.tokens, EXCHANGE[operation.mode])
            case ExpertGemm():
                seconds = np.full(operation.tokens.shape[:-1], EXPERTS)
            case Gemm():
                seconds = np.zeros_like(operation.m)
            case MemoryBound():
                seconds = np.zeros_like(operation.bytes)
            case _:
                raise AssertionError(operation)
        return estimate(seconds, Tag.MEASURED, "attention", 0.0, "by hand")


def stepmodel(folder: Path, engine: str) -> StepModel:
    data = small(
        cluster={"system": "h200_sxm", "nodes": 4, "gpus_per_node": 8},
        engine={"name": engine, "version": "1"},
        parallel={"attention_dp": RANKS, "ep": RANKS},
        placement={"solver": "contiguous", "redundant_experts": 0},
    )
    data["serving"]["workload"].update(isl=PROMPT, osl=OUTPUTS)
    data["serving"]["batching"].update(max_batch_tokens_per_dp_rank=BUDGET)
    deployment = resolve(groundwork(load_scenario(write(folder, data))))
    assert deployment.setup.model.layers == LAYERS
    return StepModel(replace(deployment, ground=replace(deployment.ground, costs=ByHand())), seed=0)


def prompt_step(engine: str, tokens: int, beside: int) -> float:
    """A step in which one rank reads `tokens` and decodes `beside` sequences; the other 31 decode."""
    attention = tokens * PROMPT_TOKEN + beside * DECODE_TOKEN
    return STEP_OVERHEAD[engine] + LAYERS * (EAGER_LAYER + attention + EXCHANGE["normal"] * 2 + EXPERTS)


def decode_step(engine: str, most: int) -> float:
    """A step in which the fullest rank decodes `most` sequences."""
    return STEP_OVERHEAD[engine] + LAYERS * (most * DECODE_TOKEN + EXCHANGE["low_latency"] * 2 + EXPERTS)


# SGLang's rank 0 reads before it decodes: two whole chunks. vLLM's keeps a token of each batch for its own request, so
# that two tokens are left for a third step.
STEPS = {
    "sglang": [prompt_step("sglang", 2048, 0)] * 2,
    "vllm": [prompt_step("vllm", 2047, 1)] * 2 + [prompt_step("vllm", 2, 1)],
}


@pytest.mark.parametrize("fidelity", ["table", "maxplus"])
@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_the_group_follows_the_prompt(engine: str, fidelity: str, tmp_path: Path) -> None:
    model = stepmodel(tmp_path, engine)
    # A short request for each rank, then the long one, which goes to rank 0 while all 32 decode.
    isl = np.asarray([1] * RANKS + [PROMPT])
    arrival_s = np.asarray([0.0] * RANKS + [prompt_step(engine, 1, 0) + 2.5 * decode_step(engine, 1)])
    timed = model.base if fidelity == "table" else ExactModel(model, "maxplus")
    load = Load(isl, np.full(RANKS + 1, OUTPUTS), arrival_s=arrival_s)
    served = serve(load, model.limits, ranks=RANKS, instances=1, step_time=timed)

    reading = STEPS[engine]
    expected = [prompt_step(engine, 1, 0)] + [decode_step(engine, 1)] * 3 + reading
    assert served.step_s[: len(expected)] == pytest.approx(expected, rel=1e-9)
    assert reading[0] > 25 * decode_step(engine, 1)  # what every decoding rank feels
    # The 31 ranks that only decode get a token in each of those steps, however long.
    decoding = served.step_decode_seqs[4 : 4 + len(reading)]
    assert decoding.tolist() == [31 if engine == "sglang" else 32] * len(reading)
    # From then on rank 0 decodes two sequences, and everybody waits for its attention.
    assert served.finish_s[1] == pytest.approx(
        sum(expected) + (OUTPUTS - 4 - len(reading)) * decode_step(engine, 2), rel=1e-9
    )
    # SGLang stalls rank 0's own request for both chunks; vLLM serves it along.
    stalled = len(reading) if engine == "sglang" else 0
    assert served.finish_s[0] == pytest.approx(served.finish_s[1] + stalled * decode_step(engine, 2), rel=1e-9)
    start = served.step_start_s[4]
    assert served.first_token_s[RANKS] == pytest.approx(start + sum(reading), rel=1e-9)
    assert served.gaps_s.max() == pytest.approx(
        sum(reading) + decode_step(engine, 2) if engine == "sglang" else max(reading), rel=1e-9
    )
