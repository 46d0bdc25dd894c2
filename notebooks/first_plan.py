"""The demo scenario through the Python API, step by step, with the four pictures one wants first.

Open it with `marimo edit notebooks/first_plan.py`, or run it as a script: `python notebooks/first_plan.py`.
"""

import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium")


@app.cell(hide_code=True)
def _():
    import marimo as mo

    mo.md("""
    # A first plan

    DeepSeek-V3 on 4 nodes of 8 H200, from the scenario file to a judged placement: what `moesim tune` does, one
    call at a time. The figures come from the bundled measured profile and from generated routing; what rests on
    what is printed with each result.
    """)
    return (mo,)


@app.cell
def _(mo):
    from moesim.engine.deployment import groundwork
    from moesim.spec.scenario import load_scenario

    # The scenario file says what is deployed, on what, for which load. The groundwork is everything in it that does
    # not depend on the plan: model, cluster, cost model, and the routing, parted into loads to fit to and to judge on.
    folder = mo.notebook_dir() or "."
    scenario = load_scenario(folder / "scenarios" / "demo.yaml", ("serving.workload.requests=1000",))
    ground = groundwork(scenario)
    model, cluster = ground.model, ground.cluster
    print(f"model:    {model.id}, {model.moe_layers} MoE layers of {model.moe.experts} experts, top {model.moe.top_k}")
    print(f"cluster:  {cluster.nodes} nodes of {cluster.gpus_per_node} {cluster.gpu.name}")
    print(f"fitted to {[load.name for load in ground.fit]}")
    print(f"judged on {[load.name for load in ground.judge]}")
    return ground, scenario


@app.cell
def _(ground, scenario):
    from moesim.engine.deployment import resolve
    from placement.space import baseline_plan, own_plan

    # Two plans of the same parallelism: experts in their plain order, and experts placed by the scenario's solver
    # with its redundant experts. `resolve` checks the plan, solves its placement on the fit loads, counts its memory.
    plans = {"contiguous": baseline_plan(ground, scenario), "planned": own_plan(ground, scenario)}
    deployments = {name: resolve(ground, plan.apply(scenario)) for name, plan in plans.items()}
    for _name, _deployment in deployments.items():
        _ledger = _deployment.memory
        print(
            f"{_name:11} {plans[_name].label()}: {_ledger.fixed_bytes / 1e9:.1f} of {_ledger.limit_bytes / 1e9:.1f} GB "
            f"before KV cache, room for {_ledger.kv_capacity_tokens:,} tokens on each rank"
        )
    return deployments, plans


@app.cell
def _(deployments):
    from moesim.engine.simulate import simulate
    from moesim.output.metrics import simulation_json
    from moesim.output.series import simulation_series

    # Serve the whole workload under each plan. Ten joint draws of cost errors and routing, the same for both plans,
    # stand behind the intervals.
    simulations = {name: simulate(deployment, draws=10) for name, deployment in deployments.items()}
    figures = {name: simulation_json(simulation) for name, simulation in simulations.items()}
    series = {name: simulation_series(simulation) for name, simulation in simulations.items()}
    for _name, _told in figures.items():
        _metrics, _span = _told["metrics"], _told["intervals"]["tpot_s.p50"]
        print(
            f"{_name:11} {_metrics['output_tokens_per_s_per_gpu']:.1f} output tokens/s/GPU, "
            f"TPOT p50 {1e3 * _metrics['tpot_s']['p50']:.1f} ms "
            f"[{1e3 * _span['low']:.1f}, {1e3 * _span['high']:.1f}], "
            f"TTFT p99 {1e3 * _metrics['ttft_s']['p99']:.0f} ms, "
            f"max/mean rank load {_told['routing']['max_over_mean']:.3f}"
        )
        print(" " * 11, ", ".join(f"{_share:.0%} {_tag}" for _tag, _share in _told["provenance"].items()))
    return figures, series, simulations


@app.cell(hide_code=True)
def _(mo):
    mo.md("""
    ## 1. Load by rank and layer

    Tokens of each rank over the mean of its layer, on loads that the placement was **not** fitted to. Balance is
    not time: the next picture says what the balance is worth.
    """)
    return


@app.cell
def _(series):
    import numpy as np
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    _top = max(np.log2(np.asarray(one["rank_loads"])).max() for one in series.values())
    loads_figure = make_subplots(1, 2, subplot_titles=list(series), shared_yaxes=True)
    for _column, _told in enumerate(series.values(), 1):
        _loads = np.asarray(_told["rank_loads"])
        loads_figure.add_heatmap(
            z=np.log2(np.maximum(_loads, 2.0**-_top)),
            y=_told["layer_ids"],
            customdata=_loads,
            hovertemplate="layer %{y}, rank %{x}: %{customdata:.2f} times the mean<extra></extra>",
            coloraxis="coloraxis",
            row=1,
            col=_column,
        )
    _ticks = [_top * share for share in (-1, -0.5, 0, 0.5, 1)]
    loads_figure.update_layout(
        height=460,
        coloraxis={
            "colorscale": "RdBu_r",
            "cmin": -_top,
            "cmax": _top,
            "colorbar": {"title": "load / mean", "tickvals": _ticks, "ticktext": [f"{2**tick:.2f}" for tick in _ticks]},
        },
    )
    loads_figure.update_yaxes(autorange="reversed")
    loads_figure.update_yaxes(title="layer", row=1, col=1)
    loads_figure.update_xaxes(title="expert-parallel rank")
    loads_figure
    return go, make_subplots, np


@app.cell(hide_code=True)
def _(mo):
    mo.md("""
    ## 2. Where a step's time goes

    A typical decode step, mean over ranks.
    """)
    return


