"""What every replica choice must keep, and the least busiest rank against a linear program solved by HiGHS."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from moesim.errors import BadInput
from moesim.network.choice import AVERAGE_TOKENS, CHOICES, Replicas, following, prepare
from moesim.spec.plan import ExpertPlacement

NODES = 2
BY_BATCH = [name for name, choice in CHOICES.items() if not choice.fixed]
seeds = st.integers(0, 2**32 - 1)


def drawn(seed: int, *, whole: bool = True) -> tuple[ExpertPlacement, np.ndarray]:
    """A random placement, duplicates on a rank included, and counts of three steps, some of them of no tokens."""
    rng = np.random.default_rng(seed)
    ranks, layers = NODES * int(rng.integers(1, 5)), 2
    experts = int(rng.integers(1, 20))
    slots = -(-(experts + int(rng.integers(0, 2 * experts + 1))) // ranks) * ranks
    rows = [np.concatenate([np.arange(experts), rng.integers(0, experts, slots - experts)]) for _ in range(layers)]
    for row in rows:
        rng.shuffle(row)
    plan = ExpertPlacement(np.asarray(rows), np.arange(layers), experts, ranks, layers)
    most = int(rng.choice([2, 30, 5000]))
    counts = rng.integers(0, most, (3, layers, experts)) * (rng.random((3, layers, experts)) < 0.7)
    return plan, counts.astype(float) if whole else counts * rng.random(counts.shape)


def by_expert(replicas: Replicas, loads: np.ndarray) -> np.ndarray:
    """What the slots of each expert serve together: [steps, layers, experts]."""
    plan = replicas.placement
    whole = np.zeros((len(loads), plan.layers, plan.experts))
    rows = np.arange(plan.layers)[:, None]
    for step, of_step in enumerate(loads):
        np.add.at(whole[step], (rows, plan.physical_to_logical), of_step)
    return whole


@pytest.mark.parametrize("name", CHOICES)
@given(seeds, st.booleans())
@settings(max_examples=40, deadline=None)
def test_every_token_goes_to_one_replica_of_its_expert(name: str, seed: int, whole: bool) -> None:
    plan, counts = drawn(seed, whole=whole)
    replicas = prepare(plan, policy=name, nodes=NODES)
    loads = replicas.slot_loads(counts)
    assert loads.shape == (3, plan.layers, plan.slots)
    assert (loads >= 0.0).all()
    np.testing.assert_allclose(by_expert(replicas, loads), counts, rtol=1e-12, atol=1e-9)
    np.testing.assert_allclose(replicas.rank_loads(counts).sum(axis=-1), counts.sum(axis=-1), rtol=1e-12, atol=1e-9)
    if whole and not CHOICES[name].fixed:
        np.testing.assert_array_equal(loads, np.rint(loads))
    np.testing.assert_array_equal(replicas.slot_loads(counts[1]), loads[1])  # batches do not touch each other


def least_by_highs(plan: ExpertPlacement, layer: int, counts: np.ndarray) -> float:
    """The optimum of the linear program: minimise t; slots of an expert serve its count, no rank serves over t."""
    slots = plan.slots
    rank = np.arange(slots) // plan.slots_per_rank
    equal, upper = np.zeros((plan.experts, slots + 1)), np.zeros((plan.ranks, slots + 1))
    equal[plan.physical_to_logical[layer], np.arange(slots)] = 1.0
    upper[rank, np.arange(slots)] = 1.0
    upper[:, -1] = -1.0
    goal = np.append(np.zeros(slots), 1.0)
    found = linprog(goal, A_ub=upper, b_ub=np.zeros(plan.ranks), A_eq=equal, b_eq=counts, method="highs")
    assert found.status == 0
    return float(found.fun)


@pytest.mark.parametrize("whole", [True, False])
@given(seeds)
@settings(max_examples=40, deadline=None)
def test_the_least_busiest_rank_is_the_linear_programs(whole: bool, seed: int) -> None:
    plan, counts = drawn(seed, whole=whole)
    busiest = prepare(plan, policy="lp", nodes=NODES).rank_loads(counts).max(axis=-1)
    equal = prepare(plan, policy="equal", nodes=NODES).rank_loads(counts).max(axis=-1)
    for step in range(len(counts)):
        for layer in range(plan.layers):
            least = least_by_highs(plan, layer, counts[step, layer])
            # Whole tokens: no split of whole tokens is below the next whole number, and flows reach it.
            expected = np.ceil(least - 1e-6) if whole else least
            assert busiest[step, layer] == pytest.approx(expected, rel=1e-7, abs=1e-7)
    assert (busiest <= (np.ceil(equal - 1e-9) if whole else equal * (1 + 1e-9) + 1e-9)).all()


@given(seeds)
@settings(max_examples=40, deadline=None)
def test_fewest_activated_touches_each_wanted_expert_once(seed: int) -> None:
    plan, counts = drawn(seed)
    replicas = prepare(plan, policy="fewest_activated", nodes=NODES)
    touched = (replicas.slot_loads(counts) > 0).sum(axis=-1)
    np.testing.assert_array_equal(touched, (counts > 0).sum(axis=-1))


def one_layer(row: list[int], ranks: int) -> ExpertPlacement:
    return ExpertPlacement(np.asarray([row]), np.arange(1), max(row) + 1, ranks, 1)


def test_by_hand() -> None:
    # Rank 0: experts 0, 1; rank 1: 0, 2; rank 2: 2, 3. Expert 3 has 10 tokens and no choice, so 2 moves to rank 1 and 0
    # to rank 0: loads 6 + 2, 8, 10.
    plan = one_layer([0, 1, 0, 2, 2, 3], ranks=3)
    counts = np.asarray([[6.0, 2.0, 8.0, 10.0]])
    assert prepare(plan, policy="lp", nodes=1).rank_loads(counts)[0].max() == 10.0
    assert prepare(plan, policy="equal", nodes=1).rank_loads(counts)[0].tolist() == [5.0, 7.0, 14.0]
    # The chain: expert 0 starts on full rank 0, whose expert 1 moves on to rank 1, whose expert 2 moves on to rank 2.
    chain = one_layer([0, 1, 1, 2, 2, 3], ranks=3)
    loads = prepare(chain, policy="lp", nodes=1).slot_loads(np.asarray([[9.0, 9.0, 9.0, 0.0]]))[0]
    assert loads.tolist() == [9.0, 0.0, 9.0, 0.0, 9.0, 0.0]
    # In turns, five tokens of expert 1 over three replicas from the second on: 1, 2, 2; half a token more: 1.5.
    turns = prepare(one_layer([1, 0, 1, 0, 1, 0], ranks=3), policy="round_robin", nodes=1)
    assert turns.slot_loads(np.asarray([[0.0, 5.0]]))[0].tolist() == [1.0, 0.0, 2.0, 0.0, 2.0, 0.0]
    assert turns.slot_loads(np.asarray([[0.0, 5.5]]))[0].tolist() == [1.5, 0.0, 2.0, 0.0, 2.0, 0.0]
    # Experts without a choice first: rank 0 reads expert 1, so that 0 is read on rank 1 and 2 on rank 2.
    fewest = prepare(plan, policy="fewest_activated", nodes=1)
    assert fewest.slot_loads(np.asarray([[6.0, 2.0, 8.0, 0.0]]))[0].tolist() == [0.0, 2.0, 6.0, 0.0, 8.0, 0.0]


def test_averages_are_those_of_very_many_tokens() -> None:
    plan, counts = drawn(7)
    profile = counts[0] / np.maximum(counts[0].sum(axis=-1, keepdims=True), 1.0)
    for name in CHOICES:
        replicas = prepare(plan, policy=name, nodes=NODES)
        average = replicas.average_rank_loads(profile)
        np.testing.assert_allclose(average.sum(axis=-1), profile.sum(axis=-1), rtol=1e-8)
        many = replicas.rank_loads(np.rint(profile * AVERAGE_TOKENS)) / AVERAGE_TOKENS
        np.testing.assert_allclose(average, many, rtol=1e-6, atol=1e-8)


def test_choices_that_there_are_not_are_refused() -> None:
    with pytest.raises(BadInput, match=r"nearest.*round_robin"):
        prepare(one_layer([0, 1], ranks=2), policy="nearest", nodes=1)


@given(seeds)
@settings(max_examples=40, deadline=None)
def test_a_stale_choice_keeps_every_token_and_is_the_fresh_one_on_its_own_counts(seed: int) -> None:
    plan, counts = drawn(seed)
    replicas = prepare(plan, policy="lp", nodes=NODES)
    np.testing.assert_allclose(
        following(replicas, counts).slot_loads(counts), replicas.slot_loads(counts), rtol=1e-12, atol=1e-9
    )
    before = np.roll(counts, 1, axis=0)
    stale = following(replicas, before)
    loads = stale.slot_loads(counts)
    assert (loads >= 0.0).all()
    np.testing.assert_allclose(by_expert(stale, loads), counts, rtol=1e-9, atol=1e-9)
    assert stale.choice.updates_map and not stale.choice.exchanges_counts
