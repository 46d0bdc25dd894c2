"""Capacity: formulas against whole-number brute force, places against a loop over tokens, counts against ids."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from moesim.errors import BadInput
from moesim.routing.by_source import split_by_source
from moesim.routing.capacity.formulas import FORMULAS, capacity
from moesim.routing.capacity.on_counts import cap_counts, excess
from moesim.routing.capacity.on_ids import keep_within
from moesim.routing.capacity.rule import CapacityRule
from moesim.routing.gates.routed import Routed, best, softmax, taken

CASES = 10_000
CENTS = 100


def fits_below(share: int, experts: int) -> Callable[[int], bool]:
    """Whether `places` for each expert are at most share / CENTS in all: the floor is the most that do."""
    return lambda places: places * experts * CENTS <= share


def most(share: int, experts: int) -> int:
    """Largest whole number of places with places x experts <= share / CENTS, found by stepping."""
    fits, start = fits_below(share, experts), max(int(share / CENTS / experts) - 2, 0)
    return next(places for places in itertools.count(start) if fits(places) and not fits(places + 1))


def least(share: int, experts: int) -> int:
    """Smallest whole number of places with places x experts >= share / CENTS, found by stepping."""
    start = max(int(share / CENTS / experts) - 2, 0)
    return next(places for places in itertools.count(start) if places * experts * CENTS >= share)


BRUTE: dict[str, Callable[[int, int, int, int, int, int], int]] = {
    "gshard": lambda t, e, k, f, low, high: min(t, most(t * f, e)),
    "switch": lambda t, e, k, f, low, high: most(t * f, e),
    "deepspeed": lambda t, e, k, f, low, high: max(least(k * t * f, e), low),
    "megatron": lambda t, e, k, f, low, high: least(t * k * f, e),
    "survey": lambda t, e, k, f, low, high: min(most(t * f, e), high),
}


@pytest.mark.parametrize("rule", FORMULAS)
def test_formulas_equal_brute_force(rule: str) -> None:
    rng = np.random.default_rng(0)
    tokens, experts = rng.integers(0, 20_000, CASES), rng.integers(1, 400, CASES)
    top_k, cents = rng.integers(1, 17, CASES), rng.integers(1, 800, CASES)
    low, high = rng.integers(0, 9, CASES), rng.integers(0, 3_000, CASES)
    even = rng.random(CASES) < 0.2  # where the division has no remainder, rounding in floats goes wrong most
    tokens = np.where(even, tokens // experts * experts, tokens)
    for t, e, k, f, lo, hi in zip(tokens, experts, top_k, cents, low, high, strict=True):
        found = capacity(
            rule, t, experts=int(e), top_k=int(k), factor=f / CENTS, min_capacity=int(lo), max_capacity=int(hi)
        )
        assert found == BRUTE[rule](int(t), int(e), int(k), int(f), int(lo), int(hi)), (t, e, k, f, lo, hi)


def test_formulas_by_hand() -> None:
    assert capacity("gshard", 4096, experts=64, top_k=2, factor=2.0) == 128  # without k
    assert capacity("gshard", 8, experts=2, top_k=2, factor=100.0) == 8
    assert capacity("switch", 512, experts=4, top_k=1, factor=1.25) == 160
    assert capacity("deepspeed", 100, experts=64, top_k=1, factor=1.0) == 4  # 2 by the formula, 4 the least
    assert capacity("deepspeed", 100, experts=8, top_k=2, factor=1.1) == 28
    assert capacity("megatron", 4096, experts=256, top_k=8, factor=1.1) == 141
    assert capacity("megatron", 100, experts=10, top_k=1, factor=1.1) == 11  # 12 in floats
    assert capacity("survey", 4096, experts=8, top_k=2, factor=1.5, max_capacity=500) == 500
    for factor in (0.0, -1.0, float("nan"), 1e-7):
        with pytest.raises(BadInput, match="capacity factor"):
            capacity("megatron", 1, experts=1, top_k=1, factor=factor)
    with pytest.raises(BadInput, match="unknown"):
        capacity("other", 1, experts=1, top_k=1, factor=1.0)


def routed_tokens(tokens: int, experts: int, top_k: int, rng: np.random.Generator) -> tuple[Routed, np.ndarray]:
    chance = softmax(1.5 * rng.normal(size=(tokens, experts)) + rng.normal(size=experts))
    ids = best(chance, top_k)
    return Routed(ids, taken(chance, ids), experts), chance


def by_loop(routed: Routed, chance: np.ndarray, rule: CapacityRule, source: np.ndarray, top_k: int) -> np.ndarray:
    """Give out places one by one; ids that are left."""
    held = np.bincount(source)
    room = {(s, e): int(rule.capacity(held[s], routed.experts, top_k)) for s in range(len(held))
            for e in range(routed.experts)}  # fmt: skip
    picks = [(t, j) for t in range(len(routed.ids)) for j in range(top_k)]
    if rule.drop == "probability":
        picks.sort(key=lambda pick: (-routed.weights[pick], pick))
    elif rule.by_choice:
        picks.sort(key=lambda pick: (pick[1], pick[0]))
    out, lost = np.full(routed.ids.shape, -1), []
    for t, j in picks:
        cell = (int(source[t]), int(routed.ids[t, j]))
        if room[cell] > 0:
            room[cell] -= 1
            out[t, j] = routed.ids[t, j]
        else:
            lost.append((j, t))
    if rule.backup == "next_best":
        for j, t in sorted(lost):
            for e in np.argsort(-chance[t]):
                if room[(int(source[t]), int(e))] > 0 and e not in out[t] and e not in routed.ids[t]:
                    room[(int(source[t]), int(e))] -= 1
                    out[t, j] = e
                    break
    return out


@pytest.mark.parametrize("backup", [None, "next_best"])
@pytest.mark.parametrize(("drop", "by_choice"), [("position", True), ("position", False), ("probability", False)])
def test_places_go_as_a_loop_gives_them(drop: str, by_choice: bool, backup: str | None) -> None:
    for seed in range(25):
        rng = np.random.default_rng(seed)
        experts, top_k = int(rng.integers(3, 12)), int(rng.integers(1, 3))
        routed, chance = routed_tokens(int(rng.integers(1, 60)), experts, top_k, rng)
        source = np.sort(rng.integers(0, 3, len(routed.ids)))
        source = np.unique(source, return_inverse=True)[1]
        rule = CapacityRule("megatron", float(rng.choice([0.5, 0.8, 1.0, 1.3])), drop, by_choice, backup)
        kept = keep_within(routed, rule, rng, top_k=top_k, source=source, scores=chance)
        wanted = by_loop(routed, chance, rule, source, top_k)
        if backup is None:
            assert np.array_equal(kept.routed.ids, wanted)
        else:  # who gets a contested place may differ by pass, how many places are filled may not
            assert (kept.routed.ids >= 0).sum() >= 0.97 * (wanted >= 0).sum()
            assert (kept.dropped.sum() + (kept.routed.ids >= 0).sum()) == routed.ids.size


def test_random_drops_are_even_and_backups_take_one_try() -> None:
    tokens = 400
    routed = Routed(np.zeros((tokens, 1), dtype=np.int64), np.ones((tokens, 1)), 2)
    lost = np.zeros(tokens)
    rule = CapacityRule("megatron", 0.5, "random")
    for seed in range(200):
        lost += keep_within(routed, rule, np.random.default_rng(seed), top_k=1).routed.ids[:, 0] < 0
    assert lost.mean() == 150  # 100 of 400 have a place
    assert abs(lost[:200].mean() - lost[200:].mean()) < 3
    again = CapacityRule("megatron", 1.0, "position", backup="random")
    moved = keep_within(routed, again, np.random.default_rng(0), top_k=1)
    assert moved.rerouted[0] == pytest.approx(100, abs=30)  # half of the 200 lost tried the empty expert
    assert moved.rerouted.sum() + moved.dropped.sum() == 200


@pytest.mark.parametrize(
    ("picks", "tokens", "held", "places"),
    [(40, 512, 16, 1), (40, 512, 16, 4), (300, 512, 64, 30), (3, 4096, 128, 4), (2000, 4096, 1000, 500), (5, 8, 4, 0)],
)
def test_the_expected_excess_is_the_hypergeometrics(picks: int, tokens: int, held: int, places: int) -> None:
    x = np.arange(held + 1)
    wanted = (np.maximum(x - places, 0) * stats.hypergeom.pmf(x, tokens, picks, held)).sum()
    assert excess(float(picks), float(tokens), float(held), float(places)) == pytest.approx(wanted, rel=1e-7, abs=1e-12)


def test_counts_tell_what_ids_do() -> None:
    """The mean over many steps of what is dropped by ids is what the counts of those steps tell."""
    rng = np.random.default_rng(1)
    ranks, each, experts, top_k = 4, 32, 16, 4
    rule = CapacityRule("megatron", 1.0, "position")
    source = np.repeat(np.arange(ranks), each)
    exact, told = [], []
    popular = rng.normal(size=experts)
    for _ in range(300):
        chance = softmax(popular + rng.gumbel(size=(ranks * each, experts)))
        ids = best(chance, top_k)
        routed = Routed(ids, taken(chance, ids), experts)
        exact.append(keep_within(routed, rule, rng, top_k=top_k, source=source).dropped)
        flow = cap_counts(routed.counts()[None, None], np.full((1, ranks), float(each)), rule, top_k=top_k)
        told.append(flow.dropped[0, 0])
    assert flow.tag == "assumed"
    by_ids, by_counts = np.asarray(exact), np.asarray(told)
    assert by_counts.sum() == pytest.approx(by_ids.sum(), rel=0.01)
    error = 4.5 * by_ids.std(axis=0) / np.sqrt(300) + 0.02
    assert (np.abs(by_counts.mean(axis=0) - by_ids.mean(axis=0)) < error).all()


def test_one_source_is_exact() -> None:
    counts = np.asarray([[[10.0, 3.0, 0.0, 7.0]]])
    rule = CapacityRule("megatron", 1.0, "position")
    flow = cap_counts(counts, np.asarray([[10.0]]), rule, top_k=2)
    assert flow.tag == "formula"
    assert flow.dropped.ravel().tolist() == [5.0, 0.0, 0.0, 2.0]
    padded = cap_counts(counts, np.asarray([[10.0]]), CapacityRule("megatron", 1.0, "position", pad=True), top_k=2)
    assert padded.rows.ravel().tolist() == [5.0, 5.0, 5.0, 5.0]
    assert padded.padded.ravel().tolist() == [0.0, 2.0, 5.0, 0.0]
    moved = cap_counts(
        counts, np.asarray([[10.0]]), CapacityRule("megatron", 1.0, "position", backup="next_best"), top_k=2
    )
    assert moved.processed.ravel().tolist() == pytest.approx([5.0, 5.0, 5.0, 5.0])
    assert moved.dropped.sum() == pytest.approx(0.0, abs=1e-9)
    assert moved.rerouted.ravel().tolist() == pytest.approx([5.0, 0.0, 0.0, 2.0])


def test_a_split_by_source_drops_what_the_counts_tell() -> None:
    rng = np.random.default_rng(2)
    source, experts = np.asarray([[30, 10, 60, 0]]), 8
    counts = np.tile(rng.integers(0, 100, (1, 1, experts)).astype(float), (4_000, 1, 1))
    split = split_by_source(counts, np.repeat(source, 4_000, axis=0), rng)
    assert np.array_equal(split.sum(axis=2), counts)
    assert (split <= source[:, None, :, None]).all()
    rule = CapacityRule("megatron", 1.0, "position")
    limit = rule.capacity(source, experts, 4)
    dropped = np.maximum(split - limit[:, None, :, None], 0).sum(axis=2)
    told = cap_counts(counts[:1], source.astype(float), rule, top_k=4).dropped[0]
    spread = np.maximum(dropped.std(axis=0), np.sqrt(told))  # a rare drop may not be among the draws at all
    assert (np.abs(dropped.mean(axis=0) - told) <= 4.5 * spread / np.sqrt(4_000)).all()
    with pytest.raises(BadInput, match="more tokens"):
        split_by_source(np.full((1, 1, 2), 5.0), np.asarray([[1, 2]]), rng)
