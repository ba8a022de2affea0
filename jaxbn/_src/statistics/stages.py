"""Consistent statistics: stage by stage, each batch goes through the network once, as far as statistics are final.

After a stage the statistics of its layers are final, so every layer sees the input that it will see in evaluation. The
batches wait between the stages with the values that later stages use, see `stage_plan` and `kept_values`.
"""

import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxbn._src.framework.framework import Framework
from jaxbn._src.framework.layers import Staged
from jaxbn._src.framework.processes import gather
from jaxbn._src.framework.program_cache import Recipe, cached
from jaxbn._src.numerics.collectives import mesh_of, pin, replicate
from jaxbn._src.numerics.moments import Moments
from jaxbn._src.statistics.estimators import Estimator, Layers
from jaxbn._src.statistics.kept_values import Kept, KeptValues
from jaxbn._src.statistics.stage_plan import Owner, Plan, make_plan
from jaxbn._src.statistics.sweep import Pass, Work, accumulate, empty, judge


class _Plans:
    """The plans of a captured call by the types of its arguments, kept as long as the functions of the user."""

    def __init__(self, measure: Callable[..., Any]) -> None:
        self._program = jax.jit(measure)
        self._plans: dict[int, tuple[Any, Plan]] = {}

    def of(self, arrays: Any, batch: Any, owners: dict[int, Owner]) -> Plan:
        traced = self._program.trace(arrays, batch)
        # jit returns the same program for arguments of the same types; holding it keeps its id unique.
        if id(traced.jaxpr) not in self._plans:
            inputs = len(jax.tree.leaves(arrays))
            self._plans[id(traced.jaxpr)] = traced.jaxpr, make_plan(traced, owners, inputs)
        return self._plans[id(traced.jaxpr)][1]


@dataclasses.dataclass
class Item:
    """A batch between two stages."""

    plan: Plan
    kept: Kept
    skipped: jax.Array  # bool[]: whether its moments were not finite in a stage so far


