"""Parquet files of counts or of picked experts, read in a process of their own.

Polars' reader aborts the process on some corrupt files (a flipped byte can ask for exabytes), which no `except`
catches; so the file is decoded in a child (`python -m moesim.routing.parquet IN OUT`), and what comes back is plain.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from moesim.errors import BadInput
from moesim.routing.tensors import check_cells

if TYPE_CHECKING:
    import polars as pl

FORMATS = (
    "a .parquet with layer_id, expert_id, count and optionally step; or, of tokens, layer_id and experts (a list of "
    "expert ids for each token) or expert_id (a row for each pick), and optionally step; request_id and domain tell "
    "whose tokens they are, token_id which of a step's tokens"
)
MEND = f"give {FORMATS}"
KEYS = ("step", "layer_id", "expert_id", "request_id", "domain")
# A file of the largest permitted size decodes in seconds.
TIMEOUT_S = 300.0


def read_parquet(path: Path) -> pl.DataFrame:
    """The file as columns layer_id, expert_id, count and, where it has it, step; picks are counted. Raises BadInput."""
    return _in_child(path)


def read_token_rows(path: Path) -> pl.DataFrame | None:
    """A row for each token and layer: layer_id, experts (a list) and, where the file has them, the keys of a token.

    None where the file does not tell which experts one token picked. Raises BadInput.
    """
    frame = _in_child(path, "tokens")
    return frame if "experts" in frame.columns else None


def _in_child(path: Path, *what: str) -> pl.DataFrame:
    import polars as pl

    with tempfile.TemporaryDirectory(prefix="moesim-") as folder:
        out = Path(folder) / "plain.arrow"
        command = [sys.executable, "-m", "moesim.routing.parquet", str(path), str(out), *what]
        try:
            done = subprocess.run(command, capture_output=True, timeout=TIMEOUT_S, check=False, text=True)
        except subprocess.TimeoutExpired:
            raise BadInput("reading it takes too long", where=str(path), mend=MEND) from None
        if done.returncode == 0 and out.is_file():
            return pl.read_ipc(io.BytesIO(out.read_bytes()))
        try:
            fault = json.loads(done.stdout)
        except ValueError:
            raise BadInput("not a readable .parquet file", where=str(path), mend=MEND) from None
    raise BadInput(str(fault["what"]), where=str(path), mend=MEND)


def decode(path: Path) -> pl.DataFrame:
    """What `read_parquet` returns, decoded in this process: a corrupt file may abort it."""
    import polars as pl

    check_cells((pl.scan_parquet(path).select(pl.len()).collect().item(),), where=str(path))
    frame = pl.read_parquet(path)
    if "layer_id" not in frame.columns or not {"experts", "expert_id"} & set(frame.columns):
        raise BadInput(f"the columns are {', '.join(frame.columns)[:80]}", where=str(path), mend=MEND)
    keys = [name for name in KEYS if name in frame.columns]
    if "count" in frame.columns:
        return frame.select(*keys, "count")
    if "experts" in frame.columns:
        if not isinstance(frame.schema["experts"], pl.List | pl.Array):
            raise BadInput("the column experts is no list", where=str(path), mend=MEND)
        keys = [name for name in keys if name != "expert_id"]
        picks = frame.select(pl.col("experts").list.len().sum()).item() if frame.height else 0
        check_cells((int(picks),), where=str(path))
        frame = frame.select(*keys, pl.col("experts").alias("expert_id")).explode("expert_id")
        keys.append("expert_id")
    return frame.group_by(keys, maintain_order=True).agg(pl.len().cast(pl.Float64).alias("count"))


def decode_tokens(path: Path) -> pl.DataFrame:
    """What `read_token_rows` returns, without the column experts where there is none; as `decode`."""
    import polars as pl

    frame = pl.read_parquet(path)
    keys = [name for name in ("step", "request_id", "token_id", "layer_id") if name in frame.columns]
    if "count" in frame.columns or "layer_id" not in keys:
        return frame.select(keys)
    if "experts" in frame.columns:
        check_cells((int(frame.select(pl.col("experts").list.len().sum()).item() or 0),), where=str(path))
        return frame.select(*keys, pl.col("experts").cast(pl.List(pl.Int16)))
    if "token_id" not in keys or "expert_id" not in frame.columns:
        return frame.select(keys)
    picks = frame.select(*keys, pl.col("expert_id").cast(pl.Int16))
    return picks.group_by(keys, maintain_order=True).agg(pl.col("expert_id").alias("experts"))


def main(arguments: list[str]) -> int:
    """Decode argv[1] into the Arrow file argv[2], tokens with argv[3]; a fault goes to stdout as JSON, exit code 2."""
    from polars.exceptions import PanicException, PolarsError

    try:
        read = decode if len(arguments) == 2 else decode_tokens
        read(Path(arguments[0])).write_ipc(arguments[1])
    except BadInput as error:
        print(json.dumps({"what": error.what}))
        return error.exit_code
    except (PolarsError, PanicException, OSError, ValueError, OverflowError, TypeError, MemoryError) as error:
        print(json.dumps({"what": f"not a readable .parquet file ({' '.join(str(error).split())[:100]})"}))
        return BadInput.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
