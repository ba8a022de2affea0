"""The devices in sight, and the only collectives of the library: one gather forward, one sum backward.

A batch may lie on several devices in two ways, which may be combined. Under `jit` on sharded arrays the mesh is part of
the array's type and the compiler inserts the communication; the rows are then cut into one block for each device, so
that everything up to the gather stays where it is. Under `shard_map`, `pmap` and `vmap` the devices are a named axis
and the communication is written out.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxbn._src import internals as _internals
from jaxbn._src.numerics import explicit_meshes as _explicit_meshes

AxisName = str | tuple[str, ...]
Groups = tuple[tuple[int, ...], ...]


def count_blocks(x: jax.Array, rows: int) -> int:
    """Into how many blocks of equal size the rows (axis `rows` of x) are cut: one for each device of the mesh in sight.

    One where there is no mesh; fewer where its size does not divide the rows.
    """
    sharding = jax.typeof(x).sharding
    size = dict(zip(sharding.mesh.axis_names, sharding.mesh.axis_sizes, strict=True))
    types = dict(zip(sharding.mesh.axis_names, sharding.mesh.axis_types, strict=True))
    explicit = math.prod(size[name] for name in as_names(sharding.spec[rows]) if types[name] is AxisType.Explicit)
    automatic = math.prod(size[name] for name in size if types[name] is AxisType.Auto)
    return explicit * math.gcd(x.shape[rows] // explicit, automatic)


def cut(x: jax.Array, rows: int, blocks: int) -> jax.Array:
    """[.., N, ..] -> [.., blocks, N / blocks, ..] along axis `rows`, moving nothing; an axis of size 1 is kept."""
    blocks = blocks if x.shape[rows] > 1 else 1
    shape = (*x.shape[:rows], blocks, x.shape[rows] // blocks, *x.shape[rows + 1 :])
    if not _explicit_meshes.is_explicit(x):
        return x.reshape(shape)
    sharding = jax.typeof(x).sharding
    spec = sharding.spec
    devices = math.prod(sharding.mesh.shape[name] for name in as_names(spec[rows]))
    if 1 < blocks and blocks % devices:
        raise ValueError(
            f"Rows that are spread over {devices} devices of an Explicit mesh axis cannot be cut into {blocks} pieces "
            f"there. Use a mesh whose axes are Auto, or shard_map."
        )
    whole = (None, spec[rows]) if blocks == 1 else (spec[rows], None)
    spec = PartitionSpec(*spec[:rows], *whole, *spec[rows + 1 :])
    return lax.reshape(x, shape, out_sharding=NamedSharding(sharding.mesh, spec))


def uncut(x: jax.Array, like: jax.Array) -> jax.Array:
    """What was cut, in the shape of `like` again, moving nothing."""
    if not _explicit_meshes.is_explicit(like):
        return x.reshape(like.shape)
    return lax.reshape(x, like.shape, out_sharding=jax.typeof(like).sharding)


def repeat(stat: jax.Array, position: int, x: jax.Array, axis: int) -> jax.Array:
    """[C] once for each index along an axis of x, in the place `position`, and on the devices where these are."""
    shape = (*stat.shape[:position], x.shape[axis], *stat.shape[position:])
    sharding, stat = jax.typeof(x).sharding, jnp.expand_dims(stat, position)
    if not _explicit_meshes.is_explicit(x):
        return jnp.broadcast_to(stat, shape)
    spec = list(jax.typeof(stat).sharding.spec)
    spec[position] = sharding.spec[axis]
    return jnp.broadcast_to(stat, shape, out_sharding=NamedSharding(sharding.mesh, PartitionSpec(*spec)))


def gather(blocks: jax.Array, axis_name: AxisName | None, groups: Groups | None) -> jax.Array:
    """The rows [B, ...] of all devices as [P * B, ...], the same on each, in one all-gather.

    With groups, rows of the other groups are zeros: only `pmap` has collectives over groups, and this is right
    everywhere.
    """
    blocks = _replicate(blocks)
    if axis_name is None:
        return blocks
    blocks = _vary(blocks, axis_name)
    # Where a shard_map keeps track of what differs, the result must be known to be the same on all devices, or the
    # state could not leave with out_specs=P(). Elsewhere that type has a wrong derivative.
    tracked = set(as_names(axis_name)) <= varying(blocks)
    everywhere = lax.all_gather(blocks, axis_name, to="invarying" if tracked else "varying", tiled=True)
    if groups is not None:
        members = jnp.repeat(_members(axis_name, groups), len(blocks)).reshape(-1, *(1,) * (blocks.ndim - 1))
        everywhere = jnp.where(members, everywhere, jnp.zeros((), everywhere.dtype))
    return everywhere


def total(partial: jax.Array, axis_name: AxisName | None, groups: Groups | None) -> jax.Array:
    """The sum [...] of [B, ...] over blocks and devices, in one collective."""
    if axis_name is None:
        return partial.sum(0)
    if groups is not None:
        return gather(partial.sum(0, keepdims=True), axis_name, groups).sum(0)
    return lax.psum(_vary(partial.sum(0), axis_name), axis_name)


def group_size(axis_name: AxisName | None, groups: Groups | None) -> int:
    """How many devices share their statistics."""
    if axis_name is None:
        return 1
    return lax.axis_size(axis_name) if groups is None else len(groups[0])


def neighbours(axis_name: AxisName | None, size: int) -> Groups | None:
    """The devices of the axis in groups of `size` that lie next to each other; None where that is all of them."""
    if axis_name is None or size == lax.axis_size(axis_name):
        return None
    return tuple(tuple(range(first, first + size)) for first in range(0, lax.axis_size(axis_name), size))


def own_of_neighbours(tree: Any, axis_name: AxisName, size: int) -> Any:
    """Of arrays [P / size, ...] with something for each group of neighbours that for the group of this device."""

    def own(groups: jax.Array) -> jax.Array:
        if groups.shape[0] == 1:
            return groups[0]
        return lax.dynamic_index_in_dim(groups, lax.axis_index(axis_name) // size, keepdims=False)

    return jax.tree.map(own, tree)


def mean_over(tree: Any, axis_name: AxisName | None) -> Any:
    """The mean of each array over the devices of the axis; as it is where there is no axis."""
    return tree if axis_name is None else lax.pmean(make_varying(tree, axis_name), axis_name)


def make_varying(tree: Any, axis_name: AxisName | None) -> Any:
    """Marks arrays as differing over the axis where a shard_map keeps track of that, so that gradients stay local."""
    return tree if axis_name is None else jax.tree.map(lambda leaf: _vary(leaf, axis_name), tree)


def spread(batch: Any, mesh: Mesh) -> Any:
    """The batch on the devices of a mesh, its rows divided among them; what does not divide is whole on each."""

    def place(leaf: Any) -> jax.Array:
        divides = np.ndim(leaf) > 0 and np.shape(leaf)[0] % mesh.size == 0
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(mesh.axis_names) if divides else PartitionSpec()))

    return jax.tree.map(place, batch)


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh over which an array of the tree is placed; None where none is, and while tracing."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array) and not _internals.is_tracer(leaf):
            if isinstance(leaf.sharding, NamedSharding) and leaf.sharding.mesh.size > 1:
                return leaf.sharding.mesh  # type: ignore[return-value]  # not abstract, as the array is real
    return None


def is_split_by_index(x: jax.Array) -> bool:
    """Whether an array has a leading axis with one index on each device, as those have that `pmap` returns."""
    sharding = x.sharding
    if not isinstance(sharding, NamedSharding) or x.ndim == 0:
        return False
    names, spec = sharding.mesh.axis_names, sharding.spec
    return len(names) == 1 and x.shape[0] == sharding.mesh.size and tuple(spec) == names


def replicate(tree: Any, mesh: Mesh) -> Any:
    """The arrays on all devices of a mesh; those that are spread over its devices already stay as they are.

    Where the mesh has devices of other processes, each of them gives its own array, which must be the same.
    """
    devices, everywhere = set(mesh.devices.flat), NamedSharding(mesh, PartitionSpec())
    mine = [device for device in mesh.devices.flat if device in everywhere.addressable_devices]

    def place(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and leaf.sharding.device_set == devices:
            return leaf
        if everywhere.is_fully_addressable:
            return jax.device_put(leaf, everywhere)
        copies = [jax.device_put(leaf, device) for device in mine]
        return jax.make_array_from_single_device_arrays(copies[0].shape, everywhere, copies)

    return jax.tree.map(place, tree)


def pin(tree: Any, mesh: Mesh) -> Any:
    """Inside `jit`: the arrays as they are, whole on all devices of a mesh, where the compiler might spread them."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    if AxisType.Explicit in mesh.axis_types:
        tree = jax.sharding.reshard(tree, everywhere)
    return lax.with_sharding_constraint(tree, everywhere) if AxisType.Auto in mesh.axis_types else tree


