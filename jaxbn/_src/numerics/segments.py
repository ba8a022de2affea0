"""Moments of each domain of a batch: sums over segments of its rows, each about a shift of its own.

Which example belongs to which domain is given as `members`, bool[N, D]; an example that belongs to none counts for
nothing. Space is summed first, so that what is done for each domain is done on one value per example and channel.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn._src.numerics import axes as _axes
from jaxbn._src.numerics import collectives as _collectives
from jaxbn._src.numerics import dtypes as _dtypes
from jaxbn._src.numerics import explicit_meshes as _explicit_meshes
from jaxbn._src.numerics import moments as _moments
from jaxbn._src.numerics import shift as _shift


def domain_moments(
    x: jax.Array,
    *,
    members: jax.Array,
    mask: Any,
    axis: _axes.Axis,
    axis_name: _collectives.AxisName | None = None,
    axis_index_groups: _collectives.Groups | None = None,
) -> _moments.Moments:
    """Moments [D, C] over the rows of each domain, over devices, in one collective; as `batch_moments` otherwise."""
    axes, dtype = _axes.split(x.ndim, axis), _dtypes.compute(x)
    blocks, weights = _collectives.count_blocks(x, axes.rows), _axes.weights_like(mask, x)
    weights = jnp.ones((1,) * x.ndim, jnp.float32) if weights is None else weights
    x, weights, members = (_collectives.cut(array, 0, blocks) for array in (x, weights, members))
    x = jnp.where(weights > 0, x, jnp.zeros((), x.dtype)).astype(dtype)  # what is masked may be NaN
    count = _collect(axes, members, _explicit_meshes.on_values(jnp.ones_like(x, jnp.float32) * weights, x))
    divisor = jnp.where(count > 0, count, 1).astype(dtype)

    def mean(values: jax.Array) -> jax.Array:
        return _collect(axes, members, values * weights.astype(values.dtype)) / divisor.astype(values.dtype)

    shift = _shift.rounded(lax.stop_gradient(mean(x)))  # the result does not depend on it
    d = x - jnp.expand_dims(_select(members, shift[:, None]), axes.space_in_blocks)
    parts = count, shift, mean(d), mean(jnp.square(jnp.abs(d)) if jnp.iscomplexobj(d) else jnp.square(d))
    stacked = jnp.stack([part.astype(dtype) for part in parts], 1)
    return _moments.merge_stacked(_collectives.gather(stacked, axis_name, axis_index_groups))


def lay_out(stat: jax.Array, members: jax.Array, axes: _axes.Axes) -> jax.Array:
    """The row [C] of `stat` [D, C] of each example, laid out to broadcast against the input; 0 for those of none."""
    return jnp.expand_dims(_select(members, stat[None]), axes.reduced[1:])


def sum_in_blocks(axes: _axes.Axes, members: jax.Array, *values: jax.Array) -> jax.Array:
    """The sums of arrays of one shape over the rows of each block and domain, stacked: [B, len(values), D, C]."""
    blocks = _collectives.count_blocks(values[0], axes.rows)
    members = _collectives.cut(members, 0, blocks)
    return jnp.stack([_collect(axes, members, _collectives.cut(v, 0, blocks)) for v in values], 1)


def _collect(axes: _axes.Axes, members: jax.Array, values: jax.Array) -> jax.Array:
    """Sums over the rows of each domain, [B, D, C], of a cut array; NaN of one domain does not reach the others."""
    of_examples = values.sum(axes.space_in_blocks)[:, :, None]
    return jnp.where(_behind(members, of_examples.ndim), of_examples, 0).sum(1)


def _select(members: jax.Array, stat: jax.Array) -> jax.Array:
    """The row of `stat` [..., 1, D, C] of each example, [..., N, C]; a gather would not stay on its device."""
    return jnp.where(_behind(members, stat.ndim), stat, 0).sum(members.ndim - 1)


def _behind(members: jax.Array, ndim: int) -> jax.Array:
    return members.reshape(*members.shape, *(1,) * (ndim - members.ndim))
