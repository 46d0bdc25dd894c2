"""What is asked of a deployment: requests, arrivals, batching limits, service levels; or training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from moesim.spec.base import Spec
from moesim.spec.parallel import ParallelSpec


class PoissonSpec(Spec):
    """Open-loop arrivals at a constant mean rate for the whole cluster."""

    requests_per_s: float = Field(gt=0)


class GammaSpec(Spec):
    """Open-loop arrivals whose gaps are gamma distributed, as `vllm bench serve --burstiness` draws them."""

    requests_per_s: float = Field(gt=0)
    burstiness: float = Field(gt=0, description="shape of the gaps: 1 is Poisson, less is burstier, more is steadier")


class ArrivalsSpec(Spec):
    """Exactly one of `poisson` and `gamma` (open loop) and `concurrency` (closed loop)."""

    poisson: PoissonSpec | None = None
    gamma: GammaSpec | None = None
    concurrency: int | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _one(self) -> ArrivalsSpec:
        if sum(one is not None for one in (self.poisson, self.gamma, self.concurrency)) != 1:
            raise ValueError("give exactly one of poisson, gamma and concurrency")
        return self


class WorkloadSpec(Spec):
    """The requests: fixed lengths with arrivals, or a trace file.

    With a file, `requests` takes only its first ones, `arrivals` replaces its times, `speed` plays it faster.
    """

    isl: int | None = Field(default=None, gt=0, description="input tokens of a request")
    osl: int | None = Field(default=None, gt=0, description="output tokens of a request")
    requests: int | None = Field(default=None, gt=0)
    range_ratio: float = Field(
        default=1.0, gt=0, le=1, description="lengths are drawn evenly from range_ratio x isl (osl) to isl (osl)"
    )
    arrivals: ArrivalsSpec | None = None
    file: Path | None = None
    speed: float | None = Field(default=None, gt=0, description="of a trace file: 2 halves the time between requests")

    @model_validator(mode="after")
    def _complete(self) -> WorkloadSpec:
        if self.file is not None:
            if self.isl is not None or self.osl is not None:
                raise ValueError("a trace file brings its own isl and osl: leave them out")
            if self.range_ratio != 1.0:
                raise ValueError("a trace file brings its own lengths: leave range_ratio out")
            if self.speed is not None and self.arrivals is not None:
                raise ValueError("arrivals replace a trace file's times: leave speed out")
            return self
        if self.speed is not None:
            raise ValueError("speed is for a trace file: set the rate of the arrivals instead")
        missing = [name for name in ("isl", "osl", "requests", "arrivals") if getattr(self, name) is None]
        if missing:
            raise ValueError(f"without a trace file, {', '.join(missing)} must be given")
        return self


class BatchingSpec(Spec):
    """Batch limits, all for one attention-DP rank."""

    max_batch_tokens_per_dp_rank: int = Field(default=16384, gt=0)
    max_running_requests_per_dp_rank: int = Field(default=256, gt=0)
    chunked_prefill: bool = True
    mixed_chunk: bool | None = Field(default=None, description="prompts beside decoding; none = as the engine does it")
    prefix_cache: bool = Field(default=False, description="needs a trace file with block hashes")
    poll_steps: int = Field(
        default=1, gt=0, description="decode steps between looks at new requests (SGLang's --scheduler-recv-interval)"
    )
    hold_steps: int = Field(
        default=0, ge=0, description="steps that prompts wait for attention-DP ranks without one; reserve only"
    )
    gather_steps: int = Field(default=0, ge=0, description="steps that they wait then, for more of them")
    wait_steps: int = Field(
        default=0, ge=0, description="steps that prompts wait beside decoding, without attention DP, for a fuller batch"
    )
    wait_share: float = Field(default=0.0, ge=0, le=1, description="of the batch tokens, at which they wait no more")
    cuda_graph_sizes: Literal["engine", "none"] | tuple[Annotated[int, Field(gt=0)], ...] = "engine"


class SpeculativeSpec(Spec):
    """Speculative decoding by its mean acceptance rate."""

    method: Literal["mtp", "eagle", "draft"] = "mtp"
    draft_tokens: int = Field(gt=0)
    acceptance: float = Field(ge=0, le=1)


class MemorySpec(Spec):
    """How much of the GPU the engine may use."""

    fraction: float = Field(default=0.9, gt=0, le=1)
    fraction_of: Literal["all", "static", "free"] = Field(
        default="all",
        description="what `fraction` is a share of: all = of the GPU, for everything (vLLM's gpu_memory_utilization); "
        "static = of what is free before the weights come, for weights and cache (SGLang's mem_fraction_static); "
        "free = of what weights and buffers leave, for the cache (TensorRT-LLM's free_gpu_memory_fraction)",
    )
    reserved_bytes: float = Field(default=0.0, ge=0)
    admission: Literal["reserve", "engine"] = Field(
        default="reserve", description="reserve whole contexts, or as the engine does it, with preemption"
    )


class RoleSpec(Spec):
    """A pool of instances for one phase; what it leaves out comes from the scenario."""

    gpus: int = Field(gt=0, description="of one replica")
    replicas: int = Field(default=1, gt=0)
    parallel: ParallelSpec | None = None
    placement: dict[str, Any] | None = None
    policies: dict[str, Any] | None = None
    batching: dict[str, Any] | None = None
    precision: dict[str, Any] | None = None
    pipeline: dict[str, Any] | None = None


class RolesSpec(Spec):
    """Prefill and decode on pools of their own."""

    prefill: RoleSpec
    decode: RoleSpec
    transfer: Literal["after", "by_layer"] = Field(
        default="after", description="KV cache leaves when the prompt is read, or layer by layer while it is"
    )


class StagesSpec(Spec):
    """How an instance with `parallel.pp` over 1 runs its pipeline stages."""

    layers: tuple[Annotated[int, Field(gt=0)], ...] | None = Field(
        default=None, description="layers of each stage; none = as even as can be, by the engine's rule"
    )
    batches: int | None = Field(
        default=None, gt=0, description="batches of an instance under way at once; none = one for each stage"
    )
    running_requests_per_dp_rank: int | None = Field(
        default=None, gt=0, description="most requests of one batch; none = as the engine does it"
    )


class ServingSpec(Spec):
    """Serving: a workload and the engine's limits."""

    workload: WorkloadSpec
    batching: BatchingSpec = BatchingSpec()
    pipeline: StagesSpec = StagesSpec()
    balance: Literal["round_robin", "shortest_queue", "fewest_tokens", "central_queue"] = "round_robin"
    speculative: SpeculativeSpec | None = None
    memory: MemorySpec = MemorySpec()
    roles: RolesSpec | None = None

    @model_validator(mode="after")
    def _holds(self) -> ServingSpec:
        if self.batching.hold_steps and self.memory.admission == "engine":
            raise ValueError("hold_steps holds prompts back with memory.admission reserve only")
        if self.batching.gather_steps and not self.batching.hold_steps:
            raise ValueError("gather_steps needs hold_steps: prompts gather where they wait for each other")
        if self.batching.wait_steps and self.memory.admission == "engine":
            raise ValueError("wait_steps lets prompts wait with memory.admission reserve only")
        if bool(self.batching.wait_steps) != bool(self.batching.wait_share):
            raise ValueError("wait_steps and wait_share go together: how long prompts wait, and for how full a batch")
        return self


