"""The measured cost model: prices operations from the profiles that a scenario names.

Inside the measured hull a price is measured (an exact point) or interpolated. Outside, it is an OutsideProfile error
that names the point and the command that measures it, unless the scenario says `extrapolate: allow`: then the nearest
measured price is carried on in proportion to the roofline formula and tagged `extrapolated`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moesim.cost.estimate import CostModel, Estimate, PricedBy, Tag, estimate
from moesim.cost.ops import (
    Attention,
    Collective,
    ExpertGemm,
    Gemm,
    MemoryBound,
    MlaAbsorb,
    MlaAttention,
    MoeExchange,
    Operation,
)
from moesim.cost.overlap import Slowdown
from moesim.cost.roofline import Roofline, family_of
from moesim.errors import BadInput, OutsideProfile
from moesim.spec.cluster import ClusterSpec
from moesim.spec.model import ModelSpec
from moesim.spec.scenario import Scenario
from profiles.elsewhere import elsewhere
from profiles.ep_between import exchanges_between
from profiles.error_law import NINETY
from profiles.experts import ExpertTable, expert_table, physics_name
from profiles.fit import OUTSIDE
from profiles.grouped import Physics, Shape
from profiles.lookup import (
    PROFILE,
    Priced,
    along,
    along_curve,
    along_rows,
    at_multiprocessors,
    between_shapes,
    by_experts,
    fastest,
    key_fields,
    key_of,
    never_free,
    nothing,
    on_grid,
    place_of,
    versions,
    where_key,
)
from profiles.nearest import nearest
from profiles.record import DEEPEP, MEASURED_ENGINE, PUBLISHED
from profiles.refusal import describe, mend, point_of
from profiles.slowdowns import slowdown_of
from profiles.store import DESCRIPTION, Profile
from profiles.whose import devices_of, notes_on, open_for, unasked

if TYPE_CHECKING:
    import polars as pl

Floats = NDArray[np.float64]
Tags = NDArray[np.int8]

# The number of multiprocessors that DeepEP's normal kernels use unless told otherwise: `Buffer.num_sms` in
# deepseek-ai/DeepEP, deep_ep/buffer.py.
DEEPEP_SMS = 20
# Uncertainty of a family whose leave-out error the profile does not tell, and of the formula of MemoryBound; assumed.
UNKNOWN_SIGMA = 0.25
# Points that a profile must have left out for their errors to count: of fewer, even the largest lies below the true
# 68 % quantile by chance in more than one case of twenty (0.68^8 = 0.046).
LEAST_ERRORS = 8
TINY_S = 1e-12  # keeps a ratio of formulas finite where both are 0
# Engines whose tables are asked, where extrapolation is allowed, for a kernel that an engine's own tables lack.
STAND_INS = ("sglang", "trtllm", "vllm")
# Engines whose tables serve another's: SGLang's prefill runs the expanded MLA that TensorRT-LLM's table measured.
MLA_PREFILL_ENGINES = {"sglang": ("sglang", "trtllm"), "trtllm": ("trtllm",), "vllm": ("vllm", "trtllm")}


def from_scenario(scenario: Scenario, model: ModelSpec, cluster: ClusterSpec) -> CostModel:
    """The cost model of the scenario's engine on its profiles. Raises BadInput when a profile cannot be opened."""
    shared = _shared(
        scenario.engine.name,
        scenario.cost.profiles,
        scenario.cost.extrapolate == "allow",
        cluster.model_dump_json(),
        scenario.cost.experts_from,
        scenario.cost.experts_version,
        scenario.cost.experts_kernel,
    )
    return dataclasses.replace(shared, answered=set())  # tables are shared; what answered is a run's own


