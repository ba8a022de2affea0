"""One sweep of the statistics pass: batches in, population moments out. Independent of models and frameworks.

Accumulators stay on the device and the host does not block on each batch; each batch shape is compiled once.
"""

import collections
import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Generator, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxbn._src.display.progress import track
from jaxbn._src.framework.batches import check_batch
from jaxbn._src.framework.layer_paths import check_single, keyed
from jaxbn._src.framework.layers import LayerKind, Measured
from jaxbn._src.framework.processes import on_all
from jaxbn._src.framework.program_cache import Recipe, compiled
from jaxbn._src.numerics.collectives import mesh_of, pin, replicate, spread
from jaxbn._src.statistics.estimators import Estimator, Layers
from jaxbn._src.statistics.standard_errors import relative

# A pure function (model, batch) -> Measured.
Measure = Callable[[Any, Any], Measured]

# Maximum number of batches in flight: enough to keep the device busy, few enough to bound the memory of the inputs.
_IN_FLIGHT = 8

# The stop rule is evaluated after this many batches, and then whenever their number has grown by half.
_FIRST_CHECK, _CHECK_GROWTH = 8, 0.5

# A pass that may stop early accepts an endless iterable, so this many batches in a row without any data are an error.
_STUCK = 100


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Pass:
    """The state of a pass: a pytree of arrays that can be saved; a resumed pass gives identical bits."""

    estimate: Any  # the estimator's accumulators
    batches: jax.Array  # i32[]: number of batches so far
    skipped: jax.Array  # i32[]: number of batches with non-finite moments, which are ignored
    first_bad: dict[str, jax.Array]  # i32[] per layer: the first batch with non-finite moments, or -1
    kinds: tuple[tuple[str, LayerKind], ...] = dataclasses.field(metadata={"static": True})  # in the order of the calls

    def __repr__(self) -> str:
        """One line."""
        return f"<Pass: {len(self.kinds)} layers in {self.batches} batches>"


class Work(NamedTuple):
    """The functions that run on each batch; both are compiled once for each batch shape."""

    start: Callable[[Any, Any], Pass]  # (model, batch) -> the state before the first batch
    step: Callable[[Pass, Any, Any], Pass]  # (state, model, batch) -> the state after this batch


def measuring(measure: Recipe, estimator: Estimator) -> Work:
    """The work of a sweep that measures each batch once. `measure` is the recipe of a `Measure`."""
    # Looked up once, because functions that cannot be held weakly are not found again.
    program = functools.cache(lambda mesh: compiled(measure, _step, estimator, mesh))

    def step(state: Pass, model: Any, batch: Any) -> Pass:
        after: Pass = program(mesh_of(state))(state, model, batch)
        return after

    return Work(lambda model, batch: start(compiled(measure), model, batch, estimator=estimator), step)


def prepared(batches: Iterable[Any], mesh: Mesh | None) -> Generator[Any, None, None]:
    """Checks each batch of the user, and shards it over the mesh, if any."""
    for number, batch in enumerate(batches):
        check_batch(batch, number)
        yield batch if mesh is None else spread(batch, mesh)


