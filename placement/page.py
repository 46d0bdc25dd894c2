"""The page of `moesim place --report`: one HTML file, in the look of the run report, that opens offline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moesim import __version__
from moesim.files import write_text
from moesim.output import page
from moesim.output.page import details, exact, section, signed, table
from moesim.output.pictures import load_maps
from moesim.output.validation import validated_over_nodes, validation_json
from moesim.output.validation_page import validation_sections
from moesim.units import human_seconds
from placement import page_pictures as pictures
from placement.compare import BASELINE, PLANNED
from placement.judge import Figure
from placement.page_budgets import budgets_section
from placement.planning import Placed
from placement.verdict import DONT, GAIN, MIXED, TIE, WITHHELD

_BADGES = {
    GAIN: ("good", "gain"),
    TIE: ("", "tie"),
    DONT: ("no", "don't"),
    MIXED: ("", "it depends"),
    WITHHELD: ("", "verdict withheld"),
}
# Rows of the table of the most replicated experts.
MOST = 20


@dataclass(frozen=True)
class Loads:
    """Loads of the ranks over the mean of their layer, as `load_maps` takes them."""

    layer_ids: Sequence[int]
    rank_loads: Sequence[Sequence[float]]


def write_place_page(path: Path, placed: Placed, *, written: str = "", more: Sequence[str] = ()) -> None:
    """Write the page whole or not at all. Raises BadInput where the folder cannot be written."""
    write_text(Path(path), place_page(placed, written=written, more=more))


def place_page(placed: Placed, *, written: str = "", more: Sequence[str] = ()) -> str:
    """The whole page of a placement. written: the map's file, told under "This run".

    more: further sections (`moesim.output.page.section`), put between the pictures and what they rest on.
    """
    map_, asked = placed.placement, placed.asked
    tone, badge = _BADGES[placed.verdict.code]
    title = f"{map_.layers} layers x {map_.experts} experts on {asked.ranks} GPUs"
    lead = (
        f"{map_.slots} slots a layer ({map_.slots_per_rank} a GPU, {map_.redundant} replicas), fitted by {map_.solver} "
        f"to {len(asked.loads)} load{'s' if len(asked.loads) > 1 else ''}."
    )
    head = (
        f'<p class="eyebrow">moesim placement report</p><h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p>'
        f'<section class="verdict {tone}" id="verdict" aria-label="Verdict"><span class="badge">{escape(badge)}</span>'
        f"<p>{escape(placed.verdict.text)}</p></section>{_tiles(placed)}"
    )
    parts = [
        section("workloads", "Held out against fit, by workload", _workloads(placed), lead=_workloads_lead(placed)),
        section("time", "Step time by tokens per rank", _times(placed), lead=_times_lead(placed)),
        *([] if placed.budgets is None else [budgets_section(placed.budgets)]),
        section("loads", "Load by rank and layer, before and after", _loads(placed), lead=_loads_lead(placed)),
        section("replicas", "Where the replicas are", _replicas(placed)),
        *more,
        *validation_sections(validation_json(placed.validation)),
        section("caveats", "What this rests on", _caveats(placed)),
        section("run", "This run", _about(placed, written)),
    ]
    foot = f"Written by moesim {__version__}. This page loads nothing from elsewhere."
    return page.page(f"moesim: {title}", head, parts, foot)


def _tiles(placed: Placed) -> str:
    """The gains, in step time where it was priced, else in balance; and how well the map fits what it has seen."""
    shown = []
    if placed.step_time is not None:
        for tokens, gain in placed.step_time.that_run(placed.step_time.gains).items():
            shown.append(_gain_tile(f"step time saved at {tokens} tokens a rank", gain))
    elif placed.held is not None:
        shown.append(_gain_tile("load of the hottest rank saved, held out", placed.held.gain))
        if placed.held.replicas is not None:
            shown.append(_gain_tile("saved by the replicas alone, held out", placed.held.replicas))
    figures = placed.balance
    small = f"{placed.baseline_balance.mean:.3f} contiguous; says nothing about other loads"
    shown.append(_tile("max/mean on the mix it was fitted to", exact(figures.mean, f"{figures.mean:.4f}"), small))
    return f'<div class="tiles">{"".join(shown)}</div>'


def _tile(name: str, shown: str, small: str) -> str:
    return f'<dl class="tile"><dt>{escape(name)}</dt><dd>{shown}<small>{escape(small)}</small></dd></dl>'


def _gain_tile(name: str, gain: Figure) -> str:
    span = f"{signed(gain.low)} to {signed(gain.high)} ({gain.level:.0%} interval)"
    return _tile(name, exact(gain.value, signed(gain.value)), span)


def _workloads_lead(placed: Placed) -> str:
    if placed.held is None:
        return "Nothing was held out: these figures are on the loads that the map was fitted to."
    several = "s" if placed.held.splits > 1 else ""
    return (
        f"Each workload as the plan meets it unseen ({placed.held.splits} split{several} of the loads; every contender "
        "fitted anew to each), beside the map that was written, which has seen it."
    )


def _workloads(placed: Placed) -> str:
    fit = dict(zip(placed.balance.names, placed.balance.by_load.mean(axis=1).tolist(), strict=True))
    rows = []
    held = placed.held
    for name in held.workloads if held is not None else fit:
        row = [escape(name)]
        for contender in pictures.CONTENDERS:
            value = held.by_workload.get(contender, {}).get(name) if held is not None else None
            row.append("\u2013" if value is None else exact(value, f"{value:.3f}"))
        row.append(exact(fit[name], f"{fit[name]:.3f}") if name in fit else "\u2013")
        rows.append(row)
    names = [f"{label}, held out" for label, _ in pictures.CONTENDERS.values()]
    return pictures.workloads(placed) + details(
        "The figures of this picture", table(["workload", *names, "the written map, fitted to it"], rows)
    )


def _times_lead(placed: Placed) -> str:
    if placed.step_time is None:
        return ""
    judged = escape(", ".join(placed.step_time.judged))
    return f"Priced on {judged}, which these fits have not seen; bars are 90 % intervals."


def _times(placed: Placed) -> str:
    steps = placed.step_time
    if steps is None:
        why = (
            "nothing was held out to price it on"
            if placed.asked.scenario is not None
            else "no scenario was given, and balance is not time: give one to see where replicas pay"
        )
        return f"<p>Not priced: {escape(why)}.</p>"
    priced = {name for times in steps.step_s.values() for name in times}
    contenders = [name for name in pictures.CONTENDERS if name in priced]
    rows = []
    for tokens, times in steps.step_s.items():
        cells = [f"{tokens}", escape(steps.modes[tokens].replace("_", " "))]
        cells += [_span(times.get(name), 1e3) for name in contenders]
        balance = steps.per_step[tokens].get(PLANNED)
        cells.append("\u2013" if balance is None else f"{balance:.2f}")
        if tokens in steps.refused:
            cells += ["does not run"] * 2
        else:
            cells += [_span(found.get(tokens), 100.0) for found in (steps.gains, steps.replicas)]
        rows.append(cells)
    head = ["tokens per rank", "dispatch", *(f"{pictures.CONTENDERS[name][0]}, ms" for name in contenders)]
    head += ["max/mean of a step", "gain, %", "gain of replicas, %"]
    left = "".join(f'<p class="note">{escape(note[:1].upper() + note[1:])}</p>' for note in steps.notes())
    return pictures.step_times(placed) + table(head, rows) + left


def _span(found: Figure | None, scale: float) -> str:
    if found is None:
        return "\u2013"
    value = found.value
    shown = f"{found.low * scale:.3g} to {found.high * scale:.3g}"
    return f'{exact(value, f"{value * scale:.3g}")}<span class="iv">{shown}</span>'


def _relative(loads: NDArray[np.float64]) -> list[list[float]]:
    return [[float(one) for one in row] for row in loads / loads.mean(axis=1, keepdims=True)]


def _loads_lead(placed: Placed) -> str:
    if placed.held is None:
        return "On the mix of the loads, which the map was fitted to."
    return (
        "Above on the mix that the written map was fitted to; below on the held-out workload that the plan does worst "
        f"on, {escape(placed.held.worst.workload)}, by fits that have not seen it. Averages: single steps are less "
        "even."
    )


def _loads(placed: Placed) -> str:
    ids = placed.placement.layer_ids.tolist()
    mix = np.tensordot(placed.balance.weights, np.stack([load.profile() for load in placed.asked.loads]), axes=1)
    panels = [
        ("Before: contiguous, on the mix", Loads(ids, _relative(placed.baseline.rank_loads(mix)))),
        (
            f"After: {escape(placed.placement.solver)}, on the mix",
            Loads(ids, _relative(placed.placement.rank_loads(mix))),
        ),
    ]
    if placed.held is not None:
        seen = placed.held.worst
        for name, contender in (("Before: contiguous", BASELINE), (f"After: {placed.asked.solver}", PLANNED)):
            panels.append((f"{escape(name)}, held out", Loads(ids, _relative(seen.loads[contender]))))
    return load_maps(panels)


def _replicas(placed: Placed) -> str:
    map_ = placed.placement
    if map_.redundant == 0:
        return "<p>The plan has no replicas: every expert lies in one slot.</p>"
    counts = map_.replica_counts()
    mix = np.tensordot(placed.balance.weights, np.stack([load.profile() for load in placed.asked.loads]), axes=1)
    order = np.lexsort((-mix.ravel(), -counts.ravel()))[:MOST]
    rows = []
    for row, expert in zip(*np.unravel_index(order, counts.shape), strict=True):
        if counts[row, expert] < 2:
            continue
        ranks = np.nonzero(map_.physical_to_logical[row] == expert)[0] // map_.slots_per_rank
        share = float(mix[row, expert])
        rows.append(
            [
                f"layer {map_.layer_ids[row]}, expert {expert}",
                str(counts[row, expert]),
                exact(share, f"{share:.1%}"),
                f"{share * map_.experts:.1f}",
                ", ".join(map(str, ranks.tolist())),
            ]
        )
    head = ["expert", "replicas", "share of its layer", "times the mean expert", "on ranks"]
    return pictures.replica_maps(map_) + details("The experts with most replicas", table(head, rows))


def _caveats(placed: Placed) -> str:
    asked, held = placed.asked, placed.held
    said = []
    if held is None:
        said.append("No load was held out: nothing here tells how the map does on loads that it has not seen.")
    else:
        said.append(
            "Figures marked held out come from second fits, each to a part of the loads; the map that was written is "
            "fitted to all of them and has no held-out figure of its own."
        )
        if len(held.workloads) == 1:
            said.append("One workload was held out: the interval tells the spread over layers only.")
    if placed.step_time is None:
        said.append("Balance is not time: with few tokens per rank, a replica can make a step slower.")
    if not any(load.per_step for load in asked.loads):
        said.append(
            "The loads are aggregates: how far single steps stray from them is not known from these files, and is "
            "assumed where time is priced."
        )
    if asked.nodes > 1 and not (placed.validation and validated_over_nodes(placed.validation)):
        said.append(
            "The plan spans nodes: no hardware that this project could use has run expert parallelism over several "
            "nodes, so its step time is not validated."
        )
    duplicates = placed.placement.duplicates_on_one_rank()
    if duplicates:
        said.append(f"{duplicates} slots hold an expert that their GPU already has; vllm-ascend refuses such a map.")
    said.append("Tokens of an expert are split evenly over its replicas here; engines differ in that.")
    return f"<ul>{''.join(f'<li>{escape(one)}</li>' for one in said)}</ul>"


def _about(placed: Placed, written: str) -> str:
    asked = placed.asked
    rows = [
        ["loads", escape(", ".join(load.name for load in asked.loads))],
        ["GPUs, nodes, groups", f"{asked.ranks}, {asked.nodes}, {asked.groups}"],
        ["slots", f"{placed.placement.slots} a layer"],
        ["solver", f"{escape(placed.placement.solver)}, {human_seconds(placed.solve_cpu_s)} CPU"],
        ["held out", f"by {asked.holdout.by}, {asked.holdout.fraction:g}" if placed.held is not None else "nothing"],
        ["seed", str(asked.seed)],
    ]
    if written:
        rows.append(["map", escape(written)])
    return table(["", ""], rows)
