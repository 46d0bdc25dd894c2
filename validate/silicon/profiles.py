"""The profiles that measured rows are priced with: imported once, with what the rows ask for, kept in the user's cache.

A whole import fits the experts of every model that the tables hold, minutes a system; here only those of the rows' own
models and types are fitted, every row of the tables is kept, and prices are the same. The cache's folder is named by a
digest of everything that goes in (the importing code, the package's version, the experts asked for), so another version
of any of them reads nothing stale; a profile is written whole or not at all.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from moesim.errors import BadInput
from moesim.spec.hf import load_model
from profiles.importers.aiconfigurator import find_package
from profiles.importers.aiconfigurator_profile import import_profile
from profiles.leave_out import ExpertShape
from profiles.store import DESCRIPTION
from validate.silicon.rows import SiliconRow, read_rows
from validate.silicon.settings import layout_of, settings_of
from validate.silicon.workers import in_workers

SAMPLE = "silicon_sample.csv"
IMPORTER = "profiles.importers.aiconfigurator_profile"
OURS = ("moesim", "profiles")  # packages whose code an import runs
DIGITS = 12  # of the digest, in the folder's name


def sample_path() -> Path:
    """The table of measured runs that the installed package ships. Raises MissingPart."""
    return find_package(None)[0].parent / SAMPLE


def cached_profiles(rows: Sequence[SiliconRow], say: Callable[[str], None], workers: int = 1) -> Path:
    """The folder with a profile for each system of the rows that the installed package has tables of.

    Those that are missing are imported, a quarter of a minute each, on `workers` processes. Raises MissingPart.
    """
    data, version = find_package(None)
    systems = sorted({row.system for row in rows if row.moe and (data / row.system).is_dir()})
    experts = asked_experts([*read_rows(data.parent / SAMPLE), *rows])
    folder = cache_home() / "moesim" / f"silicon-{_digest(experts, version)}"
    lacking = [system for system in systems if not (folder / system / DESCRIPTION).is_file()]
    if lacking:
        say(f"importing the tables of {', '.join(lacking)}, once ...")
        in_workers(_import, [(folder / system, system, experts) for system in lacking], workers)
    return folder


def cache_home() -> Path:
    """Where caches go: XDG_CACHE_HOME, else `.cache` in the home folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def asked_experts(rows: Iterable[SiliconRow]) -> frozenset[ExpertShape]:
    """The experts of the rows' models in the types that they ran in; models that are not known are left out."""
    found = set()
    types = {(row.model, settings_of(row, layout_of(row)).experts) for row in rows if row.moe}
    for name, dtype in types:
        try:
            model = load_model(name)
        except BadInput:
            continue
        found.add((model.hidden, model.moe.experts, model.moe.top_k, dtype))
    return frozenset(found)


def _import(task: tuple[Path, str, frozenset[ExpertShape]]) -> None:
    out, system, experts = task
    import_profile(out, system=system, engine="all", source=None, priced=True, say=lambda line: None, experts=experts)


def _digest(experts: Iterable[ExpertShape], version: str) -> str:
    import numpy
    import polars
    import scipy

    told = hashlib.sha256()
    for text in (version, numpy.__version__, polars.__version__, scipy.__version__, *map(str, sorted(experts))):
        told.update(f"{text}\n".encode())
    for name, code in sorted(code_of(IMPORTER).items()):
        told.update(f"{name}\n".encode() + code)
    return told.hexdigest()[:DIGITS]


def code_of(module: str) -> dict[str, bytes]:
    """The source of a module and of all modules of OURS that it imports, directly or through others, by name."""
    found: dict[str, bytes] = {}
    wanted = [module]
    while wanted:
        name = wanted.pop()
        if name in found or name.partition(".")[0] not in OURS:
            continue
        path = _file_of(name)
        if path is None:  # an object of the module before its last dot
            continue
        found[name] = path.read_bytes()
        for node in ast.walk(ast.parse(found[name])):
            if isinstance(node, ast.Import):
                wanted += [one.name for one in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                wanted += [node.module, *(f"{node.module}.{one.name}" for one in node.names)]
    return found


def _file_of(module: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return None
    return None if spec is None or spec.origin is None else Path(spec.origin)
