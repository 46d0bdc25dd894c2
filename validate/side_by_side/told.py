"""The comparison of `validate.side_by_side` for a person."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from validate.side_by_side.compare import SCHEDULE
from validate.side_by_side.plans import ATTENTION, EXPERTS

# A part of the difference in TPOT that is this share of it gets its reason. Of plans with DeepEP (True) and without, as
# read in aiconfigurator 0.12 (sdk/models/blocks/moe.py, sdk/models/deepseek.py, sdk/backends/{base,sglang}_backend.py).
LARGE = 0.02
_LAW = "aiconfigurator reads one row, its power law on the fullest rank; moesim draws each layer of each step."
WHY: dict[str, dict[bool, tuple[str, ...]]] = {
    ATTENTION: {
        True: (
            "under DeepEP aiconfigurator takes the rows of WideEP attention; moesim takes the engine version's own "
            "rows in the type of the KV cache.",
        ),
    },
    EXPERTS: {True: (_LAW, "DeepSeek's dense layers count as expert layers there."), False: (_LAW,)},
    "expert block": {False: (_LAW, "aiconfigurator runs the shared expert beside the others.")},
    "exchange": {
        True: ("aiconfigurator prices it by tokens alone, moesim by what the routing sends to each rank and node.",),
        False: ("aiconfigurator prices a gather and a scatter of every layer, moesim what the backend does.",),
    },
    "router": {True: ("aiconfigurator's DeepEP graph has none.",)},
    "head": {True: ("aiconfigurator's DeepEP graph has none.",)},
    "shared expert, dense layers": {True: ("moesim has the dense layers as dense ones.",)},
    SCHEDULE: dict.fromkeys(
        (True, False),
        (
            "aiconfigurator spreads prompts evenly over a request's steps and leaves three of them out (SGLang); "
            "moesim reads them when requests come, and requests that ended together come together.",
        ),
    ),
}


def told(result: Mapping[str, Any]) -> str:
    """The whole comparison as text."""
    task, theirs, ours = result["task"], result["aiconfigurator"], result["moesim"]
    lines = [
        f"{task['model']} on {task['gpus']} {task['system']}, {task['engine']} {task['version']}, ISL {task['isl']}, "
        f"OSL {task['osl']}, TTFT {task['ttft_ms']:g} ms, TPOT {task['tpot_ms']:g} ms",
        f"aiconfigurator {theirs['version']}: {theirs['cpu_s']:.1f} s CPU for its search, "
        f"{theirs['pricing_cpu_s']:.1f} s for prices; {theirs['pareto_rows']} Pareto rows",
        f"moesim: {ours['cpu_s']:.1f} s CPU for {ours['trials']} trials in {len(ours['searches'])} searches "
        f"of {ours['space']} plans each, {ours['comparing_cpu_s']:.1f} s to simulate what is compared",
        "",
        f"aiconfigurator chooses {result['choices']['aiconfigurator']}",
        f"moesim chooses         {result['choices']['moesim'] or 'none: no plan keeps the limits'}",
        "",
        *_plans(result["plans"]),
        "",
    ]
    for name, view in (("its assumptions", "assumed"), ("the scenario's routing and placement", "own")):
        one = result["agreement"][view]
        lines.append(
            f"Under {name}: {one['plans']} plans that both price, rank correlation {_number(one['spearman'])}; "
            f"aiconfigurator's best {_lost(one, 'theirs')} as moesim sees it, "
            f"moesim's best {_lost(one, 'ours')} as aiconfigurator sees it."
        )
    one = result["agreement"]["one_load"]
    orders = [_number(one[view]["spearman"]) for view in ("assumed", "own")]
    lines.append(
        f"Of the {one['own']['plans']} at {one['concurrency']} in flight alone: rank correlation {orders[0]} under its "
        f"assumptions, {orders[1]} under the scenario's."
    )
    lines += ["", "aiconfigurator's choice in moesim, from its assumptions to the scenario's own:"]
    lines += _table(
        ("", "tok/s/GPU", "TTFT ms", "TPOT ms"),
        [("aiconfigurator", *_theirs(result["plans"][0]["aiconfigurator"]))]
        + [(one["view"], *_ours(one)) for one in result["ladder"]],
    )
    for one in _chosen(result):
        lines += ["", *_apart(one)]
    lines += ["", *_notes(theirs)]
    return "\n".join(lines)


def _plans(plans: Sequence[Mapping[str, Any]]) -> list[str]:
    head = (
        "plan",
        "by",
        "aic tok/s/GPU",
        "TTFT ms",
        "TPOT ms",
        "assumed tok/s/GPU",
        "TTFT ms",
        "TPOT ms",
        "own tok/s/GPU",
        "TTFT ms",
        "TPOT ms",
    )
    rows = [
        (
            one["label"],
            {"aiconfigurator": "aic"}.get(one["chosen_by"], one["chosen_by"]),
            *_theirs(one["aiconfigurator"]),
            *_ours(one["moesim_assumed"]),
            *_ours(one["moesim_own"]),
        )
        for one in plans
    ]
    return [
        "Averages; * keeps the limits. `aic`: aiconfigurator's figures; `assumed`: moesim's, with its routing (a power "
        "law), experts in order,",
        "its KV cache and prompts in decode steps; `own`: moesim's, as the scenario has these.",
        *_table(head, rows),
    ]


def _theirs(one: Mapping[str, Any]) -> tuple[str, str, str]:
    if one["error"] is not None:
        return ("no figure", "", "")
    star = "*" if one.get("meets_limits") else ""
    return (f"{one['tokens_per_s_per_gpu']:.0f}{star}", f"{one['ttft_ms']:.0f}", f"{one['tpot_ms']:.1f}")


def _ours(one: Mapping[str, Any]) -> tuple[str, str, str]:
    if one["error"] is not None:
        return ("no figure", "", "")
    star = "*" if one.get("meets_limits") else ""
    return (f"{one['tokens_per_s_per_gpu']:.0f}{star}", f"{one['ttft_s'] * 1e3:.0f}", f"{one['tpot_s'] * 1e3:.1f}")


def _chosen(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The steps of both choices, where both tools have figures for them."""
    wanted = result["choices"].values()
    return [one for one in result["apart"] if one["plan"] in wanted]


