"""Fit the generator and the default dispersion to public counts, and say how well the fit holds.

    python -m moesim.routing.calibrate --loads DATA/deepseek_r1_*.json --olmoe DATA/olmoe_mixtral_counts.json \\
        --smartmoe DATA/smartmoe_ae_counts_first300.npz --params moesim/routing/params --docs docs/explanation

writes the parameters (never the counts), the figure and the table of docs/explanation/routing.md. The data folder is
described in docs/explanation/routing.md; nothing at run time needs it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import ndtri

from moesim.files import write_json, write_text
from moesim.routing.dispersion import excess_cv2
from moesim.routing.fit_report import figure, table
from moesim.routing.readers import read_loads
from moesim.routing.synth import deepseek_like, tail, tail_weight
from moesim.routing.trace import RoutingCounts, stack_profiles

Floats = NDArray[np.float64]

# Relative depths between which the curves of ln sigma and of the groups' part are linear: denser where they bend.
DEPTHS = (0.0, 0.05, 0.15, 0.4, 0.5, 0.85, 1.0)
# Quantiles at which the tail is matched, in bins of 58 x 256 values; the largest of 256 lies near 0.998.
TAIL = np.asarray([0.001, 0.004, 0.01, 0.03, 0.1, 0.25, 0.5, 0.75, 0.9, 0.97, 0.99, 0.996, 0.999, 0.9995])
BINS = 6  # of layers by sigma, 58 in each
POINTS = 4001  # of the normal distribution, to scale the tail
# DeepSeek-V3/R1 gate over 8 groups of experts (n_group in its config.json).
GROUPS = 8
# Sets of workloads drawn for the comparison.
DRAWS = 20
RANKS = 32
# Iterations of the training run before its routing settles; its drift is 15 times larger at the start.
SETTLED = 200
MODEL_SOURCE = (
    "expert counts of DeepSeek-R1 served by SGLang, attached to a public thread of the SGLang project "
    "(six workloads, one aggregate each); no licence stated, so only these fitted parameters are shipped"
)


def load_phases(paths: Sequence[Path]) -> list[RoutingCounts]:
    """Read the files; the phase is the word of the name that is `prefill` or `decode`."""
    return [
        read_loads(path, phase=next((word for word in ("prefill", "decode") if word in path.stem), "any"))
        for path in paths
    ]


def fit_deepseek_like(shares: Floats, phases: Sequence[str], groups: int = GROUPS) -> dict[str, Any]:
    """Parameters of synth.deepseek_like by moments, of shares [workloads, layers, experts]."""
    logs = np.log(shares)
    logs = logs - logs.mean(axis=2, keepdims=True)
    spread = np.log(logs.std(axis=2))  # [workloads, layers]
    by_layer = spread.mean(axis=0)
    basis = _hats(np.linspace(0.0, 1.0, shares.shape[1]))
    knots, *_ = np.linalg.lstsq(basis, by_layer, rcond=None)
    unit = logs / logs.std(axis=2, keepdims=True)
    grid = unit.reshape(*unit.shape[:2], groups, -1)
    size = grid.shape[3]
    means = grid.mean(axis=3)
    inside = grid - means[..., None]
    within = np.einsum("algi,blgi->ab", inside, inside) / (inside[0].size - inside[0].size // size)
    centred = means - means.mean(axis=2, keepdims=True)
    # Covariance of the group means, less what the mean of `size` experts carries of them.
    between = np.einsum("alg,blg->ab", centred, centred) / (centred[0].size * (groups - 1) / groups) - within / size
    curve, factors, skew = _fit_groups(means, inside, phases)
    return {
        "depth": list(DEPTHS),
        "log_sigma": _rounded(knots),
        "log_sigma_residual_sd": _round((by_layer - basis @ knots).std(ddof=len(DEPTHS))),
        "workload_log_sd": _round(spread.mean(axis=1).std(ddof=1)),
        "group_part": _rounded(curve),
        "group_part_of_phase": factors,
        "group_g": _round(skew),
        "group_components": _components(between, phases),
        "expert_components": _components(within, phases),
        **_fit_tail(unit, spread),
    }


def _fit_groups(means: Floats, inside: Floats, phases: Sequence[str]) -> tuple[Floats, dict[str, float], float]:
    """The groups' part of the variance over depth, its factor by phase, and how skewed the groups are.

    means: [workloads, layers, groups] of standardised ln share; inside: what experts stray from them, [..., size].
    """
    groups, size = inside.shape[2:]
    within = inside.var(axis=3, ddof=1).mean(axis=2)
    centred = means - means.mean(axis=2, keepdims=True)
    between = centred.var(axis=2, ddof=1) - within / size
    part = between / (between + within)
    knots, *_ = np.linalg.lstsq(_hats(np.linspace(0.0, 1.0, part.shape[1])), part.mean(axis=0), rcond=None)
    curve = np.clip(knots, 0.0, 1.0)
    smooth = np.interp(np.linspace(0.0, 1.0, part.shape[1]), DEPTHS, curve)
    names = np.asarray(phases)
    factors = {name: _round(part[names == name].mean() / smooth.mean()) for name in sorted(set(phases))}
    # The third central moment of a sample of n is (n - 1)(n - 2) / n^2 of the population's.
    third = (centred**3).mean() * groups**2 / ((groups - 1) * (groups - 2))
    wanted = third / (smooth**1.5).mean()
    grid = np.linspace(0.0, 1.0, POINTS)
    lognormal = (np.exp(grid**2) + 2.0) * np.sqrt(np.expm1(grid**2))
    return curve, factors, float(np.interp(wanted, lognormal, grid))


def _hats(depth: Floats) -> Floats:
    """Linear interpolation between DEPTHS as a matrix [depth, knots]."""
    return np.stack([np.interp(depth, DEPTHS, row) for row in np.eye(len(DEPTHS))], axis=1)


def _components(covariance: Floats, phases: Sequence[str]) -> dict[str, float]:
    """Shared and phase part from the mean correlation of pairs across phases, and within one."""
    scale = np.sqrt(np.diag(covariance))
    correlation = covariance / scale[:, None] / scale[None, :]
    same = np.asarray(phases)[:, None] == np.asarray(phases)[None, :]
    upper = np.triu(np.ones_like(same), 1)
    across = float(correlation[upper & ~same].mean())
    inside = float(correlation[upper & same].mean())
    return {"shared": _round(across), "phase": _round(max(inside - across, 0.0))}


def _fit_tail(unit: Floats, spread: Floats) -> dict[str, float]:
    """The tail that gives standardised values [workloads, layers, experts] their quantiles, in bins of sigma."""
    bins = np.array_split(np.argsort(spread.ravel()), BINS)
    rows = unit.reshape(-1, unit.shape[-1])
    wanted = np.stack([np.quantile(rows[members].ravel(), TAIL) for members in bins])
    middle = np.asarray([spread.ravel()[members].mean() for members in bins])
    fine = np.asarray(ndtri((np.arange(POINTS) + 0.5) / POINTS))
    centre = float(spread.mean())

    def loss(values: Floats) -> float:
        held = {"h_lower": values[1], "h_upper": values[2], "h_slope": values[3], "h_at_log_sigma": centre}
        shaped = tail(fine[None, :], float(values[0]), *tail_weight(held, np.exp(middle)[:, None]))
        shaped = (shaped - shaped.mean(axis=1, keepdims=True)) / shaped.std(axis=1, keepdims=True)
        return float(((np.quantile(shaped, TAIL, axis=1).T - wanted) ** 2).sum())

    found = minimize(loss, np.asarray([0.1, 0.03, 0.03, 0.0]), method="Nelder-Mead", options={"maxiter": 2000}).x
    names = ("g", "h_lower", "h_upper", "h_slope")
    return {name: _round(value) for name, value in zip(names, found, strict=True)} | {"h_at_log_sigma": _round(centre)}


def domain_cv2(path: Path) -> list[float]:
    """Squared coefficient of variation of expert shares between text domains, of each recorded OLMoE layer."""
    data = json.loads(path.read_text(encoding="utf-8"))
    kept = [value for key, value in data.items() if key.startswith("olmoe__expert_counts__") and "_top1" not in key]
    found = []
    for layer in range(len(kept[0])):
        rows = []
        for value in kept:
            pairs = list(value.values())[layer] if isinstance(value, dict) else value[layer]
            row = np.zeros(len(pairs))
            for expert, count in pairs:
                row[int(expert)] = count
            rows.append(row / row.sum())
        shares = np.asarray(rows)
        mean = shares.mean(axis=0)
        found.append(float(((shares - mean) ** 2).sum() / (len(shares) - 1) / (mean**2).sum()))
    return found


@dataclass(frozen=True)
class Statistics:
    """What a placement feels of a set of loads; every value a mean over layers unless named otherwise."""

    values: dict[str, float]


def statistics(shares: Floats, phases: Sequence[str], ranks: int = RANKS) -> Statistics:
    """Statistics of shares [workloads, layers, experts] on `ranks` ranks of equally many experts."""
    names = np.asarray(phases)
    prefill, decode = shares[names == "prefill"], shares[names == "decode"]
    experts = shares.shape[2]
    top = shares.max(axis=2) * experts
    found = {
        "sd of ln share": float(np.log(shares).std(axis=2).mean()),
        "largest share x experts, median layer": float(np.median(top)),
        "largest share x experts, 90 % of layers below": float(np.quantile(top, 0.9)),
        "smallest share x experts, median layer": float(np.median(shares.min(axis=2) * experts)),
        "Gini coefficient": float(_gini(shares).mean()),
        "contiguous max/mean, prefill": float(_balance(_contiguous(prefill, ranks)).mean()),
        "contiguous max/mean, decode": float(_balance(_contiguous(decode, ranks)).mean()),
        "correlation of ln share, prefill pairs": _pairs(prefill, prefill),
        "correlation of ln share, decode pairs": _pairs(decode, decode),
        "correlation of ln share, across phases": _pairs(prefill, decode),
        "packed on prefill, max/mean on prefill mix": _packed(prefill.mean(0), prefill.mean(0), ranks),
        "packed on prefill, max/mean on decode mix": _packed(prefill.mean(0), decode.mean(0), ranks),
        "packed on decode, max/mean on prefill mix": _packed(decode.mean(0), prefill.mean(0), ranks),
        "packed on one prefill, max/mean on another": float(
            np.mean([_packed(a, b, ranks) for i, a in enumerate(prefill) for j, b in enumerate(prefill) if i != j])
        ),
    }
    return Statistics(found)


def _gini(shares: Floats) -> Floats:
    experts = shares.shape[-1]
    ordered = np.sort(shares, axis=-1)
    weight = 2.0 * np.arange(1, experts + 1) - experts - 1.0
    return np.asarray((ordered * weight).sum(axis=-1) / (experts * shares.sum(axis=-1)))


def _contiguous(shares: Floats, ranks: int) -> Floats:
    return np.asarray(shares.reshape(*shares.shape[:-1], ranks, -1).sum(axis=-1))


def _balance(loads: Floats) -> Floats:
    return np.asarray(loads.max(axis=-1) / loads.mean(axis=-1))


def _pairs(first: Floats, second: Floats) -> float:
    """Mean correlation of ln share over layers and pairs of different workloads."""
    found = []
    for i, a in enumerate(np.log(first)):
        for j, b in enumerate(np.log(second)):
            if first is second and j <= i:
                continue
            a0, b0 = a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True)
            found.append((a0 * b0).mean(-1) / a0.std(-1) / b0.std(-1))
    return float(np.mean(found))


def _packed(fit: Floats, judge: Floats, ranks: int) -> float:
    """Longest-processing-time packing of experts by `fit`, judged on `judge`: mean over layers of max/mean."""
    layers, experts = fit.shape
    rows = np.arange(layers)
    load, judged = np.zeros((layers, ranks)), np.zeros((layers, ranks))
    held = np.zeros((layers, ranks), dtype=np.int64)
    for expert in np.argsort(-fit, axis=1).T:
        rank = np.argmin(np.where(held < experts // ranks, load, np.inf), axis=1)
        load[rows, rank] += fit[rows, expert]
        judged[rows, rank] += judge[rows, expert]
        held[rows, rank] += 1
    return float(_balance(judged).mean())


def generated(values: dict[str, Any], like: Floats, phases: Sequence[str], draws: int, seed: int) -> list[Floats]:
    """Sets of shares drawn from the parameters, of the shape and phases of the real ones."""
    _, layers, experts = like.shape
    return [
        deepseek_like(phases, layers=layers, experts=experts, groups=GROUPS, rng=rng, values=values)
        for rng in np.random.default_rng(seed).spawn(draws)
    ]


def _round(value: float) -> float:
    return round(float(value), 4)


def _rounded(values: Floats) -> list[float]:
    return [_round(value) for value in values]


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit, compare, write."""
    parser = argparse.ArgumentParser(prog="python -m moesim.routing.calibrate", description=__doc__)
    parser.add_argument("--loads", type=Path, nargs="+", required=True)
    parser.add_argument("--olmoe", type=Path, required=True)
    parser.add_argument("--smartmoe", type=Path, required=True)
    parser.add_argument("--params", type=Path, required=True)
    parser.add_argument("--docs", type=Path, required=True)
    options = parser.parse_args(arguments)
    loads = load_phases(sorted(options.loads))
    shares, _ = stack_profiles(loads)
    phases = [load.phase for load in loads]
    values = fit_deepseek_like(shares, phases)
    command = (
        "python -m moesim.routing.calibrate --loads deepseek_r1_*.json --olmoe olmoe_mixtral_counts.json "
        "--smartmoe smartmoe_ae_counts_first300.npz --params moesim/routing/params --docs docs/explanation"
    )
    write_json(
        options.params / "deepseek_like.json",
        {
            "parameters": values,
            "fitted_on": [load.name for load in loads],
            "source": MODEL_SOURCE,
            "command": command,
        },
        indent=1,
    )
    domains = domain_cv2(options.olmoe)
    steps = excess_cv2(read_loads(options.smartmoe).counts[SETTLED:])
    write_json(
        options.params / "dispersion.json",
        {
            "default": {"request_cv2": _round(min(domains)), "domain_cv2": 0.0, "time_cv2": _round(steps)},
            "request_cv2": {
                "meaning": "spread of expert shares between six text domains, the least of three layers",
                "layers": _rounded(np.asarray(domains)),
                "source": "allenai/OLMoE (Apache-2.0), expert counts of OLMoE-1B-7B by domain",
            },
            "time_cv2": {
                "meaning": f"excess spread between neighbouring iterations from {SETTLED} on",
                "source": "counts of a training run in the SmartMoE artefact",
            },
            "command": command,
        },
        indent=1,
    )
    sets = generated(values, shares, phases, DRAWS, seed=0)
    real = statistics(shares, phases).values
    drawn = [statistics(one, phases).values for one in sets]
    text = table(real, drawn)
    drawn_balance = np.stack([_balance(_contiguous(one, RANKS)) for one in sets])
    (options.docs / "img").mkdir(parents=True, exist_ok=True)
    write_text(
        options.docs / "img" / "routing_fit.svg",
        figure(shares, sets, _balance(_contiguous(shares, RANKS)), drawn_balance),
    )
    print(json.dumps(values, indent=1))
    print(f"OLMoE between domains, by layer: {_rounded(np.asarray(domains))}; SmartMoE between steps: {steps:.2e}")
    print(text)


if __name__ == "__main__":
    main()
