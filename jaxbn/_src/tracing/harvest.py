"""The transformation that returns the sown moments of a program.

`harvest(fun)` traces `fun` to a jaxpr and evaluates it. An equation that sows no moments is bound again unchanged. For
each equation that contains a `sow`, a rule turns the moments into outputs: scan stacks them, cond gives zeros for the
branches not taken, while pools them in its carry, and shard_map (and so pmap) pools them over devices. The
transformation is pure: no side effects, no leaked tracers.

Counts are too large by a factor (mean and variance stay right) where JAX rewrites `fun` before `harvest` sees it: in a
second derivative of checkpoint, and in a gradient of a scan in which a layer sees only constants of the scan. The same
happens if the devices of a shard_map saw equal values but their type does not say so: the result of `lax.all_gather` is
typed as varying, and with check_vma=False, as in pmap, an axis counts as varying if an in_spec or an inner operation
names it. `vmap` of a cond or while whose predicate differs between lanes runs every branch on every lane; apply that
`vmap` around `harvest` instead.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jaxbn._src import internals as _internals
from jaxbn._src.numerics import collectives as _collectives
from jaxbn._src.numerics import moments as _moments
from jaxbn._src.tracing import sow as _sow
from jaxbn._src.tracing.records import Record, by_layer, collect, pool, pool_by_index

_Output = TypeVar("_Output")

# The result of a rule and of the evaluator: the outputs of the equation, and the records of the sown moments.
_Result = tuple[list[Any], list[Record]]


def harvest(fun: Callable[..., _Output]) -> Callable[..., tuple[_Output, list[Record]]]:
    """Transforms `fun(*args) -> out` into a function that returns `(out, records)`, one record for each executed `sow`.

    You may call the result anywhere, including inside jit, vmap, pmap and shard_map: the records are then those of one
    lane or device. If `fun` itself runs a pmap or shard_map, the records cover all its devices. Each call traces `fun`,
    so wrap the result in `jax.jit` to call it repeatedly. jit and checkpoint around a `sow` are inlined. Arguments and
    outputs may be any pytrees; leaves that are not arrays are passed through untraced.

    Raises:
        NotImplementedError: When called, if a `sow` lies inside an operation that has no rule.
    """

    def harvested(*args: Any) -> tuple[_Output, list[Record]]:
        inputs = over_arrays(args)
        traced = jax.make_jaxpr(lambda inputs: over_arrays(fun(*inputs())), return_shape=True)
        closed, shapes = traced(inputs)
        outputs, records = _evaluate(closed, jax.tree.leaves(inputs))
        return jax.tree.unflatten(jax.tree.structure(shapes), outputs)(), records

    return harvested


def over_arrays(tree: Any) -> Any:
    """Wraps a tree as a `Partial` of its arrays, which keeps other leaves (numbers, strings) out of the trace."""
    leaves, structure = jax.tree.flatten(tree)
    positions = [i for i, leaf in enumerate(leaves) if _internals.is_array_of_jax(leaf)]
    others = dict(enumerate(leaves))
    arrays = [jnp.asarray(others.pop(i)) for i in positions]  # a jax.Array stays the same object

    def rebuild(*arrays: Any) -> Any:
        by_position = others | dict(zip(positions, arrays, strict=True))
        return jax.tree.unflatten(structure, [by_position[i] for i in sorted(by_position)])

    return jax.tree_util.Partial(rebuild, *arrays)


def _sows(eqn: _internals.Equation) -> bool:
    """Whether the equation is a `sow`, or contains one in its inner programs, at any depth."""
    if eqn.primitive is _sow.sow_p:
        return True
    return any([any(map(_sows, inner.eqns)) for inner in _internals.inner_programs(eqn)])


def _evaluate(program: _internals.Program, args: Sequence[Any]) -> _Result:
    """Runs a program equation by equation and collects the records of its sown moments."""
    consts = _internals.constants(program)
    values = dict(zip((*program.constvars, *program.invars), (*consts, *args), strict=True))
    records: list[Record] = []
    last_use = _last_use(program)

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, _internals.Literal) else values[atom]

    for position, eqn in enumerate(program.eqns):
        outputs, new = _apply(eqn, [read(atom) for atom in eqn.invars])
        values.update(zip(eqn.outvars, outputs, strict=True))
        records += new
        # Outside jit the values are concrete arrays: free each one after its last use.
        for atom in (*eqn.invars, *eqn.outvars):
            if not isinstance(atom, _internals.Literal) and last_use[atom] == position:
                values.pop(atom, None)
    # A literal is a NumPy or Python number, but outputs of the program must be arrays.
    results = [jnp.asarray(a.val) if isinstance(a, _internals.Literal) else values[a] for a in program.outvars]
    return results, records


def _last_use(program: _internals.Program) -> dict[Any, int]:
    """Position of the last equation that uses each variable; outputs of the program are used once more at the end."""
    mentions = [*[(*eqn.invars, *eqn.outvars) for eqn in program.eqns], program.outvars]
    return {
        a: position for position, atoms in enumerate(mentions) for a in atoms if not isinstance(a, _internals.Literal)
    }


def _apply(eqn: _internals.Equation, values: list[Any]) -> _Result:
    """Runs one equation with the scope names and the configuration under which it was traced."""
    with _internals.as_traced(eqn):
        if not _sows(eqn):
            return _internals.bind(eqn, values), []
        if (program := _internals.called_program(eqn)) is not None:
            outputs, records = _evaluate(program, values)
            # Inlining loses a custom derivative of the call; attach it to the outputs again.
            if _internals.has_own_derivative(eqn):
                outputs = _differentiated_as(partial(_internals.bind, eqn), values, outputs)
            # A recomputation of checkpoint sees the same values a second time.
            return outputs, [] if _internals.is_recomputation(eqn) else records
        if (name := eqn.primitive.name) not in _RULES:
            raise NotImplementedError(
                f"a normalization layer runs inside `{name}` ({_internals.place_of(eqn)}), for which jaxbn has no rule "
                f"in JAX {jax.__version__}, so its moments cannot be returned. Capture inside `{name}` instead of "
                f"around it, or move the layer out of it."
            )
        return _RULES[name](eqn, values)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _differentiated_as(fun: Callable[[list[Any]], list[Any]], values: list[Any], outputs: list[Any]) -> list[Any]:
    """Returns the outputs, with the derivative of `fun(values)`: the custom derivative of a call that was inlined."""
    return outputs


@_differentiated_as.defjvp
def _derivative_of_call(fun: Any, primals: Any, tangents: Any) -> tuple[list[Any], list[Any]]:
    (values, outputs), (of_values, _) = primals, tangents
    return outputs, jax.jvp(fun, (values,), (of_values,))[1]


# The rules: each returns the outputs of an equation that contains a `sow`, and the records of its moments.
def _record(eqn: _internals.Equation, values: list[Any]) -> _Result:
    y, index, *parts = values
    return [y], [Record(eqn.params["layer"], index, _moments.Moments(*parts))]


def _scan(eqn: _internals.Equation, values: list[Any]) -> _Result:
    scan = _internals.scan_of(eqn)
    consts, values = values[: scan.constants], values[scan.constants :]
    init, xs = values[: scan.carry], values[scan.carry :]

    def body(carry: list[Any], x: list[Any]) -> Any:
        outputs, records = _evaluate(scan.body, [*consts, *carry, *x])
        return outputs[: scan.carry], (outputs[scan.carry :], records)

    carry, (ys, records) = lax.scan(body, init, xs, **scan.options)
    return [*carry, *ys], records


def _zero_records(fun: Callable[[Any], _Result], args: list[Any]) -> list[Record]:
    """Records like those of `fun`, but of zeros. Zeros keep the type, which in shard_map includes the varying axes."""
    return jax.tree.map(jnp.zeros_like, jax.eval_shape(lambda args: fun(args)[1], args))


def _cond(eqn: _internals.Equation, values: list[Any]) -> _Result:
    """Each branch returns the records of all branches: its own, and zeros for the others. Also covers lax.switch."""
    branches, (which, *operands) = _internals.branches_of(eqn), values
    zeros = [_zero_records(partial(_evaluate, program), operands) for program in branches]

    def branch(position: int, *args: Any) -> Any:
        outputs, own = _evaluate(branches[position], args)
        return outputs, [*zeros[:position], own, *zeros[position + 1 :]]

    outputs, records = lax.switch(which, [partial(branch, position) for position in range(len(branches))], *operands)
    return outputs, [record for group in records for record in group]


def _while(eqn: _internals.Equation, values: list[Any]) -> _Result:
    """Pools the records of each layer over the iterations: their number is unknown, so they cannot be stacked."""
    loop = _internals.while_of(eqn)
    if any(map(_sows, loop.condition.eqns)):
        raise NotImplementedError("a normalization layer runs in the condition of `while`; move it into the body.")
    cond_consts, values = values[: loop.condition_constants], values[loop.condition_constants :]
    body_consts, init = values[: loop.body_constants], values[loop.body_constants :]

    def turn(carry: list[Any]) -> _Result:
        outputs, records = _evaluate(loop.body, [*body_consts, *carry])
        pooled = collect(records).items()
        return outputs, [Record(layer, jnp.arange(layer.size, dtype=jnp.int32), moments) for layer, moments in pooled]

    def body(state: Any) -> Any:
        outputs, new = turn(state[0])
        pairs = zip(state[1], new, strict=True)
        return outputs, [dataclasses.replace(b, moments=_moments.merge(a.moments, b.moments)) for a, b in pairs]

    def condition(state: Any) -> Any:
        return _evaluate(loop.condition, [*cond_consts, *state[0]])[0][0]

    return lax.while_loop(condition, body, (init, _zero_records(turn, init)))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Argument:
    """Stands for an index that entered a shard_map unsharded, so that the record returns that very array."""

    position: int


def _shard_map(eqn: _internals.Equation, values: list[Any]) -> _Result:
    """Returns one record per layer, pooled over the devices that saw different values, so equal on all of them."""
    program, mesh, in_specs, out_specs, check_vma, manual = _internals.shard_map_of(eqn)
    axes = [axis for axis in mesh.axis_names if axis in manual]
    unchecked: frozenset[str] = frozenset() if check_vma else _collectives.axes_of(in_specs) | _strings_in(program)
    # Without vma types, assume that a value varies over every axis that the specs or the inner operations name.
    whole = [position for position, spec in enumerate(in_specs) if not _collectives.axes_of([spec])]

    def pooled(layer: Any, group: list[Record], args: Sequence[Any]) -> Record:
        known = [position for position in whole if all(record.index is args[position] for record in group)]
        # A replicated index is passed around the shard_map: `collect` then recognizes it and needs no scatter.
        index: Any = _Argument(known[0]) if known else jnp.arange(layer.size, dtype=jnp.int32)
        moments = pool(group) if known else pool_by_index(group, layer.size)
        differing = unchecked.union(*map(_collectives.varying, moments))
        over = tuple(axis for axis in axes if axis in differing)
        return Record(layer, index, _moments.merge_over(moments, over) if over else moments)

    def shard(*args: Any) -> Any:
        outputs, records = _evaluate(program, args)
        return outputs, [pooled(layer, group, args) for layer, group in by_layer(records).items()]

    def restored(record: Record) -> Record:
        at: Any = record.index
        return dataclasses.replace(record, index=values[at.position]) if isinstance(at, _Argument) else record

    mapped = jax.shard_map(
        shard, mesh=mesh, in_specs=tuple(in_specs), out_specs=(list(out_specs), PartitionSpec()),
        axis_names={*axes, *mesh.manual_axes}, check_vma=check_vma,
    )  # fmt: skip
    outputs, records = jax.jit(mapped)(*values)  # outside jit, a shard_map is slow and supports fewer operations
    return outputs, [restored(record) for record in records]


def _strings_in(program: _internals.Program) -> set[str]:
    """All strings in the parameters of the equations, at any depth; they include each axis name that is used."""
    own = {leaf for eqn in program.eqns for leaf in jax.tree.leaves(eqn.params) if isinstance(leaf, str)}
    return own.union(*(_strings_in(inner) for eqn in program.eqns for inner in _internals.inner_programs(eqn)))


_RULES: dict[str, Callable[[_internals.Equation, list[Any]], _Result]] = {
    _sow.sow_p.name: _record,
    _internals.SCAN: _scan,
    _internals.COND: _cond,
    _internals.WHILE: _while,
    _internals.SHARD_MAP: _shard_map,
}
