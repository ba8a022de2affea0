"""Communication between processes, and the parts of an array that each of them holds.

Short messages, such as errors, go through the coordination service that `jax.distributed.initialize` starts, so the
devices continue to work meanwhile. Values, such as accumulators, go through the devices. A process in which something
fails sends the error, so that all processes raise instead of waiting forever.
"""

import hashlib
import itertools
import json
import pickle
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import NamedSharding, PartitionSpec

from jaxbn._src import internals as _internals
from jaxbn._src.numerics import collectives as _collectives

_Result = TypeVar("_Result")

# Numbers the exchanges. It is the same in all processes, because they exchange equally often.
_exchanges = itertools.count()

# How long a process waits for the others in an exchange, in milliseconds. One of them may have many batches left.
_PATIENCE = 7 * 24 * 3600 * 1000

# Leaves of normalization layers that have an axis of channels.
_PER_CHANNEL = {"mean", "var", "scale", "bias"}


def agree(attempt: Callable[[], tuple[_Result, Any]]) -> tuple[_Result, list[Any]]:
    """Runs something that may fail in a single process, and makes all processes raise. Every process must call it.

    Args:
        attempt: Returns a result, and a message for the other processes that JSON can hold.

    Returns:
        The result of this process, and the messages of all processes by index.

    Raises:
        RuntimeError: If it failed in another process; this process raises its own exception unchanged.
    """
    result, told, error = None, None, None
    try:
        result, told = attempt()
    except Exception as raised:  # the other processes must be told of any error
        error = raised
    failed = None if error is None else f"{type(error).__name__}: {error}"
    # Also after an error: the other processes wait until every process has called this.
    everything = [json.loads(message) for message in exchange(json.dumps([failed, told]).encode())]
    if error is not None:
        raise error
    for process, (failed, _) in enumerate(everything):
        if failed:
            raise RuntimeError(
                f"Process {process} failed: {failed.rstrip('.')}. All processes stop, and no model was changed."
            )
    return result, [told for _, told in everything]  # type: ignore[return-value]  # not None: the error was raised above


def exchange(message: bytes) -> list[bytes]:
    """The messages of all processes by index, without the devices. Every process must call it equally often.

    Raises:
        RuntimeError: If there are several processes, and `jax.distributed.initialize` was not called.
    """
    if jax.process_count() == 1:
        return [message]
    client, number = _internals.coordination_client(), next(_exchanges)
    if client is None:
        raise RuntimeError(
            f"There are {jax.process_count()} processes, which agree through JAX's coordination service. Start it at "
            f"the beginning of the program: jax.distributed.initialize()."
        )
    # Indices of one width, since the service returns the messages in the order of their keys.
    client.key_value_set_bytes(f"jaxbn/{number}/{jax.process_index():08}", message)
    client.wait_at_barrier(f"jaxbn/{number}", _PATIENCE)
    messages = sorted(client.key_value_dir_get_bytes(f"jaxbn/{number}/"))
    if jax.process_index() == 0 and number:
        # All processes have read the messages of the exchange before, since they reached this one.
        client.key_value_delete(f"jaxbn/{number - 1}/")
    return [told for _, told in messages]


def is_here(leaf: Any) -> bool:
    """Whether this process holds all of an array."""
    return not isinstance(leaf, jax.Array) or leaf.is_fully_addressable


def gather(mine: Any) -> list[Any]:
    """The values of all processes by index, on the host, through the devices. Every process must call it."""
    message = np.frombuffer(pickle.dumps(jax.device_get(mine)), np.uint8)
    # `process_allgather` needs arrays of one shape, so all messages are padded to the longest.
    lengths = process_allgather(np.int32(len(message)))
    rows = process_allgather(np.pad(message, (0, int(lengths.max()) - len(message))))
    return [
        pickle.loads(row[:length].tobytes()) for row, length in zip(np.atleast_2d(rows), np.ravel(lengths), strict=True)
    ]


def here(tree: Any) -> Any:
    """The tree with arrays that are sharded or replicated over processes as whole arrays of this process.

    Every process must call it, and needs the memory of a replica.
    """

    def gathered(leaf: Any) -> Any:
        if is_here(leaf):
            return leaf
        # NumPy reads a replicated array from one device, without communication.
        return jnp.asarray(np.asarray(leaf) if leaf.is_fully_replicated else process_allgather(leaf, tiled=True))

    return jax.tree.map(gathered, tree)


def held_here(leaf: Any) -> np.ndarray:
    """The values of an array that this process holds, `[N]`; all of them unless it is sharded over processes."""
    parts = [leaf] if is_here(leaf) else [shard.data for shard in leaf.addressable_shards]
    return np.concatenate([np.ravel(part) for part in parts])


