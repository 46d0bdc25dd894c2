"""The command `report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    run_dir: Annotated[Path, typer.Argument(help="Folder of a run, as `moesim tune` wrote it.")],
) -> None:
    """Write the report page of a run again, from the run's own files."""
    from moesim.output.report import REPORT, write_run_report

    write_run_report(run_dir)
    typer.echo(f"Wrote {run_dir / REPORT}.")
