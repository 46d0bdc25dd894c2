"""`policies.gate` and `policies.capacity` in a scenario: what they change, and what is refused by name."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.cli import run
from moesim.cost.estimate import CostModel, Estimate
from moesim.cost.ops import Collective, ExpertGemm, MoeExchange, Operation
from moesim.engine.batcher import new_plan
from moesim.engine.deployment import Deployment, groundwork, resolve
from moesim.engine.stepmodel import ExactModel, StepModel
from moesim.graph.batch import step_batch
from moesim.graph.pricing import Pricer, capacity_sources
from moesim.routing.capacity.on_counts import cap_counts
from moesim.routing.capacity.rule import CapacityRule
from moesim.routing.gates.loads import gate_loads, hashed_chances
from moesim.routing.gates.registry import GATES
from moesim.routing.synth import deepseek_like
from moesim.routing.trace import RoutingCounts
from moesim.spec.gate import GateSpec
from moesim.spec.hf import load_model
from moesim.spec.scenario import load_scenario
from tests.scenarios import small, write

RANKS = 8
GROUPED = ("group_limited", "device_limited", "two_level")
RUNNABLE = [name for name, kind in GATES.items() if not kind.refused]
ALLTOALL = {"dispatch": {"backend": "alltoall"}}
CAPPED = {"rule": "megatron", "factor": 1.0}


def gate_of(name: str) -> Any:
    return {"name": name, "groups": 8, "top_groups": 2} if name in GROUPED else name


def deployed(tmp_path: Path, **policies: Any) -> Deployment:
    routing = {"synthetic": {"kind": "lognormal", "sigma": 0.7, "workloads": 2}}
    return resolve(groundwork(load_scenario(write(tmp_path, small(policies=policies, routing=routing)))))


def simulated(tmp_path: Path, capsys: pytest.CaptureFixture[str], **policies: Any) -> dict[str, Any]:
    path = write(tmp_path, small(policies=policies))
    assert run(["simulate", str(path), "--json", "--draws", "0"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], **policies: Any) -> tuple[int, str]:
    code = run(["simulate", str(write(tmp_path, small(policies=policies))), "--json", "--draws", "0"])
    return code, capsys.readouterr().err


@pytest.mark.parametrize("name", RUNNABLE)
def test_a_gate_runs_and_both_executors_agree(name: str, tmp_path: Path) -> None:
    model = StepModel(deployed(tmp_path, gate=gate_of(name)), seed=0)
    top_k = model.deployment.setup.model.moe.top_k
    counts = model.routing.counts(0, np.full(5, 400), np.random.default_rng(0))
    assert (counts >= 0).all()
    assert counts.max() <= 400
    if GATES[name].law != "variable":
        assert (counts.sum(axis=2) == 400 * top_k).all()
    batch = step_batch(ranks=RANKS, decode_seqs=np.full((1, RANKS), 20.0), decode_kv=200.0)
    both = []
    for fidelity in ("maxplus", "des"):
        graph, times = ExactModel(model, fidelity).run(batch, "decode")
        both.append(float(times.step_s[0]))
        assert graph.ranks == RANKS
    assert both[0] == pytest.approx(both[1], rel=1e-9)


@pytest.mark.parametrize(
    "policies",
    [
        {"gate": "gumbel_topk", "capacity": CAPPED},
        {"gate": "expert_choice"},
        {"gate": "top_p"},
        {**ALLTOALL, "capacity": {**CAPPED, "pad": True}},
        {"schedule": "two_batch", "capacity": {**CAPPED, "backup": "next_best"}},
    ],
    ids=str,
)
def test_the_table_follows_the_executor(policies: dict[str, Any], tmp_path: Path) -> None:
    model = StepModel(deployed(tmp_path, **policies), seed=0)
    plan = new_plan(RANKS, model.limits.max_running)
    plan.decode_seqs[:], plan.decode_kv[:] = 24, 24 * 200.0
    exact = ExactModel(model, "maxplus")
    assert model.base(plan) == pytest.approx(float(np.mean([exact(plan) for _ in range(6)])), rel=0.03)


def test_the_models_own_gate_by_another_name_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, named = simulated(tmp_path, capsys), simulated(tmp_path, capsys, gate="softmax_topk")
    loads = [deployed(tmp_path, gate=gate).ground.judge[0].profile() for gate in ("model", "softmax_topk")]
    assert loads[1] == pytest.approx(loads[0], rel=1e-3)
    assert own["routing"]["gate"] == "model"
    assert own["routing"]["dropped_fraction"] == own["routing"]["padded_fraction"] == 0.0
    assert 0.0 < own["routing"]["by_phase"]["prefill"]["kernel_padded_fraction"] < 1.0
    assert named["routing"]["gate"] == "softmax_topk"
    assert sum(own["routing"]["utilisation"]["share"]) == pytest.approx(1.0)


def test_balancing_gates_even_the_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {gate: simulated(tmp_path, capsys, gate=gate)["routing"] for gate in ("model", "expert_choice", "dense")}
    assert found["expert_choice"]["entropy"] > found["model"]["entropy"]
    assert found["dense"]["entropy"] == pytest.approx(1.0)
    assert found["dense"]["per_step_max_over_mean"] == pytest.approx(1.0)


def test_a_group_limited_model_keeps_its_shares_under_its_own_gate() -> None:
    model = load_model("deepseek-ai/DeepSeek-V3")
    profile = deepseek_like(["decode"], layers=3, experts=256, groups=8, rng=np.random.default_rng(0))[0]
    load = RoutingCounts(profile[None], np.asarray(model.moe.layer_ids[:3]), 61, "synthetic")

    def under(gate: GateSpec) -> np.ndarray:
        (found,), gated = gate_loads((load,), gate, model, np.random.default_rng(1))
        assert found.counts.sum(axis=2) == pytest.approx(np.full((1, 3), gated.moe.top_k), abs=0.6)
        return found.profile()

    same = under(GateSpec(name="group_limited"))
    # The fit follows the sample, whose own scatter would be 9 % of a mean expert.
    assert np.abs(same - profile).sum() < 0.02 * profile.sum()
    assert np.corrcoef(same.ravel(), profile.ravel())[0, 1] > 0.999
    assert under(GateSpec(name="softmax_topk")).std() < profile.std() * 1.1
    assert under(GateSpec(name="bias_corrected")) == pytest.approx(1 / 256)
    assert gate_loads((load,), "model", model, np.random.default_rng(1))[1] is model


def test_a_hash_follows_how_often_tokens_come() -> None:
    chance = hashed_chances(129_280, 256, 1)
    assert chance.sum() == pytest.approx(1.0)
    assert chance.max() > 1 / np.log(129_280) / 1.2  # the commonest token alone
    assert hashed_chances(50_000, 64, 8).sum() == pytest.approx(8.0)


@dataclass
class Asked:
    """A cost model that keeps what was asked."""

    costs: CostModel
    operations: list[Operation] = field(default_factory=list)

    def estimate(self, operation: Operation) -> Estimate:
        self.operations.append(operation)
        return self.costs.estimate(operation)

    def of(self, kind: type) -> Any:
        return next(one for one in self.operations if isinstance(one, kind))


def asked(deployment: Deployment, counts: np.ndarray, tokens: float) -> Asked:
    costs = Asked(deployment.ground.costs)
    batch = step_batch(ranks=RANKS, decode_seqs=np.full((1, RANKS), tokens), decode_kv=100.0)
    Pricer(deployment.setup, costs).price(batch, counts, mode="normal", graphed=True)
    return costs


def test_dropped_tokens_are_neither_sent_nor_computed(tmp_path: Path) -> None:
    counts = np.zeros((1, 16, 64))
    counts[:, :, :8] = RANKS * 32.0  # every token of 32 on each rank picks the same eight experts
    free, capped = (asked(deployed(tmp_path, **ALLTOALL, capacity=rule), counts, 32.0) for rule in ({}, CAPPED))
    assert free.of(ExpertGemm).tokens.sum() == pytest.approx(counts.sum())
    assert capped.of(ExpertGemm).tokens.sum() == pytest.approx(counts.sum() / 8)  # ceil(32 x 8 / 64) of 32 are kept
    sent = [costs.of(Collective).bytes for costs in (free, capped)]
    assert sent[1] * 8 == pytest.approx(sent[0])


def test_deepep_forwards_a_token_to_fewer_ranks_when_picks_are_dropped(tmp_path: Path) -> None:
    """Normal mode sends once to each rank: evenly dropped picks thin out a token's ranks as fewer picks would."""
    counts = np.full((1, 16, 64), RANKS * 32.0 * 8 / 64)
    tokens = []
    for factor in (1e3, 0.25, 0.125):
        rule = {"rule": "survey", "factor": factor * 8}
        tokens.append(float(asked(deployed(tmp_path, capacity=rule), counts, 32.0).of(MoeExchange).tokens.mean()))
    free = float(asked(deployed(tmp_path), counts, 32.0).of(MoeExchange).tokens.mean())
    assert tokens[0] == pytest.approx(free)
    # 32 x 8 / 64 = 4 tokens an expert from each rank; 1 and 0 places of them (0.5, rounded down) are left at most.
    flow = cap_counts(counts, np.full((1, RANKS), 32.0), CapacityRule("survey", 2.0), top_k=8)
    kept = float(flow.processed.sum() / counts.sum())
    visit = 1 - comb(56, 8) / comb(64, 8)
    assert 0.2 < kept < 0.3
    assert tokens[1] / free == pytest.approx((1 - (1 - visit) ** kept) / visit, rel=0.05)
    assert tokens[2] < tokens[1]


