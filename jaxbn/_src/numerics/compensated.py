"""Compensated sums of very many moments: each number is an unevaluated sum of two float32 values, hi + lo.

Adding 1e5 batches to plain float32 moments drifts by 1e-4. Here the rounding error of each addition is computed
(Knuth's two-sum, The Art of Computer Programming 2, 4.2.2, Theorem B) and carried in lo, which removes the drift.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxbn._src.numerics.moments import Moments


class Accumulator(NamedTuple):
    """Moments of all values so far, each number as hi + lo."""

    hi: Moments
    lo: Moments


def empty(like: Moments) -> Accumulator:
    """An empty accumulator with the shapes and dtypes of `like`."""
    zeros = jax.tree.map(jnp.zeros_like, like)
    return Accumulator(zeros, zeros)


def single(moments: Moments) -> Accumulator:
    """An accumulator of one part."""
    return Accumulator(moments, jax.tree.map(jnp.zeros_like, moments))


def merge(a: Accumulator, b: Accumulator) -> Accumulator:
    """The union of two disjoint sets of values, by Chan's update; either set may be empty."""
    n = a.hi.count + b.hi.count
    share = b.hi.count / jnp.where(n > 0, n, 1)
    delta = (b.hi.mean - a.hi.mean) + (b.lo.mean - a.lo.mean)
    between = (delta * delta.conj()).real * (a.hi.count * share)
    # `hi` is added by two-sum; `lo` and the small terms are below its last digit, so one plain sum of them is enough.
    m2 = _add(_add((a.hi.m2, a.lo.m2), b.hi.m2), b.lo.m2 + between)
    count = _add(_add((a.hi.count, a.lo.count), b.hi.count), b.lo.count)
    mean = _add((a.hi.mean, a.lo.mean), delta * share.astype(delta.dtype))
    return Accumulator(*(Moments(*part) for part in zip(count, mean, m2, strict=True)))


def total(acc: Accumulator) -> Moments:
    """The moments as plain float32, rounded once."""
    return jax.tree.map(jnp.add, acc.hi, acc.lo)


def _add(pair: tuple[jax.Array, jax.Array], x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(hi + lo) + x, as hi + lo with |lo| at most half a unit in the last place of hi."""
    hi, lo = pair
    s, error = _two_sum(hi, x)
    return _two_sum(s, lo + error)


def _two_sum(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The rounded sum and its rounding error, exactly: s + error = a + b."""
    s = a + b
    # No branch on |a| >= |b|, so this works for arrays.
    b_rounded = s - a
    return s, (a - (s - b_rounded)) + (b - b_rounded)