def is_bound(axis_name: AxisName) -> bool:
    """Whether the axis exists here: a surrounding shard_map, pmap or vmap has it."""
    try:
        lax.axis_index(axis_name)
    except NameError:
        return False
    return True


def check_groups(axis_name: AxisName | None, groups: Any) -> Groups | None:
    """`axis_index_groups` as tuples; a ValueError where they cannot be groups of one axis."""
    if groups is None:
        return None
    groups = tuple(tuple(int(index) for index in group) for group in groups)
    members = [index for group in groups for index in group]
    if axis_name is None:
        raise ValueError("axis_index_groups needs axis_name= of the axis that it groups.")
    if len({len(group) for group in groups}) != 1 or sorted(members) != list(range(len(members))):
        raise ValueError(
            f"axis_index_groups must hold each index of the axis once, in groups of equal size, as in "
            f"[[0, 1], [2, 3]]; given: {groups}."
        )
    return groups


def varying(x: jax.Array) -> frozenset[str]:
    """The axes of a surrounding shard_map over which x may differ; none known with check_vma=False and under pmap."""
    return _internals.varying(x)


def axes_of(specs: Sequence[PartitionSpec]) -> frozenset[str]:
    """The axes over which the specs divide any array."""
    return frozenset(name for spec in specs for entry in spec for name in as_names(entry))


