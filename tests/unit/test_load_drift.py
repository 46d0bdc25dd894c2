"""Which mix of loads is served when, and steps whose requests are each of one load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.engine.deployment import groundwork, resolve
from moesim.engine.mixtures import RequestMix
from moesim.engine.routing_draws import RoutingDraws
from moesim.engine.simulate import simulate
from moesim.engine.stepmodel import StepModel
from moesim.errors import BadInput
from moesim.routing.dispersion import NONE
from moesim.routing.drift import LEVELS, cut_in_blocks, load_drift
from moesim.routing.readers import read_loads
from moesim.routing.trace import RoutingCounts
from moesim.spec.drift import DriftSpec
from moesim.spec.scenario import Scenario
from tests.scenarios import small


def loads(*phases: str, steps: int = 1) -> list[RoutingCounts]:
    """Loads of one layer and four experts."""
    rng = np.random.default_rng(0)
    return [
        RoutingCounts(
            rng.integers(1, 9, (steps, 1, 4)).astype(float), np.arange(1), 1, name=f"l{place}", phase=phase,
            per_step=steps > 1,
        )
        for place, phase in enumerate(phases)
    ]  # fmt: skip


def drift(**keys: Any) -> DriftSpec:
    return DriftSpec.read(keys, where="test")


def test_weights_hold_until_the_next_point_and_start_again() -> None:
    points = [{"at_s": 0, "weights": [1, 0]}, {"at_s": 10, "weights": [0, 2]}]
    once, again = (load_drift(drift(points=points, **more), loads("any", "any")) for more in ({}, {"repeat_s": 15}))
    assert [once.mix_at(now) for now in (0, 9.99, 10, 1e6)] == [0, 0, 1, 1]
    assert [again.mix_at(now) for now in (0, 9.99, 10, 14.99, 15, 24.99, 25)] == [0, 0, 1, 1, 0, 0, 1]
    assert once.weights.tolist() == [[1, 0], [0, 2]]


def test_a_line_is_served_in_levels_whose_mean_is_the_line_s() -> None:
    points = [{"at_s": 0, "weights": [1, 0]}, {"at_s": 8, "weights": [0, 1]}]
    found = load_drift(drift(points=points, between="linear"), loads("any", "any"))
    assert len(found.from_s) == LEVELS + 1
    assert found.weights[:LEVELS].mean(axis=0) == pytest.approx([0.5, 0.5])
    for now in np.linspace(0, 7.999, 50):
        assert abs(found.weights[found.mix_at(now)][0] - (1 - now / 8)) <= 0.5 / LEVELS + 1e-12
    assert found.weights[found.mix_at(99)].tolist() == [0, 1]  # the last point stays
    back = load_drift(drift(points=points, between="linear", repeat_s=16), loads("any", "any"))
    assert back.weights[back.mix_at(12.1)] == pytest.approx([0.5, 0.5], abs=0.5 / LEVELS)


def test_every_phase_needs_a_load_at_every_time() -> None:
    two = loads("prefill", "decode")
    with pytest.raises(BadInput, match="no decode load has a weight at 5 s"):
        load_drift(drift(points=[{"at_s": 0, "weights": [1, 1]}, {"at_s": 5, "weights": [1, 0]}]), two)
    assert load_drift(drift(points=[{"at_s": 0, "weights": [1, 3]}]), two).weights.tolist() == [[1, 3]]


def test_a_recording_is_served_in_its_own_order() -> None:
    given = loads("any", "any", steps=10)
    spec = drift(blocks=3, block_s=2.0)
    cut = cut_in_blocks(given, spec)
    assert [load.name for load in cut] == [f"l{place}[{block}]" for place in (0, 1) for block in (0, 1, 2)]
    for place, load in enumerate(given):  # every step once, in order
        parts = [one.counts for one in cut[3 * place : 3 * place + 3]]
        np.testing.assert_array_equal(np.concatenate(parts), load.counts)
        assert sum(one.weight for one in cut[3 * place : 3 * place + 3]) == pytest.approx(load.weight)
    found = load_drift(spec, cut)
    assert [found.mix_at(now) for now in (0, 1.9, 2, 4, 99)] == [0, 0, 1, 2, 2]
    assert np.flatnonzero(found.weights[1]).tolist() == [1, 4]
    assert load_drift(drift(blocks=3, block_s=2.0, repeat=True), cut).mix_at(6.5) == 0
    with pytest.raises(BadInput, match="10 steps in order cannot be cut in 20 blocks"):
        cut_in_blocks(given, drift(blocks=20, block_s=1.0))


@pytest.mark.data
def test_a_training_run_s_routing_drifts_over_its_blocks(shared_data: Path) -> None:
    load = read_loads(shared_data / "routing" / "smartmoe_ae_counts_first300.npz")
    early, *_, late = cut_in_blocks([load], drift(blocks=6, block_s=1.0))
    ends = [one.profile() for one in (early, late)]
    halves = [one.profile() for one in cut_in_blocks([late], drift(blocks=2, block_s=1.0))]
    apart = [np.abs(one - other).sum(axis=1).mean() for one, other in (ends, halves)]
    assert apart[0] > 5 * apart[1]


def draws() -> RoutingDraws:
    """Two loads of 32 experts in 4 layers whose hot experts differ."""
    counts = np.ones((2, 1, 4, 32))
    counts[0, ..., :8], counts[1, ..., 8:16] = 6.0, 6.0
    given = [RoutingCounts(one * 100, np.arange(4), 4, name=name) for one, name in zip(counts, "ab", strict=True)]
    return RoutingDraws(given, 2, NONE)


def mixed(*weights: float, prompt: float = 100.0) -> RequestMix:
    return RequestMix(draws(), np.asarray(weights), decode_tokens=1.0, prompt_tokens=prompt)


def test_requests_of_a_step_are_mixed_by_their_weights() -> None:
    rng = np.random.default_rng(3)
    tokens = np.full(400, 64)
    counts = mixed(0.25, 0.75).counts(0, tokens, rng)
    assert (counts.sum(axis=2) == 64 * 2).all()
    profiles = [load.profile() for load in draws().loads]
    wanted = 0.25 * profiles[0] + 0.75 * profiles[1]
    np.testing.assert_allclose(counts.sum(axis=0) / counts.sum(axis=(0, 2))[:, None], wanted, atol=0.004)
    alone = mixed(1.0, 0.0).counts(0, tokens, np.random.default_rng(4))
    ours = draws().counts(0, tokens, np.random.default_rng(4))
    np.testing.assert_allclose(alone.mean(axis=0), ours.mean(axis=0), atol=0.6)


def test_few_requests_scatter_more_than_many() -> None:
    """Half of the picks of load a's hot experts come and go with the requests: binomial, so by 1 / requests."""

    def spread(requests: int) -> float:
        counts = mixed(0.5, 0.5, prompt=4096 / requests).counts(1, np.full(600, 4096), np.random.default_rng(requests))
        share = counts[..., :8].sum(axis=2) / counts.sum(axis=2)
        return float(share.mean(axis=1).var())  # layers of a step share its requests

    profiles = [load.profile()[0, :8].sum() for load in draws().loads]
    for requests in (2, 8, 32):
        wanted = 0.25 * (profiles[0] - profiles[1]) ** 2 / requests
        assert spread(requests) == pytest.approx(wanted, rel=0.2)


