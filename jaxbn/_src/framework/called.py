"""A call of a normalization layer: its arguments, and normalization with other statistics."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxbn._src.methods.protocol import NormTransform, State
from jaxbn._src.numerics import axes as _axes
from jaxbn._src.numerics import collectives as _collectives
from jaxbn._src.numerics.moments import Moments, merge_over


class Operands(NamedTuple):
    """The arguments of the call of a layer."""

    x: jax.Array
    mask: Any
    residual: Any
    where: dict[str, Any]  # the domain, if there is one


class CalledNorm(NamedTuple):
    """A layer in a call, with the functions and fields that it takes to normalize with other statistics."""

    path: str
    transform: NormTransform[Any, Any]
    running: State
    normalize: Callable[..., jax.Array]  # (state, x, mask=, residual=, **where) -> y
    axis: _axes.Axis
    axis_name: _collectives.AxisName | None
    axis_index_groups: Any

    @property
    def bound_axis(self) -> _collectives.AxisName | None:
        """The axis of devices that share statistics; None where it is not bound: there one device has the batch."""
        return self.axis_name if self.axis_name is not None and _collectives.is_bound(self.axis_name) else None

    def over_devices(self, moments: Moments) -> Moments:
        """The moments of this device, merged with those of the devices that share statistics with it."""
        axis = self.bound_axis
        return moments if axis is None else merge_over(moments, axis, self.axis_index_groups)

    def apply(self, state: State, operands: Operands) -> jax.Array:
        """Normalizes with the statistics of a state."""
        x, mask, residual, where = operands
        return self.normalize(state, x, mask=mask, residual=residual, **where)
