"""What a layer costs in time, for solvers that read it, from a scenario and the loads that a plan is fitted to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from moesim import plugins
from moesim.routing.trace import RoutingCounts
from moesim.spec.layer_cost import LayerCost
from moesim.spec.plan import PlacementRequest
from moesim.spec.scenario import Scenario

if TYPE_CHECKING:
    from moesim.engine.deployment import Groundwork
    from moesim.engine.layer_cost import LayerCosts

CostOf = Callable[[Sequence[RoutingCounts], int | None], LayerCost | None]
"""The cost fitted to loads at so many tokens a rank (None: the scenario's own); None where a solver does not ask."""


def no_cost(loads: Sequence[RoutingCounts], tokens_per_rank: int | None) -> LayerCost | None:
    """Without a scenario nothing is known of time."""
    return None


def cost_of(scenario: Scenario | None, solver: str, *, ground: Groundwork | None = None) -> CostOf:
    """How to get the cost for a solver: nothing where it does not read one, or where no serving scenario prices it.

    Held-out loads never enter: each fit is of the loads that it is asked for. Raises BadInput for an unknown solver;
    the returned function OutsideProfile where the profile holds no price.
    """
    found = plugins.load(plugins.SOLVERS, solver, where="--solver")
    if scenario is None or scenario.serving is None:
        return no_cost
    from moesim.engine.deployment import TIMED_TOKENS, groundwork, reads_cost

    if not reads_cost(found):
        return no_cost

    base = ground if ground is not None else groundwork(scenario)
    usual = scenario.placement.tokens_per_rank or TIMED_TOKENS
    fitted: list[tuple[tuple[RoutingCounts, ...], LayerCosts]] = []

    def fit(loads: Sequence[RoutingCounts], tokens_per_rank: int | None) -> LayerCost | None:
        asked = tuple(loads)
        known = [costs for of, costs in fitted if len(of) == len(asked) and all(map(lambda a, b: a is b, of, asked))]
        if not known:
            known = [layer_costs(base, asked, scenario.seed)]
            fitted.append((asked, known[0]))
        return known[0].at(tokens_per_rank or usual).cost

    return fit


def layer_costs(ground: Groundwork, loads: Sequence[RoutingCounts], seed: int) -> LayerCosts:
    """The costs of decode steps of whatever loads a plan is fitted to, prefill among them."""
    from moesim.engine.layer_cost import LayerCosts

    return LayerCosts(ground, [replace(load, phase="any") for load in loads], seed)


def with_cost(
    request: PlacementRequest, loads: Sequence[RoutingCounts], costs: CostOf, tokens_per_rank: int | None = None
) -> PlacementRequest:
    """The request with the cost of its loads, where its solver reads one."""
    found = costs(loads, tokens_per_rank)
    return request if found is None else replace(request, cost=found)