class Stages:
    """The stages of a pass in one process: the plans and the batches, which each stage moves one stage further."""

    def __init__(
        self,
        framework: Framework,
        measure: Callable[[Staged], Recipe],
        model: Any,
        estimator: Estimator,
        memory: float,
    ) -> None:
        self._find_owners = functools.cache(lambda: _find_owners(framework, model))
        self._measure, self.estimator = measure, estimator
        self._plans: dict[frozenset[str], tuple[Recipe, _Plans]] = {}  # by the paths of the layers in cycles
        self._used: list[Plan] = []
        self._store = KeptValues(memory)
        # The accumulators of this process, of layers in earlier stages.
        self.earlier: dict[str, Any] = {}
        self.items: list[Item] = []
        self.cyclic: list[set[str]] = []  # the layers in cycles of each stage, known after the first one

    def agree(self) -> None:
        """Ends the reading of the user's batches: all plans are known. Every process must call it."""
        own = [
            {unit.layer.path for plan in self._used if number < len(plan.stages) for unit in plan.stages[number].cyclic}
            for number in range(max(len(plan.stages) for plan in self._used))
        ]
        # All processes must run the same stages and sweeps, or some would wait for the others forever.
        everyone = [own] if jax.process_count() == 1 else gather(own)
        self.cyclic = [set().union(*stages) for stages in itertools.zip_longest(*everyone, fillvalue=set())]

    @property
    def count(self) -> int:
        """The number of stages, known after the first one."""
        return len(self.cyclic)

    def having(self, number: int) -> list[Item]:
        """The items that have a stage of this number."""
        return [item for item in self.items if number < len(item.plan.stages)]

    def work(self, number: int, *, again: bool = False) -> Work:
        """The work of a stage: of the user's batches in stage 0, later of the items.

        Args:
            number: The number of the stage.
            again: Whether to only measure the layers in cycles once more.

        Returns:
            The functions for a sweep.
        """
        work = _StageWork(self, number, again)
        return Work(work.start, work.step)

    def title(self, number: int) -> str:
        """The end of the title of a progress bar; the number of stages is not known before the first one."""
        return f", stage {number + 1}" + (f" of {self.count}" if number else "")

    def end(self, state: Pass | None) -> None:
        """Ends a stage; `state` is that of this process, None if it has none."""
        if state is not None:
            self.earlier |= state.estimate

    def unreached(self) -> dict[str, Moments]:
        """Moments of count 0 for all layers, and for their channels, as those are that no batch reached."""
        return {path: _zeros(like) for path, like in self._used[0].like.moments.items()}

    def whole(self, states: Sequence[Pass]) -> Pass:
        """The state of a pass over all layers, from those of the sweeps in order."""
        estimate = functools.reduce(operator.or_, (state.estimate for state in states))
        kinds = dict(kind for plan in self._used for kind in plan.like.kinds)
        first, last = states[0], states[-1]
        return Pass(estimate, first.batches, last.skipped, {}, tuple(kinds.items()))

    def plan(self, arrays: Any, batch: Any) -> Plan:
        """The plan of a batch of the user."""
        plan = self._of_mode(frozenset()).of(arrays, batch, self._find_owners())
        cyclic = frozenset(unit.layer.path for stage in plan.stages for unit in stage.cyclic)
        if cyclic:
            plan = self._of_mode(cyclic).of(arrays, batch, self._find_owners())
        if not any(plan is each for each in self._used):
            _check_order([*self._used, plan])
            self._used.append(plan)
        return plan

    def take(self, arrays: Any, batch: Any) -> tuple[Item, Sequence[Any]]:
        """The item of a batch, which is new if it is the user's, and its values."""
        if isinstance(batch, Item):
            return batch, self._store.load(batch.kept)
        self.items.append(Item(self.plan(arrays, batch), self._store.keep([]), jnp.zeros((), bool)))
        return self.items[-1], jax.tree.leaves(batch)

    def put(self, item: Item, values: Sequence[jax.Array]) -> None:
        """Keeps the values of a batch for the next stage, in the place of those before."""
        self._store.free(item.kept)
        item.kept = self._store.keep(values)

    def _of_mode(self, cyclic: frozenset[str]) -> _Plans:
        if cyclic not in self._plans:
            recipe = self._measure(Staged(cyclic))
            self._plans[cyclic] = recipe, cached(_Plans, recipe)
        return self._plans[cyclic][1]


class _StageWork:
    """The work of a stage in one sweep."""

    def __init__(self, stages: Stages, number: int, again: bool) -> None:
        self._stages, self._number, self._again = stages, number, again
        self._leaves: list[Any] = []
        self._mesh: Mesh | None = None

    def start(self, arrays: Any, batch: Any) -> Pass:
        """The state before the first batch."""
        plan = batch.plan if isinstance(batch, Item) else self._stages.plan(arrays, batch)
        # Place the state where the step returns it, so that the step is not compiled for two placements.
        self._mesh = mesh_of((arrays, batch.kept.values if isinstance(batch, Item) else batch))
        self._leaves = jax.tree.leaves(arrays)
        state = empty({}, (), estimator=self._stages.estimator)
        if not isinstance(state.estimate, dict):
            raise TypeError(
                f"consistent=True accumulates layer by layer, and the accumulator of {self._stages.estimator.name} is "
                f"no dict by layer. Make its functions return one, or use consistent=False."
            )
        return self._with_layers(state if self._mesh is None else replicate(state, self._mesh), plan)

    def _with_layers(self, state: Pass, plan: Plan) -> Pass:
        """The state with accumulators for all layers that this stage of the plan measures."""
        stage = plan.stages[self._number] if self._number < len(plan.stages) else None
        units = [] if stage is None else stage.cyclic if self._again else stage.units
        paths = {unit.layer.path for unit in units} - state.first_bad.keys()
        if not paths:
            return state
        layers = {path: moments for path, moments in plan.like.moments.items() if path in paths}
        kinds = tuple((path, kind) for path, kind in plan.like.kinds if path in paths)
        more = empty(layers, kinds, estimator=self._stages.estimator)
        more = more if self._mesh is None else replicate(more, self._mesh)
        # Other layers of a stack had their stage before.
        earlier = {path: part for path, part in self._stages.earlier.items() if path in paths}
        return dataclasses.replace(
            state,
            estimate=state.estimate | more.estimate | earlier,
            first_bad=state.first_bad | more.first_bad,
            kinds=(*state.kinds, *kinds),
        )

    def step(self, state: Pass, arrays: Any, batch: Any) -> Pass:
        """The state after a batch, which moves one stage further."""
        stages, number, again, mesh = self._stages, self._number, self._again, self._mesh
        item, values = stages.take(arrays, batch)
        # Batches of other shapes or structures may reach further layers.
        state = self._with_layers(state, item.plan)
        model = [self._leaves[i] for i in item.plan.used(number, again)]
        counts, program = dataclasses.replace(state, estimate={}), _program(item.plan, number, again, mesh)
        counts, moments, kept, item.skipped = program(counts, model, values, item.skipped)
        # One program for all layers with statistics of one shape, which otherwise would be most of the compilation.
        update = _accumulate(stages.estimator, mesh)
        estimate = {path: update(part, moments[path], item.skipped) for path, part in state.estimate.items()}
        if not again:
            stages.put(item, kept)
        return dataclasses.replace(counts, estimate=estimate)


