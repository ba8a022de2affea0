"""The statistics pass: batches in, population moments out. Knows no model; the hosts say how a batch is measured.

Accumulators stay on the device and no batch waits for the host; the step compiles once for each shape of a batch.
"""

import collections
import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbn.population.estimators import Estimator, Layers
from jaxbn.population.progress import track

# Batches that may be under way at once: enough to keep the device busy, few enough to bound the memory of the inputs.
_IN_FLIGHT = 8


class Pass(NamedTuple):
    """A pass under way, or finished: a pytree, which may be saved."""

    estimate: Any  # the estimator's accumulators
    batches: jax.Array  # i32[]: batches seen
    first_bad: dict[str, jax.Array]  # i32[] per layer: the first batch whose moments were not finite, or -1


def estimate(
    measure: Callable[[Any, Any], Layers],
    model: Any,
    batches: Iterable[Any],
    *,
    estimator: Estimator,
    progress: bool | None = None,
) -> tuple[Layers, int]:
    """Measures every batch and estimates the moments of the population.

    Args:
        measure: A pure function `(model, batch) -> {layer: Moments}`; the same function object is compiled once.
        model: A pytree, the parameters that stay fixed.
        batches: Any iterable of pytrees of arrays, of any sizes.
        estimator: How moments are accumulated.
        progress: Show a progress bar. None: if this is a terminal.

    Returns:
        The moments of each layer, and the number of batches.

    Raises:
        ValueError: If there is no batch, or the moments of one are not finite.
    """
    state: Pass | None = None
    under_way: collections.deque[jax.Array] = collections.deque()
    for batch in track(batches, f"Estimating statistics, {estimator.name}", progress):
        if state is None:
            state = _start(measure, estimator, model, batch)
        state = _step(state, model, batch, measure=measure, estimator=estimator)
        under_way.append(state.batches)
        if len(under_way) > _IN_FLIGHT:
            under_way.popleft().block_until_ready()
    if state is None:
        raise ValueError(
            "There was no batch to estimate statistics from: the iterable is empty. An iterator can be read only once; "
            "pass a list, a loader, or a fresh iterator."
        )
    _check_finite(state)
    return estimator.finalize(state.estimate), int(state.batches)


def _start(measure: Callable[[Any, Any], Layers], estimator: Estimator, model: Any, batch: Any) -> Pass:
    shapes = jax.eval_shape(measure, model, batch)
    like = jax.tree.map(lambda part: jnp.zeros(part.shape, part.dtype), shapes)
    return Pass(estimator.init(like), jnp.zeros((), jnp.int32), {path: jnp.full((), -1, jnp.int32) for path in like})


@functools.partial(jax.jit, static_argnames=("measure", "estimator"))
def _step(state: Pass, model: Any, batch: Any, *, measure: Callable[[Any, Any], Layers], estimator: Estimator) -> Pass:
    moments = measure(model, batch)

    def first_bad(path: str) -> jax.Array:
        finite = jnp.all(jnp.isfinite(moments[path].mean)) & jnp.all(jnp.isfinite(moments[path].m2))
        before = state.first_bad[path]
        return jnp.where((before < 0) & ~finite, state.batches, before)

    return Pass(
        estimator.update(state.estimate, moments), state.batches + 1, {path: first_bad(path) for path in moments}
    )


def _check_finite(state: Pass) -> None:
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
