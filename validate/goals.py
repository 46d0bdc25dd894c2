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
        _goal("layer error, mean absolute", error, f"at most {LAYER_MAPE:.0%}", f"{error:.1%}", error <= LAYER_MAPE),
        _goal("slowest over quickest placement", least, f"at least {SPAN:g}", f"{least:.2f}", least >= SPAN),
        _goal(
            "pairs beyond twice the spread ordered right",
            pairs["agreed"] / pairs["decided"] if pairs["decided"] else None,
            "all",
            f"{pairs['agreed']} of {pairs['decided']}",
            0 < pairs["decided"] == pairs["agreed"],
        ),
        _goal("regret of the predicted best", worst, f"at most {REGRET:.0%}", f"{worst:.1%}", worst <= REGRET),
    ]


def _goal(name: str, figure: float | None, limit: str, told: str, holds: bool) -> dict[str, Any]:
    return {"goal": name, "figure": figure, "limit": limit, "told": told, "holds": bool(holds)}