class PipelineSpec(Spec):
    """Pipeline schedule of training."""

    schedule: Literal["1f1b", "interleaved", "zero_bubble"] = "1f1b"
    virtual_stages: int = Field(default=1, gt=0)
    layers: tuple[Annotated[int, Field(gt=0)], ...] | None = Field(
        default=None, description="layers of each chunk (pp x virtual_stages of them); none = as even as can be"
    )


class OptimizerSpec(Spec):
    """Adam in mixed precision, and how gradients and parameters travel."""

    distributed: bool = Field(default=True, description="optimizer states divided over the data-parallel ranks")
    gradients: Literal["fp32", "bf16"] = Field(default="fp32", description="type gradients are kept and reduced in")
    overlap_gradients: bool = Field(default=False, description="reduce them during the last backward pass")
    overlap_parameters: bool = Field(default=False, description="gather parameters during the first forward pass")


class HostSpec(Spec):
    """What CPUs cost a training step beside its kernels; 0 = nothing, as where graphs are captured and GPUs ring NICs.

    `exchange_s` and the rows are of DeepEP's exchanges between nodes, where a CPU thread posts their writes (on EFA).
    """

    layer_s: float = Field(
        default=0.0, ge=0, description="host time with a layer's forward and backward pass that no kernel hides"
    )
    exchange_s: float = Field(default=0.0, ge=0, description="of each exchange: counts are told, writes begun")
    dispatch_row_s: float = Field(default=0.0, ge=0, description="of each token that a dispatch sends to another node")
    combine_row_s: float = Field(default=0.0, ge=0, description="of each token that a combine sends to another node")
    waits_for_counts: bool = Field(
        default=False, description="nothing is launched beside DeepEP's dispatch of a forward pass: the host waits"
    )

    @property
    def posts(self) -> bool:
        """Whether CPU threads post the writes of exchanges."""
        return max(self.exchange_s, self.dispatch_row_s, self.combine_row_s) > 0


RecomputeModule = Literal["core_attn", "layernorm", "moe_act", "moe", "mlp"]


class TrainingSpec(Spec):
    """Training: one global batch."""

    sequence_length: int = Field(gt=0)
    micro_batch: int = Field(default=1, gt=0)
    global_batch: int = Field(gt=0)
    recompute: Literal["none", "selective", "full"] = "selective"
    recompute_modules: tuple[RecomputeModule, ...] = Field(
        default=("core_attn",), min_length=1, description="what `recompute: selective` computes again"
    )
    pipeline: PipelineSpec = PipelineSpec()
    router: Literal["trace", "balanced"] = "trace"
    optimizer: OptimizerSpec = OptimizerSpec()
    host: HostSpec = HostSpec()
    memory: MemorySpec = MemorySpec()


class SloSpec(Spec):
    """Service levels; a limit that is left out does not bind."""

    ttft_p50_ms: float | None = Field(default=None, gt=0)
    ttft_p90_ms: float | None = Field(default=None, gt=0)
    ttft_p99_ms: float | None = Field(default=None, gt=0)
    tpot_p50_ms: float | None = Field(default=None, gt=0)
    tpot_p90_ms: float | None = Field(default=None, gt=0)
    tpot_p99_ms: float | None = Field(default=None, gt=0)
    e2e_p99_ms: float | None = Field(default=None, gt=0)

    def limits(self) -> dict[tuple[str, str], float]:
        """(metric, statistic) -> limit in seconds, e.g. ("ttft_s", "p99") -> 2.0."""
        found: dict[tuple[str, str], float] = {}
        for name, value in self:
            if value is not None:
                metric, statistic, _ = name.split("_")
                found[(f"{metric}_s", statistic)] = value / 1e3
        return found
