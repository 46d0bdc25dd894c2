"""Dispatch backends: what each costs, worked out beside the exchange model, and what each refuses by name."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from moesim.cli import run
from moesim.cost.estimate import Tag, estimate
from moesim.cost.links import at_exchange_rates
from moesim.cost.ops import Collective, MemoryBound, MoeExchange
from moesim.cost.reach import link_reach
from moesim.engine import des, maxplus
from moesim.engine.deployment import groundwork, resolve
from moesim.engine.stepmodel import ExactModel, StepModel
from moesim.errors import BadInput, Infeasible, MoesimError, OutsideProfile
from moesim.graph.batch import step_batch
from moesim.graph.exchanges import element_bytes, pair_bytes
from moesim.graph.flows import phase_bytes
from moesim.graph.layer import build_step
from moesim.graph.pricing import Pricer
from moesim.network.choice import CHOICES
from moesim.network.collectives import all_to_all_flat
from moesim.spec.cluster import MeasuredFigure
from moesim.spec.presets import load_cluster
from moesim.spec.scenario import ClusterChoice, CompressionSpec, Scenario
from placement.export.engines import export_placement, refuse_dispatch
from tests.dispatch_plans import PLANS, plan
from tests.scenarios import write


def deployed(name, **dispatch):
    return resolve(groundwork(Scenario.read(plan(name, **dispatch), where=name)))


def priced(deployment, tokens=32.0, costs=None, setup=None, mode="normal"):
    """One decode step of evenly routed tokens, priced."""
    setup = setup or deployment.setup
    ranks, moe = setup.parallel.attention_dp, setup.model.moe
    batch = step_batch(ranks=ranks, decode_seqs=tokens, decode_kv=100.0)
    share = float(batch.tokens.sum()) * moe.top_k / moe.experts
    counts = np.full((1, setup.model.moe_layers, moe.experts), share)
    pricer = Pricer(setup, costs or deployment.ground.costs)
    return pricer.price(batch, counts, mode=mode, graphed=True)


def seconds(part):
    return float(part.seconds().sum())


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("replica", CHOICES)
def test_every_backend_under_every_choice_runs_alike_in_both_executors(name, replica):
    exact = ExactModel(StepModel(deployed(name, replica=replica), seed=1), "maxplus")
    ranks = exact.model.deployment.setup.parallel.attention_dp
    graph, _ = exact.build(step_batch(ranks=ranks, decode_seqs=20.0, decode_kv=300.0), "decode")
    fast, careful = maxplus.run(graph), des.run(graph)
    np.testing.assert_allclose(careful.rank_end_s, fast.rank_end_s, rtol=1e-9)
    assert ("replica_choice" in fast.busy_s) == CHOICES[replica].exchanges_counts


@pytest.mark.parametrize("name", PLANS)
def test_more_tokens_never_cost_less(name):
    deployment = deployed(name)
    sizes = [priced(deployment, tokens) for tokens in (4.0, 64.0, 1024.0)]
    for part in ("dispatch", "combine"):
        times = [seconds(getattr(size, part)) for size in sizes]
        assert (times == sorted(times) and times[-1] > times[0]) or (name == "allreduce" and part == "dispatch")


def test_an_even_flat_exchange_is_the_pairwise_formula():
    """Even routing: alpha-beta of the pairwise exchange over both levels (network.collectives)."""
    deployment = deployed("alltoall", replica="equal")
    setup = deployment.setup
    even = dataclasses.replace(setup.placement, physical_to_logical=np.tile(np.arange(64), (16, 1)))
    setup = dataclasses.replace(setup, placement=even)
    found = priced(deployment, setup=setup).dispatch
    size = 32.0 * setup.model.moe.top_k * setup.model.hidden * 2.0
    expected = all_to_all_flat(size, at_exchange_rates(setup.network.cluster, "collective all_to_all"), 8)
    np.testing.assert_allclose(found.seconds(), np.full((1, 16, 1), expected), rtol=1e-12)


def test_a_two_level_exchange_is_worked_out_by_hand():
    """Two nodes of four, even: NVLink carries what stays and what changes rails, then rails, then nothing to scatter.

    Each GPU sends b bytes to each of eight. Gathering: to each of its three neighbours what it has for them and for the
    neighbour's rail in the other node, 2 b. Along the rails: what four GPUs have for one, 4 b. All of it has arrived.
    """
    deployment = deployed("two_level", replica="equal")
    setup = deployment.setup
    even = dataclasses.replace(setup.placement, physical_to_logical=np.tile(np.arange(64), (16, 1)))
    setup = dataclasses.replace(setup, placement=even)
    cluster = at_exchange_rates(setup.network.cluster, "collective all_to_all")
    each = 32.0 * setup.model.moe.top_k / 8 * setup.model.hidden * 2.0
    gather = 3 * (cluster.nvlink_latency_s + 2 * each / cluster.nvlink_bytes_per_s)
    along = cluster.nic_latency_s + 4 * each / cluster.nic_bytes_per_s
    np.testing.assert_allclose(priced(deployment, setup=setup).dispatch.seconds(), gather + along, rtol=1e-12)


def test_compression_moves_fewer_bytes_and_pays_two_passes_over_memory():
    plain, packed = deployed("alltoall"), deployed("alltoall", compression={"factor": 4.0})
    precision = plain.setup.precision
    assert element_bytes("dispatch", packed.setup.policies.dispatch, precision) == 0.5  # bf16 over 4
    dtype = packed.setup.policies.dispatch.model_copy(update={"compression": CompressionSpec(dtype="int8")})
    assert element_bytes("combine", dtype, precision) == 1.0 + 4.0 / 128  # a float32 scale for 128 elements
    one, other = priced(plain, 2048.0), priced(packed, 2048.0)
    kernels = {part: getattr(other, part).estimates for part in ("dispatch", "combine")}
    for part, found in kernels.items():
        assert [len(found), len(getattr(one, part).estimates)] == [3, 1]
        latency_s = 4 * plain.setup.network.cluster.nic_latency_s  # four messages to the other node, one by one
        carried = getattr(one, part).estimates[0].seconds - latency_s
        np.testing.assert_allclose(found[0].seconds - latency_s, carried / 4, rtol=1e-9)
        assert [piece.family for piece in found[1:]] == ["memory_bound"] * 2
    arriving = 2048.0 * 8 * 8 / 8
    wide = packed.setup.model.hidden * (2.0 + 0.5)
    unpack = packed.ground.costs.estimate(MemoryBound(bytes=np.asarray(arriving * wide), name="")).seconds
    assert kernels["dispatch"][2].seconds.mean() >= unpack  # the busiest rank's rows, at least the mean
    assert seconds(other.dispatch) < seconds(one.dispatch)


def test_tensor_parallel_ranks_gather_what_each_sent_apart():
    """Each rank of a group sends its part of the group's tokens; the results come back to it alone."""
    for name in ("alltoall", "tp_dedup", "tp_dedup_split"):
        data = plan("tp_dedup" if name == "alltoall" else name)
        data["policies"]["dispatch"]["backend"] = name.split("_split")[0]
        found = priced(resolve(groundwork(Scenario.read(data, where=name))))
        assert seconds(found.gather) > 0.0
        assert seconds(found.attention_sync) > 0.0
    assert not priced(deployed("alltoall")).gather.estimates


