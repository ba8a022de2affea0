"""The statistics pass for NNX models, and the write-back of moments for loops of your own."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from jax.sharding import Mesh
from jax.typing import ArrayLike

from jaxbn._src.framework.framework import Call
from jaxbn._src.framework.layers import Weights
from jaxbn._src.nnx.capture import run_model
from jaxbn._src.nnx.framework import NNX
from jaxbn._src.numerics.moments import Moments
from jaxbn._src.statistics import install as _install
from jaxbn._src.statistics.estimators import Estimator, pooled
from jaxbn._src.statistics.pass_report import Report
from jaxbn._src.statistics.statistics_pass import Options, run_pass


def postproc(
    model: Any,
    batches: Iterable[Any] | Callable[[], Iterator[Any]],
    *,
    call: Call | None = None,
    estimator: Estimator = pooled(),  # noqa: B008  a constant: pure functions, made once
    consistent: bool = False,
    tolerance: float = 1e-5,
    max_sweeps: int | None = None,
    memory: int | None = None,
    stop_when: float | None = None,
    weights: Weights | None = None,
    skip_nonfinite: bool = False,
    mesh: Mesh | None = None,
    progress: bool | None = None,
) -> tuple[Any, Report]:
    """Estimates the population statistics of every normalization layer with the parameters fixed: a statistics pass.

    :func:`jaxbn.linen.postproc` describes it in full; in NNX you pass a model and get a new one.

    Args:
        model: The model; it is not changed. How arrays that are sharded over processes are treated is the same as in
            linen.
        batches: Any iterable of batches (pytrees of arrays), or a function that returns an iterator. Sizes may differ:
            every value counts once. With several processes, global arrays or batches of each process's own.
        call: Runs the model. None: `lambda model, batch: model(batch)`. The layers use the statistics of the batch
            whatever flags you pass. The same function object is compiled once; arrays that it closes over are released
            when you drop it.
        estimator: `jaxbn.pooled()`, `jaxbn.mean_of_batches()` or `jaxbn.moving_average()`.
        consistent: Estimate the statistics of the network as it will be served. A plain pass normalizes the layers
            before a layer with the statistics of each batch, so statistics of deep layers depend on the batch size.
            With True the layers are estimated in the order in which the data meets them, in stages: each batch is read
            once, and goes one stage further when the statistics before are final. The result does not depend on the
            size or the order of the batches. Between the stages all batches wait in memory, see `memory`. A layer that
            sees its own output, or lies in a `while_loop`, `cond`, `lax.map` or `shard_map`, is estimated by sweeps
            over what its stage kept, until its statistics agree with those that it normalizes with.
        tolerance: Stop these sweeps when no statistic changes by more than this: means in standard deviations,
            variances relative.
        max_sweeps: The largest number of these sweeps. None: 100; the report tells the last change.
        memory: Bytes of each device for the values that wait between the stages of `consistent`; further ones wait in
            host memory. None: half of the free memory, and no limit on a CPU. `stop_when` is then decided by the layers
            of the first stage, and a batch that `skip_nonfinite` leaves out is left out from the stage that shows it.
        stop_when: Stop reading batches when all standard errors are at or below this value, those of means in standard
            deviations, those of variances relative. None: read all batches.
        weights: `batch -> [N]`, booleans or real weights of the examples, such as 0 for padding. They multiply the mask
            that the model passes to a layer.
        skip_nonfinite: Leave out batches that give NaN or infinity in any layer instead of raising; the report counts
            them.
        mesh: Devices of this process over which to shard each batch; a batch that does not divide is replicated. None:
            batches are used as they are, sharded or not.
        progress: Show a progress bar. None: only in a terminal.

    Returns:
        A new model, in which only the statistics differ, and a `Report` of the changes. Layers that no batch reached
        keep their statistics.

    Raises:
        ValueError: If there is no batch, no normalization layer, none was reached, or a batch gave NaN; for `memory` or
            `max_sweeps` without `consistent`; if a variance would be computed from one value per channel, unless the
            layer has `allow_single_value=True`; for `stop_when` with an estimator that has no standard errors, such as
            `jaxbn.moving_average`.
        RuntimeError: If another process failed, has different global batches, or batches of its own where this one has
            global ones. The process that failed raises its own error.

    Example:
        >>> data = jnp.arange(10.0)[:, None]
        >>> model = nnx.BatchNorm(1, rngs=nnx.Rngs(0))
        >>> model, report = jaxbn.nnx.postproc(model, [data[:8], data[8:]])
        >>> model.mean[...], model.var[...]
        (Array([4.5], dtype=float32), Array([8.25], dtype=float32))

    References:
        Ioffe & Szegedy, `Batch Normalization <https://arxiv.org/abs/1502.03167>`_, 2015, Algorithm 2, steps 7-12.
    """
    options = Options(estimator, consistent, tolerance, max_sweeps, memory, stop_when, skip_nonfinite, mesh, progress)
    return run_pass(NNX, run_model if call is None else call, model, batches, weights, options)


def install_moments(model: Any, moments: Mapping[str, Moments]) -> Any:
    """Writes moments into the statistics of their layers.

    jaxbn's layers treat installed statistics as constants. To differentiate through statistics, normalize with them in
    `capture_moments(mode="batch")` or `adapt`.

    Args:
        model: The model; it is not changed.
        moments: `Moments` by layer path, as returned by `capture_moments` and the estimators. Statistics are kept where
            the count is 0 and, inside `jit`, where moments are not finite.

    Returns:
        A new model.

    Raises:
        ValueError: If a path does not lead to a normalization layer, the number of features differs, or moments are not
            finite in the dtype of the statistics.

    Example:
        >>> data = jnp.array([[1.0], [3.0]])
        >>> model = nnx.BatchNorm(1, rngs=nnx.Rngs(0))
        >>> _, moments = jaxbn.nnx.capture_moments()(model, data)
        >>> jaxbn.nnx.install_moments(model, moments).mean[...]
        Array([2.], dtype=float32)
    """
    return _install.install_moments(NNX, model, moments)


def move_averages(model: Any, moments: Mapping[str, Moments], *, samples: ArrayLike | None = None) -> Any:
    """Updates the running averages once, with moments that you computed: those of all micro-batches of one step.

    :func:`jaxbn.linen.move_averages` describes it in full; in NNX the layers know their momentum, and those with
    `momentum=None` keep their statistics. `nnx.update(model, nnx.state(new_model, nnx.BatchStat))` copies the new
    statistics into the model at hand. No gradient flows through the averages.

    Args:
        model: The model, as it was before the step; it is not changed.
        moments: `Moments` by layer path. Averages are kept where the count is 0 or the moments are not finite.
        samples: Number of examples in all micro-batches together; only `jaxbn.horizon` needs it.

    Returns:
        A new model.

    Raises:
        ValueError: If a path does not lead to a normalization layer, or the number of features differs.

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
    return _install.move_averages(NNX, model, moments, None, samples)
