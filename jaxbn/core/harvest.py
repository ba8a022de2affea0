"""The transformation that brings the moments of the marks in a program out of it.

`harvest(fun)` traces `fun` to a jaxpr and evaluates that. An equation without a mark inside is bound again untouched;
one with a mark inside has a rule, by which the moments become outputs: stacked by scan, zero where cond took another
branch, pooled in the carry of while and over the devices of shard_map, which pmap is too. So nothing leaks and nothing
is written. `collect` pools all that a layer saw.

Counts are multiples (mean and variance stay right) where JAX itself rewrites `fun` before it is seen here: a second
derivative of checkpoint, or a gradient of a scan whose layer sees only constants of the scan. So they are where the
devices of a shard_map saw the same, but nothing says so: what `lax.all_gather` gives is typed as varying; and with
check_vma=False, as in pmap, an axis counts as varying if an in_spec or an operation inside names it. And `vmap` of a
cond or while whose predicate differs per lane runs every branch on every lane: put that `vmap` around the call instead.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core, source_info_util
from jax.extend.core import primitives
from jax.sharding import PartitionSpec

from jaxbn.core import devices as _devices
from jaxbn.core import marks as _marks
from jaxbn.core import moments as _moments

_Output = TypeVar("_Output")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Record:
    """One mark, or a stack of them; a pytree with a static layer, so that jit, scan and the like may return it."""

    layer: _marks.Layer = dataclasses.field(metadata={"static": True})
    index: jax.Array  # i32[..., C]: flat positions in the layer; of no matter where the count is 0
    moments: _moments.Moments  # f32[..., C] each


# What a rule and the evaluator return: the values of the equation's outputs, and the marks met on the way.
_Result = tuple[list[Any], list[Record]]


def harvest(fun: Callable[..., _Output]) -> Callable[..., tuple[_Output, list[Record]]]:
    """`fun(*args) -> out` becomes `(out, records)`, with one record for every mark that the program met.

    The result may be called anywhere, within jit, vmap, pmap and shard_map too: the records are then those of one lane
    or device. Where `fun` itself runs a pmap or shard_map, they are those of all its devices. It is traced at each
    call, so wrap it in `jax.jit` to call it repeatedly. jit and checkpoint around a mark are inlined. Arguments and
    outputs may be any pytrees; leaves that are no arrays pass through untraced.

    Raises:
        NotImplementedError: When called, if a mark lies inside an operation for which there is no rule.
    """

    def harvested(*args: Any) -> tuple[_Output, list[Record]]:
        inputs = over_arrays(args)
        traced = jax.make_jaxpr(lambda inputs: over_arrays(fun(*inputs())), return_shape=True)
        closed, shapes = traced(inputs)
        outputs, records = _evaluate(closed, jax.tree.leaves(inputs))
        return jax.tree.unflatten(jax.tree.structure(shapes), outputs)(), records

    return harvested


def collect(records: Iterable[Record], whole: Mapping[Any, jax.Array] | None = None) -> dict[Any, _moments.Moments]:
    """Exact pooled moments, flat `[layer.size]`, of each layer that has a record; 0 at positions that have none.

    Args:
        records: What :func:`harvest` returned.
        whole: The index `arange(size)`, of any shape, that went into the program for each layer. A mark that carries
            this very array met no transformation on its way, so its moments are in place and need no scatter.
    """
    pooled = {}
    for layer, group in _by_layer(records).items():
        in_place = whole is not None and all(record.index is whole.get(layer) for record in group)
        pooled[layer] = jax.tree.map(jnp.ravel, _pool(group)) if in_place else _pool_by_index(group, layer.size)
    return pooled


def _by_layer(records: Iterable[Record]) -> dict[Any, list[Record]]:
    by_layer: dict[Any, list[Record]] = {}
    for record in records:
        by_layer.setdefault(record.layer, []).append(record)
    return by_layer


def _pool(records: Sequence[Record]) -> _moments.Moments:
    """Moments of records that have one and the same index."""
    parts = [record.moments for record in records]
    return parts[0] if len(parts) == 1 else _moments.pool(jax.tree.map(lambda *part: jnp.stack(part), *parts))


def _pool_by_index(records: Sequence[Record], size: int) -> _moments.Moments:
    """What `moments.pool` computes, with the sum over parts replaced by a sum over equal positions."""
    columns = zip(*((record.index, *record.moments) for record in records), strict=True)
    index, count, mean, m2 = (jnp.concatenate([jnp.ravel(part) for part in column]) for column in columns)

    def total(values: jax.Array) -> jax.Array:
        return jnp.zeros(size, values.dtype).at[index].add(values)

    count_total = total(count)
    weight = (count / jnp.where(count_total > 0, count_total, 1)[index]).astype(mean.dtype)
    # Once more about a first estimate: deviations from a mean rounded at 1e4 would swamp a deviation of 1e-2.
    origin = total(weight * mean)
    offset = mean - origin[index]
    correction = total(weight * offset)
    deviation = jnp.abs(offset - correction[index])  # real for complex means too
    return _moments.Moments(count_total, origin + correction, total(m2 + count * jnp.square(deviation)))


def over_arrays(tree: Any) -> Any:
    """The tree as a `Partial` of its arrays: a pytree that keeps other leaves (numbers, strings) out of the trace."""
    leaves, structure = jax.tree.flatten(tree)
    positions = [i for i, leaf in enumerate(leaves) if hasattr(leaf, "dtype") and core.valid_jaxtype(leaf)]
    others = dict(enumerate(leaves))
    arrays = [jnp.asarray(others.pop(i)) for i in positions]  # the same object, if it is a jax.Array already

    def rebuild(*arrays: Any) -> Any:
        by_position = others | dict(zip(positions, arrays, strict=True))
        return jax.tree.unflatten(structure, [by_position[i] for i in sorted(by_position)])

    return jax.tree_util.Partial(rebuild, *arrays)


def _marked(eqn: Any) -> bool:
    """Whether the equation is a mark, or holds one in its jaxprs, however deep."""
    return eqn.primitive is _marks.mark_p or any(_marked(e) for j in core.jaxprs_in_params(eqn.params) for e in j.eqns)


def _evaluate(jaxpr: core.Jaxpr | core.ClosedJaxpr, args: Sequence[Any]) -> _Result:
    """Runs a jaxpr, as `jax.core.eval_jaxpr` does, and collects the records of its marks on the way."""
    jaxpr, consts = (jaxpr.jaxpr, jaxpr.consts) if isinstance(jaxpr, core.ClosedJaxpr) else (jaxpr, ())
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
    records: list[Record] = []
    last_use = _last_use(jaxpr)

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    for position, eqn in enumerate(jaxpr.eqns):
        outputs, new = _apply(eqn, [read(atom) for atom in eqn.invars])
        values.update(zip(eqn.outvars, outputs, strict=True))
        records += new
        for atom in (*eqn.invars, *eqn.outvars):  # outside jit the values are real: free each after its last use
            if not isinstance(atom, core.Literal) and last_use[atom] == position:
                values.pop(atom, None)
    # A literal is a NumPy or Python number, which as an output of the program has to be an array.
    results = [jnp.asarray(a.val) if isinstance(a, core.Literal) else values[a] for a in jaxpr.outvars]
    return results, records


def _last_use(jaxpr: core.Jaxpr) -> dict[Any, int]:
    """Position of the last equation that mentions a variable; the outputs are mentioned once more, at the end."""
    mentions = [*((*eqn.invars, *eqn.outvars) for eqn in jaxpr.eqns), jaxpr.outvars]
    return {a: position for position, atoms in enumerate(mentions) for a in atoms if not isinstance(a, core.Literal)}


def _apply(eqn: Any, values: list[Any]) -> _Result:
    """Runs one equation under the scope names and the configuration (`ctx`) that it was traced with."""
    names = source_info_util.current_name_stack() + eqn.source_info.name_stack
    with source_info_util.user_context(eqn.source_info.traceback, name_stack=names), eqn.ctx.manager:
        if _marked(eqn):
            if (name := eqn.primitive.name) not in _RULES:
                place = source_info_util.summarize(eqn.source_info) or "place unknown"
                raise NotImplementedError(
                    f"a marked layer runs inside `{name}` ({place}), out of which its moments cannot be taken. "
                    f"Capture inside `{name}` instead of around it, or move the layer out of it."
                )
            return _RULES[name](values, **eqn.params)
        # Undoes what tracing did to the parameters of custom derivatives and calls; the identity for all others.
        outputs = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
        return (outputs if eqn.primitive.multiple_results else [outputs]), []


# The rules. Their keyword arguments are the parameters that JAX gives these primitives; the rest does not matter here.
def _record(values: list[Any], *, layer: _marks.Layer) -> _Result:
    y, index, *parts = values
    return [y], [Record(layer, index, _moments.Moments(*parts))]


def _inline(parameter: str) -> Callable[..., _Result]:
    return lambda values, **params: _evaluate(params[parameter], values)


def _remat(values: list[Any], *, jaxpr: core.Jaxpr, differentiated: bool, **_: Any) -> _Result:
    outputs, records = _evaluate(jaxpr, values)
    return outputs, [] if differentiated else records  # differentiated: the recomputation for a gradient, no new call


def _scan(values: list[Any], *, jaxpr: core.ClosedJaxpr, num_consts: int, num_carry: int, **params: Any) -> _Result:
    consts, values = values[:num_consts], values[num_consts:]
    init, xs = values[:num_carry], values[num_carry:]

    def body(carry: list[Any], x: list[Any]) -> Any:
        outputs, records = _evaluate(jaxpr, [*consts, *carry, *x])
        return outputs[:num_carry], (outputs[num_carry:], records)

    options = {name: params[name] for name in ("length", "reverse", "unroll")}
    carry, (ys, records) = lax.scan(body, init, xs, **options)
    return [*carry, *ys], records


def _nothing_of(fun: Callable[[Any], _Result], args: list[Any]) -> list[Record]:
    """The records of `fun` with zeros for values, of the same type (within shard_map: that varies over devices too)."""
    return jax.tree.map(jnp.zeros_like, jax.eval_shape(lambda args: fun(args)[1], args))


def _cond(values: list[Any], *, branches: Sequence[core.ClosedJaxpr], **_: Any) -> _Result:
    """Each branch returns the records of all: its own, and nothing for the others. Also lax.switch."""
    which, *operands = values
    nothing = [_nothing_of(partial(_evaluate, jaxpr), operands) for jaxpr in branches]

    def branch(position: int, *args: Any) -> Any:
        outputs, own = _evaluate(branches[position], args)
        return outputs, [*nothing[:position], own, *nothing[position + 1 :]]

    outputs, records = lax.switch(which, [partial(branch, position) for position in range(len(branches))], *operands)
    return outputs, [record for group in records for record in group]


def _while(values: list[Any], *, cond_jaxpr: Any, cond_nconsts: int, body_jaxpr: Any, body_nconsts: int) -> _Result:
    """How often it runs is not known, so nothing can be stacked: one record per layer, pooled from turn to turn."""
    if any(map(_marked, cond_jaxpr.eqns)):
        raise NotImplementedError("a marked layer runs in the condition of `while`; move it into the body.")
    cond_consts, values = values[:cond_nconsts], values[cond_nconsts:]
    body_consts, init = values[:body_nconsts], values[body_nconsts:]

    def turn(carry: list[Any]) -> _Result:
        outputs, records = _evaluate(body_jaxpr, [*body_consts, *carry])
        pooled = collect(records).items()
        return outputs, [Record(layer, jnp.arange(layer.size, dtype=jnp.int32), moments) for layer, moments in pooled]

    def body(state: Any) -> Any:
        outputs, new = turn(state[0])
        pairs = zip(state[1], new, strict=True)
        return outputs, [dataclasses.replace(b, moments=_moments.merge(a.moments, b.moments)) for a, b in pairs]

    nothing = _nothing_of(turn, init)
    return lax.while_loop(lambda state: _evaluate(cond_jaxpr, [*cond_consts, *state[0]])[0][0], body, (init, nothing))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Argument:
    """Stands for an index that went into a shard_map whole, so that the very same array comes out with the record."""

    position: int


def _shard_map(
    values: list[Any], *, jaxpr: core.Jaxpr, mesh: Any, in_specs: Any, out_specs: Any, check_vma: bool, **params: Any
) -> _Result:
    """One record per layer, pooled over the devices that have seen different values, and so the same on all of them."""
    # In jax 0.10.0 it has the other name, and holds what an outer shard_map has made manual as well.
    manual = params["newly_manual_axes" if "newly_manual_axes" in params else "manual_axes"]
    axes = [axis for axis in mesh.axis_names if axis in manual and axis not in mesh.manual_axes]
    unchecked: frozenset[str] = frozenset() if check_vma else _devices.axes_of(in_specs) | _strings_in(jaxpr)
    whole = [position for position, spec in enumerate(in_specs) if not _devices.axes_of([spec])]

    def pooled(layer: Any, group: list[Record], args: Sequence[Any]) -> Record:
        known = [position for position in whole if all(record.index is args[position] for record in group)]
        index: Any = _Argument(known[0]) if known else jnp.arange(layer.size, dtype=jnp.int32)
        moments = _pool(group) if known else _pool_by_index(group, layer.size)
        differing = unchecked.union(*map(_devices.varying, moments))
        over = tuple(axis for axis in axes if axis in differing)
        return Record(layer, index, _moments.merge_over(moments, over) if over else moments)

    def shard(*args: Any) -> Any:
        outputs, records = _evaluate(jaxpr, args)
        return outputs, [pooled(layer, group, args) for layer, group in _by_layer(records).items()]

    def restored(record: Record) -> Record:
        at: Any = record.index
        return dataclasses.replace(record, index=values[at.position]) if isinstance(at, _Argument) else record

    mapped = jax.shard_map(
        shard, mesh=mesh, in_specs=tuple(in_specs), out_specs=(list(out_specs), PartitionSpec()),
        axis_names={*axes, *mesh.manual_axes}, check_vma=check_vma,
    )  # fmt: skip
    outputs, records = jax.jit(mapped)(*values)  # outside jit, JAX can do less with a shard_map, and is slow
    return outputs, [restored(record) for record in records]


def _strings_in(jaxpr: core.Jaxpr) -> set[str]:
    """All strings among the parameters of the equations, however deep: each axis that one of them uses is there."""
    own = {leaf for eqn in jaxpr.eqns for leaf in jax.tree.leaves(eqn.params) if isinstance(leaf, str)}
    return own.union(*(_strings_in(inner) for eqn in jaxpr.eqns for inner in core.jaxprs_in_params(eqn.params)))


_RULES: dict[str, Callable[..., _Result]] = {
    _marks.mark_p.name: _record,
    primitives.jit_p.name: _inline("jaxpr"),
    primitives.remat_p.name: _remat,
    primitives.call_p.name: _inline("call_jaxpr"),
    primitives.closed_call_p.name: _inline("call_jaxpr"),
    primitives.custom_jvp_call_p.name: _inline("call_jaxpr"),
    primitives.custom_vjp_call_p.name: _inline("call_jaxpr"),
    "custom_vmap_call": _inline("call"),  # the one primitive that jax.extend does not export
    primitives.scan_p.name: _scan,
    primitives.cond_p.name: _cond,
    primitives.while_p.name: _while,
    "shard_map": _shard_map,
}
