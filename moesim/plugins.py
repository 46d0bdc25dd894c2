"""What a lower floor needs from an upper one, by name, through entry points, loaded lazily."""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from moesim.errors import BadInput, MissingPart

COMMANDS = "moesim.commands"
COSTS = "moesim.costs"
SOLVERS = "moesim.solvers"
RECORDS = "moesim.records"


@functools.cache
def available(group: str) -> dict[str, EntryPoint]:
    """All entry points of a group by name, in order of name; nothing is imported."""
    return {point.name: point for point in sorted(entry_points(group=group), key=lambda point: point.name)}


def load(group: str, name: str, *, where: str = "") -> Callable[..., Any]:
    """Import and return the object registered under `name`. Raises BadInput for an unknown name."""
    points = available(group)
    if name not in points:
        kind = group.rpartition(".")[2].rstrip("s")
        raise BadInput(f"unknown {kind} {name!r}", where=where, mend=f"use one of: {', '.join(points)}")
    try:
        loaded: Callable[..., Any] = points[name].load()
    except ImportError as error:
        raise MissingPart(
            f"{name!r} needs a part that is not installed ({error})", where=where, mend="see `moesim doctor`"
        ) from None
    return loaded


def help_line(point: EntryPoint) -> str:
    """First docstring line of an entry point's target, read from the source text without importing it."""
    try:
        spec = importlib.util.find_spec(point.module)
        if spec is None or spec.origin is None:
            return ""
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    except (ImportError, OSError, SyntaxError, UnicodeDecodeError):
        return ""
    nodes: list[ast.Module | ast.FunctionDef] = [
        node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == point.attr
    ]
    text = ast.get_docstring((nodes or [tree])[0]) or ""
    return text.partition("\n")[0]