@functools.lru_cache(maxsize=16)
def _shared(
    engine: str, names: tuple[str, ...], allow: bool, cluster: str, experts: str | None,
    version: str | None, kernel: str | None,
) -> StoreCosts:  # fmt: skip
    """One model for all scenarios alike: a tuner asks a thousand times."""
    if not names:
        raise BadInput("no profile is named", where="cost.profiles", mend="name `default` or a profile folder")
    spec = ClusterSpec.model_validate_json(cluster)
    profiles = tuple(open_for(name, spec) for name in names)
    roofline = Roofline(spec)
    return StoreCosts(profiles, engine, allow, roofline, experts, version, kernel, names)


def _in_order(found: Iterable[Priced]) -> tuple[Priced, ...]:
    """Tables in the order that they are asked: those of the very shape before what lies between other shapes.

    Only across profiles: within one a newer version between shapes still comes before an older one of the shape.
    """
    tables = tuple(found)
    if len({table.profile for table in tables}) < 2:
        return tables
    return tuple(sorted(tables, key=lambda table: table.stand_in))


def _held(table: Priced, op: Operation, last: int) -> tuple[Floats, Tags]:
    """Seconds and tags of a table; what lies below its smallest point is left to the profiles named after its own."""
    seconds, tags = table.price(op)
    if table.profile == last or table.under is None:
        return seconds, tags
    return seconds, np.where(table.under(op), OUTSIDE, tags).astype(np.int8)