def vary_like(x: jax.Array | None, like: jax.Array) -> jax.Array | None:
    """Gives x a type that varies at least over the axes over which `like` does."""
    missing = () if x is None else tuple(sorted(varying(like) - varying(x)))
    return lax.pcast(x, missing, to="varying") if missing else x


def match_cotangent(
    local: jax.Array, primal: jax.Array, summed: jax.Array | None, axis_name: AxisName | None
) -> jax.Array:
    """The cotangent of `primal`, summed over the axes over which the primal does not vary.

    Under shard_map with check_vma=True a replicated parameter wants the sum over devices; where that is the sum
    `summed` over `axis_name` that the layer has made already, the parameters cost no collective of their own. Under
    pmap and with check_vma=False the cotangent stays `local`, and the user reduces it as for any other parameter.
    """
    missing = varying(local) - varying(primal)
    if not missing:
        return local
    if summed is not None and missing == set(as_names(axis_name)) and not missing & varying(summed):
        return summed
    return lax.psum(local, tuple(sorted(missing)))


def as_names(entry: Any) -> tuple[str, ...]:
    """Axis names in one entry of a PartitionSpec or in an `axis_name` argument."""
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return ()
    return tuple(entry) if isinstance(entry, Sequence) and not isinstance(entry, str) else (entry,)


def _replicate(blocks: jax.Array) -> jax.Array:
    """Makes the leading axis whole on every device of the mesh that `jit` shards over; features stay as they are."""
    sharding = jax.typeof(blocks).sharding
    if blocks.shape[0] == 1 or not set(sharding.mesh.axis_types) & {AxisType.Auto, AxisType.Explicit}:
        return blocks
    if _explicit_meshes.is_explicit(blocks):
        return jax.sharding.reshard(blocks, NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec[1:])))
    # Last, because vmap adds its axis to a constraint without moving the free axes behind a constrained one.
    free = PartitionSpec(*[PartitionSpec.UNCONSTRAINED] * (blocks.ndim - 1), None)
    last = lax.with_sharding_constraint(jnp.moveaxis(blocks, 0, -1), NamedSharding(sharding.mesh, free))
    return jnp.moveaxis(last, -1, 0)


def _vary(x: jax.Array, axis_name: AxisName) -> jax.Array:
    """Marks x as differing over the axis, as collectives want it, where a shard_map keeps track of that."""
    in_manual_mesh = set(as_names(axis_name)) <= set(
        jax.sharding.get_abstract_mesh().manual_axes
    )  # else it is a vmap's
    missing = tuple(name for name in as_names(axis_name) if name not in varying(x))
    return lax.pcast(x, missing, to="varying") if missing and in_manual_mesh else x


def _members(axis_name: AxisName, groups: Groups) -> jax.Array:
    """bool[P]: which devices along the axis are in the group of this one."""
    group_of = np.empty(sum(map(len, groups)), np.int32)
    for number, group in enumerate(groups):
        group_of[list(group)] = number
    return jnp.asarray(group_of) == jnp.asarray(group_of)[lax.axis_index(axis_name)]
