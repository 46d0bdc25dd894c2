"""Each rule that the launch scripts set, on a row that it is about and on one beside it that it is not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from moesim.errors import Infeasible
from profiles.store import DATA
from tests.silicon_rows import row
from validate.silicon.price import predict, run_in, run_of
from validate.silicon.rows import Layout, SiliconRow
from validate.silicon.scenario import scenario_of
from validate.silicon.settings import (
    FRONT_END_S,
    MTP_ACCEPTANCE,
    ONE_PROCESS_S,
    PROMPT_TOKEN_S,
    SGLANG_COLD_S,
    Settings,
    layout_of,
    settings_of,
)

R1, OSS, MINIMAX, KIMI = (
    "deepseek-ai/DeepSeek-R1",
    "openai/gpt-oss-120b",
    "MiniMaxAI/MiniMax-M2.5",
    "moonshotai/Kimi-K2.5",
)
TP8, ADP8 = Layout(8, 1, 1, 8, 1), Layout(1, 1, 8, 1, 8)


def one(**changes: Any) -> SiliconRow:
    """DeepSeek-R1 in FP8 on eight H200 at TP 8, 8 requests in flight; `load` sets batch and concurrency together."""
    load = changes.pop("load", None)
    if load is not None:
        layout = changes.get("layout", TP8)
        changes |= {"concurrency": load, "batch": max(1, load // layout.attention_dp)}
    return replace(row(0), **changes)


def told(**changes: Any) -> Settings:
    asked = one(**changes)
    return settings_of(asked, layout_of(asked))


@pytest.mark.parametrize(
    ("batch", "dp", "concurrency", "expected"),
    [
        (8, 1, 8, 8),
        (8, 4, 32, 32),
        (8, 1, 32, 8),  # four replicas of 8
        (8, 4, 64, 32),  # two replicas of four ranks of 8
        (8, 1, 12, 12),  # no multiple: the concurrency is what the source says
        (16, 1, 8, 8),  # a limit above what was in flight
        (1, 1, 64, 64),  # an empty batch_size reads as 1 and says nothing
        (8, 1, None, None),
    ],
)
def test_requests_in_flight_at_one_instance(batch: int, dp: int, concurrency: int | None, expected: int | None) -> None:
    asked = one(batch=batch, concurrency=concurrency, layout=Layout(8 // dp, 1, dp, 1, 8))
    assert asked.in_flight == expected
    assert replace(asked, mode="disagg").in_flight == concurrency


def test_replicas_are_simulated_and_scored_as_one_of_them() -> None:
    several, alone = one(batch=8, concurrency=32), one(batch=8, concurrency=8)
    workload = scenario_of(several, DATA).serving.workload  # type: ignore[union-attr]
    assert workload.arrivals.concurrency == 8  # type: ignore[union-attr]
    assert workload.requests == 80
    # Tokens/s/GPU are of one instance, as its GPUs are: 8 x 64 tokens in 1.63 s on 8 GPUs.
    assert several.throughput(1.0, 0.01) == pytest.approx(8 * 64 / 1.63 / 8) == alone.throughput(1.0, 0.01)


def test_rows_that_differ_in_what_is_in_flight_are_different_runs() -> None:
    assert run_of(one(batch=8, concurrency=32)) != run_of(one(batch=32, concurrency=32))
    assert run_of(one(batch=8, concurrency=32)) == run_of(one(batch=8, concurrency=32, id="again", tpot_ms=11.0))


def trt(**changes: Any) -> dict[str, Any]:
    return {"engine": "trtllm", "version": "1.1.0", **changes}


TEP8, TEP4, ADP4, TP4 = Layout(8, 1, 1, 1, 8), Layout(4, 1, 1, 1, 4), Layout(1, 1, 4, 1, 4), Layout(4, 1, 1, 4, 1)


@pytest.mark.parametrize(
    ("precision", "layout", "isl", "load", "expected"),
    [
        ("fp8", TP8, 1024, 4, TEP8),
        ("fp8", TP8, 1024, 64, TEP8),
        ("fp8", TP8, 1024, 65, ADP8),
        ("fp8", TP8, 8192, 32, TEP8),
        ("fp8", TP8, 8192, 33, ADP8),
        ("fp4", TP8, 1024, 15, TP8),
        ("fp4", TP8, 1024, 16, TEP8),
        ("fp4", TP4, 1024, 63, TP4),
        ("fp4", TP4, 1024, 64, TEP4),
        ("fp4", TP4, 1024, 255, TEP4),
        ("fp4", TP4, 1024, 256, ADP4),
        ("fp4", TP4, 8192, 4, TEP4),
        ("fp4", TP8, 8192, 63, TP8),
        ("fp4", TP8, 8192, 64, ADP8),
    ],
)
def test_early_scripts_of_tensorrt_llm_choose_the_layout_by_load(
    precision: str, layout: Layout, isl: int, load: int, expected: Layout
) -> None:
    asked = one(**trt(precision=precision, layout=layout, isl=isl, load=load, system="b200_sxm"))
    assert layout_of(asked) == expected
    for other in (
        {"version": "1.2.0rc6"},
        {"engine": "vllm", "version": "0.11.0"},
        {"model": OSS},
        {"source": "gap-analysis/data/x.csv"},
    ):
        assert layout_of(replace(asked, **other)) == layout


def test_a_row_that_states_attention_dp_keeps_its_layout() -> None:
    stated = Layout(1, 1, 8, 1, 8)
    assert layout_of(one(**trt(layout=stated, load=8))) == stated
    assert layout_of(one(**trt(layout=Layout(1, 1, 1, 1, 1), load=8))) == Layout(1, 1, 1, 1, 1)


POST3 = "1.2.0rc6.post3"
JANUARY = "db-dump; measured=2026-01-14T00:00:00Z"


@pytest.mark.parametrize(
    ("changes", "drafts"),
    [
        (trt(version=POST3), 3),
        (trt(version=POST3, layout=ADP8, load=64), 1),
        (trt(version="1.2.0rc6", source=JANUARY), 3),
        (trt(version="1.2.0rc6", source=JANUARY.replace("-14", "-15")), 0),
        (trt(version="1.2.0rc6.post2"), 0),
        (trt(version=POST3, model=OSS), 0),
        (trt(version=POST3, source="gap-analysis/data/x.csv"), 0),
        ({"engine": "vllm", "version": POST3}, 0),
    ],
)
def test_which_rows_draft(changes: dict[str, Any], drafts: int) -> None:
    found = told(**changes)
    assert found.drafts == drafts
    speculative = scenario_of(one(**changes), DATA).serving.speculative  # type: ignore[union-attr]
    if drafts:
        assert speculative is not None
        assert (speculative.draft_tokens, speculative.acceptance) == (drafts, MTP_ACCEPTANCE)
    else:
        assert speculative is None


@pytest.mark.parametrize(
    ("changes", "cold"),
    [
        ({"source": "measured=2025-11-03"}, True),
        ({"source": "measured=2026-01-28"}, True),
        ({"source": "measured=2025-11-02"}, False),
        ({"source": "measured=2026-01-29"}, False),
        ({"source": "no date"}, False),
        ({"source": "measured=2025-12-01", "system": "h200_sxm"}, False),
        ({"source": "measured=2025-12-01", "engine": "vllm"}, False),
        ({"source": "gap-analysis/data measured=2025-12-01"}, False),
    ],
)
def test_which_servers_were_cold(changes: dict[str, Any], cold: bool) -> None:
    assert told(**{"system": "b200_sxm", **changes}).cold_s == (SGLANG_COLD_S if cold else 0.0)


def test_a_cold_server_delays_the_first_wave_by_its_pause() -> None:
    """On H200 no server was cold, but a prediction takes the pause from the settings alone."""
    wave = {"isl": 4096, "osl": 8, "load": 16, "source": "measured=2025-12-01"}
    warm = predict(one(**wave), DATA)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("validate.silicon.settings._cold", lambda asked: True)
        cold = predict(one(**wave), DATA)
    assert warm.ttft_s is not None
    assert cold.ttft_s is not None
    # 160 requests; the prompts of the first full step of 32,768 tokens and those queued behind it wait for 70 s.
    waited = (cold.ttft_s - warm.ttft_s) * 160 / SGLANG_COLD_S
    assert waited == pytest.approx(round(waited), abs=0.05)
    assert 8 <= round(waited) <= 16


@pytest.mark.parametrize(
    ("changes", "seconds"),
    [
        (trt(), ONE_PROCESS_S),
        (trt(model=OSS), FRONT_END_S["trtllm"]),
        (trt(source="gap-analysis/data"), FRONT_END_S["trtllm"]),
        ({"engine": "vllm"}, FRONT_END_S["vllm"]),
        ({"engine": "sglang"}, FRONT_END_S["sglang"]),
        ({"engine": "another"}, 0.0),
    ],
)
def test_the_front_end_of_each_engine(changes: dict[str, Any], seconds: float) -> None:
    """And the tokenizer's time: prompts of 1,024 tokens nominally are 0.9 x 1,024 in the mean."""
    assert told(**changes, isl=1024).front_end_s == pytest.approx(seconds + 921.6 * PROMPT_TOKEN_S)
    assert told(**changes, isl=8192).front_end_s == pytest.approx(seconds + 7372.8 * PROMPT_TOKEN_S)


