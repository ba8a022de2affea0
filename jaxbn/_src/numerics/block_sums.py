"""Sums over the rows of each block of a batch, about a shift close to the values of the block."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn._src.numerics import axes as _axes
from jaxbn._src.numerics import barriers as _barriers
from jaxbn._src.numerics import collectives as _collectives
from jaxbn._src.numerics import dtypes as _dtypes
from jaxbn._src.numerics import exact_sums as _exact_sums
from jaxbn._src.numerics import shift as _shift


class Block(NamedTuple):
    """Moments of each block about its shift, [B, C]."""

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count
    shift: jax.Array  # k: any value near the data
    first: jax.Array  # s1: mean of x - k
    second: jax.Array  # s2: mean of |x - k|^2


def is_whole(x: jax.Array, axes: _axes.Axes) -> bool:
    """Whether x has rows and they form one block, so no merge is needed."""
    return x.size > 0 and axes.reduced != () and _collectives.count_blocks(x, axes.rows) == 1


def sum_in_blocks(axes: _axes.Axes, *values: jax.Array) -> jax.Array:
    """Sums of arrays of one shape over the rows of each block, stacked: [B, len(values), C]."""
    axes, values = _axes.with_rows(axes, *values)
    blocks = _collectives.count_blocks(values[0], axes.rows)
    sums = (_collectives.cut(v, axes.rows, blocks).sum(axes.reduced_in_blocks, keepdims=True) for v in values)
    return jnp.stack([_blocks_to_front(s, axes) for s in sums], 1)


@functools.partial(jax.jit, static_argnames=("axes", "fast"))  # one program even outside jit, as at init
def moments_of_whole(x: jax.Array, axes: _axes.Axes, fast: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Count, mean and m2 of a single block: the common case, with a shorter program."""
    values = math.prod(x.shape[a] for a in axes.reduced)
    shifted = functools.partial(_shifted_whole, axes=axes, fast=fast)
    if fast and _exact_sums.fits(x, axes.reduced, None):
        mean, m2 = _barriers.on_tpu(functools.partial(_exact_whole, axes=axes), shifted, x)
    else:
        mean, m2 = shifted(x)
    return jnp.full_like(m2, values), mean, m2


def _shifted_whole(x: jax.Array, axes: _axes.Axes, fast: bool) -> tuple[jax.Array, jax.Array]:
    dtype, values = _dtypes.compute(x), math.prod(x.shape[a] for a in axes.reduced)

    def mean(x: jax.Array) -> jax.Array:
        return x.astype(dtype).sum(axes.reduced) / math.prod(x.shape[a] for a in axes.reduced)

    near = _shift.first_samples(x, axes.rows, values) if fast else x
    shift = _shift.rounded(lax.stop_gradient(mean(near)))  # the result does not depend on it

    def centred(shift: jax.Array) -> jax.Array:
        return x.astype(dtype) - _axes.expand(shift, axes)

    first = mean(centred(shift))
    squares = abs_sq(centred(_barriers.barrier(shift, "cpu"))).sum(axes.reduced)
    return shift + first, jnp.maximum(squares - values * abs_sq(first), 0)


def _exact_whole(x: jax.Array, axes: _axes.Axes) -> tuple[jax.Array, jax.Array]:
    sums = _exact_sums.sums(axes.reduced, x)
    shift, first, second = (part.squeeze(axes.reduced) for part in sums)
    values = math.prod(x.shape[a] for a in axes.reduced)
    return shift + first, values * jnp.maximum(second - jnp.square(first), 0)


@functools.partial(jax.jit, static_argnames=("axes", "fast"))  # one program even outside jit, as at init
def block_means(axes: _axes.Axes, fast: bool, x: jax.Array, weights: jax.Array | None = None) -> Block:
    """Count, shift and means about the shift for each block of rows, [B, C]."""
    blocks, dtype = _collectives.count_blocks(x, axes.rows), _dtypes.compute(x)
    x = _collectives.cut(x, axes.rows, blocks)
    if weights is not None:
        weights = _collectives.cut(weights, axes.rows, blocks)
        # Before any arithmetic: masked values may be NaN.
        x = jnp.where(_axes.is_valid(weights), x, jnp.zeros((), x.dtype))

    def total(values: jax.Array) -> jax.Array:
        return values.sum(axes.reduced_in_blocks, keepdims=True)

    values = math.prod(x.shape[a] for a in axes.reduced_in_blocks)
    if weights is None:  # a static number: a float32 sum of ones stops at 2^24
        count = jnp.full_like(total(x), values, jnp.float32)
    else:
        count = total(_axes.on_each_value(weights, x))
    divisor = jnp.where(count > 0, count, 1)

    def shifted(x: jax.Array, weights: jax.Array | None) -> tuple[jax.Array, jax.Array, jax.Array]:
        def mean(values: jax.Array) -> jax.Array:
            weighted = values if weights is None else values * weights.astype(values.dtype)
            return total(weighted) / divisor.astype(values.dtype)

        near = _shift.first_samples(x, axes.rows + 1, values).astype(dtype) if one_read else None
        shift = mean(x.astype(dtype)) if near is None else near.mean(axes.reduced_in_blocks, keepdims=True)
        shift = _shift.rounded(lax.stop_gradient(shift))  # the result does not depend on it
        d = x.astype(dtype) - shift
        return shift, mean(d), mean(abs_sq(d))

    one_read = fast and weights is None and x.size
    if fast and _exact_sums.fits(x, axes.reduced_in_blocks, weights):
        parts = _barriers.on_tpu(functools.partial(_exact_sums.sums, axes.reduced_in_blocks), shifted, x, weights)
    else:
        parts = shifted(x, weights)
    return Block(*(_blocks_to_front(part, axes) for part in (count, *parts)))


def _blocks_to_front(sums: jax.Array, axes: _axes.Axes) -> jax.Array:
    """Moves sums per block, with reduced axes kept, from the layout of the cut array to [B, C]."""
    return jnp.moveaxis(sums.squeeze(axes.reduced_in_blocks), sum(a < axes.rows for a in axes.features), 0)


def abs_sq(values: jax.Array) -> jax.Array:
    return jnp.square(values.real) + jnp.square(values.imag) if jnp.iscomplexobj(values) else jnp.square(values)
