"""How many tokens of one source an expert takes: the formula of each framework, in whole tokens.

T: tokens of the source (a rank, or GShard's group S); E: experts; k: experts of a token; f: the capacity factor, taken
as the decimal that was written (engines multiply floats, which can differ by one where the product is a whole number).

| rule | capacity | source |
| gshard | min(T, int(T f / E)), without k | arXiv:2006.16668 and the code that descends from it |
| switch | int(T f / E) | arXiv:2101.03961, section 2.2, "expert capacity" |
| deepspeed | max(ceil(k T f / E), min_capacity) | deepspeed/moe/sharded_moe.py, `_capacity` |
| megatron | ceil(k T f / E) | megatron/core/transformer/moe/moe_utils.py, `get_capacity` |
| survey | min(int(T f / E), max_capacity) | surveys of MoE, e.g. arXiv:2407.06204 |
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.errors import BadInput

Ints = NDArray[np.int64]
# Digits after the point that a factor may have: products of tokens, top_k and the factor then fit 64 bits.
DIGITS = 6
MIN_CAPACITY = 4  # DeepSpeed's default min_capacity (deepspeed/moe/layer.py)
NO_LIMIT = np.iinfo(np.int64).max


def gshard(tokens: Ints, experts: int, top_k: int, factor: Fraction, least: int, most: int) -> Ints:
    """min(T, int(T f / E))."""
    return np.minimum(tokens, _floor(tokens, factor, experts))


def switch(tokens: Ints, experts: int, top_k: int, factor: Fraction, least: int, most: int) -> Ints:
    """int(T f / E)."""
    return _floor(tokens, factor, experts)


def deepspeed(tokens: Ints, experts: int, top_k: int, factor: Fraction, least: int, most: int) -> Ints:
    """max(ceil(k T f / E), least)."""
    return np.maximum(-_floor(-tokens * top_k, factor, experts), least)


def megatron(tokens: Ints, experts: int, top_k: int, factor: Fraction, least: int, most: int) -> Ints:
    """ceil(k T f / E)."""
    return -_floor(-tokens * top_k, factor, experts)


def survey(tokens: Ints, experts: int, top_k: int, factor: Fraction, least: int, most: int) -> Ints:
    """min(int(T f / E), most)."""
    return np.minimum(_floor(tokens, factor, experts), most)


Formula = Callable[[Ints, int, int, Fraction, int, int], Ints]
FORMULAS: dict[str, Formula] = {
    "gshard": gshard,
    "switch": switch,
    "deepspeed": deepspeed,
    "megatron": megatron,
    "survey": survey,
}


def capacity(
    rule: str,
    tokens: ArrayLike,
    *,
    experts: int,
    top_k: int,
    factor: float,
    min_capacity: int = MIN_CAPACITY,
    max_capacity: int = NO_LIMIT,
) -> Ints:
    """Tokens of one source that one expert takes, int64 in the shape of `tokens` (of that source, at least 0).

    Raises BadInput on an unknown rule or a factor with more than DIGITS decimals.
    """
    if rule not in FORMULAS:
        raise BadInput(f"unknown capacity rule {rule!r}", where="capacity.rule", mend=f"use {', '.join(FORMULAS)}")
    return FORMULAS[rule](
        np.asarray(tokens, dtype=np.int64), experts, top_k, decimal(factor), min_capacity, max_capacity
    )


def decimal(factor: float) -> Fraction:
    """The factor as the decimal that was written. Raises BadInput where it is not positive or has too many digits."""
    exact = Fraction(repr(float(factor))) if np.isfinite(factor) else Fraction(0)
    if exact <= 0 or exact > 10**6 or (exact * 10**DIGITS).denominator != 1:
        raise BadInput(
            f"a capacity factor of {factor!r}",
            where="policies.capacity.factor",
            mend=f"give a positive number up to 1,000,000 with at most {DIGITS} decimals",
        )
    return exact


def _floor(tokens: Ints, factor: Fraction, experts: int) -> Ints:
    return np.asarray(tokens * factor.numerator // (factor.denominator * experts), dtype=np.int64)
