"""The counts-only model of fan-out against per-token ids, grouped and ungrouped: its error, shown and bounded."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.network.fan_out import EXPERTS, NODES, RANKS, TOP_K, compare_fan_out, fan_out_table, main, token_ids
from moesim.spec.plan import ExpertPlacement


def test_the_error_of_the_model_stays_where_the_docs_say() -> None:
    rows = list(fan_out_table(tokens=8_000))
    assert {routing for routing, *_ in rows} == {"plain top-k", "group-limited"}
    for routing, skew, placement, found in rows:
        print(f"{routing}, {skew}, {placement}: ranks {found.rank_error:+.1%}, nodes {found.node_error:+.1%}")
        assert found.nodes_ids <= min(NODES, found.ranks_ids)
        assert found.ranks_ids <= TOP_K
        assert found.rank_gap < 0.12
        if routing == "plain top-k":
            assert -0.05 < found.rank_error < 0.01
            assert -0.02 < found.node_error < 0.01
        else:  # an open group has two good experts at least, so that its experts are picked together less than assumed
            assert -0.08 < found.rank_error < 0.01
            assert -0.11 < found.node_error < 0.01
            assert skew == "twice" or placement == "contiguous" or abs(found.node_error) < 0.02


def test_groups_keep_tokens_on_fewer_nodes() -> None:
    placement = ExpertPlacement(np.arange(EXPERTS)[None], np.asarray([0]), EXPERTS, RANKS, 1)
    flat = np.zeros(EXPERTS)
    plain, grouped = (
        compare_fan_out(
            token_ids(flat, grouped=limit, tokens=4_000, rng=np.random.default_rng(0)), placement, nodes=NODES
        )
        for limit in (False, True)
    )
    assert grouped.nodes_ids < plain.nodes_ids - 0.3


def test_the_command_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    main(tokens=500)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 12
    assert all(line.count("|") == 10 for line in lines)
