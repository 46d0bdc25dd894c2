"""Speculative decoding: how many tokens a step makes, and what verifying and drafting cost, by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.cli import run
from moesim.cost.estimate import Estimate, Tag, estimate
from moesim.cost.ops import ExpertGemm, Gemm, MemoryBound, MlaAbsorb, MlaAttention, MoeExchange, Operation
from moesim.engine.batch_state import Limits, Plan, new_plan
from moesim.engine.batcher import accepted_tokens
from moesim.engine.deployment import groundwork, resolve
from moesim.engine.serving import Load, Served, serve
from moesim.engine.stepmodel import ExactModel, StepModel
from moesim.spec.scenario import load_scenario
from tests.scenarios import small, write

WIDE = 1_000_000


def served(drafts: int, acceptance: float, osl: int = 5, requests: int = 1) -> Served:
    limits = Limits(WIDE, 8, WIDE, True, False, draft_tokens=drafts, acceptance=acceptance)
    load = Load(np.full(requests, 10), np.full(requests, osl), arrival_s=np.zeros(requests))

    def second(plan: Plan) -> float:
        return 1.0

    return serve(load, limits, ranks=1, instances=1, step_time=second)


def test_accepted_drafts_shorten_the_output() -> None:
    # The first token at 1, then four more: one a step, two a step, or as many as are still asked for.
    assert served(1, 0.0).finish_s.tolist() == [5.0]
    assert served(1, 1.0).finish_s.tolist() == [3.0]
    assert served(7, 1.0).finish_s.tolist() == [2.0]
    assert sorted(served(1, 1.0).gaps_s.tolist()) == [0, 0, 1, 1]


@pytest.mark.parametrize("drafts", [1, 2, 4])
@pytest.mark.parametrize("acceptance", [0.3, 0.8])
def test_accepted_in_a_row(drafts: int, acceptance: float) -> None:
    limits = Limits(1, 1, 1, True, False, draft_tokens=drafts, acceptance=acceptance, draft_seed=5)
    drawn = np.asarray([accepted_tokens(limits, request, place) for request in range(300) for place in range(200)])
    for count in range(1, drafts + 1):
        assert (drawn >= count).mean() == pytest.approx(acceptance**count, abs=0.007)
    mean = sum(acceptance**count for count in range(1, drafts + 1))
    assert drawn.mean() == pytest.approx(mean, rel=0.02)
    # Neighbours in the same request are not alike by more than chance.
    lucky = (drawn > 0).reshape(300, 200)
    assert abs(np.corrcoef(lucky[:, :-1].ravel(), lucky[:, 1:].ravel())[0, 1]) < 0.02


def test_a_long_run_makes_the_mean_number_of_tokens() -> None:
    found = served(2, 0.6, osl=4000, requests=8)
    assert found.gap_n.sum() / found.step_decode_seqs.sum() == pytest.approx(1 + 0.6 + 0.36, rel=0.02)


US = 1e-6
DECODE, EXPERTS, EXCHANGE, LOGITS, PROJECTION, OVERHEAD = 2.0 * US, 3.0 * US, 10.0 * US, 70.0 * US, 5.0 * US, 500.0 * US
LAYERS, MOE_LAYERS, HIDDEN, BLOCKS = 61, 58, 7168, 2  # a vocabulary of 129,280 is priced as two blocks of columns


class ByHand:
    """DeepSeek-V3's decode: attention by sequences, experts, exchanges, logits and the projection at fixed times."""

    def estimate(self, operation: Operation) -> Estimate:
        match operation:
            case MlaAttention():
                seconds = operation.batch * DECODE * np.ones_like(operation.prefix_tokens)
            case MoeExchange():
                seconds = np.full_like(operation.tokens, EXCHANGE)
            case ExpertGemm():
                seconds = np.full(operation.tokens.shape[:-1], EXPERTS)
            case Gemm():
                price = LOGITS if operation.n == 64_640 else PROJECTION if operation.k == 2 * HIDDEN else 0.0
                seconds = np.full_like(operation.m, price)
            case MlaAbsorb():
                seconds = np.zeros_like(operation.tokens)
            case MemoryBound():
                seconds = np.zeros_like(operation.bytes)
            case _:
                raise AssertionError(operation)
        return estimate(seconds, Tag.MEASURED, "attention", 0.0, "by hand")


