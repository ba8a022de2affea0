r"""Estimators of the population statistics: they combine the moments of many batches into one mean and one variance.

Each consists of pure functions `(init, update, merge, finalize)` over a dict of `Moments` by layer: they create an
empty accumulator, add one batch, combine two accumulators, and compute the moments to install. A batch in which a layer
did not run, or was fully masked, does not count for that layer. If batches have equal weight, the accumulator also
provides standard errors.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbn._src.numerics import compensated as _compensated
from jaxbn._src.numerics.averages import INITIAL_MEAN, INITIAL_VAR, Averaging
from jaxbn._src.numerics.compensated import Accumulator
from jaxbn._src.numerics.moments import Moments, bessel
from jaxbn._src.statistics import standard_errors as _standard_errors
from jaxbn._src.statistics.standard_errors import Errors, Spread

Layers = dict[str, Moments]


class Estimator(NamedTuple):
    """How moments are accumulated. The first four functions are pure and can be jitted."""

    name: str
    init: Callable[[Layers], Any]  # moments of any batch, for their shapes -> an empty accumulator
    update: Callable[[Any, Layers], Any]  # accumulator, moments of one batch -> accumulator
    merge: Callable[[Any, Any], Any]  # two accumulators, in the order of their batches -> accumulator
    finalize: Callable[[Any], Layers]  # accumulator -> count, mean and m2 = count * var of the population
    # accumulator -> standard errors of mean and var, as NumPy arrays; None if later batches have a higher weight
    errors: Callable[[Any], dict[str, Errors]] | None = None
    # accumulator -> bool[*features] by layer: variances that are 0 because each had one value; None if not known
    single: Callable[[Any], dict[str, jax.Array]] | None = None


def check_estimator(estimator: Any) -> None:
    """Raises a TypeError if the argument is not an estimator."""
    if isinstance(estimator, Estimator):
        return
    fix = "Pass jaxbn.pooled(), jaxbn.mean_of_batches() or jaxbn.moving_average(decay=0.9)."
    if isinstance(estimator, Averaging):
        fix = f"It is an average for the `momentum` of a layer, over training steps. {fix}"
    raise TypeError(f"estimator={estimator!r} is not an estimator of population statistics. {fix}")


class _Pooled(NamedTuple):
    values: Accumulator
    spread: Spread


@functools.cache  # equal arguments return the same functions, so the compiled pass is reused
def pooled(*, unbiased: bool = False) -> Estimator:
    r"""The mean and variance of all values together: exact, however the values are divided into batches.

    With counts :math:`n_B`, :math:`\mu = \sum n_B \mu_B / n` and :math:`\sigma^2 = \sum n_B (\sigma_B^2 + (\mu_B -
    \mu)^2) / n`: the law of total variance. This is the default; use another one only to reproduce published numbers.

    Args:
        unbiased: Divide by n - 1 instead of n.

    Returns:
        An `Estimator`.

    Example:
        >>> estimator = jaxbn.pooled()
        >>> batches = [{"bn": jaxbn.batch_moments(jnp.array(v)[:, None])} for v in ([0.0, 2.0], [5.0])]
        >>> acc = estimator.init(batches[0])
        >>> for moments in batches:
        ...     acc = estimator.update(acc, moments)
        >>> found = estimator.finalize(acc)["bn"]
        >>> round(float(found.mean[0]), 4), round(float(found.var[0]), 4)
        (2.3333, 4.2222)

    References:
        Wu & Johnson, `Rethinking "Batch" in BatchNorm <https://arxiv.org/abs/2105.07576>`_, 2021, section 3.
    """

    def update(acc: _Pooled, moments: Moments) -> _Pooled:
        values = _compensated.merge(acc.values, _compensated.single(moments))
        # `between=True`: the pooled variance includes the variance of the batch means.
        return _Pooled(values, _standard_errors.add(acc.spread, moments, between=True))

    def merge(a: _Pooled, b: _Pooled) -> _Pooled:
        return _Pooled(_compensated.merge(a.values, b.values), _standard_errors.merge(a.spread, b.spread, between=True))

    def finalize(acc: _Pooled) -> Moments:
        moments = _compensated.total(acc.values)
        return moments._replace(m2=moments.m2 * bessel(moments.count)) if unbiased else moments

    return _per_layer(
        f"pooled{'(unbiased)' if unbiased else ''}",
        init=lambda like: _Pooled(_compensated.empty(like), _standard_errors.empty(like)),
        update=update,
        merge=merge,
        finalize=finalize,
        errors=lambda acc: _standard_errors.errors(acc.spread, between=True),
        single=lambda acc: is_single(_compensated.total(acc.values)),
    )


class _Means(NamedTuple):
    """Averages over batches: accumulators in which each batch is one value of weight 1."""

    values: Accumulator  # of the values themselves, for their count
    mean: Accumulator
    var: Accumulator
    spread: Spread  # of the batches, each with weight 1

    @classmethod
    def empty(cls, like: Moments) -> "_Means":
        values, value = _compensated.empty(like), _compensated.empty(like._replace(mean=like.m2))
        return cls(values, values, value, _standard_errors.empty(like))

    def merge(self, other: "_Means") -> "_Means":
        values, mean, var = (_compensated.merge(*pair) for pair in zip(self[:3], other[:3], strict=True))
        return _Means(values, mean, var, _standard_errors.merge(self.spread, other.spread, between=False))

    def total(self) -> Moments:
        count = _compensated.total(self.values).count
        return Moments(count, _compensated.total(self.mean).mean, count * _compensated.total(self.var).mean)

    def single(self) -> jax.Array:
        count, var = _compensated.total(self.values).count, _compensated.total(self.var)
        # As many values as batches means one value in each of them.
        return (count > 0) & (count <= var.count) & (var.mean == 0)


@functools.cache
def mean_of_batches(*, unbiased: bool = True) -> Estimator:
    r"""The mean of the batch means and the mean of the batch variances, with equal weight for every batch.

    It omits the variance of the batch means; `unbiased` corrects for this if the batches are independent and of equal
    size. The result is wrong for small batches and for batches sorted by class; use `pooled` there.

    Args:
        unbiased: Multiply each variance by m / (m - 1), where m is the number of values per channel in the batch.

    Returns:
        An `Estimator`.

    Example:
        >>> estimator = jaxbn.mean_of_batches(unbiased=False)
        >>> batches = [{"bn": jaxbn.batch_moments(jnp.array(v)[:, None])} for v in ([0.0, 2.0], [5.0])]
        >>> acc = estimator.init(batches[0])
        >>> for moments in batches:
        ...     acc = estimator.update(acc, moments)
        >>> found = estimator.finalize(acc)["bn"]
        >>> float(found.mean[0]), float(found.var[0])
        (3.0, 0.5)

    References:
        Ioffe & Szegedy, `Batch Normalization <https://arxiv.org/abs/1502.03167>`_, 2015, Algorithm 2, steps 8-12.
        Differs from the description that this estimator follows, which prints :math:`\frac{1}{n_B - 1} \sum_B
        \sigma_B^2` with :math:`n_B` the number of batches. We read it as the unbiased estimate of Algorithm 2,
        :math:`\frac{m}{m - 1} E_B[\sigma_B^2]`: as printed, a single batch would divide by zero, and the correction
        would not depend on the batch size, which causes the bias.
    """

    def as_one_value(moments: Moments) -> Moments:
        one = (moments.count > 0).astype(moments.count.dtype)
        var = moments.var * (bessel(moments.count) if unbiased else 1)
        return Moments(one, moments.mean, one * var)

    def update(acc: _Means, moments: Moments) -> _Means:
        batch, zero = as_one_value(moments), jnp.zeros_like(moments.m2)
        return _Means(
            _compensated.merge(acc.values, _compensated.single(moments)),
            _compensated.merge(acc.mean, _compensated.single(Moments(batch.count, batch.mean, zero))),
            _compensated.merge(acc.var, _compensated.single(Moments(batch.count, batch.var, zero))),
            _standard_errors.add(acc.spread, batch, between=False),
        )

    return _per_layer(
        f"mean_of_batches{'' if unbiased else '(biased)'}",
        init=_Means.empty,
        update=update,
        merge=_Means.merge,
        finalize=_Means.total,
        errors=lambda acc: _standard_errors.errors(acc.spread, between=False),
        single=_Means.single,
    )


_INITIAL_STD = INITIAL_VAR**0.5


class _Moving(NamedTuple):
    # f32[C]: values so far
    count: jax.Array  # type: ignore[assignment]  # hides tuple.count
    most: jax.Array  # the largest count of one batch
    kept: jax.Array  # decay^batches: the remaining weight of the initial values
    mean: jax.Array
    std: jax.Array

    @classmethod
    def empty(cls, like: Moments) -> "_Moving":
        real = jnp.zeros_like(like.m2)
        return cls(real, real, real + 1, jnp.full_like(like.mean, INITIAL_MEAN), real + _INITIAL_STD)

    def merge(self, later: "_Moving") -> "_Moving":
        # The later batches shrink the deviation of these from the initial values by `later.kept`.
        return _Moving(
            self.count + later.count,
            jnp.maximum(self.most, later.most),
            self.kept * later.kept,
            later.kept * (self.mean - INITIAL_MEAN) + later.mean,
            later.kept * (self.std - _INITIAL_STD) + later.std,
        )

    def single(self) -> jax.Array:
        return (self.count > 0) & (self.most <= 1)


@functools.cache
def moving_average(decay: float = 0.9, *, debias: bool = False) -> Estimator:
    r"""Moving average over batches of the mean, from 0, and of the standard deviation, from 1.

    It averages the standard deviation (without epsilon), not the variance, as in the description that it follows. Only
    the last 1 / (1 - decay) batches matter: use it to reproduce such numbers, and `pooled` otherwise. It has no
    standard errors, since more batches do not reduce them.

    Args:
        decay: Weight of the old value, in [0, 1).
        debias: Remove the remaining weight of the initial values, decay^batches.

    Returns:
        An `Estimator`. Its merge depends on the order of the two parts.

    Raises:
        ValueError: If `decay` is outside [0, 1).

    Example:
        >>> estimator = jaxbn.moving_average(0.9, debias=True)
        >>> batch = {"bn": jaxbn.batch_moments(jnp.array([[0.0], [2.0]]))}
        >>> found = estimator.finalize(estimator.update(estimator.init(batch), batch))["bn"]
        >>> round(float(found.mean[0]), 4), round(float(found.var[0]), 4)
        (1.0, 1.0)
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay={decay} is outside [0, 1): it is the weight of the old value, 0.9 by default.")

    def update(acc: _Moving, moments: Moments) -> _Moving:
        # A layer without values in this batch keeps its averages.
        a = jnp.where(moments.count > 0, decay, 1.0).astype(acc.kept.dtype)
        std = jnp.sqrt(moments.var)
        return _Moving(
            acc.count + moments.count,
            jnp.maximum(acc.most, moments.count),
            a * acc.kept,
            a * acc.mean + (1 - a) * moments.mean,
            a * acc.std + (1 - a) * std,
        )

    def finalize(acc: _Moving) -> Moments:
        mean, std = acc.mean, acc.std
        if debias:
            seen = jnp.where(acc.kept < 1, 1 - acc.kept, 1)
            mean, std = (mean - acc.kept * INITIAL_MEAN) / seen, (std - acc.kept * _INITIAL_STD) / seen
        return Moments(acc.count, mean, acc.count * jnp.square(std))

    name = f"moving_average({decay:g}{', debias' if debias else ''})"
    return _per_layer(
        name, init=_Moving.empty, update=update, merge=_Moving.merge, finalize=finalize, single=_Moving.single
    )


def is_single(moments: Moments) -> jax.Array:
    """Which variances are 0 because they were computed from one value."""
    return (moments.count > 0) & (moments.count <= 1) & (moments.m2 == 0)


def _per_layer(name: str, **functions: Callable[..., Any]) -> Estimator:
    """An estimator for all layers, built from the functions for one layer."""

    def over_layers(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *states: {path: function(*(state[path] for state in states)) for path in states[0]}

    return Estimator(name, **{key: over_layers(function) for key, function in functions.items()})
