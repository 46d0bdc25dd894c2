"""The record of a run, for a person to read."""

from __future__ import annotations

from typing import Any

from moesim.units import MICRO, MILLI, human_bytes
from validate.compare import BLOCKS
from validate.hardware.layer import COLLECTIVES, OPERATIONS
from validate.hardware.record import slowest

# Below this share of its cores the table says that other work disturbed the run: a rank computes without pausing.
QUIET_SHARE = 0.95
# As many placements stand beside each other, operation by operation; more stand below each other, a line for each.
BESIDE = 4
LOCAL = tuple(name for name in OPERATIONS if name not in (*COLLECTIVES, "experts"))
Pairs = list[tuple[dict[str, Any], dict[str, Any]]]


def table(record: dict[str, Any]) -> str:
    """The record for a person: a block for each token count, predicted / measured, [p10 to p90], signed error."""
    block = _beside if len(record["job"]["placements"]) <= BESIDE else _below
    job = record["job"]
    shape = job["shape"]
    lines = [
        f"{job['backend']}, {job['ranks']} ranks, {record['dtype']}: hidden {shape['hidden']}, intermediate "
        f"{shape['intermediate']}, {shape['experts']} experts, top-{shape['top_k']}; {job['repeats']} repeats",
        f"on {record['hardware'].get('gpu', record['hardware']['cpu'])} ({record['hardware']['cpus']} CPUs, "
        f"{human_bytes(record['hardware']['memory_bytes'])}); routing: {job['profile_source']}",
        f"predictions written {record['predictions']['written']}, measured from {record['measured_from']}; "
        f"outputs within {record['output_error']:.1g} of the float32 reference",
        "predicted / measured median [p10 to p90], error; tokens of one rank; operations on their slowest rank",
    ]
    for tokens in job["tokens"]:
        pairs = [
            (predicted, measured)
            for predicted, measured in zip(record["predicted"], record["measured"], strict=True)
            if predicted["tokens_per_rank"] == tokens
        ]
        lines += ["", *block(tokens, pairs)]
    return "\n".join(
        [*lines, "", *_summary(record["comparison"]), *_machine(record["core_share"]), pace_line(record["pace_s"])]
    )


def _beside(tokens: int, pairs: Pairs) -> list[str]:
    """Placements beside each other, a line for each operation."""
    return [
        _row(f"{tokens} tokens", [predicted["placement"] for predicted, _ in pairs]),
        *(
            _row(f"  {name}", [_cell(max(p["operation_s"][name]), slowest(m, name)) for p, m in pairs])
            for name in OPERATIONS
        ),
        _row("  layer", [_cell(p["layer_s"], m["layer_s"]) for p, m in pairs]),
    ]


def _below(tokens: int, pairs: Pairs) -> list[str]:
    """Placements below each other, the quickest first: the layer, then what its operations take, in ms."""
    columns = (*COLLECTIVES[:1], "experts", *COLLECTIVES[1:], "the rest")
    heads = "".join(f"{name:>15}" for name in columns)
    lines = [f"{f'{tokens} tokens':<24}{'layer':<36}{'error':>7}{heads}   ms"]
    for predicted, measured in sorted(pairs, key=lambda pair: float(pair[1]["layer_s"]["median_s"])):
        layer = measured["layer_s"]
        cells = [(max(predicted["operation_s"][name]), slowest(measured, name)["median_s"]) for name in columns[:-1]]
        cells.append(
            (
                sum(max(predicted["operation_s"][name]) for name in LOCAL),
                sum(slowest(measured, name)["median_s"] for name in LOCAL),
            )
        )
        between = f"[{_ms(layer['p10_s'])} to {_ms(layer['p90_s'])}]"
        lines.append(
            f"  {predicted['placement']:<22}"
            f"{_ms(predicted['layer_s']) + ' / ' + _ms(layer['median_s']) + ' ' + between:<36}"
            f"{predicted['layer_s'] / layer['median_s'] - 1.0:>+7.1%}"
            + "".join(f"{_ms(foretold) + ' / ' + _ms(found):>15}" for foretold, found in cells)
        )
    return lines


