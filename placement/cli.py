"""The commands `place`, `tune` and `export`."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from placement.dispatch import ChoiceTimes
    from placement.planning import Asked, Placed


def place(
    scenario: Annotated[Path | None, typer.Argument(help="Scenario; fills in what is not given.")] = None,
    loads: Annotated[list[Path] | None, typer.Option(help="File of expert counts; repeats.")] = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs of the expert-parallel group.")] = None,
    nodes: Annotated[int | None, typer.Option(help="Nodes; constrain nothing without --groups.")] = None,
    slots: Annotated[int | None, typer.Option(help="Slots of a layer over all GPUs, replicas included.")] = None,
    groups: Annotated[int | None, typer.Option(help="Expert groups that stay on one node (1 = none).")] = None,
    experts: Annotated[
        int | None, typer.Option(help="Experts of a layer, where a list of counts may leave some out.")
    ] = None,
    solver: Annotated[str | None, typer.Option(help="Solver (default: greedy).")] = None,
    holdout: Annotated[float | None, typer.Option(help="Fraction of the loads to judge on; 0 = no verdict.")] = None,
    out: Annotated[Path | None, typer.Option(help="File to write the map to.")] = None,
    form: Annotated[
        str, typer.Option("--format", help="Format of --out: moesim, sglang, trtllm, vllm or vllm-ascend.")
    ] = "moesim",
    replica_choices: Annotated[
        bool, typer.Option("--replica-choices", help="Compare which replica tokens go to, in balance and in step time.")
    ] = False,
    page: Annotated[Path | None, typer.Option("--report", help="Page of pictures to write (.html).")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of splits, draws and solver.")] = None,
    current: Annotated[Path | None, typer.Option(help="Map that stands: for --drift and incremental.")] = None,
    drift: Annotated[bool, typer.Option("--drift", help="When to lay experts out anew, on a file of steps.")] = False,
    token_s: Annotated[float | None, typer.Option(help="--drift: s for a token of a layer's hottest GPU.")] = None,
    move_s: Annotated[float | None, typer.Option(help="--drift: seconds to bring one expert to a GPU.")] = None,
    solve_s: Annotated[float | None, typer.Option(help="--drift: seconds to solve one layer (default 0).")] = None,
    length_known: Annotated[bool, typer.Option(help="--drift: the policy may know how many steps come.")] = False,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a key of the scenario: a.b=c.")] = None,
    budgets: Annotated[
        str | None, typer.Option(help="Redundant experts to compare in step time, e.g. 0,32,64,128; needs a scenario.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Place experts on GPUs by their measured load, and judge the placement on loads it was not fitted to."""
    from moesim.engine.moving import refuse_changes
    from moesim.errors import BadInput
    from moesim.spec.faults import refuse_faults
    from moesim.spec.scenario import load_scenario
    from placement import planning
    from placement.export.engines import FORMATS, check_name, write_map
    from placement.export.vllm import GATE

    if form not in FORMATS:
        raise BadInput(f"unknown format {form!r}", where="--format", mend=f"use one of: {', '.join(FORMATS)}")
    if form == "vllm":
        raise BadInput(GATE, where="--format vllm", mend="use sglang or trtllm; `moesim export` writes vLLM's flags")
    if out is not None:
        check_name(form, out)
    spec = None if scenario is None else load_scenario(scenario, tuple(set_ or ()))
    if spec is not None:
        refuse_faults(spec.faults, "place")
        refuse_changes(spec, "place")
    asked = planning.ask(
        scenario=spec,
        load_files=loads or [],
        gpus=gpus,
        nodes=nodes,
        slots=slots,
        groups=groups,
        solver=solver,
        holdout=holdout,
        seed=seed,
        current=current,
        budgets=planning.budget_list(budgets),
        experts=experts,
    )
    if drift:
        _drift(asked, out, token_s, move_s, solve_s, length_known, json_output)
        return
    with _waiting(f"placing with {asked.solver}, and judging it on held-out loads"):
        placed = planning.place(asked, choices=replica_choices)
    if out is not None:
        write_map(placed.placement, form, out, spec)
    report = placed.to_json()
    if out is not None:
        report["out"] = {"file": str(out), "format": form}
    if page is not None:
        from placement.page import write_place_page

        write_place_page(page, placed, written="" if out is None else f"{out} ({form})")
        report["report"] = str(page)
    _say_doubts(asked)
    if json_output:
        _print_json(report)
    else:
        _print_place(placed, out, form)
        if page is not None:
            typer.echo(f"Wrote {page}.")


