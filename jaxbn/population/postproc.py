"""The statistics pass as a whole, for any host: sweeps over the batches until the statistics are consistent."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxbn.core.devices import replicate
from jaxbn.methods.base import State
from jaxbn.population import estimate as _estimate
from jaxbn.population import processes as _processes
from jaxbn.population.estimate import Measure, Pass
from jaxbn.population.estimators import Estimator, Layers
from jaxbn.population.report import Report, report
from jaxbn.population.spread import rounding


class Host(NamedTuple):
    """What the pass needs to know of a kind of model."""

    measure: Callable[[str], Measure]  # how a batch is measured in a mode
    arrays: Callable[[Any], Any]  # the pytree that `measure` takes for a model
    states: Callable[[Any], dict[str, State]]  # the statistics of each layer
    install: Callable[[Any, Layers], Any]  # a new model with the moments as its statistics


def postproc(
    host: Host,
    model: Any,
    batches: Iterable[Any] | Callable[[], Iterator[Any]],
    *,
    estimator: Estimator,
    consistent: bool,
    tolerance: float,
    max_sweeps: int | None,
    skip_nonfinite: bool,
    mesh: Mesh | None,
    progress: bool | None,
) -> tuple[Any, Report]:
    """The new model, and what changed; see the `postproc` of the hosts."""
    if (max_sweeps is not None and max_sweeps < 1) or not tolerance >= 0:
        raise ValueError(f"max_sweeps={max_sweeps} must be positive, and tolerance={tolerance} not negative.")

    def sweep(model: Any, mode: str, number: int) -> tuple[Pass, Layers]:
        def run() -> Pass | None:
            arrays = host.arrays(model) if mesh is None else replicate(host.arrays(model), mesh)
            title = f"Estimating statistics, {estimator.name}" + (f", sweep {number}" if consistent else "")
            done = _estimate.run(
                host.measure(mode), arrays, _readable(batches, consistent),
                estimator=estimator, mesh=mesh, title=title, progress=progress,
            )  # fmt: skip
            if done is not None and not skip_nonfinite:
                _estimate.check_finite(done)  # where the batches are known by their number
            return done

        done = run() if jax.process_count() == 1 else _processes.together(run, estimator=estimator)
        if done is None:
            raise ValueError(
                "There was no batch to estimate statistics from: the iterable is empty. An iterator can be read only "
                "once; pass a list, a loader, or a fresh iterator."
            )
        return done, _estimate.finish(done, estimator=estimator, skip_nonfinite=skip_nonfinite)

    # The first sweep finds statistics near the right ones. Each later one measures every layer's input under those of
    # the sweep before, so that layer k is exact after k sweeps, and stands still.
    done, moments = sweep(model, "batch", 1)
    old = host.states(model)  # after the processes have met: what is wrong with the model of one is heard by all
    limit = len(old) + 1 if max_sweeps is None else max_sweeps
    current, sweeps, change = host.install(model, moments), 1, None
    while consistent and sweeps < limit and (change is None or change > tolerance):
        sweeps += 1
        done, moments = sweep(current, "eval", sweeps)
        before, current = current, host.install(current, moments)
        change = largest_change(host.states(before), host.states(current))
    return current, report(estimator, done, moments, old, host.states(current), sweeps=sweeps, change=change)


def largest_change(old: Mapping[str, State], new: Mapping[str, State]) -> float:
    """How far any statistic moved: a mean in standard deviations, a variance relative to itself."""

    def of(before: State, after: State) -> float:
        means, variances = ([np.asarray(state) for state in pair] for pair in zip(before[:2], after[:2], strict=True))
        var = np.maximum(variances[1], rounding(means[1]))  # in a constant channel rounding errors never settle
        moved = np.abs(means[1] - means[0]) / np.sqrt(var), np.abs(variances[1] - variances[0]) / var
        return max(float(part.max(initial=0)) for part in moved)

    return max(of(old[path], new[path]) for path in old)


def _readable(batches: Any, consistent: bool) -> Iterable[Any]:
    """The batches of one sweep; a TypeError, before the first is read, if they could not be read once more."""
    if callable(batches) and not hasattr(batches, "__iter__"):
        return batches()
    if consistent and isinstance(batches, Iterator):
        raise TypeError(
            f"consistent=True reads the batches several times, and {type(batches).__name__} can be read only once. "
            f"Pass a list, a loader, or a function that returns a fresh iterator."
        )
    return batches
