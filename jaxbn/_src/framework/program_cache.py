"""Programs compiled for functions of the user, such as their `call`: kept as long as those functions, and no longer.

A compiled program holds all that the function closes over: the arrays as its constants, and so the memory. `jax.jit`
holds the function that it is given weakly, but one that is a static argument, or the key of a `functools.lru_cache`,
for ever. Here the user's functions are held weakly, and the program of the same function objects is found again.
"""

import collections
import functools
import types
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax

# Programs kept at most: functions that live as long as the process, as `jaxbn.nnx.capture.run_model` does, would
# otherwise collect one for each structure of a model.
_MOST = 32
_kept: "collections.OrderedDict[Hashable, Callable[..., Any]]" = collections.OrderedDict()


class Recipe(NamedTuple):
    """How a pure function is made of functions of the user. It can be called, as the function that it makes."""

    make: Callable[..., Callable[..., Any]]  # a function of a module: (*functions, *static) -> the function
    functions: tuple[Callable[..., Any] | None, ...]
    static: tuple[Hashable, ...] = ()

    def __call__(self, *args: Any) -> Any:
        return self.make(*self.functions, *self.static)(*args)


def _itself(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def compiled(
    recipe: Recipe, wrap: Callable[..., Callable[..., Any]] = _itself, *static: Hashable
) -> Callable[..., Any]:
    """`jax.jit(wrap(recipe, *static))`, the same object each time for the same function objects and equal static parts.

    Args:
        recipe: How the function is made. Where a function of the user is no object that can be held weakly, or a static
            part cannot be hashed, nothing is kept.
        wrap: A function of a module.
        static: What else it takes.

    Returns:
        The compiled function. Hold on to the recipe while you call it.
    """
    key = (wrap, static, recipe.make, recipe.static, tuple(map(_identity, recipe.functions)))
    try:
        references = tuple(_reference(function, functools.partial(_forget, key)) for function in recipe.functions)
        found = _kept.get(key)
    except TypeError:
        return _jitted(wrap, static, recipe.make, tuple(map(_strongly, recipe.functions)), recipe.static)
    if found is None:
        found = _kept[key] = _jitted(wrap, static, recipe.make, references, recipe.static)
        if len(_kept) > _MOST:
            _kept.popitem(last=False)
    else:
        _kept.move_to_end(key)
    return found


def _jitted(wrap: Any, static: Any, make: Any, references: Sequence[Callable[[], Any]], others: Any) -> Any:
    def run(*args: Any) -> Any:
        return wrap(Recipe(make, tuple(reference() for reference in references), others), *static)(*args)

    return jax.jit(run)


def _forget(key: Hashable, _: Any) -> None:
    _kept.pop(key, None)


def _identity(function: Any) -> tuple[int, ...]:
    """Which function object it is; a method is a new object each time, its instance is not."""
    if isinstance(function, types.MethodType):
        return id(function.__self__), id(function.__func__)
    return (id(function),)


def _reference(function: Any, forget: Callable[[Any], None]) -> Callable[[], Any]:
    """A weak reference; a TypeError if there can be none."""
    if function is None:
        return _strongly(None)
    return (weakref.WeakMethod if isinstance(function, types.MethodType) else weakref.ref)(function, forget)


def _strongly(function: Any) -> Callable[[], Any]:
    return lambda: function
