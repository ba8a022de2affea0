"""One sweep of the statistics pass: batches in, population moments out. Knows no model; the hosts say how to measure.

Accumulators stay on the device and no batch waits for the host; the step compiles once for each shape of a batch.
"""

import collections
import contextlib
import dataclasses
import math
from collections.abc import Callable, Generator, Iterable
from typing import Any

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

# Batches that may be under way at once: enough to keep the device busy, few enough to bound the memory of the inputs.
_IN_FLIGHT = 8

# The stop rule is asked after so many batches, and then each time when there are half as many again.
_FIRST_CHECK, _CHECK_GROWTH = 8, 0.5

# A pass that may stop early may read an endless iterable: so many batches in a row that add nothing are an error.
_STUCK = 100


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pass:
    """A pass under way: a pytree of arrays, which may be saved, and resumed with identical bits."""

    estimate: Any  # the estimator's accumulators
    batches: jax.Array  # i32[]: batches seen
    skipped: jax.Array  # i32[]: how many of them gave moments that are not finite, and count for nothing
    first_bad: dict[str, jax.Array]  # i32[] per layer: the first such batch, or -1
    kinds: tuple[tuple[str, LayerKind], ...] = dataclasses.field(metadata={"static": True})  # in the order of the calls


def stages(
    measure: Recipe,
    model: Any,
    batches: Iterable[Any],
    *,
    estimator: Estimator,
    mesh: Mesh | None,
    title: str,
    progress: bool | None,
    length: int | None,
    like: Any,
    meets: bool,
    checks: bool,
) -> Generator[tuple[Pass | None, bool], None, None]:
    """Measures batch after batch.

    Args:
        measure: How a batch is measured: a `Measure`, which is compiled once for the same functions of the user.
        model: A pytree, the parameters that stay fixed.
        batches: Any iterable of pytrees of arrays, of any sizes.
        estimator: How moments are accumulated.
        mesh: Devices over which each batch is spread; None: it is used as it comes.
        title: Of the progress bar.
        progress: Show one. None: if this is a terminal.
        length: Batches, if that is known; of the progress bar.
        like: Shapes of a batch, for a pass that sees none and takes part in that of others; None: it is alone.
        meets: Whether to come up before the first batch is run, when all that only depends on the model is done.
        checks: Whether to come up at each of the `decisions`.

    Yields:
        What was accumulated, None if there was no batch, and whether this is all. At a decision the batches stand
        behind the last that was measured.
    """
    state: Pass | None = None
    step: Callable[[Pass, Any, Any], Pass]
    under_way: collections.deque[jax.Array] = collections.deque()
    decided = decisions()
    decision = next(decided)
    with contextlib.closing(track(batches, title, progress, length)) as tracked:
        for seen, batch in enumerate(tracked, 1):
            check_batch(batch, seen - 1)
            batch = batch if mesh is None else spread(batch, mesh)
            if state is None:
                state = earlier = start(compiled(measure), model, batch, estimator=estimator)
                step = compiled(measure, _step, estimator, mesh_of(state))
                if meets:
                    yield state, False
            state = step(state, model, batch)
            under_way.append(state.batches)
            if len(under_way) > _IN_FLIGHT:
                under_way.popleft().block_until_ready()
            if checks and seen % _STUCK == 0:
                _check_progress(earlier, state)
                earlier = state
            if seen == decision:
                decision = next(decided)
                if checks:
                    yield state, False
    if state is None and like is not None:
        state = start(compiled(measure), model, like, estimator=estimator)
    yield state, True


def decisions() -> Generator[int, None, None]:
    """The numbers of batches after which a pass may be stopped: so rare that to wait for the devices costs nothing."""
    decision = _FIRST_CHECK
    while True:
        yield decision
        decision += math.ceil(decision * _CHECK_GROWTH)


def start(measure: Measure, model: Any, batch: Any, *, estimator: Estimator) -> Pass:
    """A pass that has seen nothing; of the batch only shapes are used."""
    found = jax.eval_shape(measure, model, batch)
    nothing = empty(found.moments, found.kinds, estimator=estimator)
    mesh = mesh_of((model, batch))  # where the step will leave it, so that it is not compiled for two places
    return nothing if mesh is None else replicate(nothing, mesh)


