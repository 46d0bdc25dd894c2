"""Prefill and decode pools: transfers by hand, every token once, roles as a user asks for them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.cli import run
from moesim.engine.batch_state import Limits, Plan
from moesim.engine.deployment import groundwork, resolve
from moesim.engine.memory_rules import SGLANG, VLLM
from moesim.engine.roles import RolePool, Transfer, serve_roles
from moesim.engine.serving import Load
from moesim.engine.simulate import kv_transfer
from moesim.errors import Infeasible
from moesim.spec.scenario import load_scenario
from tests.scenarios import small, write

LIMITS = Limits(10, 8, 1000, True, False)
SLOW = Transfer(bytes_per_token=1.0, gpus=2, bytes_per_s=5.0, latency_s=0.0, layers=2, by_layer=False)


def second(plan: Plan) -> float:
    return 1.0


def pool(limits: Limits = LIMITS, ranks: int = 1, instances: int = 1) -> RolePool:
    return RolePool(limits, ranks, instances, second)


def two(osl: int = 3) -> Load:
    return Load(np.asarray([10, 10]), np.asarray([osl, osl]), arrival_s=np.zeros(2))


def test_transfers_take_turns_on_a_nic() -> None:
    # Prompts are read by 1 and 2; each cache takes 2 s: on the way from 1 to 3 and, as the NIC is busy, from 3 to 5.
    served = serve_roles(two(), pool(), pool(), SLOW)
    assert served.first_token_s.tolist() == [3.0, 5.0]
    assert served.finish_s.tolist() == [5.0, 7.0]
    assert served.prefill is not None
    assert served.prefill.transfer_s.tolist() == [2.0, 3.0]
    assert served.prefill.served.first_token_s.tolist() == [1.0, 2.0]
    assert served.prefill.transfer_bytes == 2 * 10 * 2  # both prompts, both GPUs of a rank
    assert served.step_prefill_tokens.sum() == 0


def test_two_senders_still_meet_at_the_receivers_nic() -> None:
    served = serve_roles(two(), pool(ranks=2), pool(), SLOW)  # both read by 1
    assert served.first_token_s.tolist() == [3.0, 5.0]
    apart = serve_roles(two(), pool(ranks=2), pool(ranks=2), SLOW)
    assert apart.first_token_s.tolist() == [3.0, 3.0]


def test_layers_leave_while_the_prompt_is_read() -> None:
    # From 0 on, when the only step of the prompt began, to 2; then the second, ready from 1 on, from 2 to 4.
    served = serve_roles(two(), pool(), pool(), replace(SLOW, by_layer=True))
    assert served.first_token_s.tolist() == [2.0, 4.0]
    # A fast NIC waits for the last of the two layers: half of 0.2 s after the step.
    fast = serve_roles(two(), pool(), pool(), replace(SLOW, by_layer=True, bytes_per_s=50.0))
    assert fast.first_token_s.tolist() == pytest.approx([1.1, 2.1])


def test_one_token_is_answered_where_it_was_made() -> None:
    served = serve_roles(two(osl=1), pool(), pool(), SLOW)
    assert served.finish_s.tolist() == [1.0, 2.0]
    assert served.steps == 0
    assert served.prefill is not None
    assert np.isnan(served.prefill.transfer_s).all()


def test_a_closed_loop_keeps_its_concurrency() -> None:
    load = Load(np.full(30, 10), np.full(30, 4), concurrency=3)
    served = serve_roles(load, pool(), pool(), SLOW)
    assert np.isfinite(served.finish_s).all()
    inside = [((served.arrival_s <= t) & (served.finish_s > t)).sum() for t in np.arange(0.5, served.duration_s)]
    assert max(inside) == 3


@pytest.mark.parametrize("rule", [SGLANG._replace(first_ratio=0.0, last_ratio=0.0), VLLM])
@pytest.mark.parametrize("balance", ["round_robin", "shortest_queue", "fewest_tokens"])
def test_every_token_is_made_once_though_decode_runs_out_of_memory(rule: Any, balance: str) -> None:
    rng = np.random.default_rng(3)
    isl, osl = rng.integers(1, 60, 80), rng.integers(1, 40, 80)
    load = Load(isl, osl, arrival_s=np.cumsum(rng.exponential(1.0, 80)))
    decode = Limits(64, 8, 160, True, rule is VLLM, rule)
    served = serve_roles(load, pool(ranks=2), pool(decode, 2, 2), replace(SLOW, bytes_per_s=100.0), balance=balance)
    assert np.isfinite(served.finish_s).all()
    assert served.preemptions > 0
    assert served.gap_n.sum() == (osl - 1).sum()
    assert served.peak_kv_tokens <= 160
    assert served.prefill is not None
    assert served.prefill.served.step_prefill_tokens.sum() == isl.sum()
    assert served.step_prefill_tokens.sum() > 0  # what was preempted is read again in the decode pool
    assert (served.first_token_s >= served.prefill.served.first_token_s).all()


def test_a_request_that_one_role_cannot_hold_is_refused() -> None:
    with pytest.raises(Infeasible):
        serve_roles(two(), pool(), pool(Limits(10, 8, 12, True, False)), SLOW)


def roles(**changes: Any) -> dict[str, Any]:
    data = small(parallel=None)
    data["serving"]["roles"] = {
        "prefill": {"gpus": 4, "placement": {"redundant_experts": 0}, "policies": {"dispatch": {"mode": "normal"}}},
        "decode": {"gpus": 2, "replicas": 2, "batching": {"max_running_requests_per_dp_rank": 32}},
        **changes,
    }
    return data


def test_roles_take_what_they_leave_out_from_above(tmp_path: Path) -> None:
    decode = resolve(groundwork(load_scenario(write(tmp_path, roles(transfer="by_layer")))))
    prefill = decode.prefill
    assert prefill is not None
    assert (prefill.setup.parallel.ep, prefill.instances) == (4, 1)
    assert (decode.setup.parallel.ep, decode.instances) == (2, 2)
    assert (prefill.setup.placement.redundant, decode.setup.placement.redundant) == (0, 8)
    assert (prefill.setup.policies.dispatch.mode, decode.setup.policies.dispatch.mode) == ("normal", "auto")
    assert prefill.serving.batching.max_running_requests_per_dp_rank == 64
    assert decode.serving.batching.max_running_requests_per_dp_rank == 32
    assert decode.ground.cluster.gpus == 8
    transfer = kv_transfer(decode)
    assert transfer.by_layer
    # OLMoE: 16 layers of 16 KV heads of 128, keys and values, two bytes each.
    assert transfer.bytes_per_token == 16 * 2 * 16 * 128 * 2


def test_a_run_tells_of_each_role(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["simulate", str(write(tmp_path, roles())), "--json", "--draws", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    told = found["metrics"]["roles"]
    assert found["metrics"]["requests_completed"] == 120
    assert found["metrics"]["output_tokens_per_s_per_gpu"] == pytest.approx(found["metrics"]["output_tokens_per_s"] / 8)
    assert told["prefill"]["ttft_s"]["p50"] < found["metrics"]["ttft_s"]["p50"]
    assert told["decode"]["tpot_s"] == found["metrics"]["tpot_s"]
    assert 0 < told["decode"]["busy"] <= 1
    assert told["transfer"]["transfer_s"]["mean"] > 0
    assert "roles.prefill.ttft_s.p99" in found["intervals"]
    assert sum(found["provenance"].values()) == pytest.approx(1.0)
    assert [found["serving"]["roles"][name]["gpus"] for name in ("prefill", "decode")] == [4, 4]


def test_the_report_and_the_timeline_of_roles(tmp_path: Path) -> None:
    page, trace = tmp_path / "page.html", tmp_path / "trace.json.gz"
    asked = ["simulate", str(write(tmp_path, roles())), "--draws", "1", "--report", str(page), "--timeline", str(trace)]
    assert run(asked) == 0
    assert "roles.prefill.ttft_s.p99" in page.read_text()
    assert trace.stat().st_size > 0


@pytest.mark.parametrize(
    ("changes", "code", "told"),
    [
        (["serving.roles.decode.replicas=3"], 1, "10 GPUs"),
        (["serving.roles.prefill.gpus=3"], 1, "serving.roles.prefill.gpus"),
        (["serving.balance=central_queue"], 2, "serving.balance"),
        (["serving.roles.decode.policies={schedule: none}"], 2, "serving.roles.decode.policies"),
        (["serving.roles.decode.batching={tokens: 4}"], 2, "unknown key"),
    ],
)
def test_roles_that_cannot_be_are_refused(
    changes: list[str], code: int, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["simulate", str(write(tmp_path, roles())), *(part for one in changes for part in ("--set", one))]
    assert run(asked) == code
    said = capsys.readouterr().err.strip()
    assert told in said
    assert "\n" not in said


def test_place_does_not_compare_roles(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["place", str(write(tmp_path, roles())), "--gpus", "8", "--slots", "72"]
    assert run(asked) == 2
    assert "serving.roles" in capsys.readouterr().err
