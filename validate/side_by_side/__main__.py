"""moesim and aiconfigurator on one serving task and the same tables: `python -m validate.side_by_side SCENARIO.yaml`.

Both search the task, each in processes of its own; every plan that either chose is then priced by both. What differs is
taken apart by operation and by assumption. Neither is called right: docs/accuracy.md has measured rows for that.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from moesim.engine.deployment import groundwork
from moesim.errors import BadInput, MoesimError
from moesim.files import write_json
from moesim.output.console import print_json
from moesim.spec.scenario import Scenario, load_scenario
from validate.side_by_side.compare import (
    agreement,
    apart,
    at_one_load,
    both_json,
    distinct,
    finite,
    ladder,
    look,
    of_trial,
)
from validate.side_by_side.plans import SidePlan, Stage
from validate.side_by_side.sweep import (
    PRICE_LIMIT_S,
    SWEEP_LIMIT_S,
    AicPrice,
    AicRow,
    find_executable,
    price,
    run_child,
    sweep,
    task_of,
)
from validate.side_by_side.told import told

# A search of moesim's at each concurrency: first looks at all plans asked for, full runs of the leaders.
TRIALS = 72
SEARCHES = 2
# Rounds of the closed loop in a trial: enough to tell plans apart; what is compared is simulated at greater length.
SEARCH_ROUNDS = 2
SEARCH_LIMIT_S = 900.0


def main() -> None:
    """Run the command and exit with the contract's code."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command()(side_by_side)
    try:
        app(standalone_mode=False)
    except MoesimError as error:
        sys.stderr.write(f"error: {error.line()}\n")
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        sys.stderr.write("error: interrupted\n")
        sys.exit(130)
    except Exception as error:
        if not hasattr(error, "format_message"):  # click's usage errors; typer vendors click
            raise
        sys.stderr.write(f"error: {' '.join(str(error.format_message()).split())}\n")
        sys.exit(2)