def empty(like: Layers, kinds: tuple[tuple[str, LayerKind], ...], *, estimator: Estimator) -> Pass:
    """A pass that has seen nothing, for moments of these shapes and dtypes."""
    zeros = jax.tree.map(lambda part: jnp.zeros(part.shape, part.dtype), like)
    none, nobody = jnp.zeros((), jnp.int32), {path: jnp.full((), -1, jnp.int32) for path in zeros}
    # Leaves in memory of their own, so that the pass may be donated.
    return jax.tree.map(jnp.copy, Pass(estimator.init(zeros), none, none, nobody, kinds))


def update(state: Pass, model: Any, batch: Any, *, measure: Measure, estimator: Estimator) -> Pass:
    """The pass after one batch more; pure. A batch whose moments are not finite is counted, and left out."""
    moments = measure(model, batch).moments
    bad = {path: ~(jnp.isfinite(part.mean).all() & jnp.isfinite(part.m2).all()) for path, part in moments.items()}
    any_bad = jnp.stack(list(bad.values())).any()
    after = estimator.update(state.estimate, moments)
    return dataclasses.replace(
        state,
        estimate=jax.tree.map(lambda old, new: jnp.where(any_bad, old, new), state.estimate, after),
        batches=state.batches + 1,
        skipped=state.skipped + any_bad.astype(jnp.int32),
        first_bad={
            path: jnp.where((before < 0) & bad[path], state.batches, before) for path, before in state.first_bad.items()
        },
    )


def _step(measure: Measure, estimator: Estimator, mesh: Mesh | None) -> Callable[[Pass, Any, Any], Pass]:
    """The update as it is compiled: the pass stays where it is, so that one program serves all batches of a shape."""

    def step(state: Pass, model: Any, batch: Any) -> Pass:
        state = update(state, model, batch, measure=measure, estimator=estimator)
        return state if mesh is None else pin(state, mesh)

    return step


def _check_progress(earlier: Pass, state: Pass) -> None:
    """Raises a ValueError if all batches between two states of a pass added nothing to it."""
    if all(map(np.array_equal, jax.tree.leaves(earlier.estimate), jax.tree.leaves(state.estimate))):
        skipped = int(state.skipped - earlier.skipped)
        raise ValueError(
            f"The last {_STUCK} batches, up to batch {int(state.batches) - 1} (counted from 0), added nothing to the "
            f"statistics: {skipped} of them gave NaN or infinity and were skipped. The batches may be endless, so the "
            f"pass ends here and nothing was installed. Look for NaN in the parameters, as in a network that diverged, "
            f"for weights or masks that are 0, and whether `call` runs the model that it is given."
        )


def check_finite(state: Pass) -> None:
    """Raises a ValueError that says which batch first gave moments that are not finite, and in which layer."""
    bad = {path: int(index) for path, index in jax.device_get(state.first_bad).items() if index >= 0}
    if not bad:
        return
    first = min(bad.values())
    layer = next(path for path, _ in state.kinds if bad.get(path) == first)  # in the order in which layers run
    raise ValueError(
        f"Batch {first} (counted from 0) gave statistics that are not finite, first in "
        f"{repr(layer) if layer else 'the model itself'}. Look for NaN or infinity in this batch and in the "
        f"parameters; nothing was installed. postproc(..., skip_nonfinite=True) leaves such batches out."
    )


def finish(state: Pass, *, estimator: Estimator, skip_nonfinite: bool = False) -> Layers:
    """The moments to install, under keys that know the methods of the layers.

    Raises:
        ValueError: If there are none, the moments of a batch were not finite, or they are of one value per channel.
    """
    if state.batches.ndim:
        raise ValueError(
            f"The accumulator has a leading axis, {state.batches.shape}: it is replicated. Pass one of the replicas, "
            f"which are equal: jax.tree.map(lambda leaf: leaf[0], acc)."
        )
    state = on_all(state)  # the step of one's own may have left it spread
    if not state.batches:
        raise ValueError("The accumulator has seen no batch: call postproc_step on each batch first.")
    if not skip_nonfinite or state.skipped == state.batches:
        check_finite(state)
    moments = estimator.finalize(state.estimate)
    # The first batch tells the methods; a layer that only later ones reached is installed by what its statistics tell.
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
    """Whether all relative standard errors are known, and none is above the bound; constant channels have none."""
    if bound is None or estimator.errors is None:
        return False
    errors, moments = estimator.errors(state.estimate), estimator.finalize(state.estimate)
    judged = []
    for path, part in moments.items():
        count, mean, var = map(np.asarray, (part.count, part.mean, part.var))
        judged += [error[count > 0] <= bound for error in relative(errors[path], mean, var)]
    return any(part.size for part in judged) and all(part.all() for part in judged)
