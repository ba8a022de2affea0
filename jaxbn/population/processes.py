"""The pass on several processes: each reads its own batches with its own replica, and they meet once per sweep.

All that is exchanged is bytes, in two rounds: what happened and what was accumulated. A process whose batches fail says
so instead of staying away, so that all raise and none waits for ever. Where a pass may stop early they meet at every
decision, which all make on the same bits; who has no batches left takes part with what it has.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from jaxbn.core.moments import Moments
from jaxbn.population.estimate import Pass, empty
from jaxbn.population.estimators import Estimator
from jaxbn.population.layer_paths import by_name
from jaxbn.population.layers import LayerKind


def together(
    stages: Iterator[tuple[Pass | None, bool]], enough: Callable[[Pass], bool], *, estimator: Estimator
) -> tuple[Pass | None, Pass | None, bool]:
    """Runs every process's own part of a pass, and merges what they accumulated, in the order of the processes.

    Args:
        stages: The part of this process, as `estimate.stages` gives it.
        enough: Whether the pass may stop with this, merged.
        estimator: How accumulators are merged.

    Returns:
        What all accumulated, the same on every process to the last bit, None if none had a batch; what this one did;
        and whether the pass was stopped before its end.

    Raises:
        RuntimeError: If another process failed; an exception of this process is raised as it is.
    """
    state, over = None, False
    while True:
        error = None
        try:
            state, over = (state, over) if over else next(stages)
        except Exception as raised:  # whatever it is, the others must hear of it
            error = raised
        said = [json.loads(message) for message in exchange(_describe(state, over, error, estimator))]
        if error is not None:
            raise error
        whole = _merged(said, state, estimator)
        if all(other["over"] for other in said):
            return whole, state, False
        if whole is not None and enough(whole):
            return whole, state, True


def _merged(said: list[dict[str, Any]], state: Pass | None, estimator: Estimator) -> Pass | None:
    """What all have accumulated, out of what they said; the second round."""
    for process, other in enumerate(said):
        if other["error"]:
            raise RuntimeError(
                f"Process {process} failed in the statistics pass: {other['error']}. Nothing was installed."
            )
    with_batches = [other for other in said if other["moments"]]
    if not with_batches:
        return None
    if any(other["moments"] != with_batches[0]["moments"] for other in with_batches):
        raise RuntimeError("The processes run different models: the layers, or the shapes of their statistics, differ.")
    template = _empty_like(with_batches[0], estimator)
    parts = [_unpack(message, template) for message in exchange(_pack(template if state is None else state))]
    return functools.reduce(functools.partial(_merge, estimator), parts)


def exchange(message: bytes) -> list[bytes]:
    """The messages of all processes, by index. Every process must call it, and as often as the others."""
    lengths = process_allgather(np.int32(len(message)))
    padded = np.zeros(max(int(lengths.max()), 1), np.uint8)
    padded[: len(message)] = np.frombuffer(message, np.uint8)
    rows = process_allgather(padded)
    return [row[:length].tobytes() for row, length in zip(rows, lengths, strict=True)]


def whole(tree: Any) -> tuple[Any, Callable[[Any], Any]]:
    """The tree with its arrays that are spread over processes whole in this one, and a way back for such a tree.

    Every process must call it. Processes may then run as often as they like; each needs the memory for a replica.

    Args:
        tree: A pytree of arrays.

    Returns:
        The pytree; and a function of one of the same structure, whose arrays it spreads as they were.
    """
    given, structure = jax.tree.flatten(tree)
    gathered = [leaf if is_here(leaf) else jnp.asarray(process_allgather(leaf, tiled=True)) for leaf in given]

    def back(old: Any, unchanged: Any, leaf: Any) -> Any:
        if is_here(old):
            return leaf
        values = np.asarray(leaf)
        return old if leaf is unchanged else jax.make_array_from_callback(old.shape, old.sharding, values.__getitem__)

    def restored(new: Any) -> Any:
        leaves, structure = jax.tree.flatten(new)
        return jax.tree.unflatten(structure, map(back, given, gathered, leaves))

    return jax.tree.unflatten(structure, gathered), restored


def is_here(leaf: Any) -> bool:
    """Whether this process holds all of an array."""
    return not isinstance(leaf, jax.Array) or leaf.is_fully_addressable


def check_replicas(tree: Any) -> None:
    """Checks that all devices and processes hold the same bits where they should, as of variables after training.

    Every process must call it. Arrays that are sharded are compared where their shards are copies of each other.

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
    for path, leaf in jax.tree.leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for part, device, data in _copies(leaf):
            digest = hashlib.sha256(np.ascontiguousarray(data).tobytes()).hexdigest()
            if digests.setdefault(f"{name}{part}", digest) != digest:
                raise ValueError(f"{name!r} on {device} differs from its copy on the device before.")
    everywhere = [json.loads(message) for message in exchange(json.dumps(digests).encode())]
    for process, theirs in enumerate(everywhere):
        for name, digest in theirs.items():
            if everywhere[0].get(name, digest) != digest:
                raise ValueError(f"{name!r} on process {process} differs from its copy on process 0.")


def _copies(leaf: Any) -> list[tuple[str, Any, np.ndarray]]:
    """Which part of the array, on which device, and its values; of this process."""
    if not isinstance(leaf, jax.Array):
        return [("", "the host", np.asarray(leaf))]
    shards = leaf.addressable_shards
    whole = leaf.is_fully_replicated
    return [("" if whole else f" {shard.index}", shard.device, np.asarray(shard.data)) for shard in shards]


def _describe(state: Pass | None, over: bool, error: Exception | None, estimator: Estimator) -> bytes:
    """What a process says in the first round."""
    failed = None if error is None else f"{type(error).__name__}: {error}"
    said: dict[str, Any] = {"error": failed, "over": over, "moments": None}
    if state is not None:
        shapes = jax.eval_shape(estimator.finalize, state.estimate)
        said["moments"] = {
            path: [[list(part.shape), np.dtype(part.dtype).name] for part in parts] for path, parts in shapes.items()
        }
        said["kinds"] = state.kinds
    return json.dumps(said).encode()


def _empty_like(said: dict[str, Any], estimator: Estimator) -> Pass:
    """A pass of the structure that another process described."""
    like = {
        path: Moments(*(jnp.zeros(shape, dtype) for shape, dtype in parts)) for path, parts in said["moments"].items()
    }
    kinds = ((path, LayerKind(*kind)) for path, kind in said["kinds"])
    return empty(like, tuple((by_name(path, kind.method), kind) for path, kind in kinds), estimator=estimator)


def _pack(state: Pass) -> bytes:
    return b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state))


def _unpack(message: bytes, template: Pass) -> Pass:
    leaves, start = [], 0
    for leaf in jax.tree.leaves(template):
        leaves.append(np.frombuffer(message, leaf.dtype, leaf.size, start).reshape(leaf.shape))
        start += leaf.nbytes
    return jax.tree.unflatten(jax.tree.structure(template), map(jnp.asarray, leaves))


def _merge(estimator: Estimator, a: Pass, b: Pass) -> Pass:
    return dataclasses.replace(
        a,
        estimate=estimator.merge(a.estimate, b.estimate),
        batches=a.batches + b.batches,
        skipped=a.skipped + b.skipped,
    )
