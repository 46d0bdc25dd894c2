"""aiconfigurator in a process of its own: its sweep of a serving task, and its prices of single plans.

It is never imported: it lives in an environment of its own. Read and driven as of version 0.12.0, whose sweep writes
`agg/best_config_topn.csv` (its top plans) and `agg/pareto.csv`.
"""

from __future__ import annotations

import csv
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moesim.errors import BadInput, MissingPart, MoesimError
from moesim.spec.scenario import Scenario

NAMES = ("aiconfigurator", "aisimulate")
INSTALL = "install it in an environment of its own and name it: python -m venv AIC && AIC/bin/pip install aiconfigurator, then --executable AIC/bin/aiconfigurator"  # noqa: E501
SWEEP_LIMIT_S, PRICE_LIMIT_S = 900.0, 300.0


@dataclass(frozen=True)
class AicTask:
    """A serving task as both tools are asked it. ttft_ms, tpot_ms: aiconfigurator holds its averages against them."""

    model: str
    system: str
    gpus: int
    engine: str
    version: str
    isl: int
    osl: int
    ttft_ms: float
    tpot_ms: float

    def keywords(self) -> dict[str, Any]:
        """The task as aiconfigurator's `Task` takes it."""
        return {
            "model_path": self.model,
            "system_name": self.system,
            "backend_name": self.engine,
            "backend_version": self.version,
            "total_gpus": self.gpus,
            "isl": self.isl,
            "osl": self.osl,
            "ttft": self.ttft_ms,
            "tpot": self.tpot_ms,
        }

    def options(self) -> list[str]:
        """The task as options of `cli default`."""
        named = {
            "--model-path": self.model,
            "--system": self.system,
            "--total-gpus": self.gpus,
            "--backend": self.engine,
            "--backend-version": self.version,
            "--isl": self.isl,
            "--osl": self.osl,
            "--ttft": self.ttft_ms,
            "--tpot": self.tpot_ms,
        }
        return [word for name, value in named.items() for word in (name, str(value))]


@dataclass(frozen=True)
class AicPoint:
    """One engine instance of aiconfigurator's: its layout, requests of an attention-DP rank, tokens of a prefill."""

    tp: int
    attention_dp: int
    expert_tp: int
    ep: int
    batch: int
    context_tokens: int
    pp: int = 1
    cp: int = 1

    @property
    def gpus(self) -> int:
        """GPUs of the instance."""
        return self.tp * self.pp * self.cp * self.attention_dp

    @property
    def concurrency(self) -> int:
        """Requests in flight in the instance."""
        return self.batch * self.attention_dp * self.pp


@dataclass(frozen=True)
class AicRow:
    """A row of a sweep: an instance and what aiconfigurator predicts for it (averages, milliseconds, GiB)."""

    point: AicPoint
    ttft_ms: float
    tpot_ms: float
    tokens_per_s_per_gpu: float
    memory_gib: float
    kv_cache: str


@dataclass(frozen=True)
class AicPrice:
    """What aiconfigurator says of one plan by its sweep's rules; `error` is its reason for having no figure."""

    error: str | None = None
    ttft_ms: float = math.nan
    tpot_ms: float = math.nan
    tokens_per_s_per_gpu: float = math.nan
    memory_gib: float = math.nan
    out_of_memory: bool = False
    comm: Mapping[str, str] = field(default_factory=dict)
    kv_cache: str | None = None
    fmha: str | None = None
    power_law: float | None = None
    mixed_step_ms: float | None = None
    decode_step_ms: float | None = None
    mixed_steps: float | None = None
    decode_steps: float | None = None
    mixed_by_operation_ms: Mapping[str, float] = field(default_factory=dict)
    decode_by_operation_ms: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class AicSweep:
    """Top plans and Pareto rows of a sweep, and what it cost (CPU of all its processes)."""

    top: tuple[AicRow, ...]
    pareto: tuple[AicRow, ...]
    cpu_s: float
    wall_s: float


@dataclass(frozen=True)
class Ended:
    """A child process that ended by itself."""

    code: int
    out: str
    err: str
    cpu_s: float
    wall_s: float


