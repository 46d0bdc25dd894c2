"""A search in which no plan ran leaves nothing behind: the mended scenario is searched in its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from moesim.cli import run
from tests.scenarios import small, write


@pytest.mark.parametrize("storage", [False, True])
@pytest.mark.parametrize("there", [False, True])
def test_the_mended_scenario_is_searched_in_its_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], there: bool, storage: bool
) -> None:
    workload = {"isl": 5000, "osl": 8, "requests": 4, "arrivals": {"concurrency": 4}}
    batching = {"max_batch_tokens_per_dp_rank": 2048, "chunked_prefill": False}
    path, out = write(tmp_path, small(serving={"workload": workload, "batching": batching})), tmp_path / "run"
    if there:
        out.mkdir()
        (out / "mine.txt").write_text("kept")
    given = ["tune", str(path), "--trials", "2", "--out", str(out)]
    if storage:
        given += ["--storage", f"sqlite:///{tmp_path / 'study.db'}"]
    assert run(given) == 1
    assert "no plan could be simulated (prompt_too_long 2)" in capsys.readouterr().err
    assert out.exists() is there
    assert [file.name for file in out.iterdir()] == ["mine.txt"] if there else True
    if there and not storage:
        assert run([*given, "--set", "serving.workload.isl=100"]) == 0
        assert (out / "plan.yaml").is_file()
        assert run([*given, "--set", "serving.workload.isl=100"]) == 2
        assert "there is a search here already" in capsys.readouterr().err
    if storage and not there:
        assert run([*given, "--set", "serving.workload.isl=100"]) == 0
