"""What a profile can say of its own errors, and the physics fitted for its experts; computed when it is imported.

Curves and grids: every second inner point (or grid line) is left out and predicted from the others, which doubles the
spacing, so the figures are on the careful side. Experts: physics is fitted on balanced rows (for the prefill kernel
also on the skewed rows of every other exponent), and skewed rows that the fit has not seen are predicted as histograms.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from moesim.units import BYTES_PER_ELEMENT
from profiles.experts import (
    SKEWED,
    ExpertTable,
    balanced_residuals,
    balanced_runs,
    expert_table,
    limits_of,
    physics_name,
    skewed_alone,
    skewed_residuals,
    skewed_runs,
)
from profiles.fit import Errors, curve, curve_residuals, medians, summarise, surface_residuals
from profiles.grouped import Shape, fit_physics
from profiles.lookup import between_shapes, product_name, rule_along, rule_of
from profiles.products import Product, fit_product
from profiles.products import Shape as ProductShape
from profiles.record import FAMILIES, LATENCY, TEXT

if TYPE_CHECKING:
    import polars as pl

Floats = NDArray[np.float64]
T = TypeVar("T")
ExpertShape = tuple[int, int, int, str]  # hidden, experts, top_k, dtype
_EXPERT_SHAPE = ("hidden", "experts", "top_k", "dtype")
ORIGIN = ["engine", "version", "kernel"]
# Groups that judge a family that nothing is priced from; the kernels of one are alike.
JUDGED_GROUPS = 200
# Skewed rows that judge one fused kernel and shape; there are hundreds of shapes, and the rows are alike.
JUDGING_ROWS = 60


def errors_of(
    tables: dict[str, pl.DataFrame], physics: dict[str, Any], most: int | None = None
) -> dict[str, dict[str, float]]:
    """Leave-out errors by name, as `StoreCosts` asks for them.

    most: shapes of a kernel (of dense products, of attention) that are judged, taken evenly; None for all of them.
    """
    import polars as pl

    found: dict[str, Errors | None] = {}
    for name in ("mla_absorb", "collective"):
        found[name] = _by_group(tables[name], FAMILIES[name].key, functools.partial(_curve, family=name))
    found["gemm"] = _by_group(tables["gemm"], {"dtype": TEXT}, functools.partial(_products, most=most))
    found["gemm_shape"] = _gemm_shapes(tables["gemm"], most)
    for name in ("attention_prefill", "attention_decode", "mla_prefill", "mla_decode"):
        found[name] = _by_group(tables[name], FAMILIES[name].key, functools.partial(_grid, family=name), most)
    for mode in ("normal", "low_latency"):
        rows = tables["exchange"].filter(pl.col("mode") == mode)
        found[f"exchange_{mode}"] = _by_group(
            rows, FAMILIES["exchange"].key, functools.partial(_curve, family="exchange")
        )
    for name, family in FAMILIES.items():
        if not family.priced and name in tables:
            one = functools.partial(_curve if len(family.point) == 1 else _grid, family=name)
            found[name] = _by_group(tables[name], family.key, one, most=JUDGED_GROUPS)
    for grouping, residuals in physics.get("residuals", {}).items():
        found[f"experts_{grouping}"] = summarise(np.asarray(residuals))
    return {name: error.as_dict() for name, error in found.items() if error is not None}


def _by_group(
    rows: pl.DataFrame, key: dict[str, str], residuals: Callable[[pl.DataFrame], Floats], most: int | None = None
) -> Errors | None:
    """most: groups that are judged, taken evenly; None for all of them. None where no point can be left out."""
    parts = _evenly(rows.partition_by([*key, *ORIGIN]) if rows.height else [], most)
    found = np.concatenate([residuals(part) for part in parts]) if parts else np.empty(0)
    return summarise(found)


def _evenly(parts: list[T], most: int | None) -> list[T]:
    """At most so many of the parts, from all over the list."""
    return parts if most is None else parts[:: max(1, -(-len(parts) // most))]


def _curve(rows: pl.DataFrame, family: str) -> Floats:
    size = FAMILIES[family].point[0]
    return curve_residuals(rows[size].to_numpy(), rows[LATENCY].to_numpy(), rule_along(rows, size))


def _grid(rows: pl.DataFrame, family: str) -> Floats:
    a, b = FAMILIES[family].point
    return surface_residuals(rows[a].to_numpy(), rows[b].to_numpy(), rows[LATENCY].to_numpy(), rule_of(b))


def fit_products(rows: pl.DataFrame) -> dict[str, Product]:
    """What the rows of dense products tell of each kernel, by `lookup.product_name`."""
    parts = rows.partition_by(["dtype", *ORIGIN], as_dict=True) if rows.height else {}
    found = {}
    for (dtype, engine, version, kernel), part in sorted(parts.items()):
        name = product_name(str(dtype), str(engine), str(version), str(kernel))
        found[name] = fit_product([shape for _, _, shape in _shapes(part)])
    return found


def _shapes(rows: pl.DataFrame) -> list[tuple[int, int, ProductShape]]:
    """(n, k, measured rows) of every shape of one kernel."""
    found = []
    for (n, k), part in rows.partition_by(["n", "k"], as_dict=True).items():
        found.append(
            (int(n), int(k), ProductShape(float(n * k), *medians(part["m"].to_numpy(), part[LATENCY].to_numpy())))
        )
    return found


def _products(rows: pl.DataFrame, most: int | None = None) -> Floats:
    """Every second inner size of every shape (or of `most` shapes) of one kernel, by the rule that the others chose."""
    kept, left = [], []
    for n, k, shape in _shapes(rows):
        out = np.zeros(len(shape.rows), dtype=bool)
        out[1:-1:2] = True
        kept.append((n, k, ProductShape(shape.weights, shape.rows[~out], shape.seconds[~out])))
        left.append((shape.rows[out], shape.seconds[out]))
    product = fit_product([shape for _, _, shape in kept])
    residuals = [np.empty(0)]
    for (n, k, shape), (m, seconds) in _evenly(list(zip(kept, left, strict=True)), most):
        if len(m):
            by_size = curve(shape.rows, shape.seconds, rule=product.rule(n, k), surcharge_s=product.surcharge_s)
            residuals.append(np.log(by_size.price(m)[0] / seconds))
    return np.concatenate(residuals)


def _gemm_shapes(rows: pl.DataFrame, most: int | None = None) -> Errors | None:
    """Every second inner n (then k) is left out and predicted from the shapes around it.

    most: left-out shapes of a kernel and axis that are predicted; None for all of them.
    """
    import polars as pl

    found = []
    for part in rows.partition_by(["dtype", *ORIGIN]) if rows.height else []:
        for axis in ("n", "k"):
            values = part[axis].unique().sort()
            left_out = values.to_list()[1:-1:2]
            kept = part.filter(~pl.col(axis).is_in(left_out))
            product = fit_products(kept)
            for own in _evenly(part.filter(pl.col(axis).is_in(left_out)).partition_by(["n", "k"]), most):
                n, k = int(own["n"][0]), int(own["k"][0])
                guess = between_shapes(kept, n, k, product)
                if guess is None:
                    continue
                ms, seconds = medians(own["m"].to_numpy(), own[LATENCY].to_numpy())
                inside = ms <= guess.largest
                guessed, _ = guess.price(ms[inside])
                found.append(np.log(guessed / seconds[inside]))
    return summarise(np.concatenate(found)) if found else None


def fit_experts(rows: pl.DataFrame, of: Collection[ExpertShape] | None = None) -> dict[str, Any]:
    """Physics of every kernel and shape, and by kernel the residuals of rows that the fits have not seen.

    of: the experts that will be asked for, as (hidden, experts, top_k, dtype); None for all that the rows hold. Others
    are fitted to their balanced rows when they are asked for after all.

    Returns `parameters`: name -> {parameters, limits}; `residuals`: grouping -> ln(predicted / measured).
    """
    import polars as pl

    key = ["grouping", "dtype", "hidden", "intermediate", "experts", "top_k", "engine", "version"]
    parameters: dict[str, Any] = {}
    residuals: dict[str, list[Floats]] = {}
    if of is not None:
        wanted = pl.DataFrame(sorted(of), schema=_EXPERT_SHAPE, orient="row")
        rows = rows.join(wanted, on=list(_EXPERT_SHAPE), how="semi", maintain_order="left")
    for values, part in rows.partition_by(key, as_dict=True).items() if rows.height else ():
        grouping, dtype, hidden, intermediate, experts, top_k, engine, version = values
        if dtype not in BYTES_PER_ELEMENT:  # no scenario can ask for it, and its weights have no size
            continue
        shape = Shape(hidden, intermediate, dtype, experts, top_k, grouping)
        learnt, left = _halves(shape, part)
        alone = list(skewed_runs(shape, _some(learnt)))
        balanced = [*balanced_runs(shape, part), *(run for _, _, run in alone)]
        if len(balanced) < 8:  # fewer rows than would pin six parameters: nothing to look up either
            continue
        skewed = list(skewed_runs(shape, _some(part) if grouping == "fused" else part))
        learns = {entry[1] for entry in skewed if grouping == "deepep_normal" and _seen(entry[1], skewed)}
        seen = [entry for entry in skewed if entry[1] in learns]
        unseen = [entry for entry in skewed if entry[1] not in learns]
        physics = fit_physics(shape, [*balanced, *(run for _, _, run in seen)])
        limits = limits_of(shape, physics, skewed)
        table = expert_table(shape, part, (physics, limits))
        if table is None:  # skewed rows alone, and of no number of local experts more than one
            continue
        parameters[physics_name(shape, engine, version)] = {
            "parameters": physics.as_dict(),
            "limits": {str(slots): float(f"{limit:.6g}") for slots, limit in sorted(limits.items())},
        }
        anchored = set(learnt["local_experts"].unique())
        judged = [_judged(table, [entry for entry in unseen if entry[0] not in anchored])]
        known = expert_table(shape, part.join(left, on=part.columns, how="anti", nulls_equal=True), (physics, limits))
        if left.height and known is not None:
            judged.append(_judged(known, list(skewed_runs(shape, _some(left)))))
        residuals.setdefault(grouping, []).extend(judged)
    return {
        "parameters": dict(sorted(parameters.items())),
        "residuals": {name: np.concatenate(parts) for name, parts in residuals.items()},
    }


def _halves(shape: Shape, part: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Skewed rows that stand alone: those that fits learn from, and those of every other exponent, which judge them."""
    import polars as pl

    rows = skewed_alone(shape, part)
    exponents = rows["distribution"].unique().sort(descending=False).to_list()
    left = pl.col("distribution").is_in(exponents[1::2])
    return rows.filter(~left), rows.filter(left)


def _some(rows: pl.DataFrame) -> pl.DataFrame:
    """The skewed rows thinned out evenly to JUDGING_ROWS."""
    import polars as pl

    skewed = rows.filter(pl.col("distribution").str.contains(SKEWED))
    return skewed.gather_every(max(1, skewed.height // JUDGING_ROWS))


def _seen(exponent: float, skewed: list[Any]) -> bool:
    """Every other exponent, from the smallest."""
    exponents = sorted({entry[1] for entry in skewed})
    return exponents.index(exponent) % 2 == 0


def _judged(table: ExpertTable, unseen: list[Any]) -> Floats:
    """Residuals of skewed rows; where there are none, of balanced rows at left-out numbers of local experts."""
    found = skewed_residuals(table, unseen) if unseen else balanced_residuals(table)
    return found[np.isfinite(found)]
