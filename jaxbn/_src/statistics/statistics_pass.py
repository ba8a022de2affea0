"""The statistics pass (PreciseBN, PyTorch's `update_bn`) for any framework.

It sweeps over the batches once, or until the statistics of all layers are consistent with each other.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sized
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxbn._src.framework import processes as _processes
from jaxbn._src.framework.framework import Call, Framework, measuring
from jaxbn._src.framework.layers import Weights
from jaxbn._src.framework.program_cache import Recipe
from jaxbn._src.methods.protocol import State
from jaxbn._src.numerics.collectives import replicate
from jaxbn._src.statistics import multihost as _multihost
from jaxbn._src.statistics import sweep as _sweep
from jaxbn._src.statistics.estimators import Estimator, Layers, check_estimator
from jaxbn._src.statistics.install import install_moments
from jaxbn._src.statistics.pass_report import Report, report
from jaxbn._src.statistics.standard_errors import rounding
from jaxbn._src.statistics.sweep import Pass


class Options(NamedTuple):
    """The arguments of a statistics pass that all frameworks share; see `jaxbn.linen.postproc`."""

    estimator: Estimator
    consistent: bool
    tolerance: float
    max_sweeps: int | None
    stop_when: float | None
    skip_nonfinite: bool
    mesh: Mesh | None
    progress: bool | None


class _Sweep(NamedTuple):
    """The result of one sweep."""

    done: Pass
    moments: Layers
    read: int  # batches that this process read
    stopped: bool  # whether the stop rule ended the sweep


class _Source(NamedTuple):
    """The batches of each sweep."""

    sweeps: Iterator[Callable[[], Iterable[Any]]]
    length: int | None  # number of batches in a sweep, if known
    like: Any = None  # shapes of a batch, for a process without batches
    are_global: bool = False


class _Job(NamedTuple):
    """The data that is the same in all sweeps."""

    framework: Framework
    functions: tuple[Call, Weights | None]  # the user's
    structure: Any  # of the model
    source: _Source
    options: Options

    def measure(self, mode: str) -> Recipe:
        """The recipe of the function that measures a batch in this mode."""
        return Recipe(measuring, self.functions, (self.framework, self.structure, mode))


def run_pass(
    framework: Framework,
    call: Call,
    model: Any,
    batches: Iterable[Any] | Callable[[], Iterator[Any]],
    weights: Weights | None,
    options: Options,
) -> tuple[Any, Report]:
    """Returns the new model and the report; see `jaxbn.linen.postproc`."""
    framework.check(model)
    _check(options)
    structure, given = framework.split(model)
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
        # Global batches run with sharded parameters. Otherwise each process runs its own number of batches, so its
        # programs must not need arrays of other processes.
        arrays = _processes.here(given) if mesh is None else replicate(given, mesh)
    job = _Job(framework, (call, weights), structure, source, options)
    new, made = _run_sweeps(job, framework.merge(structure, arrays))
    structure, found = framework.split(new)
    return framework.merge(structure, _processes.as_it_was(found, arrays, given)), made


def _run_sweeps(job: _Job, model: Any) -> tuple[Any, Report]:
    # The first sweep gives approximate statistics. Each later sweep measures the input of every layer under the
    # statistics of the sweep before, so layer k is exact after k sweeps and stays unchanged. If the first sweep stopped
    # early, later sweeps read the same number of batches.
    framework, options = job.framework, job.options
    first = last = _run_sweep(job, model, mode="batch", number=1)
    limit = first.read if first.stopped else None
    old = _states(framework, model)  # after the processes have synchronized, so that an error is raised in all of them
    most = len(old) + 1 if options.max_sweeps is None else options.max_sweeps
    current, sweeps, changes = install_moments(framework, model, first.moments), 1, None
    while options.consistent and sweeps < most and (changes is None or max(changes.values()) > options.tolerance):
        sweeps += 1
        last = _run_sweep(job, current, mode="eval", number=sweeps, limit=limit)
        before, current = current, install_moments(framework, current, last.moments)
        changes = largest_changes(_states(framework, before), _states(framework, current))
    return current, report(
        options.estimator,
        last.done,
        last.moments,
        old,
        framework.states(current),
        changes=changes,
        sweeps=sweeps,
        stop_when=options.stop_when,
        stopped=first.stopped,
    )


def _states(framework: Framework, model: Any) -> dict[str, State]:
    """The statistics of each layer, as whole arrays in this process."""
    states: dict[str, State] = _processes.here(framework.states(model))
    return states


def _check(options: Options) -> None:
    """Raises a ValueError for invalid options."""
    check_estimator(options.estimator)
    if (options.max_sweeps is not None and options.max_sweeps < 1) or not options.tolerance >= 0:
        raise ValueError(
            f"max_sweeps={options.max_sweeps} must be positive, and tolerance={options.tolerance} not negative."
        )
    if options.stop_when is None:
        return
    if not options.stop_when > 0:
        raise ValueError(
            f"stop_when={options.stop_when} must be positive: it is the largest accepted standard error, such as 0.01."
        )
    if options.estimator.errors is None:
        raise ValueError(
            f"stop_when needs standard errors, and {options.estimator.name} has none: its last batches weigh most, "
            f"so more batches do not reduce the error. Use estimator=jaxbn.pooled()."
        )


def _run_sweep(job: _Job, model: Any, *, mode: str, number: int, limit: int | None = None) -> _Sweep:
    """One sweep over the batches of all processes."""
    options, source = job.options, job.source
    enough = functools.partial(_sweep.is_certain, bound=options.stop_when, estimator=options.estimator)
    with contextlib.closing(_stages(job, model, mode, number, limit)) as stages:
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
    job: _Job, model: Any, mode: str, number: int, limit: int | None
) -> Generator[tuple[Pass | None, bool], None, None]:
    """The stages of this process. Everything that may fail is inside, so that the other processes learn of it."""
    options, source = job.options, job.source
    _, arrays = job.framework.split(model)
    arrays = arrays if options.mesh is None else replicate(arrays, options.mesh)
    readable: Iterator[Any] = itertools.islice(next(source.sweeps)(), limit)
    if jax.process_count() > 1:
        readable = _multihost.in_step(readable) if source.are_global else _multihost.own_alone(readable)
    stages = _sweep.stages(
        job.measure(mode),
        arrays,
        readable,
        estimator=options.estimator,
        mesh=options.mesh,
        title=f"Estimating statistics, {options.estimator.name}" + (f", sweep {number}" if options.consistent else ""),
        progress=options.progress,
        length=source.length if limit is None else limit,
        like=source.like,
        synchronizes=source.are_global,
        checks=options.stop_when is not None and number == 1,
    )
    with contextlib.closing(stages):
        for state, over in stages:
            if state is not None and not options.skip_nonfinite:
                _sweep.check_finite(state)  # before the merge with other processes, which loses the batch numbers
            yield state, over


def largest_changes(old: Mapping[str, State], new: Mapping[str, State]) -> dict[str, float]:
    """Largest change of a statistic in each layer: means in standard deviations, variances as a fraction."""

    def of(before: State, after: State) -> float:
        means, variances = [np.asarray(s.mean) for s in (before, after)], [np.asarray(s.var) for s in (before, after)]
        var = np.maximum(variances[1], rounding(means[1]))  # in a constant channel, rounding errors never converge
        changes = np.abs(means[1] - means[0]) / np.sqrt(var), np.abs(variances[1] - variances[0]) / var
        return max(float(part.max(initial=0)) for part in changes)

    return {path: of(old[path], new[path]) for path in old}


def _readable(batches: Any, consistent: bool) -> Iterable[Any]:
    """The batches of one sweep; raises a TypeError, before the first is read, if they cannot be read again."""
    if callable(batches) and not hasattr(batches, "__iter__"):
        return batches()
    if consistent and isinstance(batches, Iterator):
        raise TypeError(
            f"consistent=True reads the batches several times, and {type(batches).__name__} can be read only once. "
            f"Pass a list, a loader, or a function that returns a fresh iterator."
        )
    return batches
