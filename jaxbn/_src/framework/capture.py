"""The steps of a capture, which are the same in all frameworks: hook the layers, harvest, remove the hooks."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from jaxbn._src.framework.layers import (
    Layer,
    Measured,
    Weights,
    carry_weights,
    count_examples,
    example_weights,
    measured,
)
from jaxbn._src.framework.mixing import Mixture
from jaxbn._src.tracing import harvest as _harvest


class Hooked(NamedTuple):
    """A model in a call, with hooks on its layers that measure and sow."""

    call: Callable[[Any, Any], Any]  # (arrays, batch) -> outputs
    arrays: Any
    whole: Mapping[Layer, jax.Array]  # the positions of the statistics of every layer
    unhooked: Callable[[Any], Any]  # removes the hooks from the outputs, which may hold the model or its variables


# (call, model, make, carried) -> Hooked; `make(path, shape)` is a layer, and `carried(layer)` the weights of the
# examples for it, None without weights
Hook = Callable[[Callable[[Any, Any], Any], Any, Callable[..., Layer], Callable[[Layer], Any] | None], Hooked]


def capture(
    hook: Hook, call: Callable[[Any, Any], Any], mode: str | Mixture, weights: Weights | None, examples: bool
) -> Callable[[Any, Any], tuple[Any, Measured]]:
    """Makes a function that also returns the measurements of every layer."""

    def captured(model: Any, batch: Any) -> tuple[Any, Measured]:
        make = functools.partial(Layer, mode=mode, examples=count_examples(batch) if examples else None)
        carried = None
        if weights is not None:
            carried = functools.partial(carry_weights, example_weights(weights, batch))
        hooked = hook(call, model, make, carried)
        outputs, records = _harvest.harvest(hooked.call)(hooked.arrays, batch)
        found = measured(records, hooked.whole, calls=examples)
        return hooked.unhooked(outputs), found

    return captured
