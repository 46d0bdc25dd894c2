"""Affinity on a trained router's trace and on planted ones: bytes cut between nodes, at no worse balance, held out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moesim.routing.planted import planted_trace
from moesim.routing.readers import read_loads
from moesim.spec.plan import ExpertPlacement
from placement.affinity_check import Row, check, planted_placement
from placement.copies import count_copies
from placement.problem import request_from_loads, solve
from placement.solvers import affinity
from placement.verdict import sign

TRACE = Path(__file__).parents[1] / "data" / "router_trace.parquet"


def row(communities: int, inside: float, nodes: int) -> Row:
    load, home = planted_trace(
        tokens=12_000, layers=2, experts=256, top_k=8, communities=communities, inside=inside, follow=0.7,
        rng=np.random.default_rng(0),
    )  # fmt: skip
    return check(load, ranks_per_node=8, nodes=nodes, home=home)


@pytest.mark.parametrize(("nodes", "cut"), [(2, 0.15), (4, 0.17), (8, 0.17)])
def test_a_trained_router_sends_fewer_copies_at_no_worse_balance(nodes: int, cut: float) -> None:
    """Over six splits the cut against greedy is 0.209, 0.233 and 0.227 on average (`placement.affinity_check`)."""
    judged = check(read_loads(TRACE, tokens=True), ranks_per_node=4, nodes=nodes).judged["affinity"]
    for reference in ("contiguous", "greedy", "eplb"):
        assert judged.gains[reference].low > cut
    assert sign(judged.balance_gains["greedy"]) >= 0  # not worse, as far as can be told
    assert sign(judged.balance_gains["contiguous"]) == 1
    modes = judged.copies["planned"]
    assert modes["low_latency"] == pytest.approx(4 * (1 - 1 / nodes))
    assert modes["stay"] < modes["home_by_request"] < modes["normal"]


@pytest.mark.parametrize(("nodes", "share"), [(2, 0.85), (4, 0.8), (8, 0.6)])
def test_most_of_what_was_planted_is_found_within_the_bounds(nodes: int, share: float) -> None:
    """What was planted is less even than the bounds allow, by chance, the more so on small nodes."""
    found = row(8, 0.5, nodes)
    recovered = found.recovered()
    assert recovered is not None and share < recovered < 1.05
    assert found.judged["affinity"].gains["greedy"].low > 0.0
    assert sign(found.judged["affinity"].balance_gains["greedy"]) >= 0


@pytest.mark.parametrize("nodes", [2, 4, 8])
def test_all_of_what_was_planted_is_found_without_them(nodes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for the chance of the sample (5 % load), the search itself reaches what was planted."""
    monkeypatch.setattr(affinity, "SEARCH_ABOVE", 1.05)
    load, home = planted_trace(
        tokens=12_000, layers=2, experts=256, top_k=8, communities=8, inside=0.5, follow=0.7,
        rng=np.random.default_rng(0),
    )  # fmt: skip
    request = replace(request_from_loads([load], slots=256, ranks=8 * nodes, nodes=nodes), dispersion=None)
    assert load.tokens is not None

    def copies(placement: ExpertPlacement) -> float:
        assert load.tokens is not None
        return count_copies(placement, load.tokens, nodes=nodes, replica="equal", blocks=1).mean()["normal"]

    found, truth = affinity.solve(request), planted_placement(request, home)
    greedy = copies(solve(request, "greedy").placement)
    assert (greedy - copies(found)) / (greedy - copies(truth)) > 0.99


@pytest.mark.parametrize("nodes", [2, 4, 8])
def test_without_structure_no_gain_is_told(nodes: int) -> None:
    judged = row(1, 0.0, nodes).judged["affinity"]
    assert judged.gains["greedy"].low <= 0.0
    assert abs(judged.gains["greedy"].value) < 0.005
    assert "no gain over greedy" in judged.sentence("affinity") or "more than greedy" in judged.sentence("affinity")
