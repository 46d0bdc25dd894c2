"""What is told of a set of predictions: figures for machines, and the Markdown of docs/accuracy.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from validate.silicon import Prediction, score, score_table


def summary(found: Sequence[Prediction]) -> tuple[dict[str, Any], str]:
    """The score of predictions of measured rows, and the same as Markdown."""
    scored = score(found)
    return {"score": scored}, score_table(scored)
