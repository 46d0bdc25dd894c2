"""Check this installation, and a scenario if one is given, before anything long runs."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from moesim.errors import CheckFailed, Infeasible, MissingPart, MoesimError
from moesim.units import human_bytes

if TYPE_CHECKING:
    from moesim.spec.cluster import ClusterSpec
    from moesim.spec.model import ModelSpec
    from moesim.spec.parallel import ParallelSpec
    from moesim.spec.scenario import Scenario

DISTRIBUTION = "moesim"
PACKAGES = ("moesim", "profiles", "placement", "validate")
MIN_PYTHON = (3, 11)  # pyproject.toml, requires-python


@dataclass(frozen=True)
class Finding:
    """One line of the report. `absent` is for what is optional and not there; only `fault` fails the check."""

    check: str
    state: Literal["ok", "absent", "fault"]
    detail: str
    mend: str = ""

    def line(self) -> str:
        """The finding as a person reads it."""
        mark = {"ok": "ok     ", "absent": "absent ", "fault": "FAULT  "}[self.state]
        return f"{mark} {self.check}: {self.detail}" + (f"; {self.mend}" if self.mend else "")


def doctor(
    scenario: Annotated[Path | None, typer.Argument(help="A scenario to check as well.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check the installation, its extras and its GPUs, and a scenario if one is given."""
    findings = installation()
    error: MoesimError | None = None
    if scenario is not None:
        found, error = check_scenario(scenario)
        findings += found
    if as_json:
        typer.echo(json.dumps(_as_json(findings, error)))
    else:
        for finding in findings:
            typer.echo(finding.line())
    if error is not None:
        raise error
    faults = [finding for finding in findings if finding.state == "fault"]
    if faults:
        raise CheckFailed(
            f"{len(faults)} of {len(findings)} checks found a fault, first: {faults[0].check}: {faults[0].detail}",
            mend=faults[0].mend,
        )


def _as_json(findings: list[Finding], error: MoesimError | None) -> dict[str, object]:
    fault = any(finding.state == "fault" for finding in findings)
    return {
        "schema_version": 1,
        "ok": error is None and not fault,
        "findings": [asdict(finding) for finding in findings],
        "error": None if error is None else error.line(),
    }


def installation() -> list[Finding]:
    """Python, the distribution, its four packages, its extras and the GPUs of this machine."""
    return [python_version(), distribution(), *packages(), *extras(), *gpus()]


def python_version(version: tuple[int, int, int] | None = None) -> Finding:
    """Whether this Python is recent enough."""
    found = version or (sys.version_info.major, sys.version_info.minor, sys.version_info.micro)
    text = f"{platform.python_implementation()} {'.'.join(map(str, found))} on {os.cpu_count()} CPUs"
    if found[:2] < MIN_PYTHON:
        return Finding("python", "fault", text, f"use Python {MIN_PYTHON[0]}.{MIN_PYTHON[1]} or newer")
    return Finding("python", "ok", text)


def distribution() -> Finding:
    """Whether the distribution is installed, so that its commands, cost models and solvers are registered."""
    try:
        return Finding("distribution", "ok", f"{DISTRIBUTION} {metadata.version(DISTRIBUTION)}")
    except metadata.PackageNotFoundError:
        return Finding("distribution", "fault", f"{DISTRIBUTION} is not installed", "pip install .")


def packages(names: tuple[str, ...] = PACKAGES) -> list[Finding]:
    """Whether each top-level package is found in the folder that this distribution was imported from.

    Other distributions ship packages of the same names (configobj a `validate`); the first on sys.path wins.
    """
    home = Path(__file__).resolve().parents[2]
    findings = []
    for name in names:
        spec = importlib.util.find_spec(name)
        origin = None if spec is None or spec.origin is None else Path(spec.origin).resolve()
        if origin is None:
            findings.append(Finding(f"package {name}", "fault", "not found", "install moesim again"))
        elif origin.parent != home / name:
            mend = "install moesim in a virtual environment of its own"
            findings.append(Finding(f"package {name}", "fault", f"{origin} is not moesim's, which is in {home}", mend))
        else:
            findings.append(Finding(f"package {name}", "ok", str(origin.parent)))
    return findings


def extras() -> list[Finding]:
    """Which optional extras are complete, read from the distribution's own metadata; nothing is imported."""
    try:
        requirements = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return []
    wanted: dict[str, list[str]] = {}
    for requirement in requirements:
        extra = re.search(r"""extra\s*==\s*['"]([^'"]+)['"]""", requirement)
        name = re.match(r"[A-Za-z0-9._-]+", requirement)
        if extra and name:
            wanted.setdefault(extra.group(1), []).append(name.group(0))
    findings = []
    for extra_name, needed in sorted(wanted.items()):
        lacking = [name for name in needed if not _installed(name)]
        if lacking:
            command = f"pip install '.[{extra_name}]'"
            findings.append(Finding(f"extra {extra_name}", "absent", f"lacks {', '.join(lacking)}", command))
        else:
            findings.append(Finding(f"extra {extra_name}", "ok", ", ".join(needed)))
    return findings


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def gpus() -> list[Finding]:
    """The NVIDIA GPUs of this machine, through NVML (nvidia-ml-py)."""
    if not _installed("nvidia-ml-py"):
        return [Finding("gpu", "absent", "not looked for", "pip install '.[hardware]'")]
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return [Finding("gpu", "absent", f"no NVIDIA driver answers ({error})", "simulation needs none")]
    try:
        findings = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            name = pynvml.nvmlDeviceGetName(handle)
            total = int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
            findings.append(Finding(f"gpu {index}", "ok", f"{name}, {human_bytes(total)} ({total} bytes)"))
        return findings or [Finding("gpu", "absent", "the driver lists no GPU", "simulation needs none")]
    except pynvml.NVMLError as error:
        return [Finding("gpu", "fault", f"the driver answers with an error ({error})", "check nvidia-smi")]
    finally:
        pynvml.nvmlShutdown()


