"""The statistics pass (PreciseBN, PyTorch's `update_bn`) for any framework: in one sweep, or stage by stage."""

import contextlib
import functools
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sized
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxbn._src.framework import processes as _processes
from jaxbn._src.framework.framework import Call, Framework, measuring
from jaxbn._src.framework.layers import Mode, Weights
from jaxbn._src.framework.program_cache import Recipe
from jaxbn._src.methods.protocol import State
from jaxbn._src.numerics.collectives import replicate
from jaxbn._src.statistics import multihost as _multihost
from jaxbn._src.statistics import sweep as _sweep
from jaxbn._src.statistics.estimators import Estimator, Layers, check_estimator
from jaxbn._src.statistics.install import install_moments
from jaxbn._src.statistics.kept_values import budget
from jaxbn._src.statistics.layer_change import Way
from jaxbn._src.statistics.pass_report import Report, report
from jaxbn._src.statistics.stages import Stages
from jaxbn._src.statistics.standard_errors import rounding
from jaxbn._src.statistics.sweep import Pass

# The default maximum number of sweeps. Those over layers in a loop settle after as many as there are layers. Those over
# a layer that sees its own output approach a fixed point, if they do.
_MOST_SWEEPS = 100


class Options(NamedTuple):
    """The arguments of a statistics pass that all frameworks share; see `jaxbn.linen.postproc`."""

    estimator: Estimator
    consistent: bool
    tolerance: float
    max_sweeps: int | None
    memory: int | None
    stop_when: float | None
    skip_nonfinite: bool
    mesh: Mesh | None
    progress: bool | None


class _Sweep(NamedTuple):
    """The result of one sweep, over the batches or over the values that a stage kept."""

    done: Pass
    mine: Pass | None  # the part of this process
    moments: Layers
    stopped: bool  # whether the stop rule ended the sweep


class _Source(NamedTuple):
    """The batches."""

    batches: Callable[[], Iterable[Any]]
    length: int | None  # the number of batches, if known
    like: Any = None  # shapes of a batch, for a process without batches
    are_global: bool = False


class _Job(NamedTuple):
    """The data of a pass."""

    framework: Framework
    functions: tuple[Call, Weights | None]  # the user's
    structure: Any  # of the model
    source: _Source
    options: Options

    def measure(self, mode: Mode) -> Recipe:
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
    source, mesh = _open(batches, options.mesh)
    # Global batches run with sharded parameters. Otherwise each process runs its own number of batches, so its
    # programs must not need arrays of other processes.
    arrays = given if jax.process_count() == 1 else _processes.here(given) if mesh is None else replicate(given, mesh)
    job = _Job(framework, (call, weights), structure, source, options)
    new, made = (_run_stages if options.consistent else _run_once)(job, framework.merge(structure, arrays))
    structure, found = framework.split(new)
    return framework.merge(structure, _processes.as_it_was(found, arrays, given)), made


def _open(batches: Any, mesh: Mesh | None) -> tuple[_Source, Mesh | None]:
    """The batches, and their mesh if they are global arrays of several processes."""
    readable = batches if callable(batches) and not hasattr(batches, "__iter__") else lambda: batches
    length = len(batches) if isinstance(batches, Sized) else None
    if jax.process_count() == 1:
        return _Source(readable, length), None
    first, over, like = _multihost.opened(readable, mesh)
    return _Source(lambda: first, length, like, are_global=over is not None), over


def _run_once(job: _Job, model: Any) -> tuple[Any, Report]:
    """One sweep, in which the layers normalize with the statistics of each batch."""
    framework, options = job.framework, job.options
    found = _run_sweep(job, _sweep.measuring(job.measure("batch"), options.estimator), model)
    old = _states(framework, model)  # after the processes have synchronized, so that an error is raised in all of them
    new = install_moments(framework, model, found.moments)
    return new, report(
        options.estimator,
        found.done,
        found.moments,
        old,
        framework.states(new),
        stop_when=options.stop_when,
        stopped=found.stopped,
    )


def _run_stages(job: _Job, model: Any) -> tuple[Any, Report]:
    """One stage after the other, in each of which the layers before its own normalize with final statistics."""
    framework, options = job.framework, job.options
    stages = Stages(framework, job.measure, model, options.estimator, budget(options.memory))
    current, sweeps, ways = _run_stage(job, stages, 0, model)
    first, old = sweeps[0], _states(framework, model)
    for number in range(1, stages.count):
        current, more, others = _run_stage(job, stages, number, current)
        sweeps, ways = [*sweeps, *more], ways | others
    done, found = stages.whole([sweep.done for sweep in sweeps]), stages.unreached()
    for sweep in sweeps:
        found |= sweep.moments
    return current, report(
        options.estimator,
        done,
        found,
        old,
        framework.states(current),
        ways=ways,
        stages=stages.count,
        stop_when=options.stop_when,
        stopped=first.stopped,
    )