def _find_owners(framework: Framework, model: Any) -> dict[int, Owner]:
    """The arrays of a model that hold running statistics, by their number."""
    # Copies of the statistics are new objects, so identity shows where they are among the arrays.
    states = {path: jax.tree.map(_copy, state) for path, state in framework.states(model).items()}
    paths = {id(leaf): path for path, state in states.items() for leaf in jax.tree.leaves(state)}
    leaves = jax.tree.leaves(framework.split(framework.with_states(model, states))[1])
    owners = {number: Owner(paths[id(leaf)], leaf.shape) for number, leaf in enumerate(leaves) if id(leaf) in paths}
    assert {owner.path for owner in owners.values()} == states.keys(), "the model replaced its statistics by copies"
    return owners


def _copy(leaf: Any) -> jax.Array:
    # NNX keeps an array that it is given only if its sharding equals that of the array before.
    new = jnp.copy(leaf)
    return jax.device_put(new, leaf.sharding) if isinstance(leaf, jax.Array) else new


def _check_order(plans: Sequence[Plan]) -> None:
    """Raises a ValueError if the last plan has layers in other stages than an earlier one."""
    last = plans[-1].levels
    for plan in plans[:-1]:
        for name, level in plan.levels.items():
            if last.get(name, level) != level:
                raise ValueError(
                    f"Batches of different shapes or structures reach {name[0]!r} after other layers, so that there is "
                    f"no common order in which to estimate statistics. Use consistent=False, or give all batches the "
                    f"same structure."
                )


def _program(plan: Plan, number: int, again: bool, mesh: Mesh | None) -> Callable[..., Any]:
    """The compiled program of a stage, the same each time."""
    if ("program", number, again, mesh) not in plan.made:

        def run(counts: Pass, model: Any, values: Any, skip: jax.Array) -> tuple[Pass, Layers, list[Any], jax.Array]:
            found, kept = plan.run(number, again, model, values)
            # Batches of other shapes may reach layers that this one does not.
            zeros = {path: _zeros(plan.like.moments[path]) for path in counts.first_bad}
            moments = {path: found.moments.get(path, zeros[path]) for path in zeros}
            counts, skip = judge(counts, moments, skip)
            return (*_pinned((counts, moments), mesh), kept, skip)

        plan.made["program", number, again, mesh] = jax.jit(run)
    program: Callable[..., Any] = plan.made["program", number, again, mesh]
    return program


@functools.lru_cache(16)
def _accumulate(estimator: Estimator, mesh: Mesh | None) -> Callable[..., Any]:
    """The compiled update of the accumulator of one layer."""

    def update(part: Any, moments: Moments, skip: jax.Array) -> Any:
        return _pinned(accumulate({"": part}, {"": moments}, skip, estimator=estimator)[""], mesh)

    return jax.jit(update)


def _pinned(tree: Any, mesh: Mesh | None) -> Any:
    return tree if mesh is None else pin(tree, mesh)


def _zeros(like: Moments) -> Moments:
    return Moments(*(jnp.zeros(part.shape, part.dtype) for part in like))