def test_split_experts_bring_their_parts_together():
    whole, split = priced(deployed("tp_dedup"), 512.0), priced(deployed("tp_dedup_split"), 512.0)
    assert [len(whole.dispatch.estimates), len(split.dispatch.estimates)] == [1, 2]
    assert [len(whole.combine.estimates), len(split.combine.estimates)] == [1, 2]


def test_pairs_of_split_experts_keep_to_their_place():
    parallel = deployed("tp_dedup_split").setup.parallel
    pairs = pair_bytes(np.full((1, 8), 3.0), np.arange(1.0, 5.0).reshape(1, 1, 4), parallel, 10.0)[0, 0]
    place = np.arange(8) % 2
    assert not pairs[place[:, None] != place[None, :]].any()
    assert pairs.sum() == pytest.approx((1 + 2 + 3 + 4) * 10.0)
    np.testing.assert_allclose(pairs.sum(axis=0), np.repeat([1, 2, 3, 4], 2) * 10.0 / 2)


class NoExchanges:
    """A cost model that holds no DeepEP exchange."""

    def __init__(self, inner):
        self.inner = inner

    def estimate(self, operation):
        if isinstance(operation, MoeExchange):
            raise OutsideProfile("not measured", mend="measure it")
        return self.inner.estimate(operation)


