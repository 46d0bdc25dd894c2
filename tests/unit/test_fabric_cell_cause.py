"""Which of a cell's failed ranks is named."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from validate.fabric.cell import Watch


@pytest.mark.parametrize(
    ("codes", "named"),
    [
        ({0: -6, 1: -9, 2: 0}, "rank 1 (node 0) was killed by SIGKILL while waiting"),
        ({0: 1, 1: 0, 2: -6}, "rank 2 (node 1) was killed by SIGABRT while waiting"),
    ],
)
def test_a_rank_that_something_killed_comes_first(codes: dict[int, int], named: str) -> None:
    shared = SimpleNamespace(steps=[3, 3, 3], label=lambda step: "waiting")
    watch = SimpleNamespace(codes=codes, lab=SimpleNamespace(ranks_per_node=2), shared=shared, down=lambda: "")
    assert named in Watch.cause(watch).line()  # type: ignore[arg-type]
