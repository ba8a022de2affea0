"""Population statistics for any NNX model: the pass, and the write-back for those who run their own loop."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from flax import nnx
from jax.sharding import Mesh
from jax.typing import ArrayLike

from jaxbn._src.framework.layer_paths import AS_THEY_ARE, LayerPath
from jaxbn._src.framework.layers import Measured, Weights
from jaxbn._src.framework.program_cache import Recipe
from jaxbn._src.methods.protocol import State
from jaxbn._src.nnx.capture import (
    Call,
    capture,
    check_model,
    find_layers,
    find_states,
    method_of,
    run_model,
    set_state,
    transform_of,
)
from jaxbn._src.nnx.freeze import check_one_model
from jaxbn._src.numerics.moments import Moments
from jaxbn._src.statistics import statistics_pass as _statistics_pass
from jaxbn._src.statistics.estimators import Estimator, pooled
from jaxbn._src.statistics.install import checked, installable
from jaxbn._src.statistics.pass_report import Report
from jaxbn._src.statistics.sweep import Measure


def postproc(
    model: Any,
    batches: Iterable[Any] | Callable[[], Iterator[Any]],
    *,
    call: Call | None = None,
    estimator: Estimator = pooled(),  # noqa: B008  a constant: pure functions, made once
    consistent: bool = False,
    tolerance: float = 1e-5,
    max_sweeps: int | None = None,
    stop_when: float | None = None,
    weights: Weights | None = None,
    skip_nonfinite: bool = False,
    mesh: Mesh | None = None,
    progress: bool | None = None,
) -> tuple[Any, Report]:
    """Estimates the population statistics of every normalization layer, with the parameters fixed.

    As :func:`jaxbn.linen.postproc`, for NNX: a new model comes back, and the one given is left untouched.

    Args:
        model: The model. What is spread over processes stays so for global batches. For batches of a process's own it
            is gathered, for which each needs the memory of a replica, and comes back as it was spread.
        batches: Any iterable of batches, pytrees of arrays, or a function that returns an iterator. Sizes may differ:
            every value counts once. Several processes give global arrays over the devices of all of them, as
            `jax.make_array_from_process_local_data` makes them, all equally many; or each gives its own batches, none
            or any number of them.
        call: Runs the model; None: `lambda model, batch: model(batch)`. Whatever flags it passes, layers use their
            batch's statistics. Pass the same function object again and it is not compiled again; what it closes over
            is not kept in memory after you drop it.
        estimator: `jaxbn.pooled()`, `jaxbn.mean_of_batches()` or `jaxbn.moving_average()`.
        consistent: Estimate the statistics of the network that will be used. One pass normalizes the layers before a
            layer with the statistics of each batch, so that deep statistics depend on the size of the batches. Here
            later sweeps normalize with the statistics of the sweep before; the result is the same for any size and
            order of the batches. Ends after as many sweeps as there are layers in sequence and one more, at the latest.
        tolerance: What a sweep of `consistent` may move for it to be the last: means in standard deviations, variances
            relative.
        max_sweeps: Sweeps of `consistent`, at most. None: one more than there are layers, which is enough unless a
            layer is reached again downstream of itself.
        stop_when: Read no more batches once all standard errors are at or below this, those of means in standard
            deviations, those of variances relative: 0.01 takes some 20000 independent values per channel. Shuffle: of
            data in order the first batches say nothing about the others. Asked after 8 batches, and then each time when
            there are half as many again; `batches` may be endless, and what it gives next is the batch after the last
            that was used. Channels that are constant so far do not hold it up. Later sweeps of `consistent` read as
            many batches as the first. Several processes decide together. None: read all.
        weights: `batch -> [N]`, booleans or real weights of the examples, such as 0 for those that fill up a batch.
            They multiply the mask that the model gives a layer.
        skip_nonfinite: Leave batches out that give NaN or infinity in any layer, instead of raising; the report counts
            them. With `stop_when`, 100 batches in a row that add nothing are an error, as `batches` may be endless.
        mesh: Devices of this process over which each batch is spread; a batch that does not divide is whole on each.
            None: batches are used as they come, sharded or not.
        progress: Show a progress bar. None: if this is a terminal.

    Returns:
        A new model, in which only statistics differ, and a `Report` of what changed in which layer. Layers that no
        batch went through keep their statistics.

    Raises:
        ValueError: If there is no batch, no normalization layer, none was reached, or a batch gave NaN; if a variance
            would be of one value per channel, unless the layer has `allow_single_value=True`; for `stop_when` and an
            estimator without standard errors, which `jaxbn.moving_average` is.
        TypeError: If `consistent` is given an iterator that can be read only once.
        RuntimeError: If another process failed, or has other global batches than this one, or batches of its own where
            this one has global ones; the error of the process itself is raised as it is.

    Example:
        >>> data = jnp.arange(10.0)[:, None]
        >>> model = nnx.BatchNorm(1, rngs=nnx.Rngs(0))
        >>> model, report = jaxbn.nnx.postproc(model, [data[:8], data[8:]])
        >>> model.mean[...], model.var[...]
        (Array([4.5], dtype=float32), Array([8.25], dtype=float32))

    References:
        Ioffe & Szegedy, `Batch Normalization <https://arxiv.org/abs/1502.03167>`_, 2015, Algorithm 2, steps 7-12.
    """
    check_model(model)
    functions, graphdef = (run_model if call is None else call, weights), nnx.graphdef(model)
    return _statistics_pass.postproc(
        _statistics_pass.Host(
            measure=lambda mode: Recipe(_measure, functions, (graphdef, mode)),
            arrays=nnx.state,
            with_arrays=lambda model, state: nnx.merge(nnx.graphdef(model), state),
            states=find_states,
            install=install_moments,
        ),
        model,
        batches,
        _statistics_pass.Options(
            estimator, consistent, tolerance, max_sweeps, stop_when, skip_nonfinite, mesh=mesh, progress=progress
        ),
    )


def install_moments(model: Any, moments: Mapping[str, Moments]) -> Any:
    """Writes moments into the statistics of their layers; the model given is left untouched.

    The layers of jaxbn take what is installed as constants. To differentiate through statistics, normalize with them by
    `capture_moments(mode="batch")` or by `adapt`.

    Args:
        model: The model.
        moments: `Moments` by layer path, as `capture_moments` and the estimators give them. Where the count is 0 the
            statistics stay, and inside `jit` where they are not finite.

    Returns:
        A new model.

    Raises:
        ValueError: If a path is not that of a normalization layer, the features of a layer differ, or moments are not
            finite in the dtype of the statistics.

    Example:
        >>> data = jnp.array([[1.0], [3.0]])
        >>> model = nnx.BatchNorm(1, rngs=nnx.Rngs(0))
        >>> _, moments = jaxbn.nnx.capture_moments()(model, data)
        >>> jaxbn.nnx.install_moments(model, moments).mean[...]
        Array([2.], dtype=float32)
    """
    check_one_model(model)

    def installed(path: str, layer: Any, state: State, found: Moments) -> State:
        as_they_are = isinstance(path, LayerPath) and path.method is AS_THEY_ARE
        new: State = (AS_THEY_ARE() if as_they_are else transform_of(layer)).postproc(state, found)
        return new

    return _with_states(model, installable(moments, find_states(model)), installed)


def move_averages(model: Any, moments: Mapping[str, Moments], *, samples: ArrayLike | None = None) -> Any:
    """Moves the running averages once, by moments of your own: of all the micro-batches of one optimizer step.

    As :func:`jaxbn.linen.move_averages`, for NNX, where each layer has its momentum with it; layers of `momentum=None`
    stay. A new model comes back, and the one given is left untouched: `nnx.update(model, nnx.state(new_model,
    nnx.BatchStat))` takes its statistics over. No gradient flows through the averages.

    Args:
        model: The model, as it was before the step.
        moments: `Moments` by layer path. Where the count is 0, or they are not finite, the averages stay.
        samples: Examples in all micro-batches together; needed for `jaxbn.horizon` alone.

    Returns:
        A new model.

    Raises:
        ValueError: If a path is not that of a normalization layer, or the features of a layer differ.

    Example:
        >>> model = jaxbn.nnx.BatchNorm(1, momentum=0.9, rngs=nnx.Rngs(0))
        >>> micro_batches = jnp.array([[[1.0], [3.0]], [[11.0], [13.0]]])
        >>> capture = jaxbn.nnx.capture_moments(mode="as_called")
        >>> moments = [capture(model, batch)[1] for batch in micro_batches]
        >>> pooled = {path: jaxbn.merge(moments[0][path], moments[1][path]) for path in moments[0]}
        >>> moved = jaxbn.nnx.move_averages(model, pooled)
        >>> print(f"{float(moved.var[0]):.2f}")  # 0.9 * 1 + 0.1 * 26
        3.50
    """

    def moved(path: str, layer: Any, state: State, found: Moments) -> State:
        del path
        update = method_of(layer)().update
        return state if update is None else update(state, found, samples)

    return _with_states(model, moments, moved)


def _with_states(
    model: Any, moments: Mapping[str, Moments], new_state: Callable[[str, Any, State, Moments], State]
) -> Any:
    """A copy of the model, with the new states of the layers that the moments are of."""
    copy = nnx.clone(model)
    layers, states = find_layers(copy), find_states(copy)
    for path, found in checked(moments, states).items():
        set_state(layers[path], new_state(path, layers[path], states[path], found))
    return copy


def _measure(call: Call, weights: Weights | None, graphdef: Any, mode: str) -> Measure:
    captured = capture(call, mode=mode, weights=weights)

    def measure(state: Any, batch: Any) -> Measured:
        return captured(nnx.merge(graphdef, state), batch)[1]

    return measure