def rounds(
    work: Work,
    model: Any,
    batches: Iterable[Any],
    *,
    title: str,
    progress: bool | None,
    length: int | None,
    like: Any,
    synchronizes: bool,
    checks: bool,
) -> Generator[tuple[Pass | None, bool], None, None]:
    """Runs the batches one by one, and yields the state where the caller may have to decide.

    Args:
        work: What to do with each batch.
        model: A pytree of parameters, which stay fixed.
        batches: Any iterable of pytrees of arrays, of any sizes.
        title: Title of the progress bar.
        progress: Whether to show a progress bar; None: if this is a terminal.
        length: Number of batches for the progress bar, if known.
        like: Shapes of a batch, for a process that has no batches while others do; None: there are no others.
        synchronizes: Whether to yield before the first batch runs, after all work that depends only on the model.
        checks: Whether to yield at each of the `decisions`.

    Yields:
        The state, None if there was no batch, and whether the pass is complete. At a decision, the iterator of the
        batches stands right after the last measured batch.
    """
    state: Pass | None = None
    under_way: collections.deque[jax.Array] = collections.deque()
    decided = decisions()
    decision = next(decided)
    with contextlib.closing(track(batches, title, progress, length)) as tracked:
        for seen, batch in enumerate(tracked, 1):
            if state is None:
                # Abstract evaluation of the first batch gives the layers and their shapes.
                state = earlier = work.start(model, batch)
                if synchronizes:
                    yield state, False
            state = work.step(state, model, batch)
            under_way.append(state.batches)
            if len(under_way) > _IN_FLIGHT:
                # Dispatch is asynchronous: without a bound, the host would read ahead and fill the device memory.
                under_way.popleft().block_until_ready()
            if checks and seen % _STUCK == 0:
                _check_progress(earlier, state)
                earlier = state
            if seen == decision:
                decision = next(decided)
                if checks:
                    yield state, False
    if state is None and like is not None:
        state = work.start(model, like)
    yield state, True


def decisions() -> Generator[int, None, None]:
    """The numbers of batches after which a pass may stop; rare enough that waiting for the devices costs no time."""
    decision = _FIRST_CHECK
    while True:
        yield decision
        decision += math.ceil(decision * _CHECK_GROWTH)


def start(measure: Measure, model: Any, batch: Any, *, estimator: Estimator) -> Pass:
    """The state before the first batch; only the shapes of `batch` are used."""
    found = jax.eval_shape(measure, model, batch)
    state = empty(found.moments, found.kinds, estimator=estimator)
    # Place the state where the step returns it, so that the step is not compiled for two placements.
    mesh = mesh_of((model, batch))
    return state if mesh is None else replicate(state, mesh)


def empty(like: Layers, kinds: tuple[tuple[str, LayerKind], ...], *, estimator: Estimator) -> Pass:
    """The state before the first batch, for moments of these shapes and dtypes."""
    zeros = jax.tree.map(lambda part: jnp.zeros(part.shape, part.dtype), like)
    zero, unseen = jnp.zeros((), jnp.int32), {path: jnp.full((), -1, jnp.int32) for path in zeros}
    # Copy, so that no two leaves share memory and the state can be donated.
    return jax.tree.map(jnp.copy, Pass(estimator.init(zeros), zero, zero, unseen, kinds))


def update(state: Pass, model: Any, batch: Any, *, measure: Measure, estimator: Estimator) -> Pass:
    """Adds one batch to the state; pure. A batch with non-finite moments is counted as skipped and ignored."""
    return add(state, measure(model, batch).moments, estimator=estimator)


def add(state: Pass, moments: Layers, *, estimator: Estimator) -> Pass:
    """Adds the moments of one batch to the state; pure."""
    state, skip = judge(state, moments)
    return dataclasses.replace(state, estimate=accumulate(state.estimate, moments, skip, estimator=estimator))


def judge(state: Pass, moments: Layers, skip: jax.Array | bool = False) -> tuple[Pass, jax.Array]:
    """Counts a batch; pure.

    Args:
        state: The state of a pass.
        moments: The moments of all its layers.
        skip: bool[]: whether to skip the batch in any case.

    Returns:
        The state, and whether to skip the batch. If any layer is not finite, the batch is dropped for all layers, so
        that they all average over the same batches.
    """
    bad = {path: ~(jnp.isfinite(part.mean).all() & jnp.isfinite(part.m2).all()) for path, part in moments.items()}
    skip = jnp.stack([jnp.asarray(skip), *bad.values()]).any()
    state = dataclasses.replace(
        state,
        batches=state.batches + 1,
        skipped=state.skipped + skip.astype(jnp.int32),
        first_bad={
            path: jnp.where((before < 0) & bad[path], state.batches, before) for path, before in state.first_bad.items()
        },
    )
    return state, skip


def accumulate(estimate: Any, moments: Layers, skip: jax.Array, *, estimator: Estimator) -> Any:
    """Adds the moments of one batch to an accumulator, unless it is skipped; pure."""
    after = estimator.update(estimate, moments)
    return jax.tree.map(lambda old, new: jnp.where(skip, old, new), estimate, after)


