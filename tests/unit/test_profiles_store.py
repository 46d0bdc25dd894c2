"""The profile on disk: checked when read, written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest

from moesim.errors import BadInput
from profiles.record import FAMILIES
from profiles.store import Profile, open_profile, write_profile

PROVENANCE = {
    "system": "test", "engine": "sglang", "version": "1", "kernel": "k", "device": "d", "package": "p",
    "package_version": "0", "tag": "measured",
}  # fmt: skip


def gemm(latency: float = 1e-5, m: float = 4.0) -> pl.DataFrame:
    return pl.DataFrame({"dtype": ["bf16"], "n": [64], "k": [32], "m": [m], "latency_s": [latency], **PROVENANCE})


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_profile(tmp_path / "p", {"gemm": gemm()}, {"errors": {"gemm": {"p68": 0.1}}})
    profile = open_profile(str(tmp_path / "p"), "anything")
    assert profile.families() == ["gemm"]
    assert profile.table("gemm")["latency_s"].to_list() == [1e-5]
    assert profile.table("experts").height == 0
    assert profile.errors("gemm") == {"p68": 0.1}


@pytest.mark.parametrize("latency", [float("nan"), float("inf"), -1e-6, 0.0, None])
def test_an_impossible_latency_is_refused_and_the_store_stays(tmp_path: Path, latency: float | None) -> None:
    folder = tmp_path / "p"
    write_profile(folder, {"gemm": gemm()}, {})
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(BadInput, match="latency_s is"):
        write_profile(folder, {"gemm": gemm(latency)}, {})  # type: ignore[arg-type]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


def test_a_size_of_zero_is_refused() -> None:
    with pytest.raises(BadInput, match="m is 0"):
        write_profile(Path("never"), {"gemm": gemm(m=0.0)}, {})
    assert not Path("never").exists()


def test_an_older_profile_is_replaced_whole(tmp_path: Path) -> None:
    folder = tmp_path / "p"
    write_profile(folder, {"gemm": gemm()}, {})
    (folder / "experts.parquet").write_bytes(b"left over")
    write_profile(folder, {"gemm": gemm(2e-5)}, {})
    assert sorted(path.name for path in folder.iterdir()) == ["gemm.parquet", "profile.json"]
    assert Profile(folder).table("gemm")["latency_s"].to_list() == [2e-5]


def test_a_failure_while_writing_leaves_the_old_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "p"
    write_profile(folder, {"gemm": gemm()}, {})

    def full(self: pl.DataFrame, *args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pl.DataFrame, "write_parquet", full)
    with pytest.raises(BadInput, match="No space left"):
        write_profile(folder, {"gemm": gemm(2e-5)}, {})
    assert Profile(folder).table("gemm")["latency_s"].to_list() == [1e-5]
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


def test_a_folder_that_is_no_profile_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(BadInput, match="not a profile"):
        write_profile(tmp_path / "mine", {"gemm": gemm()}, {})
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_nothing_to_write_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="nothing to write"):
        write_profile(tmp_path / "p", {"gemm": gemm().clear()}, {})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"half a parq", "not a readable Parquet"),
        (b"", "not a readable Parquet"),
        (None, "column 'k' is missing"),
    ],
)
def test_a_damaged_table_is_one_line(tmp_path: Path, content: bytes | None, message: str) -> None:
    folder = tmp_path / "p"
    write_profile(folder, {"gemm": gemm()}, {})
    path = folder / "gemm.parquet"
    if content is None:
        gemm().drop("k").write_parquet(path)
    else:
        path.write_bytes(content)
    with pytest.raises(BadInput, match=message) as error:
        Profile(folder).table("gemm")
    assert "\n" not in error.value.line()


def test_a_truncated_table_is_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "p"
    write_profile(folder, {"gemm": pl.concat([gemm(m=float(m)) for m in range(1, 200)])}, {})
    path = folder / "gemm.parquet"
    whole = path.read_bytes()
    for keep in range(0, len(whole), max(1, len(whole) // 25)):
        path.write_bytes(whole[:keep])
        with pytest.raises(BadInput):
            Profile(folder).table("gemm")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "not a moesim-profile"),
        (json.dumps({"format": "moesim-profile", "schema_version": 99}), "schema version"),
    ],
)
def test_a_wrong_description_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "profile.json").write_text(text)
    with pytest.raises(BadInput, match=message):
        open_profile(str(tmp_path), "h200_sxm")


def test_an_unknown_name_or_system_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no profile here"):
        open_profile(str(tmp_path / "nowhere"), "h200_sxm")
    with pytest.raises(BadInput, match="moesim profile import"):
        open_profile("default", "a_system_that_does_not_ship")


def test_the_shipped_profile_holds_every_family_that_is_published() -> None:
    profile = open_profile("default", "h200_sxm")
    assert profile.families() == [name for name, family in FAMILIES.items() if family.priced]
    size = sum(path.stat().st_size for path in profile.folder.iterdir())
    assert size < 4e6