def check_scenario(path: Path) -> tuple[list[Finding], MoesimError | None]:
    """Whether a scenario's parts exist and fit: its files, parallelism, placement and memory.

    Returns what held up to the first error, and that error: BadInput (2), Infeasible (1) or MissingPart (3). No cost is
    looked up and no placement is solved.
    """
    findings: list[Finding] = []
    try:
        findings.extend(_scenario_findings(path))
    except MoesimError as error:
        return findings, error
    except ImportError as error:
        return findings, MissingPart(
            f"a part is not installed ({error})", where=str(path), mend="pip install moesim anew"
        )
    return findings, None


def _scenario_findings(path: Path) -> Iterator[Finding]:
    from moesim.engine.deployment import check_parallel, refuse_unsupported
    from moesim.spec.hf import load_model
    from moesim.spec.parallel import ParallelSpec
    from moesim.spec.presets import load_cluster
    from moesim.spec.scenario import load_scenario
    from moesim.systems.load import apply_system

    scenario = apply_system(load_scenario(path))
    refuse_unsupported(scenario)
    yield Finding("scenario", "ok", str(path))
    model = load_model(scenario.model)
    yield Finding("model", "ok", f"{model.id}, {model.parameters() / 1e9:.1f} billion parameters ({model.source})")
    cluster = load_cluster(scenario.cluster)
    yield Finding(
        "cluster", "ok", f"{cluster.name}, {cluster.nodes} nodes of {cluster.gpus_per_node} {cluster.gpu.name}"
    )
    yield from _registered(scenario)
    yield from _loads(scenario, model)
    parallel = scenario.parallel or ParallelSpec(attention_dp=cluster.gpus, ep=cluster.gpus)
    check_parallel(parallel, model, cluster, scenario.policies)
    instances = cluster.gpus // parallel.gpus
    yield Finding("parallel", "ok", f"{parallel.label()}, {instances} instance{'s' if instances > 1 else ''}")
    slots = _slots(scenario, model, parallel.ep)
    yield Finding("placement", "ok", f"{slots} slots of each layer on each of {parallel.ep} ranks")
    yield _memory(scenario, model, cluster, parallel, slots)


def _registered(scenario: Scenario) -> Iterator[Finding]:
    from moesim import plugins

    plugins.load(plugins.COSTS, scenario.cost.source, where="cost.source")
    yield Finding("cost model", "ok", scenario.cost.source)
    if scenario.placement.solver is not None:
        plugins.load(plugins.SOLVERS, scenario.placement.solver, where="placement.solver")
        yield Finding("solver", "ok", scenario.placement.solver)


def _loads(scenario: Scenario, model: ModelSpec) -> Iterator[Finding]:
    from moesim.routing.readers import read_loads

    for load in scenario.routing.loads or ():
        counts = read_loads(load.file, phase=load.phase, weight=load.weight, experts=model.moe.experts)
        _, layers, experts = counts.counts.shape
        yield Finding("loads", "ok", f"{load.file}: {layers} layers of {experts} experts")


def _slots(scenario: Scenario, model: ModelSpec, ep: int) -> int:
    if scenario.placement.file is not None:
        from moesim.engine.deployment import check_placement
        from moesim.spec.parallel import ParallelSpec
        from moesim.spec.placement_file import read_placement

        placement = read_placement(scenario.placement.file)
        check_placement(placement, model, scenario.parallel or ParallelSpec(attention_dp=ep, ep=ep))
        return placement.slots_per_rank
    slots = model.moe.experts + scenario.placement.redundant_experts
    if slots % ep:
        more = -(-slots // ep) * ep - model.moe.experts
        raise Infeasible(
            f"{slots} slots do not divide by ep {ep}",
            where="placement.redundant_experts",
            mend=f"use {more} redundant experts",
            reason="slots_not_divisible",
        )
    return slots // ep


def _memory(scenario: Scenario, model: ModelSpec, cluster: ClusterSpec, parallel: ParallelSpec, slots: int) -> Finding:
    from moesim.engine.memory import ledger

    serving = scenario.serving
    if serving is None:
        raise MissingPart("the memory of training is not counted yet", where="training", mend="give `serving` instead")
    workload = serving.workload
    counted = ledger(
        model,
        cluster,
        parallel,
        scenario.precision,
        slots,
        serving.batching,
        serving.memory,
        scenario.policies,
        max_context_tokens=int(workload.isl or 0) + int(workload.osl or 0),
    )
    return Finding(
        "memory",
        "ok",
        f"{human_bytes(counted.fixed_bytes)} of {human_bytes(counted.limit_bytes)} before the KV cache, "
        f"which holds {counted.kv_capacity_tokens} tokens of an attention-DP rank",
    )