def _step(measure: Measure, estimator: Estimator, mesh: Mesh | None) -> Callable[[Pass, Any, Any], Pass]:
    """The compiled update. It keeps the placement of the state, so one program serves all batches of a shape."""

    def step(state: Pass, model: Any, batch: Any) -> Pass:
        state = update(state, model, batch, measure=measure, estimator=estimator)
        return state if mesh is None else pin(state, mesh)

    return step


def _check_progress(earlier: Pass, state: Pass) -> None:
    """Raises a ValueError if all batches between two states of a pass were skipped or empty."""
    if all(map(np.array_equal, jax.tree.leaves(earlier.estimate), jax.tree.leaves(state.estimate))):
        skipped = int(state.skipped - earlier.skipped)
        raise ValueError(
            f"The last {_STUCK} batches, up to batch {int(state.batches) - 1} (counted from 0), did not change the "
            f"statistics: {skipped} of them gave NaN or infinity and were skipped. The batches may be endless, so the "
            f"pass ends here without installing statistics. Look for NaN in the parameters, as in a network that "
            f"diverged, for weights or masks that are 0, and check that `call` runs the model that it is given."
        )


def check_finite(state: Pass) -> None:
    """Raises a ValueError that names the first batch and layer with non-finite moments."""
    bad = {path: int(index) for path, index in jax.device_get(state.first_bad).items() if index >= 0}
    if not bad:
        return
    first = min(bad.values())
    layer = next(path for path, _ in state.kinds if bad.get(path) == first)  # `kinds` is in the order of the calls
    raise ValueError(
        f"Batch {first} (counted from 0) gave statistics that are not finite, first in "
        f"{repr(layer) if layer else 'the model itself'}. Look for NaN or infinity in this batch and in the "
        f"parameters; no statistics were installed. postproc(..., skip_nonfinite=True) skips such batches."
    )


def finish(state: Pass, *, estimator: Estimator, skip_nonfinite: bool = False) -> Layers:
    """The moments to install, under keys that hold the methods of the layers.

    Raises:
        ValueError: If there were no batches, a batch had non-finite moments, or there was one value per channel.
    """
    if state.batches.ndim:
        raise ValueError(
            f"The accumulator has a leading axis, {state.batches.shape}: it is replicated. Pass one of the replicas, "
            f"which are equal: jax.tree.map(lambda leaf: leaf[0], acc)."
        )
    state = on_all(state)  # a user's own step may have left it sharded
    if not state.batches:
        raise ValueError("The accumulator has seen no batch: call postproc_step on each batch first.")
    if not skip_nonfinite or state.skipped == state.batches:
        check_finite(state)
    moments = estimator.finalize(state.estimate)
    # The first batch shows the methods of the layers it reached; for later layers, the state of the layer shows it.
    later = [path for path, part in moments.items() if np.any(np.asarray(part.count) > 0)]
    found = keyed(moments, [*later, *dict(state.kinds)])
    names = {path: kind.method for path, kind in state.kinds}
    single = {} if estimator.single is None else estimator.single(state.estimate)
    for path in found:
        if path in single:
            check_single(
                path, single[path], f"The pass, {estimator.name}, saw in each batch no more than", names.get(path)
            )
    return found


def is_certain(state: Pass, bound: float | None, *, estimator: Estimator) -> bool:
    """Whether all relative standard errors are known and at most the bound; constant channels have none."""
    if bound is None or estimator.errors is None:
        return False
    errors, moments = estimator.errors(state.estimate), estimator.finalize(state.estimate)
    judged = []
    # Channels without values have no error to judge; NaN (fewer than two batches) compares as False.
    for path, part in moments.items():
        count, mean, var = map(np.asarray, (part.count, part.mean, part.var))
        judged += [error[count > 0] <= bound for error in relative(errors[path], mean, var)]
    return any(part.size for part in judged) and all(part.all() for part in judged)
