"""Reading a placement map in moesim's own format; any fault of the file is one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import BadInput, Infeasible
from moesim.files import read_text
from moesim.spec.plan import FORMAT, ExpertPlacement

MAX_BYTES = 512 * 1024**2
"""Far above any real map (61 layers x 4,096 slots are 2 MB of JSON)."""

MAX_COUNT = 1_000_000
"""Experts, ranks or layers beyond this are a fault of the file; it bounds what a corrupt file can make us allocate."""

KEYS = ("format", "schema_version", "experts", "ranks", "absolute_layers", "layer_ids", "physical_to_logical")


def read_json(path: Path, *, what: str) -> Any:
    """Read a JSON file; raises BadInput that names the file and what is wrong with it."""
    path = Path(path)
    try:
        size = path.stat().st_size
    except (OSError, ValueError):
        size = 0
    if size > MAX_BYTES:
        raise BadInput(f"the {what} has {size} bytes", where=str(path), mend="give a map, not a trace")
    text = read_text(path, what=what)
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = str(error).split("\n", maxsplit=1)[0][:80]
        raise BadInput(f"the {what} is not valid JSON ({reason})", where=str(path), mend="write it again") from None


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def integer(value: Any, *, where: str, key: str, low: int = 0, high: int = MAX_COUNT) -> int:
    """A whole number between low and high, else BadInput."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise BadInput(f"{key} is {_short(value)}", where=where, mend=f"give a whole number between {low} and {high}")
    return value


def integer_rows(value: Any, *, where: str, key: str) -> NDArray[np.int64]:
    """Rows of whole numbers, all of one length: int64 [rows, columns], else BadInput that names the row."""
    if not isinstance(value, list) or not value or not all(isinstance(row, list) for row in value):
        raise BadInput(f"{key} is {_short(value)}", where=where, mend="give a list of rows, one for each layer")
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
                    f"row {index} of {key} holds {_short(entry)}", where=where, mend="give expert ids from 0 on"
                )
    return np.asarray(value, dtype=np.int64)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def read_placement(path: Path) -> ExpertPlacement:
    """Read a map that `ExpertPlacement.write` wrote.

    Raises BadInput (with the file, the key and the mend) for any other content, Infeasible where the slots do not
    divide by the ranks.
    """
    path = Path(path)
    data = read_json(path, what="placement map")
    where = str(path)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise BadInput(
            f"not a map in moesim's format (no `format: {FORMAT}`)",
            where=where,
            mend="give a file that `moesim place --out` wrote",
        )
    missing = [key for key in KEYS if key not in data]
    if missing:
        raise BadInput(f"the key {missing[0]} is missing", where=where, mend="write the map again")
    unknown = sorted(set(data) - {*KEYS, "solver", "notes"})
    if unknown:
        raise BadInput(f"unknown key {_short(unknown[0])}", where=where, mend="remove it")
    if data["schema_version"] != 1:
        raise BadInput(
            f"schema_version is {_short(data['schema_version'])}", where=where, mend="this moesim reads version 1"
        )
    experts = integer(data["experts"], where=where, key="experts", low=1)
    ranks = integer(data["ranks"], where=where, key="ranks", low=1)
    layers = integer(data["absolute_layers"], where=where, key="absolute_layers", low=1)
    table = integer_rows(data["physical_to_logical"], where=where, key="physical_to_logical")
    ids = data["layer_ids"]
    if not isinstance(ids, list) or len(ids) != len(table):
        raise BadInput("layer_ids do not match the rows of the map", where=where, mend="give one id for each row")
    layer_ids = np.asarray(
        [integer(value, where=where, key="a layer id", high=layers - 1) for value in ids], dtype=np.int64
    )
    if (np.diff(layer_ids) <= 0).any():
        raise BadInput("layer_ids do not ascend", where=where, mend="give each layer once, in order")
    solver, notes = data.get("solver", "file"), data.get("notes", {})
    if not isinstance(solver, str) or not isinstance(notes, dict):
        raise BadInput("solver is no text or notes are no mapping", where=where, mend="remove both keys")
    # Every expert needs a slot, so this holds for every legal map; checked before anything of that size is allocated.
    if experts > table.shape[1]:
        raise BadInput(
            f"{table.shape[1]} slots cannot hold {experts} experts", where=where, mend="correct experts or the map"
        )
    try:
        return ExpertPlacement(
            physical_to_logical=table,
            layer_ids=layer_ids,
            experts=experts,
            ranks=ranks,
            absolute_layers=layers,
            solver=solver,
            notes=notes,
        )
    except BadInput as error:
        raise BadInput(error.what, where=where, mend=error.mend) from None
    except Infeasible as error:
        raise Infeasible(error.what, where=where, mend=error.mend, reason=error.reason) from None
