"""What covers what: a record that agrees in everything, and nothing less, makes a claim validated."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from moesim import plugins
from moesim.output.leanings import leanings, of_placement
from moesim.output.validation import (
    NEAREST,
    NOT_VALIDATED,
    VALIDATED,
    Covered,
    cover,
    evidence_of,
    validated_over_nodes,
    validation_json,
    validation_text,
)
from moesim.output.validation_page import validation_sections
from moesim.spec.evidence import CLAIMS, TRAITS, Evidence, Leaning, Trait, device_trait
from moesim.spec.hf import load_model
from moesim.spec.presets import load_cluster, presets
from moesim.spec.scenario import ClusterChoice, Scenario

# A plan on four nodes of eight H200, as a record that covers it would tell it.
ASKED: dict[str, Trait] = {
    "gpu": "H200", "exchange": "nccl alltoall", "nodes": 4, "cluster": "h200_sxm", "ranks": 32,
    "layer": "256 experts of 7168 x 2048, top-8", "experts_dtype": "bf16", "tokens_per_rank": (8, 512),
}  # fmt: skip
LEANING = Leaning("placement_gain", "placement gain on 32 GPUs of 4 nodes", ASKED)
OTHERS: dict[str, Trait] = {
    "gpu": "H100 80GB HBM3", "exchange": "gloo alltoall", "nodes": 1, "cluster": "another", "ranks": 8,
    "layer": "32 experts of 512 x 1024, top-4", "experts_dtype": "fp32", "tokens_per_rank": (8, 256),
}  # fmt: skip


def shown(
    name: str = "ours.json", error: float = 0.05, missed: tuple[str, ...] = (), **other: Trait | None
) -> Evidence:
    """Evidence that covers ASKED but for `other`; None leaves a trait out."""
    traits = {key: value for key, value in {**ASKED, **other}.items() if value is not None}
    return Evidence(
        claim="placement_gain", record=name, command="validate hardware", date="2026-11-26T05:00:00+00:00",
        traits=traits, cases=2, errors=(error, -error), between=(0.01, -0.01), missed=missed,
    )  # fmt: skip


def of(evidence: list[Evidence], leaning: Leaning = LEANING) -> Covered:
    (found,) = cover([leaning], evidence)
    return found


def test_a_record_that_agrees_in_everything_covers() -> None:
    found = of([shown()])
    assert (found.status, found.differs) == (VALIDATED, ())
    assert found.to_json()["records"] == ["ours.json"]
    assert found.to_json()["error"] == {
        "figure": "", "cases": 2, "mean": 0.05, "median": 0.05, "largest": 0.05, "between_median": 0.01, "others": {},
    }  # fmt: skip
    assert validated_over_nodes([found])


@pytest.mark.parametrize("name", TRAITS["placement_gain"])
def test_one_trait_that_differs_or_is_not_told_is_not_validated(name: str) -> None:
    for value, told in ((OTHERS[name], "instead of"), (None, "not told instead of")):
        found = of([shown(**{name: value})])
        assert (found.status, found.differs) == (NEAREST, (name,))
        assert told in found.to_json()["differs"][0]
        assert not validated_over_nodes([found])
        assert validation_text([found]).startswith("Not validated on hardware: placement gain over 4 nodes (nearest: ")


def test_a_record_of_another_claim_covers_nothing() -> None:
    other = shown().model_copy(update={"claim": "expert_time"})
    assert of([other]).status == NOT_VALIDATED
    assert of([]).to_json()["records"] == []
    assert validation_text([of([])]) == ("Not validated on hardware: placement gain over 4 nodes (nothing on record).")


def test_what_agrees_in_nothing_says_so() -> None:
    found = of([shown(**OTHERS)])
    assert (found.status, found.differs) == (NEAREST, TRAITS["placement_gain"])
    assert len(found.to_json()["differs"]) == len(TRAITS["placement_gain"])


def test_a_range_has_to_lie_inside_what_all_like_runs_ran_together() -> None:
    low, high = shown("low", tokens_per_rank=(8, 64)), shown("high", tokens_per_rank=(128, 1024))
    assert of([low]).differs == of([high]).differs == ("tokens_per_rank",)
    both = of([low, high])
    assert (both.status, both.to_json()["records"]) == (VALIDATED, ["low", "high"])
    # Runs of other hardware add nothing.
    assert of([low, shown("high", gpu="B200", tokens_per_rank=(128, 1024))]).status == NEAREST


def test_what_matters_most_decides_which_record_is_the_nearest() -> None:
    same_gpu = shown("gpu", exchange="gloo alltoall", nodes=1, cluster=None, ranks=8, layer="x")
    same_fabric = shown("fabric", gpu="CPU")
    assert of([same_fabric, same_gpu]).to_json()["records"] == ["gpu"]
    assert of([shown("lab", **{**OTHERS, "nodes": 4}), shown("pair", **{**OTHERS, "ranks": 32})]).to_json()[
        "records"
    ] == ["lab"]


def test_every_record_that_is_as_near_is_cited_the_bad_ones_too() -> None:
    found = of([shown("good", 0.01), shown("bad", 0.4, ("bad: regret: 9% (at most 5%)",)), shown("far", gpu="CPU")])
    told = found.to_json()
    assert told["records"] == ["good", "bad"]
    assert (told["error"]["cases"], told["error"]["largest"]) == (4, 0.4)
    assert told["missed"] == ["bad: regret: 9% (at most 5%)"]
    assert "1 limit missed" in validation_text([found])


def test_errors_that_are_told_as_a_mean_alone_are_weighed_by_cases() -> None:
    many = Evidence(claim="expert_time", record="a", traits={"gpu": "H200"}, cases=30, mean_absolute=0.1)
    few = Evidence(claim="expert_time", record="b", traits={"gpu": "H200"}, cases=10, mean_absolute=0.3)
    bare = Evidence(claim="expert_time", record="c", traits={"gpu": "H200"}, cases=4)
    error = of([many, few, bare], Leaning("expert_time", "x", {"gpu": "H200"})).error()
    assert error is not None
    assert (error["mean"], error["cases"], error["median"]) == (pytest.approx(0.15), 40, None)
    both = [many.model_copy(update={"others": {"TTFT": 0.2}}), few.model_copy(update={"others": {"TTFT": 0.6}}), bare]
    error = of(both, Leaning("expert_time", "x", {"gpu": "H200"})).error()
    assert error is not None and error["others"] == {"TTFT": pytest.approx(0.3)}
    assert of([bare], Leaning("expert_time", "x", {"gpu": "H200"})).error() is None


def test_all_that_happens_between_nodes_has_to_be_covered() -> None:
    inside = Leaning("exchange_time", "x", {"gpu": "H200", "nodes": 1})
    over = Leaning("exchange_time", "x", {"gpu": "H200", "nodes": 2})
    assert not validated_over_nodes(cover([inside], []))  # there is nothing that could have been
    assert validated_over_nodes(cover([LEANING, inside], [shown()]))
    assert not validated_over_nodes(cover([LEANING, over], [shown()]))


def test_each_claim_is_told_once_to_a_person_and_in_full_to_a_program() -> None:
    small = Leaning("placement_gain", "one node", {**ASKED, "nodes": 1})
    found = cover([small, LEANING, LEANING], [shown("lab", gpu="CPU", exchange="gloo two_level")])
    assert [one["of"] for one in validation_json(found)] == ["one node", LEANING.of]
    text = validation_text(found)
    assert text.count("placement gain") == 1
    assert "(nearest: validate hardware, CPU, gloo, 4 nodes: median error 5.0%, 1.0% between placements)" in text
    assert validation_text([]) == "" and validation_sections([]) == []
    (page,) = validation_sections(validation_json(found))
    assert "not validated; the nearest records" in page and "gpu: CPU instead of H200" in page


def scenario(**other: Any) -> Scenario:
    work = {"isl": 1024, "osl": 1024, "requests": 64, "arrivals": {"concurrency": 16}}
    found = {
        "model": "deepseek-ai/DeepSeek-V3", "cluster": {"system": "h200_sxm", "nodes": 4},
        "serving": {"workload": work}, **other,
    }  # fmt: skip
    return Scenario.read(found, where="test")


def claims(one: Scenario) -> dict[str, Leaning]:
    cluster = load_cluster(one.cluster)
    return {found.claim: found for found in leanings(one, cluster, load_model(one.model))}


def test_a_plan_leans_on_what_it_does() -> None:
    plain = claims(scenario())
    assert list(plain) == ["serving_time", "exchange_time", "expert_time"]
    assert plain["exchange_time"].traits["exchange"] == "DeepEP"
    assert plain["exchange_time"].traits["nodes"] == 4
    placed = claims(scenario(placement={"solver": "greedy"}))
    assert placed["placement_gain"].traits["tokens_per_rank"] == (1, 16384)
    assert placed["serving_time"].of.endswith("placement aside")
    one = claims(scenario(parallel={"tp": 8, "expert_tp": 8}, policies={"dispatch": {"backend": "allreduce"}}))
    assert one["exchange_time"].traits["nodes"] == 1 and "cluster" not in one["exchange_time"].traits
    assert one["serving_time"].traits["layout"] == "TP8 ETP8 allreduce"
    assert one["serving_time"].traits["concurrency"] == 4  # 16 over four instances
    rule = {"rule": "gshard", "factor": 1.0, "pad": False}
    capped = claims(scenario(policies={"capacity": rule}))["capacity_drops"]
    assert capped.traits == {"rule": "gshard", "drop": "choice", "backup": "none", "pad": "false"}


def test_experts_of_a_plan_in_stages_lean_on_the_gpus_of_one_stage() -> None:
    """Two stages of a node each: tokens travel inside a node, though the instance spans two."""
    placed = {"placement": {"solver": "robust"}}
    two = {"cluster": {"system": "h200_sxm", "nodes": 2}, "parallel": {"tp": 8, "pp": 2, "ep": 8}, **placed}
    one = {"cluster": {"system": "h200_sxm"}, "parallel": {"tp": 8, "ep": 8}, **placed}
    found, alone = claims(scenario(**two)), claims(scenario(**one))
    for name in ("exchange_time", "placement_gain"):
        assert (found[name].traits["nodes"], found[name].traits["ranks"]) == (1, 8)
        assert found[name].traits == alone[name].traits
    assert found["serving_time"].traits["layout"] != alone["serving_time"].traits["layout"]


def test_training_and_roles_lean_on_their_own() -> None:
    training = {"sequence_length": 4096, "micro_batch": 2, "global_batch": 64}
    one = Scenario.read(
        {"model": "deepseek-ai/DeepSeek-V3", "cluster": {"system": "h200_sxm", "nodes": 4}, "training": training},
        where="test",
    )
    found = claims(one)
    assert found["training_step"].traits["nodes"] == 4 and "serving_time" not in found
    work = {"isl": 1024, "osl": 1024, "requests": 64, "arrivals": {"poisson": {"requests_per_s": 1}}}
    roles = {"prefill": {"gpus": 8}, "decode": {"gpus": 16}}
    parts = scenario(serving={"workload": work, "roles": roles})
    cluster = load_cluster(parts.cluster)
    leans = leanings(parts, cluster, load_model(parts.model))
    assert leans[0].traits["layout"] == "prefill DP8 EP8 deepep; decode DP16 EP16 deepep"
    assert [one.traits["nodes"] for one in leans if one.claim == "exchange_time"] == [1, 2]


def test_measured_serving_runs_cover_their_own_deployment_and_no_other() -> None:
    """Runs of DeepSeek-V3 on eight H200 under SGLang, TP 8, are among those that the accuracy page scores."""
    ran = {
        "cluster": {"system": "h200_sxm"}, "parallel": {"tp": 8, "expert_tp": 8},
        "policies": {"dispatch": {"backend": "allreduce"}},
    }  # fmt: skip
    evidence = evidence_of(None)

    def status(**other: Any) -> tuple[str, tuple[str, ...]]:
        found = of(evidence, claims(scenario(**{**ran, **other}))["serving_time"])
        return found.status, found.differs

    assert status() == (VALIDATED, ())
    assert status(engine={"name": "vllm"})[0] == NEAREST
    assert status(cluster={"system": "h100_sxm"})[0] == NEAREST
    assert status(precision={"experts": "bf16"})[1] == ("experts_dtype",)
    assert status(policies={"dispatch": {"backend": "allreduce"}, "schedule": "two_batch"})[1] == ("layout",)
    for work, differs in (
        ({"isl": 1024, "osl": 1024, "arrivals": {"poisson": {"requests_per_s": 1}}}, ("concurrency",)),
        ({"isl": 1024, "osl": 1024, "arrivals": {"concurrency": 4096}}, ("concurrency",)),
        ({"isl": 100_000, "osl": 1024, "arrivals": {"concurrency": 16}}, ("isl",)),
    ):
        assert status(serving={"workload": {**work, "requests": 64}}) == (NEAREST, differs)


def test_what_ships_covers_no_placement_and_no_exchange_of_any_preset() -> None:
    """No hardware here has run expert parallelism on GPUs: whoever adds a record that says so changes this test."""
    evidence = evidence_of(None)
    for system in presets():
        for nodes in (1, 4):
            for backend in ("deepep", "alltoall"):
                one = scenario(
                    cluster={"system": system, "nodes": nodes}, policies={"dispatch": {"backend": backend}},
                    placement={"solver": "greedy"},
                )  # fmt: skip
                cluster = load_cluster(one.cluster)
                found = cover(of_placement(one, cluster, load_model(one.model), tokens=(8, 512)), evidence)
                assert {entry.status for entry in found} <= {NEAREST, NOT_VALIDATED}
                assert not validated_over_nodes(found)
                gain = next(entry for entry in found if entry.leaning.claim == "placement_gain")
                assert gain.to_json()["commands"] == ["validate fabric" if nodes > 1 else "validate hardware"]


def test_dropped_tokens_are_covered_on_any_hardware() -> None:
    evidence = evidence_of(None)
    for rule, drop in (("gshard", None), ("switch", None), ("megatron", "probability"), ("survey", "random")):
        one = scenario(policies={"capacity": {"rule": rule, "factor": 1.0, "drop": drop, "pad": False}})
        found = of(evidence, claims(one)["capacity_drops"])
        assert found.status == VALIDATED
        assert found.to_json()["error"]["mean"] == 0.0  # share of cases that differ in any token
        assert validation_text([found]) == (
            "Validated by records: dropped tokens (validate capacity: 12 cases, 0.0% of them differ)."
        )


def test_names_of_gpus() -> None:
    assert device_trait("NVIDIA H200") == "H200"
    assert device_trait("NVIDIA H100 80GB HBM3") != device_trait("NVIDIA H100 PCIe")
    assert device_trait("Intel(R) Xeon(R) Processor") == device_trait("AMD EPYC 9654") == "CPU"
    assert {device_trait(load_cluster(ClusterChoice(system=name)).gpu.name) for name in presets()} >= {"H200", "B200"}


def test_evidence_comes_from_every_registered_source(monkeypatch: pytest.MonkeyPatch) -> None:
    own = shown("third party")
    monkeypatch.setattr("moesim.output.validation.available", lambda group: {"other": None})
    monkeypatch.setattr("moesim.output.validation.load", lambda group, name: lambda scenario: [own])
    assert evidence_of(None) == [own]


def test_every_source_conforms() -> None:
    for name in plugins.available(plugins.RECORDS):
        found = plugins.load(plugins.RECORDS, name)(None)
        assert found and all(isinstance(one, Evidence) for one in found)
        assert {one.claim for one in found} <= set(CLAIMS)
        for one in found:
            assert set(one.traits) <= set(TRAITS[one.claim]), one.record


def test_reading_what_ships_imports_no_torch(repo: Path) -> None:
    code = (
        "import sys; from moesim.output.validation import evidence_of; assert evidence_of(None); "
        "sys.exit('torch' in sys.modules or 'optuna' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=repo.parent, check=False).returncode == 0


def test_the_section_of_a_page_is_well_formed() -> None:
    missed = tuple(f"{number}: regret & <order>" for number in range(6))
    records = [shown(f"{number} & <more>", gpu="CPU", missed=missed) for number in range(6)]
    (page,) = validation_sections(validation_json(cover([LEANING], records)))
    ET.fromstring(page)
    assert "and 2 more" in page
