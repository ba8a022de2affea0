r"""How far batches lie apart, and the standard errors that follow for a mean and a variance estimated from all of them.

An estimate that averages over B batches of weights :math:`w_B`, :math:`\mu = \sum w_B \mu_B / \sum w_B` and
:math:`\sigma^2 = \sum w_B v_B / \sum w_B`, is a ratio of two sums over independent draws. Hence, for large B,

.. math:: SE(\mu)^2 = \frac{B}{B-1} \frac{\sum w_B^2 |\mu_B - \mu|^2}{(\sum w_B)^2}, \qquad
    SE(\sigma^2)^2 = \frac{B}{B-1} \frac{\sum w_B^2 (v_B - \sigma^2)^2}{(\sum w_B)^2}

(Cochran, Sampling Techniques, 3rd edition, 1977, section 2.11, the estimation of a ratio). Pooled values have
:math:`v_B = \sigma_B^2 + |\mu_B - \mu|^2`, in which the error of :math:`\mu` is of second order. About fixed k and s,

    z = (1, u, t);  u = mu_B - k;  t = sigma_B^2 + |u|^2 - s;  v_B - sigma^2 = (t - t_mean) - 2 d (u - d), d = mu - k

so that sum w z and sum w^2 z z^T are all that is kept, and another k and s are a linear map of them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._src.numerics.moments import Moments

# f32[P + 2, P, C] of a layer: the origin, which is the number of batches in which a channel was seen, k and s; sum w z;
# and the P rows of sum w^2 z z^T. P is 3, and 4 for complex means, whose u is two numbers. It is one array, since many
# small ones cost time in every batch.
Spread = jax.Array


class Errors(NamedTuple):
    """Standard errors of one layer, on the host; NaN where fewer than two batches were seen."""

    batches: np.ndarray  # f64[C]: in which the channel was seen
    mean: np.ndarray  # f64[C]: of the mean
    var: np.ndarray  # f64[C]: of the variance


def empty(like: Moments) -> Spread:
    """No batch seen yet, in the shapes and dtypes of `like`."""
    size = 4 if jnp.iscomplexobj(like.mean) else 3
    return jnp.zeros((size + 2, size, *like.m2.shape), like.m2.dtype)


def add(spread: Spread, batch: Moments, *, between: bool) -> Spread:
    """And one batch more.

    Args:
        spread: Of the batches before.
        batch: Its mean and variance, and as their count the weight of the batch.
        between: Whether the variance that is estimated holds that of the means of batches, as that of all values does.

    Returns:
        The spread of all of them.
    """
    mean = (batch.mean.real, batch.mean.imag) if jnp.iscomplexobj(batch.mean) else (batch.mean,)
    seen = (batch.count > 0).astype(batch.count.dtype)
    here = jnp.stack([seen, *mean, batch.var])
    old = spread[0]
    origin = jnp.where(old[:1] > 0, old, seen[None] * here)  # the first batch is where it begins
    z = batch.count[None] * _position(here - origin, between)
    counted = origin.at[0].set(old[0] + seen)
    return jnp.concatenate([jnp.stack([counted, spread[1] + z]), spread[2:] + z[:, None] * z[None]])


def merge(a: Spread, b: Spread, *, between: bool) -> Spread:
    """Of the batches of both, about the k and s of the first; either may be empty."""
    origin = jnp.where(a[0, :1] > 0, a[0], b[0])
    counted = origin.at[0].set(a[0, 0] + b[0, 0])
    return jnp.concatenate([counted[None], _about(a, origin, between) + _about(b, origin, between)])


def errors(spread: Spread, *, between: bool) -> Errors:
    """The standard errors, in float64.

    They say how far another pass over as many batches from the same source would differ. Not in them: what is wrong
    with the statistics of layers upstream, and what batches have in common that are not independent of each other, as
    neighbours in ordered data. A pass over all the data that there are has no error as to those.
    """
    kept = np.asarray(spread, np.float64)
    batches, first, second = kept[0, 0], kept[1], kept[2:]
    weight, ones = np.where(batches > 0, first[0], 1), second[0]
    center = first / weight  # (1, d, mean of t)
    centred = second - center[:, None] * ones[None] - ones[:, None] * center[None]
    centred += center[:, None] * center[None] * ones[0]
    slope = np.concatenate([np.zeros_like(ones[:1]), -2 * between * center[1:-1], np.ones_like(ones[:1])])
    scale = np.where(batches > 1, batches, np.nan) / np.maximum(batches - 1, 1) / np.square(weight)
    of_mean = np.trace(centred[1:-1, 1:-1])
    of_var = (slope[:, None] * slope[None] * centred).sum((0, 1))
    return Errors(batches, *(np.sqrt(scale * np.maximum(part, 0)) for part in (of_mean, of_var)))


def relative(found: Errors, mean: np.ndarray, var: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The errors of the mean in standard deviations, and of the variance relative to it; 0 in constant channels."""
    constant = is_constant(mean, var)
    scale = np.where(constant, 1, np.float64(var))
    return np.where(constant, 0, found.mean / np.sqrt(scale)), np.where(constant, 0, found.var / scale)


def is_constant(mean: np.ndarray, var: np.ndarray) -> np.ndarray:
    """Which channels are constant: their variance is no more than rounding makes of a constant."""
    return np.float64(var) <= rounding(mean)


def rounding(mean: np.ndarray) -> np.ndarray:
    """The variance that a constant of this value may come to by rounding, f64[C]; never 0."""
    info = np.finfo(np.float32)
    return np.square(8 * float(info.eps) * np.abs(mean).astype(np.float64)) + float(info.tiny)


def _position(offset: jax.Array, between: bool) -> jax.Array:
    """The z [P, C] of a mean and a variance that are so far from k and s; the first row of `offset` is not read."""
    u, t = offset[1:-1], offset[-1:]
    t = t + jnp.square(u).sum(0, keepdims=True) if between else t
    return jnp.concatenate([jnp.ones_like(t), u, t])


def _about(spread: Spread, origin: jax.Array, between: bool) -> jax.Array:
    """Both sums about another origin, [P + 1, P, C]: A first and A second A^T, where A maps z to the new one."""
    moved = _position(spread[0] - origin, between)  # where the old one lies
    size, first, second = len(moved), spread[1], spread[2:]
    eye = jnp.eye(size, dtype=moved.dtype).reshape(size, size, *(1,) * (moved.ndim - 1))
    a = jnp.broadcast_to(eye, second.shape).at[:, 0].set(moved).at[-1, 1:-1].set(2 * between * moved[1:-1])
    left = (a[:, :, None] * second[None]).sum(1)
    return jnp.concatenate([(a * first[None]).sum(1)[None], (left[:, None] * a[None]).sum(2)])
