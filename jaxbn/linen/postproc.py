"""Population statistics for any linen model: the pass, and the write-back for those who run their own loop."""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import flax

from jaxbn.core.moments import Moments
from jaxbn.linen.capture import Call, capture, find_states, keys
from jaxbn.linen.modules import STATISTICS
from jaxbn.methods.batch_norm import batch_norm
from jaxbn.population.estimate import estimate
from jaxbn.population.estimators import Estimator, pooled
from jaxbn.population.layers import Measured, moments_for
from jaxbn.population.report import Report, report


def postproc(
    call: Call,
    variables: Any,
    batches: Iterable[Any],
    *,
    estimator: Estimator = pooled(),  # noqa: B008  a constant: pure functions, made once
    progress: bool | None = None,
) -> tuple[dict[str, Any], Report]:
    """Estimates the population statistics of every normalization layer, with the parameters fixed.

    Run it when training is over, or before an evaluation; after averaging weights (SWA, EMA); or on the data of another
    domain (AdaBN). Every layer normalizes with the statistics of its batch while they are collected, so use batches of
    the size that the network was trained with.

    Args:
        call: Runs the model, for one `lambda variables, batch: net.apply(variables, batch["image"], train=False)`.
            Whatever flags it passes, layers use their batch's statistics, dropout may be off, and nothing needs to be
            mutable. Pass the same function object again and it is not compiled again; what is compiled for a new one
            each time is kept.
        variables: All variables of the model; they are left untouched.
        batches: Any iterable of batches, pytrees of arrays. Sizes may differ: every value counts once.
        estimator: `jaxbn.pooled()`, `jaxbn.mean_of_batches()` or `jaxbn.moving_average()`.
        progress: Show a progress bar. None: if this is a terminal.

    Returns:
        New variables, in which only statistics differ, and a `Report` of what changed in which layer. Layers that no
        batch went through keep their statistics.

    Raises:
        ValueError: If there is no batch, no normalization layer, none was reached, or a batch gave NaN.

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
    old = find_states(variables)
    done, moments = estimate(_measure(call), variables, batches, estimator=estimator, progress=progress)
    new_variables = install_moments(variables, moments)
    return new_variables, report(estimator.name, done, moments, old, find_states(new_variables))


def install_moments(variables: Any, moments: Mapping[str, Moments]) -> dict[str, Any]:
    """Writes moments into the statistics of their layers; the variables given are left untouched.

    Args:
        variables: All variables of the model.
        moments: `Moments` by layer path, as `capture_moments` and the estimators give them. Where the count is 0 the
            statistics stay.

    Returns:
        New variables.

    Raises:
        ValueError: If a path is not that of a normalization layer, or the features of a layer differ.

    Example:
        >>> net = jaxbn.linen.BatchNorm(use_running_average=True)
        >>> data = jnp.array([[1.0], [3.0]])
        >>> variables = net.init(jax.random.key(0), data)
        >>> _, moments = jaxbn.linen.capture_moments(net.apply)(variables, data)
        >>> jaxbn.linen.install_moments(variables, moments)["batch_stats"]["mean"]
        Array([2.], dtype=float32)
    """
    variables = flax.core.unfreeze(variables)
    states = find_states(variables)
    flat = flax.traverse_util.flatten_dict(variables[STATISTICS])
    for path in moments:
        found = moments_for(path, moments, states)
        for name, leaf in batch_norm().postproc(states[path], found)._asdict().items():
            if leaf is not None:
                key = (*keys(path), name)
                flat[key] = flax.core.meta.replace_boxed(flat[key], leaf)
    return variables | {STATISTICS: flax.traverse_util.unflatten_dict(flat)}


@functools.lru_cache(maxsize=16)  # the same call gives the same function, and so the same compiled step
def _measure(call: Call) -> Any:
    captured = capture(call, mode="batch")

    def measure(variables: Any, batch: Any) -> Measured:
        return captured(variables, batch)[1]

    return measure
