"""A function of the kernel in the place of a Flax layer's promotion of dtypes."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class MapKernel:
    """Promotes the dtypes of the input, the kernel and the bias of a layer, with a function of the kernel."""

    function: Callable[[jax.Array], jax.Array]
    promote: Callable[..., Any]  # (arrays, **options) -> arrays: Flax's own promotion

    def __call__(self, *arrays: Any, **options: Any) -> Any:
        """Takes the arrays one by one, as linen passes them, or in one tuple, as NNX does."""
        inputs, kernel, bias = arrays if len(arrays) > 1 else arrays[0]
        return self.promote((inputs, self.function(kernel), bias), **options)
