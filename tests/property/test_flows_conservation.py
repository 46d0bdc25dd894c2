"""Bytes of dispatch and combine: every backend's phases conserve them, by GPU, by pair and on every link."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from moesim.engine.deployment import groundwork, resolve
from moesim.engine.stepmodel import StepModel
from moesim.errors import BadInput
from moesim.graph.batch import step_batch
from moesim.graph.exchanges import element_bytes
from moesim.graph.flows import STEPS, phase_bytes
from moesim.graph.pricing import Pricer
from moesim.network.traffic import message_bytes
from moesim.spec.scenario import Scenario
from tests.dispatch_plans import PLANS, plan

CASES = [(name, mode) for name in PLANS for mode in (("normal", "low_latency") if name == "deepep" else ("normal",))]


def step_of(name: str, seed: int):
    """A drawn decode step of a plan: its pricer, batch and counts."""
    deployment = resolve(groundwork(Scenario.read(plan(name), where=name)))
    model = StepModel(deployment, seed=seed)
    rng = np.random.default_rng(seed)
    ranks = deployment.setup.parallel.attention_dp
    batch = step_batch(ranks=ranks, decode_seqs=rng.integers(1, 60, (1, ranks)), decode_kv=500.0)
    return model.pricer, batch, model.routing.counts(0, batch.tokens.sum(axis=1), rng)


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_what_leaves_arrives_on_every_link(name, mode):
    pricer, batch, counts = step_of(name, 3)
    phases = phase_bytes(pricer, batch, counts, mode)
    assert {phase.step for phase in phases} == set(STEPS) - ({"dispatch"} if name == "allreduce" else set())
    for phase in phases:
        assert (phase.pairs >= 0.0).all()
        assert not np.einsum("...ii->...i", phase.pairs).any()
        pairs = phase.pairs.sum(axis=(0, 1))
        edges, loads = phase.exchange.topology.link_loads(pairs)
        assert (loads >= 0.0).all()
        left, arrived = {}, {}
        for (one, other), load in zip(edges, loads, strict=True):
            left[one] = left.get(one, 0.0) + load
            arrived[other] = arrived.get(other, 0.0) + load
        for vertex in set(left) | set(arrived):
            if not vertex.startswith("gpu"):  # a switch keeps nothing
                assert left.get(vertex, 0.0) == pytest.approx(arrived.get(vertex, 0.0), rel=1e-9, abs=1e-6)
        for gpu in range(len(pairs)):
            passed = sum(pairs[gpu]) - sum(pairs[:, gpu])
            net = left.get(f"gpu{gpu}", 0.0) - arrived.get(f"gpu{gpu}", 0.0)
            assert net == pytest.approx(passed, rel=1e-9, abs=1e-6 * max(pairs.sum(), 1.0))
        near = {"nvlink": "nvswitch", "pcie": "pcie"}.get(phase.level)
        touched = {vertex for edge, load in zip(edges, loads, strict=True) if load > 0 for vertex in edge}
        assert any(vertex.startswith(near or "nic") for vertex in touched) or not pairs.any()
        assert phase.level != "nic" or not any(vertex.startswith("nvswitch") for vertex in touched)


@pytest.mark.parametrize(("name", "mode"), [case for case in CASES if case[0] != "allreduce"])
def test_a_combine_is_its_dispatch_backwards(name, mode):
    pricer, batch, counts = step_of(name, 4)
    whole = {
        step: sum(phase.pairs for phase in phase_bytes(pricer, batch, counts, mode) if phase.step == step)
        for step in STEPS
    }
    if name == "allgather_reducescatter":
        np.testing.assert_allclose(whole["combine"], whole["dispatch"], rtol=1e-12)
        return
    if name == "tp_dedup_split":
        return  # its gather runs in activations' type both ways, and so does not scale with the exchange
    setup = pricer.setup
    if name == "deepep":
        sizes = [
            message_bytes(step, mode, hidden=setup.model.hidden, dtype=dtype, top_k=setup.model.moe.top_k)
            for step, dtype in (("dispatch", setup.precision.dispatch), ("combine", setup.precision.combine))
        ]
    else:
        sizes = [element_bytes(step, setup.policies.dispatch, setup.precision) for step in STEPS]
    np.testing.assert_allclose(
        np.swapaxes(whole["combine"], -1, -2) / sizes[1], whole["dispatch"] / sizes[0], rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("name", ["alltoall", "two_level", "tp_dedup", "tp_dedup_split", "deepep"])
def test_every_copy_travels_or_stays(name):
    """Copies by expert: what arrives over links, and what stays on its GPU, are all the picks of all tokens."""
    pricer, batch, counts = step_of(name, 5)
    setup = pricer.setup
    phases = phase_bytes(pricer, batch, counts, "low_latency")
    sent = [phase.pairs for phase in phases if phase.step == "dispatch" and "expert" not in phase.name]
    size = setup.model.hidden * element_bytes("dispatch", setup.policies.dispatch, setup.precision)
    if name == "deepep":
        size = message_bytes(
            "dispatch", "low_latency", hidden=setup.model.hidden, dtype=setup.precision.dispatch,
            top_k=setup.model.moe.top_k,
        )  # fmt: skip
    arriving = pricer.replicas.rank_loads(counts)
    tokens = np.repeat(batch.tokens / setup.parallel.tp, setup.parallel.tp, axis=1)[:, None, :]
    share = tokens / tokens.sum()
    split = setup.parallel.expert_tp
    place = np.arange(setup.parallel.gpus) % split
    among = np.stack([tokens[0, 0, place == one] / tokens[0, 0, place == one].sum() for one in range(split)], axis=-1)
    stays = (arriving / split * among.sum(axis=-1)).sum() if split > 1 else (arriving * share).sum()
    moved = sum(pairs.sum() for pairs in sent) / size
    if name == "two_level":  # a copy to another domain takes up to three phases; its last one brings it
        last = [phase.pairs for phase in phases if phase.step == "dispatch" and phase.level == "nic"]
        near = setup.gpus_per_node
        gpu = np.arange(setup.parallel.gpus)
        far = gpu[:, None] // near != gpu[None, :] // near
        crossing = np.swapaxes(share, -1, -2) * arriving[0][:, None, :]
        assert sum(pairs.sum() for pairs in last) / size == pytest.approx((crossing * far).sum(), rel=1e-9)
        return
    assert moved + stays == pytest.approx(counts.sum(), rel=1e-9)


def test_a_tp_group_sends_a_tokens_copies_once():
    """tp_dedup: the ranks of a group send its tokens' copies between them; without it each would send all of them."""
    pricer, batch, counts = step_of("tp_dedup_split", 6)
    network = [phase for phase in phase_bytes(pricer, batch, counts, "normal") if phase.level == "nic"]
    setup = pricer.setup
    size = setup.model.hidden * element_bytes("dispatch", setup.policies.dispatch, setup.precision)
    moved = sum(phase.pairs.sum() for phase in network if phase.step == "dispatch") / size
    arriving = pricer.replicas.rank_loads(counts)[0]
    groups, per_node = setup.parallel.attention_dp, setup.gpus_per_node // setup.parallel.tp
    group = np.arange(groups)
    far = group[:, None] // per_node != group[None, :] // per_node
    from_group = batch.tokens[0] / batch.tokens.sum()
    once = (from_group[:, None] * far * arriving.sum(axis=0)[None, :]).sum()
    assert moved == pytest.approx(once, rel=1e-9)


def test_a_setup_without_a_network_is_refused():
    pricer, batch, counts = step_of("alltoall", 7)
    bare = Pricer(dataclasses.replace(pricer.setup, network=None), pricer.costs)
    with pytest.raises(BadInput, match="names no network"):
        phase_bytes(bare, batch, counts, "normal")
