"""Local search from the recipes: what a search has to beat."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from placement.objective import Outcome
from placement.plans import Plan
from placement.space import Space
from placement.surrogate import worth


def local_search(
    space: Space,
    recipes: Sequence[Plan],
    evaluate: Callable[[Sequence[Plan]], Iterable[Outcome]],
    trials: int,
    rng: np.random.Generator,
) -> dict[Plan, Outcome]:
    """Evaluate the recipes, then climb from the best: its neighbours in random order, the first better one next.

    Where no neighbour is better, it climbs from the next recipe; with none left, from random plans. Returns what was
    tried, at most `trials` plans.
    """
    first = list(dict.fromkeys(recipes))[:trials]
    tried = dict(zip(first, evaluate(first), strict=True))
    starts = sorted(first, key=lambda plan: worth(tried[plan]))
    while len(tried) < trials:
        if starts:
            here = starts.pop(0)
        else:
            fresh = space.untried(set(tried), 1, rng)
            if not fresh:
                break
            here = fresh[0]
            tried[here] = next(iter(evaluate([here])))
        climbing = True
        while climbing and len(tried) < trials:
            climbing = False
            around = space.grid.neighbours(here)
            for index in rng.permutation(len(around)):
                other = around[int(index)]
                if len(tried) >= trials:
                    break
                if other in tried or other not in space:
                    continue
                tried[other] = next(iter(evaluate([other])))
                if worth(tried[other]) < worth(tried[here]):
                    here, climbing = other, True
                    break
    return tried
