"""The section of a report page that says why steps are slow, and what would help."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from moesim.output.charts import BEST, INK, MUTED, OTHER, axis, figure, line, on_top_of, rect, text
from moesim.output.explain_words import FEW, WHAT_IFS, saved, summary, title, transfer_summary
from moesim.output.page import details, exact, key, number, percent, section, table
from moesim.output.pictures import OPERATIONS, named
from moesim.output.run_folder import Explained, KvTransfer, Told
from moesim.units import human_bytes, human_seconds

_SAVED, _FALLBACK = "#dbe6f2", "#b5bdc7"
# Operations whose absence is drawn: those that would save most.
_SHOWN_OPERATIONS = 4
_SHOWN_LAYERS, _SHOWN_LINKS = 8, 8


def why(runs: Sequence[tuple[str, str, Told]]) -> list[str]:
    """The section for the first run that was explained; none where none was."""
    for name, _, told in runs:
        found = told.figures.explain
        if found is not None and found.steps:
            typical = [step for step in found.steps if step.which == "typical"]
            panels = "".join(_panel(step) for step in typical)
            left_out = "".join(
                f"<p class='note'>Not explained: {escape(step)} ({escape(reason)}).</p>"
                for step, reason in found.not_priced.items()
            )
            moves = "" if found.transfer is None else _transfer(found.transfer)
            body = f'<div class="two">{panels}</div>{moves}{left_out}' + details(
                "The figures of these pictures, and of lighter and heavier steps", _figures(found.steps)
            )
            return [section("why", f"Why steps take so long, and what would help: {escape(name)}", body, lead=_LEAD)]
    return []


_LEAD = (
    "The critical path is the chain of operations whose times sum to the step; what is not on it was hidden. Every "
    "what-if is the same step run again with other durations, so gains do not add up. Perfect balance: every rank does "
    "the mean rank's work, and exchanges are even. Infinite network: exchanges and collectives take no time. Perfect "
    "overlap: streams never wait for each other. Free: the operation takes no time."
)


def _transfer(found: KvTransfer) -> str:
    """KV cache between roles: in words, and its figures."""
    notes = "".join(f"<p>{escape(sentence)}</p>" for sentence in transfer_summary(found.model_dump()))
    rows = [
        ["bytes moved", exact(found.bytes, human_bytes(found.bytes))],
        ["transfer, mean", exact(found.transfer_s["mean"], human_seconds(found.transfer_s["mean"]))],
        ["transfer, p99", exact(found.transfer_s["p99"], human_seconds(found.transfer_s["p99"]))],
        ["on the NICs alone", exact(found.alone_s, human_seconds(found.alone_s))],
        ["waiting for NICs", exact(found.waited_for_nics_s, human_seconds(found.waited_for_nics_s))],
        ["hidden behind reading", exact(found.hidden_s, human_seconds(found.hidden_s))],
        ["share of the time to the first token", exact(found.share_of_ttft, percent(found.share_of_ttft))],
    ]
    return f"<h3>KV cache between the roles</h3>{notes}{table(['KV transfer', ''], rows)}"


def _panel(step: Explained) -> str:
    notes = "".join(f"<p class='note'>{escape(sentence)}</p>" for sentence in summary(step.model_dump()))
    return f"<div><h3>{escape(title(step.model_dump()))}</h3>{_what_ifs(step)}{_path(step)}{_waits(step)}{notes}</div>"


def _what_ifs(step: Explained) -> str:
    """The step as it is, and under each what-if: what is left of it, and what is saved."""
    best = sorted(step.without_operation.items(), key=lambda item: item[1].step_s)[:_SHOWN_OPERATIONS]
    rows = [("as it is", step.step_s, 0.0)]
    rows += [(WHAT_IFS[name], one.step_s, one.saves) for name, one in step.what_if.items() if name in WHAT_IFS]
    rows += [(f"free {named(name)}", one.step_s, one.saves) for name, one in best]
    left, width, upper, high = 184.0, 560.0, 8.0, 24.0
    x = axis(0.0, step.step_s * 1e3, left, width - 60, ticks=5)
    bottom = upper + len(rows) * high
    body = []
    for value, tick in x.ticks:
        body.append(line(x.at(value), upper, x.at(value), bottom))
        body.append(text(x.at(value), bottom + 16, tick, anchor="middle"))
    body.append(text((left + x.end) / 2, bottom + 34, "step time (ms)", anchor="middle", fill=INK))
    for index, (name, seconds, saves) in enumerate(rows):
        y = upper + index * high + 3
        told = f"{name}: {human_seconds(seconds)}"
        body.append(text(left - 8, y + 13, name, anchor="end", fill=INK))
        body.append(rect(left, y, x.at(seconds * 1e3) - left, high - 6, OTHER if index == 0 else BEST, told))
        if index:
            body.append(rect(x.at(seconds * 1e3), y, x.at(step.step_s * 1e3) - x.at(seconds * 1e3), high - 6, _SAVED))
            body.append(text(width - 8, y + 13, saved(saves), anchor="end", fill=INK))
    return figure(
        width, bottom + 42, f"What would help: {'; '.join(f'{n} {human_seconds(s)}' for n, s, _ in rows)}", body
    )


def _path(step: Explained) -> str:
    """The critical path by operation, as one bar."""
    order = [name for name in OPERATIONS if name in step.critical_path_s]
    order += sorted(set(step.critical_path_s) - set(OPERATIONS))
    left, width, run = 4.0, 560.0, 4.0
    body = [text(left, 14, "critical path by operation", fill=INK)]
    for name in order:
        share = step.critical_path_s[name] / step.step_s
        wide = share * (width - 8)
        body.append(rect(run, 22, wide, 30, _colour(name), f"{named(name)}: {percent(share)}"))
        if wide > 34:
            body.append(text(run + wide / 2, 41, f"{share:.0%}", anchor="middle", fill=_ink(name)))
        run += wide
    said = ", ".join(f"{named(name)} {percent(step.critical_path_s[name] / step.step_s)}" for name in order)
    seen = [(named(name), _colour(name)) for name in order if step.critical_path_s[name] > FEW * step.step_s]
    return figure(width, 58, f"Critical path: {said}", body) + key(seen)


def _waits(step: Explained) -> str:
    """What each rank waited for: a column for each rank; nothing where waits are small."""
    ranks = len(step.waited_s)
    if ranks == 1 or max(step.waited_s) < FEW * step.step_s:
        return ""
    sums = {name: sum(by) for name, by in step.waited_for_operation_s.items() if len(by) == ranks}
    order = sorted(sums, key=lambda name: -sums[name])
    width, left, upper, bottom = 560.0, 52.0, 24.0, 150.0
    y = axis(0.0, max(step.waited_s) * 1e3, bottom, upper, ticks=3)
    wide = (width - left - 8) / ranks
    body = [text(4, 12, "what each rank waited for (ms)", fill=INK)]
    for value, tick in y.ticks:
        body.append(line(left, y.at(value), width - 8, y.at(value)))
        body.append(text(left - 6, y.at(value) + 4, tick, anchor="end"))
    for rank in range(ranks):
        run = 0.0
        for name in order:
            seconds = step.waited_for_operation_s[name][rank]
            low, high = y.at(run * 1e3), y.at((run + seconds) * 1e3)
            told = f"rank {rank} waited {human_seconds(seconds)} for {named(name)}"
            if low - high > 0.05:
                body.append(rect(left + rank * wide, high, wide * 0.86, low - high, _colour(name), told))
            run += seconds
        if rank % max(1, -(-ranks // 8)) == 0:
            body.append(text(left + (rank + 0.43) * wide, bottom + 16, str(rank), anchor="middle"))
    body.append(text((left + width) / 2, bottom + 32, "rank", anchor="middle", fill=MUTED))
    return figure(width, bottom + 40, "What each rank waited for, by operation of the rank that came last", body)


def _colour(name: str) -> str:
    return OPERATIONS.get(name, _FALLBACK)


def _ink(name: str) -> str:
    return on_top_of(_colour(name))


def _figures(steps: Sequence[Explained]) -> str:
    names = dict.fromkeys(name for step in steps for name in step.critical_path_s)
    head = ["critical path", *(" ".join(filter(None, (step.role, step.which, step.kind))) for step in steps)]

    def cell(seconds: float | None) -> str:
        return "–" if seconds is None else exact(seconds, human_seconds(seconds))

    rows = [[escape(named(name)), *(cell(step.critical_path_s.get(name)) for step in steps)] for name in names]
    rows.append(["<b>step</b>", *(cell(step.step_s) for step in steps)])
    for name, label in WHAT_IFS.items():
        found = [step.what_if.get(name) for step in steps]
        rows.append([label, *(cell(one.step_s if one is not None else None) for one in found)])
    return table(head, rows) + "".join(_heat(step) + _links(step) for step in steps if step.which == "typical")


def _heat(step: Explained) -> str:
    hottest = sorted(step.layers, key=lambda layer: -layer.rank_over_mean)[:_SHOWN_LAYERS]
    rows = [
        [
            str(one.layer),
            f"{one.rank}: {exact(one.rank_over_mean, number(one.rank_over_mean))}",
            exact(one.per_step_max_over_mean, number(one.per_step_max_over_mean)),
            f"{one.slowest_rank}: {exact(one.slowest_over_mean, number(one.slowest_over_mean))}",
            f"{one.expert}: {exact(one.expert_over_mean, number(one.expert_over_mean))} on {one.replicas}",
        ]
        for one in hottest
    ]
    head = [
        f"layer ({step.kind}, hottest {len(rows)} of {len(step.layers)})",
        "rank with most tokens: times mean",
        "largest rank of each step, times mean",
        "slowest experts, rank: times mean",
        "hottest expert: times mean, slots",
    ]
    return table(head, rows) if rows else ""


def _links(step: Explained) -> str:
    if step.traffic is None:
        return ""
    rows = [
        [
            f"{escape(one.source)} → {escape(one.target)}",
            exact(one.dispatch_bytes, human_bytes(one.dispatch_bytes)),
            exact(one.combine_bytes, human_bytes(one.combine_bytes)),
            exact(one.full_rate_s, human_seconds(one.full_rate_s)),
        ]
        for one in step.traffic.links[:_SHOWN_LINKS]
    ]
    head = [f"busiest links ({step.kind}, {escape(step.traffic.tag)})", "dispatch", "combine", "time at full rate"]
    return table(head, rows)
