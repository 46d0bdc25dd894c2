"""What commands of validation share: names of backends, and how they end: a record for a person or a program."""

from __future__ import annotations

import json
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Any

import typer


class BackendName(StrEnum):
    """Backends of torch.distributed."""

    gloo = "gloo"
    nccl = "nccl"


def show(
    record: dict[str, Any], table: Callable[[dict[str, Any]], str], file: Path, *, as_json: bool, holds: bool
) -> None:
    """Print the record as one JSON object, or its table and where it is; ends with exit code 1 unless it holds."""
    if as_json:
        typer.echo(json.dumps(record, allow_nan=False))
    else:
        typer.echo(table(record))
        typer.echo(f"\nrecord: {file}")
    if not holds:
        raise typer.Exit(1)
