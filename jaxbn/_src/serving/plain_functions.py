"""Models of plain functions for `export`: a call that raises an error if it trains a layer."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxbn._src.methods.protocol import holds_states
from jaxbn._src.pytree.carried import Carrier, carrying, map_states, plain_states
from jaxbn._src.pytree.framework import PYTREE
from jaxbn._src.pytree.states import foreign_layers


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Refusal:
    """The slot of a state; it holds the error that is raised if the layer trains."""

    message: str


class _Evaluating(Carrier):
    """A state that only `eval` takes."""

    def run(self, transform: Any, name: str, params: Any, x: Any, operands: Mapping[str, Any]) -> Any:
        """The call of a function of a transform."""
        if name != "eval":
            raise ValueError(self.slot.message)
        return transform.eval(params, self.plain, x, **operands)


def is_model(tree: Any) -> bool:
    """Whether this is the pytree of a model of plain functions.

    Raises:
        TypeError: If it holds layers of other libraries.
    """
    if foreign := foreign_layers(tree):
        raise TypeError(
            f"{foreign[0]!r} is a layer of Equinox or Haiku, of which it is not known here whether the call trains it. "
            f"Export the function itself: jax.export.export(jax.jit(lambda x: call(frozen.variables, x)))(example)."
        )
    return holds_states(tree)


def as_function(call: Callable[..., Any], tree: Any, trains: str) -> tuple[Callable[[Any, Any], Any], Any]:
    """A pure function of arrays and a batch, and the arrays.

    Args:
        call: Runs the model.
        tree: A pytree with states of methods. Leaves that are not arrays become a part of the program.
        trains: The message of the error if a layer trains, with a place for its path.

    Returns:
        The function, and the arrays of the tree.
    """
    structure, arrays = PYTREE.split(tree)

    def refusing(path: str, state: Any) -> Any:
        return carrying(state, _Refusal(trains.format(path)), _Evaluating)

    def run(arrays: Any, batch: Any) -> Any:
        return plain_states(call(map_states(refusing, PYTREE.merge(structure, arrays)), batch))

    return run, arrays
