"""Every gate keeps the promises of the interface, and its own rule as an independent loop states it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from moesim.errors import BadInput
from moesim.routing.gates.balanced import base_assignment, expert_choice
from moesim.routing.gates.dynamic import top_p
from moesim.routing.gates.gate import GateChoice
from moesim.routing.gates.grouped import device_limited, group_limited, two_level
from moesim.routing.gates.noisy import gumbel_topk, noisy_topk
from moesim.routing.gates.registry import GATES
from moesim.routing.gates.routed import TokenScores, best, step_counts
from moesim.routing.gates.scores import limited_counts, scores_of_trace
from moesim.routing.gates.topk import bias_corrected, softmax_topk, updated_bias
from moesim.routing.successive import successive_inclusion
from tests.gate_cases import choice_for, scores_for

EVEN = ("expert_choice", "base", "dense", "soft")


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(64, 16, 4), (1, 8, 2), (96, 32, 6)])
def test_every_gate_keeps_the_interface(name: str, tokens: int, experts: int, top_k: int) -> None:
    scores = scores_for(tokens, experts, seed=1)
    how = choice_for(name, top_k=top_k)
    if name == "soft" and tokens * top_k % experts:
        with pytest.raises(BadInput, match="slots"):
            GATES[name].gate(scores, how, np.random.default_rng(0))
        return
    routed = GATES[name].gate(scores, how, np.random.default_rng(0))
    assert routed.ids.shape == routed.weights.shape
    assert routed.ids.shape[0] == tokens
    assert ((routed.ids >= -1) & (routed.ids < experts)).all()
    assert np.isfinite(routed.weights).all()
    assert (routed.weights >= 0).all()
    assert not routed.weights[routed.ids < 0].any()
    if name != "soft":  # its slots are mixtures, and one row may hold two of one expert
        for row in routed.ids:
            held = row[row >= 0]
            assert len(set(held.tolist())) == len(held)
    law = GATES[name].law
    if law == "top_k":
        assert (routed.ids >= 0).all()
        assert routed.ids.shape[1] == how.top_k
    assert routed.counts().sum() == (routed.ids >= 0).sum()
    if name in EVEN:
        assert np.ptp(routed.counts()) <= (-(-tokens // how.block) if name == "base" else 1)
    again = GATES[name].gate(scores, how, np.random.default_rng(0))
    assert np.array_equal(again.ids, routed.ids)
    assert np.array_equal(again.weights, routed.weights)


@pytest.mark.parametrize("name", GATES)
def test_counts_by_source_rank_add_up(name: str) -> None:
    scores, ranks = scores_for(64, 16, seed=2), 4
    source = np.random.default_rng(3).integers(0, ranks, 64)
    routed = GATES[name].gate(scores, choice_for(name, top_k=4), np.random.default_rng(0))
    counts = step_counts([[routed, routed], [routed, routed]], [source, source[::-1]], ranks)
    assert counts.shape == (2, 2, ranks, 16)
    assert np.array_equal(counts.sum(axis=2)[0, 0], routed.counts())
    own = routed.ids[source == 1]
    assert np.array_equal(counts[0, 0, 1], np.bincount(own[own >= 0], minlength=16))


def test_softmax_and_sigmoid_pick_the_largest_logits_and_weigh_by_them() -> None:
    logits = np.asarray([[0.0, 2.0, 1.0, -1.0]])
    routed = softmax_topk(TokenScores(logits), GateChoice(2), np.random.default_rng(0))
    assert routed.ids.tolist() == [[1, 2]]
    assert routed.weights[0] == pytest.approx([np.e / (np.e + 1), 1 / (np.e + 1)])
    sigmoid = GATES["sigmoid_topk"].gate(TokenScores(logits), GateChoice(2, normalise=False), np.random.default_rng(0))
    assert sigmoid.ids.tolist() == [[1, 2]]
    assert sigmoid.weights[0] == pytest.approx([1 / (1 + np.exp(-2)), 1 / (1 + np.exp(-1))])


def test_the_bias_decides_but_does_not_weigh_and_evens_the_loads() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2000, 16)) + np.linspace(-1, 1, 16)
    how, bias, before = GateChoice(4, scoring="sigmoid"), np.zeros(16), 0.0
    for round_ in range(500):
        routed = bias_corrected(TokenScores(logits, bias=bias), how, rng)
        before = before or float(np.ptp(routed.counts()))
        bias = updated_bias(bias, routed.counts(), step=0.01 if round_ < 350 else 0.001)
    assert np.ptp(routed.counts()) < 0.03 * before
    chance = 1 / (1 + np.exp(-logits))
    held = np.take_along_axis(chance, routed.ids, axis=1)
    assert np.allclose(routed.weights, held / held.sum(axis=1, keepdims=True))


def by_loop(key: np.ndarray, how: GateChoice, kept: int) -> np.ndarray:
    found = []
    size = key.shape[1] // how.groups
    for row in key:
        rating = [sum(sorted(row[g * size : (g + 1) * size])[-kept:]) for g in range(how.groups)]
        opened = sorted(range(how.groups), key=lambda g: -rating[g])[: how.top_groups]
        allowed = [e for e in range(len(row)) if e // size in opened]
        found.append(sorted(sorted(allowed, key=lambda e: -row[e])[: how.top_k]))
    return np.asarray(found)


@pytest.mark.parametrize("seed", [0, 1])
def test_group_and_device_limits_by_loop(seed: int) -> None:
    scores, how = scores_for(200, 32, seed), GateChoice(6, 8, 3, scoring="sigmoid")
    chance = 1 / (1 + np.exp(-scores.logits))
    assert scores.bias is not None
    v3 = group_limited(scores, how, np.random.default_rng(0))
    assert np.array_equal(np.sort(v3.ids, axis=1), by_loop(chance + scores.bias, how, 2))
    soft = GateChoice(6, 8, 3, scoring="softmax")
    v2 = device_limited(scores, soft, np.random.default_rng(0))
    raised = np.exp(scores.logits)
    assert np.array_equal(np.sort(v2.ids, axis=1), by_loop(raised / raised.sum(1, keepdims=True), how, 1))


@pytest.mark.parametrize(
    ("name", "kept", "scoring"), [("group_limited", 2, "sigmoid"), ("device_limited", 1, "softmax")]
)
def test_the_compiled_counts_are_the_gates(name: str, kept: int, scoring: str) -> None:
    rng = np.random.default_rng(5)
    log_weight, noise = rng.normal(size=64) - 5, rng.gumbel(size=(1000, 64))
    how = GateChoice(6, 8, 3, scoring=scoring)
    wanted = GATES[name].gate(TokenScores(log_weight + noise), how, rng).counts()
    found = limited_counts(np.exp(log_weight), np.exp(noise), 8, 3, 6, kept, scoring == "sigmoid")
    assert np.array_equal(found, wanted)


def test_two_levels_open_groups_first_and_share_the_picks() -> None:
    scores, how = scores_for(100, 24, seed=4), GateChoice(4, 6, 2)
    routed = two_level(scores, how, np.random.default_rng(0))
    mass = np.exp(scores.logits).reshape(100, 6, 4).sum(axis=2)
    for row, ids in enumerate(routed.ids):
        opened = sorted(np.argsort(-mass[row])[:2].tolist())
        assert sorted({int(e) // 4 for e in ids}) == opened
        for group in opened:
            inside = sorted(int(e) for e in ids if e // 4 == group)
            wanted = np.argsort(-scores.logits[row, group * 4 : group * 4 + 4])[:2] + group * 4
            assert inside == sorted(wanted.tolist())
    with pytest.raises(BadInput, match="divide"):
        two_level(scores, GateChoice(5, 6, 2), np.random.default_rng(0))


def test_noise_follows_its_scale() -> None:
    logits = np.tile(np.linspace(0, 3, 8), (4000, 1))
    quiet = noisy_topk(TokenScores(logits), GateChoice(2, noise=1e-6), np.random.default_rng(0))
    assert (np.sort(quiet.ids, axis=1) == [6, 7]).all()
    loud = noisy_topk(TokenScores(logits), GateChoice(2, noise=100.0), np.random.default_rng(0))
    assert loud.counts() == pytest.approx(np.full(8, 1000.0), rel=0.15)
    gumbel = gumbel_topk(TokenScores(logits), GateChoice(2, temperature=2.0), np.random.default_rng(0))
    wanted = successive_inclusion(np.exp(logits[0] / 2.0), 2)
    z = (gumbel.counts() / 4000 - wanted) / np.sqrt(wanted * (1 - wanted) / 4000)
    assert np.abs(z).max() < 4.0


def test_experts_choose_the_tokens_that_want_them_most() -> None:
    scores = scores_for(40, 8, seed=6)
    routed = expert_choice(scores, GateChoice(2), np.random.default_rng(0))
    chance = np.exp(scores.logits) / np.exp(scores.logits).sum(axis=1, keepdims=True)
    for expert in range(8):
        takers = np.nonzero((routed.ids == expert).any(axis=1))[0]
        assert sorted(takers.tolist()) == sorted(np.argsort(-chance[:, expert])[:10].tolist())


def test_the_balanced_assignment_is_the_best_even_one() -> None:
    scores = scores_for(6, 3, seed=7)
    routed = base_assignment(scores, GateChoice(1), np.random.default_rng(0))
    got = scores.logits[np.arange(6), routed.ids[:, 0]].sum()
    every = set(itertools.permutations([0, 0, 1, 1, 2, 2]))
    assert got == pytest.approx(max(sum(scores.logits[t, e] for t, e in enumerate(order)) for order in every))
    with pytest.raises(BadInput, match="one expert"):
        base_assignment(scores, GateChoice(2), np.random.default_rng(0))


def test_top_p_takes_the_fewest_that_reach_the_threshold() -> None:
    logits = np.log(np.asarray([[0.5, 0.3, 0.15, 0.05], [0.25, 0.25, 0.25, 0.25]]))
    routed = top_p(TokenScores(logits), GateChoice(2, threshold=0.7, max_k=4), np.random.default_rng(0))
    assert (routed.ids[0] >= 0).tolist() == [True, True, False, False]
    assert (routed.ids[1] >= 0).sum() == 3
    assert (top_p(TokenScores(logits), GateChoice(2, threshold=0.01), np.random.default_rng(0)).ids >= 0).sum() == 2


def test_samples_and_topology_and_hash_follow_their_columns() -> None:
    scores = scores_for(64, 16, seed=8)
    assert scores.request is not None
    assert scores.token_ids is not None
    rng = np.random.default_rng(0)
    sample = GATES["sample"].gate(scores, GateChoice(3), rng)
    for request in np.unique(scores.request):
        assert (np.ptp(sample.ids[scores.request == request], axis=0) == 0).all()
    far = GATES["topology"].gate(scores, GateChoice(3, locality=100.0), rng)
    assert scores.source_node is not None
    assert (far.ids // 8 == scores.source_node[:, None]).all()
    same = TokenScores(scores.logits, token_ids=np.full(64, 17))
    assert (np.ptp(GATES["hash"].gate(same, GateChoice(3), rng).ids, axis=0) == 0).all()
    for name, column in (("sample", "request"), ("topology", "source_node"), ("hash", "token_ids")):
        with pytest.raises(BadInput, match=column):
            GATES[name].gate(TokenScores(scores.logits), GateChoice(3), rng)


def test_a_trace_of_ids_becomes_scores_that_give_it_back() -> None:
    rng = np.random.default_rng(9)
    ids = np.stack([rng.permutation(16)[:4] for _ in range(300)])
    scores = scores_of_trace(ids, np.log(rng.dirichlet(np.ones(16))), rng)
    assert np.array_equal(softmax_topk(scores, GateChoice(4), rng).ids, ids)
    wider = softmax_topk(scores, GateChoice(6), rng)
    assert np.array_equal(wider.ids[:, :4], ids)


def test_ties_go_to_the_lower_expert_and_shut_ones_are_never_picked() -> None:
    assert best(np.asarray([[1.0, 1.0, 1.0, 0.0]]), 2).tolist() == [[0, 1]]
    assert best(np.asarray([[-np.inf, 2.0, -np.inf]]), 2).tolist() == [[1, -1]]


def test_bad_scores_are_refused() -> None:
    with pytest.raises(BadInput, match="logits"):
        TokenScores(np.asarray([[np.nan]]))
    with pytest.raises(BadInput, match="bias"):
        TokenScores(np.zeros((2, 3)), bias=np.zeros(2))
    with pytest.raises(BadInput, match="groups"):
        group_limited(TokenScores(np.zeros((2, 10))), GateChoice(2, 3, 1), np.random.default_rng(0))
    with pytest.raises(BadInput, match="hold"):
        group_limited(TokenScores(np.zeros((2, 12))), GateChoice(5, 3, 1), np.random.default_rng(0))
