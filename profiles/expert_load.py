"""Model seconds of the experts that a row of a collector's MoE table ran: the axis that its curves are straight over.

What is fixed about a row is in its keys, and its tokens are drawn by a published law. Only how the model grows from one
size to the next matters, not its scale.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from moesim.units import BYTES_PER_ELEMENT
from profiles.importers.aiconfigurator_tables import DTYPES
from profiles.raw_tables import Points

Floats = NDArray[np.float64]

# Rates that place the kinks of an expert curve, from the datasheets: HBM in bytes/s and dense bf16 in FLOP/s (NVIDIA
# H100, H200, B200, B300, A100, L40S, RTX Pro 6000 Blackwell); only their ratio matters here.
DATASHEET = {
    "h100": (3.35e12, 989e12),
    "h200": (4.8e12, 989e12),
    "b200": (8e12, 2250e12),
    "gb200": (8e12, 2250e12),
    "b300": (8e12, 2250e12),
    "gb300": (8e12, 2250e12),
    "a100": (2.04e12, 312e12),
    "l40s": (864e9, 362e12),
    "rtx": (1.8e12, 504e12),
}
# What kernels reach of them, and how much faster 8-bit products run than 16-bit ones in practice.
HBM_REACHED, FLOPS_REACHED, BYTE_PRODUCTS = 0.8, 0.6, 1.6


def expert_load(points: Points) -> Floats:
    """Model seconds of each row's experts [points]: the touched experts' weights, the products, the activations.

    Added up: a step is partly bound by one and partly by the other.
    """
    hbm, flops = DATASHEET.get(points.system.split("_")[0], DATASHEET["h200"])
    keys = points.keys
    columns = ("hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size", "moe_ep_size", "distribution")
    rows = zip(points.sizes.tolist(), keys["moe_dtype"].to_list(), *(keys[name].to_list() for name in columns),
               strict=True)  # fmt: skip
    return np.array([_load(hbm * HBM_REACHED, flops * FLOPS_REACHED, *row) for row in rows])


@lru_cache(maxsize=1_000_000)
def _load(
    hbm: float, flops: float, tokens: float, dtype: str, hidden: int, inter: int, top_k: int, experts: int, tp: int,
    ep: int, distribution: str,
) -> float:  # fmt: skip
    touched, pairs = _touched(tokens, top_k, experts, ep, distribution)
    element = BYTES_PER_ELEMENT.get(DTYPES.get(dtype, dtype), 0.5)
    width = inter / tp
    weights = touched * 3.0 * hidden * width * element
    # bf16 rows in and out of both products, and the rows of all tokens read, quantised and written.
    activations = pairs * 2.0 * (4.0 * hidden + 3.0 * width) + tokens * 6.0 * hidden
    products = pairs * 6.0 * hidden * width / (flops * (BYTE_PRODUCTS if element < 2.0 else 1.0))
    return (weights + activations) / hbm + products


# Draws of a skewed distribution; the same for all sizes, so that more tokens never touch fewer experts by chance.
DRAWS = 16


@lru_cache(maxsize=100_000)
def _touched(tokens: float, top_k: int, experts: int, ep: int, distribution: str) -> tuple[float, float]:
    """Touched local experts and (token, expert) pairs of a collector's row.

    Source: ai-dynamo/aiconfigurator collector/helper.py; balanced rows spread whole tokens evenly.
    """
    local = max(experts // ep, 1)
    pairs = tokens * top_k / ep
    words = distribution.split("_")
    if words[0] != "power" or experts % ep:
        return min(pairs, float(local)), pairs
    loads = _mean_loads(int(tokens), top_k, experts, ep, float(words[2]))
    # An expert's tokens are rounded to whole ones, so a mean below one token touches it in about that share of draws,
    # as `grouped` has it; independent tokens, 1 - exp(-mean), would touch a third fewer at one token each.
    return float(np.minimum(loads, 1.0).sum(axis=1).mean()), float(loads.sum(axis=1).mean())


def _mean_loads(tokens: int, top_k: int, experts: int, ep: int, exponent: float) -> Floats:
    """Mean tokens of each local expert of the fullest rank [DRAWS, experts / ep] under the collectors' power law.

    Means, not the collectors' whole numbers: their expected number of touched experts grows smoothly with the tokens.
    Source of the law: `grouped.power_law_histograms`.
    """
    low, high = (1.0, 0.8 * tokens) if tokens * top_k > experts else (0.01, 2.0)
    power = 1.0 - exponent
    u = np.random.default_rng(0).random((DRAWS, experts))
    wanted = ((high**power - low**power) * u + low**power) ** (1.0 / power)
    loads = np.minimum(wanted * tokens * top_k / wanted.sum(axis=1, keepdims=True), tokens)
    by_rank = loads.reshape(DRAWS, ep, experts // ep)
    fullest: Floats = by_rank[np.arange(DRAWS), by_rank.sum(axis=2).argmax(axis=1)]
    return fullest
