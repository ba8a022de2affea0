"""One computation on one device and on eight, in every way in which JAX spreads a batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

DEVICES = 8
AXIS = "devices"
WAYS = ["jit", "jit explicit", "shard_map", "shard_map unchecked", "pmap", "vmap"]
# The ways in which the axis has a name that layers must be told; under jit they see the whole batch anyway.
NAMED = WAYS[2:]


def mesh(kind: AxisType = AxisType.Auto) -> Mesh:
    return jax.make_mesh((DEVICES,), (AXIS,), axis_types=(kind,))


def spread(way: str, step: Callable[..., tuple[Any, Any]], replicated: Any, batch: Any) -> tuple[Callable, tuple]:
    """The step and its arguments, made ready to run in one of the `WAYS`.

    `step(replicated, batch) -> (replicated, sharded like the batch)`. The step itself reduces its replicated outputs.
    The returned function takes the returned arguments, and may be lowered.
    """
    if way.startswith("jit"):
        on = mesh(AxisType.Explicit if way == "jit explicit" else AxisType.Auto)
        arguments = jax.device_put((replicated, batch), (NamedSharding(on, P()), NamedSharding(on, P(AXIS))))
        return jax.jit(step), arguments
    if way.startswith("shard_map"):
        mapped = jax.shard_map(
            step,
            mesh=mesh(),
            in_specs=(P(), P(AXIS)),
            out_specs=(P(), P(AXIS)),
            check_vma=way == "shard_map",
        )
        return jax.jit(mapped), (replicated, batch)
    mapped = jax.pmap(step, axis_name=AXIS) if way == "pmap" else jax.jit(jax.vmap(step, axis_name=AXIS))
    return mapped, (jax.tree.map(lambda a: jnp.stack([a] * DEVICES), replicated), jax.tree.map(shards, batch))


def gathered(way: str, result: tuple[Any, Any]) -> tuple[Any, Any]:
    """The result of a spread step as one device would have given it, after checking that replicas agree."""
    same, like_batch = jax.tree.map(np.asarray, result)
    if way in ("pmap", "vmap"):
        for leaf in jax.tree.leaves(same):
            np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
        same = jax.tree.map(lambda a: a[0], same)
        like_batch = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), like_batch)
    return same, like_batch


def run(way: str, step: Callable[..., tuple[Any, Any]], replicated: Any, batch: Any) -> tuple[Any, Any]:
    mapped, arguments = spread(way, step, replicated, batch)
    return gathered(way, mapped(*arguments))


def shards(a: Any) -> jax.Array:
    return jnp.reshape(jnp.asarray(a), (DEVICES, -1, *a.shape[1:]))


def sum_gradients(way: str, gradients: Any) -> Any:
    """The convention of this library: losses are local sums, and replicated parameters want the sum over devices.

    Under jit and under shard_map with check_vma=True JAX has summed already; elsewhere the user does.
    """
    return jax.lax.psum(gradients, AXIS) if way in ("shard_map unchecked", "pmap", "vmap") else gradients