def on_all(tree: Any) -> Any:
    """The tree with arrays that are sharded over processes replicated on all devices. Every process must call it."""

    def replicated(leaf: Any) -> Any:
        spread = not is_here(leaf) and not leaf.is_fully_replicated
        return jax.device_put(leaf, NamedSharding(leaf.sharding.mesh, PartitionSpec())) if spread else leaf

    return jax.tree.map(replicated, tree)


def as_it_was(new: Any, used: Any, given: Any) -> Any:
    """A tree with its arrays placed as those of the original tree. Every process must call it.

    Args:
        new: The result of a computation on `used`.
        used: A copy of `given` in another placement.
        given: The original tree.

    Returns:
        `new`; arrays that did not change are the original ones.
    """

    def placed(new: Any, used: Any, given: Any) -> Any:
        if new is used:
            return given
        if not isinstance(given, jax.Array) or (new.sharding, new.committed) == (given.sharding, given.committed):
            return new
        if not is_here(given):
            return jax.device_put(new, given.sharding)
        # `device_put` with a sharding commits the array to its devices, so an uncommitted array needs another way.
        value = np.asarray(here(new))
        return jax.device_put(value, given.sharding) if given.committed else jnp.asarray(value)

    return jax.tree.map(placed, new, used, given)


def check_replicas(tree: Any) -> None:
    """Checks that all devices and processes hold the same bits where they should, as of variables after training.

    Every process must call it. Arrays that are sharded are compared where their shards are copies of each other; of a
    state out of `pmap`, whose arrays have the devices as their leading axis, the copies along it are compared.

    Args:
        tree: A pytree of arrays.

    Returns:
        None.

    Raises:
        ValueError: If two copies of an array differ; the message names it, and where.

    Example:
        >>> jaxbn.check_replicas({"mean": jnp.zeros(3)})
    """
    digests: dict[str, str] = {}
    stacked = is_stacked(tree)
    for path, leaf in jax.tree.leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for part, device, data in _copies(leaf, stacked):
            digest = hashlib.sha256(np.ascontiguousarray(data).tobytes()).hexdigest()
            if digests.setdefault(f"{name}{part}", digest) != digest:
                raise ValueError(f"{name!r} on {device} differs from its copy on the device before.")
    everywhere = gather(digests)
    for process, theirs in enumerate(everywhere):
        for name, digest in theirs.items():
            if everywhere[0].get(name, digest) != digest:
                raise ValueError(f"{name!r} on process {process} differs from its copy on process 0.")


def check_unstacked(tree: Any) -> None:
    """Raises a ValueError for variables or a state that are replicated for `pmap`, where one replica is expected."""
    if is_stacked(tree):
        raise_stacked(jax.tree.leaves(tree)[0].shape[:1])


def raise_stacked(shape: tuple[int, ...]) -> NoReturn:
    """Raises the ValueError for arrays with a leading axis of devices."""
    raise ValueError(
        f"The state has a leading axis, {shape}: it is replicated. Pass one of the replicas, which are equal: "
        f"jax.tree.map(lambda leaf: leaf[0], state). jaxbn.check_replicas(state) names what differs between them."
    )


def is_stacked(tree: Any) -> bool:
    """Whether `pmap` returned this: every array has a leading axis with one index on each device.

    A network whose arrays are sharded over the devices has arrays without that axis: counters, and the statistics and
    parameters of normalization layers.
    """
    leaves = [
        (path, leaf)
        for path, leaf in jax.tree.leaves_with_path(tree)
        if isinstance(leaf, jax.Array) and not _internals.is_tracer(leaf)
    ]
    return bool(leaves) and all(
        _collectives.is_split_by_index(leaf) and not (leaf.ndim == 1 and _PER_CHANNEL & _names(path))
        for path, leaf in leaves
    )


def _names(path: Any) -> set[str]:
    return set(jax.tree_util.keystr(path, simple=True, separator="/").split("/"))


def _copies(leaf: Any, stacked: bool) -> list[tuple[str, Any, np.ndarray]]:
    """The shards of an array in this process: index, device and values."""
    if not isinstance(leaf, jax.Array):
        return [("", "the host", np.asarray(leaf))]
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        # NumPy has no dtype for keys.
        leaf = jax.random.key_data(leaf)
    # Shards of the same name must be equal. The index is part of the name unless all shards are copies of one array.
    whole = stacked or leaf.is_fully_replicated
    shards = leaf.addressable_shards
    return [("" if whole else f" {shard.index}", shard.device, np.asarray(shard.data)) for shard in shards]
