"""What kernels reach of a datasheet: planted figures are found again, and what ships is what the tables give."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moesim.cost.reach import bundled, reach
from moesim.files import write_text
from moesim.spec.presets import presets
from profiles import reach_fit
from profiles.reach_fit import Rows, fit, fitted, gather, left_out, main, markdown, markdown_links, seconds_of, written
from profiles.reach_rows import FULL, architecture, quantile, weights
from profiles.store import DATA

SYSTEMS = ("a100_sxm", "h100_sxm", "h200_sxm", "b200_sxm")
PLANTED = np.array([6e-6, 0.55, 0.8])


def planted(noise: float, seed: int = 0, figures: np.ndarray = PLANTED, count: int = 2000) -> Rows:
    """Calls of small and large work on four systems, bound by either side, in bins of 50."""
    rng = np.random.default_rng(seed)
    compute_s, hbm_s = (10.0 ** rng.uniform(-7.0, -3.0, count) for _ in range(2))
    rows = Rows(
        "gemm",
        "bf16",
        compute_s,
        hbm_s,
        np.ones(count),
        np.arange(count) // 50,
        np.asarray(SYSTEMS)[np.arange(count) % 4],
    )
    return replace(rows, seconds=seconds_of(figures, rows) * np.exp(noise * rng.normal(size=count)))


@pytest.mark.parametrize(("noise", "within"), [(0.0, 1e-3), (0.2, 0.05)])
def test_planted_figures_are_found_again(noise: float, within: float) -> None:
    assert fitted(planted(noise)) == pytest.approx(PLANTED, rel=within)


def test_a_tenth_of_wild_kernels_moves_nothing_far() -> None:
    rows = planted(0.1)
    wild = rows.seconds.copy()
    wild[::10] *= 20.0
    assert fitted(replace(rows, seconds=wild)) == pytest.approx(PLANTED, rel=0.15)


def test_sigma_is_that_of_architectures_left_out() -> None:
    """Blackwell reaches half of what the others do: its rows are off by ln 2 by the others' figures."""
    rows = planted(0.0)
    slow = rows.system == "b200_sxm"
    rows = replace(rows, seconds=np.where(slow, 2.0, 1.0) * rows.seconds)
    off = left_out(rows, rows)
    assert np.median(off[slow]) == pytest.approx(np.log(2.0), abs=0.02)
    assert quantile(off, rows, 0.9) == pytest.approx(np.log(2.0), abs=0.15)
    noisy = planted(0.2)
    assert quantile(left_out(noisy, noisy), noisy, 0.9) / 1.645 == pytest.approx(0.2, rel=0.1)


def test_one_architecture_leaves_systems_out() -> None:
    rows = planted(0.0)
    rows = replace(rows, system=np.where(np.arange(2000) % 2 == 0, "b200_sxm", "gb200"))
    rows = replace(rows, seconds=np.where(rows.system == "gb200", 1.5, 1.0) * rows.seconds)
    assert abs(np.median(left_out(rows, rows)[rows.system == "gb200"])) == pytest.approx(np.log(1.5), abs=0.02)


def test_a_bin_of_few_rows_weighs_by_their_number() -> None:
    rows = replace(planted(0.0), group=np.where(np.arange(2000) < 1900, 0, 1 + np.arange(2000)))
    weight = weights(rows)
    assert weight[:1900].sum() == pytest.approx(1.0)
    assert weight[-1] == 1.0 / FULL


def test_every_preset_has_an_architecture() -> None:
    found = {name: architecture(name) for name in (*presets(), "gb200")}
    assert set(found.values()) == {"Ampere", "Hopper", "Blackwell"}
    assert (found["p5_48xlarge"], found["gb200"], found["h20"]) == ("Hopper", "Blackwell", "Hopper")


