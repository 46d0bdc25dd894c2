"""Paths of single changes and the moves between placements: legal at every moment, never worse, counted as engines."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.engine.relayout_moves import plan_moves
from moesim.spec.plan import PlacementRequest, max_over_mean
from placement.dynamics.hindsight import best_in_hindsight
from placement.dynamics.series import Prices
from placement.problem import solve
from placement.solvers.incremental import NEARLY
from placement.solvers.repack import descend, hottest, hottest_each, row_moves


@st.composite
def requests(draw: st.DrawFn) -> PlacementRequest:
    ranks = draw(st.integers(2, 6))
    experts = draw(st.integers(2, 18))
    fewest = -(-experts // ranks)
    per_rank = draw(st.integers(fewest, max(fewest, min(experts, fewest + 3))))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    loads = rng.lognormal(0.0, draw(st.floats(0.0, 2.5)), (2, 1, experts))
    return PlacementRequest(
        loads=loads / loads.sum(axis=-1, keepdims=True),
        weights=np.full(2, 0.5),
        layer_ids=np.arange(1),
        absolute_layers=1,
        slots=per_rank * ranks,
        ranks=ranks,
    )


def of_load(request: PlacementRequest, index: int) -> PlacementRequest:
    return replace(request, loads=request.loads[index : index + 1], weights=np.ones(1))


@settings(max_examples=80, deadline=None)
@given(requests())
def test_every_row_of_a_path_is_legal_and_cooler_than_the_one_before(request: PlacementRequest) -> None:
    start = solve(of_load(request, 0), "greedy").placement.physical_to_logical[0]
    load = np.ascontiguousarray(request.loads[1, 0])
    rows, loads = descend(start, load, request.ranks, request.ranks, request.slots, 0.0)
    assert np.array_equal(rows[0], start)
    assert (np.diff(loads) <= 1e-12).all()
    for before, row, most in zip([start, *rows], rows, loads, strict=False):
        placement = request.placement(row[None], "path")  # raises where an expert has no replica
        assert placement.duplicates_on_one_rank() == 0
        assert np.isclose(placement.rank_loads(load[None]).max(), most)
        assert np.isclose(hottest(row, load, request.ranks), most)
        assert (before != row).sum() <= 2


@settings(max_examples=80, deadline=None)
@given(requests(), st.booleans())
def test_moves_are_those_of_the_engine_side(request: PlacementRequest, split: bool) -> None:
    old, new = (solve(of_load(request, index), "greedy").placement for index in (0, 1))
    domain = np.arange(request.ranks) // (max(request.ranks // 2, 1) if split else request.ranks)
    moves = plan_moves(old, new, domain.tolist())
    rows = (old.physical_to_logical[0], new.physical_to_logical[0])
    moved, both = row_moves(*rows, domain, request.experts, 1.0, 1.0)
    assert moved == moves.count
    received = np.bincount(moves.destination, minlength=request.ranks).max(initial=0)
    sent = moves.count / request.ranks
    if not split:
        assert both >= max(received, sent) - 1e-12
    assert row_moves(rows[0], rows[0], domain, request.experts, 1.0, 1.0) == (0, 0.0)
    _, far = row_moves(*rows, domain, request.experts, 0.0, 1.0)
    crossing = (domain[moves.source] != domain[moves.destination]).sum()
    assert (far > 0) == (crossing > 0)


@settings(max_examples=60, deadline=None)
@given(requests())
def test_incremental_is_legal_nearly_as_good_and_moves_no_more_than_fresh(request: PlacementRequest) -> None:
    current = solve(of_load(request, 0), "greedy").placement
    asked = replace(of_load(request, 1), current=current)
    found, fresh = (solve(asked, name).placement for name in ("incremental", "greedy"))
    assert found.duplicates_on_one_rank() == 0
    load = asked.mix()
    figures = [float(max_over_mean(one.rank_loads(load))[0]) for one in (found, fresh)]
    assert figures[0] <= figures[1] * (1.0 + NEARLY) + 1e-9
    same = solve(replace(of_load(request, 0), current=current), "incremental").placement
    domain = np.zeros(request.ranks, dtype=np.int64)
    row = (current.physical_to_logical[0], same.physical_to_logical[0])
    better = max_over_mean(same.rank_loads(request.loads[0])) < max_over_mean(current.rank_loads(request.loads[0]))
    assert row_moves(*row, domain, request.experts, 1.0, 1.0)[0] == 0 or better.all()


@settings(max_examples=25, deadline=None)
@given(requests(), st.floats(0.0, 3.0), st.integers(0, 2**32 - 1))
def test_the_best_in_hindsight_is_that_of_trying_every_way(request: PlacementRequest, move_s: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tables = [
        solve(request, "contiguous").placement.physical_to_logical,
        *(solve(of_load(request, index), "greedy").placement.physical_to_logical for index in (0, 1)),
    ]
    counts = rng.lognormal(0.0, 1.0, (4, 1, request.experts))
    prices = Prices(1.0, move_s, move_s, np.zeros(request.ranks, dtype=np.int64))
    least = np.inf
    for way in product(range(3), repeat=4):
        total, at = 0.0, 0
        for step, to in enumerate(way):
            total += prices.moves(tables[at], tables[to], request.experts)[1].sum()
            total += hottest_each(tables[to], counts[step : step + 1], request.ranks).sum()
            at = to
        least = min(least, total)
    assert np.isclose(best_in_hindsight(counts, tables, prices), least)
