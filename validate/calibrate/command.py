"""The command `validate calibrate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from validate.calibrate.run import Calibrated

LABELS = {
    "request_s": ("with a request", 1e3, "ms"),
    "step_s": ("between steps", 1e3, "ms"),
    "layer_s": ("of an eager layer", 1e6, "us"),
}


def calibrate(
    scenario: Annotated[Path, typer.Argument(help="Scenario file (YAML) of the deployment that ran.")],
    bench: Annotated[
        list[Path],
        typer.Option(
            help="Result of vllm bench serve, sglang.bench_serving or AIPerf (profile_export.jsonl); repeats."
        ),
    ],
    fit: Annotated[
        list[str] | None, typer.Option(help="Host time to fit: request_s, step_s or layer_s; repeats. [default: all]")
    ] = None,
    out: Annotated[Path, typer.Option(help="File for the host times, for a scenario's cost.overheads.")] = Path(
        "runs/validate-calibrate/overheads.yaml"
    ),
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a key: a.b=c; repeats.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed; the scenario's if left out.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Fit the engine's host times to your own benchmark runs, judged on a part held out.

    Writes nothing and says "don't" where they do not help there; the exit code is 0 either way.
    """
    from moesim.errors import BadInput
    from moesim.spec.overheads import NAMES
    from moesim.spec.presets import load_cluster
    from moesim.spec.scenario import load_scenario
    from validate.calibrate import run as runner

    unknown = [name for name in fit or () if name not in NAMES]
    if unknown:
        raise BadInput(f"unknown host time {unknown[0]!r}", where="--fit", mend=f"use {', '.join(NAMES)}")
    if len(set(bench)) < len(bench):
        raise BadInput("a file is given twice", where="--bench", mend="give each once")
    spec = load_scenario(scenario, tuple(set_ or ()))
    found = runner.calibrate(
        spec, bench, names=fit, seed=spec.seed if seed is None else seed,
        say=lambda line: typer.echo(line, err=True),
    )  # fmt: skip
    if found.verdict == runner.USE:
        runner.keep(out, found, spec, scenario, bench, load_cluster(spec.cluster).gpu.name, tuple(set_ or ()))
    if as_json:
        written = str(out) if found.verdict == runner.USE else None
        typer.echo(json.dumps({**runner.as_json(found), "out": written}, allow_nan=False))
    else:
        typer.echo(told(found, out))


def _figure(value: float, unit: str = "") -> str:
    """Four digits, none of them below a thousandth: that is noise about nothing."""
    return f"{round(value, 3):.4g} {unit}".strip()


def told(found: Calibrated, out: Path) -> str:
    """The outcome for a person."""
    from validate.calibrate.run import USE, verdict_text

    lines = [f"{run.where}: {run.format}, {run.requests} requests, {run.sent}" for run in found.runs]
    lines += ["", f"{'host time':22}{'now':>10}{'fitted':>10}  90 % interval     without what is held out"]
    for name, (label, scale, unit) in LABELS.items():
        now = _figure(found.start[name] * scale, unit)
        if name not in found.whole.low:
            lines.append(f"{label:22}{now:>10}{'-':>10}  {found.whole.kept.get(name, 'not asked for')}")
            continue
        value, low, high, part = (
            one[name] * scale for one in (found.whole.values, found.whole.low, found.whole.high, found.part.values)
        )
        ends = f"{_figure(low)} to {_figure(high)}"
        lines.append(f"{label:22}{now:>10}{_figure(value, unit):>10}  {ends:18}{_figure(part, unit):>10}")
    lines += ["", f"held out by {found.held_by}: {found.held_requests} requests; mean absolute error (of the mean)"]
    for when, errors in (("before", found.before), ("after", found.after)):
        cells = [f"{metric[:4].upper()} {100 * one['mape']:.1f} % ({100 * one['bias']:+.1f} %)"
                 for metric, one in errors.items()]  # fmt: skip
        lines.append(f"  {when:8}{cells[0]:26}{cells[1]}")
    lines += ["", *(f"note: {note}" for note in found.notes), verdict_text(found)]
    if found.verdict == USE:
        lines.append(f"written: {out} (cost.overheads of a scenario)")
    return "\n".join(lines)
