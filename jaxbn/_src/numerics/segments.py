"""Moments of each domain of a batch: segment sums over the rows, each about its own shift.

`members`, bool[N, D], says which example belongs to which domain; an example without a domain has no influence. The
spatial axes are summed first, so that the work per domain is one value per example and channel.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn._src.numerics import axes as _axes
from jaxbn._src.numerics import collectives as _collectives
from jaxbn._src.numerics import dtypes as _dtypes
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
    """Moments [D, C] over the rows of each domain and over devices; otherwise `batch_moments`."""
    axes, dtype = _axes.split(x.ndim, axis), _dtypes.compute(x)
    blocks, weights = _collectives.count_blocks(x, axes.rows), _axes.weights_like(mask, x)
    weights = jnp.ones((1,) * x.ndim, jnp.float32) if weights is None else weights
    # One block per device, so that all sums before the gather are local.
    x, weights, members = (_collectives.cut(array, 0, blocks) for array in (x, weights, members))
    x = jnp.where(_axes.is_valid(weights), x, jnp.zeros((), x.dtype)).astype(dtype)  # masked values may be NaN
    count = _collect(axes, members, _axes.on_each_value(weights, x))
    divisor = jnp.where(count > 0, count, 1).astype(dtype)

    def mean(values: jax.Array) -> jax.Array:
        return _collect(axes, members, values * weights.astype(values.dtype)) / divisor.astype(values.dtype)

    shift = _shift.rounded(lax.stop_gradient(mean(x)))  # the result does not depend on it
    d = x - jnp.expand_dims(_select(members, shift[:, None]), axes.space_in_blocks)
    parts = count, shift, mean(d), mean(jnp.square(jnp.abs(d)) if jnp.iscomplexobj(d) else jnp.square(d))
    stacked = jnp.stack([part.astype(dtype) for part in parts], 1)
    return _moments.merge_devices(stacked, axis_name, axis_index_groups)


def lay_out(stat: jax.Array, members: jax.Array, axes: _axes.Axes) -> jax.Array:
    """For each example its row [C] of `stat` [D, C], broadcastable to the input; 0 for examples without a domain."""
    return jnp.expand_dims(_select(members, stat[None]), axes.reduced[1:])


def sum_in_blocks(axes: _axes.Axes, members: jax.Array, *values: jax.Array) -> jax.Array:
    """Sums of arrays of one shape over the rows of each block and domain, stacked: [B, len(values), D, C]."""
    blocks = _collectives.count_blocks(values[0], axes.rows)
    members = _collectives.cut(members, 0, blocks)
    return jnp.stack([_collect(axes, members, _collectives.cut(v, 0, blocks)) for v in values], 1)


def _collect(axes: _axes.Axes, members: jax.Array, values: jax.Array) -> jax.Array:
    """Sums a cut array over the rows of each domain, to [B, D, C]; NaN in one domain does not reach the others."""
    of_examples = values.sum(axes.space_in_blocks)[:, :, None]
    # Select instead of multiply: 0 * NaN would spread a NaN to every domain.
    return jnp.where(_behind(members, of_examples.ndim), of_examples, 0).sum(1)


def _select(members: jax.Array, stat: jax.Array) -> jax.Array:
    """For each example its row of `stat` [..., 1, D, C], as [..., N, C]; a gather would not stay on the device."""
    return jnp.where(_behind(members, stat.ndim), stat, 0).sum(members.ndim - 1)


def _behind(members: jax.Array, ndim: int) -> jax.Array:
    return members.reshape(*members.shape, *(1,) * (ndim - members.ndim))
