"""Population statistics for any linen model: the pass, and the write-back for those who run their own loop."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import flax
from jax.sharding import Mesh
from jax.typing import ArrayLike

from jaxbn._src.framework.layer_paths import averaging_method, method_at
from jaxbn._src.framework.layers import Measured, Weights
from jaxbn._src.framework.method import state_of
from jaxbn._src.framework.processes import check_unstacked
from jaxbn._src.framework.program_cache import Recipe
from jaxbn._src.framework.registry import REGISTRY
from jaxbn._src.linen.capture import Call, capture
from jaxbn._src.linen.modules import STATISTICS
from jaxbn._src.linen.variables import check_variables, find_states, keys
from jaxbn._src.methods.protocol import NormTransform, State
from jaxbn._src.numerics.averages import Averaging
from jaxbn._src.numerics.moments import Moments
from jaxbn._src.statistics import statistics_pass as _statistics_pass
from jaxbn._src.statistics.estimators import Estimator, pooled
from jaxbn._src.statistics.install import checked, installable
from jaxbn._src.statistics.pass_report import Report
from jaxbn._src.statistics.sweep import Measure


def postproc(
    call: Call,
    variables: Any,
    batches: Iterable[Any] | Callable[[], Iterator[Any]],
    *,
    estimator: Estimator = pooled(),  # noqa: B008  a constant: pure functions, made once
    consistent: bool = False,
    tolerance: float = 1e-5,
    max_sweeps: int | None = None,
    stop_when: float | None = None,
    weights: Weights | None = None,
    skip_nonfinite: bool = False,
    mesh: Mesh | None = None,
    progress: bool | None = None,
) -> tuple[dict[str, Any], Report]:
    """Estimates the population statistics of every normalization layer, with the parameters fixed.

    Run it when training is over, or before an evaluation; after averaging weights (SWA, EMA); or on the data of another
    domain (AdaBN). Every layer normalizes with the statistics of its batch while they are collected, so use batches of
    the size that the network was trained with.

    Args:
        call: Runs the model, for one `lambda variables, batch: net.apply(variables, batch["image"], train=False)`.
            Whatever flags it passes, layers use their batch's statistics, dropout may be off, and nothing needs to be
            mutable. Pass the same function object again and it is not compiled again; what it closes over is not kept
            in memory after you drop it.
        variables: All variables of the model; they are left untouched. What is spread over processes stays so for
            global batches. For batches of a process's own it is gathered, for which each needs the memory of a replica,
            and comes back as it was spread.
        batches: Any iterable of batches, pytrees of arrays, or a function that returns an iterator. Sizes may differ:
            every value counts once. Several processes give global arrays over the devices of all of them, as
            `jax.make_array_from_process_local_data` makes them, all equally many; or each gives its own batches, none
            or any number of them.
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
        New variables, in which only statistics differ, and a `Report` of what changed in which layer. Layers that no
        batch went through keep their statistics.

    Raises:
        ValueError: If there is no batch, no normalization layer, none was reached, or a batch gave NaN; for variables
            out of `pmap`, with a leading axis of devices; if a variance would be of one value per channel, unless the
            layer has `allow_single_value=True`; for `stop_when` and an estimator without standard errors, which
            `jaxbn.moving_average` is.
        TypeError: If `consistent` is given an iterator that can be read only once.
        RuntimeError: If another process failed, or has other global batches than this one, or batches of its own where
            this one has global ones; the error of the process itself is raised as it is.

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
    check_variables(variables)
    return _statistics_pass.postproc(
        _statistics_pass.Host(
            measure=lambda mode: Recipe(_measure, (call, weights), (mode,)),
            arrays=lambda variables: variables,
            with_arrays=lambda _, variables: variables,
            states=find_states,
            install=install_moments,
        ),
        flax.core.unfreeze(variables),
        batches,
        _statistics_pass.Options(
            estimator, consistent, tolerance, max_sweeps, stop_when, skip_nonfinite, mesh=mesh, progress=progress
        ),
    )


