"""The steps of a statistics pass in a training loop, up to the frozen network, for any framework."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxbn._src.framework.framework import Call, Framework, Measure, capture_arrays
from jaxbn._src.framework.layers import LayerKind, merged
from jaxbn._src.framework.steps import check_whole
from jaxbn._src.inference.frozen import RUNNING, Frozen, copied, freeze
from jaxbn._src.numerics.collectives import AxisName
from jaxbn._src.statistics import sweep as _sweep
from jaxbn._src.statistics.estimators import Estimator
from jaxbn._src.statistics.install import install_moments
from jaxbn._src.statistics.pass_report import Report, report
from jaxbn._src.statistics.sweep import Pass


class PassSteps(NamedTuple):
    """The functions of `Steps` that concern the pass, and the measurement of a batch."""

    measure: Measure
    start: Callable[[Any, Any], Pass]
    postproc_step: Callable[[Any, Pass, Any], Pass]
    finalize: Callable[..., tuple[Frozen, Report | None]]


def pass_steps(
    framework: Framework,
    structure: Any,
    call: Call,
    arrays_of: Callable[[Any], Any],
    *,
    estimator: Estimator,
    axis_name: AxisName | None,
    kinds_of: Callable[[Any], tuple[tuple[str, LayerKind], ...]] | None = None,
) -> PassSteps:
    """Makes the steps.

    Args:
        framework: The model library.
        structure: The static part of the model, as `framework.merge` takes it.
        call: Runs the model in evaluation.
        arrays_of: Takes the arrays of the model from a train state.
        estimator: The estimator of the population statistics.
        axis_name: Axis over which the moments of a batch are merged.
        kinds_of: Takes the kinds of the layers from a train state, if the model does not provide them.

    Returns:
        The steps.
    """
    # In mode "batch" each layer sees inputs that are normalized as in training, although `call` evaluates.
    captured = capture_arrays(framework, structure, call, "batch", None)

    def measure(arrays: Any, batch: Any) -> Any:
        return merged(captured(arrays, batch)[1], axis_name)

    def start(state: Any, batch: Any) -> Pass:
        return _sweep.start(measure, arrays_of(state), batch, estimator=estimator)

    def postproc_step(state: Any, acc: Pass, batch: Any) -> Pass:
        return _sweep.update(acc, arrays_of(state), batch, measure=measure, estimator=estimator)

    def finalize(state: Any, acc: Pass | None = None) -> tuple[Frozen, Report | None]:
        check_whole(state.step)
        # Copies, because the next train_step may donate the arrays of this state.
        model, made = framework.merge(structure, copied(arrays_of(state))), None
        kinds: Mapping[str, LayerKind] | None = None if kinds_of is None else dict(kinds_of(state))
        if acc is not None:
            if kinds is not None:  # a saved and loaded accumulator has no kinds
                acc = dataclasses.replace(acc, kinds=tuple(kinds.items()))
            old, moments = framework.states(model), _sweep.finish(acc, estimator=estimator)
            model = install_moments(framework, model, moments)
            made = report(estimator, acc, moments, old, framework.states(model))
        return freeze(framework, model, made, kinds=kinds, otherwise=RUNNING), made

    return PassSteps(measure, start, postproc_step, finalize)