@pytest.mark.parametrize(
    ("changes", "gather"),
    [
        (trt(precision="fp4", system="b200_sxm"), "nvfp4"),
        ({"engine": "vllm", "model": KIMI, "precision": "fp4", "system": "b200_sxm"}, "nvfp4"),
        ({"engine": "sglang", "precision": "fp4", "system": "b200_sxm"}, None),
        (trt(precision="fp8", system="b200_sxm"), None),
        ({"engine": "vllm", "model": KIMI, "precision": "int4", "system": "b200_sxm"}, None),
    ],
)
def test_what_an_all_gather_sends(changes: dict[str, Any], gather: str | None) -> None:
    assert told(**changes).gather == gather


def test_the_gathered_type_reaches_the_scenario(tmp_path: Any) -> None:
    (tmp_path / "b200_sxm").mkdir()
    asked = one(**trt(precision="fp4", system="b200_sxm", layout=ADP8, load=64))
    assert scenario_of(asked, tmp_path).precision.gather == "nvfp4"
    assert scenario_of(replace(asked, engine="sglang"), tmp_path).precision.gather is None


@pytest.mark.parametrize(
    ("changes", "version"),
    [
        ({"version": "0.18.1"}, "0.19.0"),
        ({"version": "0.18.1", "system": "h200_sxm"}, "0.19.0"),
        ({"version": "0.19.0"}, None),
        ({"version": ""}, None),
        ({"version": "0.18.1", "precision": "fp4"}, None),
        ({"version": "0.18.1", "model": R1}, None),
        ({"version": "0.18.1", "engine": "sglang"}, None),
        ({"version": "0.18.1", "system": "h100_sxm"}, None),
    ],
)
def test_which_version_of_the_expert_kernels_ran(changes: dict[str, Any], version: str | None, tmp_path: Any) -> None:
    asked = {"engine": "vllm", "model": MINIMAX, "system": "b200_sxm", **changes}
    assert told(**asked).experts_version == version
    (tmp_path / asked["system"]).mkdir()
    assert scenario_of(one(**asked), tmp_path).cost.experts_version == version


