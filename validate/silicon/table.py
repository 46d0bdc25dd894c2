"""The generated part of docs/accuracy.md, between two comments: the score of the predictions on record."""

from __future__ import annotations

from pathlib import Path

from validate.pages import ACCURACY, GeneratedPart
from validate.silicon.record import MAKE

PART = GeneratedPart("moesim validate silicon --update", MAKE)
BEGIN, END = PART.begin, PART.end
DOCS = ACCURACY


def put(path: Path, content: str) -> None:
    """Put the generated part into a page, all else as it was. Raises BadInput."""
    PART.put(path, content)


def check(path: Path, content: str) -> None:
    """Raises CheckFailed where a page says something else than `content`, BadInput where it has no such part."""
    PART.check(path, content)
