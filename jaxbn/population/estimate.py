"""The statistics pass: batches in, population moments out. Knows no model; the hosts say how a batch is measured.

Accumulators stay on the device and no batch waits for the host; the step compiles once for each shape of a batch.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jaxbn.population.estimators import Estimator, Layers
from jaxbn.population.layers import LayerKind, Measured
from jaxbn.population.progress import track

# A pure function (model, batch) -> Measured; the same function object is compiled once.
Measure = Callable[[Any, Any], Measured]

# Batches that may be under way at once: enough to keep the device busy, few enough to bound the memory of the inputs.
_IN_FLIGHT = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pass:
    """A pass under way: a pytree, which may be saved."""

    estimate: Any  # the estimator's accumulators
    batches: jax.Array  # i32[]: batches seen
    first_bad: dict[str, jax.Array]  # i32[] per layer: the first batch whose moments were not finite, or -1
    kinds: tuple[tuple[str, LayerKind], ...] = dataclasses.field(metadata={"static": True})


def estimate(
    measure: Measure,
    model: Any,
    batches: Iterable[Any],
    *,
    estimator: Estimator,
    progress: bool | None = None,
) -> tuple[Pass, Layers]:
    """Measures every batch and estimates the moments of the population.

    Args:
        measure: How a batch is measured.
        model: A pytree, the parameters that stay fixed.
        batches: Any iterable of pytrees of arrays, of any sizes.
        estimator: How moments are accumulated.
        progress: Show a progress bar. None: if this is a terminal.

    Returns:
        The pass, and the moments of each layer.

    Raises:
        ValueError: If there is no batch, or the moments of one are not finite.
    """
    state: Pass | None = None
    under_way: collections.deque[jax.Array] = collections.deque()
    for batch in track(batches, f"Estimating statistics, {estimator.name}", progress):
        if state is None:
            state = start(measure, model, batch, estimator=estimator)
        state = _jitted_update(state, model, batch, measure=measure, estimator=estimator)
        under_way.append(state.batches)
        if len(under_way) > _IN_FLIGHT:
            under_way.popleft().block_until_ready()
    if state is None:
        raise ValueError(
            "There was no batch to estimate statistics from: the iterable is empty. An iterator can be read only once; "
            "pass a list, a loader, or a fresh iterator."
        )
    return state, finish(state, estimator=estimator)


def start(measure: Measure, model: Any, batch: Any, *, estimator: Estimator) -> Pass:
    """A pass that has seen nothing; of the batch only shapes are used."""
    found = jax.eval_shape(measure, model, batch)
    like = jax.tree.map(lambda part: jnp.zeros(part.shape, part.dtype), found.moments)
    first_bad = {path: jnp.full((), -1, jnp.int32) for path in like}
    return Pass(estimator.init(like), jnp.zeros((), jnp.int32), first_bad, found.kinds)


def update(state: Pass, model: Any, batch: Any, *, measure: Measure, estimator: Estimator) -> Pass:
    """The pass after one batch more; pure."""
    moments = measure(model, batch).moments

    def first_bad(path: str) -> jax.Array:
        finite = jnp.all(jnp.isfinite(moments[path].mean)) & jnp.all(jnp.isfinite(moments[path].m2))
        before = state.first_bad[path]
        return jnp.where((before < 0) & ~finite, state.batches, before)

    return dataclasses.replace(
        state,
        estimate=estimator.update(state.estimate, moments),
        batches=state.batches + 1,
        first_bad={path: first_bad(path) for path in moments},
    )


_jitted_update = jax.jit(update, static_argnames=("measure", "estimator"))


def finish(state: Pass, *, estimator: Estimator) -> Layers:
    """The moments to install; a ValueError if there are none, or the moments of a batch were not finite."""
    if state.batches.ndim:
        raise ValueError(
            f"The accumulator has a leading axis, {state.batches.shape}: it is replicated. Pass one of the replicas, "
            f"which are equal: jax.tree.map(lambda leaf: leaf[0], acc)."
        )
    if not state.batches:
        raise ValueError("The accumulator has seen no batch: call postproc_step on each batch first.")
    first_bad = {path: int(index) for path, index in jax.device_get(state.first_bad).items() if index >= 0}
    if first_bad:
        first = min(first_bad.values())
        layers = ", ".join(
            repr(path) if path else "the model itself" for path, index in first_bad.items() if index == first
        )
        raise ValueError(
            f"Batch {first} (counted from 0) gave statistics that are not finite, in {layers}. Look for NaN or "
            f"infinity in this batch and in the parameters; nothing was installed."
        )
    return estimator.finalize(state.estimate)