def test_padding_sends_and_computes_the_whole_capacity(tmp_path: Path) -> None:
    deployment = deployed(tmp_path, **ALLTOALL, capacity={**CAPPED, "pad": True})
    skewed, even = np.zeros((1, 16, 64)), np.full((1, 16, 64), RANKS * 4.0)
    skewed[:, :, :8] = RANKS * 32.0
    first, second = (asked(deployment, counts, 32.0) for counts in (skewed, even))
    for costs in (first, second):
        assert costs.of(ExpertGemm).tokens.sum() == pytest.approx(16 * 64 * RANKS * 4)
    assert np.array_equal(first.of(ExpertGemm).tokens, second.of(ExpertGemm).tokens)
    assert first.of(Collective).bytes == pytest.approx(second.of(Collective).bytes)


def test_each_gpu_that_sends_keeps_its_own_capacity(tmp_path: Path) -> None:
    setup = deployed(tmp_path).setup
    tokens = np.asarray([[8.0, 4.0]])
    tensor = setup.parallel.model_copy(update={"tp": 4, "attention_dp": 2})
    split = replace(setup, parallel=tensor)
    assert capacity_sources(split, tokens).tolist() == [[2.0] * 4 + [1.0] * 4]
    dispatch = setup.policies.dispatch.model_copy(update={"backend": "allgather_reducescatter"})
    gathered = replace(split, policies=setup.policies.model_copy(update={"dispatch": dispatch}))
    assert capacity_sources(gathered, tokens).tolist() == [[8.0, 4.0]]


