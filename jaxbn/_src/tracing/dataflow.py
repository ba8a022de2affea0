"""Dataflow of a traced program: which equation computes each value, and which equations use it.

A `tag` is a named identity in the program that marks a value as the input or output of a layer. `follow` inlines calls
(jit, checkpoint, custom derivatives), removes dead code, and maps every value to its producer and its users. It only
reads the program and computes no values.
"""

import dataclasses
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

from jaxbn._src import internals as _internals

Value = int  # a value of the program, by number


def tag(x: jax.Array, name: Hashable) -> jax.Array:
    """Returns `x` and names it for `follow`; compiles to no operation."""
    return tag_p.bind(x, name=name, mapped=False)


def _tag_batching(args: Sequence[Any], dims: Sequence[int], *, name: Hashable, mapped: bool) -> tuple[Any, int]:
    return tag_p.bind(*args, name=name, mapped=True), dims[0]


tag_p = _internals.identity_primitive("jaxbn_tag", lambda x, **_: x, _tag_batching, multiple=False)


class Node(NamedTuple):
    """An equation after inlining."""

    label: str  # its name in messages: the function of jax.nn that it is part of, or its primitive
    inputs: tuple[Value, ...]  # literals are left out
    outputs: tuple[Value, ...]
    tag: Hashable = None
    has_effects: bool = False


class Unreadable(NamedTuple):
    """A tag that cannot be followed."""

    tag: Hashable
    inside: str  # the transformation or loop around it


@dataclasses.dataclass(frozen=True)
class Flow:
    """The result of `follow`."""

    inputs: tuple[Value, ...]  # of the program
    outputs: frozenset[Value]
    nodes: tuple[Node, ...]  # in order, without dead code
    unreadable: tuple[Unreadable, ...]
    given: dict[Hashable, set[Value | None]]  # the values that each tag receives, dead tags included; None: a literal
    makers: dict[Value, Node]
    users: dict[Value, list[Node]]

    def tagged(self, name: Hashable) -> list[Node]:
        """The nodes with this tag."""
        return [node for node in self.nodes if node.tag == name]

    def uses(self, value: Value) -> list[Node]:
        """The users of a value; an output of the program counts as one more use."""
        return [*self.users.get(value, ()), *[_OUTPUT] * (value in self.outputs)]

    def leaves_by(self, value: Value, name: Hashable) -> bool:
        """Whether a value reaches the outputs and side effects of the program only through the tag `name`."""
        seen, waiting = {value}, [value]
        # Forward reachability that stops at the tag.
        while waiting:
            current = waiting.pop()
            if current in self.outputs:
                return False
            for node in self.users.get(current, ()):
                if node.tag is not None and node.tag == name:
                    continue
                if node.has_effects:
                    return False
                new = set(node.outputs) - seen
                seen |= new
                waiting += new
        return True


_OUTPUT = Node("the outputs of the model", (), ())


def follow(program: _internals.Program) -> Flow:
    """Reads the dataflow of a program with tags."""
    reader = _Reader()
    inputs = [reader.new() for _ in program.invars]
    outputs = {value for value in reader.read(program, inputs, None) if value is not None}
    nodes = _needed(reader.nodes, outputs)
    makers = {value: node for node in nodes for value in node.outputs}
    users: dict[Value, list[Node]] = {}
    for node in nodes:
        for value in node.inputs:
            users.setdefault(value, []).append(node)
    unreadable = tuple(reader.unreadable)
    return Flow(tuple(inputs), frozenset(outputs), tuple(nodes), unreadable, reader.given, makers, users)


class _Reader:
    """Walks through a program and all its calls in order, and numbers the values."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.unreadable: list[Unreadable] = []
        self.given: dict[Hashable, set[Value | None]] = {}
        self._count = 0

    def new(self) -> Value:
        self._count += 1
        return self._count

    def read(
        self, program: _internals.Program, inputs: Sequence[Value | None], function: str | None
    ) -> list[Value | None]:
        """Reads a program that is called with these inputs, and returns its outputs; None stands for a literal."""
        values: dict[Any, Value | None] = dict(zip(program.invars, inputs, strict=True))
        values |= {var: self.new() for var in program.constvars}

        def value_of(atom: Any) -> Value | None:
            return None if isinstance(atom, _internals.Literal) else values[atom]

        for eqn in program.eqns:
            given = [value_of(atom) for atom in eqn.invars]
            if (called := _internals.called_program(eqn)) is not None:
                # Messages name the user's call, such as jax.nn.gelu, and not the primitives that it consists of.
                name = _internals.name_of_function(eqn)
                made = self.read(called, given, name if hasattr(jax.nn, name) else function)
            elif eqn.primitive.name in _internals.IDENTITIES:
                made = given
            else:
                made = self._add(eqn, given, function)
            values |= dict(zip(eqn.outvars, made, strict=True))
        return [value_of(atom) for atom in program.outvars]

    def _add(self, eqn: Any, given: Sequence[Value | None], function: str | None) -> list[Value | None]:
        """Adds an equation that is not a call, and returns its outputs."""
        name, label = eqn.params["name"] if eqn.primitive is tag_p else None, eqn.primitive.name
        if name is not None and eqn.params["mapped"]:
            # Under vmap the value has a lane axis that the dataflow does not show.
            self.unreadable.append(Unreadable(name, "vmap"))
            name = None
        if name is not None:
            self.given.setdefault(name, set()).update(given)
        self.unreadable += [Unreadable(hidden, label) for hidden in _tags_in(eqn)]
        made = [self.new() for _ in eqn.outvars]
        known = tuple(value for value in given if value is not None)
        self.nodes.append(Node(function or label, known, tuple(made), name, bool(eqn.effects)))
        return [*made]


def _tags_in(eqn: Any) -> Iterator[Hashable]:
    """The tags in the inner programs of an equation, at any depth."""
    for program in _internals.inner_programs(eqn):
        for inner in program.eqns:
            if inner.primitive is tag_p:
                yield inner.params["name"]
            yield from _tags_in(inner)


def _needed(nodes: Sequence[Node], outputs: set[Value]) -> list[Node]:
    """Removes dead code: keeps the nodes on which an output or an effect depends."""
    wanted, kept = set(outputs), []
    for node in reversed(nodes):
        if node.has_effects or wanted.intersection(node.outputs):
            wanted.update(node.inputs)
            kept.append(node)
    return kept[::-1]
