"""Writing a placement as the files that an engine loads, with the flags to launch it."""

from __future__ import annotations

from pathlib import Path

from moesim.engine.context_layout import WHERE as CONTEXTS
from moesim.engine.context_layout import check_heads
from moesim.errors import BadInput, Infeasible
from moesim.files import write_text
from moesim.network.choice import CHOICES
from moesim.spec.hf import load_model
from moesim.spec.plan import ExpertPlacement
from moesim.spec.scenario import DispatchSpec, Scenario
from placement.export import megatron, sglang, trtllm, vllm, vllm_ascend
from placement.export.instance import Told, instances_of

ENGINES = ("sglang", "vllm", "trtllm", "megatron", "vllm-ascend")
FORMATS = ("moesim", "sglang", "trtllm", "vllm", "vllm-ascend")
# The schedules that each engine can be told to run; the flags are in its own module.
OVERLAPS = ("sequential", "two_batch")
# vllm-ascend takes vLLM's flag (its context parallel guide).
SPLIT_CONTEXTS = ("vllm", "vllm-ascend", "sglang")
SCHEDULES = {"vllm": (*OVERLAPS, "whole_graph")}
LAUNCH_FILE = "launch.txt"
TRANSFER = "how the engines move KV cache between the roles, and their router, are yours to set"


def write_map(placement: ExpertPlacement, form: str, path: Path, scenario: Scenario | None = None) -> None:
    """Write one map file in the format `form`. Raises BadInput for a format that is not there, and the format's own.

    scenario: what the map is for; TensorRT-LLM's holds the layers of its drafts too.
    """
    check_name(form, path)
    if form == "moesim":
        placement.write(path)
    elif form == "sglang":
        sglang.write(placement, path)
    elif form == "trtllm":
        trtllm.write(placement, path, scenario)
    elif form == "vllm-ascend":
        vllm_ascend.write(placement, path)
    elif form == "vllm":
        vllm.write(placement, path)
    else:
        raise BadInput(f"unknown format {form!r}", where="--format", mend=f"use one of: {', '.join(FORMATS)}")


def check_name(form: str, path: Path) -> None:
    """Whether the engine takes a file of this name for a map. Raises BadInput where it goes by another suffix."""
    if form in ("sglang", "vllm-ascend") and path.suffix != ".json":
        raise BadInput(
            f"{form} reads a map only from a name that ends in .json", where=str(path),
            mend=f"use {path.with_suffix('.json').name}",
        )  # fmt: skip


def export_placement(
    placement: ExpertPlacement,
    engine: str,
    folder: Path,
    scenario: Scenario | None = None,
    *,
    role: str = "",
    told: Told | None = None,
) -> list[Path]:
    """Write the engine's map (where it loads one) and `launch.txt` into `folder`; returns the files written.

    role: `prefill` or `decode` for a pool of a plan with roles; how KV cache moves between them is not written.
    told: what was said beside a map, which has no scenario.
    Everything is rendered and checked before the first file is written. Raises BadInput for an unknown engine,
    Infeasible where the engine cannot load the placement or lacks the plan's schedule or storage.
    """
    folder = Path(folder)
    if scenario is not None:
        check_schedule(engine, scenario)
        check_contexts(engine, scenario)
        refuse_dispatch(engine, scenario.policies.dispatch)
    told = told or Told()
    note = told.note(placement.ranks) if scenario is None else instances_of(placement, scenario).note()
    if role:
        note = "; ".join(filter(None, [f"the {role} role: {TRANSFER}", note]))
    if engine == "sglang":
        lines = sglang.launch(placement, scenario, role=role, told=told)
        sglang.write(placement, folder / sglang.FILE)
        return [folder / sglang.FILE, write_launch(folder, lines, note=note)]
    if engine == "trtllm":
        options = trtllm.options(placement, scenario)
        map_file = [folder / trtllm.FILE] if trtllm.takes_map(placement, scenario) else []
        for path in map_file:
            trtllm.write(placement, path, scenario)
        write_text(folder / trtllm.OPTIONS_FILE, options)
        launch = write_launch(folder, trtllm.launch(placement, scenario, told), note=note)
        return [*map_file, folder / trtllm.OPTIONS_FILE, launch]
    if engine == "vllm-ascend":
        vllm_ascend.write(placement, folder / vllm_ascend.FILE)
        note = "; ".join(filter(None, [vllm_ascend.WEIGHTS, note]))
        launch = write_launch(folder, vllm_ascend.launch(placement, scenario, told), note=note)
        return [folder / vllm_ascend.FILE, launch]
    if engine == "vllm":
        return [
            write_launch(
                folder,
                vllm.launch(placement, scenario, told),
                note="; ".join(filter(None, [vllm.note(placement, scenario), note])),
            )
        ]
    if engine == "megatron":
        return [write_launch(folder, megatron.launch(placement, scenario))]
    raise BadInput(f"unknown engine {engine!r}", where="--engine", mend=f"use one of: {', '.join(ENGINES)}")


def check_schedule(engine: str, scenario: Scenario) -> None:
    """Whether the engine has the plan's schedule and storage. Raises Infeasible."""
    policies = scenario.policies
    if policies.schedule not in SCHEDULES.get(engine, OVERLAPS):
        raise Infeasible(
            f"{engine} has no schedule {policies.schedule}",
            where="policies.schedule",
            mend=f"plan with {' or '.join(SCHEDULES.get(engine, OVERLAPS))}",
            reason="engine_lacks_schedule",
        )
    if policies.storage != "resident":
        raise Infeasible(
            f"{engine} has no flags for expert weights under storage {policies.storage}",
            where="policies.storage",
            mend="plan with storage resident",
            reason="engine_lacks_storage",
        )


def check_contexts(engine: str, scenario: Scenario) -> None:
    """Whether the engine splits contexts as the plan does. Raises Infeasible."""
    parallel = scenario.parallel
    if parallel is None or parallel.decode_cp == 1:
        return
    if engine not in SPLIT_CONTEXTS:
        raise Infeasible(
            f"{engine} cannot split contexts over GPUs of a TP group",
            where=CONTEXTS,
            mend=f"export to {' or '.join(SPLIT_CONTEXTS)}, or plan with decode_cp 1",
            reason="engine_layout",
        )
    check_heads(parallel, load_model(scenario.model), "vllm" if engine == "vllm-ascend" else engine)


def refuse_dispatch(engine: str, dispatch: DispatchSpec) -> None:
    """Whether an engine has the dispatch that a plan was judged with. Raises Infeasible for one that no flag sets.

    Megatron-Core's all-to-all dispatcher is TP-deduplicated: it sends each TP rank's part of the tokens and gathers
    inside the expert's group (megatron/core/transformer/moe/token_dispatcher.py).
    """
    lacking = []
    if dispatch.backend == "two_level" or (dispatch.backend == "tp_dedup" and engine != "megatron"):
        lacking.append(f"backend {dispatch.backend}")
    if not CHOICES[dispatch.replica].fixed:
        lacking.append(f"replica {dispatch.replica}")
    if dispatch.compression is not None:
        lacking.append("compression")
    if lacking:
        raise Infeasible(
            f"{engine} has no flag for {' and '.join(lacking)}",
            where="policies.dispatch",
            mend="export a plan that was judged without it",
        )


def write_launch(folder: Path, lines: list[str], *, note: str = "") -> Path:
    """Write launch.txt, one flag a line, joined as a shell reads it."""
    path = folder / LAUNCH_FILE
    head = "".join(f"# {line}\n" for line in ("run in this folder", *note.split("; ")) if line)
    write_text(path, head + " \\\n  ".join(lines) + "\n")
    return path