def task_of(scenario: Scenario, gpus: int) -> AicTask:
    """The scenario's task in aiconfigurator's words. Raises BadInput where it has no such words."""
    serving = scenario.serving
    if serving is None or serving.roles is not None or serving.speculative is not None:
        raise BadInput("only serving on one kind of instance is compared", where="serving", mend="see the docs page")
    workload = serving.workload
    if workload.isl is None or workload.osl is None or workload.arrivals is None:
        raise BadInput("aiconfigurator takes fixed lengths", where="serving.workload", mend="give isl and osl")
    if workload.arrivals.concurrency is None:
        raise BadInput(
            "aiconfigurator knows closed loops only",
            where="serving.workload.arrivals",
            mend="give arrivals: {concurrency: N}",
        )
    if workload.range_ratio != 1.0:
        raise BadInput("aiconfigurator takes fixed lengths", where="serving.workload.range_ratio", mend="leave it out")
    if isinstance(scenario.cluster, Path):
        raise BadInput("the system needs a name", where="cluster", mend="give cluster: {system: ...}")
    if scenario.engine.name == "moesim":
        raise BadInput("aiconfigurator has no such engine", where="engine.name", mend="name sglang, vllm or trtllm")
    limits = {name: _tightest(scenario, name) for name in ("ttft_s", "tpot_s")}
    return AicTask(
        model=_model_name(str(scenario.model)),
        system=scenario.cluster.system,
        gpus=gpus,
        engine=scenario.engine.name,
        version=scenario.engine.version,
        isl=workload.isl,
        osl=workload.osl,
        ttft_ms=limits["ttft_s"] * 1e3,
        tpot_ms=limits["tpot_s"] * 1e3,
    )


def _tightest(scenario: Scenario, metric: str) -> float:
    found = [limit for (name, _), limit in scenario.objective.slo.limits().items() if name == metric]
    if not found:
        wanted = f"{metric.partition('_')[0]}_p50_ms"
        raise BadInput(f"a limit on {metric} is needed", where="objective.slo", mend=f"give {wanted}")
    return min(found)


def _model_name(name: str) -> str:
    return str(Path(name).resolve().parent) if name.endswith(".json") else name


def find_executable(given: Path | None = None) -> Path:
    """aiconfigurator's console script. Raises MissingPart where there is none, BadInput where the named one is none."""
    if given is not None:
        if not (given.is_file() and os.access(given, os.X_OK)):
            raise BadInput("no such program", where=f"--executable {given}", mend=INSTALL)
        return given
    beside = Path(sys.executable).parent
    for name in NAMES:
        found = shutil.which(name) or shutil.which(name, path=str(beside))
        if found is not None:
            return Path(found)
    raise MissingPart("aiconfigurator is not installed", mend=INSTALL)


def interpreter_of(executable: Path) -> Path:
    """The Python that a console script runs under: beside it, else by its first line. Raises BadInput."""
    beside = executable.resolve().parent / "python"
    if beside.exists():
        return beside
    with executable.open("rb") as file:
        first = file.readline(4096).decode("utf-8", "replace").strip()
    named = Path(first.removeprefix("#!").strip())
    if first.startswith("#!/") and "python" in named.name and named.exists():
        return named
    raise BadInput(
        "its Python interpreter is not beside it", where=str(executable), mend="name the script in its environment"
    )


def sweep(task: AicTask, executable: Path, folder: Path, *, top: int, limit_s: float = SWEEP_LIMIT_S) -> AicSweep:
    """Run aiconfigurator's own search; its files go below `folder`. Raises MoesimError with its last line."""
    command = [str(executable), "cli", "default", *task.options(), "--serving-mode", "agg", "--no-color"]
    ended = run_child([*command, "--save-dir", str(folder), "--top-n", str(top)], limit_s, what="aiconfigurator")
    found = sorted(folder.rglob("agg/best_config_topn.csv"))
    if ended.code != 0 or not found:
        raise MoesimError(
            f"aiconfigurator found no plan (exit {ended.code}: {_last_line(ended)})",
            where=" ".join(task.options()),
            mend="has it tables of this system, engine and version, and are the limits within reach?",
        )
    return AicSweep(
        top=read_rows(found[-1]),
        pareto=read_rows(found[-1].with_name("pareto.csv")),
        cpu_s=ended.cpu_s,
        wall_s=ended.wall_s,
    )


