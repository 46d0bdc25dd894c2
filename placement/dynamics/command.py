"""What `moesim place --drift` does: gather the series and its prices, run the policies, tell what to do."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from moesim.errors import BadInput, OutsideProfile
from moesim.spec.plan import PlacementRequest
from placement.dynamics.series import Floats, Ints, Prices
from placement.dynamics.study import Study, check_series, study
from placement.migrate import expert_travel
from placement.planning import Asked
from placement.problem import GROUP_SOLVERS, request_from_loads, solve

if TYPE_CHECKING:
    from moesim.spec.scenario import Scenario


def drift(
    asked: Asked, *, token_s: float | None, move_s: float | None, solve_s: float | None, length_known: bool
) -> Study:
    """Run the policies over the one series that is asked for. Raises BadInput, Infeasible, OutsideProfile."""
    if len(asked.loads) != 1:
        raise BadInput(f"{len(asked.loads)} files are no series", where="--loads", mend="give one file with steps")
    if asked.expected is not None:
        raise BadInput(
            "a series is placed for as it comes, not for what is expected", where="routing.expect", mend="leave it out"
        )
    (load,) = asked.loads
    check_series(load)
    request = request_from_loads(
        asked.loads, slots=asked.slots, ranks=asked.ranks, nodes=asked.nodes, groups=asked.groups, seed=asked.seed
    )
    request = replace(request, current=asked.current)
    if asked.groups > 1 and asked.current is None:
        raise BadInput(
            "the plain placement that the run would start from keeps no groups on their nodes",
            where="--groups",
            mend=f"give --current with a map of one of: {', '.join(GROUP_SOLVERS)}",
        )
    start = solve(request, "contiguous").placement if asked.current is None else asked.current
    for name, value in (("--token-s", token_s), ("--move-s", move_s), ("--solve-s", solve_s)):
        if value is not None and not (np.isfinite(value) and value >= 0.0):
            raise BadInput(f"{value} seconds", where=name, mend="give a number of seconds, 0 or more")
    table = start.physical_to_logical
    prices = _prices(asked, request, load.counts, table, token_s, move_s)
    return study(
        load.counts,
        request,
        table,
        replace(prices, solve_s=solve_s or 0.0),
        length_known=length_known,
    )


def _prices(
    asked: Asked, request: PlacementRequest, counts: Floats, start: Ints, token_s: float | None, move_s: float | None
) -> Prices:
    if asked.scenario is not None and token_s is None and move_s is None:
        return prices_of(asked.scenario, request, counts, start)
    if token_s is None or move_s is None:
        raise BadInput(
            "what a token and a move take is missing",
            where="--drift",
            mend="give --token-s and --move-s in seconds, or a serving scenario",
        )
    return Prices(token_s, move_s, move_s, np.zeros(asked.ranks, dtype=np.int64))


def prices_of(scenario: Scenario, request: PlacementRequest, counts: Floats, start: Ints) -> Prices:
    """Prices of a serving scenario's decode steps and links.

    The step is a line through two priced ones, under `start` and under a greedy placement of the whole series, at the
    series' mean tokens a rank: how much longer it takes for each token more on the hottest rank, and what is left. A
    slope below 0 (balance that does not shorten a step) counts as 0. Raises BadInput, Infeasible, OutsideProfile.
    """
    from moesim.engine.deployment import groundwork, refuse_roles, resolve
    from moesim.engine.steptime import timed_placements, variant_for

    if scenario.serving is None:
        raise BadInput(
            "steps of training are not priced here",
            where="training",
            mend="give --token-s and --move-s (with the optimizer states, where they move), or a serving scenario",
        )
    refuse_roles(scenario)
    ground = groundwork(scenario)
    plain = request.placement(start, "start")
    even = solve(replace(request, current=None), "greedy").placement
    travel = expert_travel(resolve(ground, variant_for(scenario, plain), plain))
    picks = float(counts.sum(axis=-1).mean())
    tokens = max(round(picks / ground.model.moe.top_k / request.ranks), 1)
    loads = [replace(load, phase="decode") for load in asked_loads(counts, request)]
    (timed,) = timed_placements(ground, {"start": plain, "even": even}, loads, [tokens], 0, request.seed)
    if timed.left_out:  # the line takes both prices
        raise OutsideProfile(next(iter(timed.left_out.values())))
    spot = Prices(1.0, 0.0, 0.0, travel.domain)
    mean = counts.mean(axis=0, keepdims=True)
    hot = {name: spot.steps_s(one.physical_to_logical, mean).sum() for name, one in (("start", plain), ("even", even))}
    took = {name: float(times[0]) for name, times in timed.step_s.items()}
    apart = hot["start"] - hot["even"]
    slope = max((took["start"] - took["even"]) / apart, 0.0) if apart > 0.0 else 0.0
    rest = max(took["start"] - slope * hot["start"], 0.0)
    return Prices(slope, travel.near_s, travel.far_s, travel.domain, other_s=rest, tag=travel.tag)


def asked_loads(counts: Floats, request: PlacementRequest) -> list[Any]:
    """The series as one aggregate load, as step pricing takes it."""
    from moesim.routing.trace import RoutingCounts

    whole = counts.sum(axis=0, keepdims=True)
    return [RoutingCounts(whole, request.layer_ids, request.absolute_layers, "series")]


def print_study(found: Study) -> None:
    """The table and the verdict, for a person."""
    from rich.table import Table

    from moesim.output.console import console as wide_console
    from moesim.units import human_seconds

    console = wide_console()
    never = found.runs["never"]
    table = Table(title=f"{len(never.step_s)} steps: total time by policy", title_justify="left")
    table.add_column("policy", no_wrap=True)
    for column in ("total", "of never", "steps", "moves", "solving", "re-layouts", "experts moved"):
        table.add_column(column, justify="right")
    for name, one in found.runs.items():
        if name.startswith("once") and name != found.once:
            continue
        table.add_row(
            name,
            human_seconds(one.total_s),
            f"{one.total_s / never.total_s:.1%}",
            human_seconds(float(one.step_s.sum())),
            human_seconds(float(one.move_s.sum())),
            human_seconds(float(one.solve_s.sum())),
            str(one.relayouts),
            f"{int(one.moved.sum()):,}",
        )
    console.print(table)
    mine, fixed = found.runs["adaptive"], found.runs[found.fixed]
    console.print(
        f"adaptive against {found.fixed} (the best of never and every n in hindsight): "
        f"{mine.total_s / fixed.total_s - 1.0:+.1%}; against the best in hindsight over its own placements: "
        f"{mine.total_s / found.hindsight_s - 1.0:+.1%}"
    )
    console.print(found.verdict.text)