@pytest.mark.parametrize(
    ("changes", "held", "balance"),
    [
        (trt(), (60, 0), "shortest_queue"),
        (trt(model=OSS), (50, 10), "shortest_queue"),
        ({"engine": "vllm"}, (0, 0), "shortest_queue"),
        ({"engine": "sglang"}, (0, 0), "round_robin"),
    ],
)
def test_how_prompts_meet_ranks(changes: dict[str, Any], held: tuple[int, int], balance: str) -> None:
    found = told(**changes)
    assert (found.hold_steps, found.gather_steps, found.balance) == (*held, balance)
    serving = scenario_of(one(**changes), DATA).serving
    assert serving is not None
    assert (serving.batching.hold_steps, serving.batching.gather_steps) == held
    assert serving.balance == balance


def test_every_rank_under_attention_dp_may_run_all_requests() -> None:
    """Requests in turn need not be even over ranks: the scripts' limit is the whole concurrency there."""
    assert told(layout=ADP8, load=64).running == 64
    assert told(layout=TP8, load=64).running == 64
    assert told(layout=Layout(2, 1, 4, 1, 8), load=32).running == 32


@pytest.mark.parametrize(
    ("changes", "kv"),
    [
        ({"precision": "fp4", "model": KIMI}, "fp8"),
        ({"precision": "fp4", "model": MINIMAX, "version": "0.18.0"}, "fp8"),
        ({"precision": "int4", "model": KIMI}, "bf16"),
        ({"model": MINIMAX, "version": "0.19.0"}, "fp8"),
        ({"model": MINIMAX, "version": "0.18.0"}, "bf16"),
        ({"model": R1}, "bf16"),
    ],
)
def test_types_of_vllms_caches(changes: dict[str, Any], kv: str) -> None:
    assert told(**{"engine": "vllm", "system": "b200_sxm", **changes}).kv == kv


