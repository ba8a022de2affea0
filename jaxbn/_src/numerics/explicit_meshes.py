"""Meshes with Explicit axes, on which it is part of an array's type how it is spread over the devices.

There JAX computes nothing from arrays that are spread differently, and statistics that come from x may well be spread
in another way than stored ones. These functions lay one like the other. Where no axis is Explicit the compiler sees to
it, and nothing is added to the program.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxbn._src import internals as _internals


def is_explicit(x: jax.Array) -> bool:
    """Whether the type of x says where on an Explicit mesh it is."""
    return any(kind is AxisType.Explicit for kind in jax.typeof(x).sharding.mesh.axis_types)


def on_channels(tree: Any, x: jax.Array, axes: Sequence[int]) -> Any:
    """The arrays [..., C] of a tree on the devices where x has its channels, its axes `axes`; counters stay."""
    if not is_explicit(x):
        return tree
    channels = [jax.typeof(x).sharding.spec[a] for a in axes]

    def place(leaf: jax.Array) -> jax.Array:
        leading = jnp.ndim(leaf) - len(channels)
        return leaf if leading < 0 else _lay(leaf, x, [*[None] * leading, *channels])

    return jax.tree.map(place, tree)


def on_values(array: jax.Array, x: jax.Array) -> jax.Array:
    """An array with the axes of x, or the first of them, on the devices where x has these values; an axis may be 1."""
    spec = jax.typeof(x).sharding.spec
    return _lay(array, x, [None if size == 1 else spec[a] for a, size in enumerate(array.shape)])


def as_before(tree: Any, before: Any) -> Any:
    """The arrays of a tree where those of the tree `before` were, so that a loop may carry them.

    What was on no mesh, and now is, is whole on each device.
    """

    def place(leaf: jax.Array, old: jax.Array) -> jax.Array:
        return _lay(leaf, old, jax.typeof(old).sharding.spec) if is_explicit(old) else whole(leaf)

    return jax.tree.map(place, tree, before)


def whole(x: jax.Array) -> jax.Array:
    """All of x on each device."""
    return _lay(x, x, [None] * x.ndim)


def rows(table: jax.Array, ids: jax.Array, x: jax.Array) -> jax.Array:
    """The rows `table[ids]`, on the devices where x has its first axis; NaN where an id is none."""
    on = jax.typeof(x).sharding
    spec = PartitionSpec(on.spec[0], *jax.typeof(table).sharding.spec[1:])
    where = NamedSharding(on.mesh, spec) if is_explicit(x) else None
    return table.at[ids].get(mode="fill", fill_value=jnp.nan, out_sharding=where)


def _lay(array: jax.Array, x: jax.Array, spec: Sequence[Any]) -> jax.Array:
    """The array spread like this over the mesh of x, if that is an Explicit one."""
    if not is_explicit(x) or (is_explicit(array) and jax.typeof(array).sharding.spec == PartitionSpec(*spec)):
        return array
    mesh: Any = jax.typeof(x).sharding.mesh if _internals.is_tracer(x) else x.sharding.mesh  # type: ignore[attr-defined]
    return jax.sharding.reshard(array, NamedSharding(mesh, PartitionSpec(*spec)))
