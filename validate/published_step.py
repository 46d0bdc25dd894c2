"""One serving step of a fixed batch, as the published figures count them: so many sequences on every rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from pydantic import Field, model_validator

from moesim.engine.batch_state import Plan, new_plan
from moesim.engine.deployment import Deployment, groundwork, resolve
from moesim.engine.speculative import verified
from moesim.engine.stepmodel import ExactModel, StepModel, batch_of_plan
from moesim.spec.base import Spec
from moesim.spec.scenario import Scenario

# Steps whose routing is drawn; a published rate is the mean of many.
STEPS = 8


class StepSpec(Spec):
    """The batch of every attention-DP rank: `seqs` prompts of `new` tokens behind `prefix`, or decodes on `kv`."""

    seqs: int = Field(gt=0)
    new: int = Field(default=0, ge=0)
    prefix: int = Field(default=0, ge=0)
    kv: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _one(self) -> StepSpec:
        if (self.new > 0) == (self.kv > 0):
            raise ValueError("give new for a step that reads prompts, kv for one that decodes")
        return self

    @property
    def reads(self) -> bool:
        """Whether the step reads prompts."""
        return self.new > 0


@dataclass(frozen=True)
class TimedStep:
    """step_s: mean over drawn routings. tokens: that the step brings on all ranks; gpus: that run it.

    exchange_s: seconds of one dispatch and of one combine of a micro-batch, mean over layers and steps.
    """

    step_s: float
    tokens: float
    gpus: int
    exchange_s: Mapping[str, float]

    @property
    def tokens_per_s_per_gpu(self) -> float:
        """Rate of one GPU."""
        return self.tokens / self.step_s / self.gpus


def time_step(scenario: Scenario, asked: StepSpec) -> TimedStep:
    """Time a step of a serving scenario, all ranks alike. Raises BadInput, Infeasible and OutsideProfile."""
    deployment = resolve(groundwork(scenario))
    exact = ExactModel(StepModel(deployment, seed=scenario.seed), "maxplus")
    plan = _plan(deployment, asked)
    step_s = float(np.mean([exact(plan) for _ in range(STEPS)]))
    parallel = deployment.setup.parallel
    return TimedStep(
        step_s=step_s,
        tokens=parallel.attention_dp * asked.seqs * _tokens_each(deployment, asked),
        gpus=parallel.gpus,
        exchange_s=_exchange_s(exact, asked, plan),
    )


def _plan(deployment: Deployment, asked: StepSpec) -> Plan:
    ranks = deployment.setup.parallel.attention_dp
    plan = new_plan(ranks, asked.seqs)
    seqs = np.full(ranks, asked.seqs, dtype=np.int64)
    if asked.reads:
        return plan._replace(
            prefill_seqs=seqs,
            prefill_tokens=seqs * asked.new,
            prefill_prefix=(np.asarray(seqs * float(asked.prefix), dtype=np.float64)),
        )
    return plan._replace(decode_seqs=seqs, decode_kv=np.asarray(seqs * float(asked.kv), dtype=np.float64))


def _tokens_each(deployment: Deployment, asked: StepSpec) -> float:
    """Tokens that a sequence gets from a step: its new ones, or one and the drafts that hold."""
    if asked.reads:
        return float(asked.new)
    drafting = deployment.serving.speculative
    if drafting is None:
        return 1.0
    return float(sum(drafting.acceptance**held for held in range(drafting.draft_tokens + 1)))


def _exchange_s(exact: ExactModel, asked: StepSpec, plan: Plan) -> dict[str, float]:
    batch = batch_of_plan(exact.model, verified(plan, exact.model.drafts))
    _, priced = exact.build(batch, "prefill" if asked.reads else "decode")
    return {
        name: float(np.mean([getattr(one, name).seconds().mean() for one in priced]))
        for name in ("dispatch", "combine")
    }
