"""Who makes the values of a traced program, and who uses them.

A `tag` in the program is an identity with a name: it says that a value is what a layer was given, or gave back.
`follow` inlines what is only a call (jit, checkpoint, custom derivatives), leaves out what nothing depends on, and says
of every value by which equation it was made and by which it is used. Nothing is computed.
"""

import dataclasses
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

from jaxbn._src import internals as _internals

Value = int  # a value of the program, by number


def tag(x: jax.Array, name: Hashable) -> jax.Array:
    """Gives back `x`, which has this name for `follow`; it compiles to nothing."""
    return tag_p.bind(x, name=name, mapped=False)


def _tag_batching(args: Sequence[Any], dims: Sequence[int], *, name: Hashable, mapped: bool) -> tuple[Any, int]:
    return tag_p.bind(*args, name=name, mapped=True), dims[0]


tag_p = _internals.identity_primitive("jaxbn_tag", lambda x, **_: x, _tag_batching, multiple=False)


class Node(NamedTuple):
    """An equation after inlining."""

    label: str  # what it is called in messages: a function of jax.nn that it is part of, or its primitive
    inputs: tuple[Value, ...]  # literals are left out
    outputs: tuple[Value, ...]
    tag: Hashable = None
    has_effects: bool = False


class Unreadable(NamedTuple):
    """A tag that cannot be followed."""

    tag: Hashable
    inside: str  # the transformation or loop that it lies in


@dataclasses.dataclass(frozen=True)
class Flow:
    """What `follow` found."""

    inputs: tuple[Value, ...]  # of the program
    outputs: frozenset[Value]
    nodes: tuple[Node, ...]  # those that an output depends on, in order
    unreadable: tuple[Unreadable, ...]
    given: dict[Hashable, set[Value | None]]  # what tags are given, those too that nothing depends on; None: literals
    makers: dict[Value, Node]
    users: dict[Value, list[Node]]

    def tagged(self, name: Hashable) -> list[Node]:
        """The tags of this name that can be followed."""
        return [node for node in self.nodes if node.tag == name]

    def uses(self, value: Value) -> list[Node]:
        """The equations that use a value; to be an output of the program is one more use, of no equation."""
        return [*self.users.get(value, ()), *[_OUTPUT] * (value in self.outputs)]

    def leaves_by(self, value: Value, name: Hashable) -> bool:
        """Whether a value acts on the outputs of the program, and on the world, through the tag `name` alone."""
        seen, waiting = {value}, [value]
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
    """Reads a program with tags."""
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
    """Walks a program from the beginning to the end, into every call, and numbers its values."""

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
        """The outputs of a program called with these inputs; None stands for a literal."""
        values: dict[Any, Value | None] = dict(zip(program.invars, inputs, strict=True))
        values |= {var: self.new() for var in program.constvars}

        def value_of(atom: Any) -> Value | None:
            return None if isinstance(atom, _internals.Literal) else values[atom]

        for eqn in program.eqns:
            given = [value_of(atom) for atom in eqn.invars]
            if (called := _internals.called_program(eqn)) is not None:
                name = _internals.name_of_function(eqn)
                made = self.read(called, given, name if hasattr(jax.nn, name) else function)
            elif eqn.primitive.name in _internals.IDENTITIES:
                made = given
            else:
                made = self._add(eqn, given, function)
            values |= dict(zip(eqn.outvars, made, strict=True))
        return [value_of(atom) for atom in program.outvars]

    def _add(self, eqn: Any, given: Sequence[Value | None], function: str | None) -> list[Value | None]:
        """Keeps an equation that is no call; its outputs."""
        name, label = eqn.params["name"] if eqn.primitive is tag_p else None, eqn.primitive.name
        if name is not None and eqn.params["mapped"]:
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
    """The tags in the programs that an equation holds, however deep."""
    for program in _internals.inner_programs(eqn):
        for inner in program.eqns:
            if inner.primitive is tag_p:
                yield inner.params["name"]
            yield from _tags_in(inner)


def _needed(nodes: Sequence[Node], outputs: set[Value]) -> list[Node]:
    """The nodes on which an output or an effect depends."""
    wanted, kept = set(outputs), []
    for node in reversed(nodes):
        if node.has_effects or wanted.intersection(node.outputs):
            wanted.update(node.inputs)
            kept.append(node)
    return kept[::-1]