def price(
    task: AicTask, executable: Path, points: Sequence[AicPoint], *, limit_s: float = PRICE_LIMIT_S
) -> tuple[list[AicPrice], str, float]:
    """Prices of plans by the rules of the sweep, its version, and the CPU seconds. Raises MoesimError."""
    script = Path(__file__).with_name("price.py")
    asked = json.dumps({"task": task.keywords(), "points": [asdict(one) for one in points]})
    command = [str(interpreter_of(executable)), "-I", str(script)]
    ended = run_child(command, limit_s, what="aiconfigurator's pricing", told=asked)
    try:
        answer = json.loads(ended.out.strip().rsplit("\n", 1)[-1])
        found = [AicPrice(**one) for one in answer["points"]]
        version = str(answer["version"])
    except (ValueError, KeyError, TypeError):
        raise MoesimError(
            f"aiconfigurator could not price plans (exit {ended.code}: {_last_line(ended)})",
            where=str(executable),
            mend="is it version 0.12?",
        ) from None
    return found, version, ended.cpu_s


def run_child(command: Sequence[str], limit_s: float, *, what: str, told: str = "") -> Ended:
    """Run a program to its end, its CPU seconds with those of its children. Raises MoesimError past the limit."""
    before, started = _children_cpu_s(), time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1"}
    try:
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=environment,
            start_new_session=True,
        )
    except OSError as error:
        raise BadInput(f"{what} cannot be started ({error.strerror})", where=command[0], mend=INSTALL) from None
    try:
        out, err = child.communicate(told, timeout=limit_s)
    except subprocess.TimeoutExpired:
        raise MoesimError(
            f"{what} took over {limit_s:g} s", where=command[0], mend="give it more by --limit, or a smaller task"
        ) from None
    finally:
        if child.poll() is None:  # past its time, or Ctrl-C here: the child and its workers end with us
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
    return Ended(child.returncode, out, err, _children_cpu_s() - before, time.perf_counter() - started)


def _children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _last_line(ended: Ended) -> str:
    lines = [line.strip() for line in (ended.err + "\n" + ended.out).splitlines() if line.strip()]
    told = [line for line in lines if "Error" in line or "[E]" in line]
    return (told or lines or ["it said nothing"])[-1][:300]


def read_rows(path: Path) -> tuple[AicRow, ...]:
    """Rows of a CSV that a sweep wrote, in its order. Raises BadInput with the file and the line."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return tuple(_row(record) for record in csv.DictReader(file))
    except OSError as error:
        raise BadInput(f"cannot be read ({error.strerror})", where=str(path), mend="run the sweep again") from None
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise BadInput(
            f"is no table of aiconfigurator's ({type(error).__name__}: {error})",
            where=str(path),
            mend="version 0.12 writes tp, dp, moe_tp, moe_ep, bs, ctx_tokens, ttft, tpot, tokens/s/gpu, memory",
        ) from None


def _row(record: Mapping[str, str]) -> AicRow:
    def whole(name: str) -> int:
        value = float(record[name])
        if value < 1 or value != int(value):
            raise ValueError(f"{name} {record[name]}")
        return int(value)

    def number(name: str) -> float:
        value = float(record[name])
        if not math.isfinite(value) or value < 0:
            raise ValueError(f"{name} {record[name]}")
        return value

    point = AicPoint(
        tp=whole("tp"),
        attention_dp=whole("dp"),
        expert_tp=whole("moe_tp"),
        ep=whole("moe_ep"),
        batch=whole("bs"),
        context_tokens=whole("ctx_tokens"),
        pp=whole("pp"),
        cp=whole("cp"),
    )
    return AicRow(
        point, number("ttft"), number("tpot"), number("tokens/s/gpu"), number("memory"), str(record["kvcache"])
    )
