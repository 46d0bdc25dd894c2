"""What a cheap figure of a placement is worth: its rank correlation with simulated step time over random placements.

`python -m placement.proxy SCENARIO.yaml --placements 500` draws placements with random replica budgets, some well
packed and some not, fits the layer cost to one part of the loads, judges balance, predicted and simulated time on the
other, and prints how the first two order the third (docs/explanation/placement.md shows the table).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from moesim.errors import OutsideProfile
from moesim.spec.plan import ExpertPlacement, PlacementRequest, max_over_mean
from placement.steps import TOKENS_PER_RANK

Floats = NDArray[np.float64]

EXTRA_SLOTS = (0, 1, 2, 4)
"""Redundant slots of a GPU that budgets are drawn from: 0 to 128 redundant experts on 32 GPUs."""

AT_ONCE = 25
"""Placements that are priced together."""


@dataclass(frozen=True)
class Proxy:
    """One batch size. balance, cost: Spearman's rank correlation with simulated time of max/mean and of the layer cost.

    ..._in_budget: the mean of the correlations among placements with the same slots. ..._pairs: share of pairs whose
    better one by that figure is the slower one. ..._regret: by what share the best by that figure is slower than the
    best. rel_error: root mean square of predicted / simulated - 1.
    """

    tokens_per_rank: int
    mode: str
    placements: int
    balance: float
    cost: float
    balance_in_budget: float
    cost_in_budget: float
    balance_pairs: float
    cost_pairs: float
    balance_regret: float
    cost_regret: float
    rel_error: float


def random_placements(request: PlacementRequest, number: int, rng: np.random.Generator) -> dict[str, ExpertPlacement]:
    """Placements of random budgets, spares and disorder, by name; no rank holds an expert twice.

    Spare slots go to the hottest experts (`greedy`), the coldest, or any; then a random share of slots, more often a
    small one, trades places at random.
    """
    from dataclasses import replace

    from placement.problem import solve
    from placement.solvers.timed import cold_filled

    fewest = -(-request.experts // request.ranks)
    found: dict[str, ExpertPlacement] = {}
    bases: dict[tuple[str, int], NDArray[np.int64]] = {}
    for index in range(number):
        extra = int(rng.choice([one for one in EXTRA_SLOTS if fewest + one <= request.experts]))
        kind = str(rng.choice(["hottest", "coldest", "any", "in order"]))
        asked = replace(request, slots=(fewest + extra) * request.ranks, groups=1)
        if kind == "any":
            order = np.stack([rng.permutation(request.experts) for _ in range(request.layers)])
            table = order[:, np.arange(asked.slots) % request.experts]
        else:
            if (kind, extra) not in bases:
                if kind == "coldest" and extra:
                    bases[kind, extra] = cold_filled(asked, request.mix(), fewest * request.ranks)
                else:
                    solver = "contiguous" if kind == "in order" else "greedy"
                    bases[kind, extra] = solve(asked, solver).placement.physical_to_logical
            table = disordered(bases[kind, extra], request.ranks, float(rng.random()) ** 3, rng)
        found[f"{index}: {asked.slots} slots, spares to the {kind}"] = asked.placement(table, "random")
    return found


def disordered(table: NDArray[np.int64], ranks: int, share: float, rng: np.random.Generator) -> NDArray[np.int64]:
    """A table [layers, slots] in which a share of the slots has traded places, ranks without doubles kept so."""
    slots = table.shape[1]
    found = table.copy()
    rank = np.arange(slots) // (slots // ranks)
    for row in found:
        for a, b in rng.integers(slots, size=(round(share * slots / 2), 2)):
            one, two = row[a], row[b]
            if rank[a] != rank[b] and one not in row[rank == rank[b]] and two not in row[rank == rank[a]]:
                row[a], row[b] = two, one
    return found


def compare(
    balance: Floats, predicted: Floats, simulated: Floats, slots: NDArray[np.int64], tokens: int, mode: str
) -> Proxy:
    """Correlations of one batch size: all arrays [placements]."""

    def inside(values: Floats) -> float:
        return float(np.mean([_spearman(values[slots == one], simulated[slots == one]) for one in np.unique(slots)]))

    return Proxy(
        tokens_per_rank=tokens,
        mode=mode,
        placements=len(simulated),
        balance=_spearman(balance, simulated),
        cost=_spearman(predicted, simulated),
        balance_in_budget=inside(balance),
        cost_in_budget=inside(predicted),
        balance_pairs=_wrong_pairs(balance, simulated),
        cost_pairs=_wrong_pairs(predicted, simulated),
        balance_regret=float(simulated[balance.argmin()] / simulated.min() - 1.0),
        cost_regret=float(simulated[predicted.argmin()] / simulated.min() - 1.0),
        rel_error=float(np.sqrt(((predicted / simulated - 1.0) ** 2).mean())),
    )


def _spearman(one: Floats, other: Floats) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(one, other).statistic)


def _wrong_pairs(figure: Floats, simulated: Floats) -> float:
    first = np.sign(figure[:, None] - figure[None, :])
    second = np.sign(simulated[:, None] - simulated[None, :])
    above = np.triu_indices(len(figure), 1)
    return float((first[above] * second[above] < 0).mean())


def measure(path: Path, number: int, sizes: Sequence[int], seed: int, overrides: Sequence[str] = ()) -> list[Proxy]:
    """The figures of a scenario. Raises BadInput where its loads cannot be split, OutsideProfile."""
    from moesim.engine.deployment import groundwork
    from moesim.errors import BadInput
    from moesim.routing.trace import stack_profiles
    from moesim.spec.scenario import load_scenario
    from placement import planning
    from placement.compare import make_splits
    from placement.costs import layer_costs
    from placement.problem import request_from_loads

    scenario = load_scenario(path, tuple(overrides))
    asked = planning.ask(
        scenario=scenario, load_files=[], gpus=None, nodes=None, slots=None, groups=None, solver=None, holdout=None,
        seed=seed,
    )  # fmt: skip
    splits = make_splits(asked.loads, asked.holdout, np.random.default_rng(asked.seed))
    if not splits:
        raise BadInput("nothing is held out to judge on", where="routing.loads", mend="give several loads")
    part = next((one for one in splits if any(load.phase == "decode" for load in one.judge)), splits[0])
    judge = [load for load in part.judge if load.phase == "decode"] or list(part.judge)
    ground = groundwork(scenario)
    request = request_from_loads(
        part.fit, slots=asked.slots, ranks=asked.ranks, nodes=asked.nodes, groups=1, seed=asked.seed
    )
    placements = random_placements(request, number, np.random.default_rng([asked.seed, 16]))
    profiles, weights = stack_profiles(judge)
    costs = layer_costs(ground, part.fit, scenario.seed)
    balance = np.asarray([weights @ max_over_mean(one.rank_loads(profiles)).mean(-1) for one in placements.values()])
    slots = np.asarray([one.slots for one in placements.values()])
    found = []
    for tokens in sizes:
        fitted = costs.at(tokens)
        predicted = np.asarray([weights @ fitted.cost.step_s(one, profiles) for one in placements.values()])
        simulated = _simulated(ground, placements, judge, tokens, fitted.mode, asked.seed)
        kept = np.isfinite(simulated)
        found.append(compare(balance[kept], predicted[kept], simulated[kept], slots[kept], tokens, fitted.mode))
    return found


def _simulated(
    ground: Any, placements: Mapping[str, ExpertPlacement], judge: Sequence[Any], tokens: int, mode: str, seed: int
) -> Floats:
    """Step seconds [placements]; not a number where the profile does not cover one."""
    from moesim.engine.steptime import timed_placements

    def timed(some: Mapping[str, ExpertPlacement]) -> list[float]:
        try:
            (row,) = timed_placements(ground, some, judge, [tokens], 0, seed, mode=mode)
        except OutsideProfile:
            return [float("nan")] * len(some)
        return [float(row.step_s[name][0]) if name in row.step_s else float("nan") for name in some]

    names = list(placements)
    blocks = [names[first : first + AT_ONCE] for first in range(0, len(names), AT_ONCE)]
    return np.asarray(list(itertools.chain(*(timed({name: placements[name] for name in block}) for block in blocks))))


def table(rows: Sequence[Proxy]) -> str:
    """The figures as a Markdown table."""
    lines = [
        "| tokens | dispatch | placements | balance | layer cost | balance, same slots | layer cost, same slots "
        "| wrong pairs by balance | by layer cost | best by balance is slower by | best by layer cost | error |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row.tokens_per_rank} | {row.mode.replace('_', '-')} | {row.placements} | {row.balance:.3f} | "
        f"{row.cost:.3f} | {row.balance_in_budget:.3f} | {row.cost_in_budget:.3f} | {row.balance_pairs:.1%} | "
        f"{row.cost_pairs:.1%} | {row.balance_regret:.1%} | {row.cost_regret:.1%} | {row.rel_error:.1%} |"
        for row in rows
    ]
    return "\n".join(lines)


def main(
    scenario: Annotated[Path, typer.Argument(help="Serving scenario with several loads.")],
    placements: Annotated[int, typer.Option(help="Random placements.")] = 500,
    tokens: Annotated[list[int] | None, typer.Option(help="Decode tokens of a rank; repeats.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of placements, splits and steps.")] = 0,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a key: a.b=c; repeats.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Rank correlation of balance and of the layer cost with simulated step time."""
    rows = measure(scenario, placements, tokens or TOKENS_PER_RANK, seed, tuple(set_ or ()))
    typer.echo(json.dumps({"rows": [asdict(row) for row in rows]}) if json_output else table(rows))


if __name__ == "__main__":
    typer.run(main)
