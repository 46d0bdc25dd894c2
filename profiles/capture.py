"""The file that measurements are written to: one JSON line for each finished point, synced, resumable, checked.

A line names what was measured (`family`, `key`, `size`, `kernel`, `device`; together its identity), the seconds
(`latency_s` is the median; `p10_s`, `p90_s`; `halves` says by what share the medians of the two halves of the repeats
differ), and under which conditions (`run`). Needs NumPy at most.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from moesim.errors import BadInput
from profiles.record import COUNT, FAMILIES, NUMBER, TEXT

FORMAT = "moesim-measured"
SCHEMA_VERSION = 1
LARGEST = 2**53  # the whole numbers that a float64 and every JSON reader hold exactly
# Families without a table of the store: ceilings of the machine, the products of experts alone (also with some
# multiprocessors held), small kernels.
WITHOUT_TABLE = (
    "ceiling", "grouped_gemm", "held_sms", "gate", "permute", "unpermute", "norm", "kv_write", "quantise", "pack",
    "replica_choice", "histogram",
)  # fmt: skip


@dataclass(frozen=True)
class Line:
    """One measured point, checked: sizes and seconds are finite and above zero, p10 <= median <= p90."""

    family: str
    key: dict[str, str | int]
    size: dict[str, float]
    kernel: str
    device: str
    baseline: bool
    latency_s: float
    p10_s: float
    p90_s: float
    run: dict[str, Any]
    extra: dict[str, Any]
    values: dict[str, float] = field(default_factory=dict)

    @property
    def identity(self) -> str:
        """What makes two lines the same point."""
        return identity(self.family, self.key, self.size, self.kernel, self.device)


def identity(family: str, key: dict[str, Any], size: dict[str, Any], kernel: str, device: str) -> str:
    """A point's identity as text."""
    sizes = {name: float(value) for name, value in size.items()}
    return json.dumps([family, key, sizes, kernel, device], sort_keys=True)


def statistics_of(seconds: list[float]) -> dict[str, float]:
    """Median, p10, p90, repeats, and by what share the medians of the two halves of the repeats differ."""
    import numpy as np

    low, middle, high = (float(value) for value in np.quantile(seconds, (0.1, 0.5, 0.9)))
    half = len(seconds) // 2
    halves = abs(median(seconds[:half]) - median(seconds[half:])) / middle if half else 0.0
    return {"latency_s": middle, "p10_s": low, "p90_s": high, "repeats": len(seconds), "halves": halves}


class Log:
    """A file of lines that a sweep appends to; opening it checks what is there and drops a line that a crash cut off.

    Raises BadInput when a line is not a measurement, or the file cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.have = {line.identity for line in self._opened()}
        self.kept = len(self.have)

    def _opened(self) -> list[Line]:
        if not self.path.exists():
            return []
        whole, torn = _text(self.path)
        lines = parsed(whole, self.path)
        if torn:
            try:
                os.truncate(self.path, len(whole.encode()))
            except OSError as error:
                raise _unwritable(self.path, error) from None
        return lines

    def append(self, line: dict[str, Any]) -> None:
        """Write one line and sync it; a crash later cannot take it away."""
        text = json.dumps({"format": FORMAT, "schema_version": SCHEMA_VERSION, **line}, allow_nan=False)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as handle:
                handle.write(text + "\n")
                handle.flush()
                os.fsync(handle.fileno())
        except OSError as error:
            raise _unwritable(self.path, error) from None
        self.have.add(identity(line["family"], line["key"], line["size"], line["kernel"], line["device"]))


def read_lines(paths: Iterable[Path]) -> list[Line]:
    """All lines of the files. Raises BadInput that names the file and the line number; an unfinished last line too."""
    found = []
    for path in paths:
        whole, torn = _text(path)
        lines = parsed(whole, path)
        if torn:
            raise BadInput(
                "the last line is cut off",
                where=f"{path}:{whole.count(chr(10)) + 1}",
                mend="run the command that wrote the file again (it goes on where it stopped), or delete the line",
            )
        if not lines:
            raise BadInput("no measurement here", where=str(path), mend="give a file of `moesim profile kernels`")
        found.extend(lines)
    return found


def parsed(text: str, path: Path) -> list[Line]:
    """The lines of a text whose every line is finished. Raises BadInput with the line number."""
    return [_parsed(line, f"{path}:{number}") for number, line in enumerate(text.split("\n")[:-1], start=1)]


def _text(path: Path) -> tuple[str, bool]:
    """The finished lines, and whether more follows them."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise BadInput(
            f"cannot read the measurements ({error.strerror})", where=str(path), mend="give a readable file"
        ) from None
    whole, newline, rest = content.rpartition(b"\n")
    try:
        return (whole + newline).decode("utf-8"), bool(rest)
    except UnicodeDecodeError as error:
        number = content[: error.start].count(b"\n") + 1
        raise BadInput("not UTF-8 text", where=f"{path}:{number}", mend="give another file") from None