def _drift(
    asked: Asked, out: Path | None, token_s: float | None, move_s: float | None, solve_s: float | None,
    length_known: bool, json_output: bool,
) -> None:  # fmt: skip
    from moesim.errors import BadInput
    from placement.dynamics import command

    if out is not None:
        raise BadInput("--drift writes no map", where="--out", mend="leave it out, or leave --drift out")
    with _waiting("running the policies over the series"):
        found = command.drift(asked, token_s=token_s, move_s=move_s, solve_s=solve_s, length_known=length_known)
    _say_doubts(asked)
    if json_output:
        _print_json(found.to_json())
    else:
        command.print_study(found)


def _say_doubts(asked: Asked) -> None:
    """Once all went well: an error is one line."""
    for doubt in asked.doubts:
        typer.echo(f"note: {doubt}", err=True)


def _waiting(text: str) -> AbstractContextManager[Any]:
    """A spinner on stderr while something takes long; nothing where stderr is no terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    return console.status(text) if console.is_terminal else nullcontext()


def _print_json(report: dict[str, Any]) -> None:
    import json

    typer.echo(json.dumps(report, allow_nan=False))


def _print_place(placed: Placed, out: Path | None, form: str) -> None:
    from rich.table import Table

    from moesim.output.console import console as wide_console
    from moesim.output.validation import validation_text
    from moesim.units import human_seconds
    from placement.compare import BASELINE, PLANNED, WITHOUT_REPLICAS
    from placement.expected import expect_json, expect_lines

    console = wide_console()
    map_, held = placed.placement, placed.held
    console.print(
        f"{map_.layers} layers x {map_.experts} experts on {placed.asked.ranks} GPUs: {map_.slots} slots "
        f"({map_.slots_per_rank} a GPU, {map_.redundant} replicas), fitted to {len(placed.asked.loads)} "
        f"load{'s' if len(placed.asked.loads) > 1 else ''} by {map_.solver} in {human_seconds(placed.solve_cpu_s)} CPU"
    )
    table = Table(title="largest / mean GPU load (1 = even)", title_justify="left")
    table.add_column("placement", no_wrap=True)
    for column in ("slots", "mix", "worst layer", "each workload", "held out"):
        table.add_column(column, justify="right")
    rows = (
        (BASELINE, "contiguous, no replicas", placed.baseline, placed.baseline_balance),
        (PLANNED, map_.solver, map_, placed.balance),
    )
    for name, label, placement, figures in rows:
        out_of_sample = "-" if held is None else f"{held.each[name]:.3f}"
        table.add_row(
            label,
            str(placement.slots),
            f"{figures.mean:.4f}",
            f"{figures.by_layer.max():.4f}",
            f"{figures.each:.3f}",
            out_of_sample,
        )
        if name == BASELINE and held is not None and WITHOUT_REPLICAS in held.each:
            plain = str(placed.baseline.slots)
            bare = f"{held.each[WITHOUT_REPLICAS]:.3f}"
            table.add_row(f"{map_.solver}, no replicas", plain, "-", "-", "-", bare)
    console.print(table)
    for line in expect_lines(expect_json(placed.asked.loads, placed.asked.expected), held is not None):
        console.print(line)
    duplicates = map_.duplicates_on_one_rank()
    if duplicates:
        console.print(f"{duplicates} slots hold an expert that their GPU already has (duplicates_on_one_gpu).")
    if placed.step_time is not None:
        console.print(_step_table(placed))
        for note in placed.step_time.notes():
            console.print(note)
    if placed.choices is not None:
        console.print(_choices_table(placed.choices))
        for reason, names in placed.choices.reasons().items():
            console.print(f"not priced: {reason} ({', '.join(names)})")
        for tokens, reason in placed.choices.refused.items():
            console.print(f"does not run at {tokens} tokens per GPU: {reason}")
    console.print(placed.verdict.text)
    if placed.validation:
        console.print(validation_text(placed.validation))
    if placed.budgets is not None:
        from placement.budget_table import print_budgets

        print_budgets(console, placed.budgets)
    if out is not None:
        console.print(f"Wrote {out} ({form}).")


def _choices_table(choices: ChoiceTimes) -> Any:
    from rich.box import SIMPLE
    from rich.table import Table

    from moesim.units import MILLI
    from placement.dispatch import REFERENCE

    title = "which replica tokens go to: max/mean of a step, its ms, and what it gains over equal parts in %"
    table = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False)
    table.add_column("tokens", justify="right", no_wrap=True, min_width=6)
    names = list(dict.fromkeys(name for times in choices.step_s.values() for name in times))
    for name in names:
        table.add_column(name.replace("_", " "), justify="right", no_wrap=True)
    for tokens, times in choices.step_s.items():
        cells = []
        for name in names:
            if name not in times:
                cells.append("-")
                continue
            time, gain = times[name], choices.gains[tokens].get(name)
            saved = (
                ""
                if gain is None or name == REFERENCE
                else f"\n{100 * gain.value:+.1f} ({100 * gain.low:+.1f}..{100 * gain.high:+.1f})"
            )
            best = " *" if choices.best(tokens) == name and tokens not in choices.refused else ""
            cells.append(f"{choices.balance[tokens][name]:.3f}\n{time.value / MILLI:.4g}{best}{saved}")
        table.add_row(str(tokens), *cells)
    return table


def _step_table(placed: Placed) -> Any:
    from rich.box import SIMPLE
    from rich.table import Table

    from moesim.units import MILLI
    from placement.compare import BASELINE, PLANNED, WITHOUT_REPLICAS
    from placement.steps import LABELS

    assert placed.step_time is not None
    title = "step time in ms by tokens per GPU, held-out loads, and what the plan gains in %"
    table = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False)
    table.add_column("tokens", justify="right", no_wrap=True, min_width=6)
    table.add_column("dispatch")
    steps = placed.step_time
    shown = {name for times in steps.step_s.values() for name in times}
    contenders = [name for name in (BASELINE, WITHOUT_REPLICAS, PLANNED) if name in shown]
    for name in contenders:
        table.add_column(LABELS.get(name, name), justify="right", no_wrap=True)
    table.add_column("gain", justify="right", no_wrap=True)
    table.add_column("of replicas", justify="right", no_wrap=True)

    def share(gain: Any) -> str:
        return "-" if gain is None else f"{gain.value:+.1%}\n{100 * gain.low:+.1f}..{100 * gain.high:+.1f}"

    def span(tokens: int, name: str) -> str:
        time = steps.step_s[tokens].get(name)
        if time is None:
            return "-"
        mark = "~" if name in steps.extrapolated.get(tokens, {}) else ""
        return f"{mark}{time.value / MILLI:.3g}\n{time.low / MILLI:.3g}..{time.high / MILLI:.3g}"

    for tokens in steps.step_s:
        mode = steps.modes[tokens].replace("_", " ")
        cells = [span(tokens, name) for name in contenders]
        if tokens in steps.refused:
            cells += ["does not run", "-"]
        else:
            cells += [share(steps.gains.get(tokens)), share(steps.replicas.get(tokens))]
        table.add_row(str(tokens), mode, *cells)
    for tokens in steps.unpriced:
        table.add_row(str(tokens), *["-"] * (len(contenders) + 3))
    return table


def tune(
    scenario: Annotated[Path, typer.Argument(help="Scenario to start from.")],
    trials: Annotated[int, typer.Option(help="Total number of trials, resumed and infeasible ones included.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the run (default: runs/NAME).")] = None,
    storage: Annotated[str | None, typer.Option(help="Optuna storage URL (default: a journal in the run).")] = None,
    workers: Annotated[int, typer.Option(help="Worker processes.")] = 1,
    ray: Annotated[str | None, typer.Option(help="Address of a Ray cluster.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the run was left.")] = False,
    what_if: Annotated[
        bool, typer.Option("--what-if", help="Also tell what would change the answer: load, lengths, skew, network.")
    ] = False,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a key: a.b=c; repeats.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Search parallelism, replicas and placement for the best plan, and judge it against the plain baseline."""
    from placement import tune_command

    tune_command.tune(
        scenario=scenario,
        trials=trials,
        out=out,
        storage=storage,
        workers=workers,
        ray=ray,
        resume=resume,
        json_output=json_output,
        overrides=tuple(set_ or ()),
        ask_what_if=what_if,
    )


