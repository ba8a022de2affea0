"""The statistics pass for models of plain functions, and the write-back of moments for loops of your own."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from jax.sharding import Mesh
from jax.typing import ArrayLike

from jaxbn._src.framework.framework import Call
from jaxbn._src.framework.layers import Weights
from jaxbn._src.methods.protocol import NormTransform
from jaxbn._src.numerics.averages import Averaging
from jaxbn._src.numerics.moments import Moments
from jaxbn._src.pytree.framework import PYTREE
from jaxbn._src.statistics import install as _install
from jaxbn._src.statistics.estimators import Estimator, pooled
from jaxbn._src.statistics.pass_report import Report
from jaxbn._src.statistics.statistics_pass import Options, run_pass


def postproc(
    call: Call,
    state: Any,
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
) -> tuple[Any, Report]:
    """Estimates the population statistics of a model of plain functions with the parameters fixed: a statistics pass.

    Use it for any model that normalizes with `train` or `eval` of a `NormTransform`: plain functions, Equinox modules,
    Haiku transforms. It knows Equinox's and Haiku's own BatchNorm too, if not subclasses with another call in Equinox.
    :func:`jaxbn.linen.postproc` describes the pass in full, and is the one for Flax.

    Args:
        call: Runs the model, `(state, batch) -> outputs`: any function that passes the states in `state` to `bn.train`
            or `bn.eval`. It may use jit, vmap, scan, remat, shard_map and pmap. The layers use the statistics of the
            batch whichever of the two it calls. The same function object is compiled once.
        state: Any pytree that holds states of methods, such as `BatchNormState`; it may hold the parameters too. States
            are found by their type, NamedTuples with `mean` and `var`, and named by their path in the tree. Stacked
            states, as of an ensemble, are a single layer. For Equinox's own layers: the model together with its
            `eqx.nn.State`. For Haiku's: the states of the transform, with or without the parameters.
        batches: Any iterable of batches (pytrees of arrays), or a function that returns an iterator. Sizes may differ:
            every value counts once. With several processes, global arrays or batches of each process's own.
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
        A new tree, in which only the statistics differ, and a `Report` of the changes. Layers that no batch reached
        keep their statistics.

    Raises:
        ValueError: If there is no batch, no state of a method, none was reached, or a batch gave NaN; for `memory` or
            `max_sweeps` without `consistent`; if a variance would be computed from one value per channel, unless the
            method has `allow_single_value=True`; for `stop_when` with an estimator that has no standard errors, such as
            `jaxbn.moving_average`.
        RuntimeError: If another process failed, has different global batches, or batches of its own where this one has
            global ones. The process that failed raises its own error.

    Example:
        >>> bn = jaxbn.batch_norm()
        >>> params, state = bn.init(1)
        >>> call = lambda state, x: bn.eval(params, state["norm"], x)
        >>> data = jnp.arange(10.0)[:, None]
        >>> state, report = jaxbn.postproc(call, {"norm": state}, [data[:8], data[8:]])
        >>> state["norm"].mean, state["norm"].var
        (Array([4.5], dtype=float32), Array([8.25], dtype=float32))

    References:
        Ioffe & Szegedy, `Batch Normalization <https://arxiv.org/abs/1502.03167>`_, 2015, Algorithm 2, steps 7-12.
    """
    options = Options(estimator, consistent, tolerance, max_sweeps, memory, stop_when, skip_nonfinite, mesh, progress)
    return run_pass(PYTREE, call, state, batches, weights, options)


def install_moments(state: Any, moments: Mapping[str, Moments]) -> Any:
    """Writes moments into the states of their layers.

    Use it after a loop of your own over :func:`jaxbn.capture_moments`.

    Args:
        state: A pytree that holds states of methods; it is not changed.
        moments: `Moments` by the path of the state, as returned by `capture_moments` and the estimators. Statistics are
            kept where the count is 0 and, inside `jit`, where moments are not finite. The keys of `capture_moments`
            also carry the method, whose `postproc` installs the moments. For plain strings the fields of the state
            decide: states with those of batch norm are treated as batch norm, and those of a method of your own are an
            error.

    Returns:
        A new tree.

    Raises:
        ValueError: If a path does not lead to a state, the number of features differs, moments are not finite in the
            dtype of the statistics or come from one value per channel, or the method of a layer is not known.

    Example:
        >>> bn = jaxbn.batch_norm()
        >>> params, state = bn.init(1)
        >>> call = lambda state, x: bn.eval(params, state["norm"], x)
        >>> _, moments = jaxbn.capture_moments(call)({"norm": state}, jnp.array([[1.0], [3.0]]))
        >>> jaxbn.install_moments({"norm": state}, moments)["norm"].mean
        Array([2.], dtype=float32)
    """
    return _install.install_moments(PYTREE, state, moments)


def move_averages(
    state: Any,
    moments: Mapping[str, Moments],
    momentum: ArrayLike | Averaging | NormTransform[Any, Any] | None = None,
    *,
    samples: ArrayLike | None = None,
) -> Any:
    """Updates the running averages of all layers once, with moments that you computed: those of all micro-batches.

    :func:`jaxbn.linen.move_averages` says when to use it. Pure, and may be jitted. No gradient flows through the
    averages.

    Args:
        state: A pytree that holds states of methods, as it was before the step; it is not changed.
        moments: `Moments` by the path of the state. Averages are kept where the count is 0 or the moments are not
            finite.
        momentum: None: use the method of each layer, which the keys of `capture_moments` carry. For moments under plain
            strings: the weight of the OLD value or a `jaxbn.Averaging`, for layers of batch norm; or the transform of
            another method, for the moments of its layers only.
        samples: Number of examples in all micro-batches together; only `jaxbn.horizon` needs it.

    Returns:
        A new tree.

    Raises:
        ValueError: If a path does not lead to a state or the number of features differs; for a momentum that does not
            fit the method of a layer; or for None with a plain string as a key.

    Example:
        >>> bn = jaxbn.batch_norm(momentum=0.9)
        >>> params, state = bn.init(1)
        >>> capture = jaxbn.capture_moments(lambda state, x: bn.eval(params, state, x))
        >>> moments = [capture(state, x)[1] for x in jnp.array([[[1.0], [3.0]], [[11.0], [13.0]]])]
        >>> pooled = {path: jaxbn.merge(moments[0][path], moments[1][path]) for path in moments[0]}
        >>> print(f"{float(jaxbn.move_averages(state, pooled).var[0]):.2f}")  # 0.9 * 1 + 0.1 * 26
        3.50
    """
    return _install.move_averages(PYTREE, state, moments, momentum, samples)