@pytest.fixture(scope="module")
def shipped() -> dict[tuple[str, str], Rows]:
    return {(rows.kind, rows.dtype): rows for rows in gather([DATA / "h200_sxm"])}


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("gemm", "bf16"), ("gemm", "fp8_block"), ("attention decode", "bf16/bf16"), ("mla prefill", "bf16/bf16")],
)
def test_what_ships_prices_the_shipped_profile(shipped: dict[tuple[str, str], Rows], kind: str, dtype: str) -> None:
    """The H200's rows of SGLang lie where the figures of seven GPUs and three engines say, within their sigma."""
    rows, own = shipped[kind, dtype], reach(kind, dtype)
    off = np.log(rows.seconds / seconds_of(np.array([own.floor_s, own.compute, own.hbm]), rows))
    print(
        f"{kind} {dtype}: median {np.median(off):+.3f}, 90 % in {quantile(off, rows, 0.9):.3f}, sigma {own.rel_sigma}"
    )
    assert abs(np.median(off)) < own.rel_sigma
    assert quantile(off, rows, 0.9) < 2.5 * own.rel_sigma


def test_windowed_attention_has_the_figures_of_its_kind_and_a_sigma_of_its_own() -> None:
    rows = {(row.kind, row.dtype): row for row in bundled().kernels}
    windowed = [key for key in rows if key[0].endswith(" window")]
    assert windowed
    for kind, dtype in windowed:
        mine, base = rows[kind, dtype], rows[kind.removesuffix(" window"), dtype]
        assert (mine.floor_s, mine.compute, mine.hbm) == (base.floor_s, base.compute, base.hbm)
        assert mine.rel_sigma > base.rel_sigma


def test_the_page_has_the_figures_that_ship(repo: Path) -> None:
    page = (repo / "docs" / "explanation" / "costs.md").read_text(encoding="utf-8")
    assert markdown(bundled()) in page
    assert markdown_links(bundled()) in page


def test_the_command_writes_a_file_that_reads_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "reach.yaml"
    assert main([str(DATA / "h200_sxm"), "--out", str(out)]) == 0
    text = out.read_text(encoding="utf-8")
    assert capsys.readouterr().out == text
    assert "source: tables of aiconfigurator-core 0.12.0\n" in text
    assert "systems: [h200_sxm]" in text and "kind: gemm, dtype: bf16" in text
    write_text(out, written(bundled()))
    repo_file = Path(reach_fit.__file__).parents[1] / "moesim" / "cost" / "reach.yaml"
    assert out.read_text(encoding="utf-8") == repo_file.read_text(encoding="utf-8")


def test_what_cannot_be_fitted_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No profile, a profile of a GPU that has no preset, and one without a call of a kernel; nothing is written."""
    out = tmp_path / "reach.yaml"
    for name, told in (
        ("none", "no profile here"),
        ("l40s", "unknown cluster preset 'l40s'"),
        ("h200_sxm", "no call of a kernel"),
    ):
        folder = tmp_path / name
        if name != "none":
            folder.mkdir()
            about = {"format": "moesim-profile", "schema_version": 1, "system": name}
            (folder / "profile.json").write_text(json.dumps(about))
        assert main([str(folder), "--out", str(out)]) == 2
        said = capsys.readouterr()
        assert said.out == "" and said.err.count("\n") == 1 and told in said.err, said.err
        assert not out.exists()


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("MOESIM_WHOLE"), reason="eight CPU minutes: MOESIM_WHOLE=1")
def test_the_tables_of_seven_gpus_give_what_ships(tmp_path: Path) -> None:
    pytest.importorskip("aiconfigurator_core")
    from moesim.cli import run

    folders = []
    for system in ("a100_sxm", "h100_sxm", "h200_sxm", "b200_sxm", "b300_sxm", "gb200", "gb300"):
        folders.append(tmp_path / system)
        command = ["profile", "import", "aiconfigurator", "--engine", "all", "--priced"]
        assert run([*command, "--system", system, "--out", str(folders[-1])]) == 0
    assert fit(folders) == bundled()
