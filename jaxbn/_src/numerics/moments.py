"""Moments of a batch: count, mean and sum of squared deviations, exact for every division into blocks and devices.

Everything here is a weighted sum that carries its count. A batch is cut into blocks, each block is summed about a shift
close to its own values, and the blocks of all devices are merged at once:

    d = x - k_b;  s1, s2 = mean d, mean d^2                          in block b, of weight w_b = n_b / n
    e_b = (k_b - k_0) + s1_b;  mean = k_0 + sum w_b e_b;  var = sum w_b (s2_b - s1_b^2 + (e_b - sum w e)^2)

E[x^2] - E[x]^2 loses all digits of the variance once mean / std reaches 1e3; about a shift near the data no digits are
lost (Chan, Golub & LeVeque, Algorithms for Computing the Sample Variance, 1983). The shift comes from the batch, so it
needs no state and is right from the first step on.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxbn._src.numerics import axes as _axes
from jaxbn._src.numerics import barriers as _barriers
from jaxbn._src.numerics import collectives as _collectives
from jaxbn._src.numerics import dtypes as _dtypes
from jaxbn._src.numerics import explicit_meshes as _explicit_meshes
from jaxbn._src.numerics import shift as _shift


class Moments(NamedTuple):
    """Count, mean and sum of squared deviations from the mean of weighted values, per channel.

    All three have the shape of the features, so a mask may differ between channels. A count of 0 means that there were
    no values; mean and m2 are then 0. Combine moments of parts with :func:`merge` and :func:`pool`.

    Example:
        >>> m = jaxbn.batch_moments(jnp.array([[1.0], [3.0]]))
        >>> [float(v[0]) for v in m]
        [2.0, 2.0, 2.0]
    """

    # f32[C]: sum of the weights
    count: jax.Array  # type: ignore[assignment]  # hides tuple.count
    mean: jax.Array  # f32[C]; complex for complex values
    m2: jax.Array  # f32[C]: sum of weight * |x - mean|^2

    @property
    def var(self) -> jax.Array:
        """The biased variance m2 / count, f32[C]; 0 where the count is 0."""
        return self.m2 / jnp.maximum(self.count, jnp.finfo(self.count.dtype).tiny)


class _Block(NamedTuple):
    """Moments of each block about its shift, [B, C]."""

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count
    shift: jax.Array  # k: any value near the data
    first: jax.Array  # s1: mean of x - k
    second: jax.Array  # s2: mean of |x - k|^2


def batch_moments(
    x: ArrayLike,
    *,
    axis: _axes.Axis = -1,
    mask: ArrayLike | None = None,
    axis_name: _collectives.AxisName | None = None,
    axis_index_groups: _collectives.Groups | None = None,
    use_fast_variance: bool = True,
) -> Moments:
    """Moments of one batch over all axes except the features, and over devices.

    The result does not depend on how the rows are sharded; sharded rows cost one all-gather. Arrays that are sharded
    under `jit` need no argument; under `shard_map`, `pmap` and `vmap` pass `axis_name`.

    Args:
        x: Values `[..., C]`, of any dtype; half precision and integers are summed in float32.
        axis: Feature axis, or several; the rest is reduced.
        mask: Booleans or real weights of the values, broadcastable to `x`. Values of weight 0 have no influence, even
            if they are NaN.
        axis_name: Axis or axes of the surrounding `shard_map`, `pmap` or `vmap` to reduce over.
        axis_index_groups: Groups of devices along `axis_name` that are reduced separately.
        use_fast_variance: Shift by the mean of the first sample of a block (or as many samples as give 16 values),
            which reads `x` once. False shifts by the mean of the block, which reads `x` twice; so do masks, since the
            first sample may be padding. The results differ by about 1e-7 k^2 if the first samples are k standard
            deviations from the rest, which matters only for k in the hundreds.

    Returns:
        `Moments` in float32 (float64 and complex stay), each in the shape of the features.

    Raises:
        ValueError: If `axis` does not fit `x`, the mask does not broadcast, or the groups are invalid.
        TypeError: If the mask is complex.

    Example:
        >>> x = 1e4 + jnp.array([[-0.125], [0.125]])
        >>> jaxbn.batch_moments(x).var
        Array([0.015625], dtype=float32)
    """
    groups = _collectives.check_groups(axis_name, axis_index_groups)
    x = jnp.asarray(x)
    axes = _axes.split(x.ndim, axis)
    if axis_name is None and mask is None and is_whole(x, axes):
        return _moments_of_whole(x, axes, use_fast_variance)
    return merge_stacked(_collectives.gather(_stacked_blocks(x, axis, mask, use_fast_variance), axis_name, groups))


def neighbour_moments(
    x: ArrayLike,
    *,
    axis: _axes.Axis,
    mask: ArrayLike | None,
    axis_name: _collectives.AxisName,
    size: int,
    use_fast_variance: bool,
) -> Moments:
    """Moments of each group of `size` neighbouring devices, [P / size, C], equal on all devices.

    Otherwise like `batch_moments`; one all-gather.
    """
    everywhere = _collectives.gather(_stacked_blocks(x, axis, mask, use_fast_variance), axis_name, None)
    groups = _collectives.group_size(axis_name, None) // size
    return jax.vmap(merge_stacked)(everywhere.reshape(groups, -1, *everywhere.shape[1:]))


def example_moments(x: jax.Array, *, axis: _axes.Axis = -1, mask: jax.Array | None = None) -> Moments:
    """Moments of the per-example means (examples lie along the leading axis); every example has weight 1.

    Values within an example depend on each other, but examples should not: these moments test their independence.
    """
    given = _axes.weights_like(mask, x)
    weights = jnp.ones(x.shape, jnp.float32) if given is None else jnp.broadcast_to(given, x.shape)
    space = [a for a in _axes.split(x.ndim, axis).reduced if a != 0]
    total = weights.sum(space, keepdims=True)
    values = jnp.where(weights > 0, x.astype(_dtypes.compute(x)), 0)
    means = (values * weights.astype(values.dtype)).sum(space, keepdims=True) / jnp.where(total > 0, total, 1)
    return batch_moments(means, axis=axis, mask=total > 0)


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of the union of two sets of values; either may be empty. Differentiable, like `pool` and `merge_over`.

    For a few parts only: each merge rounds to float32, and a chain of a million loses 0.3 %. Stack many parts for
    `pool`, or accumulate them with the estimator `jaxbn.pooled()`, which uses compensated sums (error 4e-8).

    Args:
        a: Moments of one set.
        b: Moments of the other set, of the same shape.

    Returns:
        `Moments` of that shape.

    Example:
        >>> a, b = (jaxbn.batch_moments(jnp.array(v)[:, None]) for v in ([1.0, 2.0], [6.0]))
        >>> float(jaxbn.merge(a, b).mean[0])
        3.0
    """
    return pool(jax.tree.map(lambda *parts: jnp.stack(parts), a, b))


