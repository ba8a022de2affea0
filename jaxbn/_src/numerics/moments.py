"""Moments of a batch: count, mean and sum of squared deviations, exact however its rows were cut.

Everything here is a weighted sum that carries its count. A batch is cut into blocks, each block is summed about a shift
taken from its own values, and the blocks of all devices are merged at once:

    d = x - k_b;  s1, s2 = mean d, mean d^2                          in block b, of weight w_b = n_b / n
    e_b = (k_b - k_0) + s1_b;  mean = k_0 + sum w_b e_b;  var = sum w_b (s2_b - s1_b^2 + (e_b - sum w e)^2)

E[x^2] - E[x]^2 loses all digits of the variance once mean / std reaches 1e3; about a shift near the data nothing is
lost (Chan, Golub & LeVeque, Algorithms for Computing the Sample Variance, 1983). A shift taken from the data needs no
state, and is right from a cold start.
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

    All three have the shape of the features, so that a mask may differ from channel to channel. A count of 0 says that
    nothing was seen; mean and m2 are 0 then. Moments of parts are put together with :func:`merge` and :func:`pool`.

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
    """Means about a shift of the values of each block, [B, C]."""

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
    """Moments of one batch over all axes but the features, and over devices.

    The result does not depend on how the rows are spread over devices, and costs one all-gather where they are. For
    arrays sharded under `jit` nothing needs to be named; under `shard_map`, `pmap` and `vmap` name the axis.

    Args:
        x: Values `[..., C]`, of any dtype; half precision and integers are summed in float32.
        axis: Feature axis, or several; the rest is reduced.
        mask: Booleans or real weights of the values, broadcastable to `x`. What stands where the weight is 0 has no
            influence, even if it is NaN.
        axis_name: Axis or axes of the surrounding `shard_map`, `pmap` or `vmap` to reduce over.
        axis_index_groups: Groups of devices along `axis_name` that are reduced separately.
        use_fast_variance: Shift by the mean of a block's first sample (or as many as make 16 values), which reads `x`
            once. False shifts by the mean of the block, which reads it twice, as masks always do: their first sample
            may be padding. Only where the first samples are hundreds of standard deviations away from the rest do the
            two differ: at distance k, by about 1e-7 k^2.

    Returns:
        `Moments` in float32 (float64 and complex stay), each in the shape of the features.

    Raises:
        ValueError: If `axis` does not fit `x`, the mask does not broadcast, or the groups are not groups.
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
    """Moments of each group of `size` neighbouring devices, [P / size, C], all of them on all devices.

    As `batch_moments` otherwise; in one all-gather.
    """
    everywhere = _collectives.gather(_stacked_blocks(x, axis, mask, use_fast_variance), axis_name, None)
    groups = _collectives.group_size(axis_name, None) // size
    return jax.vmap(merge_stacked)(everywhere.reshape(groups, -1, *everywhere.shape[1:]))


