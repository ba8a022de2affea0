"""Sums of bfloat16 numbers and their squares that are exact, so that the variance needs no shift.

On a TPU, sums fuse into the convolution that computes x. A shift, which must be known first, would cost a second read.
A bfloat16 number has 8 significant bits and its square d^2 has 16: h, its first 8, and l, the rest. For numbers of
similar size (others cannot cancel), float32 adds 2^14 of each without error. With the sums S of d, H of h and L of l,
and n numbers, the moments about a shift c near S / n, which may now be chosen after the sums, are

    first = (S - n c) / n;   second = (H + L - 2 c S + n c^2) / n

c has 8 bits as well, so all products are exact if S and n are split in two parts, and the large terms cancel exactly.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn._src.numerics import axes as _axes
from jaxbn._src.numerics import collectives as _collectives
from jaxbn._src.numerics import shift as _shift

_EXACT = 2**14  # numbers in one sum; a power of two more would be exact only if no exponents differ
_FEWEST = 2**7  # in a piece of an axis that is too long for one sum; smaller pieces would be slow to merge

# Moments about a shift, with the reduced axes kept: the shift, and the means of x - shift and (x - shift)^2.
Sums = tuple[jax.Array, jax.Array, jax.Array]


def fits(x: jax.Array, reduced: Sequence[int], weights: jax.Array | None) -> bool:
    """Whether the moments of x over these axes can be computed from exact sums."""
    if x.dtype != jnp.bfloat16 or x.size == 0 or (weights is not None and weights.dtype != bool):
        return False
    # Sums over pieces of the rows do not fuse into the matrix product before the layer: they took 45 % more memory.
    if len(reduced) < 2:
        return False
    first, pieces = _first_inner(x.shape, reduced)
    return first != reduced[-1] or x.shape[first] // pieces >= min(x.shape[first], _FEWEST)


def sums(reduced: Sequence[int], x: jax.Array, valid: jax.Array | None = None) -> Sums:
    """The moments of x over the axes `reduced`, which are sorted; x fits, and is 0 where it is not valid."""
    first, pieces = _first_inner(x.shape, reduced)
    x = _collectives.cut(x, first, pieces)
    valid = None if valid is None else _collectives.cut(valid, first, pieces)
    outer = tuple(a for a in reduced if a <= first)
    inner = tuple(a + 1 for a in reduced if a >= first)
    shift, mean, square = (part.squeeze(first) for part in _merge(outer, *_of_pieces(x, valid, inner)))
    return shift, mean, square


def _first_inner(shape: Sequence[int], reduced: Sequence[int]) -> tuple[int, int]:
    """The first axis that one sum includes, and the number of pieces that this axis must be cut into."""
    values = 1
    for axis in reduced[:0:-1]:
        if values * shape[axis] > _EXACT:
            break
        values *= shape[axis]
    else:
        axis = reduced[0]
    least = -(-values * shape[axis] // _EXACT)
    return axis, next(pieces for pieces in range(least, shape[axis] + 1) if shape[axis] % pieces == 0)


def _of_pieces(x: jax.Array, valid: jax.Array | None, axes: tuple[int, ...]) -> tuple[jax.Array, ...]:
    """The count and, by the formula at the top, the moments about a shift."""
    d = x.astype(jnp.float32)
    ones = jnp.ones_like(d) if valid is None else _axes.on_each_value(valid, x)
    square = d * d
    high = _bits(square, 8)
    n, total, highs, lows = (values.sum(axes, keepdims=True) for values in (ones, d, high, square - high))
    some = jnp.where(n > 0, n, 1)
    c = lax.stop_gradient(_bits(total / some, 8))  # the result does not depend on it
    n_start, start = _bits(n, 8), _bits(total, 16)
    large = (highs - c * start) + (n_start * (c * c) - c * start)
    small = (lows + (n - n_start) * (c * c)) - 2 * (c * (total - start))
    return n, c, (total - n * c) / some, (large + small) / some


def _merge(axes: tuple[int, ...], count: jax.Array, shifts: jax.Array, first: jax.Array, second: jax.Array) -> Sums:
    """Merges the moments of pieces, relative to the mean of their shifts."""
    total = count.sum(axes, keepdims=True)
    weight = count / jnp.where(total > 0, total, 1)

    def mean(values: jax.Array) -> jax.Array:
        return (weight * values).sum(axes, keepdims=True)

    shift = _shift.rounded(mean(shifts))
    offset = (shifts - shift) + first
    within = jnp.maximum(second - jnp.square(first), 0)
    return shift, mean(offset), mean(within + jnp.square(offset))


def _bits(values: jax.Array, bits: int) -> jax.Array:
    """Rounds to so many significant bits."""
    return lax.reduce_precision(values, exponent_bits=8, mantissa_bits=bits - 1)
