"""What a check found: one line for a person, one object for a script."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "absent", "warn", "fault"]
_MARKS: dict[State, str] = {"ok": "ok     ", "absent": "absent ", "warn": "warn   ", "fault": "FAULT  "}


@dataclass(frozen=True)
class Finding:
    """One line of the report. `absent`: optional and not there; `warn`: works, but costs something or may surprise.

    Only `fault` fails the check.
    """

    check: str
    state: State
    detail: str
    mend: str = ""

    def line(self) -> str:
        """The finding as a person reads it."""
        return f"{_MARKS[self.state]} {self.check}: {self.detail}" + (f"; {self.mend}" if self.mend else "")
