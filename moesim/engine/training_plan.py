"""A training plan checked before anything is priced: legality, drawn routing, memory; and what many plans share."""

from __future__ import annotations

from dataclasses import dataclass, field

from moesim.engine.deployment import Groundwork, check_placement, lay_groundwork, place
from moesim.engine.routing_draws import RoutingDraws
from moesim.engine.training_checks import check_training, refuse_unsupported_training
from moesim.engine.training_faults import check_training_faults
from moesim.engine.training_memory import TrainingLedger, count_memory
from moesim.engine.training_routing import RoutingPool, draw_pool
from moesim.errors import BadInput
from moesim.graph.pipeline import PipelineProgram, layers_of_chunks, program
from moesim.graph.training_layer import TrainingSetup
from moesim.spec.maps.frame import MapFrame
from moesim.spec.parallel import ParallelSpec
from moesim.spec.placement_file import read_placement
from moesim.spec.plan import ExpertPlacement
from moesim.spec.scenario import Scenario
from moesim.systems.load import apply_system


@dataclass(frozen=True, eq=False)
class CheckedTraining:
    """A legal plan with its memory counted, but not yet held against the limit. chunks: layers of each model chunk."""

    ground: Groundwork
    setup: TrainingSetup
    routing: RoutingDraws
    pool: RoutingPool
    chunks: tuple[range, ...]
    program: PipelineProgram
    memory: TrainingLedger


@dataclass
class SharedTraining:
    """What the plans of one search have in common, by what it depends on: groundwork, placements, drawn routings.

    The plans may differ in everything but the model, the cluster, the routing, the costs' source and the seed.
    """

    grounds: dict[str, tuple[Groundwork, RoutingDraws]] = field(default_factory=dict)
    placements: dict[tuple[object, ...], ExpertPlacement] = field(default_factory=dict)
    pools: dict[tuple[object, ...], RoutingPool] = field(default_factory=dict)

    def ground(self, scenario: Scenario) -> tuple[str, Groundwork, RoutingDraws]:
        """A key of the groundwork, the groundwork, and the routing that is drawn on it."""
        parts = (scenario.engine, scenario.precision, scenario.policies.gate)
        key = "|".join(repr(part) for part in parts)
        if key not in self.grounds:
            ground = lay_groundwork(scenario)
            self.grounds[key] = (ground, RoutingDraws(ground.judge, ground.model.moe.top_k))
        return key, *self.grounds[key]


def checked_training(scenario: Scenario, seed: int, shared: SharedTraining) -> CheckedTraining:
    """Check a training scenario and count its memory. Raises BadInput and Infeasible (its reason is counted)."""
    scenario = apply_system(scenario)
    training = scenario.training
    if training is None:
        raise BadInput("this scenario does not train", where="training", mend="give `training`")
    refuse_unsupported_training(scenario)
    key, ground, routing = shared.ground(scenario)
    model, cluster = ground.model, ground.cluster
    parallel = scenario.parallel or ParallelSpec(attention_dp=cluster.gpus, ep=cluster.gpus)
    grid = check_training(parallel, model, cluster, scenario, training)
    check_training_faults(scenario.faults, grid)
    virtual = training.pipeline.virtual_stages
    chunks = layers_of_chunks(model.layers, parallel.pp * virtual, training.pipeline.layers)
    solved = (key, scenario.placement.model_dump_json(), parallel)
    if solved not in shared.placements:
        shared.placements[solved] = _placement(ground, scenario, parallel)
    setup = TrainingSetup(
        model=model,
        cluster=cluster,
        parallel=parallel,
        precision=scenario.precision,
        policies=scenario.policies,
        placement=shared.placements[solved],
        training=training,
        grid=grid,
    )
    drawn = (
        key,
        setup.group_tokens,
        setup.exchange_ranks,
        setup.local_rows,
        training.micro_batch * parallel.attention_dp,
        setup.micro_batches * grid.instances,
        training.router,
        scenario.policies.capacity,
        scenario.policies.dispatch.backend,
        seed,
    )
    if drawn not in shared.pools:
        shared.pools[drawn] = draw_pool(setup, routing, seed)
    pool = shared.pools[drawn]
    made = program(training.pipeline.schedule, parallel.pp, setup.micro_batches, virtual)
    memory = count_memory(setup, chunks, made, setup.placement.rank_loads(pool.counts))
    return CheckedTraining(ground, setup, routing, pool, chunks, made, memory)


def _placement(ground: Groundwork, scenario: Scenario, parallel: ParallelSpec) -> ExpertPlacement:
    """One expert to a slot over the EP ranks of a stage: from a map, or solved. Raises BadInput for replicas."""
    if scenario.placement.file is None:
        return place(ground, scenario.placement, parallel.model_copy(update={"pp": 1}))
    found = read_placement(scenario.placement.file, MapFrame.of(ground.model, parallel.ep))
    check_placement(found, ground.model, parallel)
    if found.redundant:
        raise BadInput(
            f"the map has {found.redundant} replicas, whose gradients would have to be summed",
            where="placement.file",
            mend="train with a map of one slot for each expert",
        )
    return found
