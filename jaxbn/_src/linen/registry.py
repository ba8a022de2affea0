"""Known batch norm layers in linen: Flax's, jaxbn's, those of NNX in a bridge, and registered classes."""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any, TypeVar, cast

import flax.linen as nn
import jax
from flax import nnx
from flax.core import meta

from jaxbn._src.framework import registry as _registry
from jaxbn._src.framework.norm_layer import ForeignLayer
from jaxbn._src.framework.registry import REGISTRY, Registered
from jaxbn._src.linen.layers import STATISTICS, Norm
from jaxbn._src.methods.protocol import State

Class = TypeVar("Class", bound=type[nn.Module])

REGISTER = "jaxbn.linen.register_batch_norm"
OWN_LEAVES = "jaxbn_"  # prefix of the leaves that jaxbn adds to the statistics while a model runs


def register_batch_norm(
    cls: Class,
    *,
    evaluation: Mapping[str, Any],
    mean: str = "mean",
    var: str = "var",
    scale: str = "scale",
    bias: str = "bias",
    axis: Any = "axis",
    epsilon: Any = "epsilon",
    momentum: Any = "momentum",
) -> Class:
    """Registers a class of layers as batch normalization, so that all functions of jaxbn support it.

    Use it for copies of Flax's layer and similar layers. Call it once, where the class is imported; it applies to the
    process and to subclasses. In evaluation the layer must compute `(x - mean) / sqrt(var + epsilon) * scale + bias`,
    with the statistics in the collection `batch_stats`; jaxbn runs its code with other statistics. jaxbn's layers,
    `flax.linen.BatchNorm`, and both in `flax.nnx.bridge.ToLinen` are known already.

    Args:
        cls: A class of modules whose call takes the input first. A `mask` of the call and the fields `axis_name`,
            `axis_index_groups`, `use_bias` and `use_scale` must have the meaning of Flax's layer.
        evaluation: The arguments of the call, or fields, that select evaluation, such as `{"training": False}`.
        mean: Name of the variable of the mean.
        var: Name of the variable of the variance.
        scale: Name of the parameter of the scale.
        bias: Name of the parameter of the bias.
        axis: Name of the field with the feature axis, or the axis.
        epsilon: Name of the field with epsilon, or the number.
        momentum: Name of the field with the weight of the OLD value, or the number. None: not known; then
            `move_averages` skips the layer, and `replace` uses the momentum of the new layer.

    Returns:
        The class.

    Raises:
        TypeError: If it is not a class of linen modules.
        ValueError: If the class has no such field or argument, or is registered with other arguments.

    Example:
        >>> class Norm(flax.linen.Module):
        ...     axis = -1
        ...     @flax.linen.compact
        ...     def __call__(self, x, train):
        ...         mean = self.variable("batch_stats", "mean", jnp.zeros, x.shape[-1:])
        ...         var = self.variable("batch_stats", "var", jnp.ones, x.shape[-1:])
        ...         if train:
        ...             mean.value, var.value = x.mean(0), x.var(0)
        ...         return (x - mean.value[None]) * jax.lax.rsqrt(var.value[None] + 1e-5)
        >>> _ = jaxbn.linen.register_batch_norm(Norm, evaluation={"train": False}, epsilon=1e-5, momentum=None)
        >>> data = jnp.arange(10.0)[:, None]
        >>> call = lambda variables, x: Norm().apply(variables, x, train=False)
        >>> variables, report = jaxbn.linen.postproc(call, Norm().init(jax.random.key(0), data, train=False), [data])
        >>> variables["batch_stats"]
        {'mean': Array([4.5], dtype=float32), 'var': Array([8.25], dtype=float32)}
    """
    known = {name for name in dir(cls) if not hasattr(nn.Module, name)}.union(getattr(cls, "__dataclass_fields__", ()))
    names, fields = (mean, var, scale, bias), (axis, epsilon, momentum)
    _registry.register(cls, nn.Module, evaluation, names, fields, known)
    return cls


_registry.register_flax(nn.BatchNorm, Norm, nnx.BatchNorm)


def known(module: Any) -> Registered | None:
    """The description of the class of a module, or of the class inside a bridge to NNX."""
    cls = class_inside(module) if isinstance(module, nnx.bridge.ToLinen) else type(module)
    return REGISTRY.of(cls) if isinstance(cls, type) else None


def class_inside(module: Any) -> Any:
    """The NNX class in a bridge, or the function that makes its module; None if the module is not a bridge."""
    if not isinstance(module, nnx.bridge.ToLinen):
        return None
    return getattr(module.nnx_class, "func", module.nnx_class)  # of a functools.partial