def _ms(seconds: float) -> str:
    value = seconds / MILLI
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def _machine(core_share: dict[str, float | None]) -> list[str]:
    profiled, measured = core_share["profile"], core_share["measured"]
    if profiled is None or measured is None:
        return []
    disturbed = "; other work disturbed the run" if min(profiled, measured) < QUIET_SHARE else ""
    return [
        f"the machine: computing ranks had {profiled:.0%} of their cores while profiled, {measured:.0%} while measured"
        + disturbed
    ]


def pace_line(pace_s: dict[str, float]) -> str:
    """How fast the machine was while profiled and while measured, by one sample of experts that stays the same."""
    profiled, measured = pace_s["profile"], pace_s["measured"]
    return (
        f"the machine's pace: experts that stay the same took {profiled / MILLI:.3g} ms while profiled, "
        f"{measured / MILLI:.3g} ms while measured ({measured / profiled - 1.0:+.1%}); nothing is corrected for it"
    )


def verdict(record: dict[str, Any]) -> str:
    """Each goal, its figure and whether it holds."""
    return "\n".join(
        f"{'holds' if goal['holds'] else 'FAILS'}  {goal['goal']}: {goal['told']} ({goal['limit']})"
        for goal in record["comparison"]["goals"]
    )


def holds(record: dict[str, Any]) -> bool:
    """Whether every goal holds."""
    return all(goal["holds"] for goal in record["comparison"]["goals"])


def _row(name: str, cells: list[str]) -> str:
    return (f"{name:<12}" + "".join(f"{cell:<38}" for cell in cells)).rstrip()


def _cell(predicted_s: float, spread: dict[str, float]) -> str:
    """In ms or µs, whichever suits the measured median: `1.23 / 1.31 ms [1.2 to 1.6] -6%`."""
    scale, unit = (MILLI, "ms") if spread["median_s"] >= MILLI else (MICRO, "µs")

    def figure(value_s: float) -> str:
        value = value_s / scale
        return f"{value:.0f}" if value >= 100 else f"{value:.3g}"

    error = predicted_s / spread["median_s"] - 1.0
    low, high = figure(spread["p10_s"]), figure(spread["p90_s"])
    return f"{figure(predicted_s)} / {figure(spread['median_s'])} {unit} [{low} to {high}] {error:+.0%}"


def _summary(comparison: dict[str, Any]) -> list[str]:
    layer, half, order = comparison["layer"], comparison["split_half"], comparison["pair_order"]
    by_operation = ", ".join(f"{name} {entry['mape']:.0%}" for name, entry in comparison["operations"].items())
    reliability = "-" if half["reliability"] is None else f"{half['reliability']:.3f}"
    regrets, held_out, blind = (
        ", ".join(f"{value:.1%} at {tokens}" for tokens, value in comparison[name].items())
        for name in ("regret", "regret_held_out", "regret_of_any")
    )
    spans = ", ".join(
        f"{foretold:.2f} / {comparison['span']['measured'][tokens]:.2f} at {tokens}"
        for tokens, foretold in comparison["span"]["predicted"].items()
    )
    beyond = comparison["beyond_twice_the_spread"]
    right = f"{beyond['agreed']} of {beyond['decided']} ordered right"
    judged = right if beyond["decided"] else "none, so no order is judged"
    return [
        f"layer error: mean {layer['mean_signed_error']:+.1%}, absolute {layer['mape']:.1%}, "
        f"largest {layer['largest_error']:+.1%}",
        f"absolute error by operation: {by_operation}",
        f"the measured median lies inside the foretold p10 to p90 in {layer['inside_p10_p90']:.0%} of cases; "
        f"adding up medians of operations instead of drawing them: absolute {layer['of_medians_mape']:.1%}",
        f"the slowest placement over the quickest, predicted / measured: {spans} tokens",
        f"the measurement itself: halves of the repeats differ by {half['gap']:.1%}, split-half reliability "
        f"{reliability}",
        f"pairs of placements that differ by more than twice the spread (p90 - p10 of the medians of {BLOCKS} runs of "
        f"repeats): {judged} ({beyond['undecided']} differ less)",
        f"pairs that differ by more than chance (sign test, 10 %): {order['agreed']} of {order['decided']} "
        f"({order['undecided']} undecided)",
        f"regret of the predicted best: {regrets} tokens; against the best of half the repeats, judged by the others: "
        f"{held_out}; of any, on average: {blind}",
    ]
