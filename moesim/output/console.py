"""What a person sees in the terminal: one JSON object, or tables; progress on stderr, off when not a terminal."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from moesim.output.priced import priced_lines
from moesim.output.stage_words import stages_line
from moesim.units import human_bytes, human_seconds

if TYPE_CHECKING:
    from rich.console import Console

WIDTH = 150


def print_json(result: dict[str, Any]) -> None:
    """Print exactly one JSON object on stdout."""
    sys.stdout.write(json.dumps(result, allow_nan=False) + "\n")


@contextlib.contextmanager
def progress_bar(title: str) -> Iterator[Callable[[float], None] | None]:
    """A bar on stderr that is told the share done; none where stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=1.0)
        yield lambda share: bar.update(task, completed=share)


def with_interval(value: float, interval: dict[str, float] | None, scale: float = 1.0, digits: int = 3) -> str:
    """`12.3 [11.9, 12.8]`, or the value alone."""
    if interval is None:
        return shown(value * scale, digits)
    low, high = (shown(interval[end] * scale, digits) for end in ("low", "high"))
    return f"{shown(value * scale, digits)} [{low}, {high}]"


def shown(value: float, digits: int) -> str:
    """A figure with so many digits, never in powers of ten: `3850`, not `3.85e+03`."""
    text = f"{value:.{digits}g}"
    return f"{value:.0f}" if "e" in text else text


def console() -> Console:
    """Where tables for a person go: as wide as the terminal, or wide enough for a table where there is none."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)


def capacity_line(routed: Mapping[str, Any]) -> str:
    """What a capacity rule dropped, rerouted and padded, in a line; empty where there is none."""
    if routed["capacity"]["rule"] == "dropless":
        return ""
    return (
        f"Capacity ({routed['capacity']['rule']}): {routed['dropped_fraction']:.2%} of the picks dropped, "
        f"{routed['rerouted_fraction']:.2%} rerouted; {routed['padded_fraction']:.2%} of the rows are empty."
    )


def generated_line(kind: str | None) -> str:
    """That the routing is made up, in a line; empty where it was recorded."""
    if kind is None:
        return ""
    return f"The routing is generated ({kind}), not recorded: give your own counts under routing.loads."


def print_simulation(result: dict[str, Any]) -> None:
    """Tables of a simulation for a person."""
    from rich.table import Table

    metrics, found, step = result["metrics"], result["intervals"], result["step"]
    out = console()
    rates = Table(title="Throughput and latency (90 % interval)", title_justify="left")
    rates.add_column("figure")
    rates.add_column("value", justify="right")
    names = {"output_tokens_per_s_per_gpu": "output tokens/s/GPU", "total_tokens_per_s_per_gpu": "total tokens/s/GPU"}
    for key, label in names.items():
        rates.add_row(label, with_interval(metrics[key], found.get(key), digits=4))
    for key, label in (("ttft_s", "TTFT"), ("tpot_s", "TPOT"), ("itl_s", "ITL"), ("e2e_s", "E2E")):
        for statistic in ("p50", "p99"):
            value = with_interval(metrics[key][statistic], found.get(f"{key}.{statistic}"), 1e3)
            rates.add_row(f"{label} {statistic} (ms)", value)
    out.print(rates)
    outside = result["run"]["draws_outside_profile"]
    if outside:
        out.print(f"No intervals: the run leaves the profile under {outside} of the joint draws.")
    parts = Table(title=f"A typical decode step: {human_seconds(step['step_s'])}", title_justify="left")
    parts.add_column("operation")
    parts.add_column("time", justify="right")
    parts.add_column("share", justify="right")
    for name, seconds in sorted(step["by_operation_s"].items(), key=lambda item: -item[1]):
        parts.add_row(name, human_seconds(seconds), f"{seconds / step['step_s']:.0%}")
    out.print(parts)
    staged = stages_line(step, result["serving"])
    if staged:
        out.print(staged)
    memory = result["memory"]
    out.print(
        f"Rank load max/mean {result['routing']['max_over_mean']:.3f} on the mean profile, "
        f"{result['routing']['per_step_max_over_mean']:.3f} per step. "
        f"Memory {human_bytes(memory['peak_bytes'])} of {human_bytes(memory['limit_bytes'])}."
    )
    for told in (generated_line(result["routing"]["generated"]), capacity_line(result["routing"])):
        if told:
            out.print(told)
    serving = result["serving"]
    if serving["preemptions"]:
        out.print(
            f"KV memory ran out: {serving['preemptions']} preemptions, {serving['recomputed_tokens']} tokens computed "
            "again."
        )
    if serving["prefix_hit_rate"] is not None:
        out.print(f"Prefix cache: {serving['prefix_hit_rate']:.1%} of prompt tokens found.")
    shares = ", ".join(f"{share:.0%} {tag}" for tag, share in sorted(result["provenance"].items(), key=lambda x: -x[1]))
    out.print(f"Where the step times come from: {shares}.")
    for line in priced_lines(result):
        out.print(line)
    load = result["load"]
    if load["offered_output_tokens_per_s_per_gpu"] is not None:
        out.print(
            f"Offered {load['offered_output_tokens_per_s_per_gpu']:.4g} output tokens/s/GPU, served "
            f"{load['served_output_tokens_per_s_per_gpu']:.4g} from the first arrival to the last token."
        )
    if load["fault"]:
        out.print(f"Not steady: {load['fault']}.")
    for row in result["slo"]["limits"]:
        verdict = "met" if row["met"] else "missed"
        out.print(
            f"SLO {row['metric']} <= {human_seconds(row['limit_s'])}: {human_seconds(row['value_s'])}, {verdict}."
        )