def pool(parts: Moments) -> Moments:
    """Moments of the union of many sets of values; any may be empty.

    Exact except for the rounding of the given means, which causes a relative error of the variance of about
    1e-7 * |mean| / std.

    Args:
        parts: `Moments` of the sets, stacked along a leading axis `[K, ..., C]`, as `vmap` returns them.

    Returns:
        `Moments` of shape `[..., C]`.

    Example:
        >>> devices = jnp.array([[[1.0], [3.0]], [[11.0], [13.0]]])
        >>> float(jaxbn.pool(jax.vmap(jaxbn.batch_moments)(devices)).var[0])
        26.0
    """
    return _merge_blocks(_Block(parts.count, parts.mean, jnp.zeros_like(parts.mean), parts.var))


def merge_over(
    moments: Moments, axis_name: _collectives.AxisName, axis_index_groups: Sequence[Sequence[int]] | None = None
) -> Moments:
    """Moments of the union over the devices of a named axis, in one collective; devices may be empty.

    Args:
        moments: `Moments` of the values on this device.
        axis_name: Axis of the surrounding `shard_map`, `pmap` or `vmap`.
        axis_index_groups: Groups of devices along the axis, which are merged separately.

    Returns:
        `Moments` of the same shape, the same on all devices.

    Example:
        >>> devices = jnp.array([[[1.0], [3.0]], [[11.0], [13.0]]])
        >>> merged = jax.vmap(lambda x: jaxbn.merge_over(jaxbn.batch_moments(x), "devices"), axis_name="devices")
        >>> merged(devices).var[:, 0]
        Array([26., 26.], dtype=float32)
    """
    groups = _collectives.check_groups(axis_name, axis_index_groups)
    return pool(gather(jax.tree.map(lambda part: part[None], moments), axis_name, groups))


def gather(
    parts: Moments, axis_name: _collectives.AxisName | None = None, axis_index_groups: _collectives.Groups | None = None
) -> Moments:
    """Gathers moments [K, ..., C] of parts from all devices to [P * K, ..., C], in one collective."""
    stacked = jnp.stack([part.astype(parts.mean.dtype) for part in parts], 1)
    everywhere = _collectives.gather(stacked, axis_name, axis_index_groups)
    return Moments(everywhere[:, 0].real, everywhere[:, 1], everywhere[:, 2].real)


def bessel(count: jax.Array) -> jax.Array:
    """The factor n / (n - 1), and 1 if there is at most one value, since its variance is 0."""
    return jnp.where(count > 1, count / jnp.where(count > 1, count - 1, 1), 1)


