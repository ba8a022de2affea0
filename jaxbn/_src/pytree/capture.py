"""The capture hook of plain JAX: the moments of the inputs of all normalization layers, without changes to the model.

As in linen, the tree gets a slot next to the statistics of each layer. How a call finds it depends on the library.
"""

import contextlib
from collections.abc import Callable
from typing import Any

from jaxbn._src.framework import capture as _capture
from jaxbn._src.framework.capture import Hooked, MakeSlot
from jaxbn._src.framework.framework import Call, with_moments
from jaxbn._src.framework.layers import Measured, Mode, Weights, check_mode
from jaxbn._src.numerics import moments as _moments
from jaxbn._src.pytree.states import LIBRARIES, find_states


def capture_moments(
    call: Call, *, mode: str = "batch", weights: Weights | None = None
) -> Callable[[Any, Any], tuple[Any, dict[str, _moments.Moments]]]:
    """Makes a function that also returns the moments of the input of every normalization layer of a plain JAX model.

    Use it for a loop of your own, or for moments in a loss; `postproc` is the ready-made loop. Pure, and may be jitted.
    Both results are differentiable, as :func:`jaxbn.linen.capture_moments` describes.

    Args:
        call: Runs the model, `(state, batch) -> outputs`, see :func:`jaxbn.postproc`.
        mode: The statistics that the layers normalize with, whether the model calls `train` or `eval`: `"batch"`,
            those of the batch; `"eval"`, those of the state; `"as_called"`, as the model calls them. Except in the
            last, the states that `train` returns are those that it was given.
        weights: `batch -> [N]`, booleans or real weights of the N examples along the leading axis of every layer's
            input, such as 0 for padding. They multiply the mask that the model passes to a layer.

    Returns:
        A function `(state, batch) -> (outputs, moments)`. `moments` maps the path of each state in the tree, such as
        `"blocks/0/norm"`, to `Moments` in the shape of its statistics; the count is 0 if the layer was not reached.

    Raises:
        ValueError: If `mode` is unknown; in the function, if there is no state of a method in the tree.

    Example:
        >>> bn = jaxbn.batch_norm()
        >>> params, state = bn.init(1)
        >>> call = lambda state, x: bn.eval(params, state["norm"], x)
        >>> _, moments = jaxbn.capture_moments(call)({"norm": state}, jnp.array([[1.0], [3.0]]))
        >>> float(moments["norm"].mean[0])
        2.0
    """
    check_mode(mode)
    return with_moments(capture(call, mode=mode, weights=weights))


def capture(
    call: Call, *, mode: Mode, weights: Weights | None = None, examples: bool = False
) -> Callable[[Any, Any], tuple[Any, Measured]]:
    """The capture hook of the framework: as `capture_moments`, but returns all measurements."""
    return _capture.capture(_hook, call, mode, weights, examples)


def _hook(call: Call, tree: Any, make: MakeSlot) -> Hooked:
    slots = {path: make(path, state.mean.shape) for path, state in find_states(tree).items()}
    for library in LIBRARIES:
        tree = library.with_slots(tree, slots)

    def run(tree: Any, batch: Any) -> Any:
        with contextlib.ExitStack() as stack:
            for library in LIBRARIES:
                stack.enter_context(library.capturing())
            return call(tree, batch)

    return Hooked(run, tree, slots.values(), _without_slots)


def _without_slots(outputs: Any) -> Any:
    for library in LIBRARIES:
        outputs = library.without_slots(outputs)  # the call may return states
    return outputs
