r"""Evaluation with mixtures of the running statistics and the statistics of the input.

.. math:: \mu = (1 - b) \mu_s + b \mu_t, \qquad
          \sigma^2 = (1 - b) \sigma_s^2 + b \sigma_t^2 \;[\; + \, b (1 - b) (\mu_s - \mu_t)^2 \;]

where s denotes the running statistics and t those of the batch or of each single example. The last term appears if raw
moments, E[x] and E[x^2], are mixed, as in pooling values; it is absent if variances are mixed.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxbn._src.framework.called import CalledNorm, Operands
from jaxbn._src.methods.protocol import State
from jaxbn._src.numerics import axes as _axes
from jaxbn._src.numerics import collectives as _collectives
from jaxbn._src.numerics import dtypes as _dtypes
from jaxbn._src.numerics import explicit_meshes as _explicit_meshes
from jaxbn._src.numerics.moments import Moments
from jaxbn._src.numerics.normalize import statistics_of_input, without_padding

RULES = ("linear", "raw")


class Mixture(NamedTuple):
    """The weights of a mixture; static, and a mode of a capture."""

    prior_count: float | None  # number of examples that the running statistics count for
    example_weight: float | None  # weight of the statistics of each example
    rule: str


def make_mixture(prior_count: float | None, example_weight: float | None, rule: str | None) -> Mixture:
    """The mixture for these arguments of `adapt`; a ValueError for invalid ones."""
    if (prior_count is None) == (example_weight is None):
        raise ValueError(
            f"Give one of prior_count= and example_weight=, not {'neither' if prior_count is None else 'both'}: the "
            f"first mixes with the statistics of the batch, the second with those of each example by itself."
        )
    if prior_count is not None and not prior_count >= 0:
        raise ValueError(f"prior_count={prior_count} is a number of examples: 0 or more, or infinity.")
    if example_weight is not None and not 0 <= example_weight <= 1:
        raise ValueError(f"example_weight={example_weight} is outside [0, 1]: it is the weight of the example's own.")
    rule = ("raw" if prior_count is None else "linear") if rule is None else rule
    _check_rule(rule)
    return Mixture(
        None if prior_count is None else float(prior_count),
        None if example_weight is None else float(example_weight),
        rule,
    )


def mix(state: State, moments: Moments, weight: ArrayLike, *, rule: str = "linear") -> Moments:
    r"""Mixes the running statistics with the moments of a batch.

    For the pure functions of a method, `transform.postproc(state, jaxbn.mix(state, transform.measure(x), weight))` is a
    state to evaluate with. `jaxbn.linen.adapt` and `jaxbn.nnx.adapt` adapt whole models, and describe when to. The
    mixture is differentiable, but `eval` treats a state as a constant; in `adapt` gradients flow.

    Args:
        state: A state of any method, with `mean` and `var`.
        moments: `Moments` of the batch, in the shape of the statistics. Where the count is 0 they have no weight.
        weight: b, the share of the batch, in [0, 1]: a number, or one for each statistic. n / (N + n) for a batch of n
            examples and running statistics that count for N.
        rule: `"linear"` mixes variances, `"raw"` the raw moments, E[x] and E[x^2].

    Returns:
        `Moments` with the count of the batch.

    Raises:
        ValueError: If the rule is unknown.

    Example:
        >>> bn = jaxbn.batch_norm()
        >>> params, state = bn.init(1)  # mean 0, variance 1
        >>> batch = bn.measure(jnp.array([[3.0], [5.0]]))  # mean 4, variance 1
        >>> for rule in ("linear", "raw"):
        ...     mixed = jaxbn.mix(state, batch, 0.5, rule=rule)
        ...     print(float(mixed.mean[0]), float(mixed.var[0]))
        2.0 1.0
        2.0 5.0

    References:
        Schneider et al., `Improving robustness against common corruptions by covariate shift adaptation
        <https://arxiv.org/abs/2006.16971>`_, 2020 (linear; the variance of the batch is the biased one here); Summers &
        Dinneen, `Four Things Everyone Should Know to Improve Batch Normalization <https://arxiv.org/abs/1906.03548>`_,
        2020 (raw; mixed here about the means, where E[x^2] - E[x]^2 would lose the digits).
    """
    _check_rule(rule)
    dtype = moments.m2.dtype
    b = (moments.count > 0).astype(dtype) * jnp.asarray(weight, dtype)
    # On a mesh with Explicit axes, JAX combines arrays of equal sharding only.
    stored = _explicit_meshes.on_channels((state.mean, state.var), moments.m2, range(moments.m2.ndim))
    stored_mean, stored_var = stored[0].astype(moments.mean.dtype), stored[1].astype(dtype)

    def between(stored: jax.Array, found: jax.Array) -> jax.Array:  # values of weight 0 may be NaN
        share = b.astype(found.dtype)
        return jnp.where(b > 0, (1 - share) * stored + share * found, stored)

    var = between(stored_var, moments.var)
    if rule == "raw":
        distance = jnp.square(jnp.abs(stored_mean - moments.mean))
        var = var + jnp.where(b > 0, b * (1 - b) * distance, 0)
    return Moments(moments.count, between(stored_mean, moments.mean), moments.count * var)


def as_prior(running: State, moments: Moments) -> State:
    """The running statistics as constants, in dtypes that do not round the moments that are installed in them."""

    def widened(leaf: jax.Array) -> jax.Array:
        return lax.stop_gradient(leaf.astype(_dtypes.promote(leaf.dtype, moments.m2.dtype)))

    return jax.tree.map(widened, _explicit_meshes.on_channels(running, moments.m2, range(moments.m2.ndim)))


def normalize_mixed(mixture: Mixture, norm: CalledNorm, moments: Moments, operands: Operands) -> jax.Array:
    """Normalizes an input with the mixture; `moments` are those of the input on this device."""
    space = _check_input(mixture, norm, operands.x)
    operands = operands._replace(x=without_padding(operands.x, operands.mask))
    if mixture.prior_count is not None:
        moments = norm.over_devices(moments)
        # The count is that of the values per channel; the weight is defined by the number of examples.
        n = moments.count / space
        # Without examples the share is 0; the 1 avoids 0 / 0 if `prior_count` is 0 too.
        share = n / jnp.where(n > 0, n + mixture.prior_count, 1)
        return _normalize(norm, moments, share, mixture.rule, operands)

    assert mixture.example_weight is not None
    weight = mixture.example_weight

    def of_example(operands: Operands) -> jax.Array:
        # vmap removes the leading axis, but the functions of the method expect it: a batch of one example.
        one = jax.tree.map(lambda leaf: leaf[None], operands)
        own = norm.transform.measure(one.x, mask=one.mask, **one.where)
        return _normalize(norm, own, weight, mixture.rule, one)[0]

    x, mask, *others = operands
    weights = _axes.weights_like(mask, x)
    # vmap maps over the leading axis of the weights, so they need all examples there.
    weights = None if weights is None else jnp.broadcast_to(weights, x.shape)
    along = jax.tree.map(lambda leaf: _explicit_meshes.on_values(jnp.asarray(leaf), x), (weights, *others))
    return jax.vmap(of_example)(Operands(x, *along))


def _normalize(norm: CalledNorm, moments: Moments, weight: ArrayLike, rule: str, operands: Operands) -> jax.Array:
    """Normalizes with the mixture as the statistics, installed by the method."""
    running = as_prior(norm.running, moments)
    state = norm.transform.postproc(running, mix(running, moments, weight, rule=rule))
    with statistics_of_input(True):
        return norm.apply(state, operands)


def _check_input(mixture: Mixture, norm: CalledNorm, x: jax.Array) -> int:
    """The number of values per channel in an example; a ValueError if the statistics to mix would have no variance."""
    axes = _axes.split(x.ndim, norm.axis)
    if not axes.reduced or axes.reduced[0] != 0:
        raise ValueError(f"The leading axis of the input of {norm.path!r}, {x.shape}, does not hold examples.")
    space = math.prod(x.shape[a] for a in axes.reduced[1:])
    devices = _collectives.group_size(norm.bound_axis, norm.axis_index_groups)
    alone = mixture.example_weight is not None
    # If the input has weight 0, its variance of 0 does not matter.
    nothing_new = mixture.example_weight == 0 or mixture.prior_count == math.inf
    if space * (1 if alone else x.shape[0] * devices) == 1 and not nothing_new:
        raise ValueError(
            f"The input of {norm.path!r}, {x.shape}, has one value per channel in {'an example' if alone else 'all'}: "
            f"its variance is 0, and no statistics to mix. {'Use prior_count=' if alone else 'Use a larger batch'}, or "
            f"keep the running statistics of this layer with freeze_layers."
        )
    return space


def _check_rule(rule: str) -> None:
    if rule not in RULES:
        raise ValueError(f"rule={rule!r} is none of {', '.join(map(repr, RULES))}.")
