"""The statistics pass as a whole, for any host: sweeps over the batches until the statistics are consistent."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sized
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxbn._src.framework import processes as _processes
from jaxbn._src.framework.program_cache import Recipe
from jaxbn._src.methods.protocol import State
from jaxbn._src.numerics.collectives import replicate
from jaxbn._src.statistics import multihost as _multihost
from jaxbn._src.statistics import sweep as _sweep
from jaxbn._src.statistics.estimators import Estimator, Layers, check_estimator
from jaxbn._src.statistics.pass_report import Report, report
from jaxbn._src.statistics.standard_errors import rounding
from jaxbn._src.statistics.sweep import Pass


class Host(NamedTuple):
    """What the pass needs to know of a kind of model."""

    measure: Callable[[str], Recipe]  # how a batch is measured in a mode: a `Measure`
    arrays: Callable[[Any], Any]  # the pytree that `measure` takes for a model
    with_arrays: Callable[[Any, Any], Any]  # a model of the structure of one, and such a pytree
    states: Callable[[Any], dict[str, State]]  # the statistics of each layer
    install: Callable[[Any, Layers], Any]  # a new model with the moments as its statistics


class Options(NamedTuple):
    """How the pass goes; see the `postproc` of the hosts."""

    estimator: Estimator
    consistent: bool
    tolerance: float
    max_sweeps: int | None
    stop_when: float | None
    skip_nonfinite: bool
    mesh: Mesh | None
    progress: bool | None


class _Sweep(NamedTuple):
    """What came of one."""

    done: Pass
    moments: Layers
    read: int  # batches, by this process
    stopped: bool  # before there were no more


class _Source(NamedTuple):
    """Where the batches of each sweep come from."""

    sweeps: Iterator[Callable[[], Iterable[Any]]]
    length: int | None  # of each, if it is known
    like: Any = None  # shapes of a batch, for a process that has none
    are_global: bool = False


def postproc(
    host: Host, model: Any, batches: Iterable[Any] | Callable[[], Iterator[Any]], options: Options
) -> tuple[Any, Report]:
    """The new model, and what changed; see the `postproc` of the hosts."""
    _check(options)
    given = host.arrays(model)
    _processes.check_unstacked(given)
    readable = functools.partial(_readable, batches, options.consistent)
    length = len(batches) if isinstance(batches, Sized) else None
    if jax.process_count() == 1:
        arrays, source = given, _Source(itertools.repeat(readable), length)
    else:
        first, mesh, like = _multihost.opened(readable, options.mesh)
        sweeps: Iterator[Callable[[], Iterable[Any]]]
        sweeps = itertools.chain([lambda: first], itertools.repeat(readable))
        source = _Source(sweeps, length, like, are_global=mesh is not None)
        # Global batches run with the parameters as they are spread. Of batches of its own each process runs as many as
        # it has, so that none may need what another holds.
        arrays = _processes.here(given) if mesh is None else replicate(given, mesh)
    new, made = _postproc(host, host.with_arrays(model, arrays), source, options)
    return host.with_arrays(new, _processes.as_it_was(host.arrays(new), arrays, given)), made


def _postproc(host: Host, model: Any, source: _Source, options: Options) -> tuple[Any, Report]:
    # The first sweep finds statistics near the right ones. Each later one measures every layer's input under those of
    # the sweep before, so that layer k is exact after k sweeps, and stands still. If the first was stopped early, the
    # later ones read as many batches as it did.
    first = last = _run_sweep(host, model, source, options, mode="batch", number=1)
    limit = first.read if first.stopped else None
    old = _states(host, model)  # after the processes have met: what is wrong with the model of one is heard by all
    most = len(old) + 1 if options.max_sweeps is None else options.max_sweeps
    current, sweeps, changes = host.install(model, first.moments), 1, None
    while options.consistent and sweeps < most and (changes is None or max(changes.values()) > options.tolerance):
        sweeps += 1
        last = _run_sweep(host, current, source, options, mode="eval", number=sweeps, limit=limit)
        before, current = current, host.install(current, last.moments)
        changes = largest_changes(_states(host, before), _states(host, current))
    return current, report(
        options.estimator,
        last.done,
        last.moments,
        old,
        host.states(current),
        changes=changes,
        sweeps=sweeps,
        stop_when=options.stop_when,
        stopped=first.stopped,
    )


def _states(host: Host, model: Any) -> dict[str, State]:
    """The statistics of each layer, whole in this process."""
    states: dict[str, State] = _processes.here(host.states(model))
    return states


def _check(options: Options) -> None:
    """Raises a ValueError for options that make no sense."""
    check_estimator(options.estimator)
    if (options.max_sweeps is not None and options.max_sweeps < 1) or not options.tolerance >= 0:
        raise ValueError(
            f"max_sweeps={options.max_sweeps} must be positive, and tolerance={options.tolerance} not negative."
        )
    if options.stop_when is None:
        return
    if not options.stop_when > 0:
        raise ValueError(
            f"stop_when={options.stop_when} must be positive: the standard error that is small enough, such as 0.01."
        )
    if options.estimator.errors is None:
        raise ValueError(
            f"stop_when needs standard errors, and {options.estimator.name} has none: its last batches weigh most, and "
            f"more of them do not make it more certain. Use estimator=jaxbn.pooled()."
        )


def _run_sweep(
    host: Host, model: Any, source: _Source, options: Options, *, mode: str, number: int, limit: int | None = None
) -> _Sweep:
    """One pass over the batches, of all processes."""
    enough = functools.partial(_sweep.is_certain, bound=options.stop_when, estimator=options.estimator)
    with contextlib.closing(_stages(host, model, source, options, mode, number, limit)) as stages:
        if jax.process_count() == 1:
            done, over = next(stage for stage in stages if stage[1] or (stage[0] is not None and enough(stage[0])))
            mine, stopped = done, not over
        else:
            done, mine, stopped = _multihost.together(
                stages, enough, estimator=options.estimator, are_global=source.are_global
            )
    if done is None:
        raise ValueError(
            "There was no batch to estimate statistics from: the iterable is empty. An iterator can be read only "
            "once; pass a list, a loader, or a fresh iterator."
        )
    moments = _sweep.finish(done, estimator=options.estimator, skip_nonfinite=options.skip_nonfinite)
    return _Sweep(done, moments, 0 if mine is None else int(mine.batches), stopped)


def _stages(
    host: Host, model: Any, source: _Source, options: Options, mode: str, number: int, limit: int | None
) -> Generator[tuple[Pass | None, bool], None, None]:
    """The part of this process. All that may fail is inside, where the other processes hear of it."""
    arrays = host.arrays(model) if options.mesh is None else replicate(host.arrays(model), options.mesh)
    readable: Iterator[Any] = itertools.islice(next(source.sweeps)(), limit)
    if jax.process_count() > 1:
        readable = _multihost.in_step(readable) if source.are_global else _multihost.own_alone(readable)
    stages = _sweep.stages(
        host.measure(mode),
        arrays,
        readable,
        estimator=options.estimator,
        mesh=options.mesh,
        title=f"Estimating statistics, {options.estimator.name}" + (f", sweep {number}" if options.consistent else ""),
        progress=options.progress,
        length=source.length if limit is None else limit,
        like=source.like,
        meets=source.are_global,
        checks=options.stop_when is not None and number == 1,
    )
    with contextlib.closing(stages):
        for state, over in stages:
            if state is not None and not options.skip_nonfinite:
                _sweep.check_finite(state)  # where the batches are known by their number
            yield state, over


def largest_changes(old: Mapping[str, State], new: Mapping[str, State]) -> dict[str, float]:
    """How far any statistic of each layer moved: a mean in standard deviations, a variance relative to itself."""

    def of(before: State, after: State) -> float:
        means, variances = ([np.asarray(state) for state in pair] for pair in zip(before[:2], after[:2], strict=True))
        var = np.maximum(variances[1], rounding(means[1]))  # in a constant channel rounding errors never settle
        moved = np.abs(means[1] - means[0]) / np.sqrt(var), np.abs(variances[1] - variances[0]) / var
        return max(float(part.max(initial=0)) for part in moved)

    return {path: of(old[path], new[path]) for path in old}


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
