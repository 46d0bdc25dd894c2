"""Forward and backward passes of a stage as pairs: what they save, what they cannot, what is refused beside them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moesim.cli import run
from moesim.engine.training import simulate_training, training_model
from moesim.engine.training_explain import explain_training
from moesim.engine.training_overlap import pair_share
from moesim.errors import BadInput
from moesim.output.training_metrics import training_json
from tests.training_scenarios import asked, training


def scenario(schedule: str = "forward_backward", backend: str = "alltoall", **own: Any) -> Any:
    return asked(policies={"dispatch": {"backend": backend}, "schedule": schedule}, training=own)


@pytest.mark.parametrize("backend", ["alltoall", "deepep"])
def test_a_pair_hides_exchanges_and_nothing_else(backend: str) -> None:
    apart, paired = (training_model(scenario(name, backend), 0) for name in ("sequential", "forward_backward"))
    share = pair_share(paired.layers, paired.chunks)
    assert (pair_share(apart.layers, apart.chunks) == 1.0).all()
    assert share.shape == (len(paired.chunks), paired.layers.steps)
    figures = training_json(simulate_training(scenario("sequential", backend), draws=0))["step"]
    exchanges = sum(figures["by_operation_s"][name] for name in ("dispatch", "combine"))
    working = sum(figures["by_pass_s"].values())
    assert (share < 1.0).all()
    assert float(share.min()) >= 1.0 - 1.3 * exchanges / working  # the mean over ranks and routings, hence the margin


def test_a_host_that_waits_for_counts_hides_less_of_deepep_alone() -> None:
    """And the multiprocessors that DeepEP holds make what runs beside it longer; neither touches an all-to-all."""
    waits, held = {"waits_for_counts": True}, {"slowdown": "multiprocessors"}
    for backend in ("deepep", "alltoall"):
        policies = {"dispatch": {"backend": backend}, "schedule": "forward_backward"}
        plain = training_model(asked(policies=policies), 0)
        waiting = training_model(asked(policies=policies, training={"host": waits}), 0)
        slowed = training_model(asked(policies={**policies, "overlap": held}), 0)
        shares = [pair_share(one.layers, one.chunks) for one in (plain, waiting, slowed)]
        if backend == "alltoall":
            assert (shares[0] == shares[1]).all()
            assert (shares[0] == shares[2]).all()
        else:
            assert (shares[0] < shares[1]).all()
            assert (shares[0] < shares[2]).all()
            assert max(float(share.max()) for share in shares) <= 1.0


def test_the_host_is_not_hidden() -> None:
    busy = {"layer_s": 0.05}
    whole, paired = (
        simulate_training(scenario(name, host=busy, router="balanced"), draws=0).step.step_s
        for name in ("sequential", "forward_backward")
    )
    quick = simulate_training(scenario("sequential", router="balanced"), draws=0).step.step_s
    assert whole - paired < quick


def test_figures_still_sum_to_the_step() -> None:
    found = simulate_training(scenario(pipeline={"schedule": "interleaved", "virtual_stages": 2}), draws=8)
    step = training_json(found)["step"]
    assert sum(step["by_operation_s"].values()) == pytest.approx(step["step_s"], rel=1e-9)
    assert 0 <= step["bubble_share"] < 1
    assert step["exposed_communication_s"] >= 0
    times = np.asarray([one.step_s for one in found.drawn])
    assert times.min() < found.step.step_s < times.max()


def test_what_does_not_go_with_pairs() -> None:
    with pytest.raises(BadInput, match="zero_bubble splits them"):
        simulate_training(scenario(pipeline={"schedule": "zero_bubble"}), draws=0)
    fault = {"kind": "slow_gpu", "gpu": 0, "factor": 2.0}
    with pytest.raises(BadInput, match="faults under forward_backward"):
        simulate_training(asked(policies={"schedule": "forward_backward"}, faults=[fault]), draws=0)
    with pytest.raises(BadInput, match="is not explained"):
        explain_training(simulate_training(scenario(), draws=0))


def test_a_report_is_written_without_the_explanation(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    import yaml

    path, page = tmp_path / "t.yaml", tmp_path / "page.html"
    path.write_text(yaml.safe_dump(training(policies={"schedule": "forward_backward"})))
    assert run(["simulate", str(path), "--draws", "0", "--report", str(page)]) == 0
    assert page.stat().st_size > 1000
    assert run(["simulate", str(path), "--draws", "0", "--explain"]) == 2
    assert "is not explained" in capsys.readouterr().err