def _unwritable(path: Path, error: OSError) -> BadInput:
    return BadInput(f"cannot write here ({error.strerror})", where=str(path), mend="choose another file with --out")


class _Wrong(ValueError):
    """What is wrong with a line."""


def _parsed(text: str, where: str) -> Line:
    try:
        content = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique)
        return _line(content)
    except _Wrong as error:
        what = str(error)
    except (ValueError, RecursionError):
        what = "not a JSON object"
    raise BadInput(what, where=where, mend="measure again into another file, or delete the line")


def _refuse_constant(name: str) -> float:
    raise _Wrong(f"{name} is no measurement")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _Wrong("a key stands twice in one object")
    return found


def _line(content: Any) -> Line:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise _Wrong(f"not a {FORMAT} line")
    if content.get("schema_version") != SCHEMA_VERSION or content["schema_version"] is True:
        raise _Wrong(f"schema version {content.get('schema_version')!r} is not {SCHEMA_VERSION}")
    family = _of(content, "family", str)
    key, size, run = (_of(content, name, dict) for name in ("key", "size", "run"))
    _check_key(family, key)
    _check_size(family, size)
    low, middle, high = (_positive(content.get(name), name) for name in ("p10_s", "latency_s", "p90_s"))
    if not low <= middle <= high:
        raise _Wrong(f"p10_s {low:g}, latency_s {middle:g} and p90_s {high:g} do not rise")
    repeats = content.get("repeats")
    if not isinstance(repeats, int) or isinstance(repeats, bool) or not 1 <= repeats <= LARGEST:
        raise _Wrong(f"repeats is {_shown(repeats)}, not a whole number above zero")
    for name in ("torch", "date"):
        _of(run, name, str)
    baseline = content.get("baseline", False)
    if not isinstance(baseline, bool):
        raise _Wrong("baseline is neither true nor false")
    extra = content.get("extra", {})
    if not isinstance(extra, dict):
        raise _Wrong("extra is not an object")
    return Line(
        family, key, {name: float(value) for name, value in size.items()}, _of(content, "kernel", str),
        _of(content, "device", str), baseline, middle, low, high, run, extra, _values(family, content),
    )  # fmt: skip


def _values(family: str, content: dict[str, Any]) -> dict[str, float]:
    """The further figures of a family that has some."""
    values = content.get("values", {})
    wanted = FAMILIES[family].values if family in FAMILIES else ()
    if not isinstance(values, dict) or set(values) != set(wanted):
        raise _Wrong(f"the values of {family} are {', '.join(wanted) or 'none'}")
    return {name: _positive(values[name], f"values.{name}") for name in wanted}


def _of(content: dict[str, Any], name: str, kind: type) -> Any:
    value = content.get(name)
    if not isinstance(value, kind) or value in ("", {}):
        raise _Wrong(f"{name} is missing or empty" if value in (None, "", {}) else f"{name} has the wrong type")
    return value


def _check_key(family: str, key: dict[str, Any]) -> None:
    for name, value in key.items():
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise _Wrong(f"key.{name} is neither text nor a whole number")
        if isinstance(value, int) and not 0 <= value <= LARGEST:
            raise _Wrong(f"key.{name} is {_shown(value)}")
    if family in WITHOUT_TABLE:
        return
    if family not in FAMILIES:
        raise _Wrong(f"unknown family {_shown(family)}")
    columns = FAMILIES[family].key
    if set(key) != set(columns):
        odd = sorted(set(key) ^ set(columns))[0]
        raise _Wrong(f"the key of {family} {'lacks' if odd in columns else 'has an unknown'} {_shown(odd)}")
    kinds: dict[str, type] = {TEXT: str, COUNT: int, NUMBER: int}
    for name, kind in columns.items():
        if not isinstance(key[name], kinds[kind]):
            raise _Wrong(f"key.{name} is {_shown(key[name])}, not {'text' if kind == TEXT else 'a whole number'}")


def _check_size(family: str, size: dict[str, Any]) -> None:
    for name, value in size.items():
        _positive(value, f"size.{name}")
    if family in FAMILIES and set(size) != set(FAMILIES[family].point):
        raise _Wrong(f"the sizes of {family} are {', '.join(FAMILIES[family].point)}")


def _positive(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= LARGEST or math.isnan(value):
        raise _Wrong(f"{name} is {_shown(value)}, not a finite number above zero")
    return float(value)


def _shown(value: Any) -> str:
    """At most 40 characters of a value."""
    try:
        text = repr(value)
    except ValueError:  # whole numbers of thousands of digits have no text
        text = "a huge number"
    return text if len(text) <= 40 else text[:37] + "..."
