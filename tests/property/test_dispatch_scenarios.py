"""Random plans over every backend, replica choice, compression and schedule: both executors agree, bytes are sound."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.engine import des, maxplus
from moesim.engine.deployment import groundwork, resolve
from moesim.engine.stepmodel import ExactModel, StepModel
from moesim.graph.batch import step_batch
from moesim.graph.flows import phase_bytes
from moesim.network.choice import CHOICES
from moesim.spec.scenario import Scenario
from tests.dispatch_plans import PLANS, plan

BLOCKS, CASES = 4, 120


def drawn(rng):
    """A legal plan, its choices drawn."""
    name = str(rng.choice(list(PLANS)))
    dispatch = {"replica": str(rng.choice(list(CHOICES)))}
    if PLANS[name][3] in ("alltoall", "two_level", "tp_dedup") and rng.random() < 0.5:
        packed = [{"dtype": "int8"}, {"dtype": "nvfp4"}, {"factor": float(rng.uniform(1.1, 8.0))}]
        dispatch["compression"] = packed[rng.integers(3)]
    data = plan(name, **dispatch)
    data["policies"]["schedule"] = str(rng.choice(["sequential", "two_batch"]))
    data["placement"] = {"solver": str(rng.choice(["greedy", "contiguous"])), "redundant_experts": 8}
    return data


@pytest.mark.parametrize("block", range(BLOCKS))
def test_random_plans(block):
    for seed in range(block * CASES // BLOCKS, (block + 1) * CASES // BLOCKS):
        rng = np.random.default_rng([8, seed])
        deployment = resolve(groundwork(Scenario.read(drawn(rng), where="drawn")))
        exact = ExactModel(StepModel(deployment, seed=seed), "maxplus")
        ranks = deployment.setup.parallel.attention_dp
        kind = "decode" if rng.random() < 0.5 else "prefill"
        if kind == "decode":
            batch = step_batch(ranks=ranks, decode_seqs=rng.integers(2, 60, (1, ranks)), decode_kv=700.0)
        else:
            batch = step_batch(ranks=ranks, prefill_seqs=2.0, prefill_new=rng.integers(10, 1000, (1, ranks)))
        graph, _ = exact.build(batch, kind)
        fast, careful = maxplus.run(graph), des.run(graph)
        np.testing.assert_allclose(careful.rank_end_s, fast.rank_end_s, rtol=1e-9)
        for operation, seconds in fast.busy_s.items():
            np.testing.assert_allclose(careful.busy_s[operation], seconds, rtol=1e-9)
        counts = exact.model.routing.counts(0, batch.tokens.sum(axis=1), rng)
        for phase in phase_bytes(exact.model.pricer, batch, counts, "normal"):
            assert np.isfinite(phase.pairs).all() and (phase.pairs >= 0.0).all()
            _, loads = phase.exchange.topology.link_loads(phase.pairs)
            assert (loads >= 0.0).all()