def install_moments(variables: Any, moments: Mapping[str, Moments]) -> dict[str, Any]:
    """Writes moments into the statistics of their layers; the variables given are left untouched.

    The layers of jaxbn take what is installed as constants. To differentiate through statistics, normalize with them by
    `capture_moments(mode="batch")` or by `adapt`.

    Args:
        variables: All variables of the model.
        moments: `Moments` by layer path, as `capture_moments` and the estimators give them. Where the count is 0 the
            statistics stay, and inside `jit` where they are not finite. The keys of `capture_moments` are paths that
            know the method of the layer, by which they are installed. Under plain strings the names of the statistics
            tell, but for methods of your own: those that have the statistics of batch norm are taken for it, and others
            are an error.

    Returns:
        New variables.

    Raises:
        ValueError: If a path is not that of a normalization layer, the features of a layer differ, moments are not
            finite in the dtype of the statistics or of one value per channel, or it is not known by which method to
            install.

    Example:
        >>> net = jaxbn.linen.BatchNorm(use_running_average=True)
        >>> data = jnp.array([[1.0], [3.0]])
        >>> variables = net.init(jax.random.key(0), data)
        >>> _, moments = jaxbn.linen.capture_moments(net.apply)(variables, data)
        >>> jaxbn.linen.install_moments(variables, moments)["batch_stats"]["mean"]
        Array([2.], dtype=float32)
    """
    check_unstacked(variables)
    given, states = installable(moments, find_states(variables)), {}
    for path, found in given.items():
        statistics = statistics_at(variables, path)
        transform = method_at(path, statistics)
        states[path] = transform.postproc(state_of(transform, statistics), found)
    return with_states(variables, states)


def move_averages(
    variables: Any,
    moments: Mapping[str, Moments],
    momentum: ArrayLike | Averaging | NormTransform | None = None,
    *,
    samples: ArrayLike | None = None,
) -> dict[str, Any]:
    """Moves the running averages once, by moments of your own: of all the micro-batches of one optimizer step.

    In a loop over micro-batches the layers would move them once for each, by its variance alone. Take the moments with
    `capture_moments(call, mode="as_called")` instead, put them together, with `jaxbn.merge` or, if the loop is inside
    `call`, not at all, for all marks of a call are pooled; across devices with `jaxbn.merge_over`. Pure; may be jitted.
    No gradient flows through the averages.

    Args:
        variables: All variables of the model, as they were before the step.
        moments: `Moments` by layer path. Where the count is 0, or they are not finite, the averages stay.
        momentum: None: each layer averages as its method and its momentum say, which the keys of the moments of
            `capture_moments` know; layers of `momentum=None` stay. For moments under plain strings: the weight of the
            OLD value, or a `jaxbn.Averaging`, of layers of batch norm; or the transform of another method, such as
            `jaxbn.batch_renorm()`, for the moments of its layers alone.
        samples: Examples in all micro-batches together; needed for `jaxbn.horizon` alone.

    Returns:
        New variables.

    Raises:
        ValueError: If a path is not that of a normalization layer, or the features of a layer differ; for a momentum
            that does not fit the statistics or the method of a layer; or for None and a plain string as a key.

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
    given, states = checked(moments, find_states(variables)), {}
    for path, found in given.items():
        statistics = statistics_at(variables, path)
        transform = averaging_method(path, statistics, momentum)
        if transform.update is not None:
            states[path] = transform.update(state_of(transform, statistics), found, samples)
    return with_states(variables, states)


def statistics_at(variables: Any, path: str) -> dict[str, Any]:
    """The statistics of a layer, by the names that they have in Flax's."""
    flat = flax.traverse_util.flatten_dict(flax.core.unfreeze(variables[STATISTICS]))
    held = {key[-1]: flax.core.meta.unbox(leaf) for key, leaf in flat.items() if key[:-1] == keys(path)}
    names = {own: name for name, own in REGISTRY.names_in(held).items()}
    return {names.get(own, own): leaf for own, leaf in held.items()}


def with_states(variables: Any, states: Mapping[str, State]) -> dict[str, Any]:
    variables = flax.core.unfreeze(variables)
    flat = flax.traverse_util.flatten_dict(variables[STATISTICS])
    for path, state in states.items():
        names = REGISTRY.names_in([key[-1] for key in flat if key[:-1] == keys(path)])
        for name, leaf in state._asdict().items():
            if leaf is not None:
                key = (*keys(path), names.get(name, name))
                flat[key] = flax.core.meta.replace_boxed(flat[key], leaf)
    return variables | {STATISTICS: flax.traverse_util.unflatten_dict(flat)}


def _measure(call: Call, weights: Weights | None, mode: str) -> Measure:
    captured = capture(call, mode=mode, weights=weights)

    def measure(variables: Any, batch: Any) -> Measured:
        return captured(variables, batch)[1]

    return measure
