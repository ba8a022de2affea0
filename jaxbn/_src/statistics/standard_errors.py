r"""The spread of batches, and the standard errors of a mean and a variance estimated from all of them.

An estimate that averages over B batches of weights :math:`w_B`, :math:`\mu = \sum w_B \mu_B / \sum w_B` and
:math:`\sigma^2 = \sum w_B v_B / \sum w_B`, is a ratio of two sums over independent draws. Hence, for large B,

.. math:: SE(\mu)^2 = \frac{B}{B-1} \frac{\sum w_B^2 |\mu_B - \mu|^2}{(\sum w_B)^2}, \qquad
    SE(\sigma^2)^2 = \frac{B}{B-1} \frac{\sum w_B^2 (v_B - \sigma^2)^2}{(\sum w_B)^2}

(Cochran, Sampling Techniques, 3rd edition, 1977, section 2.11, the estimation of a ratio). For pooled values
:math:`v_B = \sigma_B^2 + |\mu_B - \mu|^2`, where the error of :math:`\mu` is of second order. About fixed k and s,

    z = (1, u, t);  u = mu_B - k;  t = sigma_B^2 + |u|^2 - s;  v_B - sigma^2 = (t - t_mean) - 2 d (u - d), d = mu - k

so it suffices to keep sum w z and sum w^2 z z^T; to change k and s, apply a linear map to them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._src.numerics.moments import Moments

# f32[P + 2, P, C] of a layer: the origin, which holds the number of batches with values in a channel, k and s; sum w z;
# and the P rows of sum w^2 z z^T. P is 3, or 4 for complex means, where u has two parts. All are in one array, since
# many small arrays cost time in every batch.
Spread = jax.Array


class Errors(NamedTuple):
    """Standard errors of one layer, as NumPy arrays; NaN if there were fewer than two batches."""

    batches: np.ndarray  # f64[C]: number of batches with values in the channel
    mean: np.ndarray  # f64[C]: of the mean
    var: np.ndarray  # f64[C]: of the variance


def empty(like: Moments) -> Spread:
    """The spread of no batches, in the shapes and dtypes of `like`."""
    size = 4 if jnp.iscomplexobj(like.mean) else 3
    return jnp.zeros((size + 2, size, *like.m2.shape), like.m2.dtype)


def add(spread: Spread, batch: Moments, *, between: bool) -> Spread:
    """Adds one batch.

    Args:
        spread: The spread of the batches so far.
        batch: Mean and variance of the batch, and the weight of the batch as the count.
        between: Whether the estimated variance includes the variance of the batch means, as pooled values do.

    Returns:
        The spread of all batches.
    """
    mean = (batch.mean.real, batch.mean.imag) if jnp.iscomplexobj(batch.mean) else (batch.mean,)
    seen = (batch.count > 0).astype(batch.count.dtype)
    here = jnp.stack([seen, *mean, batch.var])
    old = spread[0]
    origin = jnp.where(old[:1] > 0, old, seen[None] * here)  # k and s are the mean and variance of the first batch
    z = batch.count[None] * _position(here - origin, between)
    counted = origin.at[0].set(old[0] + seen)
    return jnp.concatenate([jnp.stack([counted, spread[1] + z]), spread[2:] + z[:, None] * z[None]])


def merge(a: Spread, b: Spread, *, between: bool) -> Spread:
    """The spread of the batches of both, about the k and s of the first; either may be empty."""
    origin = jnp.where(a[0, :1] > 0, a[0], b[0])
    counted = origin.at[0].set(a[0, 0] + b[0, 0])
    return jnp.concatenate([counted[None], _about(a, origin, between) + _about(b, origin, between)])


def errors(spread: Spread, *, between: bool) -> Errors:
    """The standard errors, in float64.

    They estimate how much the result of another pass over as many batches from the same source would differ. They do
    not include errors in the statistics of earlier layers, nor dependence between batches, such as between neighbours
    in ordered data. A pass over the full data set has no sampling error.
    """
    kept = np.asarray(spread, np.float64)
    batches, first, second = kept[0, 0], kept[1], kept[2:]
    weight, ones = np.where(batches > 0, first[0], 1), second[0]
    center = first / weight  # (1, d, mean of t)
    # Centre sum w^2 z z^T about the weighted means, in float64, since the terms cancel.
    centred = second - center[:, None] * ones[None] - ones[:, None] * center[None]
    centred += center[:, None] * center[None] * ones[0]
    slope = np.concatenate([np.zeros_like(ones[:1]), -2 * between * center[1:-1], np.ones_like(ones[:1])])
    # Delta method: the derivative of v_B with respect to z.
    scale = np.where(batches > 1, batches, np.nan) / np.maximum(batches - 1, 1) / np.square(weight)
    of_mean = np.trace(centred[1:-1, 1:-1])
    of_var = (slope[:, None] * slope[None] * centred).sum((0, 1))
    return Errors(batches, *(np.sqrt(scale * np.maximum(part, 0)) for part in (of_mean, of_var)))


def relative(found: Errors, mean: np.ndarray, var: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The error of the mean in standard deviations, and of the variance as a fraction; 0 in constant channels."""
    constant = is_constant(mean, var)
    scale = np.where(constant, 1, np.float64(var))
    return np.where(constant, 0, found.mean / np.sqrt(scale)), np.where(constant, 0, found.var / scale)


def is_constant(mean: np.ndarray, var: np.ndarray) -> np.ndarray:
    """Which channels are constant: their variance is within the rounding error of a constant."""
    return np.float64(var) <= rounding(mean)


def rounding(mean: np.ndarray) -> np.ndarray:
    """The variance that rounding may give to a constant of this value, f64[C]; never 0."""
    info = np.finfo(np.float32)
    return np.square(8 * float(info.eps) * np.abs(mean).astype(np.float64)) + float(info.tiny)


def _position(offset: jax.Array, between: bool) -> jax.Array:
    """The z [P, C] of a mean and a variance at this offset from k and s; the first row of `offset` is not used."""
    u, t = offset[1:-1], offset[-1:]
    t = t + jnp.square(u).sum(0, keepdims=True) if between else t
    return jnp.concatenate([jnp.ones_like(t), u, t])


def _about(spread: Spread, origin: jax.Array, between: bool) -> jax.Array:
    """Both sums about another origin, [P + 1, P, C]: A first and A second A^T, where A maps old z to new z."""
    moved = _position(spread[0] - origin, between)  # the old origin, seen from the new one
    size, first, second = len(moved), spread[1], spread[2:]
    eye = jnp.eye(size, dtype=moved.dtype).reshape(size, size, *(1,) * (moved.ndim - 1))
    a = jnp.broadcast_to(eye, second.shape).at[:, 0].set(moved).at[-1, 1:-1].set(2 * between * moved[1:-1])
    left = (a[:, :, None] * second[None]).sum(1)
    return jnp.concatenate([(a * first[None]).sum(1)[None], (left[:, None] * a[None]).sum(2)])
