"""SGLang's expert location file, as `--init-expert-location FILE.json` reads it.

Rules from sgl-project/sglang, python/sglang/srt/eplb/expert_location.py: the loader hands every key of the file to
`init_by_mapping`, so any key but `physical_to_logical_map` is an error; a row for every hidden layer, dense ones
included, as the map is indexed by absolute layer; the slots must divide by the EP size, those of a rank are
contiguous; every row must hold every expert (static dispatch picks among an expert's slots, and fails on none).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import BadInput
from moesim.spec.maps.frame import MapFrame
from moesim.spec.maps.values import by_ranks, every_expert, integer_rows, short
from moesim.spec.plan import ExpertPlacement

ENGINE = "SGLang"
KEY = "physical_to_logical_map"


def check(data: Any, *, experts: int, ranks: int, layers: int, where: str) -> NDArray[np.int64]:
    """The map as [absolute layers, slots]; raises BadInput where SGLang would refuse it, or load it and fail later."""
    if not isinstance(data, dict) or KEY not in data:
        raise BadInput(f"the key {KEY} is missing", where=where, mend="give an expert location file of SGLang")
    others = sorted(str(key) for key in data if key != KEY)
    if others:
        raise BadInput(f"SGLang takes no key {short(others[0])} here", where=where, mend=f"leave only {KEY}")
    table = integer_rows(data[KEY], where=where, key=KEY)
    if len(table) != layers:
        raise BadInput(
            f"{len(table)} rows for {layers} layers", where=where, mend="give one row for each absolute layer"
        )
    by_ranks(table.shape[1], ranks, where=where)
    every_expert(table, experts, list(range(layers)), where=where)
    return table


def placement_of(data: Any, frame: MapFrame, *, where: str) -> ExpertPlacement:
    """The placement that a file's content says; the rows of dense layers are checked and left out. Raises BadInput."""
    ranks = frame.known_ranks(ENGINE, where)
    table = check(data, experts=frame.experts, ranks=ranks, layers=frame.absolute_layers, where=where)
    ids = np.asarray(frame.layer_ids, dtype=np.int64)
    return ExpertPlacement(
        physical_to_logical=np.ascontiguousarray(table[ids]),
        layer_ids=ids,
        experts=frame.experts,
        ranks=ranks,
        absolute_layers=frame.absolute_layers,
        solver="sglang file",
    )
