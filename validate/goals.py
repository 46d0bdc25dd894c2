"""What a comparison of placements is held against: the figure of each goal, its limit, and whether it holds."""

from __future__ import annotations

from typing import Any

# Goals of the comparison on hardware. A layer time that is 15 % off still tells a good placement from a bad one where
# they differ by 2; what is lost by taking the predicted best must be less than what a plan can gain.
LAYER_MAPE = 0.15
REGRET = 0.05
SPAN = 2.0


def goals(comparison: dict[str, Any]) -> list[dict[str, Any]]:
    """Each goal with its figure, its limit and whether it holds, from the comparison of a record."""
    pairs = comparison["beyond_twice_the_spread"]
    worst = max(comparison["regret"].values())
    least = min(comparison["span"]["measured"].values())
    error = comparison["layer"]["mape"]
    return [
        at_most("layer error, mean absolute", error, LAYER_MAPE),
        _goal("slowest over quickest placement", least, f"at least {SPAN:g}", f"{least:.2f}", least >= SPAN),
        pairs_in_order(pairs["agreed"], pairs["decided"]),
        at_most("regret of the predicted best", worst, REGRET),
    ]


def at_most(name: str, value: float, limit: float) -> dict[str, Any]:
    """A share that a limit is set to."""
    return _goal(name, value, f"at most {limit:.0%}", f"{value:.1%}", value <= limit)


def pairs_in_order(agreed: int, decided: int) -> dict[str, Any]:
    """That every pair that the measurement decides was foretold; without such a pair nothing was shown."""
    name = "pairs beyond twice the spread ordered right"
    return _goal(name, agreed / decided if decided else None, "all", f"{agreed} of {decided}", 0 < decided == agreed)


def _goal(name: str, figure: float | None, limit: str, told: str, holds: bool) -> dict[str, Any]:
    return {"goal": name, "figure": figure, "limit": limit, "told": told, "holds": bool(holds)}
