"""The statistics pass for linen models, and the write-back of moments for loops of your own."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from jax.sharding import Mesh
from jax.typing import ArrayLike

from jaxbn._src.framework.layers import Weights
from jaxbn._src.linen.framework import LINEN
from jaxbn._src.linen.variables import Call
from jaxbn._src.methods.protocol import NormTransform
from jaxbn._src.numerics.averages import Averaging
from jaxbn._src.numerics.moments import Moments
from jaxbn._src.statistics import install as _install
from jaxbn._src.statistics.estimators import Estimator, pooled
from jaxbn._src.statistics.pass_report import Report
from jaxbn._src.statistics.statistics_pass import Options, run_pass


def postproc(
    call: Call,
    variables: Mapping[str, Any],
    batches: Iterable[Any] | Callable[[], Iterator[Any]],
    *,
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
) -> tuple[dict[str, Any], Report]:
    """Estimates the population statistics of every normalization layer with the parameters fixed: a statistics pass.

    Other libraries call this PreciseBN (fvcore), `update_bn` (PyTorch) or calibration. Run it after training, before an
    evaluation, after averaging weights (SWA, EMA), or on the data of another domain (AdaBN). Every layer
    normalizes with the statistics of its batch while they are collected, so use the batch size of training.

    Args:
        call: Runs the model, such as `lambda variables, batch: net.apply(variables, batch["image"], train=False)`. The
            layers use the statistics of the batch whatever flags you pass, so dropout may be off and no collection
            needs to be mutable. The same function object is compiled once; arrays that it closes over are released when
            you drop it.
        variables: All variables of the model; they are not changed. With global batches, arrays that are sharded over
            processes stay sharded. If each process has batches of its own, the arrays are gathered for the pass, which
            takes the memory of a replica in each process, and returned in their sharding.
        batches: Any iterable of batches (pytrees of arrays), or a function that returns an iterator. Sizes may differ:
            every value counts once. With several processes, either pass global arrays, as made by
            `jax.make_array_from_process_local_data`, the same number in each process; or let each process pass its own
            batches, any number of them, none included.
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
            deviations, those of variances relative: 0.01 takes about 20000 independent values per channel. Shuffle the
            data first. The rule is checked after 8 batches and then each time their number has grown by half;
            `batches` may be endless, and continues after the last batch that was used. Channels that are constant so
            far are ignored. Several processes decide
            together. None: read all batches.
        weights: `batch -> [N]`, booleans or real weights of the examples, such as 0 for padding. They multiply the mask
            that the model passes to a layer.
        skip_nonfinite: Leave out batches that give NaN or infinity in any layer instead of raising; the report counts
            them. With `stop_when`, 100 batches in a row without a contribution are an error.
        mesh: Devices of this process over which to shard each batch; a batch that does not divide is replicated. None:
            batches are used as they are, sharded or not.
        progress: Show a progress bar. None: only in a terminal.

    Returns:
        New variables, in which only the statistics differ, and a `Report` of the changes. Layers that no batch reached
        keep their statistics.

    Raises:
        ValueError: If there is no batch, no normalization layer, none was reached, or a batch gave NaN; for `memory` or
            `max_sweeps` without `consistent`; for variables that are replicated for `pmap`, with a leading axis of
            devices; if a variance would be computed from one value per channel, unless the layer has
            `allow_single_value=True`; for `stop_when` with an estimator that has no standard errors, such as
            `jaxbn.moving_average`.
        RuntimeError: If another process failed, has different global batches, or batches of its own where this one has
            global ones. The process that failed raises its own error.

    Example:
        >>> net = jaxbn.linen.BatchNorm(use_running_average=True)
        >>> data = jnp.arange(10.0)[:, None]
        >>> variables = net.init(jax.random.key(0), data)
        >>> variables, report = jaxbn.linen.postproc(net.apply, variables, [data[:8], data[8:]])
        >>> variables["batch_stats"]
        {'mean': Array([4.5], dtype=float32), 'var': Array([8.25], dtype=float32)}

    References:
        Ioffe & Szegedy, `Batch Normalization <https://arxiv.org/abs/1502.03167>`_, 2015, Algorithm 2, steps 7-12;
        Wu & Johnson, `Rethinking "Batch" in BatchNorm <https://arxiv.org/abs/2105.07576>`_, 2021, section 3.
    """
    options = Options(estimator, consistent, tolerance, max_sweeps, memory, stop_when, skip_nonfinite, mesh, progress)
    return run_pass(LINEN, call, variables, batches, weights, options)


def install_moments(variables: Mapping[str, Any], moments: Mapping[str, Moments]) -> dict[str, Any]:
    """Writes moments into the statistics of their layers.

    jaxbn's layers treat installed statistics as constants. To differentiate through statistics, normalize with them in
    `capture_moments(mode="batch")` or `adapt`.

    Args:
        variables: All variables of the model; they are not changed.
        moments: `Moments` by layer path, as returned by `capture_moments` and the estimators. Statistics are kept where
            the count is 0 and, inside `jit`, where moments are not finite. The keys of `capture_moments` are paths that
            also carry the method of the layer, which decides how moments are installed. For plain strings the names of
            the statistics decide: layers with the statistics of batch norm are treated as batch norm, and those of a
            method of your own are an error.

    Returns:
        New variables.

    Raises:
        ValueError: If a path does not lead to a normalization layer, the number of features differs, moments are not
            finite in the dtype of the statistics or come from one value per channel, or the method of a layer is not
            known.

    Example:
        >>> net = jaxbn.linen.BatchNorm(use_running_average=True)
        >>> data = jnp.array([[1.0], [3.0]])
        >>> variables = net.init(jax.random.key(0), data)
        >>> _, moments = jaxbn.linen.capture_moments(net.apply)(variables, data)
        >>> jaxbn.linen.install_moments(variables, moments)["batch_stats"]["mean"]
        Array([2.], dtype=float32)
    """
    new: dict[str, Any] = _install.install_moments(LINEN, variables, moments)
    return new


def move_averages(
    variables: Mapping[str, Any],
    moments: Mapping[str, Moments],
    momentum: ArrayLike | Averaging | NormTransform[Any, Any] | None = None,
    *,
    samples: ArrayLike | None = None,
) -> dict[str, Any]:
    """Updates the running averages once, with moments that you computed: those of all micro-batches of one step.

    In a loop over micro-batches the layers would update their averages once per micro-batch, each time with the
    variance of that micro-batch alone. Instead, take the moments with `capture_moments(call, mode="as_called")` and
    merge them with `jaxbn.merge`; if the loop is inside `call` they are pooled already. Across devices use
    `jaxbn.merge_over`. Pure, and may be jitted. No gradient flows through the averages.

    Args:
        variables: All variables of the model, as they were before the step.
        moments: `Moments` by layer path. Averages are kept where the count is 0 or the moments are not finite.
        momentum: None: use the method and momentum of each layer, which the keys of `capture_moments` carry; layers
            with `momentum=None` keep their statistics. For moments under plain strings: the weight of the OLD value or
            a `jaxbn.Averaging`, for layers of batch norm; or the transform of another method, such as
            `jaxbn.batch_renorm()`, for the moments of its layers only.
        samples: Number of examples in all micro-batches together; only `jaxbn.horizon` needs it.

    Returns:
        New variables.

    Raises:
        ValueError: If a path does not lead to a normalization layer or the number of features differs; for a momentum
            that does not fit the method of a layer; or for None with a plain string as a key.

    Example:
        >>> net = jaxbn.linen.BatchNorm(use_running_average=False, momentum=0.9)
        >>> micro_batches = jnp.array([[[1.0], [3.0]], [[11.0], [13.0]]])
        >>> variables = net.init(jax.random.key(0), micro_batches[0])
        >>> call = functools.partial(net.apply, mutable=["batch_stats"])
        >>> capture = jaxbn.linen.capture_moments(call, mode="as_called")
        >>> moments = [capture(variables, batch)[1] for batch in micro_batches]
        >>> pooled = {path: jaxbn.merge(moments[0][path], moments[1][path]) for path in moments[0]}
        >>> moved = jaxbn.linen.move_averages(variables, pooled)
        >>> print(f"{float(moved['batch_stats']['var'][0]):.2f}")  # 0.9 * 1 + 0.1 * 26
        3.50
    """
    moved: dict[str, Any] = _install.move_averages(LINEN, variables, moments, momentum, samples)
    return moved
