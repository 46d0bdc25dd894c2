"""Text that other programs printed: numbered lines, strict numbers, and how far a printed figure is rounded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from moesim.errors import BadInput

# What printf's %d, %f, %g and %e print of a figure that is neither negative nor NaN nor infinite.
_NUMBER = re.compile(r"\d+(?:\.\d*)?(?:e[+-]?\d+)?", re.ASCII)
_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
SMALLEST, LARGEST = 1e-9, 1e15  # bytes, microseconds and rates beyond are no measurement


def read_printed(path: Path, what: str) -> str:
    """The text of a file, bytes that are no UTF-8 replaced (no figure holds one). Raises BadInput."""
    try:
        return Path(path).read_bytes().decode("utf-8", errors="replace")
    except OSError as error:
        raise BadInput(
            f"cannot read the {what} ({error.strerror})", where=str(path), mend="give a path to a readable file"
        ) from None


def numbered(text: str) -> Iterator[tuple[int, str]]:
    """Lines from 1, as an editor counts them, without colour codes and line ends."""
    for number, line in enumerate(text.split("\n"), start=1):
        yield number, _ESCAPE.sub("", line).rstrip("\r")


def number(text: str) -> float | None:
    """The figure, or None where the text is neither 0 nor a finite figure from SMALLEST to LARGEST."""
    if not _NUMBER.fullmatch(text):
        return None
    value = float(text)
    return value if value == 0 or SMALLEST <= value <= LARGEST else None


def whole(text: str) -> int | None:
    """The whole number, or None where the text is none from 0 to LARGEST."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 15 else None


def rounding(text: str) -> float:
    """Half a unit of the last printed place: 0.005 for `12.30`, 0.5 for `12`, 50 for `1.2e3`."""
    mantissa, _, exponent = text.partition("e")
    places = len(mantissa.partition(".")[2])
    return 0.5 * 10.0 ** (int(exponent or 0) - places)


def agree(one: float, other: str, share: float, printed_from: float = 0.0) -> bool:
    """Whether a computed figure is the printed one, within both roundings and a share of it.

    printed_from: by what share the printed figures that `one` was computed from are rounded.
    """
    shown = float(other)
    return abs(one - shown) <= rounding(other) + (share + printed_from) * max(one, shown)
