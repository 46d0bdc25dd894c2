"""Request traces of three published layouts: what is read, and what is refused by file and line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from moesim.engine.request_traces import read_request_trace
from moesim.engine.workload import failed_requests, lengths, make_load
from moesim.errors import BadInput
from moesim.spec.workload import WorkloadSpec
from tests.damaged import damaged

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9151690,396,109
2023-11-17 00:00:00.0000000,12,1
"""
BURSTGPT = """Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type
5,a,1.5,ChatGPT,472,18,490,Conversation log
7.5,b,0.1,GPT-4,300,0,300,API log
45,c,2,ChatGPT,1087,230,1317,Conversation log
"""
MOONCAKE = """{"timestamp": 27482, "input_length": 1500, "output_length": 52, "hash_ids": [46, 47, 9]}
{"timestamp": 0, "input_length": 1024, "output_length": 5, "hash_ids": [46, 47]}
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "trace"
    path.write_text(text)
    return path


def test_azure(tmp_path: Path) -> None:
    trace = read_request_trace(written(tmp_path, AZURE))
    np.testing.assert_allclose(trace.arrival_s, [0.0, 4.234579, 20653.31941], atol=1e-6)
    assert trace.isl.tolist() == [374, 396, 12]
    assert trace.osl.tolist() == [44, 109, 1]
    assert (trace.layout, trace.failed, trace.blocks) == ("azure", 0, None)


def test_azure_of_2024_has_an_offset(tmp_path: Path) -> None:
    text = "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00+00:00,10,2\n2024-05-10 01:00:01.5+01:00,10,2\n"
    assert read_request_trace(written(tmp_path, text)).arrival_s.tolist() == [0.0, 1.5]


def test_burstgpt_leaves_failed_requests_out_and_says_so(tmp_path: Path) -> None:
    path = written(tmp_path, BURSTGPT)
    trace = read_request_trace(path)
    assert trace.arrival_s.tolist() == [0.0, 40.0]
    assert trace.isl.tolist() == [472, 1087]
    assert (trace.layout, trace.failed) == ("burstgpt", 1)
    assert failed_requests(WorkloadSpec(file=path)) == 1


def test_mooncake_is_sorted_by_time_with_its_blocks(tmp_path: Path) -> None:
    trace = read_request_trace(written(tmp_path, MOONCAKE))
    assert trace.arrival_s.tolist() == [0.0, 27.482]
    assert trace.isl.tolist() == [1024, 1500]
    assert trace.blocks is not None
    assert trace.blocks.offsets.tolist() == [0, 2, 5]
    assert trace.blocks.hashes.tolist() == [46, 47, 46, 47, 9]


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("a,b,c\n1,2,3\n", 1, "no known columns"),
        (AZURE.replace("396", "0"), 3, "ContextTokens"),
        (AZURE.replace("396", "39.5"), 3, "ContextTokens"),
        (AZURE.replace("18:15:50", "noon"), 3, "TIMESTAMP"),
        (AZURE.replace("396,109", "396"), 3, "2 cells under 3 columns"),
        (BURSTGPT.replace("7.5", "nan").replace(",0,300,", ",4,300,"), 3, "Timestamp"),
        (MOONCAKE.replace("[46, 47]", "[46, 47, 48]"), 2, "3 hash_ids for 1024 tokens"),
        (MOONCAKE.replace("[46, 47]", "[46, true]"), 2, "hash_ids"),
        (MOONCAKE.replace('"output_length": 5,', ""), 2, "output_length missing"),
        (MOONCAKE.replace('{"timestamp": 0', '{"timestamp" 0'), 2, "not a JSON object"),
    ],
)
def test_faults_are_told_by_line(tmp_path: Path, text: str, line: int, what: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(BadInput) as caught:
        read_request_trace(path)
    assert f"{path}:{line}: " in caught.value.line()
    assert what in caught.value.line()


@pytest.mark.parametrize("text", ["", AZURE.splitlines()[0] + "\n"])
def test_a_trace_without_requests_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(BadInput):
        read_request_trace(written(tmp_path, text))


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot read the request trace"):
        read_request_trace(tmp_path / "none")


@pytest.mark.parametrize("whole", [AZURE * 3, BURSTGPT * 3, MOONCAKE * 6])
def test_damaged_files_are_read_whole_or_refused_in_one_line(tmp_path: Path, whole: str) -> None:
    rng, refused = np.random.default_rng(0), 0
    path = tmp_path / "trace"
    for _ in range(700):
        path.write_bytes(damaged(whole.encode(), rng))
        try:
            trace = read_request_trace(path)
        except BadInput as error:
            refused += 1
            assert "\n" not in error.line()
            assert str(path) in error.line()
            continue
        assert (trace.isl >= 1).all()
        assert (trace.osl >= 1).all()
        assert (np.diff(trace.arrival_s) >= 0).all()
        assert np.isfinite(trace.arrival_s).all()
    assert 100 < refused < 700


def test_a_part_of_a_trace_faster_and_with_other_times(tmp_path: Path) -> None:
    path = written(tmp_path, MOONCAKE)
    assert lengths(WorkloadSpec(file=path)).longest_context == 1552
    assert lengths(WorkloadSpec(file=path, requests=1)).longest_context == 1029
    faster = make_load(WorkloadSpec(file=path, speed=2.0), 0)
    assert faster.arrival_s is not None
    assert faster.arrival_s.tolist() == [0.0, 13.741]
    assert faster.blocks is None
    closed = make_load(
        WorkloadSpec.model_validate({"file": path, "arrivals": {"concurrency": 1}}), 0, prefix_cache=True
    )
    assert closed.concurrency == 1
    assert closed.blocks is not None
    with pytest.raises(BadInput, match="has 2 requests, not 3"):
        make_load(WorkloadSpec(file=path, requests=3), 0)


def test_a_cache_needs_hashes(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no block hashes"):
        make_load(WorkloadSpec(file=written(tmp_path, AZURE)), 0, prefix_cache=True)


def test_the_published_files(shared_data: Path) -> None:
    azure = read_request_trace(shared_data / "requests" / "AzureLLMInferenceTrace_conv_2023.csv")
    mooncake_file = shared_data / "requests" / "mooncake_synthetic_trace.jsonl"
    mooncake = read_request_trace(mooncake_file)
    assert (len(azure.isl), len(mooncake.isl)) == (19366, 3993)
    assert mooncake.blocks is not None
    rows = [json.loads(line) for line in mooncake_file.read_text().splitlines()]
    assert mooncake.isl.sum() == sum(row["input_length"] for row in rows)
    assert len(mooncake.blocks.hashes) == sum(len(row["hash_ids"]) for row in rows)


def test_gamma_gaps_have_the_asked_burstiness() -> None:
    work = {"isl": 1, "osl": 1, "requests": 100_000}
    for burstiness in (0.25, 1.0, 4.0):
        arrivals = {"gamma": {"requests_per_s": 5.0, "burstiness": burstiness}}
        spec = WorkloadSpec.model_validate({**work, "arrivals": arrivals})
        times_s = make_load(spec, 0).arrival_s
        assert times_s is not None
        gaps = np.diff(times_s)
        assert gaps.mean() == pytest.approx(0.2, rel=0.02)
        assert gaps.var() / gaps.mean() ** 2 == pytest.approx(1 / burstiness, rel=0.05)
        again = make_load(spec, 0).arrival_s
        assert again is not None
        assert (again == times_s).all()
