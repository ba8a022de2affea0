"""What the hosts share of a capture: how a layer is named in the traced program, and in which mode it runs."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbn.core.moments import Moments

# What layers normalize with while they are measured: the statistics of their batch, the stored ones, or as they are
# asked to.
MODES = ("batch", "eval", "as_called")


class Layer(NamedTuple):
    """What tells one layer's marks from another's; static, and different in each mode, so that programs are too."""

    path: str
    shape: tuple[int, ...]  # of its statistics
    mode: str

    @property
    def size(self) -> int:
        """Number of flat positions."""
        return math.prod(self.shape)

    def positions(self) -> jax.Array:
        """The flat position of each statistic, i32[shape]."""
        return jnp.arange(self.size, dtype=jnp.int32).reshape(self.shape)

    def moments_from(self, collected: Mapping[Any, Moments]) -> Moments:
        """This layer's moments out of what was collected, in its shape; of count 0 if it was not reached."""
        flat = collected.get(self)
        if flat is None:
            return Moments(*(jnp.zeros(self.shape, jnp.float32) for _ in range(3)))
        return jax.tree.map(lambda part: part.reshape(self.shape), flat)


def check_mode(mode: str) -> None:
    """Raises a ValueError for a mode that does not exist."""
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is none of {', '.join(map(repr, MODES))}.")
