"""Moments of a batch: count, mean and sum of squared deviations, exact for every division into blocks and devices.

Everything here is a weighted sum that carries its count. A batch is cut into blocks, each block is summed about a shift
close to its own values, and the blocks of all devices are merged at once (with sums, k_0 is the mean of the shifts):

    d = x - k_b;  s1, s2 = mean d, mean d^2                          in block b, of weight w_b = n_b / n
    e_b = (k_b - k_0) + s1_b;  mean = k_0 + sum w_b e_b;  var = sum w_b (s2_b - s1_b^2 + (e_b - sum w e)^2)

E[x^2] - E[x]^2 loses all digits of the variance once mean / std reaches 1e3; about a shift near the data no digits are
lost (Chan, Golub & LeVeque, Algorithms for Computing the Sample Variance, 1983). The shift comes from the batch, so it
needs no state and is right from the first step on.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxbn._src.numerics import axes as _axes
from jaxbn._src.numerics import block_sums as _block_sums
from jaxbn._src.numerics import collectives as _collectives
from jaxbn._src.numerics import dtypes as _dtypes
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

    The result does not depend on how the rows are sharded. Sharded rows cost one all-gather on up to 8 devices; on
    more, two sums of a size that does not grow with the devices. Arrays that are sharded under `jit` need no argument;
    under `shard_map`, `pmap` and `vmap` pass `axis_name`.

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
    if axis_name is None and mask is None and _block_sums.is_whole(x, axes):
        return Moments(*_block_sums.moments_of_whole(x, axes, use_fast_variance))
    return merge_devices(_stacked_blocks(x, axis, mask, use_fast_variance), axis_name, groups)


def neighbour_moments(
    x: ArrayLike,
    *,
    axis: _axes.Axis,
    mask: ArrayLike | None,
    axis_name: _collectives.AxisName,
    size: int,
    use_fast_variance: bool,
) -> Moments:
    """Moments of groups of `size` neighbouring devices; otherwise like `batch_moments`.

    Few devices gather those of all groups, [P / size, C], equal on all devices. Many devices, or one group, return
    [1, C]: those of the group that this device belongs to.
    """
    blocks = _stacked_blocks(x, axis, mask, use_fast_variance)
    if not _collectives.is_gathered(blocks, axis_name, None):
        own = merge_devices(blocks, axis_name, _collectives.neighbours(axis_name, size))
        return jax.tree.map(lambda part: part[None], own)
    everywhere = _collectives.gather(blocks, axis_name, None)
    groups = _collectives.group_size(axis_name, None) // size
    return jax.vmap(merge_stacked)(everywhere.reshape(groups, -1, *everywhere.shape[1:]))


def example_moments(x: jax.Array, *, axis: _axes.Axis = -1, mask: jax.Array | None = None) -> Moments:
    """Moments of the per-example means (examples lie along the leading axis); every example has weight 1.

    Values within an example depend on each other, but examples should not: these moments test their independence.
    """
    given = _axes.weights_like(mask, x)
    weights = jnp.ones(x.shape, jnp.float32) if given is None else jnp.broadcast_to(given.astype(jnp.float32), x.shape)
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
    return _merge_blocks(_block_sums.Block(parts.count, parts.mean, jnp.zeros_like(parts.mean), parts.var))


def merge_over(
    moments: Moments, axis_name: _collectives.AxisName, axis_index_groups: Sequence[Sequence[int]] | None = None
) -> Moments:
    """Moments of the union over the devices of a named axis; devices may be empty.

    One collective on up to 8 devices, two of fixed size on more.

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
    parts = moments.count, moments.mean, jnp.zeros_like(moments.mean), moments.var
    return merge_devices(jnp.stack([part.astype(moments.mean.dtype) for part in parts])[None], axis_name, groups)


def pool_over(
    parts: Moments, values: jax.Array, axis_name: _collectives.AxisName | None, copies: int
) -> tuple[Moments, jax.Array]:
    """Moments of the union of the parts [K, C] of all devices, and the sum of `values` [K, C] over them.

    `copies` is the number of devices that hold the same parts.
    """
    count, mean, m2, values = parts.count / copies, parts.mean, parts.m2 / copies, values / copies
    stacked = jnp.stack([part.astype(mean.dtype) for part in (count, mean, m2, values)], 1)
    if _collectives.is_gathered(stacked, axis_name, None):
        count, mean, m2, values = jnp.moveaxis(_collectives.gather(stacked, axis_name, None), 1, 0)
        return pool(Moments(count.real, mean, m2.real)), values.real.sum(0)
    blocks = [part.astype(mean.dtype) for part in (count, mean, jnp.zeros_like(mean), parts.var)]
    return merge_devices(jnp.stack(blocks, 1), axis_name, None), _collectives.total(values[:, None], axis_name, None)[0]


