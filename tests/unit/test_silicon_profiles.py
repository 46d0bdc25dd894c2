"""Profiles for measured rows: what is imported, where it is kept, and that prices are those of a whole import."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from profiles.leave_out import errors_of, fit_experts
from profiles.record import FAMILIES
from profiles.store import DESCRIPTION, open_profile
from tests.silicon_rows import row
from validate.silicon import profiles as silicon_profiles
from validate.silicon.profiles import IMPORTER, asked_experts, cached_profiles, code_of
from validate.silicon.rows import COLUMNS

SHAPE = ("hidden", "experts", "top_k", "dtype")
R1 = (7168, 256, 8, "fp8_block")


def test_the_experts_that_rows_ask_for() -> None:
    assert asked_experts([row(1), row(2)]) == {R1}


def test_the_code_of_an_import_is_what_it_runs() -> None:
    names = code_of(IMPORTER).keys()
    assert {IMPORTER, "profiles.leave_out", "profiles.experts", "profiles.store", "moesim.units"} <= names
    assert "profiles.costs" not in names
    assert not any(name.startswith("validate") for name in names)


def test_only_what_is_asked_is_fitted_and_as_in_the_whole() -> None:
    rows = open_profile("default", "h200_sxm").table("experts")
    some = rows.filter((pl.col("grouping") == "fused") & (pl.col("engine") == "sglang"))
    shapes = some.select(SHAPE).unique(maintain_order=True).head(2).rows()
    few = some.filter(pl.struct(*SHAPE).is_in([dict(zip(SHAPE, shape, strict=True)) for shape in shapes]))
    whole, part = fit_experts(few)["parameters"], fit_experts(few, shapes[:1])["parameters"]
    assert 0 < len(part) < len(whole)
    assert part == {name: whole[name] for name in part}


def test_errors_of_some_shapes_are_near_those_of_all() -> None:
    profile = open_profile("default", "h200_sxm")
    tables = {name: profile.table(name) for name, family in FAMILIES.items() if family.priced}
    tables["gemm"] = tables["gemm"].filter(pl.col("n") % 512 == 0)
    some = errors_of(tables, {}, 20)
    assert some["gemm"]["points"] < profile.errors("gemm")["points"]
    assert some["gemm"]["p90"] == pytest.approx(profile.errors("gemm")["p90"], rel=0.5)
    assert some["mla_decode"] == profile.errors("mla_decode")


def test_profiles_are_imported_once_and_named_by_all_that_goes_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "systems" / "data"
    (data / "h200_sxm").mkdir(parents=True)
    (data.parent / "silicon_sample.csv").write_text(",".join(COLUMNS) + "\n")
    version = ["1"]
    monkeypatch.setattr(silicon_profiles, "find_package", lambda given: (data, version[0]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made: list[Path] = []

    def imported(out: Path, **asked: object) -> None:
        assert asked["experts"] == {R1}
        made.append(out)
        out.mkdir(parents=True)
        (out / DESCRIPTION).write_text("{}")

    monkeypatch.setattr(silicon_profiles, "import_profile", imported)
    said: list[str] = []
    folder = cached_profiles([row(1)], said.append)
    assert cached_profiles([row(1)], said.append) == folder
    assert made == [folder / "h200_sxm"]
    assert len(said) == 1
    version[0] = "2"
    assert cached_profiles([row(1)], said.append) != folder
    version[0] = "1"
    code = silicon_profiles.code_of(IMPORTER)
    monkeypatch.setattr(silicon_profiles, "code_of", lambda module: {**code, IMPORTER: code[IMPORTER] + b"\n"})
    assert cached_profiles([row(1)], said.append) != folder
