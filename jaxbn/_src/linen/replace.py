"""Replacement of normalization layers in a linen model without changes to its source.

The model gets a subclass whose calls run under an interceptor. At the call of a normalization layer, it makes the new
layer from the fields of the old one, in the scope of the old one, and calls it instead. Paths do not change, and
further statistics of the new method appear among the others, in `init` too. A flag in the scopes, which all
transformations of linen pass on and `nn.jit` compiles anew for, tells other interceptors that a layer is replaced.
"""

import dataclasses
import functools
import inspect
import secrets
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import flax.linen as nn

from jaxbn._src.framework.conversion import as_partial, carried
from jaxbn._src.framework.selection import is_at_or_below, select
from jaxbn._src.framework.unknown_layers import Watch
from jaxbn._src.linen.capture import REPLACED, calls_layer, set_flags, statistics_of, successor_of, watched
from jaxbn._src.linen.layers import STATISTICS, Norm
from jaxbn._src.linen.registry import REGISTER, Adapted, as_norm, evaluates
from jaxbn._src.linen.variables import find_layers

Net = TypeVar("Net", bound=nn.Module)

_SUCCESSOR = "_jaxbn_successor"  # attribute of a class with replaced layers


def replace(net: Net, layer: Callable[..., nn.Module], paths: str | Sequence[str] = "") -> Net:
    """Replaces the normalization layers of a model without changes to its source.

    The new layers get the fields that all methods share: momentum, epsilon, axes, dtypes, initializers,
    synchronization. Paths do not change, so parameters and statistics of a checkpoint fit; :func:`convert_norms` adds
    the further statistics of the method. Pass `flax.linen.BatchNorm` to go back. It works inside `nn.jit`, `nn.remat`,
    `nn.scan` and `nn.vmap`, and in a part of another model.

    Args:
        net: The model.
        layer: A class, such as `jaxbn.linen.BatchRenorm`, or a `functools.partial` of one, whose arguments take
            precedence over the fields of the old layer.
        paths: One or several paths of layers, or of modules to replace all their layers, such as `"backbone"` or
            `"Block_0/BatchNorm_1"`. `""` is the whole model.

    Returns:
        A model with the same fields and methods, an instance of the class of `net`. `jaxbn.linen.summary(variables,
        net.apply, x)` lists its layers.

    Raises:
        TypeError: If `layer` is not a normalization layer.
        ValueError: When called, if there is no layer at a path or below it, or one has an activation, which `layer`
            does not support. A module of an unknown class, see :func:`register_batch_norm`, is an error too, or a
            warning if there are known layers.

    Example:
        >>> net = flax.linen.Sequential([flax.linen.Dense(2), flax.linen.BatchNorm(use_running_average=False)])
        >>> x = jnp.ones((4, 3))
        >>> trained = net.init(jax.random.key(0), x)
        >>> net = jaxbn.linen.replace(net, functools.partial(jaxbn.linen.BatchRenorm, **jaxbn.renorm_ramp(warmup=500)))
        >>> variables = jaxbn.linen.convert_norms(trained, like=net.init(jax.random.key(0), x))
        >>> y, updates = net.apply(variables, x, mutable=["batch_stats"])
        >>> updates["batch_stats"]["layers_1"]["step"]
        Array(1., dtype=float32)
    """
    if not isinstance(net, nn.Module):
        raise TypeError(
            f"A {type(net).__name__} was given where a linen model belongs: pass the module, such as Net()."
        )
    bound = as_partial(layer, (Norm, nn.BatchNorm))
    fields = {field.name: getattr(net, field.name) for field in dataclasses.fields(net) if field.init}
    earlier = getattr(net, _SUCCESSOR, None)
    # A second replacement starts from the class of the user again, and applies the first one by `earlier`.
    cls = type(net) if earlier is None else type(net).__bases__[0]
    made: Net = _class_with(_Successor(bound, paths, earlier), cls)(**fields | {"parent": None})
    return made


