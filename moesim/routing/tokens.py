"""Which experts each token picked, from the files that tell: Parquet of tokens, and SGLang's per_token dumps.

SGLang: `_DetailSinglePassGatherer` in python/sglang/srt/eplb/expert_distribution.py (sgl-project/sglang) records
`topk_ids_of_layer` [absolute layers, tokens, 8], ids of physical slots, -1 where a layer routes nothing or picks fewer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import BadInput
from moesim.routing.parquet import read_token_rows
from moesim.routing.picks import NONE, TokenPicks
from moesim.routing.recorder import COUNTS, MAP, PICKS, load_dump
from moesim.routing.tensors import tensor_to_numpy
from moesim.routing.trace import RoutingCounts

Ints = NDArray[np.int64]


def read_tokens(path: Path, loads: RoutingCounts) -> TokenPicks | None:
    """The picks of each token of a file that was read as `loads`; None where the file tells counts only.

    Its layers and steps are those of `loads`. Tokens can be followed from layer to layer in SGLang's dumps, and in a
    Parquet file with a token_id. Raises BadInput for ids that do not fit the counts.
    """
    path = Path(path)
    if path.suffix == ".parquet":
        frame = read_token_rows(path)
        return None if frame is None else _of_rows(frame, loads, str(path))
    if path.is_dir() and not (path / "meta_info.json").is_file():
        return _of_dumps(sorted(path.glob("*.pt")), loads)
    if path.suffix == ".pt":
        return _of_dumps([path], loads)
    return None


def _of_rows(frame: Any, loads: RoutingCounts, where: str) -> TokenPicks:
    """Tokens of a table with a row for each token and layer, as `read_token_rows` gives it."""
    import polars as pl

    for name in ("token_id", "request_id", "experts"):
        if name in frame.columns and frame[name].null_count():
            raise BadInput(f"a row has no {name}", where=where, mend="give every row one")

    def labels(name: str) -> Ints:
        if name not in frame.columns:
            return np.zeros(frame.height, dtype=np.int64)
        values = frame[name].cast(pl.Int64) if name == "step" else frame[name]
        return np.asarray(values.rank("dense").to_numpy(), dtype=np.int64) - 1

    layer = frame["layer_id"].cast(pl.Int64).to_numpy()
    row = np.minimum(np.searchsorted(loads.layer_ids, layer), len(loads.layer_ids) - 1)
    if (loads.layer_ids[row] != layer).any():
        raise BadInput("a token is of a layer without counts", where=where, mend="give one trace of one model")
    step, request = labels("step"), labels("request_id")
    follows = "token_id" in frame.columns
    number = labels("token_id") if follows else _number_within(step * len(loads.layer_ids) + row)
    keys = np.stack([step, request, number] if follows else [step, number], axis=1)
    tokens, token = np.unique(keys, axis=0, return_inverse=True)
    token = token.ravel()
    if follows and len(np.unique(token * len(loads.layer_ids) + row)) != len(token):
        raise BadInput("a token_id stands twice in one layer of a step", where=where, mend="number tokens by step")
    length = frame["experts"].list.len().to_numpy().astype(np.int64)
    expert = frame["experts"].explode().to_numpy()
    ids = np.full((len(tokens), len(loads.layer_ids), int(length.max())), NONE, dtype=np.int16)
    place = np.arange(len(expert)) - np.repeat(np.cumsum(length) - length, length)
    ids[np.repeat(token, length), np.repeat(row, length), place] = expert
    known = follows and "request_id" in frame.columns
    return TokenPicks(ids, tokens[:, 0].copy(), follows, request=tokens[:, 1].copy() if known else None)


def _number_within(group: Ints) -> Ints:
    """The number of each row among those of its group, in the order of the rows: [rows]."""
    order = np.argsort(group, kind="stable")
    ordered = group[order]
    first = np.concatenate([[True], ordered[1:] != ordered[:-1]])
    at = np.arange(len(group))
    out = np.empty(len(group), dtype=np.int64)
    out[order] = at - np.maximum.accumulate(np.where(first, at, 0))
    return out


def _of_dumps(paths: list[Path], loads: RoutingCounts) -> TokenPicks | None:
    """Tokens of SGLang's dumps of one run (one of each rank); None where one of them has counts by pass only."""
    parts: list[tuple[int, NDArray[Any]]] = []
    live: set[int] = set()
    for path in paths:
        data = load_dump(path)
        if "records" not in data:
            return None
        table = tensor_to_numpy(data[MAP], where=str(path)).astype(np.int64)
        for index, record in enumerate(data["records"]):
            where = f"{path}: records[{index}]"
            if PICKS not in record:
                return None
            number = int(record["forward_pass_id"])
            slots = tensor_to_numpy(record[PICKS], where=where)
            # The first releases wrote no counts beside the picks.
            told = tensor_to_numpy(record[COUNTS], where=where) if COUNTS in record else slots >= 0
            if told.any():
                live.add(number)
            if slots.ndim != 3 or len(slots) != len(table) or slots.dtype.kind not in "iu":
                raise BadInput(f"topk_ids_of_layer has shape {slots.shape}", where=where, mend="give the whole dump")
            slots = slots[loads.layer_ids].astype(np.int64)
            inside = (slots >= 0) & (slots < table.shape[1])  # beyond them: shared experts fused into the pick
            maps = table[loads.layer_ids][:, None, :]
            expert = np.take_along_axis(maps, np.where(inside, slots, 0).reshape(len(slots), 1, -1), axis=2)
            parts.append((number, np.where(inside, expert.reshape(slots.shape), NONE).transpose(1, 0, 2)))
    place = {number: step for step, number in enumerate(sorted(live))}  # a pass's number may be of any size
    parts = [(number, picks) for number, picks in parts if number in live and len(picks)]
    if not parts or len(place) != len(loads.counts):
        return None
    ids = np.concatenate([picks for _, picks in parts])
    ids = ids[:, :, : max(1, int(np.nonzero((ids >= 0).any(axis=(0, 1)))[0].max(initial=0)) + 1)]
    step = np.repeat([place[number] for number, _ in parts], [len(picks) for _, picks in parts]).astype(np.int64)
    return TokenPicks(np.ascontiguousarray(ids, dtype=np.int16), step, follows=True)