@pytest.mark.parametrize(
    ("changes", "engine"),
    [
        (trt(precision="fp4"), "sglang"),
        (trt(precision="fp4", load=256), None),  # the script spreads attention: CUTLASS kernels
        (trt(precision="fp8"), None),
        (trt(precision="fp8", version="1.2.0"), "sglang"),
        (trt(model=OSS, precision="fp4"), None),
        (trt(precision="fp4", system="h200_sxm"), None),
        ({"engine": "vllm", "model": OSS, "precision": "fp4"}, "sglang"),
    ],
)
def test_whose_expert_kernels_ran(changes: dict[str, Any], engine: str | None) -> None:
    assert told(**{"system": "b200_sxm", **changes}).experts_from == engine


def test_racks_of_the_benchmark_ran_disaggregated(tmp_path: Any) -> None:
    (tmp_path / "gb200").mkdir()
    rack = one(system="gb200", layout=Layout(4, 1, 1, 1, 4), load=8)
    with pytest.raises(Infeasible, match="sums the GPUs of both pools") as error:
        scenario_of(rack, tmp_path)
    assert error.value.reason == "summed_pools"
    assert scenario_of(replace(rack, source="gap-analysis/data"), tmp_path).cluster.nodes == 1  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("changes", "kernel"),
    [
        ({"engine": "vllm", "model": OSS, "system": "h100_sxm"}, "wna16marlin"),
        ({"engine": "vllm", "model": OSS}, "wna16marlin"),
        ({"engine": "vllm", "model": OSS, "system": "b200_sxm"}, None),
        ({"engine": "vllm", "model": OSS, "source": "gap-analysis/data"}, None),
        ({"engine": "vllm", "model": MINIMAX}, None),
        (trt(model=OSS), None),
    ],
)
def test_whose_experts_are_marlin(changes: dict[str, Any], kernel: str | None, tmp_path: Any) -> None:
    """VLLM_MXFP4_USE_MARLIN=1 of the scripts for gpt-oss on Hopper."""
    assert told(**changes).experts_kernel == kernel
    (tmp_path / one(**changes).system).mkdir()
    assert scenario_of(one(**changes), tmp_path).cost.experts_kernel == kernel


@pytest.mark.parametrize(
    ("changes", "hidden"),
    [
        ({}, True),
        ({"load": 256}, False),
        ({"system": "h200_sxm"}, False),
        ({"engine": "trtllm"}, False),
        ({"model": KIMI}, False),
        ({"source": "gap-analysis/data"}, False),
    ],
)
def test_a_concurrency_that_was_only_the_clients_is_refused(
    changes: dict[str, Any], hidden: bool, tmp_path: Any
) -> None:
    """512 at once to a server of fewer places: gpt-oss on H100 had `--max-concurrency 512` written into its script."""
    asked = one(**({"engine": "vllm", "model": OSS, "system": "h100_sxm", "load": 512} | changes))
    (tmp_path / asked.system).mkdir()
    if hidden:
        with pytest.raises(Infeasible, match="fewer places"):
            scenario_of(asked, tmp_path)
    else:
        assert scenario_of(asked, tmp_path).serving is not None


