"""States that take part in a capture: they run the functions of a transform themselves.

The statistics of a linen or NNX model are variables of a module, and its call can be intercepted. A model of plain
functions has no modules, only states that reach `train` and `eval`. So a capture passes states of a subclass of
`CapturedState`, and every `NormTransform` leaves its calls to them.
"""

import functools
import inspect
import weakref
from collections.abc import Mapping
from typing import Any


class CapturedState:
    """The base of the states that a capture passes to a model of plain functions."""

    def run(self, transform: Any, name: str, params: Any, x: Any, operands: Mapping[str, Any]) -> Any:
        """The call of a function of a transform on this state.

        Args:
            transform: The transform, with functions that do not look for captured states.
            name: Which function was called: `"train"` or `"eval"`.
            params: As the model passes them.
            x: The input.
            operands: The other arguments of the call.

        Returns:
            What the function returns; a new state is a captured state of the same structure.
        """
        raise NotImplementedError  # abstract: the states of a capture define it


# The transform of each function that looks for captured states. Not an attribute of the function: `functools.wraps`
# copies attributes to functions of other transforms.
_TRANSFORM_OF: "weakref.WeakKeyDictionary[Any, Any]" = weakref.WeakKeyDictionary()


def capturable(transform: Any) -> Any:
    """The transform with a `train` and an `eval` that leave calls with captured states to these states."""
    plain = without_capture(transform)
    if _of(transform.train) == _of(transform.eval) == plain:
        return transform  # the same function objects, so that `jax.jit` finds their compiled programs
    seen = [_looking_for_captured(plain, field, part) for field, part in zip(plain._fields, plain, strict=True)]
    return tuple.__new__(type(transform), seen)


def without_capture(transform: Any) -> Any:
    """The transform with functions that do not look for captured states."""
    fields = zip(transform._fields, transform, strict=True)
    functions = [part if _of(part) is None else getattr(_of(part), field) for field, part in fields]
    return tuple.__new__(type(transform), functions)


def _of(function: Any) -> Any:
    return _TRANSFORM_OF.get(function) if inspect.isfunction(function) else None


def _looking_for_captured(transform: Any, field: str, function: Any) -> Any:
    # JAX rebuilds tuples with all kinds of objects in the place of the leaves, so not every part is a function.
    if field not in ("train", "eval") or not callable(function):
        return function

    @functools.wraps(function)
    def run(params: Any, state: Any, x: Any, **operands: Any) -> Any:
        if isinstance(state, CapturedState):
            return state.run(transform, field, params, x, operands)
        return function(params, state, x, **operands)

    _TRANSFORM_OF[run] = transform
    return run