@app.cell
def _(figures, go):
    step_figure = go.Figure()
    for _operation in figures["planned"]["step"]["by_operation_s"]:
        step_figure.add_bar(
            name=_operation.replace("_", " "),
            y=list(figures),
            x=[1e3 * told["step"]["by_operation_s"].get(_operation, 0.0) for told in figures.values()],
            orientation="h",
        )
    step_figure.update_layout(barmode="stack", height=300, xaxis_title="ms", legend_traceorder="normal")
    for _name, _told in figures.items():
        _largest = sorted(_told["step"]["by_operation_s"].items(), key=lambda item: -item[1])[:3]
        print(
            f"{_name:11} step {1e3 * _told['step']['step_s']:.1f} ms at {_told['step']['tokens_per_dp_rank']:.0f} "
            "tokens a rank; most: "
            + ", ".join(f"{_operation} {1e3 * _spent:.1f} ms" for _operation, _spent in _largest)
        )
    step_figure
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md("""
    ## 3. How long requests wait

    Share of requests at most this slow; dashed: the scenario's service levels, at the percentile they bind.
    """)
    return


@app.cell
def _(figures, make_subplots, np, series):
    _colours = {"contiguous": "#c2581a", "planned": "#1d5fa6"}
    latency_figure = make_subplots(1, 3, subplot_titles=["TTFT", "TPOT", "ITL"], shared_yaxes=True)
    for _column, _metric in enumerate(("ttft_s", "tpot_s", "itl_s"), 1):
        for _name, _told in series.items():
            latency_figure.add_scatter(
                x=1e3 * np.asarray(_told["latency"][_metric]),
                y=np.arange(101),
                name=_name,
                line_color=_colours[_name],
                showlegend=_column == 1,
                row=1,
                col=_column,
            )
        for _level in figures["planned"]["slo"]["limits"]:
            if _level["metric"].startswith(_metric):
                latency_figure.add_vline(
                    x=1e3 * _level["limit_s"], line_dash="dash", line_color="#b3261e", row=1, col=_column
                )
    latency_figure.update_xaxes(title="ms", rangemode="tozero")
    latency_figure.update_yaxes(title="% at most this", row=1, col=1)
    latency_figure.update_layout(height=380)
    latency_figure
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md("""
    ## 4. What a search trades off

    A small search: the two plans above, then what Optuna's sampler asks for, each simulated once.
    """)
    return


@app.cell
def _(ground, plans, scenario):
    from placement.executors import start_workers
    from placement.objective import Evaluator
    from placement.ranking import pareto
    from placement.space import enumerate_space
    from placement.tuner import open_study, search

    space = enumerate_space(ground, scenario)
    with start_workers(scenario, Evaluator(ground, scenario), 1) as _workers:
        found = search(
            open_study(scenario, None, None, False),
            space,
            scenario,
            _workers,
            trials=16,
            recipes=list(plans.values()),
        )
    front = pareto(found, scenario)
    print(f"{len(space.plans)} legal plans, {len(found.trials)} tried; not legal: {space.infeasible}")
    print(f"tried but not run: {found.infeasible()}")
    for _trial in front:
        _metrics = _trial.outcome.metrics
        print(
            f"front: {_trial.plan.label()}: {_metrics['output_tokens_per_s_per_gpu']:.1f} output tokens/s/GPU, "
            f"TPOT p50 {1e3 * _metrics['tpot_s.p50']:.1f} ms"
        )
    return found, front


@app.cell
def _(found, front, go):
    _ran = [trial for trial in found.trials if trial.outcome.status == "ok"]
    pareto_figure = go.Figure()
    for _name, _trials, _mode, _colour in (
        ("misses a service level", [trial for trial in _ran if trial.outcome.violation > 0], "markers", "#b5bdc7"),
        ("meets all of them", [trial for trial in _ran if trial.outcome.violation <= 0], "markers", "#1d5fa6"),
        ("front", sorted(front, key=lambda trial: trial.outcome.metrics["tpot_s.p50"]), "lines", "#1b2129"),
    ):
        pareto_figure.add_scatter(
            x=[1e3 * trial.outcome.metrics["tpot_s.p50"] for trial in _trials],
            y=[trial.outcome.metrics["output_tokens_per_s_per_gpu"] for trial in _trials],
            text=[trial.plan.label() for trial in _trials],
            name=_name,
            mode=_mode,
            marker={"color": _colour, "size": 9},
            line={"color": _colour, "dash": "dot", "shape": "hv"},
        )
    pareto_figure.update_layout(
        height=420, xaxis_title="TPOT p50 (ms), less is better", yaxis_title="output tokens/s/GPU, more is better"
    )
    pareto_figure
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md("""
    ## Is the placement worth it?

    Both plans were simulated under the same draws, so their difference is paired: where its interval holds 0, it
    is a tie, whatever the two averages say.
    """)
    return


@app.cell
def _(np, simulations):
    def medians(simulation):
        """Median TPOT as best known, and under each draw, seconds."""
        return np.array(
            [
                np.median((served.finish_s - served.first_token_s) / (served.osl - 1))
                for served in (simulation.served, *simulation.drawn)
            ]
        )

    saving = 1.0 - medians(simulations["planned"]) / medians(simulations["contiguous"])
    low, high = np.percentile(saving[1:], [5, 95])
    worth = "worth it" if low > 0 else "don't" if high < 0 else "a tie"
    print(f"median TPOT saved by the planned placement: {saving[0]:+.1%} [{low:+.1%}, {high:+.1%}] (90 %): {worth}")
    print("Expert parallelism over several nodes is not validated on hardware.")
    return


if __name__ == "__main__":
    app.run()
