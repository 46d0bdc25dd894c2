"""An exchange at an EP size that a table does not hold: between two that it holds, or beyond them and tagged so."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moesim.cost.estimate import Tag
from moesim.cost.ops import MoeExchange
from moesim.network.traffic import message_bytes
from moesim.network.uniform import Routed
from moesim.spec.cluster import ClusterSpec
from profiles.ep_scaling import ExchangeKind, ExchangePhysics, carried, fit
from profiles.fit import Curve, curve, medians
from profiles.lookup import Priced, along_curve, at_best, place_of
from profiles.record import LATENCY

if TYPE_CHECKING:
    import polars as pl

Floats = NDArray[np.float64]
# EP size -> tokens and seconds, both [n], tokens rising.
BySize = dict[int, tuple[Floats, Floats]]

# One standard deviation of ln(true / predicted) where a table holds too few EP sizes to leave one out: the 90 % error
# of inner sizes and of edges over published series (`moesim profile check --leave-out ep-size`), taken as wide.
FEW_SIZES_SIGMA = 0.2
FEW_SIZES_EDGE_SIGMA = 0.4


@dataclass(frozen=True)
class Between:
    """Seconds along tokens at an EP size.

    inner: two measured sizes lie around it. around: these two, or the smallest and the largest measured. sigma: of the
    EP size alone.
    """

    curve: Curve
    around: tuple[int, int]
    inner: bool
    sigma: float


def kind_of(op: MoeExchange, cluster: ClusterSpec) -> ExchangeKind:
    """How DeepEP copies for this operation on this cluster."""
    return ExchangeKind(
        scheme="expert" if op.mode == "low_latency" else "node",
        routed=Routed(top_k=op.top_k, experts=op.experts),
        copy_bytes=message_bytes(op.step, op.mode, hidden=op.hidden, dtype=op.dtype, top_k=op.top_k),
        domain=cluster.domain_gpus,
        nic_bytes_per_s=cluster.shared_nic_bytes_per_s,
        nvlink_bytes_per_s=cluster.near_bytes_per_s,
    )


def between(op: MoeExchange, cluster: ClusterSpec, rows: pl.DataFrame) -> Between | None:
    """The operation from the rows of one version that differ from it in EP size and nodes only.

    None where fewer than two EP sizes were measured on nodes of as many GPUs as the cluster's, or where the operation
    fills its nodes in another way.
    """
    each = cluster.gpus_per_node
    if op.nodes != -(-op.ep // each):
        return None
    by_size = sizes_of(rows, each)
    if len(by_size) < 2 or op.ep in by_size:
        return None
    kind = kind_of(op, cluster)
    seconds = _at(kind, by_size, op.ep)
    if seconds is None:
        return None
    inner = min(by_size) < op.ep < max(by_size)
    few = FEW_SIZES_SIGMA if inner else FEW_SIZES_EDGE_SIGMA
    errors = leave_out(kind, by_size, inner=inner)
    sigma = float(np.quantile(np.abs(errors), 0.68)) if len(errors) else few
    sizes = sorted(by_size)
    above = int(np.searchsorted(sizes, op.ep))
    around = (sizes[above - 1], sizes[above]) if inner else (sizes[0], sizes[-1])
    return Between(curve(*seconds, exact=False), around, inner, sigma)


def exchanges_between(
    op: MoeExchange,
    cluster: ClusterSpec,
    tables: Iterable[tuple[str, pl.DataFrame]],
    *,
    sigma: Callable[[pl.DataFrame], float],
    edges: bool,
) -> Iterator[Priced]:
    """Lookups of an EP size that no table holds, newest version first: between two sizes of one, else beyond them.

    tables: the words and rows of each version, newest first, that agree in everything but EP size and nodes. sigma: of
    the lookup along tokens in some rows. edges: whether sizes beyond the measured ones are wanted; they come last,
    tagged extrapolated.
    """
    beyond = []
    for source, table in tables:
        found = between(op, cluster, table)
        if found is None or not (found.inner or edges):
            continue
        low, high = found.around
        words = f"between EP {low} and {high}" if found.inner else f"beyond EP {low} to {high}"
        whole = float(np.hypot(sigma(table), found.sigma))
        priced = along_curve(found.curve, "tokens", f"{source}, {words}", whole)
        priced = dataclasses.replace(priced, profile=place_of(table), stand_in=True)
        if found.inner:
            yield priced
        else:
            beyond.append(dataclasses.replace(priced, price=at_best(priced.price, Tag.EXTRAPOLATED)))
    yield from beyond


def leave_out(kind: ExchangeKind, by_size: BySize, *, inner: bool) -> Floats:
    """ln(predicted / measured) [n] of each inner EP size (or each edge), at its own tokens, from the other sizes."""
    sizes = sorted(by_size)
    left = sizes[1:-1] if inner else [sizes[0], sizes[-1]]
    found = []
    for size in left if len(sizes) > 2 else []:
        guess = _at(kind, {other: points for other, points in by_size.items() if other != size}, size)
        if guess is None:
            continue
        tokens, seconds = by_size[size]
        inside = (tokens >= guess[0][0]) & (tokens <= guess[0][-1])
        predicted, _ = curve(*guess, exact=False).price(tokens[inside])
        found.append(np.log(predicted / seconds[inside]))
    return np.concatenate(found) if found else np.empty(0)


def sizes_of(rows: pl.DataFrame, each: int) -> BySize:
    """Tokens and seconds of each EP size that fills nodes of `each` GPUs, repeats by their median."""
    found: BySize = {}
    for (ep, nodes), part in rows.partition_by(["ep", "nodes"], as_dict=True).items():
        if int(nodes) == -(-int(ep) // each):
            found[int(ep)] = medians(part["tokens"].to_numpy(), part[LATENCY].to_numpy())
    return found


def _at(kind: ExchangeKind, by_size: BySize, ep: int) -> tuple[Floats, Floats] | None:
    """Tokens and seconds at an EP size, on the tokens of its measured neighbours; None where those share none."""
    sizes = sorted(by_size)
    around = [size for size in (_last_below(sizes, ep), _first_above(sizes, ep)) if size is not None]
    low = max(by_size[size][0][0] for size in around)
    high = min(by_size[size][0][-1] for size in around)
    grid = np.unique(np.concatenate([by_size[size][0] for size in around]))
    grid = grid[(grid >= low) & (grid <= high)]
    if not len(grid):
        return None
    measured = {}
    for size in around:
        seconds, _ = curve(*by_size[size]).price(grid)
        measured[size] = (grid, seconds)
    return grid, carried(_physics(kind, by_size), kind, measured, ep, grid)


def _physics(kind: ExchangeKind, by_size: BySize) -> ExchangePhysics:
    sizes = np.concatenate([np.full(len(tokens), size) for size, (tokens, _) in by_size.items()])
    tokens = np.concatenate([tokens for tokens, _ in by_size.values()])
    return fit(kind, sizes, tokens, np.concatenate([seconds for _, seconds in by_size.values()]))


def _last_below(sizes: list[int], ep: int) -> int | None:
    return max((size for size in sizes if size < ep), default=None)


def _first_above(sizes: list[int], ep: int) -> int | None:
    return min((size for size in sizes if size > ep), default=None)
