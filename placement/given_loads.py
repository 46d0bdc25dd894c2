"""Loads whose model nobody names: reading them alike, and saying what the files cannot tell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from moesim.errors import BadInput
from moesim.routing.readers import read_loads
from moesim.routing.trace import RoutingCounts

# Files that list experts: one that got nothing may be left out, and then nobody sees that it is there.
LISTS = (".csv", ".parquet")
# Counts of published models are powers of two or multiples of 8, but for Qwen1.5-MoE-A2.7B's 60 (its config.json).
MULTIPLE, OTHERS = 8, (1, 2, 4, 60)
SHOWN = 4


def read_given(files: Sequence[Path], experts: int | None) -> list[RoutingCounts]:
    """The loads of `files`; those that list experts are as wide as the widest file, or as `experts`.

    Raises BadInput for whatever is wrong with a file, and where a matrix has other experts than were asked for.
    """
    if experts is not None and experts < 1:
        raise BadInput(f"{experts} experts", where="--experts", mend="give the number of the model's experts")
    loads = [read_loads(path, experts=experts, tokens=True) for path in files]
    for path, load in zip(files, loads, strict=True):
        if experts is not None and load.experts != experts:
            raise BadInput(
                f"the counts are of {load.experts} experts, --experts says {experts}",
                where=str(path),
                mend="correct --experts, or leave it out",
            )
    widest = max(load.experts for load in loads)
    return [
        read_loads(path, experts=widest, tokens=True) if path.suffix in LISTS and load.experts < widest else load
        for path, load in zip(files, loads, strict=True)
    ]


def doubts(files: Sequence[Path], loads: Sequence[RoutingCounts], experts: int | None) -> list[str]:
    """What may be missing in these loads, one line each: experts that no list names, layers that count nothing."""
    found = []
    count = loads[0].experts
    if experts is None and all(path.suffix in LISTS for path in files) and _unusual(count):
        likely = -(-count // MULTIPLE) * MULTIPLE
        found.append(
            f"{files[0]}: its highest expert is {count - 1}, and {count} is an unusual number of experts; if the last "
            f"ones got no token, give --experts {likely}: an engine loads a map of all its experts only"
        )
    for path, load in zip(files, loads, strict=True):
        lacking = silent_layers(load)
        if lacking:
            names = [str(layer) for layer in lacking[:SHOWN]]
            more = " and others" if len(lacking) > SHOWN else ""
            told = " and ".join(names) if len(lacking) <= 2 else ", ".join(names) + more
            found.append(
                f"{path}: no token in layer{'s' * (len(lacking) > 1)} {told}, though layers beside have some: left out "
                "as dense; if experts are there, record a server that is loaded"
            )
    return found


def silent_layers(load: RoutingCounts) -> list[int]:
    """Layers without a count where the usual distance between layers with some says that there is one."""
    ids = load.layer_ids.tolist()
    if len(ids) < 2:
        return []
    apart = Counter(later - earlier for earlier, later in pairwise(ids))
    usual = min(apart, key=lambda distance: (-apart[distance], distance))
    counted = set(ids)
    return [layer for layer in range(ids[0], load.absolute_layers, usual) if layer not in counted]


def _unusual(experts: int) -> bool:
    return experts % MULTIPLE != 0 and experts not in OTHERS