@pytest.mark.parametrize("mode", ["normal", "low_latency"])
def test_measured_links_price_a_deepep_exchange_that_no_table_holds(mode):
    deployment = deployed("deepep", replica="equal")
    setup = with_links(deployment.setup, formula=False, measured=True)
    costs = NoExchanges(deployment.ground.costs)
    found = priced(deployment, 512.0, costs=costs, setup=setup, mode=mode)
    for part in (found.dispatch, found.combine):
        assert (part.estimates[0].tags == Tag.FORMULA).all()
        assert part.estimates[0].family == "dispatch" and f"deepep_{mode}" in part.estimates[0].source
    # The busiest link of the bytes that are counted elsewhere, after an empty exchange and the latencies of the way.
    batch = step_batch(ranks=8, decode_seqs=512.0, decode_kv=100.0)
    counts = np.full((1, setup.model.moe_layers, setup.model.moe.experts), 512.0 * 8 * 8 / 64)
    phases = [phase for phase in phase_bytes(Pricer(setup, costs), batch, counts, mode) if phase.step == "dispatch"]
    topology = setup.network.exchange(f"deepep_{mode}").topology
    busiest = topology.busiest_s(sum(phase.pairs for phase in phases))
    latency = setup.network.cluster.nic_latency_s + (setup.network.cluster.nvlink_latency_s if mode == "normal" else 0)
    empty = link_reach(f"exchange {mode} between domains").floor_s
    np.testing.assert_allclose(found.dispatch.seconds()[..., 0], busiest + latency + empty, rtol=1e-9)
    with pytest.raises(OutsideProfile, match="not measured"):
        bare = with_links(deployment.setup, formula=False, measured=False)
        priced(deployment, costs=costs, setup=bare, mode=mode)


class Store:
    """A cost model that holds one table, of all-to-alls, and refuses what it does not hold."""

    def __init__(self, inner, *, gpus):
        self.inner, self.gpus = inner, gpus

    def estimate(self, operation):
        if isinstance(operation, Collective) and operation.kind == "all_to_all":
            if operation.gpus != self.gpus:
                raise OutsideProfile("not measured", mend="measure it")
            return estimate(np.full(np.shape(operation.bytes), 1e-3), Tag.MEASURED, "collective", 0.1, "a table")
        return self.inner.estimate(operation)


def with_links(setup, *, formula, measured):
    """The setup with links measured or of a datasheet, where the scenario takes formulas or not."""
    names = ("nvlink_bytes_per_s", "nvlink_latency_s", "nic_bytes_per_s", "nic_latency_s") if measured else ()
    figure = MeasuredFigure(rel_sigma=0.1, points=9)
    cluster = setup.network.cluster.model_copy(update={"measured": dict.fromkeys(names, figure)})
    return dataclasses.replace(
        setup, network=dataclasses.replace(setup.network, cluster=cluster, formula=formula, _kept={})
    )


def test_a_measured_table_prices_a_flat_exchange_and_links_only_what_no_table_holds():
    deployment = deployed("alltoall")
    held, lacking = Store(deployment.ground.costs, gpus=8), Store(deployment.ground.costs, gpus=4)
    for measured in (True, False):
        setup = with_links(deployment.setup, formula=True, measured=measured)
        found = priced(deployment, costs=held, setup=setup).dispatch
        assert found.estimates[0].source == "a table" and (found.seconds() == 1e-3).all()
    setup = with_links(deployment.setup, formula=False, measured=True)
    found = priced(deployment, costs=lacking, setup=setup).dispatch.estimates[0]
    assert "flat exchange over the links" in found.source and (found.tags == Tag.FORMULA).all()
    with pytest.raises(OutsideProfile, match="not measured"):
        priced(deployment, costs=lacking, setup=with_links(deployment.setup, formula=False, measured=False))


def test_a_two_level_exchange_needs_measured_links_or_leave_to_extrapolate():
    deployment = deployed("two_level")
    tags = []
    for formula, measured in ((True, False), (True, True), (False, True)):
        setup = with_links(deployment.setup, formula=formula, measured=measured)
        tags.append(int(np.max(priced(deployment, setup=setup).dispatch.estimates[0].tags)))
    assert tags == [Tag.ASSUMED, Tag.FORMULA, Tag.FORMULA]
    with pytest.raises(OutsideProfile, match=r"no table holds a two_level exchange.*fit-network"):
        priced(deployment, setup=with_links(deployment.setup, formula=False, measured=False))


