"""`simulate --explain` of runs with roles: each role's steps, and the KV transfer between them."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.cli import run
from moesim.engine.deployment import groundwork, resolve
from moesim.engine.explain import Explanation, explain
from moesim.engine.explain_transfer import explain_transfer
from moesim.engine.simulate import Simulation, kv_transfer, simulate
from moesim.errors import OutsideProfile
from moesim.graph.pricing import Pricer
from moesim.spec.scenario import Scenario
from tests.scenarios import small, write


def roles(transfer: str = "after", **workload: Any) -> dict[str, Any]:
    data = small(parallel=None)
    data["serving"]["roles"] = {
        "prefill": {"gpus": 4, "policies": {"dispatch": {"mode": "normal"}}},
        "decode": {"gpus": 2, "replicas": 2},
        "transfer": transfer,
    }
    data["serving"]["workload"] |= {"requests": 60, **workload}
    return data


def simulated(data: dict[str, Any]) -> Simulation:
    return simulate(resolve(groundwork(Scenario.read(data, where="test"))), draws=0)


@pytest.fixture(scope="module")
def both() -> tuple[Simulation, Explanation]:
    simulation = simulated(roles())
    return simulation, explain(simulation)


def test_the_steps_of_each_role_add_up_on_its_own_ranks(both: tuple[Simulation, Explanation]) -> None:
    _, found = both
    assert found.not_priced == {}
    told = [(step.role, step.kind, step.which) for step in found.steps]
    assert ("decode", "decode", "typical") in told
    assert ("prefill", "prefill", "typical") in told
    assert {(role, kind) for role, kind, _ in told} == {("decode", "decode"), ("prefill", "prefill")}
    for step in found.steps:
        assert len(step.waited_s) == {"decode": 2, "prefill": 4}[str(step.role)]
        assert step.share_of_time == pytest.approx(1.0)
        assert step.mode == {"decode": "low_latency", "prefill": "normal"}[str(step.role)]
        assert sum(step.critical_path_s.values()) == pytest.approx(step.step_s, rel=1e-9)
        assert len(step.layers) == 16
        for name, seconds in step.free_operation_s.items():
            assert step.step_s - seconds <= step.critical_path_s.get(name, 0.0) + 1e-9 * step.step_s


def test_the_parts_of_the_transfer_are_those_of_the_run(both: tuple[Simulation, Explanation]) -> None:
    simulation, found = both
    served, told = simulation.served, found.transfer
    assert told is not None and served.prefill is not None
    assert told.requests == 60
    # OLMoE: 16 layers of 16 KV heads of 128, keys and values, two bytes each; prompts of 256 tokens.
    assert told.bytes_per_request == 256 * 16 * 2 * 16 * 128 * 2
    assert told.bytes == 60 * told.bytes_per_request
    for by_rank in (told.sent_bytes, told.received_bytes):
        assert by_rank.shape == (4,)
        assert by_rank.sum() == pytest.approx(told.bytes)
    assert told.transfer_s.mean() == pytest.approx(told.alone_s + told.waited_s - told.hidden_s)
    assert told.alone_s == pytest.approx(kv_transfer(simulation.deployment).seconds(256))
    ttft_s = served.first_token_s - served.arrival_s
    read_s = served.prefill.served.first_token_s - served.prefill.served.arrival_s
    assert told.share_of_ttft == pytest.approx(1.0 - read_s.sum() / ttft_s.sum())
    # Prompts of an open loop are read as before, whatever happens to them afterwards.
    assert told.what_if_ttft_s["free_transfer"] == pytest.approx(read_s.mean())
    assert told.what_if_ttft_s["free_transfer"] <= told.what_if_ttft_s["by_layer"] <= told.ttft_s


def test_layers_that_leave_early_hide_the_transfer() -> None:
    told = explain_transfer(simulated(roles("by_layer")))
    assert told is not None
    assert told.hidden_s > 0
    assert told.transfer_s.mean() == pytest.approx(told.alone_s + told.waited_s - told.hidden_s)
    assert told.what_if_ttft_s["after_the_prompt"] > told.ttft_s


def test_a_crowd_at_one_receiver_waits_for_its_nic() -> None:
    data = roles(arrivals={"poisson": {"requests_per_s": 4000}})
    data["serving"]["roles"]["decode"] = {"gpus": 2}
    crowded, spread = explain_transfer(simulated(data)), explain_transfer(simulated(roles()))
    assert crowded is not None and spread is not None
    assert crowded.alone_s == pytest.approx(spread.alone_s)
    assert crowded.waited_s > 2 * spread.waited_s


def test_where_nothing_moves_there_is_no_transfer_to_explain() -> None:
    found = explain(simulated(roles(osl=1)))  # the prefill rank answers
    assert found.transfer is None
    assert {step.role for step in found.steps} == {"prefill"}
    assert explain_transfer(simulated(small())) is None


def test_a_step_without_a_price_names_its_role(monkeypatch: pytest.MonkeyPatch) -> None:
    simulation = simulated(roles())
    price = Pricer.price

    def refuse(self: Pricer, batch: Any, *given: Any, **more: Any) -> Any:
        if batch.prefill_seqs.any():
            raise OutsideProfile("no prompts", where="test", mend="measure them")
        return price(self, batch, *given, **more)

    monkeypatch.setattr(Pricer, "price", refuse)
    found = explain(simulation)
    assert {step.role for step in found.steps} == {"decode"}
    assert "no prompts" in found.not_priced["prefill role: prefill, typical"]


def test_json_console_and_page_tell_both_roles(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, page = write(tmp_path, roles()), tmp_path / "r.html"
    assert run(["simulate", str(path), "--json", "--draws", "0", "--explain"]) == 0
    told = json.loads(capsys.readouterr().out)
    explained = told["explain"]
    assert [step["role"] for step in explained["steps"] if step["which"] == "typical"] == ["decode", "prefill"]
    moved = told["metrics"]["roles"]["transfer"]
    assert explained["transfer"]["transfer_s"] == moved["transfer_s"]
    assert explained["transfer"]["bytes"] == pytest.approx(moved["bytes_per_s"] * told["metrics"]["duration_s"])
    assert run(["simulate", str(path), "--draws", "0", "--explain", "--report", str(page)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for wanted in (
        "step of the decode role on 2 GPUs",
        "step of the prefill role on 4 GPUs",
        "KV transfer: 60 requests",
    ):
        assert wanted in printed
    tree = ET.fromstring(page.read_text().removeprefix("<!DOCTYPE html>\n"))
    (section,) = (one for one in tree.iter("section") if one.get("id") == "why")
    figures = {float(data.get("value", "nan")) for data in section.iter("data")}
    assert {explained["transfer"]["bytes"], explained["transfer"]["share_of_ttft"]} <= figures
    assert {step["step_s"] for step in explained["steps"]} <= figures
    assert np.isfinite(list(figures)).all()


def test_a_front_end_delays_the_transfers_what_ifs_as_well() -> None:
    """The run that is told and the runs without a transfer are of the same requests, late by the same time."""
    data = roles(arrivals={"concurrency": 3})
    data["cost"]["overheads"] = {"request_s": 0.5}
    late, plain = simulated(data), simulated(roles(arrivals={"concurrency": 3}))
    told, before = explain_transfer(late), explain_transfer(plain)
    assert told is not None
    assert before is not None
    assert told.ttft_s == pytest.approx(before.ttft_s + 0.5, abs=0.05)
    for name, seconds in told.what_if_ttft_s.items():
        assert seconds == pytest.approx(before.what_if_ttft_s[name] + 0.5, abs=0.05)