def _run_stage(job: _Job, stages: Stages, number: int, model: Any) -> tuple[Any, list[_Sweep], dict[str, Way]]:
    """The model with the statistics of a stage, the sweeps of the stage, and how each layer was estimated."""
    framework, options = job.framework, job.options
    items = stages.having(number) if number else None
    sweeps = [_run_sweep(job, stages.work(number), model, items, stages.title(number))]
    if not number:
        stages.agree()
    current = install_moments(framework, model, sweeps[0].moments)
    cyclic, changes = stages.cyclic[number], dict[str, float]()
    most = _MOST_SWEEPS if options.max_sweeps is None else options.max_sweeps
    while cyclic and len(sweeps) < most and not (changes and max(changes.values()) <= options.tolerance):
        work, title = stages.work(number, again=True), f"{stages.title(number)}, sweep {len(sweeps) + 1}"
        sweeps.append(_run_sweep(job, work, current, stages.having(number), title))
        before, current = current, install_moments(framework, current, sweeps[-1].moments)
        old, new = (_states(framework, each) for each in (before, current))
        changes = largest_changes({path: old[path] for path in cyclic}, new)
    stages.end(sweeps[-1].mine)
    ways = {path: Way(number + 1) for sweep in sweeps for path in sweep.done.first_bad}
    return current, sweeps, ways | {path: Way(number + 1, len(sweeps), changes.get(path)) for path in cyclic}


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
    if options.memory is not None and options.memory < 0:
        raise ValueError(f"memory={options.memory} is a number of bytes of each device: 0 or more.")
    if not options.consistent and (options.memory, options.max_sweeps) != (None, None):
        raise ValueError(
            "memory= and max_sweeps= are options of consistent statistics; the plain pass keeps no values, and sweeps "
            "once. Pass consistent=True too, or leave them out."
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


def _run_sweep(job: _Job, work: _sweep.Work, model: Any, items: Iterable[Any] | None = None, title: str = "") -> _Sweep:
    """One sweep, of all processes, over the user's batches, or over items that a stage kept."""
    options, source = job.options, job.source
    bound = options.stop_when if items is None else None
    enough = functools.partial(_sweep.is_certain, bound=bound, estimator=options.estimator)
    with contextlib.closing(_rounds(job, work, model, items, title)) as rounds:
        if jax.process_count() == 1:
            done, over = next(each for each in rounds if each[1] or (each[0] is not None and enough(each[0])))
            mine, stopped = done, not over
        else:
            done, mine, stopped = _multihost.together(
                rounds, enough, estimator=options.estimator, are_global=source.are_global
            )
    if done is None:
        raise ValueError(
            "There was no batch to estimate statistics from: the iterable is empty. An iterator can be read only "
            "once; pass a list, a loader, or a fresh iterator."
        )
    moments = _sweep.finish(done, estimator=options.estimator, skip_nonfinite=options.skip_nonfinite)
    return _Sweep(done, mine, moments, stopped)


def _rounds(
    job: _Job, work: _sweep.Work, model: Any, items: Iterable[Any] | None, title: str
) -> Generator[tuple[Pass | None, bool], None, None]:
    """The rounds of this process. Everything that may fail is inside, so that the other processes learn of it."""
    options, source = job.options, job.source
    _, arrays = job.framework.split(model)
    arrays = arrays if options.mesh is None else replicate(arrays, options.mesh)
    rounds = _sweep.rounds(
        work,
        arrays,
        _read(source, options.mesh) if items is None else items,
        title=f"Estimating statistics, {options.estimator.name}{title}",
        progress=options.progress,
        length=source.length,
        like=source.like,
        synchronizes=source.are_global and items is None,
        checks=options.stop_when is not None and items is None,
    )
    with contextlib.closing(rounds):
        for state, over in rounds:
            if state is not None and not options.skip_nonfinite:
                _sweep.check_finite(state)  # before the merge with other processes, which loses the batch numbers
            yield state, over


def _read(source: _Source, mesh: Mesh | None) -> Iterable[Any]:
    batches: Iterable[Any] = source.batches()
    if jax.process_count() > 1:
        batches = _multihost.in_step(batches) if source.are_global else _multihost.own_alone(batches)
    return _sweep.prepared(batches, mesh)


def largest_changes(old: Mapping[str, State], new: Mapping[str, State]) -> dict[str, float]:
    """Largest change of a statistic in each layer: means in standard deviations, variances as a fraction."""

    def of(before: State, after: State) -> float:
        means, variances = [np.asarray(s.mean) for s in (before, after)], [np.asarray(s.var) for s in (before, after)]
        var = np.maximum(variances[1], rounding(means[1]))  # in a constant channel, rounding errors never converge
        changes = np.abs(means[1] - means[0]) / np.sqrt(var), np.abs(variances[1] - variances[0]) / var
        return max(float(part.max(initial=0)) for part in changes)

    return {path: of(old[path], new[path]) for path in old}
