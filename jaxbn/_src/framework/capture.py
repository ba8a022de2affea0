"""The steps of a capture, which are the same in all frameworks: hook the layers, harvest, remove the hooks."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

from jaxbn._src.framework.framework import Call, Captured
from jaxbn._src.framework.layers import (
    Layer,
    Measured,
    Mode,
    Slot,
    Weights,
    carry_weights,
    count_examples,
    example_weights,
    measured,
)
from jaxbn._src.tracing import harvest as _harvest


class MakeSlot(Protocol):
    """Makes the slot of a layer from its path and the shape of its statistics."""

    def __call__(self, path: str, shape: tuple[int, ...]) -> Slot:
        """The slot, for the mode and the batch of this capture."""


class Hooked(NamedTuple):
    """A model in a call, with hooks on its layers that measure and sow."""

    call: Call  # (arrays, batch) -> outputs
    arrays: Any
    slots: Iterable[Slot]  # of every layer
    unhooked: Callable[[Any], Any]  # removes the hooks from the outputs, which may hold the model or its variables


def capture(
    hook: Callable[[Call, Any, MakeSlot], Hooked],
    call: Call,
    mode: Mode,
    weights: Weights | None,
    examples: bool,
) -> Captured:
    """Makes a function that also returns the measurements of every layer; `hook` is the part of the framework."""

    def captured(model: Any, batch: Any) -> tuple[Any, Measured]:
        count = count_examples(batch) if examples else None
        per_example = None if weights is None else example_weights(weights, batch)

        def make(path: str, shape: tuple[int, ...]) -> Slot:
            layer = Layer(path, shape, mode, count)
            return Slot(layer.positions(), None if per_example is None else carry_weights(per_example, layer), layer)

        hooked = hook(call, model, make)
        outputs, records = _harvest.harvest(hooked.call)(hooked.arrays, batch)
        found = measured(records, {slot.layer: slot.index for slot in hooked.slots}, calls=examples)
        return hooked.unhooked(outputs), found

    return captured