def is_whole(x: jax.Array, axes: _axes.Axes) -> bool:
    """Whether x has rows and they form one block, so no merge is needed."""
    return x.size > 0 and axes.reduced != () and _collectives.count_blocks(x, axes.rows) == 1


def sum_in_blocks(axes: _axes.Axes, *values: jax.Array) -> jax.Array:
    """Sums of arrays of one shape over the rows of each block, stacked: [B, len(values), C]."""
    axes, values = _axes.with_rows(axes, *values)
    blocks = _collectives.count_blocks(values[0], axes.rows)
    sums = (_collectives.cut(v, axes.rows, blocks).sum(axes.reduced_in_blocks, keepdims=True) for v in values)
    return jnp.stack([_blocks_to_front(s, axes) for s in sums], 1)


def _stacked_blocks(x: ArrayLike, axis: _axes.Axis, mask: ArrayLike | None, fast: bool) -> jax.Array:
    """The moments of each block as one array, [B, 4, C], so that one collective can gather them."""
    x = jnp.asarray(x)
    weights = _axes.weights_like(mask, x)
    axes, arrays = _axes.with_rows(_axes.split(x.ndim, axis), *((x,) if weights is None else (x, weights)))
    block = _block_means(axes, fast, *arrays)
    return jnp.stack([part.astype(block.shift.dtype) for part in block], 1)


def merge_stacked(stacked: jax.Array) -> Moments:
    """Merges the blocks that `_stacked_blocks` returns."""
    count, shift, first, second = (stacked[:, i] for i in range(4))
    return _merge_blocks(_Block(count.real, shift, first, second.real))


def _blocks_to_front(sums: jax.Array, axes: _axes.Axes) -> jax.Array:
    """Moves sums per block, with reduced axes kept, from the layout of the cut array to [B, C]."""
    return jnp.moveaxis(sums.squeeze(axes.reduced_in_blocks), sum(a < axes.rows for a in axes.features), 0)


@functools.partial(jax.jit, static_argnames=("axes", "fast"))  # one program even outside jit, as at init
def _moments_of_whole(x: jax.Array, axes: _axes.Axes, fast: bool) -> Moments:
    """The first formula at the top for a single block: the common case, with a shorter program."""
    dtype, values = _dtypes.compute(x), math.prod(x.shape[a] for a in axes.reduced)

    def mean(x: jax.Array) -> jax.Array:
        return x.astype(dtype).sum(axes.reduced) / math.prod(x.shape[a] for a in axes.reduced)

    near = _shift.first_samples(x, axes.rows, values) if fast else x
    shift = _shift.rounded(lax.stop_gradient(mean(near)))  # the result does not depend on it

    def centred(shift: jax.Array) -> jax.Array:
        return x.astype(dtype) - _axes.expand(shift, axes)

    first = mean(centred(shift))
    squares = _abs_sq(centred(_barriers.barrier(shift, "cpu"))).sum(axes.reduced)
    m2 = jnp.maximum(squares - values * _abs_sq(first), 0)
    return Moments(jnp.full_like(m2, values), shift + first, m2)


@functools.partial(jax.jit, static_argnames=("axes", "fast"))  # one program even outside jit, as at init
def _block_means(axes: _axes.Axes, fast: bool, x: jax.Array, weights: jax.Array | None = None) -> _Block:
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
    return _Block(*(_blocks_to_front(part, axes) for part in (count, shift, mean(d), mean(_abs_sq(d)))))


@jax.jit
def _merge_blocks(block: _Block) -> Moments:
    """Merges all blocks: the second formula at the top, relative to the first block that has values."""
    present, total = block.count > 0, block.count.sum(0, keepdims=True)
    weight = block.count / jnp.where(total > 0, total, 1)
    # Select instead of index: on an Explicit mesh with sharded channels, indexing is not possible.
    first = lax.broadcasted_iota(jnp.int32, present.shape, 0) == lax.argmax(present, 0, jnp.int32)[None]
    reference = lax.select(first, block.shift, jnp.zeros_like(block.shift)).sum(0, keepdims=True)
    offset = jnp.where(present, (block.shift - reference) + block.first, 0)
    mean = (weight.astype(offset.dtype) * offset).sum(0, keepdims=True)
    within = jnp.where(present, jnp.maximum(block.second - _abs_sq(block.first), 0), 0)
    var = (weight * (within + _abs_sq(offset - mean))).sum(0)
    return Moments(total[0], jnp.where(total > 0, reference + mean, 0)[0], total[0] * var)


def _abs_sq(values: jax.Array) -> jax.Array:
    return jnp.square(values.real) + jnp.square(values.imag) if jnp.iscomplexobj(values) else jnp.square(values)
