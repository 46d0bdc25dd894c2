"""Reading a placement map in any format that moesim writes; any fault of the file is one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from moesim.errors import BadInput, Infeasible
from moesim.spec.maps import sglang, trtllm, vllm_ascend
from moesim.spec.maps.frame import MapFrame
from moesim.spec.maps.values import integer, integer_rows, read_json, read_map_text, short
from moesim.spec.plan import FORMAT, ExpertPlacement

KEYS = ("format", "schema_version", "experts", "ranks", "absolute_layers", "layer_ids", "physical_to_logical")
FORMATS = "a map of moesim, SGLang or vllm-ascend (.json) or of TensorRT-LLM (.yaml)"
YAML_SUFFIXES = (".yaml", ".yml")
Reader = Callable[..., ExpertPlacement]


def read_placement(path: Path, frame: MapFrame | None = None) -> ExpertPlacement:
    """Read a map of moesim, SGLang, TensorRT-LLM or vllm-ascend; the content says which it is.

    frame: the model and the ranks that the map is for. An engine's map leaves out some of it, so it is needed for one;
    moesim's own says all itself and is not held to the frame. Raises BadInput (the file, the key and the mend) for any
    other content.
    """
    path = Path(path)
    if _is_yaml(path):
        data: Any = trtllm.read_yaml(path)
        if not isinstance(data, dict) or not set(data) & set(trtllm.KEYS):
            raise BadInput("not a load balancer file of TensorRT-LLM", where=str(path), mend=f"give {FORMATS}")
    else:
        data = read_json(path, what="placement map")
    where = str(path)
    try:
        engine = _engine(data)
        if engine is None:
            return _own(data, where)
        name, placement_of = engine
        if frame is None:
            raise BadInput(
                f"a map of {name} does not name its model"
                + ("" if name == vllm_ascend.ENGINE else " or say over how many ranks its slots lie"),
                where=where,
                mend="give moesim's own map here, a scenario with `placement: {file: ...}`, or "
                + ("--model" if name == vllm_ascend.ENGINE else "--model and --gpus"),
            )
        return placement_of(data, frame, where=where)
    except Infeasible as error:
        raise BadInput(error.what, where=where, mend=error.mend) from None
    except BadInput as error:
        raise BadInput(error.what, where=error.where or where, mend=error.mend) from None


def _is_yaml(path: Path) -> bool:
    """By the suffix; a name without one of ours is YAML where it does not start as a JSON mapping does."""
    if path.suffix in (*YAML_SUFFIXES, ".json"):
        return path.suffix != ".json"
    return not read_map_text(path, what="placement map").lstrip().startswith("{")


def _engine(data: Any) -> tuple[str, Reader] | None:
    """The engine whose keys the content holds, and its reader; None for moesim's own format."""
    if not isinstance(data, dict) or "format" in data:
        return None
    if sglang.KEY in data:
        return sglang.ENGINE, sglang.placement_of
    if vllm_ascend.LAYERS in data or "moe_layer_count" in data:
        return vllm_ascend.ENGINE, vllm_ascend.placement_of
    if set(data) & set(trtllm.KEYS):
        return trtllm.ENGINE, trtllm.placement_of
    return None


def _own(data: Any, where: str) -> ExpertPlacement:
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise BadInput(
            f"not a map in moesim's format (no `format: {FORMAT}`), nor one of an engine",
            where=where,
            mend=f"give {FORMATS}",
        )
    missing = [key for key in KEYS if key not in data]
    if missing:
        raise BadInput(f"the key {missing[0]} is missing", where=where, mend="write the map again")
    unknown = sorted(set(data) - {*KEYS, "solver", "notes"})
    if unknown:
        raise BadInput(f"unknown key {short(unknown[0])}", where=where, mend="remove it")
    if type(data["schema_version"]) is not int or data["schema_version"] != 1:
        raise BadInput(
            f"schema_version is {short(data['schema_version'])}", where=where, mend="this moesim reads version 1"
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
    return ExpertPlacement(
        physical_to_logical=table,
        layer_ids=layer_ids,
        experts=experts,
        ranks=ranks,
        absolute_layers=layers,
        solver=solver,
        notes=notes,
    )
