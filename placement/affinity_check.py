"""How much affinity cuts between nodes: on planted traces, on one without structure, and on a trace of your own.

`python -m placement.affinity_check [TRACE.parquet]` fits every solver to half of the steps and counts copies on
the other half, for 2, 4 and 8 nodes (docs/explanation/placement.md shows the table).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moesim.routing.holdout import split
from moesim.routing.planted import planted_trace
from moesim.routing.readers import read_loads
from moesim.routing.trace import RoutingCounts
from moesim.spec.plan import ExpertPlacement, PlacementRequest
from moesim.spec.scenario import HoldoutSpec
from placement.compare import BASELINE, PLANNED
from placement.cross_node import REFERENCES, CrossNode, compare_copies
from placement.problem import request_from_loads, solve
from placement.solvers.greedy import pack

NODES = (2, 4, 8)
PLANTED = {"clear": (8, 0.9), "faint": (8, 0.5), "none": (1, 0.0)}
"""Communities, and the share of a token's picks that its community surely gets."""

SPLITS = 6
SOLVERS = ("greedy", "eplb", "affinity")


@dataclass(frozen=True)
class Row:
    """One trace on some nodes: each solver against greedy on held-out tokens, its CPU seconds; `planted`: the truth."""

    trace: str
    nodes: int
    ranks: int
    judged: dict[str, CrossNode]
    solve_cpu_s: dict[str, float]

    def recovered(self, solver: str = "affinity") -> float | None:
        """Share of the cut of the planted grouping that the solver reaches; None without one."""
        if "planted" not in self.judged:
            return None
        return self.judged[solver].gains["greedy"].value / self.judged["planted"].gains["greedy"].value


def planted_placement(request: PlacementRequest, home: NDArray[np.int64]) -> ExpertPlacement:
    """Whole communities [layers, experts] on the nodes, packed evenly inside each: the most that can be cut.

    Communities got more or less of the fitted tokens by chance, so its nodes are not as even as greedy's.
    """
    order = np.argsort(home, axis=1, kind="stable").reshape(request.layers, request.nodes, -1)
    mix = request.mix()[np.arange(request.layers)[:, None, None], order]
    rows = np.ascontiguousarray(mix.reshape(-1, mix.shape[-1]))
    local = pack(rows, rows.shape[1], request.ranks // request.nodes).reshape(mix.shape)
    table = np.take_along_axis(order, local, axis=2)
    return request.placement(table.reshape(request.layers, -1), "planted")


def check(
    load: RoutingCounts, *, ranks_per_node: int, nodes: int, home: NDArray[np.int64] | None = None, seed: int = 0
) -> Row:
    """Fit to half of the steps, at random, and judge on the other half; home: of planted communities, several."""
    fit, judge = split([load], HoldoutSpec(by="step", fraction=0.5), np.random.default_rng(seed))
    ranks = nodes * ranks_per_node
    slots = -(-load.experts // ranks) * ranks
    request = request_from_loads(fit, slots=slots, ranks=ranks, nodes=nodes, seed=seed)
    found, seconds = {BASELINE: solve(request, BASELINE).placement}, {}
    for name in SOLVERS:
        start = time.process_time()
        solved = solve(request, name)
        found[name], seconds[name] = solved.placement, min(solved.solve_cpu_s, time.process_time() - start)
    if home is not None and home.max() > 0 and slots == load.experts:
        found["planted"] = planted_placement(request, home)
    judged = {
        name: compare_copies(
            {other: found[other] for other in (REFERENCES if name == "affinity" else ("greedy",))}
            | {PLANNED: placement},
            judge,
            nodes=nodes,
            replica="equal",
            seed=seed,
        )
        for name, placement in found.items()
    }
    return Row(load.name, nodes, ranks, judged, seconds)


def planted_rows(tokens: int = 20_000, seed: int = 0) -> Iterator[Row]:
    """Planted traces, clear and faint, and one without structure: 4 layers, 256 experts, top-8, 8 GPUs a node."""
    for communities, inside in PLANTED.values():
        load, home = planted_trace(
            tokens=tokens, layers=4, experts=256, top_k=8, communities=communities, inside=inside, follow=0.7,
            rng=np.random.default_rng(seed),
        )  # fmt: skip
        for nodes in NODES:
            yield check(load, ranks_per_node=8, nodes=nodes, home=home, seed=seed)


def main(arguments: Sequence[str]) -> None:
    """Print the table."""
    print(
        "| trace | nodes x GPUs | solver | copies, normal | of greedy's | low-latency | by request | token stays | "
        "max/mean | against greedy | a step | of planted | CPU s |"
    )
    print("|" + " --- |" * 13)
    rows: Iterator[Row] = planted_rows() if not arguments else _of_files(arguments)
    for row in rows:
        for name, judged in row.judged.items():
            copies, gain = judged.copies[PLANNED], judged.gains["greedy"]
            even = judged.balance_gains["greedy"]
            cells = [
                row.trace,
                f"{row.nodes} x {row.ranks // row.nodes}",
                name,
                f"{copies['normal']:.3f}",
                f"{-gain.value:+.1%} ({-gain.high:+.1%} to {-gain.low:+.1%})",
                f"{copies['low_latency']:.3f}",
                f"{copies['home_by_request']:.3f}" if "home_by_request" in copies else "-",
                f"{copies['stay']:.3f}" if "stay" in copies else "-",
                f"{judged.balance[PLANNED]:.3f}",
                f"{-even.value:+.1%} ({-even.high:+.1%} to {-even.low:+.1%})",
                f"{judged.per_step[PLANNED]:.3f}",
                f"{row.recovered(name):.0%}" if row.recovered(name) is not None else "-",
                f"{row.solve_cpu_s[name]:.2f}" if name in row.solve_cpu_s else "-",
            ]
            print(f"| {' | '.join(cells)} |", flush=True)


def _of_files(paths: Sequence[str]) -> Iterator[Row]:
    """Traces of one's own, 4 GPUs a node."""
    for path in paths:
        load = read_loads(Path(path), tokens=True)
        for nodes in NODES:
            yield check(load, ranks_per_node=4, nodes=nodes)


def over_splits(path: str) -> None:
    """Print what affinity does on average over SPLITS splits of a trace, as one split may be lucky."""
    load = read_loads(Path(path), tokens=True)
    print("\n| trace, splits | nodes x GPUs | fewer copies than greedy | max/mean | greedy | a step | greedy |")
    print("|" + " --- |" * 7)
    for nodes in NODES:
        judged = [check(load, ranks_per_node=4, nodes=nodes, seed=seed).judged["affinity"] for seed in range(SPLITS)]
        cuts = [one.gains["greedy"].value for one in judged]
        means = [
            float(np.mean([getattr(one, figure)[name] for one in judged]))
            for figure in ("balance", "per_step")
            for name in (PLANNED, "greedy")
        ]
        print(
            f"| {load.name}, {SPLITS} | {nodes} x 4 | {np.mean(cuts):.1%} ({min(cuts):.1%} to {max(cuts):.1%}) | "
            f"{' | '.join(f'{mean:.3f}' for mean in means)} |",
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
    for file in sys.argv[1:]:
        over_splits(file)