def export(
    plan: Annotated[Path, typer.Argument(help="plan.yaml of a run, or a map of moesim or of an engine.")],
    engine: Annotated[str, typer.Option(help="sglang, vllm, trtllm, megatron or vllm-ascend.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write to (default: beside the plan).")] = None,
    model: Annotated[str | None, typer.Option(help="Model of a map: an id, or a config.json.")] = None,
    gpus: Annotated[int | None, typer.Option(help="Expert-parallel ranks of an engine's map.")] = None,
    nodes: Annotated[int | None, typer.Option(help="Nodes that a map's ranks run on.")] = None,
) -> None:
    """Write a plan as the files that an engine loads, with the flags to launch it."""
    from placement.export.engines import export_placement
    from placement.export.instance import Told
    from placement.export.plan_file import read_plan, role_of

    placement, scenario = read_plan(plan, model=model, ranks=gpus, nodes=nodes)
    folder = out if out is not None else plan.parent / engine
    for path in export_placement(placement, engine, folder, scenario, role=role_of(plan), told=Told(model, nodes)):
        typer.echo(str(path))
    if engine == "vllm":
        from placement.export.vllm import GATE, starts_with

        if starts_with(placement, scenario) is None:
            typer.echo(f"note: {GATE}; only its flags were written", err=True)
