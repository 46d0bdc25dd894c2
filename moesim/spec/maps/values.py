"""JSON of maps and the whole numbers in it, each fault told in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import BadInput
from moesim.files import read_text

MAX_BYTES = 512 * 1024**2
"""Far above any real map (61 layers x 4,096 slots are 2 MB of JSON)."""

MAX_COUNT = 1_000_000
"""Experts, ranks or layers beyond this are a fault of the file; it bounds what a corrupt file can make us allocate."""


def read_map_text(path: Path, *, what: str) -> str:
    """The text of a map file; raises BadInput that names the file, also where it is absurdly large."""
    path = Path(path)
    try:
        size = path.stat().st_size
    except (OSError, ValueError):
        size = 0
    if size > MAX_BYTES:
        raise BadInput(f"the {what} has {size} bytes", where=str(path), mend="give a map, not a trace")
    return read_text(path, what=what)


def read_json(path: Path, *, what: str) -> Any:
    """Read a JSON file; raises BadInput that names the file and what is wrong with it."""
    text = read_map_text(path, what=what)
    try:
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        reason = str(error).split("\n", maxsplit=1)[0][:80]
        raise BadInput(f"the {what} is not valid JSON ({reason})", where=str(path), mend="write it again") from None


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A mapping that names every key once: of two values for one key, nobody knows which was meant."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise ValueError(f"the key {short(twice)} stands twice")
    return found


def integer(value: Any, *, where: str, key: str, low: int = 0, high: int = MAX_COUNT) -> int:
    """A whole number between low and high, else BadInput."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise BadInput(f"{key} is {short(value)}", where=where, mend=f"give a whole number between {low} and {high}")
    return value


def integer_rows(value: Any, *, where: str, key: str) -> NDArray[np.int64]:
    """Rows of whole numbers, all of one length: int64 [rows, columns], else BadInput that names the row."""
    if not isinstance(value, list) or not value or not all(isinstance(row, list) for row in value):
        raise BadInput(f"{key} is {short(value)}", where=where, mend="give a list of rows, one for each layer")
    width = len(value[0])
    for index, row in enumerate(value):
        if len(row) != width or width == 0:
            raise BadInput(
                f"row {index} of {key} has {len(row)} entries, row 0 has {width}",
                where=where,
                mend="give every layer the same number of slots, at least one",
            )
        for entry in row:
            if type(entry) is not int or not 0 <= entry <= MAX_COUNT:
                raise BadInput(
                    f"row {index} of {key} holds {short(entry)}", where=where, mend="give expert ids from 0 on"
                )
    return np.asarray(value, dtype=np.int64)


def every_expert(table: NDArray[np.int64], experts: int, layers: list[int], *, where: str) -> None:
    """Whether every row [layers, slots] holds every expert and no other id. Raises BadInput that names the layer."""
    if table.max() >= experts:
        row = int(np.nonzero((table >= experts).any(axis=1))[0][0])
        raise BadInput(
            f"layer {layers[row]} holds expert {table[row].max()}, there are {experts}",
            where=where,
            mend=f"ids lie between 0 and {experts - 1}",
        )
    if table.shape[1] < experts:
        raise BadInput(f"{table.shape[1]} slots cannot hold {experts} experts", where=where, mend="give a map of them")
    for layer, row_ids in zip(layers, table, strict=True):
        lacking = np.nonzero(np.bincount(row_ids, minlength=experts) == 0)[0]
        if len(lacking):
            raise BadInput(
                f"layer {layer} has no slot for expert {lacking[0]}", where=where, mend="give every expert a slot"
            )


def by_ranks(slots: int, ranks: int, *, where: str) -> None:
    """Whether the slots of a layer divide by the ranks. Raises BadInput."""
    if slots % ranks:
        raise BadInput(
            f"{slots} slots do not divide by {ranks} ranks", where=where, mend="give a map for that many ranks"
        )


def short(value: Any) -> str:
    """A value as an error shows it."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
