"""`simulate --explain`: figures that add up, for every layout, and what a person reads."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.cli import run
from moesim.engine.deployment import groundwork, resolve
from moesim.engine.explain import explain
from moesim.engine.simulate import Simulation, simulate, typical_decode
from moesim.engine.stepbytes import StepBytes, step_bytes
from moesim.errors import OutsideProfile
from moesim.graph.batch import step_batch
from moesim.graph.pricing import Pricer
from moesim.network.traffic import message_bytes
from moesim.output.network import of_simulation
from moesim.spec.scenario import Scenario
from tests.scenarios import small, write

LAYOUTS: list[dict[str, Any]] = [
    {},
    {"policies": {"schedule": "two_batch"}},
    {"engine": {"name": "vllm", "version": "1"}},
    {"parallel": {"tp": 2, "attention_dp": 4, "ep": 8}, "placement": {"solver": "contiguous"}},
    {"parallel": {"tp": 8, "expert_tp": 8}, "policies": {"dispatch": {"backend": "allreduce"}},
     "placement": {"solver": "contiguous"}},
    {"policies": {"dispatch": {"backend": "alltoall"}}},
    {"policies": {"dispatch": {"backend": "allgather_reducescatter"}}},
    {"parallel": {"attention_dp": 4, "ep": 4}},
    {"cluster": {"system": "h200_sxm", "nodes": 2, "gpus_per_node": 8}, "parallel": {"attention_dp": 16, "ep": 16},
     "placement": {"solver": "greedy", "redundant_experts": 16}},
    {"policies": {"schedule": "pipeline", "overlap": {"slowdown": {"compute": 1.2, "communication": 1.3}}}},
    {"policies": {"dispatch": {"backend": "alltoall", "replica": "lp"}}},
    {"policies": {"storage": "offload"}},
    {"policies": {"gate": "expert_choice", "capacity": {"rule": "megatron", "factor": 1.0}}},
    {"parallel": {"tp": 2, "attention_dp": 4, "ep": 8}, "policies": {"dispatch": {"backend": "tp_dedup"}}},
]  # fmt: skip


def simulated(**changes: Any) -> Simulation:
    return simulate(resolve(groundwork(Scenario.read(small(**changes), where="test"))), draws=0)


@pytest.mark.parametrize("changes", LAYOUTS, ids=str)
def test_every_explained_step_adds_up(changes: dict[str, Any]) -> None:
    simulation = simulated(**changes)
    found = explain(simulation)
    assert found.not_priced == {}
    assert {step.kind for step in found.steps} == {"decode", "prefill"}
    for step in found.steps:
        ranks = simulation.deployment.setup.parallel.gpus
        assert sum(step.critical_path_s.values()) == pytest.approx(step.step_s, rel=1e-9)
        assert set(step.critical_path_s) <= set(step.busy_s)
        for name, seconds in step.free_operation_s.items():
            least = step.step_s - step.critical_path_s.get(name, 0.0)
            assert least * (1 - 1e-9) <= seconds <= step.step_s * (1 + 1e-12)
        assert all(seconds <= step.step_s * (1 + 1e-12) for seconds in step.what_if_s.values())
        if "dispatch" in step.critical_path_s and "policies" not in changes:  # two batches may hide all of it
            assert step.what_if_s["infinite_network"] < step.step_s
        assert step.exchange_evened
        assert step.exposed_s.shape == step.waited_s.shape == (ranks,)
        assert (step.exposed_s >= 0).all()
        waited = sum(step.waited_for_operation_s.values(), np.zeros(ranks))
        np.testing.assert_allclose(waited, step.waited_s, atol=1e-9 * step.step_s)
        assert step.waited_for_rank_s.sum() == pytest.approx(step.waited_s.mean(), abs=1e-9 * step.step_s)
        assert [layer.layer for layer in step.layers] == list(simulation.deployment.setup.model.moe.layer_ids)
        assert all(layer.rank_over_mean >= 1 and layer.expert_over_mean >= 1 for layer in step.layers)
    shares = {step.kind: step.share_of_time for step in found.steps}
    assert sum(shares.values()) == pytest.approx(1.0)


def test_an_even_routing_on_an_even_placement_leaves_nothing_to_balance_in_decode() -> None:
    simulation = simulated(
        routing={"synthetic": {"kind": "uniform", "workloads": 1}, "holdout": {"by": "none"}},
        placement={"solver": "contiguous"},
    )
    (step,) = (one for one in explain(simulation).steps if (one.kind, one.which) == ("decode", "typical"))
    # What is left is chance: single steps are not even.
    assert 0.9 < step.what_if_s["perfect_balance"] / step.step_s <= 1.0


def test_one_long_prompt_is_what_the_others_wait_for() -> None:
    data = small()
    data["serving"]["workload"] |= {
        "isl": 2048,
        "osl": 4,
        "requests": 8,
        "arrivals": {"poisson": {"requests_per_s": 5}},
    }
    simulation = simulate(resolve(groundwork(Scenario.read(data, where="test"))), draws=0)
    (step,) = (one for one in explain(simulation).steps if one.kind == "prefill")
    assert step.reading_ranks == 1
    assert step.waited_for_rank_s[0] > 0.9 * step.waited_for_rank_s.sum()
    assert step.waited_s[0] < 0.05 * step.waited_s[1:].min()
    assert step.what_if_s["perfect_balance"] < 0.9 * step.step_s


def traffic_of(simulation: Simulation, mode: str) -> StepBytes:
    """Eight tokens on every GPU, every expert picked as often."""
    setup = simulation.deployment.setup
    moe = setup.model.moe
    gpus = setup.parallel.gpus
    batch = step_batch(ranks=gpus, decode_seqs=np.full((1, gpus), 8.0), decode_kv=1.0)
    counts = np.full((1, setup.model.moe_layers, moe.experts), 8.0 * gpus * moe.top_k / moe.experts)
    found = step_bytes(simulation.model.pricer, [(batch, counts)], mode)
    assert found is not None
    return found


def test_bytes_of_an_even_low_latency_exchange_by_hand() -> None:
    simulation = simulated(
        cluster={"system": "h200_sxm", "nodes": 2, "gpus_per_node": 8},
        parallel={"attention_dp": 16, "ep": 16},
        placement={"solver": "contiguous"},
    )
    found, setup = traffic_of(simulation, "low_latency"), simulation.deployment.setup
    size = {
        step: message_bytes(step, "low_latency", hidden=2048, dtype="bf16", top_k=8)  # type: ignore[arg-type]
        for step in ("dispatch", "combine")
    }
    # A GPU sends 8 tokens x 8 picks a layer: a sixteenth to each GPU, so a half over its NIC, 7/16 over NVLink.
    copies = 8 * 8 * setup.model.moe_layers
    both = size["dispatch"] + size["combine"]
    np.testing.assert_allclose(found.endpoints["nic_out"], copies / 2 * both)
    np.testing.assert_allclose(found.endpoints["nvlink_in"], copies * 7 / 16 * both)
    by_link = {load.link: load for load in found.links}
    assert by_link["nic3", "leaf3"].dispatch_bytes == pytest.approx(copies / 2 * size["dispatch"])
    assert by_link["leaf3", "nic3"].combine_bytes == pytest.approx(copies / 2 * size["combine"])
    assert found.links[0].full_rate_s == max(load.full_rate_s for load in found.links)
    assert found.tag == "formula"


@pytest.mark.parametrize("mode", ["normal", "low_latency"])
def test_bytes_out_are_bytes_in(mode: str) -> None:
    simulation = simulated(
        cluster={"system": "h200_sxm", "nodes": 2, "gpus_per_node": 8}, parallel={"attention_dp": 16, "ep": 16},
        placement={"solver": "greedy", "redundant_experts": 16},
    )  # fmt: skip
    found = traffic_of(simulation, mode)
    for leg in ("nic", "nvlink"):
        assert found.endpoints[f"{leg}_out"].sum() == pytest.approx(found.endpoints[f"{leg}_in"].sum())
    up = sum(load.dispatch_bytes + load.combine_bytes for load in found.links if load.link[0].startswith("nic"))
    # NIC to leaf: what leaves over NICs; in normal mode a token leaves along its sender's own rail.
    out_of_nics = sum(
        load.dispatch_bytes + load.combine_bytes for load in found.links if load.link[1].startswith("leaf")
    ) - sum(load.dispatch_bytes + load.combine_bytes for load in found.links if load.link[0] == "spine")
    assert out_of_nics == pytest.approx(found.endpoints["nic_out"].sum())
    assert up > 0


def test_a_collective_of_a_library_has_no_bytes_by_link() -> None:
    simulation = simulated(policies={"dispatch": {"backend": "allgather_reducescatter"}})
    assert all(step.traffic is None for step in explain(simulation).steps)


def test_a_step_without_a_price_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    simulation = simulated()
    price = Pricer.price

    def refuse(self: Pricer, batch: Any, *given: Any, **more: Any) -> Any:
        if batch.prefill_seqs.any():
            raise OutsideProfile("no prompts", where="test", mend="measure them")
        return price(self, batch, *given, **more)

    monkeypatch.setattr(Pricer, "price", refuse)
    found = explain(simulation)
    assert {step.kind for step in found.steps} == {"decode"}
    assert "no prompts" in found.not_priced["prefill, typical"]


def test_json_console_and_page_tell_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, small())
    assert run(["simulate", str(path), "--json", "--draws", "0", "--explain"]) == 0
    with_it = json.loads(capsys.readouterr().out)
    assert run(["simulate", str(path), "--json", "--draws", "0"]) == 0
    without = json.loads(capsys.readouterr().out)
    explained = with_it.pop("explain")
    assert {**with_it, "run": 0} == {**without, "run": 0}  # explaining changes nothing else
    for step in explained["steps"]:
        assert sum(step["critical_path_s"].values()) == pytest.approx(step["step_s"], rel=1e-9)
        for name, change in step["without_operation"].items():
            assert change["saves"] <= step["critical_path_s"].get(name, 0.0) / step["step_s"] + 1e-9
    assert run(["simulate", str(path), "--draws", "0", "--explain", "--report", str(tmp_path / "r.html")]) == 0
    printed = capsys.readouterr().out
    for wanted in ("A typical decode step on 8 GPUs", "with perfect balance", "Hottest: layer", "Busiest links"):
        assert wanted in printed
    page = ET.fromstring((tmp_path / "r.html").read_text().removeprefix("<!DOCTYPE html>\n"))
    (section,) = (one for one in page.iter("section") if one.get("id") == "why")
    told = [float(data.get("value", "nan")) for data in section.iter("data")]
    for step in explained["steps"]:
        assert step["step_s"] in told
        assert set(step["critical_path_s"].values()) <= set(told)


def test_the_event_executor_explains_the_same_without_contention() -> None:
    data = small()
    data["serving"]["workload"] |= {"requests": 8, "osl": 3}
    deployment = resolve(groundwork(Scenario.read(data, where="test")))
    fast, careful = (
        [step for step in explain(simulate(deployment, draws=0, fidelity=fidelity)).steps if step.kind == "prefill"]  # type: ignore[arg-type]
        for fidelity in ("maxplus", "des")
    )
    for one, other in zip(fast, careful, strict=True):
        assert one.step_s == pytest.approx(other.step_s, rel=1e-9)
        assert one.critical_path_s == pytest.approx(other.critical_path_s, rel=1e-9)
        assert one.what_if_s == pytest.approx(other.what_if_s, rel=1e-9)


def test_a_cluster_that_others_use_is_not_explained_and_says_why() -> None:
    job = {"kind": "stream", "gpus": [0], "to": [1], "bytes_per_s": 1e9}
    data = small(policies={"dispatch": {"backend": "alltoall"}})
    data["cluster"]["background"] = [job]
    data["serving"]["workload"] |= {"requests": 4, "osl": 3}
    found = explain(simulate(resolve(groundwork(Scenario.read(data, where="test"))), draws=0, fidelity="des"))
    assert found.steps == ()
    assert "other jobs" in found.not_priced["every step"]


def test_the_link_bytes_of_a_step_are_those_that_network_tells() -> None:
    """The same rules count both; the routing is drawn anew, so they agree as far as chance lets them."""
    simulation = simulated(policies={"dispatch": {"backend": "alltoall"}})
    (step,) = (one for one in explain(simulation).steps if (one.kind, one.which) == ("decode", "typical"))
    told = of_simulation(simulation, typical_decode(simulation))
    assert step.traffic is not None
    for phase, bytes_of in (("dispatch", "dispatch_bytes"), ("combine", "combine_bytes")):
        whole = sum(link["bytes"] for link in told[phase]["by_link"])
        assert sum(getattr(load, bytes_of) for load in step.traffic.links) == pytest.approx(whole, rel=0.1)
