"""The stages of a network: which statistics must be final before those of a layer can be measured.

The captured call is traced once, with the running statistics as inputs and the moments of each call of a layer as
outputs. The *level* of a value is the number of stages that must be complete before it can be computed:

    level(input) = 0,  level(value) = highest level of the values that it is computed from,
    level(running statistics of a layer) = 1 + level(moments of that layer)

Layers of one level are independent, and one stage measures them. If the moments of a layer depend on its own running
statistics, as in a recurrent network or inside a `while_loop`, it belongs to a *cycle*, whose statistics are estimated
together, by sweeps. A stage computes only what its moments require; a batch keeps the values that later stages use.
"""

import dataclasses
import functools
import operator
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.sparse.csgraph import connected_components

from jaxbn._src.framework.layers import Layer, Measured, measured
from jaxbn._src.numerics.moments import Moments
from jaxbn._src.tracing.flat_program import FlatProgram, Positions, Step, Value, flatten
from jaxbn._src.tracing.records import Record


class Owner(NamedTuple):
    """An input of a traced call that holds running statistics."""

    path: str  # of the layer
    shape: tuple[int, ...]  # of the input


class Call(NamedTuple):
    """A call of a layer: the record that it leaves, as values of the flat program."""

    layer: Layer
    positions: Value
    moments: tuple[Value, ...]


class Unit(NamedTuple):
    """Statistics that are measured together: those of a layer, or of one iteration of a loop over layers."""

    layer: Layer
    at: np.ndarray  # bool[layer.size]: their positions
    calls: list[Call]

    @property
    def name(self) -> tuple[str, bytes]:
        """The name of these statistics in the programs for all batch shapes."""
        return self.layer.path, self.at.tobytes()


class Stage(NamedTuple):
    """The part of a program that measures one level of layers."""

    units: list[Unit]
    cyclic: list[Unit]  # those of them in cycles
    steps: list[Step]  # that compute the moments of the units, from the values that the stage before kept
    again: list[Step]  # that compute the moments of the cyclic units, from the values that this stage keeps
    kept: tuple[Value, ...]  # the values that later stages and `again` use


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """The stages of a call for one batch shape."""

    flat: FlatProgram
    like: Measured  # the shapes of all measurements; the kinds are in the order of the calls
    owners: Mapping[int, Owner]  # by the number of the input
    model_inputs: int  # the number of inputs that belong to the model; the others are those of the batch
    indices: Mapping[Value, np.ndarray | None]  # the positions of each call, where they are known
    stages: list[Stage]
    # A cache: compiled functions, and lists of inputs.
    made: dict[Hashable, Any] = dataclasses.field(default_factory=dict)

    @property
    def levels(self) -> dict[tuple[str, bytes], tuple[int, bool]]:
        """The stage of each unit, and whether the unit is in a cycle."""
        return {
            unit.name: (number, any(unit is each for each in stage.cyclic))
            for number, stage in enumerate(self.stages)
            for unit in stage.units
        }

    def entering(self, number: int) -> tuple[Value, ...]:
        """The values with which a batch enters a stage."""
        return self.flat.inputs[self.model_inputs :] if number == 0 else self.stages[number - 1].kept

    def used(self, number: int, again: bool) -> list[int]:
        """The inputs of the model that a stage uses, by their number."""
        key, stage = ("used", number, again), self.stages[number]
        if key not in self.made:
            read = {value for step in (stage.again if again else stage.steps) for value in step.inputs}
            self.made[key] = [i for i, value in enumerate(self.flat.inputs[: self.model_inputs]) if value in read]
        used: list[int] = self.made[key]
        return used

    def run(self, number: int, again: bool, model: Sequence[Any], values: Sequence[Any]) -> tuple[Measured, list[Any]]:
        """Runs a stage on a batch; pure.

        Args:
            number: The number of the stage.
            again: Whether to measure only the cyclic units once more, from the values that the stage keeps.
            model: The `used` inputs of the model. Statistics of cyclic units count only if `again`.
            values: The values with which the batch enters the stage; if `again`, those that the stage keeps.

        Returns:
            The measurements of the units, and the values that the stage keeps.
        """
        stage = self.stages[number]
        steps, entering = (stage.again, stage.kept) if again else (stage.steps, self.entering(number))
        available = dict(zip(entering, values, strict=True))
        for i, leaf in zip(self.used(number, again), model, strict=True):
            available[self.flat.inputs[i]] = leaf if again else self._unsettled(i, leaf, stage.cyclic)
        computed = self.flat.run(steps, available)
        calls = [call for unit in (stage.cyclic if again else stage.units) for call in unit.calls]
        # A new array, because the user may donate or delete those of the batch.
        own = set(entering) if number == 0 and not again else ()
        kept = [jnp.array(computed[value]) if value in own else computed[value] for value in stage.kept]
        return self._measured(calls, computed), kept

    def _unsettled(self, number: int, leaf: Any, cyclic: Iterable[Unit]) -> Any:
        """An input of the model, NaN where it holds statistics of units in cycles: see `Staged`."""
        for unit in cyclic if number in self.owners else ():
            path, shape = self.owners[number]
            if unit.layer.path == path:
                at = unit.at.reshape(shape) if shape == unit.layer.shape else True
                leaf = jnp.where(at, jnp.asarray(jnp.nan, leaf.dtype), leaf)
        return leaf

    def _measured(self, calls: Iterable[Call], computed: Mapping[Value, Any]) -> Measured:
        whole: dict[Layer, jax.Array] = {}
        records = []
        for layer, value, moments in calls:
            index: Any = self.indices[value]
            if index is None:
                index = computed[value]
            elif np.array_equal(index.ravel(), np.arange(layer.size)):
                # The same array for all calls shows that their moments are in place.
                index = whole.setdefault(layer, layer.positions())
            records.append(Record(layer, jnp.asarray(index), Moments(*(computed[part] for part in moments))))
        return measured(records, {layer: whole.get(layer) for layer, *_ in calls})


