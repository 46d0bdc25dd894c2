"""Any training scenario that the specs accept runs, or is refused by name: never another error."""

from __future__ import annotations

import math
import re
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moesim.engine.training import simulate_training
from moesim.errors import MoesimError
from moesim.output.training_metrics import training_json
from moesim.output.training_page import training_page
from tests.training_scenarios import asked

MODELS = ("allenai/OLMoE-1B-7B-0924", "deepseek-ai/DeepSeek-V3", "openai/gpt-oss-120b", "mistralai/Mixtral-8x7B-v0.1")
SIZES = st.sampled_from([1, 1, 1, 2, 2, 4, 3])


@st.composite
def anything(draw: st.DrawFn) -> dict[str, Any]:
    tp, cp, pp, dp = (draw(SIZES) for _ in range(4))
    stage = tp * cp * dp
    etp = draw(st.sampled_from([size for size in (1, 1, 2, 3) if stage % size == 0]))
    return {
        "model": draw(st.sampled_from(MODELS)),
        "cluster": {
            "system": draw(st.sampled_from(["h200_sxm", "b200_sxm", "gb200_nvl72"])),
            "nodes": draw(st.sampled_from([64, 64, 2, 6])),
            "gpus_per_node": draw(st.sampled_from([8, 8, 4, 1])),
        },
        "precision": {"dense": draw(st.sampled_from(["bf16", "bf16", "fp8", "nvfp4"])), "experts": "fp8_block"},
        "parallel": {
            "tp": tp, "cp": cp, "pp": pp, "attention_dp": dp, "ep": stage // etp, "expert_tp": etp,
            "rank_order": draw(st.permutations(["tp", "cp", "dp", "pp"])),
        },
        "policies": {"dispatch": {"backend": draw(st.sampled_from(["alltoall", "deepep", "allgather_reducescatter"]))}},
        "training": {
            "sequence_length": draw(st.sampled_from([512, 4096, 768, 7])),
            "micro_batch": draw(st.sampled_from([1, 1, 2, 5])),
            "global_batch": draw(st.sampled_from([4096, 1536, 512])),
            "recompute": draw(st.sampled_from(["none", "selective", "full"])),
            "router": draw(st.sampled_from(["trace", "balanced"])),
            "pipeline": {
                "schedule": draw(st.sampled_from(["1f1b", "interleaved", "zero_bubble"])),
                "virtual_stages": draw(st.sampled_from([1, 1, 2, 40])),
            },
            "memory": {"fraction": draw(st.sampled_from([1.0, 1.0, 0.001]))},
        },
    }  # fmt: skip


def test_it_runs_or_is_refused_by_name() -> None:
    ran: list[float] = []

    @settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(changes=anything())
    def check(changes: dict[str, Any]) -> None:
        try:
            scenario = asked(**changes)
            run = simulate_training(scenario, draws=1)
        except MoesimError as refused:
            assert refused.mend
            assert "\n" not in refused.line()
            return
        result = training_json(run)
        assert math.isfinite(result["metrics"]["step_s"])
        assert 0 < result["metrics"]["mfu"] < 1
        assert not re.search(r"\bnan\b|\binf\b", training_page(scenario, result))
        ran.append(result["metrics"]["step_s"])

    check()
    assert len(ran) >= 5