def test_a_run_tells_what_it_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {}
    for factor in (0.5, 1.0, 2.0, 50.0):
        found[factor] = simulated(tmp_path, capsys, capacity={"rule": "megatron", "factor": factor})["routing"]
    dropped = [found[factor]["dropped_fraction"] for factor in (0.5, 1.0, 2.0, 50.0)]
    assert dropped == sorted(dropped, reverse=True)
    assert 0.4 < dropped[0] < 0.7
    assert dropped[-1] == pytest.approx(0.0, abs=1e-9)
    told = found[1.0]
    assert told["capacity"] == {"rule": "megatron", "drop": "probability", "tag": "assumed"}
    phases = told["by_phase"]
    assert len(phases["decode"]["dropped_by_layer"]) == 16
    assert len(phases["prefill"]["dropped_by_expert"]) == 64
    low, high = sorted(phases[kind]["dropped_fraction"] for kind in ("decode", "prefill"))
    assert low <= told["dropped_fraction"] <= high
    moved = simulated(tmp_path, capsys, capacity={**CAPPED, "backup": "next_best"})["routing"]
    assert moved["dropped_fraction"] < 0.01
    assert moved["rerouted_fraction"] == pytest.approx(told["dropped_fraction"], rel=0.15)
    padded = simulated(tmp_path, capsys, **ALLTOALL, capacity={"rule": "deepspeed", "factor": 1.0})["routing"]
    assert padded["padded_fraction"] > 0.1


