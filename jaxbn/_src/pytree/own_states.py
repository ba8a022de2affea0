"""The states of methods in a pytree: finds them by their type, and captures the calls that they are passed to.

A captured state is a NamedTuple with the same fields that also holds a slot. Its parts are leaves of one node, so that
transformations slice statistics and positions together, and the static part of the node makes jit caches distinguish
calls with and without a capture. `train` and `eval` of every transform leave a call with a captured state to the state.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from jaxbn._src.framework.called import CalledNorm, Operands
from jaxbn._src.framework.layers import Slot, captured_call
from jaxbn._src.framework.method import Method, evaluate
from jaxbn._src.methods.captured import CapturedState
from jaxbn._src.methods.protocol import NormTransform, State, is_state
from jaxbn._src.pytree.library import Library, path_of


def _find(tree: Any) -> dict[str, State]:
    """The states by path, in the order of the tree."""
    found = [(keys, node) for keys, node in jax.tree.leaves_with_path(tree, is_leaf=is_state) if is_state(node)]
    paths = [path_of(keys) for keys, _ in found]
    # The key "a/b" and the keys "a", "b" are written alike; then all paths are written in full.
    if len(set(paths)) < len(paths):
        paths = [jax.tree_util.keystr(keys) for keys, _ in found]
    return dict(zip(paths, (node for _, node in found), strict=True))


def _map(function: Callable[[str, Any], Any], tree: Any) -> Any:
    """A new tree with `function(path, state)` in the place of each state."""
    paths = iter(_find(tree))
    return jax.tree.map(lambda node: function(next(paths), node) if is_state(node) else node, tree, is_leaf=is_state)


def _with_states(tree: Any, states: Mapping[str, State]) -> Any:
    def new(path: str, state: Any) -> Any:
        # The method may be known by the names of the statistics only, and its state be of another class.
        given = states[path]._asdict() if path in states else {}
        return state._replace(**{name: leaf for name, leaf in given.items() if leaf is not None})

    return _map(new, tree)


def _with_slots(tree: Any, slots: Mapping[str, Slot]) -> Any:
    def captured(path: str, state: Any) -> Any:
        cls: Any = state.plain_class if isinstance(state, _Captured) else type(state)  # in a capture inside a call
        return _captured_class(cls).made(tuple(state), slots[path])

    return _map(captured, tree)


def _without_slots(tree: Any) -> Any:
    def is_captured(node: Any) -> bool:
        return isinstance(node, CapturedState)

    return jax.tree.map(lambda node: node.plain if is_captured(node) else node, tree, is_leaf=is_captured)


class _Captured(CapturedState):
    """A captured state; `_captured_class` mixes it with the class of the state."""

    plain_class: Any  # of the state
    slot: Slot

    @classmethod
    def made(cls, leaves: Sequence[Any], slot: Slot) -> Any:
        """A captured state of these statistics."""
        state: Any = tuple.__new__(cls, leaves)  # type: ignore[type-var]  # the classes in use derive from tuple
        state.slot = slot
        return state

    @property
    def plain(self) -> Any:
        """The state without the slot."""
        leaves: Any = self
        return tuple.__new__(self.plain_class, leaves)

    def _replace(self, **changes: Any) -> Any:
        return self.made(tuple(self.plain._replace(**changes)), self.slot)

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


@functools.cache
def _captured_class(cls: Any) -> Any:
    """The class of the captured states of a class of states, registered as a pytree."""
    made = type(f"Captured{cls.__name__}", (_Captured, cls), {"plain_class": cls})

    def flatten(state: Any) -> tuple[list[tuple[Any, Any]], None]:
        named = [*zip(cls._fields, state, strict=True), ("slot", state.slot)]
        return [(jax.tree_util.GetAttrKey(name), leaf) for name, leaf in named], None

    def unflatten(_: None, leaves: Iterable[Any]) -> Any:
        *statistics, slot = leaves
        return made.made(statistics, slot)  # type: ignore[attr-defined]  # of _Captured

    jax.tree_util.register_pytree_with_keys(made, flatten, unflatten)
    return made


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


OWN_STATES = Library(_find, _with_states, _with_slots, _without_slots)
