"""Generated expert counts: plain skews, and `deepseek_like`, a model of the public counts of DeepSeek-R1.

`deepseek_like` draws log shares. For workload w, layer l and expert e of gating group g,

    ln share = sigma_l * a_w * tail(u),    u = sqrt(gamma) skew(G[w, l, g]) + sqrt(1 - gamma) X[w, l, e],

tail(u) brought to mean 0 and variance 1 in each layer, so that sigma_l * a_w is the spread that the layer has. sigma
and gamma are curves over relative depth, gamma times a factor of the phase. G and X are each sqrt(shared) S +
sqrt(phase) F + sqrt(rest) W with standard normal S (what all workloads have in common), F (those of one phase) and W
(one alone). `tail` is Tukey's g-and-h with an h for each side, both falling with sigma: the more skewed a layer, the
thinner its tails. `skew` is a shifted lognormal: few groups are hot. The parameters, their source and the command that
fitted them are in `params/deepseek_like.json`; docs/explanation/routing.md shows how well they hold.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import BadInput
from moesim.routing.inclusion import cap_shares
from moesim.routing.trace import RoutingCounts
from moesim.spec.scenario import SyntheticSpec

Floats = NDArray[np.float64]

# Routed tokens that a generated aggregate stands for: as many as the smallest real file has to its name, 3 million.
TOKENS = 3_000_000
# Skews where the scenario gives none. Zipf's own law has exponent 1; 0.65 is the mean spread of ln share in the real
# counts (docs/explanation/routing.md); 1.2 is the power law that aiconfigurator 0.12 takes for most MoE models.
ZIPF_EXPONENT = 1.0
LOGNORMAL_SIGMA = 0.65
POWER_LAW_EXPONENT = 1.2
# Below this a spread or a bend is none.
LEAST_SPREAD = 1e-9
# A heavier tail than the first has no finite fourth moment; a lighter one than the second would turn back at 5 sigma.
MOST_TAIL = 0.2
LEAST_TAIL = -0.04


def generate(
    spec: SyntheticSpec,
    *,
    layer_ids: Sequence[int],
    absolute_layers: int,
    experts: int,
    top_k: int,
    rng: np.random.Generator,
    groups: int = 1,
) -> tuple[RoutingCounts, ...]:
    """Draw `spec.workloads` load scenarios, each an aggregate [1, layers, experts] with no share over 1 / top_k.

    deepseek_like: the first half are prefill, the others decode. All other kinds give every workload the same shares
    (each layer in its own random order), so nothing is to be learnt from holding one out. groups: the model's gating
    groups (contiguous experts); 1 = none, then experts of a layer are independent.
    """
    layers = len(layer_ids)
    if spec.kind == "deepseek_like":
        prefill = spec.workloads // 2
        phases = ["prefill"] * prefill + ["decode"] * (spec.workloads - prefill)
        shares = deepseek_like(phases, layers=layers, experts=experts, groups=groups, rng=rng)
        names = [
            f"synthetic-{phase}-{index + 1 - (prefill if phase == 'decode' else 0)}"
            for index, phase in enumerate(phases)
        ]
    else:
        plain = rng.permuted(_plain(spec, layers, experts, rng), axis=1)
        shares = np.broadcast_to(plain, (spec.workloads, layers, experts))
        phases = ["any"] * spec.workloads
        names = [f"synthetic-{spec.kind}-{index + 1}" for index in range(spec.workloads)]
    shares = cap_shares(shares, top_k)
    return tuple(
        RoutingCounts(
            counts=share[None] * float(TOKENS * top_k),
            layer_ids=np.asarray(layer_ids, dtype=np.int64),
            absolute_layers=absolute_layers,
            name=name,
            phase=phase,
        )
        for share, name, phase in zip(shares, names, phases, strict=True)
    )


def _plain(spec: SyntheticSpec, layers: int, experts: int, rng: np.random.Generator) -> Floats:
    """Loads [layers, experts] of a plain skew, in no particular scale."""
    if spec.kind == "uniform":
        return np.ones((layers, experts))
    if spec.kind == "zipf":
        exponent = ZIPF_EXPONENT if spec.exponent is None else spec.exponent
        return np.broadcast_to(np.arange(1, experts + 1, dtype=np.float64) ** -exponent, (layers, experts)).copy()
    if spec.kind == "lognormal":
        sigma = LOGNORMAL_SIGMA if spec.sigma is None else spec.sigma
        return np.asarray(np.exp(sigma * rng.standard_normal((layers, experts))))
    if spec.kind == "power_law":
        exponent = POWER_LAW_EXPONENT if spec.exponent is None else spec.exponent
        return _power_law(rng.random((layers, experts)), exponent, float(experts))
    raise BadInput(f"unknown kind {spec.kind!r}", where="routing.synthetic.kind", mend="see the reference")


def _power_law(uniform: Floats, exponent: float, largest: float) -> Floats:
    """Quantiles of the density x^-exponent on 1 to `largest`."""
    if abs(exponent - 1.0) < 1e-9:
        return np.asarray(largest**uniform)
    power = 1.0 - exponent
    return np.asarray((1.0 + uniform * (largest**power - 1.0)) ** (1.0 / power))


def parameters() -> dict[str, Any]:
    """The fitted parameters of deepseek_like, as shipped."""
    text = resources.files("moesim.routing").joinpath("params/deepseek_like.json").read_text(encoding="utf-8")
    values: dict[str, Any] = json.loads(text)["parameters"]
    return values


def deepseek_like(
    phases: Sequence[str],
    *,
    layers: int,
    experts: int,
    groups: int,
    rng: np.random.Generator,
    values: Mapping[str, Any] | None = None,
) -> Floats:
    """Shares [workloads, layers, experts] of workloads of these phases; `values` replaces the shipped parameters."""
    held = parameters() if values is None else values
    groups = groups if experts % groups == 0 else 1
    gamma = _group_part(held, phases, layers) if groups > 1 else np.zeros((len(phases), layers, 1))
    of_experts = _mixed(phases, held["expert_components"], (layers, experts), rng)
    of_groups = _skewed(_mixed(phases, held["group_components"], (layers, groups), rng), float(held["group_g"]))
    u = np.sqrt(1.0 - gamma) * of_experts + np.sqrt(gamma) * np.repeat(of_groups, experts // groups, axis=2)
    sigma = _sigma_by_layer(held, layers, rng)
    scale = np.exp(float(held["workload_log_sd"]) * rng.standard_normal(len(phases)))
    spread = sigma[None, :, None] * scale[:, None, None]
    shaped = tail(u, float(held["g"]), *tail_weight(held, spread))
    shaped = shaped - shaped.mean(axis=2, keepdims=True)
    log_share = spread * shaped / np.maximum(shaped.std(axis=2, keepdims=True), LEAST_SPREAD)
    share = np.exp(log_share - log_share.max(axis=2, keepdims=True))
    return np.asarray(share / share.sum(axis=2, keepdims=True))


def _mixed(
    phases: Sequence[str], parts: Mapping[str, float], shape: tuple[int, int], rng: np.random.Generator
) -> Floats:
    """Standard normals [workloads, *shape], correlated between workloads by their shared and phase components."""
    shared, phase = float(parts["shared"]), float(parts["phase"])
    common = rng.standard_normal(shape)
    by_phase = {name: rng.standard_normal(shape) for name in sorted(set(phases))}
    alone = rng.standard_normal((len(phases), *shape))
    return np.stack(
        [
            np.sqrt(shared) * common + np.sqrt(phase) * by_phase[name] + np.sqrt(1.0 - shared - phase) * own
            for name, own in zip(phases, alone, strict=True)
        ]
    )


def _sigma_by_layer(held: Mapping[str, Any], layers: int, rng: np.random.Generator) -> Floats:
    """Spread of ln share of each layer [layers]: a curve over relative depth, and what it leaves over."""
    depth = np.arange(layers) / max(layers - 1, 1)
    curve = np.interp(depth, held["depth"], held["log_sigma"])
    return np.asarray(np.exp(curve + float(held["log_sigma_residual_sd"]) * rng.standard_normal(layers)))


def _group_part(held: Mapping[str, Any], phases: Sequence[str], layers: int) -> Floats:
    """Part of the variance that experts of one gating group share: [workloads, layers, 1]."""
    curve = np.interp(np.arange(layers) / max(layers - 1, 1), held["depth"], held["group_part"])
    factors: Mapping[str, float] = held["group_part_of_phase"]
    by_phase = np.asarray([float(factors.get(phase, 1.0)) for phase in phases])
    return np.asarray(np.clip(by_phase[:, None] * curve, 0.0, 1.0)[..., None])


def _skewed(z: Floats, g: float) -> Floats:
    """A lognormal of ln spread g, shifted and scaled to mean 0 and variance 1."""
    if abs(g) < LEAST_SPREAD:
        return z
    return np.asarray((np.exp(g * z) - np.exp(g * g / 2.0)) / np.sqrt(np.expm1(g * g) * np.exp(g * g)))


def tail_weight(held: Mapping[str, Any], spread: Floats) -> tuple[Floats, Floats]:
    """h of the lower tail and of the upper, for a spread of ln share [...]."""
    slope = float(held["h_slope"]) * (np.log(spread) - float(held["h_at_log_sigma"]))
    lower, upper = (np.clip(float(held[name]) + slope, LEAST_TAIL, MOST_TAIL) for name in ("h_lower", "h_upper"))
    return np.asarray(lower), np.asarray(upper)


def tail(z: Floats, g: float, lower: Floats, upper: Floats) -> Floats:
    """Tukey's g-and-h of standard normals, with an h for each side; shapes broadcast.

    (e^(g z) - 1) / g * e^(h z^2 / 2): Hoaglin, in Exploring Data Tables, Trends and Shapes (1985), chapter 11.
    """
    h = np.where(z < 0.0, lower, upper)
    bent = np.expm1(g * z) / g if abs(g) > LEAST_SPREAD else z
    return np.asarray(bent * np.exp(h * z * z / 2.0))
