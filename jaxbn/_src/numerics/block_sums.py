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
from jaxbn._src.numerics import explicit_meshes as _explicit_meshes
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
    dtype, values = _dtypes.compute(x), math.prod(x.shape[a] for a in axes.reduced)

    def mean(x: jax.Array) -> jax.Array:
        return x.astype(dtype).sum(axes.reduced) / math.prod(x.shape[a] for a in axes.reduced)

    near = _shift.first_samples(x, axes.rows, values) if fast else x
    shift = _shift.rounded(lax.stop_gradient(mean(near)))  # the result does not depend on it

    def centred(shift: jax.Array) -> jax.Array:
        return x.astype(dtype) - _axes.expand(shift, axes)

    first = mean(centred(shift))
    squares = abs_sq(centred(_barriers.barrier(shift, "cpu"))).sum(axes.reduced)
    m2 = jnp.maximum(squares - values * abs_sq(first), 0)
    return jnp.full_like(m2, values), shift + first, m2


@functools.partial(jax.jit, static_argnames=("axes", "fast"))  # one program even outside jit, as at init
def block_means(axes: _axes.Axes, fast: bool, x: jax.Array, weights: jax.Array | None = None) -> Block:
    """Count, shift and means about the shift for each block of rows, [B, C]."""
    blocks, dtype = _collectives.count_blocks(x, axes.rows), _dtypes.compute(x)
    x = _collectives.cut(x, axes.rows, blocks)
    if weights is not None:
        weights = _collectives.cut(weights, axes.rows, blocks)
        x = jnp.where(weights > 0, x, jnp.zeros((), x.dtype))  # before any arithmetic: masked values may be NaN

    def total(values: jax.Array) -> jax.Array:
        return values.sum(axes.reduced_in_blocks, keepdims=True)

    values = math.prod(x.shape[a] for a in axes.reduced_in_blocks)
    if weights is None:  # a static number: a float32 sum of ones stops at 2^24
        count = jnp.full_like(total(x), values, jnp.float32)
    else:
        count = total(_explicit_meshes.on_values(jnp.ones_like(x, jnp.float32) * weights, x))
    divisor = jnp.where(count > 0, count, 1)

    def mean(values: jax.Array) -> jax.Array:
        weighted = values if weights is None else values * weights.astype(values.dtype)
        return total(weighted) / divisor.astype(values.dtype)

    one_read = fast and weights is None and x.size
    near = _shift.first_samples(x, axes.rows + 1, values).astype(dtype) if one_read else None
    shift = mean(x.astype(dtype)) if near is None else near.mean(axes.reduced_in_blocks, keepdims=True)
    shift = _shift.rounded(lax.stop_gradient(shift))  # the result does not depend on it
    d = x.astype(dtype) - shift
    return Block(*(_blocks_to_front(part, axes) for part in (count, shift, mean(d), mean(abs_sq(d)))))


def _blocks_to_front(sums: jax.Array, axes: _axes.Axes) -> jax.Array:
    """Moves sums per block, with reduced axes kept, from the layout of the cut array to [B, C]."""
    return jnp.moveaxis(sums.squeeze(axes.reduced_in_blocks), sum(a < axes.rows for a in axes.features), 0)


def abs_sq(values: jax.Array) -> jax.Array:
    return jnp.square(values.real) + jnp.square(values.imag) if jnp.iscomplexobj(values) else jnp.square(values)
