"""Blocks of rows per device, and the library's only collectives: gathers and sums over devices.

A batch can lie on several devices in two ways, which may be combined. Under `jit` with sharded arrays, the mesh is part
of the array's type and the compiler inserts the communication. The rows are then cut into one block per device, so
everything before the gather stays local. Under `shard_map`, `pmap` and `vmap` the devices are a named axis, and the
communication is explicit.
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

# Up to this many devices, one gather of all blocks is the cheapest. It grows with the devices; sums do not.
_GATHERED = 8


def count_blocks(x: jax.Array, rows: int) -> int:
    """Number of equal blocks that the rows (axis `rows` of x) are cut into: one for each device of the current mesh.

    One if there is no mesh; fewer than the devices if their number does not divide the rows.
    """
    sharding = jax.typeof(x).sharding
    size = dict(zip(sharding.mesh.axis_names, sharding.mesh.axis_sizes, strict=True))
    types = dict(zip(sharding.mesh.axis_names, sharding.mesh.axis_types, strict=True))
    explicit = math.prod(size[name] for name in as_names(sharding.spec[rows]) if types[name] is AxisType.Explicit)
    # Explicit axes shard the array axes that its type names. Auto axes may shard any; assume that they shard rows.
    automatic = math.prod(size[name] for name in size if types[name] is AxisType.Auto)
    return explicit * math.gcd(x.shape[rows] // explicit, automatic)


def cut(x: jax.Array, rows: int, blocks: int) -> jax.Array:
    """[.., N, ..] -> [.., blocks, N / blocks, ..] along axis `rows`, without moving data; an axis of size 1 is kept."""
    blocks = blocks if x.shape[rows] > 1 else 1
    shape = (*x.shape[:rows], blocks, x.shape[rows] // blocks, *x.shape[rows + 1 :])
    if not _explicit_meshes.is_explicit(x):
        return x.reshape(shape)
    sharding = jax.typeof(x).sharding
    spec = sharding.spec
    devices = math.prod(sharding.mesh.shape[name] for name in as_names(spec[rows]))
    if 1 < blocks and blocks % devices:
        raise ValueError(
            f"Rows that are sharded over {devices} devices of an Explicit mesh axis cannot be cut into {blocks} pieces "
            f"there. Use a mesh whose axes are Auto, or shard_map."
        )
    # A single block keeps the sharding on its rows; several blocks are sharded themselves.
    whole = (None, spec[rows]) if blocks == 1 else (spec[rows], None)
    spec = PartitionSpec(*spec[:rows], *whole, *spec[rows + 1 :])
    return lax.reshape(x, shape, out_sharding=NamedSharding(sharding.mesh, spec))


def uncut(x: jax.Array, like: jax.Array) -> jax.Array:
    """Reverses `cut`: returns an array of the shape of `like`, without moving data."""
    if not _explicit_meshes.is_explicit(like):
        return x.reshape(like.shape)
    return lax.reshape(x, like.shape, out_sharding=jax.typeof(like).sharding)


def repeat(stat: jax.Array, position: int, x: jax.Array, axis: int) -> jax.Array:
    """Repeats [C] for each index along axis `axis` of x, as a new axis at `position`, sharded like that axis of x."""
    shape = (*stat.shape[:position], x.shape[axis], *stat.shape[position:])
    sharding, stat = jax.typeof(x).sharding, jnp.expand_dims(stat, position)
    if not _explicit_meshes.is_explicit(x):
        return jnp.broadcast_to(stat, shape)
    spec = list(jax.typeof(stat).sharding.spec)
    spec[position] = sharding.spec[axis]
    return jnp.broadcast_to(stat, shape, out_sharding=NamedSharding(sharding.mesh, PartitionSpec(*spec)))


def is_gathered(blocks: jax.Array, axis_name: AxisName | None, groups: Groups | None) -> bool:
    """Whether so few devices share the statistics of the blocks that these should be gathered and not summed."""
    mesh = jax.typeof(blocks).sharding.mesh
    sizes = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    in_jit = math.prod(size for size, kind in sizes if kind is not AxisType.Manual)
    return in_jit * group_size(axis_name, groups) <= _GATHERED


def gather(blocks: jax.Array, axis_name: AxisName | None, groups: Groups | None) -> jax.Array:
    """Gathers the rows [B, ...] of all devices to [P * B, ...], equal on each device, in one all-gather.

    With groups, P counts the devices of a group. Under `vmap`, which has no collectives over groups, the rows of other
    groups are there as zeros.
    """
    blocks = _replicate(blocks)
    if axis_name is None:
        return blocks
    blocks = _vary(blocks, axis_name)
    if groups is not None and _is_manual(axis_name):
        return lax.all_gather(blocks, axis_name, axis_index_groups=groups, tiled=True)
    # If shard_map tracks varying axes, the result must have an invarying type, or the state could not be returned with
    # out_specs=P(). Without tracking, that type would have a wrong derivative.
    tracked = set(as_names(axis_name)) <= varying(blocks)
    everywhere = lax.all_gather(blocks, axis_name, to="invarying" if tracked else "varying", tiled=True)
    if groups is not None:
        members = jnp.repeat(_members(axis_name, groups), len(blocks)).reshape(-1, *(1,) * (blocks.ndim - 1))
        everywhere = jnp.where(members, everywhere, jnp.zeros((), everywhere.dtype))
    return everywhere


def total(partial: jax.Array, axis_name: AxisName | None, groups: Groups | None) -> jax.Array:
    """Sums [B, ...] over blocks and devices to [...]; the bytes sent do not grow with the number of devices."""
    local = partial.sum(0)
    if axis_name is None:
        return local
    local = _vary(local, axis_name)
    if groups is None:
        return lax.psum(local, axis_name)
    # psum over groups does not exist under a shard_map that tracks varying axes.
    if group_size(axis_name, groups) <= _GATHERED or not _is_manual(axis_name) or _explicit_meshes.is_explicit(local):
        return gather(local[None], axis_name, groups).sum(0)
    flat = jnp.pad(local.ravel(), (0, -local.size % len(groups[0])))
    share = lax.psum_scatter(flat, axis_name, axis_index_groups=groups, tiled=True)
    whole = lax.all_gather(share, axis_name, axis_index_groups=groups, tiled=True)
    return whole[: local.size].reshape(local.shape)


def group_size(axis_name: AxisName | None, groups: Groups | None) -> int:
    """Number of devices that share their statistics."""
    if axis_name is None:
        return 1
    return lax.axis_size(axis_name) if groups is None else len(groups[0])


def neighbours(axis_name: AxisName | None, size: int) -> Groups | None:
    """Groups of `size` adjacent devices along the axis; None if one group holds all of them."""
    if axis_name is None or size == lax.axis_size(axis_name):
        return None
    return tuple(tuple(range(first, first + size)) for first in range(0, lax.axis_size(axis_name), size))


def own_of_neighbours(tree: Any, axis_name: AxisName, size: int) -> Any:
    """Selects from arrays [P / size, ...], which hold one entry per group of neighbours, the entry of this device."""

    def own(groups: jax.Array) -> jax.Array:
        if groups.shape[0] == 1:
            return groups[0]
        return lax.dynamic_index_in_dim(groups, lax.axis_index(axis_name) // size, keepdims=False)

    return jax.tree.map(own, tree)


def mean_over(tree: Any, axis_name: AxisName | None) -> Any:
    """The mean of each array over the devices of the axis; unchanged without an axis."""
    return tree if axis_name is None else lax.pmean(make_varying(tree, axis_name), axis_name)


def make_varying(tree: Any, axis_name: AxisName | None) -> Any:
    """Gives arrays a type that varies over the axis if a shard_map tracks that, so that gradients stay local."""
    return tree if axis_name is None else jax.tree.map(lambda leaf: _vary(leaf, axis_name), tree)


def spread(batch: Any, mesh: Mesh) -> Any:
    """Puts a batch on a mesh with its rows sharded; replicates arrays whose rows do not divide by the devices."""

    def place(leaf: Any) -> jax.Array:
        divides = np.ndim(leaf) > 0 and np.shape(leaf)[0] % mesh.size == 0
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(mesh.axis_names) if divides else PartitionSpec()))

    return jax.tree.map(place, batch)


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh on which the first sharded array of the tree lies; None if there is none, and while tracing."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array) and not _internals.is_tracer(leaf):
            if isinstance(leaf.sharding, NamedSharding) and leaf.sharding.mesh.size > 1:
                return leaf.sharding.mesh  # type: ignore[return-value]  # not abstract, since the array is concrete
    return None


def is_split_by_index(x: jax.Array) -> bool:
    """Whether an array has a leading axis with one index per device, like the arrays that `pmap` returns."""
    sharding = x.sharding
    if not isinstance(sharding, NamedSharding) or x.ndim == 0:
        return False
    names, spec = sharding.mesh.axis_names, sharding.spec
    return len(names) == 1 and x.shape[0] == sharding.mesh.size and tuple(spec) == names


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Replicates the arrays on all devices of a mesh; arrays that already lie on these devices stay as they are.

    If the mesh spans several processes, each process passes its own copy, and all copies must be equal.
    """
    devices, everywhere = set(mesh.devices.flat), NamedSharding(mesh, PartitionSpec())
    mine = [device for device in mesh.devices.flat if device in everywhere.addressable_devices]

    def place(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and leaf.sharding.device_set == devices:
            return leaf
        if everywhere.is_fully_addressable:
            return jax.device_put(leaf, everywhere)
        # device_put cannot address devices of other processes: each process contributes its own copies.
        copies = [jax.device_put(leaf, device) for device in mine]
        return jax.make_array_from_single_device_arrays(copies[0].shape, everywhere, copies)

    return jax.tree.map(place, tree)


def pin(tree: Any, mesh: Mesh) -> Any:
    """Constrains arrays inside `jit` to stay replicated on a mesh, since the compiler might shard them."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    # Explicit axes need a reshard, Auto axes a constraint; a mesh may have both.
    if AxisType.Explicit in mesh.axis_types:
        tree = jax.sharding.reshard(tree, everywhere)
    return lax.with_sharding_constraint(tree, everywhere) if AxisType.Auto in mesh.axis_types else tree


def is_bound(axis_name: AxisName) -> bool:
    """Whether a surrounding shard_map, pmap or vmap defines this axis."""
    try:
        lax.axis_index(axis_name)
    except NameError:
        return False
    return True


def static(axis_name: str | Sequence[str] | None) -> AxisName | None:
    """The `axis_name` argument in a form that can be hashed."""
    return axis_name if axis_name is None or isinstance(axis_name, str) else tuple(axis_name)


def check_groups(axis_name: AxisName | None, groups: Any) -> Groups | None:
    """Converts `axis_index_groups` to tuples; raises a ValueError if they are not groups of one axis."""
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
    """The shard_map axes over which x may vary; empty with check_vma=False and under pmap, which do not track them."""
    return _internals.varying(x)


def axes_of(specs: Sequence[PartitionSpec]) -> frozenset[str]:
    """The axes over which the specs shard any array."""
    return frozenset(name for spec in specs for entry in spec for name in as_names(entry))


def vary_like(x: jax.Array | None, like: jax.Array) -> jax.Array | None:
    """Gives x a type that varies at least over the axes of `like`."""
    missing = () if x is None else tuple(sorted(varying(like) - varying(x)))
    return lax.pcast(x, missing, to="varying") if missing else x


def match_cotangent(
    local: jax.Array, primal: jax.Array, summed: jax.Array | None, axis_name: AxisName | None
) -> jax.Array:
    """The cotangent of `primal`, summed over the axes over which the primal does not vary.

    Under shard_map with check_vma=True, the cotangent of a replicated parameter is the sum over devices. If the layer
    has already computed that sum (`summed`, over `axis_name`), the parameters need no collective of their own. Under
    pmap and with check_vma=False the cotangent stays `local`, and you reduce it like that of any other parameter.
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
    """Replicates the leading axis over the mesh that `jit` shards over; the feature axes stay as they are."""
    sharding = jax.typeof(blocks).sharding
    if blocks.shape[0] == 1 or not set(sharding.mesh.axis_types) & {AxisType.Auto, AxisType.Explicit}:
        return blocks
    if _explicit_meshes.is_explicit(blocks):
        return jax.sharding.reshard(blocks, NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec[1:])))
    # The constrained axis goes last: vmap adds its axis to the spec without moving the free axes behind it.
    free = PartitionSpec(*[PartitionSpec.UNCONSTRAINED] * (blocks.ndim - 1), None)
    last = lax.with_sharding_constraint(jnp.moveaxis(blocks, 0, -1), NamedSharding(sharding.mesh, free))
    return jnp.moveaxis(last, -1, 0)


def _vary(x: jax.Array, axis_name: AxisName) -> jax.Array:
    """Gives x a type that varies over the axis, as collectives require, if a shard_map tracks that."""
    missing = tuple(name for name in as_names(axis_name) if name not in varying(x))
    return lax.pcast(x, missing, to="varying") if missing and _is_manual(axis_name) else x


def _is_manual(axis_name: AxisName) -> bool:
    """Whether the axis is one of a shard_map or pmap, and not of a vmap."""
    return set(as_names(axis_name)) <= set(jax.sharding.get_abstract_mesh().manual_axes)


def _members(axis_name: AxisName, groups: Groups) -> jax.Array:
    """bool[P]: which devices along the axis are in the same group as this one."""
    group_of = np.empty(sum(map(len, groups)), np.int32)
    for number, group in enumerate(groups):
        group_of[list(group)] = number
    return jnp.asarray(group_of) == jnp.asarray(group_of)[lax.axis_index(axis_name)]