def scenario(mix: str, **workload: Any) -> dict[str, Any]:
    data = small(
        routing={"synthetic": {"kind": "deepseek_like", "workloads": 6}, "mix": mix, "holdout": {"by": "none"}}
    )
    data["serving"]["workload"] |= workload
    return data


def test_a_mixed_step_is_balanced_by_what_it_mixes() -> None:
    """Drawn by step every step is of one load; by request a large step is nearer to the mean that a map is made for."""
    models = {
        mix: StepModel(resolve(groundwork(Scenario.read(scenario(mix), where="test"))), seed=0)
        for mix in ("step", "request")
    }
    assert isinstance(models["request"].routing, RequestMix)
    assert models["request"].routing.tokens_of_request == (1.0, 256.0)
    found = simulate(models["request"].deployment, draws=2)
    assert len(found.drawn) == 2
    grids = {mix: model.grid("decode") for mix, model in models.items()}
    assert grids["request"].loads == [0]
    assert models["request"].grid("prefill").loads == [1]
    full = {mix: model.base.table("decode").seconds[-1, 0, -1] for mix, model in models.items()}
    assert full["request"] < full["step"]


def test_a_drift_of_mixed_requests_runs_and_differs_from_one_of_steps() -> None:
    weights = {0: [1, 0, 0, 0, 1, 0], 0.1: [1, 1, 1, 1, 1, 1]}  # three prefill loads, three of decode
    points = {"points": [{"at_s": now, "weights": row} for now, row in weights.items()]}
    found = {}
    for mix in ("step", "request"):
        data = scenario(mix)
        data["routing"] |= {"drift": points}
        found[mix] = simulate(resolve(groundwork(Scenario.read(data, where="test"))), draws=1)
        assert np.isfinite(found[mix].served.finish_s).all()
    late = [one.served.step_s[one.served.step_start_s >= 0.1] for one in found.values()]
    assert late[0].mean() != late[1].mean()
