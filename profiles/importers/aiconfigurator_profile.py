"""A whole profile of one system from the tables of aiconfigurator-core: rows, physics of experts, leave-out errors."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from profiles.importers.aiconfigurator import Ledger, find_package, import_tables, package_of

if TYPE_CHECKING:
    from profiles.leave_out import ExpertShape


@dataclass(frozen=True)
class Imported:
    """What an import wrote: rows by family, what became of the source's rows, and leave-out errors."""

    rows: dict[str, int]
    ledger: Ledger
    errors: dict[str, Any]


# Shapes of a kernel that judge its family where only some experts are fitted.
JUDGED_SHAPES = 40


def import_profile(
    out: Path, *, system: str, engine: str, source: Path | None, priced: bool, say: Callable[[str], None],
    experts: Collection[ExpertShape] | None = None,
) -> Imported:  # fmt: skip
    """Convert the tables of one system and engine (or `all`) to a profile folder; an older profile there is replaced.

    priced: only families that prices are looked up in. experts: (hidden, experts, top_k, dtype) that will be asked for:
    only their physics is fitted, and errors are judged on JUDGED_SHAPES of each kernel; every row is kept,
    so prices are those of the whole import. `say` is told of what is left out. Takes minutes, with `experts` a quarter
    of one. Raises BadInput and MissingPart.
    """
    from profiles.leave_out import errors_of, fit_experts, fit_products
    from profiles.record import FAMILIES
    from profiles.store import QUICKEST, SMALLEST, write_profile

    left_out: list[str] = []

    def told(line: str) -> None:
        left_out.append(line)
        say(line)

    data, package_version = find_package(source)
    ledger = Ledger()
    tables = import_tables(data, system=system, engine=engine, package_version=package_version, say=told, ledger=ledger)
    if priced:
        tables = {name: table for name, table in tables.items() if FAMILIES[name].priced}
    say("fitting the experts' physics and leaving points out ...")
    fitted = fit_experts(tables["experts"], experts)
    products = {name: product.as_dict() for name, product in fit_products(tables["gemm"]).items()}
    errors = errors_of(tables, fitted, None if experts is None else JUDGED_SHAPES)
    rows = {name: table.height for name, table in tables.items() if table.height}
    description = {
        "system": system,
        "engine": engine,
        "source": {"package": package_of(data), "version": package_version, "licence": "Apache-2.0, NVIDIA"},
        "left_out": left_out,
        "source_rows": ledger.as_dict(),
        "rows": rows,
        "errors": errors,
        "physics": fitted["parameters"],
        "products": products,
    }
    write_profile(out, tables, description, level=SMALLEST if experts is None else QUICKEST)
    return Imported(rows, ledger, errors)
