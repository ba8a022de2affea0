"""A mark in a traced program: the identity on a layer's output, with which the layer's moments ride along.

The `index` beside the moments says which flat positions of the layer they hold. It entered the program beside the
layer's statistics, so whatever was done to those on the way in (sliced by scan, stacked by vmap, shared, permuted) was
done to the index too, and nobody has to guess. `harvest` brings the marked moments out.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxbn._src import internals as _internals
from jaxbn._src.numerics import explicit_meshes as _explicit_meshes
from jaxbn._src.numerics import moments as _moments


class Layer(Protocol):
    """What a mark belongs to: static, hashable, equal to itself in every trace, of `size` flat positions."""

    @property
    def size(self) -> int: ...


def mark(y: jax.Array, index: jax.Array, moments: _moments.Moments, *, layer: Layer) -> jax.Array:
    """Gives back `y` and lets the moments ride along for `harvest`; without harvest it compiles to nothing.

    Args:
        y: Any array that the program goes on with; its derivative is that of the identity.
        index: `i32[..., C]`, the flat positions in `layer` that the moments hold.
        moments: Moments, broadcastable to the shape of `index`; `harvest` brings them out with their derivative.
        layer: The layer; static.

    Raises:
        TypeError: If `index` no longer holds integers.
    """
    if not jnp.issubdtype(index.dtype, jnp.integer):
        raise TypeError(
            f"the index of {layer} arrived as {index.dtype}, must be int32: the program casts every leaf of its "
            "variables. Cast the floating-point leaves only."
        )
    parts = [jnp.broadcast_to(_explicit_meshes.whole(part), index.shape) for part in moments]
    return mark_p.bind(y, index, *parts, layer=layer)


# The mark as a JAX primitive: y, index, count, mean, m2 -> y
def _mark_batching(args: Sequence[Any], dims: Sequence[int | None], *, layer: Layer) -> tuple[Any, int | None]:
    """Under vmap each lane has its own index and moments, in front; y stays as it is."""
    (lanes,) = {arg.shape[dim] for arg, dim in zip(args, dims, strict=True) if dim is not None}

    def in_front(arg: Any, dim: int | None) -> jax.Array:
        return jnp.broadcast_to(arg, (lanes, *arg.shape)) if dim is None else jnp.moveaxis(arg, dim, 0)

    rest = [in_front(arg, dim) for arg, dim in zip(args[1:], dims[1:], strict=True)]
    return mark_p.bind(args[0], *rest, layer=layer), dims[0]


mark_p = _internals.identity_primitive("jaxbn_mark", lambda y, *_, layer: y, _mark_batching, multiple=False)