def deepseek(**speculative: Any) -> dict[str, Any]:
    data = small(
        model="deepseek-ai/DeepSeek-V3",
        cluster={"system": "h200_sxm", "nodes": 2, "gpus_per_node": 8},
        parallel={"attention_dp": 16, "ep": 16},
        placement={"solver": "contiguous", "redundant_experts": 0},
        precision={"dense": "fp8_block", "experts": "fp8_block"},
    )
    data["serving"]["speculative"] = speculative or None
    return data


@pytest.mark.parametrize("drafts", [1, 3])
@pytest.mark.parametrize("fidelity", ["table", "maxplus"])
def test_verifying_and_drafting_by_hand(drafts: int, fidelity: str, tmp_path: Path) -> None:
    scenario = load_scenario(write(tmp_path, deepseek(method="mtp", draft_tokens=drafts, acceptance=0.5)))
    deployment = resolve(groundwork(scenario))
    model = StepModel(replace(deployment, ground=replace(deployment.ground, costs=ByHand())), seed=0)
    assert model.limits.max_running == min(64, 128 // (1 + drafts))
    assert (model.limits.draft_tokens, model.limits.acceptance) == (drafts, 0.5)
    plan = new_plan(16, model.limits.max_running)
    plan.decode_seqs[:], plan.decode_kv[:] = 4, 4 * 200.0
    moe = MOE_LAYERS * (2 * EXCHANGE + EXPERTS)
    verify = OVERHEAD + LAYERS * 4 * (1 + drafts) * DECODE + moe + BLOCKS * LOGITS
    one_pass = (LAYERS * 4 * DECODE + moe) / LAYERS + BLOCKS * LOGITS + PROJECTION
    timed = model.base if fidelity == "table" else ExactModel(model, "maxplus")
    assert timed(plan) == pytest.approx(verify + drafts * one_pass, rel=1e-9)


def test_what_speculation_brings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {}
    for name, asked in (
        ("none", {}),
        ("poor", {"method": "mtp", "draft_tokens": 1, "acceptance": 0.0}),
        ("good", {"method": "mtp", "draft_tokens": 1, "acceptance": 0.9}),
    ):
        data = deepseek(**asked)
        data["serving"]["workload"].update(osl=60, requests=40, arrivals={"concurrency": 16})
        assert run(["simulate", str(write(tmp_path, data)), "--json", "--draws", "0"]) == 0
        found[name] = json.loads(capsys.readouterr().out)
    tpot = {name: one["metrics"]["tpot_s"]["mean"] for name, one in found.items()}
    assert tpot["good"] < tpot["none"] < tpot["poor"]
    assert found["good"]["serving"]["tokens_per_decode_step"] == pytest.approx(1.9, abs=0.03)
    assert found["none"]["serving"]["tokens_per_decode_step"] == 1.0
    assert found["poor"]["memory"]["ledger"]["weights_mtp"] > 0
    assert "weights_mtp" not in found["none"]["memory"]["ledger"]


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (deepseek(method="eagle", draft_tokens=1, acceptance=0.5), "eagle"),
        (deepseek(method="mtp", draft_tokens=200, acceptance=0.5), "serving.speculative.draft_tokens"),
        (
            small(serving={**small()["serving"], "speculative": {"draft_tokens": 1, "acceptance": 0.5}}),
            "no multi-token-prediction layer",
        ),
    ],
)
def test_what_cannot_draft_is_refused(
    data: dict[str, Any], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["simulate", str(write(tmp_path, data)), "--json"]) == 2
    said = capsys.readouterr().err.strip()
    assert told in said
    assert "\n" not in said