def _apart(one: Mapping[str, Any]) -> list[str]:
    lines = [f"{one['plan']}, taken apart under aiconfigurator's assumptions (ms):", *_tpot(one)]
    for kind, what in (("decode", "decode step"), ("mixed", "step with prompts")):
        step = one[kind]
        if step["aiconfigurator_s"] is None or step["moesim_s"] is None:
            continue
        rows = [(f"{what}, {step['tokens_per_rank']:.0f} tokens a rank in moesim's", *_pair(step))]
        rows += [(f"  {name}", *_pair({"aiconfigurator_s": a, "moesim_s": b})) for name, a, b in step["by_group"]]
        lines += _table(("", "aic", "moesim", "more"), rows)
    if one["overlaps"]:
        lines.append("moesim's micro-batches overlap here: parts add up to more than the step.")
    memory = one["memory"]
    exchange = ", ".join(f"{phase} {name}" for phase, name in sorted(one["exchange"].items())) or "none of its own"
    lines.append(
        f"memory {memory['aiconfigurator_bytes'] / 1e9:.1f} GB against {memory['moesim_bytes'] / 1e9:.1f} GB "
        f"(limit {memory['moesim_limit_bytes'] / 1e9:.1f}); its KV cache {one['kv_cache']}, "
        f"attention {one['attention']}, power law {one['power_law']}, exchange {exchange}"
    )
    if one["mixed_steps"] is not None:
        lines.append(f"its schedule: {one['mixed_steps']:.0f} steps with prompts and {one['decode_steps']:.0f} without")
    return lines


def _tpot(one: Mapping[str, Any]) -> list[str]:
    """From aiconfigurator's TPOT to moesim's, part by part, and why the large ones differ."""
    tpot = one["tpot"]
    if not tpot["parts"]:
        return []
    rows = [("TPOT of aiconfigurator", f"{tpot['aiconfigurator_s'] * 1e3:.2f}")]
    rows += [(f"  {name}", f"{seconds * 1e3:+.2f}") for name, seconds in tpot["parts"]]
    rows += [("TPOT of moesim", f"{tpot['moesim_s'] * 1e3:.2f}")]
    large = [name for name, seconds in tpot["parts"] if abs(seconds) > LARGE * tpot["aiconfigurator_s"]]
    deepep = bool(one["exchange"])
    reasons = [(name, why) for name in large for why in WHY.get(name, {}).get(deepep, ())]
    return [*_table(("", "ms"), rows), *(f"{name}: {why}" for name, why in reasons)]


def _pair(step: Mapping[str, float]) -> tuple[str, str, str]:
    theirs, ours = step["aiconfigurator_s"] * 1e3, step["moesim_s"] * 1e3
    return f"{theirs:.2f}", f"{ours:.2f}", f"{ours - theirs:+.2f}"


def _notes(theirs: Mapping[str, Any]) -> list[str]:
    lines = [f"not simulated: {count} of its plans ({reason})" for reason, count in theirs["left_out"].items()]
    gap = theirs["sweep_and_prices_differ"]
    if gap is not None and gap > 1e-3:
        lines.append(f"its sweep and its prices of single plans differ by up to {gap:.1%} of TPOT")
    lines.append("Which of the two is right is not claimed here: docs/accuracy.md has measured rows.")
    return lines


def _number(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.2f}"


def _lost(agreement: Mapping[str, Any], whose: str) -> str:
    value = agreement[f"{whose}_lost"]
    if value is None:
        return "cannot be judged (no plan keeps the limits)"
    if agreement[f"{whose}_breaks"]:
        return f"breaks the limits ({-value:+.1%} beside the best rate that keeps them)"
    return f"loses {value:.1%}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[index]) for row in (head, *rows)) for index in range(len(head))]

    def line(row: Sequence[str]) -> str:
        first, *others = row
        return "  ".join(
            [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        )

    return [line(head), *(line(row) for row in rows)]
