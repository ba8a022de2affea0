"""The values of batches between two stages: on the devices while they fit in a budget, then in host memory."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax

from jaxbn._src.framework.processes import gather

_PINNED = "pinned_host"  # memory of the host that devices copy from and to without an intermediate copy

# The part of the free device memory that the values may take, if the user gives no budget.
_SHARE = 0.5


@dataclasses.dataclass
class Kept:
    """The values of one batch."""

    values: Sequence[Any]
    places: Sequence[Any] | None  # the shardings on the devices, if the values are in host memory
    size: int  # bytes on each device; 0 in host memory


class KeptValues:
    """Keeps values of batches, within a budget of device memory.

    Args:
        memory: Bytes on each device.
    """

    def __init__(self, memory: float) -> None:
        self._free = memory

    def keep(self, values: Sequence[jax.Array]) -> Kept:
        """Keeps values that are on the devices."""
        size = sum(_bytes_on_device(value) for value in values)
        if size <= self._free:
            self._free -= size
            return Kept(values, None, size)
        places = [value.sharding for value in values]
        moved = [_to_host(value) for value in values]
        # Otherwise the values of further batches would be computed before these have left the device.
        jax.block_until_ready(moved)
        return Kept(moved, places, 0)

    def load(self, kept: Kept) -> Sequence[Any]:
        """The values on the devices."""
        return kept.values if kept.places is None else jax.device_put(list(kept.values), list(kept.places))

    def free(self, kept: Kept) -> None:
        """Returns the memory of values that are no longer used."""
        self._free += kept.size


def _bytes_on_device(value: jax.Array) -> int:
    return math.prod(value.sharding.shard_shape(value.shape)) * value.dtype.itemsize


def _to_host(value: jax.Array) -> Any:
    devices: Any = value.sharding.addressable_devices
    kinds = {memory.kind for device in devices for memory in device.addressable_memories()}
    if _PINNED in kinds:
        return jax.device_put(value, value.sharding.with_memory_kind(_PINNED))
    return jax.device_get(value)


def budget(memory: int | None) -> float:
    """The bytes to use on each device: as given, or half of the free memory; infinite where a device does not tell.

    Every process must call it. All have the same budget, because they move global arrays together.
    """
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    known = [each for each in stats if {"bytes_limit", "bytes_in_use"} <= each.keys()]
    free = _SHARE * min((each["bytes_limit"] - each["bytes_in_use"] for each in known), default=math.inf)
    own = free if memory is None else memory
    return own if jax.process_count() == 1 else min(gather(own))
