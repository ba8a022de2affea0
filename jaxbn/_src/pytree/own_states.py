"""The capture of the calls that states of methods are passed to."""

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import jax

from jaxbn._src.framework.called import CalledNorm, Operands
from jaxbn._src.framework.layers import Slot, captured_call
from jaxbn._src.framework.method import Method, evaluate
from jaxbn._src.methods.protocol import NormTransform, State
from jaxbn._src.pytree.carried import Carrier, carrying, map_states, own_states, plain_states
from jaxbn._src.pytree.library import Library


def _with_states(tree: Any, states: Mapping[str, State]) -> Any:
    def new(path: str, state: Any) -> Any:
        # The method may be known by the names of the statistics only, and its state be of another class.
        given = states[path]._asdict() if path in states else {}
        return state._replace(**{name: leaf for name, leaf in given.items() if leaf is not None})

    return map_states(new, tree)


def _with_slots(tree: Any, slots: Mapping[str, Slot]) -> Any:
    return map_states(lambda path, state: carrying(state, slots[path], _Captured), tree)


class _Captured(Carrier):
    """A state during a capture."""

    slot: Slot

    def run(self, transform: Any, name: str, params: Any, x: Any, operands: Mapping[str, Any]) -> Any:
        """The call of `train` or `eval` during a capture."""
        after, slot = [self.plain], self.slot

        def as_called() -> Any:
            if name == "eval":
                return transform.eval(params, self.plain, x, **operands)
            y, after[0] = transform.train(params, self.plain, x, **operands)
            return y

        y = captured_call(
            slot,
            _method_of(transform),
            name == "eval",
            _called_norm(transform, slot.layer.path, params, self.plain),
            _operands(x, operands),
            as_called,
        )
        return y if name == "eval" else (y, self.made(tuple(after[0]), slot))


def _called_norm(transform: NormTransform[Any, Any], path: str, params: Any, state: State) -> CalledNorm:
    normalize = functools.partial(evaluate, transform, params)
    settings = transform.settings
    return CalledNorm(path, transform, state, normalize, settings.axis, settings.axis_name, settings.axis_index_groups)


def _operands(x: Any, given: Mapping[str, Any]) -> Operands:
    # All others say which statistics a value belongs to.
    where = {name: value for name, value in given.items() if name not in ("mask", "residual")}
    return Operands(jax.numpy.asarray(x), given.get("mask"), given.get("residual"), where)


def _method_of(transform: NormTransform[Any, Any]) -> Method:
    """The method of a transform, in the form in which layers of Flax tell theirs."""
    # A nested function is named after the factory that made it.
    name = getattr(inspect.unwrap(transform.train), "__qualname__", type(transform).__name__).split(".")[0]

    def make(**settings: Any) -> NormTransform[Any, Any]:
        return transform

    make.__name__ = name
    return Method(make, **vars(transform.settings))


OWN_STATES = Library(own_states, _with_states, _with_slots, plain_states)
