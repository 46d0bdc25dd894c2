"""One serving step of a fixed batch, as the published figures count them: so many sequences on every rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import Field, model_validator

from moesim.engine.batch_state import Plan, new_plan
from moesim.engine.deployment import Deployment, groundwork, resolve
from moesim.engine.draws import joint_draws
from moesim.engine.speculative import verified
from moesim.engine.step_graph import step_graph
from moesim.engine.stepmodel import ExactModel, StepModel, batch_of_plan
from moesim.graph.priced_step import PricedStep
from moesim.graph.task import TaskGraph
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
    drawn: one step under each joint draw of the costs, its routing drawn, too.
    """

    step_s: float
    tokens: float
    gpus: int
    exchange_s: Mapping[str, float]
    drawn: tuple[TimedStep, ...] = ()

    @property
    def tokens_per_s_per_gpu(self) -> float:
        """Rate of one GPU."""
        return self.tokens / self.step_s / self.gpus


class _DrawnModel(ExactModel):
    """Times steps at the costs of a joint draw (a draft's own logits keep their plain price)."""

    normal: Mapping[str, float] | None = None

    def graph(self, priced: Sequence[PricedStep]) -> tuple[TaskGraph, list[PricedStep]]:
        """See `ExactModel.graph`."""
        plain, best = super().graph(priced)
        if self.normal is None:
            return plain, best
        return step_graph(self.model.deployment.setup, best, normal=self.normal), best


def time_step(scenario: Scenario, asked: StepSpec, draws: int = 0) -> TimedStep:
    """Time a step of a serving scenario, all ranks alike. Raises BadInput, Infeasible and OutsideProfile."""
    deployment = resolve(groundwork(scenario))
    exact = _DrawnModel(StepModel(deployment, seed=scenario.seed), "maxplus")
    plan = _plan(deployment, asked)
    parallel = deployment.setup.parallel
    tokens = parallel.attention_dp * asked.seqs * _tokens_each(deployment, asked)
    step_s = float(np.mean([exact(plan) for _ in range(STEPS)]))
    exchange_s = _exchange_s(exact, asked, plan)
    drawn = []
    for draw in joint_draws(draws, exact.model.routing.weights, scenario.seed):
        exact.normal = draw.normal
        drawn.append(TimedStep(exact(plan), tokens, parallel.gpus, _exchange_s(exact, asked, plan)))
    return TimedStep(step_s, tokens, parallel.gpus, exchange_s, tuple(drawn))


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


def _exchange_s(exact: _DrawnModel, asked: StepSpec, plan: Plan) -> dict[str, float]:
    batch = batch_of_plan(exact.model, verified(plan, exact.model.drafts))
    _, priced = exact.build(batch, "prefill" if asked.reads else "decode")
    return {
        name: float(np.mean([getattr(one, name).seconds(exact.normal).mean() for one in priced]))
        for name in ("dispatch", "combine")
    }
