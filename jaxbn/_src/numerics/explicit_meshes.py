"""Support for meshes with Explicit axes, where the sharding is part of an array's type.

On such a mesh JAX refuses to combine arrays with different shardings, and the statistics of x are often sharded
differently from the running statistics. These functions give one the sharding of the other. Without Explicit axes the
compiler handles this, and the functions add no operation.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxbn._src import internals as _internals


def is_explicit(x: jax.Array) -> bool:
    """Whether the sharding of x is part of its type (a mesh with Explicit axes)."""
    return AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types


def on_channels(tree: Any, x: jax.Array, axes: Sequence[int]) -> Any:
    """Shards arrays [..., C] of a tree like the channel axes `axes` of x; arrays of lower rank (counters) stay."""
    if not is_explicit(x):
        return tree
    channels = [jax.typeof(x).sharding.spec[a] for a in axes]

    def place(leaf: jax.Array) -> jax.Array:
        # Statistics per domain, [D, C], have a leading axis that stays replicated.
        leading = jnp.ndim(leaf) - len(channels)
        return leaf if leading < 0 else _lay(leaf, x, [*[None] * leading, *channels])

    return jax.tree.map(place, tree)


def on_values(array: jax.Array, x: jax.Array) -> jax.Array:
    """Shards an array with the axes of x, or the leading ones, like x; axes of size 1 are replicated."""
    spec = jax.typeof(x).sharding.spec
    return _lay(array, x, [None if size == 1 else spec[a] for a, size in enumerate(array.shape)])


def as_before(tree: Any, before: Any) -> Any:
    """Gives the arrays of a tree the shardings of the tree `before`, so that a loop can carry them.

    An array that was on no mesh before is replicated.
    """

    def place(leaf: jax.Array, old: jax.Array) -> jax.Array:
        return _lay(leaf, old, jax.typeof(old).sharding.spec) if is_explicit(old) else whole(leaf)

    return jax.tree.map(place, tree, before)


def whole(x: jax.Array) -> jax.Array:
    """Replicates x on every device."""
    return _lay(x, x, [None] * x.ndim)


def rows(table: jax.Array, ids: jax.Array, x: jax.Array) -> jax.Array:
    """The rows `table[ids]`, sharded like the first axis of x; NaN where an id is out of range."""
    on = jax.typeof(x).sharding
    spec = PartitionSpec(on.spec[0], *jax.typeof(table).sharding.spec[1:])
    where = NamedSharding(on.mesh, spec) if is_explicit(x) else None
    return table.at[ids].get(mode="fill", fill_value=jnp.nan, out_sharding=where)


def _lay(array: jax.Array, x: jax.Array, spec: Sequence[Any]) -> jax.Array:
    """Gives the array this spec on the mesh of x, if that mesh has Explicit axes."""
    if not is_explicit(x) or (is_explicit(array) and jax.typeof(array).sharding.spec == PartitionSpec(*spec)):
        return array
    mesh: Any = jax.typeof(x).sharding.mesh if _internals.is_tracer(x) else x.sharding.mesh  # type: ignore[attr-defined]
    return jax.sharding.reshard(array, NamedSharding(mesh, PartitionSpec(*spec)))
