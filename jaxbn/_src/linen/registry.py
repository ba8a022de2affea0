"""Layers of linen that are batch norm: Flax's, jaxbn's, those of NNX in a bridge, and those that users register."""

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
from jaxbn._src.linen.modules import STATISTICS, Norm
from jaxbn._src.methods.protocol import State

Class = TypeVar("Class", bound=type[nn.Module])

REGISTER = "jaxbn.linen.register_batch_norm"
OWN_LEAVES = "jaxbn_"  # how the names begin of what rides beside statistics while a model is run


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
    """Says that a class of layers is batch normalization, so that all functions of jaxbn serve it.

    For copies of Flax's layer and layers like it. Call it once, where the class is imported; it holds for the process,
    for subclasses too. In evaluation the layer must compute `(x - mean) / sqrt(var + epsilon) * scale + bias`, with the
    statistics in the collection `batch_stats`. Its own code runs with the statistics that are wanted. jaxbn's layers,
    `flax.linen.BatchNorm`, and both in `flax.nnx.bridge.ToLinen` are known.

    Args:
        cls: A class of modules, whose call takes the input first. A `mask` of the call, and fields `axis_name`,
            `axis_index_groups`, `use_bias` and `use_scale`, mean what they mean in Flax's layer.
        evaluation: What makes a call evaluate, arguments of the call or fields: `{"training": False}`, say.
        mean: The name of the variable.
        var: Likewise.
        scale: The name of the parameter.
        bias: Likewise.
        axis: The name of the field, or the feature axis itself.
        epsilon: The name of the field, or the number.
        momentum: The name of the field with the weight of the OLD value, or the number. None: not known, so
            that `move_averages` leaves its averages, and `replace` takes that of the new layer.

    Returns:
        The class.

    Raises:
        TypeError: If it is no class of linen modules.
        ValueError: If the class has no such field or argument, or is registered as something else.

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
    """What is known of the class of a module; of that inside, if it is a bridge to NNX."""
    cls = class_inside(module) if isinstance(module, nnx.bridge.ToLinen) else type(module)
    return REGISTRY.of(cls) if isinstance(cls, type) else None


def class_inside(module: Any) -> Any:
    """The class of NNX in a bridge, or what makes its module; None if the module is no bridge."""
    if not isinstance(module, nnx.bridge.ToLinen):
        return None
    return getattr(module.nnx_class, "func", module.nnx_class)  # of a functools.partial


def is_call(module: Any, function: Any) -> bool:
    """Whether a plain function of a class is the call of the module as a normalization layer.

    It is that of the class that is known, so that a subclass which calls super().__call__ is met as well.
    """
    registered = known(module)
    if registered is None:
        return False
    cls: Any = nnx.bridge.ToLinen if isinstance(module, nnx.bridge.ToLinen) else registered.cls
    return bool(function is inspect.unwrap(cls.__call__))


def evaluates(module: Any, args: Any, kwargs: Any) -> bool | None:
    """Whether this call of a layer normalizes with the stored statistics; None: nothing says so."""
    layer = as_norm(module)
    return cast(Registered, known(module)).evaluates(getattr(layer, "fields", layer), args, kwargs)


def as_norm(module: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
    """A layer that is known, called with these arguments, as one with the attributes of Flax's."""
    if isinstance(module, Adapted):
        return module
    registered = known(module)
    if registered is None or registered.cls in (nn.BatchNorm, Norm):
        return module
    return Adapted(module, registered, args, kwargs or {})


class Adapted(ForeignLayer):
    """A layer of another class, in a call, with the attributes of Flax's layer."""

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
        said = getattr(self.fields, f"use_{name}", None)
        found = self.module.is_initializing() or self.module.has_variable("params", self.registered.names[name])
        return bool(found if said is None else said)

    @property
    def variables(self) -> dict[str, Any]:
        """Its variables, by the names that they have in Flax's layer."""
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
        cls: Any = self.registered.cls
        names = {f.name for f in dataclasses.fields(cls) if f.init} - {"parent", "name"}
        return cls(**{name: getattr(self.module, name) for name in names} | dict(fields), parent=None)


def in_flax_names(registered: Registered, variables: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of a layer, by the names that they have in Flax's."""
    names = {own: name for name, own in registered.names.items()}
    return {
        collection: {names.get(own, own): leaf for own, leaf in leaves.items()}
        for collection, leaves in variables.items()
    }


def _inside(module: Any) -> Any:
    """The NNX layer in a bridge, without values."""

    def make() -> Any:
        rngs = {} if module.skip_rng else {"rngs": nnx.Rngs(0)}
        return module.nnx_class(*module.args, **module.kwargs, **rngs)

    return nnx.eval_shape(make)


def plain_variables(module: Any) -> dict[str, Any]:
    """The variables of a bound module without what rides beside them."""

    def plain(tree: Any) -> Any:
        if not isinstance(tree, Mapping):
            return tree
        return {key: plain(value) for key, value in tree.items() if not str(key).startswith(OWN_LEAVES)}

    return plain(module.variables)


def run_bridge(module: Any, args: Any, kwargs: Any) -> Any:
    """The call of a bridge to NNX, which puts up with no variables but those of its module."""
    mutable = [name for name in module.variables if module.is_mutable_collection(name)]
    rngs = {name: module.make_rng(name) for name in module.scope.rngs}
    y, updates = module.clone(parent=None).apply(plain_variables(module), *args, **kwargs, rngs=rngs, mutable=mutable)
    for collection, leaves in updates.items():
        for name, leaf in leaves.items():
            module.put_variable(collection, name, leaf)
    return y
