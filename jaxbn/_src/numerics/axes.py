"""Static handling of shapes: feature axes, reduced axes, and all errors about shapes.

No function here reads a value. Each check runs once, at trace time, and raises before any state changes.
"""

import functools
import math
import operator
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxbn._src.numerics import explicit_meshes as _explicit_meshes

Axis = int | Sequence[int]


class Axes(NamedTuple):
    """The feature axes and the reduced axes of an array, non-negative and sorted.

    The first reduced axis holds the rows. `collectives.cut` splits it into blocks: the cut array has one more axis,
    with the blocks at `rows` and the rows of a block right after.
    """

    features: tuple[int, ...]  # kept: one statistic for each index
    reduced: tuple[int, ...]  # summed over: batch, space, time

    @property
    def rows(self) -> int:
        """The axis along which a batch is divided among devices."""
        return self.reduced[0]

    @property
    def space_in_blocks(self) -> tuple[int, ...]:
        """The reduced axes of a cut array, without the rows."""
        return tuple(a + 1 for a in self.reduced[1:])

    @property
    def reduced_in_blocks(self) -> tuple[int, ...]:
        """The axes of a cut array that a sum per block reduces."""
        return (self.rows + 1, *self.space_in_blocks)


def static(axis: Axis) -> int | tuple[int, ...]:
    """The axis argument in a hashable form."""
    return tuple(map(operator.index, axis)) if isinstance(axis, Iterable) else operator.index(axis)


def split(ndim: int, axis: Axis) -> Axes:
    """Splits the axes of an array of rank `ndim` into features (`axis`) and the rest."""
    return _split(ndim, static(axis))


@functools.cache  # all calls of all layers ask for a handful of splits
def _split(ndim: int, axis: int | tuple[int, ...]) -> Axes:
    given = axis if isinstance(axis, tuple) else (axis,)
    if any(not -ndim <= a < ndim for a in given):
        raise ValueError(
            f"axis={axis} names an axis that an input of rank {ndim} does not have; give axes in [{-ndim}, {ndim})."
        )
    features = tuple(sorted({a % ndim for a in given}))
    return Axes(features, tuple(a for a in range(ndim) if a not in features))


def with_rows(axes: Axes, *arrays: jax.Array) -> tuple[Axes, tuple[jax.Array, ...]]:
    """Adds an axis of one row to arrays that have only feature axes, as when the batch lies along an `axis_name`."""
    if axes.reduced:
        return axes, arrays
    return Axes(tuple(a + 1 for a in axes.features), (0,)), tuple(a[None] for a in arrays)


def feature_shape(shape: Sequence[int], axis: Axis) -> tuple[int, ...]:
    """Shape of the statistics of an array of this shape: `(C,)`, or one entry for each feature axis."""
    return tuple([shape[a] for a in split(len(shape), axis).features])


def values_per_channel(shape: Sequence[int], axis: Axis) -> int:
    """Number of values that one statistic is computed from, before masks and on this device."""
    return math.prod([shape[a] for a in split(len(shape), axis).reduced])


def expand(stat: jax.Array, axes: Axes) -> jax.Array:
    """Reshapes a per-channel array `[C]` so that it broadcasts against the input."""
    return jnp.expand_dims(stat, axes.reduced)


def check_features(shape: Sequence[int], axis: Axis, expected: Sequence[int]) -> None:
    """Raises a ValueError if the features of the input differ from those of the state."""
    found = feature_shape(shape, axis)
    if found != tuple(expected):
        raise ValueError(
            f"The input {tuple(shape)} has features {found} along axis={axis}, but the parameters and statistics are "
            f"for {tuple(expected)}. Pass an input with {tuple(expected)} features, name its feature axis with axis=, "
            f"or initialize anew for this input."
        )


def check_training_batch(shape: Sequence[int], axis: Axis, values: int, allow_single_value: bool) -> None:
    """Raises a ValueError if `values` per channel, over all devices, are too few to train on."""
    if values == 0:
        raise ValueError(
            f"The input {tuple(shape)} is empty, so there are no training statistics to compute. Skip empty batches, "
            f"or evaluate with the running statistics (use_running_average=True, or .eval)."
        )
    if values == 1 and not allow_single_value:
        raise ValueError(
            f"The input {tuple(shape)} has one value per channel along axis={axis}: its variance is 0, every output "
            f"would be the bias and no gradient would flow. Use a larger batch, synchronize over devices with "
            f"axis_name=, normalize with the running statistics (use_running_average=True, or .eval), or pass "
            f"allow_single_value=True if this is intended."
        )


def weights_like(mask: ArrayLike | None, x: jax.Array) -> jax.Array | None:
    """The mask as constant weights of the rank of x: booleans, or float32 in which negative weights become 0.

    Raises:
        ValueError: If the mask does not broadcast to the input, or if it fits the leading axes as well as the last.
        TypeError: If the mask is complex.
    """
    if mask is None:
        return None
    weights = jnp.asarray(mask)
    shape = _aligned(weights.shape, x.shape)
    if jnp.issubdtype(weights.dtype, jnp.complexfloating):
        raise TypeError(f"A mask must hold booleans or real weights, but this one is {weights.dtype}.")
    weights = weights.reshape(shape)
    if weights.dtype != bool:
        weights = weights.astype(jnp.float32)
        weights = lax.stop_gradient(jnp.where(weights > 0, weights, 0))
    return _explicit_meshes.on_values(weights, x)


def is_valid(weights: jax.Array) -> jax.Array:
    """Which positions have a weight, as booleans; takes the result of `weights_like`."""
    return weights if weights.dtype == bool else weights > 0


def on_each_value(weights: jax.Array, x: jax.Array) -> jax.Array:
    """The weights in float32, one for each value of x."""
    return _explicit_meshes.on_values(jnp.ones_like(x, jnp.float32) * weights.astype(jnp.float32), x)


def _aligned(mask: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a mask with the rank of the input; raises a ValueError if it does not fit or is ambiguous."""
    ones = (1,) * (len(shape) - len(mask))
    front, back = mask + ones, ones + mask
    fits_leading = mask == shape[: len(mask)]
    if len(mask) > len(shape) or any(m not in (1, n) for m, n in zip(back, shape, strict=True)):
        fix = f"mask.reshape({front})" if fits_leading else "one that does"
        raise ValueError(
            f"A mask of shape {mask} does not broadcast to the input {shape}: shapes are aligned at the last axis. "
            f"Pass {fix}."
        )
    # NumPy would align the mask at the last axis; users often mean rows. Where both fit, refuse to guess.
    if math.prod(mask) > 1 and front != back and fits_leading:
        raise ValueError(
            f"A mask of shape {mask} fits the leading axes of the input {shape} as well as the last ones, along which "
            f"shapes are aligned. Pass mask.reshape({front}) for the leading axes, as of rows, or "
            f"mask.reshape({back})."
        )
    return back