def example_moments(x: jax.Array, *, axis: _axes.Axis = -1, mask: jax.Array | None = None) -> Moments:
    """Moments over the examples, which lie along the leading axis, of the mean of each; every example counts once.

    Values of one example depend on each other, examples need not: by this their independence can be judged.
    """
    given = _axes.weights_like(mask, x)
    weights = jnp.ones(x.shape, jnp.float32) if given is None else jnp.broadcast_to(given, x.shape)
    space = [a for a in _axes.split(x.ndim, axis).reduced if a != 0]
    total = weights.sum(space, keepdims=True)
    values = jnp.where(weights > 0, x.astype(_dtypes.compute(x)), 0)
    means = (values * weights.astype(values.dtype)).sum(space, keepdims=True) / jnp.where(total > 0, total, 1)
    return batch_moments(means, axis=axis, mask=total > 0)


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of the union of two sets of values; either may be empty. Differentiable, as `pool` and `merge_over` are.

    For a few parts: each merge rounds to float32, and a chain of a million loses 0.3 %. Stack the parts for `pool`, or
    accumulate many with the estimator `jaxbn.pooled()`, whose sums are compensated (4e-8).

    Args:
        a: Moments of one set.
        b: Moments of the other, of the same shape.

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

    Exact but for the rounding of the given means, which is worth about 1e-7 * |mean| / std in the relative error of the
    variance.

    Args:
        parts: `Moments` of the sets, stacked along a leading axis `[K, ..., C]`, as `vmap` gives them.

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
    """Moments of the union over the devices of a named axis, in one collective; empty devices are legal.

    Args:
        moments: `Moments` of what this device holds.
        axis_name: Axis of the surrounding `shard_map`, `pmap` or `vmap`.
        axis_index_groups: Groups of devices along the axis, each of which is merged by itself.

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
    """The moments [K, ..., C] of parts, of all devices, [P * K, ..., C], in one collective."""
    stacked = jnp.stack([part.astype(parts.mean.dtype) for part in parts], 1)
    everywhere = _collectives.gather(stacked, axis_name, axis_index_groups)
    return Moments(everywhere[:, 0].real, everywhere[:, 1], everywhere[:, 2].real)


def bessel(count: jax.Array) -> jax.Array:
    """The factor n / (n - 1), and 1 where one value or less has been seen: its variance is 0 anyway."""
    return jnp.where(count > 1, count / jnp.where(count > 1, count - 1, 1), 1)


def is_whole(x: jax.Array, axes: _axes.Axes) -> bool:
    """Whether x holds rows that are one block, so that there is nothing to merge."""
    return x.size > 0 and axes.reduced != () and _collectives.count_blocks(x, axes.rows) == 1


def sum_in_blocks(axes: _axes.Axes, *values: jax.Array) -> jax.Array:
    """The sums of arrays of one shape over the rows of each block, stacked: [B, len(values), C]."""
    axes, values = _axes.with_rows(axes, *values)
    blocks = _collectives.count_blocks(values[0], axes.rows)
    sums = (_collectives.cut(v, axes.rows, blocks).sum(axes.reduced_in_blocks, keepdims=True) for v in values)
    return jnp.stack([_blocks_to_front(s, axes) for s in sums], 1)


def _stacked_blocks(x: ArrayLike, axis: _axes.Axis, mask: ArrayLike | None, fast: bool) -> jax.Array:
    """The means of each block as one array, [B, 4, C]."""
    x = jnp.asarray(x)
    weights = _axes.weights_like(mask, x)
    axes, arrays = _axes.with_rows(_axes.split(x.ndim, axis), *((x,) if weights is None else (x, weights)))
    block = _block_means(axes, fast, *arrays)
    return jnp.stack([part.astype(block.shift.dtype) for part in block], 1)


def merge_stacked(stacked: jax.Array) -> Moments:
    """The moments of all blocks, given as `_stacked_blocks` gives them."""
    count, shift, first, second = (stacked[:, i] for i in range(4))
    return _merge_blocks(_Block(count.real, shift, first, second.real))


def _blocks_to_front(sums: jax.Array, axes: _axes.Axes) -> jax.Array:
    """Sums over each block, reduced axes kept, from the layout of the cut array to [B, C]."""
    return jnp.moveaxis(sums.squeeze(axes.reduced_in_blocks), sum(a < axes.rows for a in axes.features), 0)


@functools.partial(jax.jit, static_argnames=("axes", "fast"))  # one program outside jit, as at init
def _moments_of_whole(x: jax.Array, axes: _axes.Axes, fast: bool) -> Moments:
    """The first formula at the top, where there is one block: most programs are of this kind, and this one is short."""
    dtype, values = _dtypes.compute(x), math.prod(x.shape[a] for a in axes.reduced)

    def mean(x: jax.Array) -> jax.Array:
        return x.astype(dtype).sum(axes.reduced) / math.prod(x.shape[a] for a in axes.reduced)

    near = _shift.first_samples(x, axes.rows, values) if fast else x
    shift = _shift.rounded(lax.stop_gradient(mean(near)))  # the result does not depend on it

    def centred(shift: jax.Array) -> jax.Array:
        return x.astype(dtype) - _axes.expand(shift, x.ndim, axes)

    first = mean(centred(shift))
    squares = _abs_sq(centred(_barriers.private(shift, "cpu"))).sum(axes.reduced)
    m2 = jnp.maximum(squares - values * _abs_sq(first), 0)
    return Moments(jnp.full_like(m2, values), shift + first, m2)


@functools.partial(jax.jit, static_argnames=("axes", "fast"))  # one program where there is no jit outside, as at init
def _block_means(axes: _axes.Axes, fast: bool, x: jax.Array, weights: jax.Array | None = None) -> _Block:
    """Count, shift and means about the shift of each block of rows, [B, C]."""
    blocks, dtype = _collectives.count_blocks(x, axes.rows), _dtypes.compute(x)
    x = _collectives.cut(x, axes.rows, blocks)
    if weights is not None:
        weights = _collectives.cut(weights, axes.rows, blocks)
        x = jnp.where(weights > 0, x, jnp.zeros((), x.dtype))  # first of all: what is masked may be NaN

    def total(values: jax.Array) -> jax.Array:
        return values.sum(axes.reduced_in_blocks, keepdims=True)

    values = math.prod(x.shape[a] for a in axes.reduced_in_blocks)
    if weights is None:  # as a number: float32 could not count beyond 2^24 one by one
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
    """The moments of all blocks together: the second formula at the top, relative to the first block that holds any."""
    present, total = block.count > 0, block.count.sum(0, keepdims=True)
    weight = block.count / jnp.where(total > 0, total, 1)
    # Selected and not indexed, which an Explicit mesh could not do over channels that are spread.
    first = lax.broadcasted_iota(jnp.int32, present.shape, 0) == lax.argmax(present, 0, jnp.int32)[None]
    reference = lax.select(first, block.shift, jnp.zeros_like(block.shift)).sum(0, keepdims=True)
    offset = jnp.where(present, (block.shift - reference) + block.first, 0)
    mean = (weight.astype(offset.dtype) * offset).sum(0, keepdims=True)
    within = jnp.where(present, jnp.maximum(block.second - _abs_sq(block.first), 0), 0)
    var = (weight * (within + _abs_sq(offset - mean))).sum(0)
    return Moments(total[0], jnp.where(total > 0, reference + mean, 0)[0], total[0] * var)


def _abs_sq(values: jax.Array) -> jax.Array:
    return jnp.square(values.real) + jnp.square(values.imag) if jnp.iscomplexobj(values) else jnp.square(values)
