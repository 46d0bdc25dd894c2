"""Trials on a Ray cluster: one actor for each CPU that a batch can use, each with its own groundwork."""

from __future__ import annotations

import importlib.metadata
import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

from moesim.engine.deployment import groundwork
from moesim.errors import BadInput, MissingPart, MoesimError
from moesim.spec.scenario import Scenario
from placement.executors import THREAD_SETTINGS, Drawn, draw
from placement.objective import Evaluator, Outcome
from placement.plans import Plan

# More actors than this have nothing to do: a batch of the search has 8 plans.
MOST_ACTORS = 8
# Ray starts a lost actor anew, on another node if need be, and gives it its plan again, so often.
_RETRIES = 3
_START_S = 120.0


class RemoteEvaluator:
    """What an actor holds: one scenario's groundwork."""

    def __init__(self, scenario: Scenario, first_look: bool) -> None:
        self.evaluator = Evaluator(groundwork(scenario), scenario, first_look=first_look)

    def version(self) -> str:
        """The version of moesim on this node; answers when the groundwork is laid."""
        return importlib.metadata.version("moesim")

    def evaluate(self, plan: Plan) -> Outcome:
        """One outcome."""
        return self.evaluator.evaluate(plan)

    def settle(self, plan: Plan) -> Outcome:
        """The outcome of a full run."""
        return self.evaluator.settle(plan)

    def draw(self, plan: Plan, draws: int, metrics: tuple[str, ...]) -> Drawn:
        """Metrics as best known and under joint draws."""
        return draw(self.evaluator, plan, draws, metrics)


class RayWorkers:
    """Trials in actors. An actor that is lost, alone or with its node, starts anew and does its plan again."""

    def __init__(self, actors: Sequence[Any]) -> None:
        self.actors = list(actors)
        self.count = len(self.actors)

    def evaluate(self, plans: Sequence[Plan]) -> Iterator[Outcome]:
        """Outcomes of the plans, in their order, as they come."""
        return self._map(lambda actor, plan: actor.evaluate.remote(plan), plans)

    def settle(self, plans: Sequence[Plan]) -> list[Outcome]:
        """Outcomes of full runs, in their order."""
        return list(self._map(lambda actor, plan: actor.settle.remote(plan), plans))

    def draw(self, plans: Sequence[Plan], draws: int, metrics: Sequence[str]) -> list[Drawn]:
        """Metrics of each plan as best known (entry 0) and under the same joint draws."""
        return list(self._map(lambda actor, plan: actor.draw.remote(plan, draws, tuple(metrics)), plans))

    def _map(self, ask: Callable[[Any, Plan], Any], plans: Sequence[Plan]) -> Iterator[Any]:
        """Answers in order; a plan goes to the next idle actor, and to another when its own is lost for good."""
        import ray

        waiting, idle = list(enumerate(plans)), list(self.actors)
        running: dict[Any, tuple[int, Plan, Any]] = {}
        answers: dict[int, Any] = {}
        told = 0
        while told < len(plans):
            while waiting and idle:
                number, plan = waiting.pop(0)
                actor = idle.pop(0)
                running[ask(actor, plan)] = (number, plan, actor)
            done, _ = ray.wait(list(running), num_returns=1)
            number, plan, actor = running.pop(done[0])
            try:
                answers[number] = ray.get(done[0])
                idle.append(actor)
            except ray.exceptions.RayTaskError as error:
                raise (error.cause if isinstance(error.cause, MoesimError) else error) from None
            except ray.exceptions.RayActorError:
                self.actors.remove(actor)
                waiting.insert(0, (number, plan))
                if not self.actors:
                    raise MoesimError(
                        "all of Ray's workers are lost", mend="look after the cluster and go on with --resume"
                    ) from None
            while told in answers:
                yield answers.pop(told)
                told += 1


@contextmanager
def ray_workers(address: str, scenario: Scenario, *, first_look: bool, count: int) -> Iterator[RayWorkers]:
    """Actors on a cluster for the time of a run; `local` starts one here.

    count: at most so many actors; 1 sets no limit.
    Raises MissingPart without Ray, BadInput where no cluster answers or its moesim is another version.
    """
    # Nothing is told to anybody, and no copy of this environment is made anew on the nodes.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    try:
        import ray
    except ImportError:
        raise MissingPart("Ray is not installed", where="--ray", mend="pip install '.[ray]'") from None
    for name in THREAD_SETTINGS:
        os.environ.setdefault(name, "1")
    most = MOST_ACTORS if count == 1 else count
    cpus = count if count > 1 else len(os.sched_getaffinity(0))
    local = {"num_cpus": cpus, "include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address=address, logging_level="ERROR", log_to_driver=False, configure_logging=True, **local)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError, OSError) as error:
        raise BadInput(
            f"no Ray cluster answers ({type(error).__name__})",
            where=f"--ray {address}",
            mend="give HOST:PORT, or local",
        ) from None
    # Ray tells of lost workers on stdout, which belongs to --json.
    with redirect_stdout(io.StringIO()):
        try:
            yield RayWorkers(_started(scenario, first_look, most))
        finally:
            ray.shutdown()


def _started(scenario: Scenario, first_look: bool, most: int) -> list[Any]:
    """Actors that have laid their groundwork, as many as start in time."""
    import ray

    wanted = max(1, min(int(ray.cluster_resources().get("CPU", 1)), MOST_ACTORS, most))
    remote = ray.remote(
        num_cpus=1,
        max_restarts=_RETRIES,
        max_task_retries=_RETRIES,
        runtime_env={"env_vars": dict.fromkeys(THREAD_SETTINGS, "1")},
    )(RemoteEvaluator)
    asked = {actor.version.remote(): actor for actor in (remote.remote(scenario, first_look) for _ in range(wanted))}
    ready, _ = ray.wait(list(asked), num_returns=wanted, timeout=_START_S)
    here = importlib.metadata.version("moesim")
    try:
        versions = set(ray.get(ready))
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, MoesimError) else error) from None
    except ray.exceptions.RayError as error:
        raise BadInput(
            f"Ray's workers do not start ({type(error).__name__})",
            where="--ray",
            mend="install moesim and the scenario's files under the same paths on every node",
        ) from None
    if not ready:
        raise BadInput(
            f"no CPU of the Ray cluster became free in {_START_S:.0f} s", where="--ray", mend="wait, or add nodes"
        )
    if versions != {here}:
        raise BadInput(
            f"the cluster runs moesim {', '.join(sorted(versions - {here}))}, here it is {here}",
            where="--ray",
            mend="install the same version on every node",
        )
    return [asked[one] for one in ready]