@pytest.mark.parametrize(
    ("changes", "waits"),
    [
        ({}, (40, 0.8)),
        ({"load": 32}, (0, 0.0)),
        ({"osl": 8192}, (0, 0.0)),
        ({"version": "1.1.0"}, (0, 0.0)),
        ({"precision": "fp4"}, (0, 0.0)),
        ({"system": "h200_sxm"}, (0, 0.0)),
        ({"layout": ADP8}, (0, 0.0)),
    ],
)
def test_which_scripts_delay_batches(changes: dict[str, Any], waits: tuple[int, float], tmp_path: Any) -> None:
    base = {"precision": "fp8", "system": "b200_sxm", "version": "1.2.0", "isl": 1024, "osl": 1024, "load": 64}
    asked = one(**trt(**(base | changes)))
    found = settings_of(asked, layout_of(asked))
    assert (found.wait_steps, found.wait_share) == waits
    (tmp_path / asked.system).mkdir()
    batching = scenario_of(asked, tmp_path).serving.batching  # type: ignore[union-attr]
    assert (batching.wait_steps, batching.wait_share) == waits


@pytest.mark.parametrize(
    ("changes", "fraction", "of_what"),
    [
        ({}, 0.82, "static"),
        ({"system": "b200_sxm", "layout": Layout(4, 1, 1, 4, 1)}, 0.95, "static"),
        ({"precision": "fp4", "system": "b200_sxm"}, 0.85, "static"),
        (trt(), 0.75, "free"),
        (trt(system="b200_sxm"), 0.8, "free"),
        (trt(model=OSS), 0.85, "free"),
        ({"engine": "vllm", "model": OSS}, 0.9, "all"),
        ({"engine": "vllm", "model": MINIMAX}, 0.95, "all"),
        ({"engine": "vllm", "model": KIMI, "precision": "fp4"}, 0.9, "all"),
        (trt(source="gap-analysis/data"), 0.9, "free"),
    ],
)
def test_the_memory_options_of_the_scripts(
    changes: dict[str, Any], fraction: float, of_what: str, tmp_path: Any
) -> None:
    asked = one(**({"precision": "fp8"} | changes))
    (tmp_path / asked.system).mkdir()
    memory = scenario_of(asked, tmp_path).serving.memory  # type: ignore[union-attr]
    assert (memory.fraction, memory.fraction_of) == (fraction, of_what)


def test_how_many_prompts_the_client_sends(tmp_path: Any) -> None:
    (tmp_path / "h200_sxm").mkdir()
    for model, rounds in ((R1, 10), ("zhipuai/GLM-5", 5)):
        workload = scenario_of(one(model=model, load=32), tmp_path).serving.workload  # type: ignore[union-attr]
        assert workload.requests == rounds * 32


def test_one_measurement_in_two_dumps_is_one_run(tmp_path: Any) -> None:
    """Words and versions that no price hangs on tell no runs apart; what a client sees, lengths and layouts do."""
    (tmp_path / "h200_sxm").mkdir()
    told = [
        run_in(one(**changes), tmp_path)
        for changes in (
            {"source": "first; measured=2026-03-25"}, {"source": "second; measured=2026-03-26", "version": "0.5.10"},
            {"osl": 65}, {"load": 16}, {"engine": "vllm"}, {"layout": ADP8},
        )
    ]  # fmt: skip
    assert told[0] == told[1]
    assert len(set(told)) == 5
    cold = {"system": "b200_sxm", "precision": "fp4", "version": "0.5.5"}
    (tmp_path / "b200_sxm").mkdir()
    dates = ("measured=2025-12-01", "measured=2026-03-01")
    assert len({run_in(one(**cold, source=f"dump; {date}"), tmp_path) for date in dates}) == 2
    unsupported = one(layout=Layout(4, 1, 1, 2, 1))  # sizes that contradict each other
    assert run_in(unsupported, tmp_path) == run_of(unsupported)
