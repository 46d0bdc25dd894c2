"""Routed = processed + dropped, nothing negative: every gate under every capacity policy, on ids and on counts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.routing.capacity.formulas import FORMULAS
from moesim.routing.capacity.on_counts import cap_counts
from moesim.routing.capacity.on_ids import keep_within
from moesim.routing.capacity.rule import DROPLESS, CapacityRule
from moesim.routing.gates.registry import GATES
from moesim.routing.gates.routed import softmax
from moesim.routing.laws import EvenSampler, VariableSampler
from tests.gate_cases import choice_for, scores_for

RANKS = 4


@st.composite
def rules(draw: st.DrawFn) -> CapacityRule:
    return CapacityRule(
        rule=draw(st.sampled_from([DROPLESS, *FORMULAS])),
        factor=draw(st.sampled_from([0.25, 0.5, 1.0, 1.25, 2.0, 8.0])),
        drop=draw(st.sampled_from(["position", "probability", "random"])),
        by_choice=draw(st.booleans()),
        backup=draw(st.sampled_from([None, "random", "next_best"])),
        pad=draw(st.booleans()),
        min_capacity=draw(st.sampled_from([0, 4])),
        max_capacity=draw(st.sampled_from([0, 3, 1_000])),
    )


@pytest.mark.parametrize("name", GATES)
@given(rule=rules(), seed=st.integers(0, 1_000), size=st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_ids_are_conserved(name: str, rule: CapacityRule, seed: int, size: int) -> None:
    tokens, experts, top_k = 16 * size, 16, 4
    scores = scores_for(tokens, experts, seed)
    how = choice_for(name, top_k=top_k)
    rng = np.random.default_rng(seed)
    routed = GATES[name].gate(scores, how, rng)
    source = np.sort(np.arange(tokens) % RANKS)
    kept = keep_within(routed, rule, rng, top_k=how.top_k, source=source, scores=softmax(scores.logits))
    picks = int((routed.ids >= 0).sum())
    processed = kept.routed.counts()
    assert processed.sum() + kept.dropped.sum() == picks
    for values in (kept.dropped, kept.rerouted, kept.padded, processed, kept.routed.weights):
        assert (values >= 0).all()
    assert (kept.dropped + kept.rerouted <= routed.counts()).all()
    assert ((kept.routed.ids >= 0) <= (routed.ids >= 0)).all()
    if rule.dropless:
        assert np.array_equal(kept.routed.ids, routed.ids)
        return
    by_source = kept.routed.counts_by_source(source, RANKS)
    assert (by_source <= kept.capacity[:, None]).all()
    if rule.pad:
        assert np.allclose(processed + kept.padded, kept.capacity.sum())
    if rule.backup is None:
        assert not kept.rerouted.any()
    elif name != "soft":
        for row in kept.routed.ids:
            held = row[row >= 0]
            assert len(set(held.tolist())) == len(held)


@given(rule=rules(), seed=st.integers(0, 1_000), ranks=st.integers(1, 9), mean=st.floats(0.05, 60.0))
@settings(max_examples=150, deadline=None)
def test_counts_are_conserved(rule: CapacityRule, seed: int, ranks: int, mean: float) -> None:
    rng = np.random.default_rng(seed)
    experts, top_k = 12, 3
    source = rng.integers(0, 2, ranks) * rng.random(ranks) * mean + mean * rng.integers(0, 2)
    tokens = max(round(float(source.sum())), 1)
    counts = np.stack([EvenSampler(2, experts, top_k).counts(tokens, rng)[0] for _ in range(2)])
    counts[0] = rng.binomial(tokens, rng.random((2, experts)))
    flow = cap_counts(counts, np.tile(source, (2, 1)), rule, top_k=top_k)
    routed = counts.sum(axis=2)
    assert np.allclose(flow.processed.sum(axis=2) + flow.dropped.sum(axis=2), routed, rtol=1e-9, atol=1e-9)
    assert np.allclose(flow.rows, flow.processed + flow.padded)
    for values in (flow.processed, flow.dropped, flow.rerouted, flow.padded):
        assert (values >= 0).all()
        assert np.isfinite(values).all()
    assert (flow.dropped + flow.rerouted <= counts + 1e-9).all()


@given(seed=st.integers(0, 100), tokens=st.integers(0, 300))
@settings(max_examples=25, deadline=None)
def test_the_laws_of_counts_keep_their_sums(seed: int, tokens: int) -> None:
    rng = np.random.default_rng(seed)
    even = EvenSampler(2, 12, 5).counts([tokens, 7], rng)
    assert (even.sum(axis=2) == np.asarray([[tokens * 5], [35]])).all()
    assert np.ptp(even, axis=2).max() <= 1
    chance = rng.random((2, 12))
    drawn = VariableSampler(chance).counts(np.full(50, tokens), rng)
    assert ((drawn >= 0) & (drawn <= tokens)).all()
    mean, error = tokens * chance, 5 * np.sqrt(tokens * chance * (1 - chance) / 50) + 1e-9
    assert (np.abs(drawn.mean(axis=0) - mean) <= error).all()
