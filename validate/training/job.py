"""What `validate training` runs: a small MoE transformer, its layouts over the ranks, and one global batch."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from moesim.errors import BadInput
from moesim.network.rank_groups import RankGrid
from moesim.spec.base import Spec
from moesim.spec.parallel import ParallelSpec
from validate.hardware.job import Backend

WHERE = "validate training"
PRECISION = dict.fromkeys(("dense", "experts", "activations", "kv_cache", "dispatch", "combine"), "fp32")


class Shape(Spec):
    """A decoder of grouped-query attention with rotary positions; the first layer is dense, the others have experts."""

    layers: int = Field(default=6, gt=1)
    hidden: int = Field(default=256, gt=0)
    heads: int = Field(default=8, gt=0)
    kv_heads: int = Field(default=4, gt=0)
    head_dim: int = Field(default=32, gt=0, multiple_of=2)
    dense_intermediate: int = Field(default=768, gt=0)
    experts: int = Field(default=12, gt=1)
    top_k: int = Field(default=2, gt=0)
    intermediate: int = Field(default=256, gt=0)
    vocabulary: int = Field(default=2304, gt=0)

    def config(self) -> dict[str, Any]:
        """The same as a Hugging Face config.json, in the keys of Qwen3-MoE."""
        return {
            "_name_or_path": "small-moe",
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.dense_intermediate,
            "num_experts": self.experts,
            "num_experts_per_tok": self.top_k,
            "moe_intermediate_size": self.intermediate,
            "mlp_only_layers": [0],
            "decoder_sparse_step": 1,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": False,
        }


# What trains unless something else is asked for: on CPUs 15 million weights; on GPUs 466 million, 1.9 GB in float32 and
# four times that with gradients and Adam (all layouts of eight ranks together hold 34 GB on a GPU), experts that 64
# ranks divide, stages for eight. As many key-value heads as heads: torch's attention in float32 groups heads only by
# writing all scores out, and nobody trains by that.
SHAPES: dict[Backend, Shape] = {
    "gloo": Shape(),
    "nccl": Shape(
        layers=8, hidden=1024, heads=16, kv_heads=16, head_dim=64, dense_intermediate=4096, experts=64, top_k=4,
        intermediate=256, vocabulary=32768,
    ),
}  # fmt: skip
SEQUENCE_LENGTH: dict[Backend, int] = {"gloo": 256, "nccl": 2048}
GLOBAL_BATCH: dict[Backend, int] = {"gloo": 12, "nccl": 32}


class Layout(Spec):
    """How the ranks share the work: tensor, expert and pipeline parallelism, and copies of all that (instances).

    placement: how experts are laid on the EP ranks. layers: of each pipeline stage; none = as even as can be.
    """

    name: str
    tp: int = Field(default=1, gt=0)
    dp: int = Field(default=1, gt=0)
    pp: int = Field(default=1, gt=0)
    instances: int = Field(default=1, gt=0)
    placement: Literal["contiguous", "greedy"] = "contiguous"
    schedule: Literal["1f1b", "interleaved"] = "1f1b"
    virtual_stages: int = Field(default=1, gt=0)
    layers: tuple[int, ...] | None = None

    @property
    def ranks(self) -> int:
        """Of all instances."""
        return self.tp * self.dp * self.pp * self.instances

    @property
    def parallel(self) -> ParallelSpec:
        """Of one instance, as a scenario has it: experts spread over all ranks of a stage."""
        return ParallelSpec(tp=self.tp, pp=self.pp, attention_dp=self.dp, ep=self.tp * self.dp)

    @property
    def grid(self) -> RankGrid:
        """Which ranks form which group."""
        return RankGrid(self.parallel, self.instances, self.ranks)


class TrainingJob(Spec):
    """One validation of a training step.

    global_batch: sequences. bias: standard deviation of what is added to the gate's logits, by expert, so that experts
    are loaded unevenly. backend: of torch.distributed.
    """

    shape: Shape = Shape()
    layouts: tuple[Layout, ...] = Field(min_length=1)
    sequence_length: int = Field(default=256, gt=0)
    micro_batch: int = Field(default=1, gt=0)
    global_batch: int = Field(default=12, gt=0)
    bias: float = Field(default=0.5, ge=0)
    repeats: int = Field(default=9, ge=2)
    warmup: int = Field(default=2, ge=0)
    samples: int = Field(default=11, gt=0, description="of each operation of the profile, on each rank")
    sample_s: float = Field(default=0.02, gt=0, description="what a sample takes: several calls where one is shorter")
    seed: int = Field(default=0, ge=0, lt=2**31)
    backend: Backend = "gloo"
    stall_s: float = Field(default=120.0, gt=0)
    out: str = "runs/validate-training"

    @model_validator(mode="after")
    def _names(self) -> Self:
        names = [layout.name for layout in self.layouts]
        if len(set(names)) < len(names):
            raise ValueError("layouts need names of their own")
        return self

    def micro_batches(self, layout: Layout) -> int:
        """Micro-batches that a pipeline runs. Raises BadInput where the batch does not divide."""
        whole = self.micro_batch * layout.dp * layout.instances
        if self.global_batch % whole:
            raise BadInput(
                f"{self.global_batch} sequences do not divide into micro-batches of {self.micro_batch} on "
                f"{layout.dp * layout.instances} data-parallel ranks",
                where=f"layout {layout.name}",
                mend=f"use a global batch that is a multiple of {whole}",
            )
        return self.global_batch // whole


# The whole model and batch on one process: the reference of all layouts, and what the host's time is told from.
ONE = Layout(name="one process")


def _layouts() -> tuple[Layout, ...]:
    """Those of two, three and four ranks."""
    plain: dict[str, dict[str, Any]] = {
        "TP2 EP2": {"tp": 2},
        "DP2 EP2": {"dp": 2},
        "DP2 EP2, greedy": {"dp": 2, "placement": "greedy"},
        "DP2": {"instances": 2},
        "PP2": {"pp": 2},
        "PP2, interleaved": {"pp": 2, "schedule": "interleaved", "virtual_stages": 3},
        "DP3 EP3": {"dp": 3},
        "PP3": {"pp": 3},
        "TP2 PP2 EP2": {"tp": 2, "pp": 2},
        "DP2 PP2 EP2": {"dp": 2, "pp": 2},
        "TP2 DP2 EP4": {"tp": 2, "dp": 2},
        "DP4 EP4": {"dp": 4},
        "DP4 EP4, greedy": {"dp": 4, "placement": "greedy"},
        "TP4 EP4": {"tp": 4},
        "PP4": {"pp": 4},
        "two of DP2 EP2": {"dp": 2, "instances": 2},
        "two of PP2": {"pp": 2, "instances": 2},
    }
    return tuple(Layout(name=name, **keys) for name, keys in plain.items())


LAYOUTS = _layouts()

# Beyond four ranks: no more tensor parallelism than the ranks of a node, no more stages than layers.
WIDEST_TP = DEEPEST_PP = 8


def layouts_of(ranks: int) -> tuple[Layout, ...]:
    """The layouts of so many ranks: those listed above, and beyond four every split by powers of two.

    Then also: experts balanced, stages in turns of two, and copies of a smaller layout.
    """
    if ranks <= max(one.ranks for one in LAYOUTS):
        return tuple(one for one in LAYOUTS if one.ranks == ranks)
    powers = [2**power for power in range(ranks.bit_length())]
    found = [
        _named(tp, ranks // (pp * tp), pp)
        for pp in powers
        for tp in powers
        if ranks % (pp * tp) == 0 and pp <= DEEPEST_PP and tp <= WIDEST_TP
    ]
    found.append(_named(1, ranks, 1, placement="greedy"))
    if ranks % 2 == 0:
        half = ranks // 2
        found += [
            _named(1, half, 2, schedule="interleaved", virtual_stages=2),
            _named(1, half, 1, instances=2),
            *([_named(2, half // 2, 1, instances=2)] if half % 2 == 0 else []),
            _named(1, half // 2, 2, instances=2) if half % 2 == 0 else _named(1, 1, 2, instances=half),
            _named(1, 1, 1, instances=ranks),
        ]
    return tuple(found)


def _named(tp: int, dp: int, pp: int, **more: Any) -> Layout:
    """A layout under the name that tells it."""
    sizes = [f"{name}{size}" for name, size in (("TP", tp), ("DP", dp), ("PP", pp)) if size > 1]
    instances = int(more.get("instances", 1))
    if not sizes:
        return Layout(name=f"DP{instances}", **more)
    name = " ".join([*sizes, *([f"EP{tp * dp}"] if tp * dp > 1 else [])])
    name = f"{instances} of {name}" if instances > 1 else name
    extra = [str(more[key]) for key in ("placement", "schedule") if key in more]
    return Layout(name=", ".join([name, *extra]), tp=tp, dp=dp, pp=pp, **more)


def batch_of(backend: Backend, ranks: int) -> int:
    """Sequences of a step that layouts of so many ranks divide, where their number is a power of two."""
    return max(GLOBAL_BATCH[backend], 2 * ranks) if backend == "nccl" else GLOBAL_BATCH[backend]


def fitting(job: TrainingJob) -> tuple[TrainingJob, dict[str, str]]:
    """The job with those of its layouts that divide its model and batch, and why the others do not, by name."""
    wrong = {one.name: why for one in job.layouts if (why := _misfit(job, one))}
    kept = tuple(one for one in job.layouts if one.name not in wrong)
    return (job.model_copy(update={"layouts": kept}) if kept else job), wrong


def _misfit(job: TrainingJob, layout: Layout) -> str:
    shape, tp, ep = job.shape, layout.tp, layout.tp * layout.dp
    whole = job.micro_batch * layout.dp * layout.instances
    each = job.global_batch // whole
    rules = (
        (shape.kv_heads % tp, f"{shape.kv_heads} key-value heads do not divide by TP{tp}"),
        (shape.vocabulary % tp, f"a vocabulary of {shape.vocabulary} does not divide by TP{tp}"),
        (job.sequence_length % tp, f"{job.sequence_length} tokens do not divide by TP{tp}"),
        (shape.experts % ep, f"{shape.experts} experts do not divide by EP{ep}"),
        (job.global_batch % whole, f"{job.global_batch} sequences do not divide by {whole} at a time"),
        (layout.pp * layout.virtual_stages > shape.layers, f"{shape.layers} layers are too few for its stages"),
        (layout.schedule == "interleaved" and each % layout.pp, f"{each} micro-batches do not divide by PP{layout.pp}"),
    )
    return next((why for wrong, why in rules if wrong), "")