def test_a_person_is_told_what_was_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, small(policies={"capacity": CAPPED}))
    assert run(["simulate", str(path), "--draws", "0"]) == 0
    assert "of the picks dropped" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("policies", "code", "wanted"),
    [
        ({"gate": "nope"}, 2, "unknown gate 'nope'"),
        ({"gate": "soft"}, 2, "slots mix all tokens"),
        ({"gate": "sample"}, 2, "share a request"),
        ({"gate": "topology"}, 2, "a token's node"),
        ({"gate": {"name": "hash", "noise": 2.0}}, 2, "policies.gate.noise: gate hash takes no noise"),
        ({"gate": {"name": "hash", "nose": 1}}, 2, "known keys here: name, top_k"),
        ({"gate": {"name": "top_p", "threshold": 2}}, 2, "threshold"),
        ({"gate": 5}, 2, "policies.gate"),
        ({"gate": {"name": "model", "top_k": 2}}, 2, "takes no parameters"),
        ({"gate": {"name": "softmax_topk", "top_k": 99}}, 2, "more than the 64 experts"),
        ({"gate": "device_limited"}, 2, "the model has none"),
        ({"gate": {"name": "two_level", "groups": 8, "top_groups": 3}}, 2, "does not divide by 3"),
        ({"gate": {"name": "group_limited", "groups": 7, "top_groups": 3}}, 2, "do not divide into 7"),
        ({"gate": {"name": "group_limited", "groups": 32, "top_groups": 2}}, 2, "hold 4 experts"),
        ({"gate": {"name": "base", "top_k": 2}}, 2, "one expert"),
        ({"gate": {"name": "dense", "top_k": 2}}, 2, "every expert"),
        ({"capacity": {"rule": "gshard"}}, 2, "needs a factor"),
        ({"capacity": {"factor": 1.0}}, 2, "nothing is dropped"),
        ({"capacity": {"pad": True}}, 2, "nothing is dropped"),
        ({"capacity": {**CAPPED, "drop": "random"}}, 2, "drops by probability or position"),
        (
            {"capacity": {"rule": "deepspeed", "factor": 1.0, "drop": "position", "pad": False}},
            2,
            "drops by probability",
        ),
        ({"capacity": {**CAPPED, "min_capacity": 4}}, 2, "least capacity"),
        ({"capacity": {**CAPPED, "max_capacity": 4}}, 2, "cap"),
        ({"capacity": {"rule": "gshard", "factor": 1.0}}, 1, "DeepEP sends only"),
        ({"capacity": {"rule": "megatron", "factor": 1.0000001}}, 2, "at most 6 decimals"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    policies: dict[str, Any], code: int, wanted: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, told = refused(tmp_path, capsys, **policies)
    assert found == code
    assert wanted in told
    assert told.count("\n") == 1
