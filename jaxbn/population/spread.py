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

from jaxbn.core.moments import Moments


class Spread(NamedTuple):
    """What is kept of the batches in which a channel was seen. P is 3, and 4 for complex means, whose u is two."""

    batches: jax.Array  # f32[C]: how many there were
    shift: jax.Array  # f32[C]: k, the mean of the first; complex for complex values
    base: jax.Array  # f32[C]: s, the variance of the first
    first: jax.Array  # f32[P, C]: sum of w z
    second: jax.Array  # f32[P, P, C]: sum of w^2 z z^T


class Errors(NamedTuple):
    """Standard errors of one layer, on the host; NaN where fewer than two batches were seen."""

    batches: np.ndarray  # f64[C]: in which the channel was seen
    mean: np.ndarray  # f64[C]: of the mean
    var: np.ndarray  # f64[C]: of the variance


def empty(like: Moments) -> Spread:
    """No batch seen yet, in the shapes and dtypes of `like`."""
    zeros, size = jnp.zeros_like(like.m2), 4 if jnp.iscomplexobj(like.mean) else 3
    first, second = (jnp.zeros((*lead, *zeros.shape), zeros.dtype) for lead in ((size,), (size, size)))
    return Spread(zeros, jnp.zeros_like(like.mean), zeros, first, second)


def add(spread: Spread, batch: Moments, *, between: bool) -> Spread:
    """And one batch more.

    Args:
        spread: Of the batches before.
        batch: Its mean and variance, and as their count the weight of the batch.
        between: Whether the variance that is estimated holds that of the means of batches, as that of all values does.

    Returns:
        The spread of all of them.
    """
    seen = batch.count > 0
    begins = seen & (spread.batches == 0)
    shift = jnp.where(begins, batch.mean, spread.shift)
    base = jnp.where(begins, batch.var, spread.base)
    z = batch.count[None] * _position(batch.mean - shift, batch.var - base, between)
    batches = spread.batches + seen.astype(spread.batches.dtype)
    return Spread(batches, shift, base, spread.first + z, spread.second + z[:, None] * z[None])


def merge(a: Spread, b: Spread, *, between: bool) -> Spread:
    """Of the batches of both, about the k and s of the first; either may be empty."""
    shift, base = (jnp.where(a.batches > 0, *pair) for pair in ((a.shift, b.shift), (a.base, b.base)))
    sums = zip(*(_about(spread, shift, base, between) for spread in (a, b)), strict=True)
    return Spread(a.batches + b.batches, shift, base, *(one + other for one, other in sums))


def errors(spread: Spread, *, between: bool) -> Errors:
    """The standard errors, in float64.

    They say how far another pass over as many batches from the same source would differ. Not in them: what is wrong
    with the statistics of layers upstream, and what batches have in common that are not independent of each other, as
    neighbours in ordered data. A pass over all the data that there are has no error as to those.
    """
    batches, first, second = (np.asarray(part, np.float64) for part in (spread.batches, spread.first, spread.second))
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


def _position(offset: jax.Array, var: jax.Array, between: bool) -> jax.Array:
    """The z of a mean and a variance that are so far from k and s, [P, C]."""
    parts = (offset.real, offset.imag) if jnp.iscomplexobj(offset) else (offset,)
    for part in parts if between else ():
        var = var + jnp.square(part)
    return jnp.stack([jnp.ones_like(var), *parts, var])


def _about(spread: Spread, shift: jax.Array, base: jax.Array, between: bool) -> tuple[jax.Array, jax.Array]:
    """Both sums about another k and s: A first and A second A^T, where A maps z to that of the new origin."""
    origin = _position(spread.shift - shift, spread.base - base, between)  # where the old one lies
    size = len(origin)
    eye = jnp.eye(size, dtype=origin.dtype).reshape(size, size, *(1,) * shift.ndim)
    a = jnp.broadcast_to(eye, spread.second.shape).at[:, 0].set(origin).at[-1, 1:-1].set(2 * between * origin[1:-1])
    left = (a[:, :, None] * spread.second[None]).sum(1)
    return (a * spread.first[None]).sum(1), (left[:, None] * a[None]).sum(2)