@dataclass
class StoreCosts:
    """Prices operations from measured tables; implements CostModel. Prepared tables are kept by kernel and shape.

    names: the profiles as the scenario names them. answered: the places of those that a price came from so far.
    """

    profiles: tuple[Profile, ...]
    engine: str
    allow: bool
    roofline: Roofline
    experts_engine: str | None = None
    experts_version: str | None = None
    experts_kernel: str | None = None
    names: tuple[str, ...] = ()
    answered: set[int] = field(default_factory=set, repr=False)
    _prepared: dict[Any, tuple[Priced, ...]] = field(default_factory=dict, repr=False)
    _tables: dict[Any, Any] = field(default_factory=dict, repr=False)

    def estimate(self, operation: Operation) -> Estimate:
        """Price one operation, vectorised over its sizes. Raises OutsideProfile, BadInput."""
        if isinstance(operation, MemoryBound):
            return self._memory_bound(operation)
        # No table has training's grouped products; the contiguous kernel of serving engines is nearest to them.
        if isinstance(operation, ExpertGemm) and operation.grouping == "grouped":
            operation = dataclasses.replace(operation, grouping="deepep_normal")
        key = key_of(operation)
        found = self._prepared.get(key)
        if found is None:
            found = self._prepared[key] = _in_order(self._prepare(operation))
        if not found:
            return self._unmeasured(operation)
        last = max(table.profile for table in found)
        seconds, tags = _held(found[0], operation, last)
        source, sigma = found[0].source, found[0].sigma
        outside = tags == OUTSIDE
        answered = {found[0].profile} if not outside.all() else set()
        if outside.any():
            for older in found[1:]:
                more, more_tags = _held(older, operation, last)
                take = outside & (more_tags != OUTSIDE)
                if take.any():
                    seconds, tags = np.where(take, more, seconds), np.where(take, more_tags, tags).astype(np.int8)
                    source, sigma = f"{source}; {older.source}", max(sigma, older.sigma)
                    answered.add(older.profile)
                outside = tags == OUTSIDE
                if not outside.any():
                    break
        if outside.any():
            seconds, tags = self._carry_on(operation, found[0], seconds, tags)
            answered.add(found[0].profile)
        self.answered |= answered
        return Estimate(seconds, tags, family_of(operation), sigma, source)

    def overlap(self, work: str, gpus: int, nodes: int) -> Slowdown | None:
        """What a transfer and a product beside it were measured to cost each other; implements MeasuresOverlap.

        work: a collective's kind. The profile named first that holds such rows answers.
        """
        rows = self._rows("overlap", work=work, gpus=gpus, nodes=nodes)
        if rows.is_empty():
            return None
        return slowdown_of(rows.filter(rows[PROFILE] == rows[PROFILE].min()), work)

    def profiles_told(self) -> tuple[tuple[PricedBy, ...], tuple[str, ...]]:
        """The profiles, whether each answered so far, and what to know of them; implements TellsProfiles."""
        cluster = self.roofline.cluster
        found, notes = [], []
        for place, profile in enumerate(self.profiles):
            name = self.names[place] if self.names else profile.folder.name
            system = str(profile.description.get("system", ""))
            one = PricedBy(name, system, tuple(devices_of(profile)), place in self.answered)
            found.append(one)
            notes += notes_on(profile, name, cluster) if one.answered else [unasked(profile, name)]
        return tuple(found), tuple(notes)

    # What is prepared once for a kernel and shape, newest version first.

    def _prepare(self, op: Operation) -> Iterator[Priced]:
        match op:
            case Gemm():
                yield from self._gemm(op)
            case ExpertGemm():
                yield from self._experts(op)
            case Attention():
                yield from self._attention(op)
            case MlaAttention():
                yield from self._mla(op)
            case MlaAbsorb():
                yield from self._absorb(op)
            case Collective():
                yield from self._collective(op)
            case MoeExchange():
                yield from self._exchange(op)

    def _gemm(self, op: Gemm) -> Iterator[Priced]:
        rows = self._rows("gemm", dtype=op.dtype)
        for source, table in versions(rows):
            products = self.profiles[place_of(table)].products
            exact = where_key(table, n=op.n, k=op.k)
            if exact.height:
                yield along_rows(exact, source, self._sigma("gemm", exact), products)
                continue
            between = between_shapes(table, op.n, op.k, products)
            if between is not None:
                sigma = self._sigma("gemm_shape", table)
                priced = along_curve(between, "m", f"{source}, between shapes", sigma)
                yield dataclasses.replace(priced, profile=place_of(table), stand_in=True)

    def _experts(self, op: ExpertGemm) -> Iterator[Priced]:
        slots = int(op.tokens.shape[-1])
        related = self._expert_rows(op)
        rows = where_key(
            related, dtype=op.dtype, hidden=op.hidden, intermediate=op.intermediate, experts=op.experts, top_k=op.top_k
        )
        if self.experts_kernel is not None and self.allow and rows.is_empty():
            yield from elsewhere(op, related, self._expert_table, UNKNOWN_SIGMA)
        shape = Shape(op.hidden, op.intermediate, op.dtype, op.experts, op.top_k, op.grouping)
        for source, table in versions(rows):
            found = self._expert_table(shape, source, table)
            by_slots = None if found is None else found.at(slots)
            if by_slots is not None:
                sigma = self._sigma(f"experts_{op.grouping}", table)
                place = place_of(table)
                yield dataclasses.replace(
                    by_experts(by_slots, source, sigma, place),
                    stand_in=not by_slots.measured and len(self.profiles) > 1,
                )

    def _expert_rows(self, op: ExpertGemm) -> pl.DataFrame:
        """Rows of op's grouping, of the engine and version that the scenario names for experts.

        Of op's dtype or, where a kernel is named, of that kernel in any type. Raises BadInput where there is none.
        """
        import polars as pl

        version = {} if self.experts_version is None else {"version": self.experts_version}
        engines = None if self.experts_engine is None else (self.experts_engine,)
        rows = self._rows("experts", engines=engines, **version, grouping=op.grouping)
        if self.experts_kernel is None:
            return where_key(rows, dtype=op.dtype)
        named = rows.filter(pl.col("kernel").str.to_lowercase().str.contains(self.experts_kernel.lower(), literal=True))
        if named.is_empty():
            raise BadInput(
                f"no table of {self.engine} has experts of a kernel named *{self.experts_kernel}* ({op.grouping})",
                where="cost.experts_kernel",
                mend=f"name a part of one of: {', '.join(sorted(rows['kernel'].unique())) or 'none there'}",
            )
        return named

    def _expert_table(self, shape: Shape, source: str, table: pl.DataFrame) -> ExpertTable | None:
        """The balanced rows of one version, with fitted physics; kept for all numbers of local experts."""
        place = place_of(table)
        key = (shape, source, place)
        if key not in self._tables:
            fitted = self._physics(self.profiles[place], shape, table["engine"][0], table["version"][0])
            self._tables[key] = expert_table(shape, table, fitted)
        found: ExpertTable | None = self._tables[key]
        return found

    @staticmethod
    def _physics(profile: Profile, shape: Shape, engine: str, version: str) -> tuple[Physics, dict[int, float]] | None:
        stored = profile.description.get("physics", {}).get(physics_name(shape, engine, version))
        if stored is None:
            return None
        limits = {int(slots): float(value) for slots, value in stored["limits"].items()}
        try:
            return Physics(**stored["parameters"]), limits
        except TypeError:
            raise BadInput(
                "the physics of experts has other parameters than this version's",
                where=str(profile.folder / DESCRIPTION),
                mend="import the profile again",
            ) from None

    def _attention(self, op: Attention) -> Iterator[Priced]:
        family = f"attention_{op.phase}"
        rows = self._rows(
            family, kv_dtype=op.kv_dtype, heads=op.heads, kv_heads=op.kv_heads, head_dim=op.head_dim, window=op.window
        )
        exact = where_key(rows, dtype=op.dtype)
        # With an fp8 cache FlashAttention-3 takes fp8 queries, too: the prefill table has no other rows.
        yield from self._grids(exact if exact.height else where_key(rows, dtype=op.kv_dtype), op, op.phase, family)

    def _mla(self, op: MlaAttention) -> Iterator[Priced]:
        family = f"mla_{op.phase}"
        rows = self._rows(
            family,
            engines=MLA_PREFILL_ENGINES.get(self.engine) if op.phase == "prefill" else None,
            form="absorbed" if op.phase == "decode" else "expanded",
            dtype=op.dtype,
            kv_dtype=op.kv_dtype,
            heads=op.heads,
            kv_lora_rank=op.kv_lora_rank,
            qk_nope_head_dim=op.qk_nope_head_dim,
            qk_rope_head_dim=op.qk_rope_head_dim,
            value_head_dim=op.value_head_dim,
        )
        yield from self._grids(rows, op, op.phase, family)

    def _grids(self, rows: pl.DataFrame, op: Attention | MlaAttention, phase: str, family: str) -> Iterator[Priced]:
        size = "new_tokens" if phase == "prefill" else "kv_tokens"
        for source, table in versions(rows):
            formula = self._grid_formula(op, size) if self.allow else None
            yield on_grid(table, size, source, self._sigma(family, table), formula)

    def _grid_formula(self, op: Attention | MlaAttention, size: str) -> Callable[[Floats, Floats], Floats]:
        """Roofline seconds at (batch, size), to fill what the grid lacks where that is allowed."""

        def formula(batch: Floats, length: Floats) -> Floats:
            new = length if size == "new_tokens" else np.ones_like(length)
            at = dataclasses.replace(op, batch=batch, new_tokens=new, prefix_tokens=length - new)
            return self.roofline.seconds(at)

        return formula

    def _absorb(self, op: MlaAbsorb) -> Iterator[Priced]:
        # SGLang quantises these weights per tensor where the dense ones are block-scaled (bmm_fp8 in its MLA layer).
        dtype = "fp8" if op.dtype == "fp8_block" else op.dtype
        rows = self._rows(
            "mla_absorb",
            side=op.side,
            dtype=dtype,
            heads=op.heads,
            kv_lora_rank=op.kv_lora_rank,
            head_dim=op.head_dim,
        )
        for source, table in versions(rows):
            yield along(table, "tokens", source, self._sigma("mla_absorb", table))

    def _collective(self, op: Collective) -> Iterator[Priced]:
        if op.gpus == 1:
            yield Priced(lambda o: nothing(o.bytes), "one GPU", 0.0, "")
            return
        rows = self._rows(
            "collective", engines=("nccl", "rccl", "oneccl", self.engine), kind=op.kind, gpus=op.gpus, nodes=op.nodes
        )
        for place in range(len(self.profiles)):
            own = where_key(rows, **{PROFILE: place})
            if own.height:
                yield from self._paths(own, self._sigma("collective", own))

    @staticmethod
    def _paths(rows: pl.DataFrame, sigma: float) -> Iterator[Priced]:
        """One profile's collectives. Engines take their own all-reduce where it is the faster one and NCCL beyond.

        gloo, which only a measured profile holds, is asked last.
        """
        paths = []
        for path in ("nccl", "oneccl", "custom"):
            newest = next(iter(versions(where_key(rows, path=path))), None)
            if newest is not None:
                paths.append(along(newest[1], "bytes", newest[0], sigma))
        if len(paths) == 2:
            source = " or ".join(path.source for path in paths)
            yield dataclasses.replace(
                paths[0], price=lambda o: fastest(paths[0].price(o), paths[1].price(o)), source=source
            )
        else:
            yield from paths
        for source, table in versions(where_key(rows, path="gloo")):
            yield along(table, "bytes", source, sigma)

    def _exchange(self, op: MoeExchange) -> Iterator[Priced]:
        rows = self._rows(
            "exchange",
            engines=(self.engine, DEEPEP),
            step=op.step,
            mode=op.mode,
            hidden=op.hidden,
            top_k=op.top_k,
            experts=op.experts,
            dtype="fp8" if op.dtype == "fp8_block" else op.dtype,
        )
        exact = where_key(rows, nodes=op.nodes, ep=op.ep)
        sigma = functools.partial(self._sigma, f"exchange_{op.mode}")
        sms = 0 if op.mode == "low_latency" else DEEPEP_SMS
        if exact.height:
            tables = at_multiprocessors(versions(exact), sms)
            found: Iterator[Priced] = (along(table, "tokens", source, sigma(table)) for source, table in tables)
        else:
            tables = at_multiprocessors(versions(rows), sms)
            found = exchanges_between(op, self.roofline.cluster, tables, sigma=sigma, edges=self.allow)
        for priced in found:
            # An empty low-latency exchange still runs: the price of the smallest one measured.
            yield priced if op.mode == "normal" else dataclasses.replace(priced, price=never_free(priced.price))

    # Tables.

    def _rows(self, family: str, engines: Iterable[str] | None = None, **key: object) -> pl.DataFrame:
        """Rows of a family for this engine and key over all profiles, with the place of each in PROFILE.

        Rows measured here and published ones price for every engine: to name their profile is to ask for them.
        """
        import polars as pl

        wanted = (*(tuple(engines) if engines is not None else (self.engine,)), MEASURED_ENGINE, PUBLISHED)
        if (family, wanted) not in self._tables:
            tables = [
                profile.table(family).with_columns(pl.lit(place, dtype=pl.Int64).alias(PROFILE))
                for place, profile in enumerate(self.profiles)
            ]
            self._tables[family, wanted] = pl.concat(tables).filter(pl.col("engine").is_in(list(wanted)))
        return where_key(self._tables[family, wanted], **key)

    def _sigma(self, name: str, rows: pl.DataFrame) -> float:
        """One standard deviation of ln(true / predicted), from the leave-out errors of the rows' own profile.

        It is that of the normal whose 90 % interval holds nine of ten left-out errors: these have longer tails than a
        normal has, and 90 % is what results are told at.
        """
        found = self.profiles[place_of(rows)].errors(name)
        return found["p90"] / NINETY if found.get("points", 0.0) >= LEAST_ERRORS else UNKNOWN_SIGMA

    # Beyond the tables.

    def _memory_bound(self, op: MemoryBound) -> Estimate:
        source = f"bytes over {self.roofline.cluster.gpu.name}'s HBM and a launch"
        seconds = self.roofline.memory_bound(op.bytes)
        return estimate(seconds, Tag.FORMULA, "memory_bound", UNKNOWN_SIGMA, source)

    def _unmeasured(self, op: Operation) -> Estimate:
        """An operation whose kernel and shape no table holds."""
        if not self.allow:
            raise OutsideProfile(
                f"{describe(op)} is not measured for {self.engine}",
                where=self._names(),
                mend=mend(op),
            )
        stand_in = self._stand_in(op)
        if stand_in is not None:
            return stand_in
        near = self._near(op)
        if near is None:
            formula = self.roofline.estimate(op)
            return dataclasses.replace(formula, source=f"{formula.source} (no table holds {describe(op)})")
        priced = self.estimate(near)
        ratio = self.roofline.seconds(op) / np.maximum(self.roofline.seconds(near), TINY_S)
        tags = np.maximum(priced.tags, int(Tag.EXTRAPOLATED)).astype(np.int8)
        source = f"{priced.source}, scaled from {describe(near)}"
        # The table's error is that between its own points; another shape or kernel is as far off as the formula is.
        sigma = max(priced.rel_sigma, self.roofline.estimate(op).rel_sigma)
        return dataclasses.replace(priced, seconds=priced.seconds * ratio, tags=tags, rel_sigma=sigma, source=source)

    def _stand_in(self, op: Operation) -> Estimate | None:
        """The price of the very shape from another engine's table, or None: engines share many kernels."""
        key = ("stand-in", key_of(op))
        if key not in self._tables:
            others = (
                dataclasses.replace(self, engine=name, experts_version=None, _prepared={}, _tables={})
                for name in STAND_INS
            )
            kept = self._tables.setdefault("others", {other.engine: other for other in others})
            order = [name for name in STAND_INS if name != self.engine]
            self._tables[key] = next((kept[name] for name in order if any(True for _ in kept[name]._prepare(op))), None)
        other = self._tables[key]
        if other is None:
            return None
        other.answered.clear()
        priced: Estimate = other.estimate(op)
        self.answered |= other.answered
        tags = np.maximum(priced.tags, int(Tag.EXTRAPOLATED)).astype(np.int8)
        return dataclasses.replace(priced, tags=tags, source=f"{priced.source}, standing in for {self.engine}")

    def _near(self, op: Operation) -> Operation | None:
        """The operation at the nearest measured shape, or None; looked for once for a kernel and shape."""
        key = ("nearest", key_of(op))
        if key not in self._tables:
            found = nearest(op, self._rows)
            usable = found is not None and any(True for _ in self._prepare(found))
            kind: Any = type(op)
            names = key_fields(kind)
            self._tables[key] = {name: getattr(found, name) for name in names} if usable else None
        changes = self._tables[key]
        return None if changes is None else dataclasses.replace(op, **changes)

    def _carry_on(self, op: Operation, priced: Priced, seconds: Floats, tags: Tags) -> tuple[Floats, Tags]:
        """Points outside the hull: an error, or the nearest measured price in proportion to the roofline."""
        outside = tags == OUTSIDE
        if not self.allow:
            reached = priced.hull if priced.reach is None else priced.reach(op, outside)
            raise OutsideProfile(
                f"{describe(op)} at {point_of(op, outside)} lies outside what was measured ({reached})",
                where=self._names(),
                mend=mend(op, outside),
            )
        if priced.clamp is None:  # the table's own model has carried on
            carried = seconds
        else:
            nearest = priced.clamp(op)
            held, _ = priced.price(nearest)
            carried = held * self.roofline.seconds(op) / np.maximum(self.roofline.seconds(nearest), TINY_S)
        mixed = np.where(outside, carried, seconds)
        return mixed, np.where(outside, int(Tag.EXTRAPOLATED), tags).astype(np.int8)

    def _names(self) -> str:
        return "profile " + ", ".join(profile.folder.name for profile in self.profiles)