def side_by_side(
    scenario: Annotated[Path, typer.Argument(help="Serving in a closed loop, with limits on TTFT and TPOT.")],
    executable: Annotated[Path | None, typer.Option(help="aiconfigurator's console script.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Plans of each tool.")] = 5,
    pareto: Annotated[int, typer.Option(min=0, help="Further plans, from all over aiconfigurator's Pareto front.")] = 6,
    trials: Annotated[int, typer.Option(min=1, help="Trials of moesim's search at each concurrency.")] = TRIALS,
    searches: Annotated[int, typer.Option(min=1, help="Concurrencies that moesim searches at.")] = SEARCHES,
    limit: Annotated[float, typer.Option(min=1.0, help="Seconds that a search may take.")] = SEARCH_LIMIT_S,
    out: Annotated[Path | None, typer.Option(help="Folder of both searches (default: runs/side-NAME).")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a key: a.b=c; repeats.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Search a serving task with both tools, price every chosen plan with both, and tell where they differ and why."""
    overrides = tuple(set_ or ())
    spec = load_scenario(scenario, overrides)
    folder = out or Path("runs") / f"side-{scenario.stem}"
    result = compare(
        scenario,
        spec,
        overrides,
        find_executable(executable),
        folder,
        top=top,
        pareto=pareto,
        trials=trials,
        searches=searches,
        limit_s=limit,
    )
    write_json(folder / "side_by_side.json", result, indent=1)
    if json_output:
        print_json(result)
    else:
        sys.stdout.write(told(result) + "\n")


def compare(
    path: Path,
    spec: Scenario,
    overrides: Sequence[str],
    executable: Path,
    folder: Path,
    *,
    top: int,
    pareto: int,
    trials: int,
    searches: int,
    limit_s: float = SEARCH_LIMIT_S,
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
) -> dict[str, Any]:
    """What `--json` prints. Raises MoesimError in one line."""
    if (folder / "aiconfigurator").exists() or any(folder.glob("moesim-*")):
        raise BadInput("there is a comparison here already", where=str(folder), mend="choose another --out")
    ground = groundwork(spec)
    gpus = ground.cluster.gpus
    task = task_of(spec, gpus)
    say("aiconfigurator searches ...")
    swept = sweep(task, executable, folder / "aiconfigurator", top=top, limit_s=min(limit_s, SWEEP_LIMIT_S))
    rows = [*swept.top, *spread(swept.pareto, pareto)]
    prices, version, priced_cpu_s = price(
        task, executable, [row.point for row in rows], limit_s=min(limit_s, PRICE_LIMIT_S)
    )
    theirs, left_out = distinct(rows, prices, gpus)
    if not theirs:
        reasons = "; ".join(left_out) or "it has none"
        raise MoesimError("no plan of aiconfigurator's can be simulated", where=reasons, mend="raise --top")
    ours, searched = _search(
        path, spec, overrides, folder, _concurrencies(spec, theirs, searches), trials, limit_s, say
    )
    ours = ours[:top]
    extra, _, more_cpu_s = (
        price(task, executable, [plan.point(gpus, task.isl) for plan in ours]) if ours else ([], "", 0.0)
    )
    started, stage = time.process_time(), Stage(spec)
    plans = [*theirs, *zip(ours, extra, strict=True)]
    say(f"{len(plans)} plans are simulated twice ...")
    both = look(stage, plans, theirs[0][1])
    steps = ladder(stage, *theirs[0])
    searched["comparing_cpu_s"] = time.process_time() - started
    result = {
        "schema_version": 1,
        "task": asdict(task),
        "aiconfigurator": {
            "version": version,
            "cpu_s": swept.cpu_s,
            "wall_s": swept.wall_s,
            "pricing_cpu_s": priced_cpu_s + more_cpu_s,
            "pareto_rows": len(swept.pareto),
            "left_out": left_out,
            "sweep_and_prices_differ": _differ(rows, prices),
        },
        "moesim": searched,
        "choices": {"aiconfigurator": theirs[0][0].label(), "moesim": ours[0].label() if ours else None},
        "plans": [both_json(one, task) for one in both],
        "agreement": {
            "assumed": asdict(agreement(both, task, lambda one: one.assumed)),
            "own": asdict(agreement(both, task, lambda one: one.own)),
            "one_load": {
                "concurrency": at_one_load(both)[0].plan.concurrency,
                "assumed": asdict(agreement(at_one_load(both), task, lambda one: one.assumed)),
                "own": asdict(agreement(at_one_load(both), task, lambda one: one.own)),
            },
        },
        "ladder": [{"view": name, **asdict(seen)} for name, seen in steps],
        "apart": [apart(one) for one in both if one.priced.error is None and one.assumed.error is None],
    }
    cleaned: dict[str, Any] = finite(result)
    return cleaned


def spread(rows: Sequence[AicRow], count: int) -> list[AicRow]:
    """So many rows of a front, evenly over its order, both ends among them."""
    if count >= len(rows) or count < 2:
        return list(rows[:count])
    return [rows[round(index * (len(rows) - 1) / (count - 1))] for index in range(count)]


def _differ(rows: Sequence[AicRow], prices: Sequence[AicPrice]) -> float | None:
    """Largest relative difference in TPOT between the sweep's rows and the same plans priced one by one."""
    found = [
        abs(p.tpot_ms / row.tpot_ms - 1.0)
        for row, p in zip(rows, prices, strict=True)
        if p.error is None and row.tpot_ms
    ]
    return max(found, default=None)


def _concurrencies(spec: Scenario, theirs: Sequence[tuple[SidePlan, AicPrice]], most: int) -> list[int]:
    """Where moesim searches: at aiconfigurator's choices, best first, and at the scenario's own."""
    assert spec.serving is not None and spec.serving.workload.arrivals is not None
    own = spec.serving.workload.arrivals.concurrency
    assert own is not None
    picked = [plan.concurrency for plan, _ in theirs]
    return list(dict.fromkeys([picked[0], own, *picked[1:]]))[:most]


def _search(
    path: Path,
    spec: Scenario,
    overrides: Sequence[str],
    folder: Path,
    concurrencies: Sequence[int],
    trials: int,
    limit_s: float,
    say: Callable[[str], None],
) -> tuple[list[SidePlan], dict[str, Any]]:
    """moesim's best plans over all concurrencies, best first, and what the searches cost.

    Limits are held against medians, the nearest that the search has to aiconfigurator's averages.
    """
    levels: dict[str, float] = {}
    for (metric, _), limit in spec.objective.slo.limits().items():
        name = f"{metric.partition('_')[0]}_p50_ms"
        levels[name] = min(limit * 1e3, levels.get(name, float("inf")))
    found: list[tuple[float, SidePlan]] = []
    cost: dict[str, Any] = {"cpu_s": 0.0, "wall_s": 0.0, "trials": 0, "space": None, "searches": []}
    for concurrency in concurrencies:
        say(f"moesim searches at {concurrency} in flight ...")
        asked = {
            "serving.workload.arrivals.concurrency": concurrency,
            "serving.workload.requests": SEARCH_ROUNDS * concurrency,
            "objective.slo": json.dumps(levels),
        }
        words = [word for one in overrides for word in ("--set", one)]
        words += [word for key, value in asked.items() for word in ("--set", f"{key}={value}")]
        run = folder / f"moesim-{concurrency}"
        command = [
            sys.executable,
            "-m",
            "moesim",
            "tune",
            str(path),
            "--trials",
            str(trials),
            "--out",
            str(run),
            "--json",
        ]
        ended = run_child([*command, *words], limit_s, what="moesim tune")
        cost["cpu_s"] += ended.cpu_s
        cost["wall_s"] += ended.wall_s
        one: dict[str, Any] = {"concurrency": concurrency, "cpu_s": ended.cpu_s, "best": None}
        cost["searches"].append(one)
        if ended.code != 0:
            one["error"] = (ended.err.strip().splitlines() or ["it said nothing"])[-1]
            if ended.code != 1:  # anything but "no plan keeps the limits"
                raise MoesimError(f"moesim tune failed: {one['error']}", where=str(run), mend="run it by itself")
            continue
        answer = json.loads(ended.out)
        one["best"] = answer["best"]["label"]
        cost["trials"] += answer["trials"]
        cost["space"] = answer["space"]
        for trial in (answer["best"], *answer["alternatives"]):
            rate = float(trial["metrics"]["output_tokens_per_s_per_gpu"])
            found.append((rate, of_trial(trial, concurrency, spec)))
    found.sort(key=lambda pair: -pair[0])
    return list(dict.fromkeys(plan for _, plan in found)), cost


if __name__ == "__main__":
    main()
