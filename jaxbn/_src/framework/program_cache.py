"""A cache of compiled programs that does not outlive the functions of the user that they were compiled for.

A compiled program keeps the arrays that the function closes over, and so their memory. `jax.jit` holds its function
weakly, but a function that is a static argument or a key of `functools.lru_cache` is held forever. Here functions of
the user are held weakly, and the same function objects find their program again.
"""

import collections
import functools
import types
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax

# Maximum number of programs. Functions that live as long as the process, such as `run_model` of NNX, would otherwise
# collect one program for each structure of a model.
_MOST = 32
_kept: "collections.OrderedDict[Hashable, Any]" = collections.OrderedDict()


class Recipe(NamedTuple):
    """A pure function, described by the functions of the user and static values that it is made of."""

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
        recipe: The function. It is not cached if a function of the user cannot be held weakly, or a static value cannot
            be hashed.
        wrap: A function defined in a module.
        static: Further static arguments of `wrap`.

    Returns:
        The compiled function. Keep a reference to the recipe while you call it.
    """
    found: Callable[..., Any] = cached(jax.jit, recipe, wrap, *static)
    return found


def cached(make: Callable[..., Any], recipe: Recipe, wrap: Callable[..., Any] = _itself, *static: Hashable) -> Any:
    """`make` of the function in the place of `jax.jit`, see `compiled`; `make` is defined in a module."""
    # Python reuses the id of a function that was freed; `_forget` has removed its programs by then.
    key = (make, wrap, static, recipe.make, recipe.static, tuple(map(_identity, recipe.functions)))
    try:
        references = tuple(_reference(function, functools.partial(_forget, key)) for function in recipe.functions)
        found = _kept.get(key)
    except TypeError:
        # Not hashable, or without weak references: this program is not cached, and may hold its functions.
        return make(_running(wrap, static, recipe.make, tuple(map(_strongly, recipe.functions)), recipe.static))
    if found is None:
        found = _kept[key] = make(_running(wrap, static, recipe.make, references, recipe.static))
        if len(_kept) > _MOST:
            _kept.popitem(last=False)
    else:
        _kept.move_to_end(key)
    return found


def _running(wrap: Any, static: Any, make: Any, references: Sequence[Callable[[], Any]], others: Any) -> Any:
    def run(*args: Any) -> Any:
        return wrap(Recipe(make, tuple(reference() for reference in references), others), *static)(*args)

    return run


def _forget(key: Hashable, _: Any) -> None:
    _kept.pop(key, None)


def _identity(function: Any) -> tuple[int, ...]:
    """The identity of a function. A bound method is a new object at each access, so its instance and function count."""
    if isinstance(function, types.MethodType):
        return id(function.__self__), id(function.__func__)
    return (id(function),)


def _reference(function: Any, forget: Callable[[Any], None]) -> Callable[[], Any]:
    """A weak reference, or a TypeError if the object does not support them."""
    if function is None:
        return _strongly(None)
    return (weakref.WeakMethod if isinstance(function, types.MethodType) else weakref.ref)(function, forget)


def _strongly(function: Any) -> Callable[[], Any]:
    return lambda: function