def test_a_choice_of_replicas_is_charged_in_every_layer():
    free = deployed("deepep", replica="equal")
    for replica in ("lp", "fewest_activated"):
        solved = deployed("deepep", replica=replica)
        own = deployed("deepep", replica=replica, replica_solve_s=1e-3)
        part = priced(solved).replica_choice
        assert [one.family for one in part.estimates] == ["collective", "overhead", "memory_bound"]
        assert all(one.seconds.min() > 0.0 for one in part.estimates)
        assert priced(own).replica_choice.estimates[1].seconds == 1e-3
        taken = seconds(priced(own).replica_choice) - seconds(part)
        assert taken == pytest.approx(1e-3 - Pricer(solved.setup, solved.ground.costs).replicas.solve_s())
        layers = solved.setup.model.moe_layers
        step = maxplus.run(build_step(own.setup, [priced(own)])).busy_s["replica_choice"]
        assert step.max() == pytest.approx(layers * seconds(priced(own).replica_choice))
    assert not priced(free).replica_choice.estimates


REFUSED = [
    ("two_level", {}, {"tp": 2, "attention_dp": 4, "ep": 8}, "several hold it"),
    ("two_level", {}, {"tp": 1, "attention_dp": 4, "ep": 4}, "more than one domain"),
    ("two_level", {}, {"attention_dp": 8, "ep": 4, "expert_tp": 2}, "whole experts on several ranks"),
    ("tp_dedup", {}, {"attention_dp": 8, "ep": 8}, "none at tp 1"),
    ("tp_dedup", {}, {"tp": 2, "attention_dp": 4, "ep": 2, "expert_tp": 4}, "whole or split as attention is"),
    ("alltoall", {}, {"attention_dp": 8, "ep": 4, "expert_tp": 2}, "needs whole experts"),
    ("two_level", {"mode": "low_latency"}, {"attention_dp": 8, "ep": 8}, "no modes"),
    ("deepep", {"compression": {"dtype": "int8"}}, {"attention_dp": 8, "ep": 8}, "its own kernels"),
    ("allreduce", {"compression": {"factor": 2}}, {"tp": 8, "ep": 8}, "its own kernels"),
    ("alltoall", {"compression": {}}, {"attention_dp": 8, "ep": 8}, "exactly one of dtype and factor"),
    ("alltoall", {"replica_solve_s": 1e-5}, {"attention_dp": 8, "ep": 8}, "solves nothing"),
    ("allreduce", {"replica": "lp"}, {"tp": 8, "ep": 1, "expert_tp": 8}, "one rank to choose from"),
    ("deepep", {"replica": "nearest"}, {"attention_dp": 8, "ep": 8}, "round_robin"),
    ("ring", {}, {"attention_dp": 8, "ep": 8}, "two_level"),
]  # fmt: skip


@pytest.mark.parametrize(("backend", "dispatch", "parallel", "said"), REFUSED)
def test_what_a_backend_cannot_do_is_refused_by_name(backend, dispatch, parallel, said):
    data = plan("alltoall")
    data |= {"parallel": parallel, "policies": {"dispatch": {"backend": backend, **dispatch}}}
    data["placement"] = {"solver": "contiguous"}
    with pytest.raises((BadInput, Infeasible), match=said) as refused:
        resolve(groundwork(Scenario.read(data, where="refused")))
    assert isinstance(refused.value, MoesimError) and "dispatch" in str(refused.value)


