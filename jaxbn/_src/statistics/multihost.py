"""The pass on several processes, whose batches are of one of two kinds.

Batches of their own: each process runs its own batches on its own devices with its replica of the model, and they meet
once per sweep. Where a pass may stop early they meet at every decision, which all make on the same bits; a process that
has no batches left takes part with what it has.

Global batches, arrays over the devices of all processes: all run one program, whose result is already that of all rows,
on every process, and counts once. A program starts only if all processes start it, so they agree before that on the
next few batches.
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

# Batches that a process reads before it agrees with the others that all have them; their arrays wait on the devices.
_AHEAD = 4


class Opened(NamedTuple):
    """What is known of the batches of all processes when each has read its first."""

    batches: Iterator[Any]  # of this process, the first too
    mesh: Mesh | None  # of all processes, over which global batches lie; None: each has batches of its own
    like: Any  # shapes of a batch of another process, if this one has none; None if no process has


def opened(source: Callable[[], Iterable[Any]], mesh: Mesh | None = None) -> Opened:
    """Reads the first batch, and tells the other processes of which kind it is. Every process must call it.

    Args:
        source: Gives the batches of this process.
        mesh: The devices of this process over which batches of its own are to be spread.

    Returns:
        The batches, and what is known of those of all.

    Raises:
        RuntimeError: If some processes have global batches and others do not, or the source of another one failed.
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
            f"{having['own']} have batches of their own, and {having[None]} none. Give all of them global batches, "
            f"equally many, or all of them batches of their own."
        )
    if set(kinds) == {"own", None}:
        shapes = [one for of_process in gather(shapes) for one in of_process]
    return Opened(batches, over, shapes[0] if shapes else None)


def in_step(batches: Iterable[Any]) -> Generator[Any, None, None]:
    """Global batches, each of them once all processes have it. Every process must read them to the same place.

    Up to a decision, and not beyond, it reads a few ahead.

    Args:
        batches: Those of this process.

    Yields:
        The batches.

    Raises:
        RuntimeError: If another process has more or fewer of them, or of other shapes, or failed to read one.
    """
    source, seen, size = iter(batches), 0, 1
    for decision in decisions():
        while seen < decision:
            wanted = min(size, decision - seen)
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
                "A batch of this process's own follows global batches, arrays over the devices of all processes. Give "
                "batches of one kind: jax.make_array_from_process_local_data makes global ones."
            )
    shapes = jax.eval_shape(lambda batches: batches, ahead)
    return ahead, [str(jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", one)) for one in shapes]


def _raise_out_of_step(seen: int, said: Sequence[Sequence[str]]) -> None:
    counts = [seen + len(ahead) for ahead in said]
    if len(set(counts)) > 1:
        least = min(range(len(counts)), key=counts.__getitem__)
        raise RuntimeError(
            f"Process {least} has {counts[least]} global batches and others have more. A global batch is run by all "
            f"processes together: give each of them as many, in the same order."
        )
    where = next(i for i, batches in enumerate(zip(*said, strict=True)) if len(set(batches)) > 1)
    raise RuntimeError(
        f"Batch {seen + where} (counted from 0) is {said[0][where]} on process 0, and differs on others. A global "
        f"batch is run by all processes together: give each of them the same shapes, in the same order."
    )


def mesh_of_global(batch: Any) -> Mesh | None:
    """The mesh of all processes over which a batch lies; None if this process holds all of it."""
    leaves = jax.tree.leaves(batch)
    spread = [leaf for leaf in leaves if not is_here(leaf)]
    if not spread:
        return None
    own = [np.shape(leaf) for leaf in leaves if is_here(leaf) and np.ndim(leaf)]
    if own:
        raise ValueError(
            f"A batch holds global arrays, over the devices of all processes, and arrays of this process alone, of "
            f"shapes {own}. Make all of them global, with jax.make_array_from_process_local_data."
        )
    among = {device.process_index for leaf in spread for device in leaf.sharding.device_set}
    mesh = mesh_of(spread)
    if len(among) < jax.process_count() or mesh is None:
        raise ValueError(
            f"A batch lies on devices of the processes {sorted(among)}, of {jax.process_count()}. Spread it over a "
            f"mesh of all devices, jax.make_mesh((jax.device_count(),), ('data',)), or give each process its own."
        )
    return mesh


def _check_mesh(mesh: Mesh | None, over: Mesh | None) -> None:
    """Raises a ValueError for a `mesh` over which this process cannot spread its batches."""
    if mesh is None:
        return
    if over is not None:
        raise ValueError("mesh= spreads batches of a process's own, and these are global. Leave mesh= out.")
    if mesh.devices.size > sum(device.process_index == jax.process_index() for device in mesh.devices.flat):
        raise ValueError(
            "mesh= holds devices of other processes, to which this one cannot give its batches. Make it of "
            "jax.local_devices(); or make global batches, with jax.make_array_from_process_local_data, and leave it "
            "out."
        )


def own_alone(batches: Iterable[Any]) -> Generator[Any, None, None]:
    """Batches of this process's own; a ValueError before the first that is global."""
    for batch in batches:
        if mesh_of_global(batch) is not None:
            raise ValueError(
                "A global batch, of arrays over the devices of all processes, follows batches of this process's own. "
                "Give batches of one kind."
            )
        yield batch


def together(
    stages: Iterator[tuple[Pass | None, bool]],
    enough: Callable[[Pass], bool],
    *,
    estimator: Estimator,
    are_global: bool,
) -> tuple[Pass | None, Pass | None, bool]:
    """Runs every process's part of a pass, and puts together what they accumulated, in the order of the processes.

    Args:
        stages: The part of this process, as `estimate.stages` gives it.
        enough: Whether the pass may stop with this, of all processes.
        estimator: How accumulators are merged.
        are_global: Whether the batches are, so that what one process accumulated is that of all.

    Returns:
        What all accumulated, the same on every process to the last bit, None if none had a batch; what this one did;
        and whether the pass was stopped before its end.

    Raises:
        RuntimeError: If another process failed; an exception of this process is raised as it is.
    """
    state: Pass | None = None
    over = False
    while True:
        stage, said = agree(functools.partial(_next, stages, state, over, estimator))
        state, over = stage
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
    stages: Iterator[tuple[Pass | None, bool]], state: Pass | None, over: bool, estimator: Estimator
) -> tuple[tuple[Pass | None, bool], dict[str, Any]]:
    """The next stage of this process, and what it tells the others of it."""
    state, over = (state, over) if over else next(stages)
    said: dict[str, Any] = {"over": over, "moments": None}
    if state is not None:
        shapes = jax.eval_shape(estimator.finalize, state.estimate)
        said["moments"] = {
            path: [[list(part.shape), np.dtype(part.dtype).name] for part in parts] for path, parts in shapes.items()
        }
    return (state, over), said


def _merged(state: Pass, estimator: Estimator) -> Pass:
    """What all have accumulated, in passes of the structure of this one; the second round."""
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