def is_call(module: Any, function: Any) -> bool:
    """Whether a function is the call of the module as a normalization layer.

    It is the call of the registered class, so that subclasses that call super().__call__ are found too.
    """
    registered = known(module)
    if registered is None:
        return False
    cls: Any = nnx.bridge.ToLinen if isinstance(module, nnx.bridge.ToLinen) else registered.cls
    return bool(function is inspect.unwrap(cls.__call__))


def evaluates(module: Any, args: Any, kwargs: Any) -> bool | None:
    """Whether this call of a layer normalizes with the running statistics; None: not known."""
    layer = as_norm(module)
    return cast(Registered, known(module)).evaluates(getattr(layer, "fields", layer), args, kwargs)


def as_norm(module: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
    """A known layer, called with these arguments, with the attributes of Flax's layer."""
    if isinstance(module, Adapted):
        return module
    registered = known(module)
    if registered is None or registered.cls in (nn.BatchNorm, Norm):
        return module
    return Adapted(module, registered, args, kwargs or {})


class Adapted(ForeignLayer):
    """A foreign layer of linen in a call."""

    def __init__(self, module: Any, registered: Registered, args: Any, kwargs: Mapping[str, Any]):
        bridged = isinstance(module, nnx.bridge.ToLinen)
        super().__init__(module, _inside(module) if bridged else module, registered, bridged, args, kwargs)
        self.scope = module.scope

    @property
    def use_scale(self) -> bool:
        """Whether it learns a scale."""
        return self._learns("scale")

    @property
    def use_bias(self) -> bool:
        """Whether it learns a bias."""
        return self._learns("bias")

    def _learns(self, name: str) -> bool:
        given = getattr(self.fields, f"use_{name}", None)
        # Without a field for it, the variables tell. In `init` they may not exist yet.
        found = self.module.is_initializing() or self.module.has_variable("params", self.registered.names[name])
        return bool(found if given is None else given)

    @property
    def variables(self) -> dict[str, Any]:
        """Its variables under the names of Flax's layer."""
        return in_flax_names(self.registered, plain_variables(self.module))

    def normalize(self, state: State, x: jax.Array, **arguments: Any) -> jax.Array:
        """Runs its own call in evaluation, on a detached layer of the same fields."""
        fields, flags = self.registered.split_evaluation(lambda name: not self.bridged and hasattr(self.module, name))
        bound, variables = self.call_with(x, arguments, fields, flags), plain_variables(self.module)
        held = variables[STATISTICS]
        new = {name: meta.replace_boxed(held[name], leaf) for name, leaf in self.own_names(state).items()}
        y = self._detached(fields).apply(variables | {STATISTICS: held | new}, *bound.args, **bound.kwargs)
        return cast(jax.Array, y)  # as nothing is mutable

    def _detached(self, fields: Mapping[str, Any]) -> nn.Module:
        if self.bridged:
            return self.module.clone(parent=None)
        # Not the class of the module: a subclass may call this layer from its own call, which must not run again.
        cls: Any = self.registered.cls
        names = {f.name for f in dataclasses.fields(cls) if f.init} - {"parent", "name"}
        return cls(**{name: getattr(self.module, name) for name in names} | dict(fields), parent=None)


def in_flax_names(registered: Registered, variables: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of a layer under the names of Flax's layer."""
    names = {own: name for name, own in registered.names.items()}
    return {
        collection: {names.get(own, own): leaf for own, leaf in leaves.items()}
        for collection, leaves in variables.items()
    }


def _inside(module: Any) -> Any:
    """The NNX layer in a bridge, as shapes."""

    def make() -> Any:
        # Only shapes are computed, so the seed does not matter.
        rngs = {} if module.skip_rng else {"rngs": nnx.Rngs(0)}
        return module.nnx_class(*module.args, **module.kwargs, **rngs)

    return nnx.eval_shape(make)


def plain_variables(module: Any) -> dict[str, Any]:
    """The variables of a bound module without the leaves that jaxbn added."""

    def plain(tree: Any) -> Any:
        if not isinstance(tree, Mapping):
            return tree
        return {key: plain(value) for key, value in tree.items() if not str(key).startswith(OWN_LEAVES)}

    return plain(module.variables)


def run_bridge(module: Any, args: Any, kwargs: Any) -> Any:
    """Runs a bridge to NNX, which accepts no variables other than those of its module."""
    mutable = [name for name in module.variables if module.is_mutable_collection(name)]
    # A detached module has no scope, so random keys and updates are passed explicitly.
    rngs = {name: module.make_rng(name) for name in module.scope.rngs}
    y, updates = module.clone(parent=None).apply(plain_variables(module), *args, **kwargs, rngs=rngs, mutable=mutable)
    for collection, leaves in updates.items():
        for name, leaf in leaves.items():
            module.put_variable(collection, name, leaf)
    return y