def test_a_run_tells_its_bytes(tmp_path, capsys):
    data = plan("two_level", replica="lp", compression={"dtype": "fp8"})
    data["serving"]["workload"]["requests"] = 12
    assert run(["simulate", str(write(tmp_path, data)), "--json", "--draws", "0"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["plan"]["dispatch"]["compression"] == {"dtype": "fp8"}
    assert found["step"]["by_operation_s"]["replica_choice"] > 0.0
    for step in ("dispatch", "combine"):
        network = found["network"][step]
        assert found["step"]["communication_bytes"][step] == network["bytes"]
        assert [row["phase"] for row in network["by_phase"]] == [
            "gather inside the domain", "along the rails", "scatter inside the domain",
        ]  # fmt: skip
        pairs = np.asarray(network["by_pair"])
        assert pairs.shape == (8, 8)
        assert network["bytes"] == pytest.approx(pairs.sum()) == sum(row["bytes"] for row in network["by_phase"])
        nics = [row["bytes"] for row in network["by_link"] if row["from"].startswith("gpu") and row["to"][:3] == "nic"]
        assert sum(nics) == pytest.approx(network["by_phase"][1]["bytes"])


def test_a_cluster_that_is_no_topology_still_runs_and_says_why_it_has_no_bytes(tmp_path, capsys):
    data = plan("deepep")
    data["serving"]["workload"]["requests"] = 4
    spec = load_cluster(ClusterChoice(system="h200_sxm", nodes=2, gpus_per_node=4)).model_dump(mode="json")
    data["cluster"] = str(write(tmp_path, spec | {"nvlink_domain_gpus": 2}, "cluster.yaml"))
    assert run(["simulate", str(write(tmp_path, data)), "--json", "--draws", "0"]) == 0
    network = json.loads(capsys.readouterr().out)["network"]
    assert network["dispatch"] == {"bytes": None} and "split nodes" in network["reason"]


def test_two_level_saves_messages_and_pays_a_second_hop():
    """One message to the other node instead of four is quicker for few bytes; for many the gather comes on top."""
    flat, two = deployed("alltoall", replica="equal"), deployed("two_level", replica="equal")
    few = [seconds(priced(one, 1.0).dispatch) for one in (flat, two)]
    many = [seconds(priced(one, 4096.0).dispatch) for one in (flat, two)]
    assert few[1] < few[0]
    assert many[1] > many[0]


def test_another_jobs_traffic_is_seen_by_des_alone(tmp_path, capsys):
    data = plan("alltoall")
    data["serving"]["workload"]["requests"] = 8
    quiet = write(tmp_path, data, "quiet.yaml")
    stream = {"kind": "stream", "gpus": [0, 1, 2, 3], "to": [4, 5, 6, 7], "bytes_per_s": 5e10}
    data["cluster"]["background"] = [stream]
    busy = write(tmp_path, data, "busy.yaml")
    for options, said in ((["--draws", "0"], "--fidelity des"), (["--fidelity", "des"], "--draws 0")):
        assert run(["simulate", str(busy), *options]) == 2
        error = capsys.readouterr().err
        assert "cluster.background" in error and said in error
    found = {}
    for path in (quiet, busy):
        assert run(["simulate", str(path), "--json", "--draws", "0", "--fidelity", "des"]) == 0
        found[path] = json.loads(capsys.readouterr().out)
    assert found[busy]["metrics"]["tpot_s"]["p50"] > found[quiet]["metrics"]["tpot_s"]["p50"]
    assert found[busy]["metrics"]["ttft_s"]["p50"] > found[quiet]["metrics"]["ttft_s"]["p50"] * 1.01
    with pytest.raises(BadInput, match="GPU 7 of a cluster of 4"):
        small = plan("alltoall")
        small["cluster"] = {"system": "h200_sxm", "gpus_per_node": 4, "background": [stream]}
        small["parallel"] = {"attention_dp": 4, "ep": 4}
        resolve(groundwork(Scenario.read(small, where="small")))


def test_engines_refuse_a_dispatch_that_they_have_no_flag_for(tmp_path):
    for name, dispatch, said in (
        ("two_level", {}, "backend two_level"),
        ("tp_dedup", {}, "backend tp_dedup"),
        ("deepep", {"replica": "lp"}, "replica lp"),
        ("alltoall", {"compression": {"factor": 2}}, "compression"),
    ):
        scenario = Scenario.read(plan(name, **dispatch), where=name)
        placement = resolve(groundwork(scenario)).setup.placement
        with pytest.raises(Infeasible, match=f"sglang has no flag for {said}"):
            export_placement(placement, "sglang", tmp_path, scenario)
        assert not list(tmp_path.iterdir())
    refuse_dispatch("megatron", Scenario.read(plan("tp_dedup"), where="megatron").policies.dispatch)
