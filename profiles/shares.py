"""Who sends which share to whom in an uneven all-to-all: by name, or as real loads fall on the ranks of a placement."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moesim.errors import BadInput
from profiles.sweep import whole
from profiles.traffic import Floats, Ints

KEPT, KEPT_BY_ONE, ONE_WAY = "kept", "kept_by_one", "one_way"
PATTERNS = f"{KEPT}, {KEPT_BY_ONE}, {ONE_WAY} or zipf_1.2 (say)"


def destination_shares(
    ranks: int, *, skew: float | None, loads: Path | None, placement: Path | None, layer: int | None
) -> tuple[tuple[float, ...], str]:
    """Shares [ranks] that sum to 1, and their name; none for an even exchange. Raises BadInput.

    By `skew` as (rank + 1)^-skew, or as `loads` fall on the ranks of `placement` (contiguous without one).
    """
    if loads is None:
        if placement is not None or layer is not None:
            raise BadInput("there are no loads", where="--loads", mend="give the loads that the placement is for")
        if skew is None:
            return (), ""
        name = f"zipf_{skew:g}"
        return tuple(float(value) for value in pattern(name, ranks)[0]), name
    if skew is not None:
        raise BadInput("skew and loads exclude each other", where="--skew", mend="give one of them")
    from moesim.routing.readers import read_loads
    from moesim.spec.maps.frame import MapFrame
    from moesim.spec.placement_file import read_placement

    counts = read_loads(loads)
    ids = [int(one) for one in counts.layer_ids]
    wanted = ids[len(ids) // 2] if layer is None else layer
    if wanted not in ids:
        raise BadInput(f"no layer {wanted}", where="--layer", mend=f"use one of {ids[0]} to {ids[-1]}")
    profile = counts.profile()[ids.index(wanted)]
    if placement is None:
        if len(profile) % ranks:
            raise BadInput(
                f"{len(profile)} experts do not divide by {ranks} ranks", where="--ranks", mend="use a divisor"
            )
        by_rank = profile.reshape(ranks, -1).sum(axis=1)
    else:
        frame = MapFrame(counts.experts, tuple(ids), counts.absolute_layers, ranks)
        held = read_placement(placement, frame)
        if held.ranks != ranks or held.experts != len(profile) or wanted not in held.layer_ids:
            raise BadInput(
                f"a map of {held.experts} experts on {held.ranks} ranks does not fit {len(profile)} experts of layer "
                f"{wanted} on {ranks} ranks",
                where=str(placement),
                mend="give the map of these loads and ranks",
            )
        row = list(held.layer_ids).index(wanted)
        every = np.tile(profile, (held.layers, 1))
        by_rank = held.rank_loads(every)[row]
    shares = by_rank / by_rank.sum()
    name = f"{loads.name}:{placement.name if placement else 'contiguous'}:{wanted}"
    return tuple(float(value) for value in shares), name


def pattern(name: str, ranks: int) -> Floats:
    """Shares of a rank's mean send buffer [source, destination], which sum to the number of ranks.

    kept: nothing leaves its rank. kept_by_one: likewise, and only the first rank has something. one_way: the first half
    of the ranks sends to the second half, evenly; nothing goes back. zipf_S: every rank sends to destination d in
    proportion to (d + 1)^-S. Raises BadInput.
    """
    if name == KEPT:
        return np.eye(ranks)
    shares = np.zeros((ranks, ranks))
    if name == KEPT_BY_ONE:
        shares[0, 0] = 1.0
    elif name == ONE_WAY:
        shares[: ranks // 2, ranks // 2 :] = 1.0
    else:
        try:
            exponent = float(name.removeprefix("zipf_")) if name.startswith("zipf_") else np.nan
        except ValueError:
            exponent = np.nan
        if not 0.0 <= exponent <= 100.0:
            raise BadInput(f"unknown pattern {name!r}", where="--pattern", mend=f"use {PATTERNS}")
        shares = np.tile(np.arange(1, ranks + 1, dtype=np.float64) ** -exponent, (ranks, 1))
    return np.asarray(shares * (ranks / shares.sum()), dtype=np.float64) if shares.any() else np.eye(ranks)


def elements(shares: Floats, each: int) -> Ints:
    """Whole elements from each rank to each [source, destination]; `each`: those of a rank, the mean over ranks."""
    ranks = len(shares)
    return whole(shares.reshape(-1) * each, ranks * each).reshape(ranks, ranks)
