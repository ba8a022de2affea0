"""A traced program as a flat list of steps that can run in parts: calls are inlined, loops over layers are unrolled.

`flatten` numbers the values of a program. `needed` selects the steps that some values require, given those that are
available, and `run` evaluates steps. A loop over layers is a `lax.scan` that slices statistics: the iterations
use different statistics, so they are separate layers. Other loops, and `shard_map`, remain single steps.
"""

import dataclasses
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxbn._src import internals as _internals

Value = int  # a value of the program, by number


class Step(NamedTuple):
    """An equation, or a slice or stack of an unrolled loop."""

    apply: Callable[[list[Any]], list[Any]]  # inputs -> outputs
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]


class Positions(NamedTuple):
    """The flat positions in the statistics of a layer that a value consists of."""

    layer: Hashable
    flat: np.ndarray  # i32, in the shape of the value


@dataclasses.dataclass(frozen=True)
class FlatProgram:
    """The result of `flatten`."""

    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    steps: tuple[Step, ...]  # in an order in which they can run
    constants: Mapping[Value, Any]
    positions: Mapping[Value, Positions]  # of values that only rearrange statistics
    parts: Mapping[Value, tuple[Value, ...]]  # of the inputs and stacked outputs of unrolled loops, the slices
    made_by: Mapping[Value, Step]

    def needed(self, targets: Iterable[Value], available: Collection[Value]) -> list[Step]:
        """The steps that compute the targets from available values, inputs of the program and constants, in order."""
        wanted, found = set(targets).difference(available), []
        for step in reversed(self.steps):
            if not wanted.isdisjoint(step.outputs):
                found.append(step)
                wanted.update(set(step.inputs).difference(available))
        return found[::-1]

    def known(self, value: Value) -> np.ndarray | None:
        """A value that does not depend on the inputs of the program; None if it does."""
        if value in self.constants:
            return np.asarray(self.constants[value])
        if value not in self.made_by:
            return None
        step = self.made_by[value]
        inputs = [self.known(each) for each in step.inputs]
        if any(each is None for each in inputs):
            return None
        return np.asarray(step.apply([*map(jnp.asarray, inputs)])[step.outputs.index(value)])

    def run(self, steps: Iterable[Step], values: Mapping[Value, Any]) -> dict[Value, Any]:
        """Evaluates steps on the values of their inputs; returns all values."""
        values = {**self.constants, **values}
        for step in steps:
            values |= zip(step.outputs, step.apply([values[each] for each in step.inputs]), strict=True)
        return values


def flatten(program: _internals.Program, positions: Mapping[int, Positions]) -> FlatProgram:
    """Flattens a program.

    Args:
        program: The traced program.
        positions: Of the inputs that hold statistics, by their number.

    Returns:
        The flat program.
    """
    walk = _Walk()
    inputs = [walk.new() for _ in program.invars]
    walk.positions = {inputs[number]: each for number, each in positions.items()}
    outputs = walk.read(program, inputs)
    return FlatProgram(
        tuple(inputs), tuple(outputs), tuple(walk.steps), walk.constants, walk.positions, walk.parts, walk.made_by
    )


class _Walk:
    """Walks through a program and all that it calls, in order."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.constants: dict[Value, Any] = {}
        self.positions: dict[Value, Positions] = {}
        self.parts: dict[Value, tuple[Value, ...]] = {}
        self.made_by: dict[Value, Step] = {}
        self._count = 0

    def new(self) -> Value:
        self._count += 1
        return self._count

    def constant(self, array: Any) -> Value:
        value = self.new()
        self.constants[value] = array
        return value

    def read(self, program: _internals.Program, inputs: Sequence[Value]) -> list[Value]:
        """Adds the steps of a program with these inputs, and returns its outputs."""
        values = dict(zip(program.invars, inputs, strict=True))
        constants = zip(program.constvars, _internals.constants(program), strict=True)
        values |= {var: self.constant(array) for var, array in constants}

        def value_of(atom: Any) -> Value:
            return self.constant(atom.val) if isinstance(atom, _internals.Literal) else values[atom]

        for eqn in program.eqns:
            given = [value_of(atom) for atom in eqn.invars]
            values |= zip(eqn.outvars, self._equation(eqn, given), strict=True)
        return [value_of(atom) for atom in program.outvars]

    def _equation(self, eqn: _internals.Equation, given: list[Value]) -> list[Value]:
        if (called := _internals.called_program(eqn)) is not None:
            return self.read(called, given)
        if eqn.primitive.name == _internals.SCAN:
            scan = _internals.scan_of(eqn)
            if not self.positions.keys().isdisjoint(given[scan.constants + scan.carry :]):
                return self._unrolled(scan, given)
        outputs = self._add(lambda values: _run_as_traced(eqn, values), given, len(eqn.outvars))
        if eqn.primitive.name in _REARRANGING and given[0] in self.positions:
            self._rearrange(eqn, given, outputs[0])
        return outputs

    def _add(self, apply: Callable[[list[Any]], list[Any]], inputs: Sequence[Value], outputs: int) -> list[Value]:
        step = Step(apply, tuple(inputs), tuple(self.new() for _ in range(outputs)))
        self.steps.append(step)
        self.made_by |= dict.fromkeys(step.outputs, step)
        return [*step.outputs]

    def _rearrange(self, eqn: _internals.Equation, given: list[Value], output: Value) -> None:
        """Applies an equation that only rearranges its first input to the positions of that input."""
        if any(each not in self.constants for each in given[1:]):
            return
        layer, index = self.positions[given[0]]
        arrays = [jnp.asarray(each) for each in (index, *(self.constants[value] for value in given[1:]))]
        self.positions[output] = Positions(layer, np.asarray(_run_as_traced(eqn, arrays)[0]))

    def _unrolled(self, scan: _internals.Scan, given: list[Value]) -> list[Value]:
        consts, values = given[: scan.constants], given[scan.constants :]
        carry, xs = values[: scan.carry], values[scan.carry :]
        length = scan.options["length"]
        slices = [[self._slice(x, i) for x in xs] for i in range(length)]
        rows: list[list[Value]] = [[] for _ in range(length)]
        for i in reversed(range(length)) if scan.options["reverse"] else range(length):
            outputs = self.read(scan.body, [*consts, *carry, *slices[i]])
            carry, rows[i] = outputs[: scan.carry], outputs[scan.carry :]
        # A scan that returns a slice unchanged was traced to return the whole input instead.
        self.parts |= zip(xs, zip(*slices, strict=True), strict=True)
        return [*carry, *map(self._stack, zip(*rows, strict=True))]

    def _slice(self, x: Value, i: int) -> Value:
        (output,) = self._add(lambda values: [lax.index_in_dim(values[0], i, keepdims=False)], [x], 1)
        if x in self.positions:
            layer, index = self.positions[x]
            self.positions[output] = Positions(layer, index[i])
        return output

    def _stack(self, rows: tuple[Value, ...]) -> Value:
        (output,) = self._add(lambda values: [jnp.stack(values)], rows, 1)
        self.parts[output] = rows
        return output


def _run_as_traced(eqn: _internals.Equation, values: list[Any]) -> list[Any]:
    with _internals.as_traced(eqn):
        return _internals.bind(eqn, values)


# Primitives that return elements of their first input unchanged, where the other inputs say which.
_REARRANGING = frozenset(
    "broadcast_in_dim copy copy_p dynamic_slice name reshape rev sharding_constraint slice squeeze transpose".split()
)
