"""Records, the output of `harvest`: one for each executed `sow`; and the moments of each layer computed from them."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxbn._src.numerics import moments as _moments
from jaxbn._src.tracing import sow as _sow


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Record:
    """One `sow`, or a stack of them; a pytree with a static layer, so jit, scan and so on can return it."""

    layer: _sow.Layer = dataclasses.field(metadata={"static": True})
    index: jax.Array  # i32[..., C]: flat positions in the layer; arbitrary where the count is 0
    moments: _moments.Moments  # f32[..., C] each


def collect(
    records: Iterable[Record], whole: Mapping[Any, jax.Array | None] | None = None
) -> dict[Any, _moments.Moments]:
    """Exact pooled moments, flat `[layer.size]`, of each layer with a record; 0 at positions without one.

    Args:
        records: The records that :func:`harvest` returned.
        whole: The index `arange(size)`, of any shape, that entered the program for each layer. If a record has this
            very array, no transformation changed it on its way, so the moments are in place and need no scatter.
    """
    pooled = {}
    for layer, group in by_layer(records).items():
        in_place = whole is not None and all(record.index is whole.get(layer) for record in group)
        pooled[layer] = jax.tree.map(jnp.ravel, pool(group)) if in_place else pool_by_index(group, layer.size)
    return pooled


def by_layer(records: Iterable[Record]) -> dict[Any, list[Record]]:
    """The records of each layer."""
    found: dict[Any, list[Record]] = {}
    for record in records:
        found.setdefault(record.layer, []).append(record)
    return found


def by_call(records: Sequence[Record], size: int) -> _moments.Moments | None:
    """The moments of each call of a layer, `[K, size]`, in the order of the calls; None if there is only one call.

    Calls whose moments are already pooled, by a while loop or over the devices of a shard_map, count as one. `K` is the
    average number of calls per position; the number differs between positions only if a program calls parts of a
    stacked layer.
    """
    index, *parts = _columns(records)
    calls = index.size // size if size else 0
    if calls < 2:
        return None
    # Sort by position, stably; the rank within equal positions is then the number of the call.
    order = jnp.argsort(index, stable=True)
    ordered = index[order]
    call = jnp.arange(index.size) - jnp.searchsorted(ordered, ordered)
    place = call * size + ordered

    def placed(values: jax.Array) -> jax.Array:
        return jnp.zeros(calls * size, values.dtype).at[place].set(values[order], mode="drop").reshape(calls, size)

    return _moments.Moments(*map(placed, parts))


def _columns(records: Sequence[Record]) -> list[jax.Array]:
    """Index, count, mean and m2 of all records, flat."""
    columns = zip(*((record.index, *record.moments) for record in records), strict=True)
    return [jnp.concatenate([jnp.ravel(part) for part in column]) for column in columns]


def pool(records: Sequence[Record]) -> _moments.Moments:
    """The pooled moments of records that all have the same index."""
    parts = [record.moments for record in records]
    return parts[0] if len(parts) == 1 else _moments.pool(jax.tree.map(lambda *part: jnp.stack(part), *parts))


def pool_by_index(records: Sequence[Record], size: int) -> _moments.Moments:
    """Computes `moments.pool`, but sums over equal positions instead of over parts."""
    index, count, mean, m2 = _columns(records)

    def total(values: jax.Array) -> jax.Array:
        return jnp.zeros(size, values.dtype).at[index].add(values)

    count_total = total(count)
    weight = (count / jnp.where(count_total > 0, count_total, 1)[index]).astype(mean.dtype)
    # Sum about a first estimate of the mean: at a mean of 1e4, its rounding error would swamp a deviation of 1e-2.
    origin = total(weight * mean)
    offset = mean - origin[index]
    correction = total(weight * offset)
    deviation = jnp.abs(offset - correction[index])  # real for complex means too
    return _moments.Moments(count_total, origin + correction, total(m2 + count * jnp.square(deviation)))
