"""From load files to a solver's request, and from a request to a timed solution."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moesim import plugins
from moesim.errors import BadInput, Infeasible
from moesim.routing.tensors import MAX_CELLS
from moesim.routing.trace import RoutingCounts, stack_profiles
from moesim.spec.plan import ExpertPlacement, PlacementRequest

DEFAULT_SOLVER = "greedy"
GROUP_SOLVERS = ("eplb", "greedy", "robust", "robust_bootstrap", "robust_cvar", "robust_worst", "incremental")

FEW_EXPERTS = 12
"""Up to here a solver may search exhaustively."""


@dataclass(frozen=True)
class Solved:
    """A placement and the CPU seconds of its solver, compilation not counted."""

    placement: ExpertPlacement
    solve_cpu_s: float


def request_from_loads(
    loads: Sequence[RoutingCounts], *, slots: int, ranks: int, nodes: int = 1, groups: int = 1, seed: int = 0
) -> PlacementRequest:
    """The request that the load files make; each counts by its weight alone, whatever its number of tokens.

    Raises BadInput where the files disagree in shape, Infeasible where no placement can have that many slots.
    """
    if not loads:
        raise BadInput("there are no loads to place for", mend="give --loads FILE or a scenario with routing.loads")
    for name, value in (("slots", slots), ("gpus", ranks), ("nodes", nodes), ("groups", groups)):
        if value < 1:
            raise BadInput(f"{name} is {value}", where=f"--{name}", mend="give a number above 0")
    profiles, weights = stack_profiles(loads)
    pairs = pair_figures(loads)
    try:
        return PlacementRequest(
            loads=np.ascontiguousarray(profiles),
            weights=weights,
            layer_ids=loads[0].layer_ids,
            absolute_layers=loads[0].absolute_layers,
            slots=slots,
            ranks=ranks,
            nodes=nodes,
            groups=groups,
            seed=seed,
            coactivation=pairs.coactivation,
            transitions=pairs.transitions,
            dispersion=pairs.dispersion,
        )
    except Infeasible as error:
        raise Infeasible(error.what, where=f"slots {slots}", mend=error.mend, reason=error.reason) from None


@dataclass(frozen=True)
class PairFigures:
    """What `PlacementRequest` has of pairs of experts: all [layers (- 1), experts, experts], None where not known."""

    coactivation: NDArray[np.float64] | None = None
    transitions: NDArray[np.float64] | None = None
    dispersion: NDArray[np.float64] | None = None


def pair_figures(loads: Sequence[RoutingCounts]) -> PairFigures:
    """Figures of pairs of experts, of the loads that tell tokens apart, by weight.

    Nothing where no load tells, or where [layers, experts, experts] would take more than half a gigabyte.
    """
    _, layers, experts = loads[0].counts.shape
    told = [load for load in loads if load.tokens is not None]
    if not told or layers * experts**2 > MAX_CELLS:
        return PairFigures()
    weights = np.asarray([load.weight for load in told])
    together: list[NDArray[np.float64] | None] = []
    onward: list[NDArray[np.float64] | None] = []
    swing: list[NDArray[np.float64] | None] = []
    for load in told:
        assert load.tokens is not None
        together.append(load.tokens.coactivation(experts))
        onward.append(load.tokens.transitions(experts))
        swing.append(step_covariance(load))
    return PairFigures(*(_mixed(found, weights) for found in (together, onward, swing)))


def _mixed(found: Sequence[NDArray[np.float64] | None], weights: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """The weighted mean; None where one is not known."""
    known = [table for table in found if table is not None]
    if len(known) < len(found):
        return None
    return np.asarray(np.tensordot(weights / weights.sum(), np.stack(known), axes=1))


def step_covariance(load: RoutingCounts) -> NDArray[np.float64] | None:
    """Covariance of the experts' shares of a layer from step to step: [layers, experts, experts]; None without steps.

    A step counts by its tokens.
    """
    if not load.per_step:
        return None
    total = load.counts.sum(axis=2, keepdims=True)
    away = (load.counts - total * load.profile()) / np.sqrt(np.maximum(total, 1.0))
    whole = np.maximum(total.sum(axis=0)[:, :, None], 1.0)
    return np.asarray(np.einsum("sle,slf->lef", away, away, optimize=True) / whole)


def solve(request: PlacementRequest, solver: str = DEFAULT_SOLVER, *, where: str = "--solver") -> Solved:
    """Run a solver by its registered name, its kernels compiled beforehand on a tiny request of the same kind.

    Raises BadInput for an unknown solver or a request it does not support, Infeasible where there is no placement.
    """
    run: Callable[[PlacementRequest], ExpertPlacement] = plugins.load(plugins.SOLVERS, solver, where=where)
    warm_up(run, request)
    start = time.process_time()
    placement = run(request)
    return Solved(placement, time.process_time() - start)


def warm_up(run: Callable[[PlacementRequest], ExpertPlacement], request: PlacementRequest) -> None:
    """Compile (or load from the cache) what `run` compiles, on one layer of a few experts with the request's groups on.

    Solvers may treat few experts on a node otherwise than many: the tiny request is of the request's kind in this, too.
    """
    groups, nodes = (2, 2) if request.groups > 1 else (1, 1)
    per_node = request.experts // request.nodes if request.groups > 1 else request.experts
    experts = 8 if per_node <= FEW_EXPERTS else 16 * nodes
    current = None
    if request.current is not None:
        current = ExpertPlacement(np.arange(experts + 4)[None, :] % experts, np.zeros(1, dtype=np.int64), experts, 4, 1)
    loads = np.linspace(1.0, 2.0, experts)[None, None, :] * np.ones((len(request.weights), 1, 1))
    tiny = PlacementRequest(
        loads=np.ascontiguousarray(loads / loads.sum(axis=-1, keepdims=True)),
        weights=request.weights,
        layer_ids=np.zeros(1, dtype=np.int64),
        absolute_layers=1,
        slots=experts + 4,
        ranks=4,
        nodes=nodes,
        groups=groups,
        seed=request.seed,
        current=current,
        coactivation=None if request.coactivation is None else np.ones((1, experts, experts)) - np.eye(experts),
        transitions=None if request.transitions is None else np.ones((0, experts, experts)),
        dispersion=None if request.dispersion is None else np.eye(experts)[None],
    )
    try:
        run(tiny)
    except (BadInput, Infeasible):
        return  # the request itself will say it, with its own numbers


def without_redundancy(request: PlacementRequest) -> PlacementRequest:
    """The same loads with the fewest slots that the ranks allow, and no groups: what the plain baseline gets."""
    fewest = -(-request.experts // request.ranks) * request.ranks
    return replace(request, slots=fewest, groups=1, current=None)


def refuse_groups(request: PlacementRequest, solver: str) -> None:
    """Raise BadInput where groups are asked of a solver that cannot keep them on a node."""
    if request.groups > 1:
        raise BadInput(
            f"the solver {solver} cannot keep {request.groups} groups on their nodes",
            where="--groups",
            mend=f"use one of: {', '.join(GROUP_SOLVERS)}",
        )


def refuse_uneven_groups(request: PlacementRequest) -> None:
    """Raise Infeasible where groups, nodes, ranks, slots and experts do not divide as keeping groups on nodes needs."""
    if request.groups == 1:
        return
    for amount, what, by, of in (
        (request.experts, "experts", request.groups, "groups"),
        (request.groups, "groups", request.nodes, "nodes"),
        (request.ranks, "GPUs", request.nodes, "nodes"),
    ):
        if amount % by:
            raise Infeasible(
                f"{amount} {what} do not divide by {by} {of}",
                where="--groups",
                mend="choose numbers that divide, use --groups 1, or the solver eplb, which falls back to one group",
                reason="groups_not_divisible",
            )
