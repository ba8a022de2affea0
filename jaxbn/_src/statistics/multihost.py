"""The statistics pass with multiple processes, for two kinds of batches.

Local batches: each process runs its own batches on its own devices with its replica of the model, and the processes
exchange their accumulators once per sweep. If a pass may stop early, they do so at every decision, and all decide on
the same bits. A process whose batches are used up takes part with its accumulator.

Global batches, which are arrays over the devices of all processes: all processes run one program, whose result covers
all rows on every process and counts once. A program starts only if all processes start it, so they first agree that
they all have the next few batches.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxbn._src.framework.batches import check_batch
from jaxbn._src.framework.processes import agree, gather, is_here
from jaxbn._src.numerics.collectives import mesh_of
from jaxbn._src.statistics.estimators import Estimator
from jaxbn._src.statistics.sweep import Pass, decisions

# Batches that a process reads before it agrees with the others that all have them; they occupy device memory meanwhile.
_AHEAD = 4


class Opened(NamedTuple):
    """The batches of this process, and their kind and shapes in all processes."""

    batches: Iterator[Any]  # of this process, including the first
    mesh: Mesh | None  # the mesh of global batches, over all processes; None: each process has local batches
    like: Any  # shapes of a batch of another process, if this one has none; None if no process has one


def opened(source: Callable[[], Iterable[Any]], mesh: Mesh | None = None) -> Opened:
    """Reads the first batch and exchanges its kind with the other processes. Every process must call this function.

    Args:
        source: Returns the batches of this process.
        mesh: The devices of this process over which its local batches will be sharded.

    Returns:
        The batches, and the kind and shapes of the batches in all processes.

    Raises:
        RuntimeError: If only some processes have global batches, or the source of another process failed.
    """

    def look() -> tuple[tuple[Iterator[Any], list[Any], Mesh | None], str | None]:
        batches = iter(source())
        first = list(itertools.islice(batches, 1))
        for batch in first:
            check_batch(batch, 0)
        over = mesh_of_global(first[0]) if first else None
        _check_mesh(mesh, over)
        shapes = [jax.eval_shape(lambda batch: batch, first[0])] if first else []
        kind = None if not first else "own" if over is None else "global"
        return (itertools.chain(first, batches), shapes, over), kind

    (batches, shapes, over), kinds = agree(look)
    if "global" in kinds and set(kinds) != {"global"}:
        having = {kind: [i for i, other in enumerate(kinds) if other == kind] for kind in ("global", "own", None)}
        raise RuntimeError(
            f"Processes {having['global']} have global batches, arrays over the devices of all processes; processes "
            f"{having['own']} have local batches, and {having[None]} none. Give all processes the same number of "
            f"global batches, or give all of them local batches."
        )
    if set(kinds) == {"own", None}:
        shapes = [one for of_process in gather(shapes) for one in of_process]
    return Opened(batches, over, shapes[0] if shapes else None)


def in_step(batches: Iterable[Any]) -> Generator[Any, None, None]:
    """Yields global batches, each after all processes have it. Every process must read them to the same point.

    It reads a few batches ahead, but not beyond the next decision.

    Args:
        batches: The batches of this process.

    Yields:
        The batches.

    Raises:
        RuntimeError: If another process has more batches, fewer batches, batches of other shapes, or failed to read.
    """
    source, seen, size = iter(batches), 0, 1
    for decision in decisions():
        while seen < decision:
            wanted = min(size, decision - seen)
            # Never read beyond a decision: if the pass stops there, the user's iterator must stand right after it.
            ahead, said = agree(functools.partial(_read, source, seen, wanted))
            if any(other != said[0] for other in said):
                _raise_out_of_step(seen, said)
            yield from ahead
            if len(ahead) < wanted:
                return
            seen, size = seen + wanted, min(2 * size, _AHEAD)


def _read(source: Iterator[Any], seen: int, most: int) -> tuple[list[Any], list[str]]:
    ahead = list(itertools.islice(source, most))
    for number, batch in enumerate(ahead, seen):
        check_batch(batch, number)
        if mesh_of_global(batch) is None:
            raise ValueError(
                "A batch of this process alone follows global batches, arrays over the devices of all processes. Use "
                "one kind of batches: jax.make_array_from_process_local_data makes global ones."
            )
    shapes = jax.eval_shape(lambda batches: batches, ahead)
    return ahead, [str(jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", one)) for one in shapes]


def _raise_out_of_step(seen: int, said: Sequence[Sequence[str]]) -> None:
    counts = [seen + len(ahead) for ahead in said]
    if len(set(counts)) > 1:
        least = min(range(len(counts)), key=counts.__getitem__)
        raise RuntimeError(
            f"Process {least} has {counts[least]} global batches and others have more. All processes run a global "
            f"batch together: give each of them the same number of batches, in the same order."
        )
    where = next(i for i, batches in enumerate(zip(*said, strict=True)) if len(set(batches)) > 1)
    raise RuntimeError(
        f"Batch {seen + where} (counted from 0) is {said[0][where]} on process 0, and differs on others. All processes "
        f"run a global batch together: give each of them the same shapes, in the same order."
    )


def mesh_of_global(batch: Any) -> Mesh | None:
    """The mesh of a batch that is sharded over all processes; None if this process holds the whole batch."""
    leaves = jax.tree.leaves(batch)
    spread = [leaf for leaf in leaves if not is_here(leaf)]
    if not spread:
        return None
    own = [np.shape(leaf) for leaf in leaves if is_here(leaf) and np.ndim(leaf)]
    if own:
        raise ValueError(
            f"A batch holds global arrays, over the devices of all processes, and arrays of this process alone, with "
            f"shapes {own}. Make all of them global, with jax.make_array_from_process_local_data."
        )
    among = {device.process_index for leaf in spread for device in leaf.sharding.device_set}
    mesh = mesh_of(spread)
    if len(among) < jax.process_count() or mesh is None:
        raise ValueError(
            f"A batch lies on devices of the processes {sorted(among)}, of {jax.process_count()}. Shard it over a mesh "
            f"of all devices, jax.make_mesh((jax.device_count(),), ('data',)), or give each process its own batches."
        )
    return mesh


def _check_mesh(mesh: Mesh | None, over: Mesh | None) -> None:
    """Raises a ValueError if this process cannot shard its batches over `mesh`."""
    if mesh is None:
        return
    if over is not None:
        raise ValueError("mesh= shards batches of a single process, but these batches are global. Remove mesh=.")
    if mesh.devices.size > sum(device.process_index == jax.process_index() for device in mesh.devices.flat):
        raise ValueError(
            "mesh= holds devices of other processes, to which this process cannot send its batches. Build it from "
            "jax.local_devices(); or make global batches, with jax.make_array_from_process_local_data, and omit mesh=."
        )


def own_alone(batches: Iterable[Any]) -> Generator[Any, None, None]:
    """Yields local batches; raises a ValueError at the first global one."""
    for batch in batches:
        if mesh_of_global(batch) is not None:
            raise ValueError(
                "A global batch, of arrays over the devices of all processes, follows batches of this process alone. "
                "Use one kind of batches."
            )
        yield batch


def together(
    rounds: Iterator[tuple[Pass | None, bool]],
    enough: Callable[[Pass], bool],
    *,
    estimator: Estimator,
    are_global: bool,
) -> tuple[Pass | None, Pass | None, bool]:
    """Runs every process's part of a pass and merges the accumulators, in the order of the processes.

    Args:
        rounds: The rounds of this process, from `sweep.rounds`.
        enough: Whether the pass may stop with this state, merged over all processes.
        estimator: How accumulators are merged.
        are_global: Whether the batches are global; the accumulator of one process then already covers all of them.

    Returns:
        The merged state, bitwise equal on every process, or None if there was no batch at all; the state of this
        process; and whether the pass stopped early.

    Raises:
        RuntimeError: If another process failed. An exception of this process is raised unchanged.
    """
    state: Pass | None = None
    over = False
    while True:
        # Every iteration is one round of communication, so all processes must leave the loop in the same one.
        (state, over), said = agree(functools.partial(_next, rounds, state, over, estimator))
        if any(other["moments"] != said[0]["moments"] for other in said):
            raise RuntimeError(
                "The processes run different models: the layers, or the shapes of their statistics, differ."
            )
        whole = state if are_global or state is None else _merged(state, estimator)
        if all(other["over"] for other in said):
            return whole, state, False
        if whole is not None and enough(whole):
            return whole, state, True


def _next(
    rounds: Iterator[tuple[Pass | None, bool]], state: Pass | None, over: bool, estimator: Estimator
) -> tuple[tuple[Pass | None, bool], dict[str, Any]]:
    """The next round of this process, and its summary for the other processes."""
    state, over = (state, over) if over else next(rounds)
    said: dict[str, Any] = {"over": over, "moments": None}
    if state is not None:
        shapes = jax.eval_shape(estimator.finalize, state.estimate)
        said["moments"] = {
            path: [[list(part.shape), np.dtype(part.dtype).name] for part in parts] for path, parts in shapes.items()
        }
    return (state, over), said


def _merged(state: Pass, estimator: Estimator) -> Pass:
    """Merges the states of all processes, with the structure of this one; a second round of communication."""
    structure = jax.tree.structure(state)
    parts = [jax.tree.unflatten(structure, map(jnp.asarray, leaves)) for leaves in gather(jax.tree.leaves(state))]
    return functools.reduce(functools.partial(_merge, estimator), parts)


def _merge(estimator: Estimator, a: Pass, b: Pass) -> Pass:
    return dataclasses.replace(
        a,
        estimate=estimator.merge(a.estimate, b.estimate),
        batches=a.batches + b.batches,
        skipped=a.skipped + b.skipped,
    )