def make_plan(traced: Any, owners: Mapping[int, Owner], model_inputs: int) -> Plan:
    """Makes the plan of a captured call in the mode `Staged`.

    Args:
        traced: `jax.jit(measure).trace(arrays, batch)`, where `measure` returns `Measured` with its records.
        owners: The inputs that hold running statistics, by their number.
        model_inputs: The number of inputs that belong to the model.

    Returns:
        The plan.
    """
    like = traced.out_info
    layers = {record.layer.path: record.layer for record in like.records}
    rows = {number: _rows(layers[path], shape) for number, (path, shape) in owners.items() if path in layers}
    positions = {i: Positions(owners[i].path, index) for i, index in rows.items() if index is not None}
    flat = flatten(traced.jaxpr, positions)
    numbered = jax.tree.unflatten(jax.tree.structure(like), flat.outputs)
    calls = [call for record in numbered.records for call in _iterations(flat, record)]
    indices = {call.positions: flat.known(call.positions) for call in calls}
    stages = _stages(flat, _units(calls, indices), indices, owners, model_inputs)
    return Plan(flat, like, owners, model_inputs, indices, stages)


def _rows(layer: Layer, shape: tuple[int, ...]) -> np.ndarray | None:
    """The positions of an input with statistics of a stack of layers; None for other inputs, which are not tracked.

    Of an input with one value for each layer, the first positions of the layers represent them.
    """
    if not shape or len(layer.shape) < 2 or layer.shape[: len(shape)] != shape:
        return None
    index = np.arange(layer.size, dtype=np.int32)
    return index.reshape(shape) if shape == layer.shape else index.reshape(*shape, -1)[..., 0]


def _iterations(flat: FlatProgram, record: Any) -> Iterator[Call]:
    """The calls of a layer in a record, which holds several if it is that of an unrolled loop."""
    waiting = [(record.index, *record.moments)]
    while waiting:
        values = waiting.pop(0)
        rows = [flat.parts.get(value, ()) for value in values]
        if rows[0] and len(set(map(len, rows))) == 1:
            waiting += zip(*rows, strict=True)
        else:
            yield Call(record.layer, values[0], values[1:])


def _units(calls: Iterable[Call], indices: Mapping[Value, np.ndarray | None]) -> list[Unit]:
    """Puts calls of the same layer together if their positions overlap."""
    units: list[Unit] = []
    for call in calls:
        index, at = indices[call.positions], np.zeros(call.layer.size, bool)
        at[slice(None) if index is None else index.ravel()] = True
        same = [unit for unit in units if unit.layer.path == call.layer.path and (unit.at & at).any()]
        units = [unit for unit in units if not any(unit is each for each in same)]
        together = [*(each for unit in same for each in unit.calls), call]
        units.append(Unit(call.layer, np.any([at, *(unit.at for unit in same)], axis=0), together))
    return units


