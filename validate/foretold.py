"""Predictions as a file that is there before what it foretells is run."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moesim.files import write_text


def now() -> str:
    """This moment, as files tell it."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def code() -> str | None:
    """The commit of the checkout that this runs from, `+` behind it where files differ; None where there is none."""
    here = Path(__file__).resolve().parents[1]
    if not (here / ".git").exists():
        return None
    try:
        commit, changed = (
            subprocess.run(["git", "-C", str(here), *asked], capture_output=True, text=True, check=True).stdout.strip()
            for asked in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed else "")


def write_predictions(path: Path, content: Mapping[str, Any]) -> dict[str, str]:
    """Write the predictions whole and synced; the file's name, time and hash, for the record.

    `sha256` is of the text written, so that anyone can see that the record speaks of this very file.
    """
    written = now()
    text = json.dumps({"schema_version": 1, "written": written, **content}, indent=1, allow_nan=False) + "\n"
    write_text(path, text)
    return {"file": path.name, "written": written, "sha256": hashlib.sha256(text.encode()).hexdigest()}