def bessel(count: jax.Array) -> jax.Array:
    """The factor n / (n - 1), and 1 if there is at most one value, since its variance is 0."""
    return jnp.where(count > 1, count / jnp.where(count > 1, count - 1, 1), 1)


def _stacked_blocks(x: ArrayLike, axis: _axes.Axis, mask: ArrayLike | None, fast: bool) -> jax.Array:
    """The moments of each block as one array, [B, 4, C], so that one collective can gather them."""
    x = jnp.asarray(x)
    weights = _axes.weights_like(mask, x)
    axes, arrays = _axes.with_rows(_axes.split(x.ndim, axis), *((x,) if weights is None else (x, weights)))
    block = _block_sums.block_means(axes, fast, *arrays)
    return jnp.stack([part.astype(block.shift.dtype) for part in block], 1)


def merge_devices(
    blocks: jax.Array, axis_name: _collectives.AxisName | None, groups: _collectives.Groups | None
) -> Moments:
    """Merges blocks [B, 4, ..., C] (count, shift, first and second of `_block_sums.Block`) over all devices.

    Few devices gather all blocks, in one collective. Many devices use two sums, whose size does not depend on their
    number: the first one agrees on a reference, the mean of the shifts.
    """
    if _collectives.is_gathered(blocks, axis_name, groups):
        return merge_stacked(_collectives.gather(blocks, axis_name, groups))
    return _merge_by_sums(blocks, lambda *values: _collectives.total(jnp.stack(values, 1), axis_name, groups))


def merge_stacked(stacked: jax.Array) -> Moments:
    """Merges the blocks that `_stacked_blocks` returns."""
    return _merge_blocks(_unstack(stacked))


def _unstack(stacked: jax.Array) -> _block_sums.Block:
    count, shift, first, second = (stacked[:, i] for i in range(4))
    return _block_sums.Block(count.real, shift, first, second.real)


def _merge_by_sums(stacked: jax.Array, total: Callable[..., jax.Array]) -> Moments:
    """The second formula at the top, relative to the mean of the shifts; `total` sums values of each block."""
    block, dtype = _unstack(stacked), stacked.dtype
    present = block.count > 0
    count, shifts = total(block.count.astype(dtype), block.count.astype(dtype) * block.shift)[:, None]
    count = count.real
    divisor = jnp.where(count > 0, count, 1)
    reference = _shift.rounded(lax.stop_gradient(shifts / divisor.astype(dtype)))  # the result does not depend on it
    offset = jnp.where(present, (block.shift - reference) + block.first, 0)
    within = jnp.where(present, jnp.maximum(block.second - _block_sums.abs_sq(block.first), 0), 0)
    weight = block.count / divisor
    mean, square = total(weight.astype(dtype) * offset, (weight * (within + _block_sums.abs_sq(offset))).astype(dtype))
    var = jnp.maximum(square.real - _block_sums.abs_sq(mean), 0)
    return Moments(count[0], jnp.where(count > 0, reference + mean[None], 0)[0], count[0] * var)


@jax.jit
def _merge_blocks(block: _block_sums.Block) -> Moments:
    """Merges all blocks: the second formula at the top, relative to the first block that has values."""
    present, total = block.count > 0, block.count.sum(0, keepdims=True)
    weight = block.count / jnp.where(total > 0, total, 1)
    # Select instead of index: on an Explicit mesh with sharded channels, indexing is not possible.
    first = lax.broadcasted_iota(jnp.int32, present.shape, 0) == lax.argmax(present, 0, jnp.int32)[None]
    reference = lax.select(first, block.shift, jnp.zeros_like(block.shift)).sum(0, keepdims=True)
    offset = jnp.where(present, (block.shift - reference) + block.first, 0)
    mean = (weight.astype(offset.dtype) * offset).sum(0, keepdims=True)
    within = jnp.where(present, jnp.maximum(block.second - _block_sums.abs_sq(block.first), 0), 0)
    var = (weight * (within + _block_sums.abs_sq(offset - mean))).sum(0)
    return Moments(total[0], jnp.where(total > 0, reference + mean, 0)[0], total[0] * var)