def _targets(units: Iterable[Unit], indices: Mapping[Value, np.ndarray | None]) -> list[Value]:
    """The values that the moments of the units consist of."""
    calls = [call for unit in units for call in unit.calls]
    found = [value for call in calls for value in call.moments]
    return [*found, *(call.positions for call in calls if indices[call.positions] is None)]


def _stages(
    flat: FlatProgram,
    units: Sequence[Unit],
    indices: Mapping[Value, np.ndarray | None],
    owners: Mapping[int, Owner],
    model_inputs: int,
) -> list[Stage]:
    needs, varying = _needs(flat, units, owners, model_inputs)
    of_units = [functools.reduce(operator.or_, (needs[v] for v in _targets([u], indices)), 0) for u in units]
    levels, in_cycle = _levels(of_units)

    @functools.cache
    def level(bits: int) -> int:
        return max((levels[i] + 1 for i in range(len(units)) if bits >> i & 1), default=0)

    available, stages = set(flat.inputs[model_inputs:]), []
    for number in range(max(levels, default=0) + 1):
        own = [unit for unit, at in zip(units, levels, strict=True) if at == number]
        cyclic = [unit for unit, at, cycle in zip(units, levels, in_cycle, strict=True) if at == number and cycle]
        later = [unit for unit, at in zip(units, levels, strict=True) if at > number]
        steps = flat.needed(_targets(own, indices), available)
        # What depends on statistics that are not final is computed again later, and so are values that are the same
        # for all batches.
        final = (value for step in steps for value in step.outputs if level(needs[value]) <= number)
        available |= varying.intersection(final)
        targets = _targets(cyclic, indices)
        again, rest = flat.needed(targets, available), flat.needed(_targets(later, indices), available)
        read = {*targets, *_targets(later, indices), *(value for step in [*again, *rest] for value in step.inputs)}
        stages.append(Stage(own, cyclic, steps, again, tuple(sorted(read & available))))
    return stages


def _needs(
    flat: FlatProgram, units: Sequence[Unit], owners: Mapping[int, Owner], model_inputs: int
) -> tuple[dict[Value, int], set[Value]]:
    """The units whose statistics each value is computed from, as bits; and the values that depend on the batch."""

    def bits(path: Hashable, index: np.ndarray | slice) -> int:
        return sum(1 << i for i, unit in enumerate(units) if unit.layer.path == path and unit.at[index].any())

    needs = dict.fromkeys((*flat.inputs, *flat.constants), 0)
    needs |= {flat.inputs[number]: bits(owner.path, slice(None)) for number, owner in owners.items()}
    varying = set(flat.inputs[model_inputs:])
    for step in flat.steps:
        inputs = functools.reduce(operator.or_, (needs[value] for value in step.inputs), 0)
        needs |= dict.fromkeys(step.outputs, inputs)
        # Slices of the statistics of a stack of layers belong to some of the layers only.
        needs |= {value: bits(*flat.positions[value]) for value in step.outputs if value in flat.positions}
        if not varying.isdisjoint(step.inputs):
            varying.update(step.outputs)
    return needs, varying


def _levels(needs: Sequence[int]) -> tuple[list[int], list[bool]]:
    """The level of each unit, given the units whose statistics it needs, and whether it is in a cycle."""
    if not needs:
        return [], []
    matrix = np.array([[bits >> i & 1 for i in range(len(needs))] for bits in needs], bool)
    _, cycle = connected_components(matrix, connection="strong")
    outside = matrix & (cycle[:, None] != cycle)
    levels, before = np.zeros(len(needs), int), np.ones(0, int)
    while not np.array_equal(levels, before):
        before, own = levels, np.where(outside, levels + 1, 0).max(1)
        levels = np.array([own[cycle == each].max() for each in cycle])
    in_cycle = matrix.diagonal() | (np.bincount(cycle)[cycle] > 1)
    return levels.tolist(), in_cycle.tolist()
