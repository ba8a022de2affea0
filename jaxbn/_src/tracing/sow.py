"""`sow`: an identity on a layer's output that carries the layer's moments through a traced program to `harvest`.

The `index` says which flat positions of the layer the moments belong to. It enters the program as a variable next to
the layer's statistics. Every transformation of the statistics on the way in (sliced by scan, stacked by vmap, shared,
permuted) therefore applies to the index too, and the positions need not be inferred.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxbn._src import internals as _internals
from jaxbn._src.numerics import explicit_meshes as _explicit_meshes
from jaxbn._src.numerics import moments as _moments


class Layer(Protocol):
    """The layer that sows: static, hashable, equal to itself in every trace, with `size` flat positions."""

    @property
    def size(self) -> int: ...


def sow(y: jax.Array, index: jax.Array, moments: _moments.Moments, *, layer: Layer) -> jax.Array:
    """Returns `y`, and passes the moments to a surrounding `harvest`; without one it compiles to no operation.

    Args:
        y: Any array that the program uses further; its derivative is that of the identity.
        index: `i32[..., C]`, the flat positions in `layer` that the moments belong to.
        moments: Moments, broadcastable to the shape of `index`; `harvest` returns them with their derivative.
        layer: The layer; static.

    Raises:
        TypeError: If `index` no longer holds integers.
    """
    if not jnp.issubdtype(index.dtype, jnp.integer):
        raise TypeError(
            f"the index of {layer} has dtype {index.dtype}, but must be int32: the program casts every leaf of its "
            "variables. Cast only the floating-point leaves."
        )
    parts = [jnp.broadcast_to(_explicit_meshes.whole(part), index.shape) for part in moments]
    return sow_p.bind(y, index, *parts, layer=layer)


# `sow` as a JAX primitive: y, index, count, mean, m2 -> y
def _sow_batching(args: Sequence[Any], dims: Sequence[int | None], *, layer: Layer) -> tuple[Any, int | None]:
    """Under vmap each lane has its own index and moments, on a leading axis; y keeps its batch axis."""
    (lanes,) = {arg.shape[dim] for arg, dim in zip(args, dims, strict=True) if dim is not None}

    def in_front(arg: Any, dim: int | None) -> jax.Array:
        return jnp.broadcast_to(arg, (lanes, *arg.shape)) if dim is None else jnp.moveaxis(arg, dim, 0)

    rest = [in_front(arg, dim) for arg, dim in zip(args[1:], dims[1:], strict=True)]
    return sow_p.bind(args[0], *rest, layer=layer), dims[0]


sow_p = _internals.identity_primitive("jaxbn_sow", lambda y, *_, layer: y, _sow_batching, multiple=False)