class _Successor:
    """The new layer and the paths to replace. A unique token distinguishes replacements, also for `nn.jit`."""

    def __init__(self, layer: functools.partial[Any], paths: str | Sequence[str], earlier: "_Successor | None"):
        self.layer = layer
        self.paths = [paths] if isinstance(paths, str) else list(paths)
        self.earlier = earlier  # an earlier replacement in the same model, which is applied first
        self.token = secrets.token_hex()
        self.watch = Watch(REGISTER)

    def __hash__(self) -> int:
        return hash(self.token)

    def check(self, variables: Any) -> None:
        """Raises a ValueError for a path without layers."""
        if self.paths != [""] and STATISTICS in variables:
            select(self.paths, find_layers(variables))
        if self.earlier is not None:
            self.earlier.check(variables)

    def covers(self, path: str) -> bool:
        """Whether the layer at the path, as seen from the model, is replaced."""
        return self._is_meant(path) or self.earlier is not None and self.earlier.covers(path)

    def make(self, old: Any, path: str) -> Any:
        """Makes the new layer in the scope of the old one, where it finds its variables."""
        if self.earlier is not None and self.earlier.covers(path):
            old = self.earlier.make(old, path)
        if not self._is_meant(path):
            return old
        old, cls = as_norm(old), cast(Any, self.layer.func)
        shared = Norm if issubclass(cls, Norm) else nn.BatchNorm
        names = {field.name for field in dataclasses.fields(shared)} - {"parent", "name"}
        if isinstance(old, Adapted):  # the flag is passed to the call
            names -= {"use_running_average"} | ({"momentum"} if old.momentum is None else set())
        # A rewound scope lets the new layer use the variable names that the old one has reserved.
        scope = old.scope.rewound()
        scope.flags = scope.flags.copy({REPLACED: (None, 0)})  # so that it is not replaced again
        return cls(**carried(path, old, names, self.layer.keywords), parent=scope)

    def _is_meant(self, path: str) -> bool:
        return any(is_at_or_below(path, given) for given in self.paths)


def _class_with(successor: _Successor, cls: Any) -> Any:
    """A subclass that sets the flag in its scopes and runs all its methods under the interceptor."""

    def bound(self: Any) -> None:
        cls.__post_init__(self)
        if self.scope is not None:
            set_flags(self, {REPLACED: (successor, len(self.path))})

    fields = {field.name for field in dataclasses.fields(cls)}
    own = {name for name in dir(cls) if not hasattr(nn.Module, name) or name == "__call__"} - fields
    methods = [name for name in own if inspect.isfunction(inspect.getattr_static(cls, name))]
    # Of Flax's own methods, `apply` and `init_with_output` are enough: `init` calls the latter.
    members = {name: _intercepted(successor, getattr(cls, name)) for name in (*methods, "apply", "init_with_output")}
    members |= {"__post_init__": bound, _SUCCESSOR: successor, "__module__": cls.__module__}
    return type(cls.__name__, (cls,), members)


def _intercepted(successor: _Successor, method: Any) -> Any:
    @nn.nowrap
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.scope is not None and not self.is_initializing():
            successor.check(self.variables)
        with successor.watch, nn.intercept_methods(functools.partial(_intercept, successor.watch)):
            return method(self, *args, **kwargs)

    # `make_steps` looks for `train` in the signature of the call.
    run.__signature__ = inspect.signature(method)  # type: ignore[attr-defined]  # of functions mypy does not know it
    run.__doc__ = method.__doc__
    return run


def _intercept(watch: Watch, next_call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    module: Any = context.module
    make = None if module.scope is None else successor_of(module)
    if make is None:
        return next_call(*args, **kwargs)
    if not calls_layer(context):
        return watched(watch, module, lambda: next_call(*args, **kwargs), lambda: bool(statistics_of(module)))
    watch.serve("/".join(module.path))
    new, old = make(), as_norm(module, args, kwargs)
    if new is not module and isinstance(old, Adapted):
        # The model calls the layer as its registered class defines it; the new layer takes the arguments of Flax.
        args, kwargs = old.registered.translated(old.bound, evaluates(module, args, kwargs))
    return new(*args, **kwargs)
