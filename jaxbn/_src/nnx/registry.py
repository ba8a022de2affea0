"""Known batch norm layers in NNX: Flax's, jaxbn's, those of linen in a bridge, and registered classes."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import flax.linen as nn
import jax
from flax import nnx

from jaxbn._src.framework import registry as _registry
from jaxbn._src.framework.method import state_of
from jaxbn._src.framework.norm_layer import ForeignLayer, evaluating_method, is_ours
from jaxbn._src.framework.registry import REGISTRY, VARIABLES, Registered
from jaxbn._src.methods.protocol import State
from jaxbn._src.nnx.layers import Norm, variables_of

Class = TypeVar("Class", bound=type[nnx.Module])

REGISTER = "jaxbn.nnx.register_batch_norm"
_OF_BRIDGE = {"rngs", "method", "mutable"}  # arguments of the call of a bridge itself


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
    with the statistics in `nnx.BatchStat` variables; jaxbn runs its code with other statistics. jaxbn's layers,
    `flax.nnx.BatchNorm`, and the layers of linen in `flax.nnx.bridge.ToNNX` are known already.

    Args:
        cls: A class of modules whose call takes the input first. A `mask` of the call and the attributes `axis_name`,
            `axis_index_groups`, `use_bias` and `use_scale` must have the meaning of Flax's layer.
        evaluation: The arguments of the call, or attributes, that select evaluation, such as `{"training": False}`.
        mean: Name of the variable of the mean.
        var: Name of the variable of the variance.
        scale: Name of the parameter of the scale.
        bias: Name of the parameter of the bias.
        axis: Name of the attribute with the feature axis, or the axis.
        epsilon: Name of the attribute with epsilon, or the number.
        momentum: Name of the attribute with the weight of the OLD value, or the number. None: not known; then
            `move_averages` skips the layer, and `replace` uses the momentum of the new layer.

    Returns:
        The class.

    Raises:
        TypeError: If it is not a class of NNX modules.
        ValueError: If the class is registered with other arguments; later, if a layer has no such attribute.

    Example:
        >>> class Norm(nnx.Module):
        ...     def __init__(self, features):
        ...         self.mean, self.var = nnx.BatchStat(jnp.zeros(features)), nnx.BatchStat(jnp.ones(features))
        ...     def __call__(self, x, train=False):
        ...         if train:
        ...             self.mean[...], self.var[...] = x.mean(0), x.var(0)
        ...         return (x - self.mean[None]) * jax.lax.rsqrt(self.var[None] + 1e-5)
        >>> _ = jaxbn.nnx.register_batch_norm(Norm, evaluation={"train": False}, axis=-1, epsilon=1e-5, momentum=None)
        >>> model, report = jaxbn.nnx.postproc(Norm(1), [jnp.arange(10.0)[:, None]])
        >>> model.mean[...], model.var[...]
        (Array([4.5], dtype=float32), Array([8.25], dtype=float32))
    """
    names, fields = (mean, var, scale, bias), (axis, epsilon, momentum)
    _registry.register(cls, nnx.Module, evaluation, names, fields)
    return cls


_registry.register_flax(nnx.BatchNorm, Norm, nn.BatchNorm)


def known(module: Any) -> Registered | None:
    """The description of the class of a module, or of the class inside a bridge to linen."""
    if not isinstance(module, nnx.bridge.ToNNX):
        return REGISTRY.of(type(module))
    inside: Any = type(module.to_nnx__module)
    registered = REGISTRY.of(inside)
    # A subclass that overrides the call is not the layer: its code would be skipped.
    if registered is None or inspect.unwrap(inside.__call__) is not inspect.unwrap(cast(Any, registered.cls).__call__):
        return None
    # A bridge has no variables before `lazy_init`.
    return registered if hasattr(module, registered.names["mean"]) else None


def as_norm(module: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
    """A known layer, called with these arguments, with the attributes of Flax's layer."""
    if isinstance(module, Adapted):
        return module
    registered = known(module)
    if registered is None or registered.cls in (nnx.BatchNorm, Norm):
        return module
    return Adapted(module, registered, args, kwargs or {})


def in_flax_names(module: Any, kind: type[nnx.Variable[Any]] = nnx.Variable) -> dict[str, Any]:
    """The values of the variables of a known layer, under their names in Flax's layer."""
    names = {own: name for name, own in cast(Registered, known(module)).names.items()}
    held = {names.get(own, own): value for own, value in variables_of(module, kind).items()}
    # Other variables of a class that is not ours have nothing to do with batch norm, whatever their names are.
    return held if is_ours(as_norm(module)) else {name: held[name] for name in held.keys() & set(VARIABLES)}


def evaluates(module: Any, args: Any, kwargs: Any) -> bool | None:
    """Whether this call of a layer normalizes with the running statistics; None: not known."""
    layer = as_norm(module, args, kwargs)
    if isinstance(layer, Adapted):
        return layer.registered.evaluates(layer.fields, layer.bound.args, layer.bound.kwargs)
    return cast(Registered, known(module)).evaluates(module, args, kwargs)


class Adapted(ForeignLayer):
    """A foreign layer of NNX in a call."""

    def __init__(self, module: Any, registered: Registered, args: Any, kwargs: Mapping[str, Any]):
        bridged = isinstance(module, nnx.bridge.ToNNX)
        kwargs = {name: value for name, value in kwargs.items() if not (bridged and name in _OF_BRIDGE)}
        fields = module.to_nnx__module if bridged else module
        super().__init__(module, fields, registered, bridged, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        """A variable under its name in Flax's layer, or a field."""
        if name in VARIABLES:
            return getattr(self.module, self.registered.names[name], None)
        return super().__getattr__(name)

    @property
    def use_scale(self) -> bool:
        """Whether it learns a scale."""
        return self.scale is not None

    @property
    def use_bias(self) -> bool:
        """Whether it learns a bias."""
        return self.bias is not None

    @property
    def num_features(self) -> Any:
        """The number of its features, or their shape."""
        shape = self.mean.shape
        return shape if len(shape) > 1 else shape[0]

    def normalize(self, state: State, x: jax.Array, **arguments: Any) -> jax.Array:
        """Runs its own call in evaluation, on a stand-in that holds these statistics."""
        fields, flags = self.registered.split_evaluation(self._is_field)
        bound = self.call_with(x, arguments, fields, flags)
        y: jax.Array = self._stand_in(fields, self.own_names(state))(*bound.args, **bound.kwargs)
        return y

    def _is_field(self, name: str) -> bool:
        return hasattr(self.fields, name) if self.bridged else name not in self.registered.signature.parameters

    def _stand_in(self, fields: Mapping[str, Any], leaves: Mapping[str, Any]) -> Any:
        stand_in = plain_copy(self.module, nnx.bridge.ToNNX if self.bridged else self.registered.cls)
        variables = {name: vars(stand_in)[name].replace(leaf) for name, leaf in leaves.items()}
        # Evaluation needs no random numbers, and could not draw them under the transformations of a call.
        of_bridge = {"to_nnx__module": self.fields.clone(**fields), "to_nnx__rngs": None} if self.bridged else {}
        inner = of_bridge or fields
        vars(stand_in).update(variables | dict(inner))
        return stand_in


def plain_copy(module: Any, cls: Any) -> Any:
    """An object of a class without hooks, with the same variables but without those that jaxbn added."""
    made = object.__new__(cls)
    vars(made).update({name: value for name, value in vars(module).items() if not name.startswith("jaxbn_")})
    return made


def run_bridge(module: Any, args: Any, kwargs: Any) -> Any:
    """Runs a bridge to linen, which accepts no attributes other than the variables of its module."""
    stand_in = plain_copy(module, nnx.bridge.ToNNX)
    before = dict(vars(stand_in))
    y = stand_in(*args, **kwargs)
    for name, value in vars(stand_in).items():
        # The stand-in ran in place of the module; copy back the variables that its call replaced.
        if value is not before.get(name):
            setattr(module, name, nnx.data(value))
    return y


@functools.cache  # equal models need equal classes for equal graphdefs
def with_call(cls: Any, base: Any, call: Callable[..., Any], *members: tuple[str, Any]) -> Any:
    """A subclass in which `call(module, call of the module, *args, **kwargs)` replaces the call of `base`.

    It is inserted where super().__call__ finds it, above all classes whose call is that of `base`. They may define it
    themselves, because `nnx.tabulate` sets it in every class that it has shown.
    """

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        return call(self, super(hook, self).__call__, *args, **kwargs)

    below = next(one for one in cls.__mro__ if one.__call__ is base.__call__)
    hook: Any = type(below.__name__, (below,), {"__call__": __call__, "__module__": below.__module__, **dict(members)})
    return hook if cls is below else type(cls.__name__, (cls, hook), {"__module__": cls.__module__})


@functools.cache
def with_touch(cls: Any) -> Any:
    """A subclass whose call, if there is one, tags its output."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        bridged = isinstance(self, nnx.bridge.ToNNX)
        y = run_bridge(self, args, kwargs) if bridged else cls.__call__(self, *args, **kwargs)
        return self.jaxbn_layer.on(y, self.jaxbn_slot[...])

    called = any("__call__" in vars(base) for base in cls.__mro__)
    # A class without a call is derived too: removing the hooks sets the base class.
    return type(cls.__name__, (cls,), {"__module__": cls.__module__} | ({"__call__": __call__} if called else {}))


def evaluate(module: Any, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Runs a known layer in evaluation; `plain` is its call."""
    layer, registered = as_norm(module, args, kwargs), cast(Registered, known(module))
    if isinstance(layer, Adapted) and layer.bridged:
        x, mask, residual, where = layer.operands()
        state = state_of(evaluating_method(layer)(), in_flax_names(module))
        return layer.normalize(state, x, mask=mask, residual=residual, **where)
    bound = registered.bind(args, kwargs)
    fields, flags = registered.split_evaluation(lambda name: name not in registered.signature.parameters)
    bound.arguments |= flags
    # Attributes select the mode of some classes: set them for this call only.
    before = {name: getattr(module, name) for name in fields}
    try:
        vars(module).update(fields)
        return plain(*bound.args, **bound.kwargs)
    finally:
        vars(module).update(before)


@functools.cache
def translation(cls: Any, bridged: bool) -> Callable[..., Any]:
    """A call with which a layer of Flax or jaxbn takes the arguments of a registered class."""
    registered = cast(Registered, REGISTRY.of(cls))

    def call(module: Any, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        kwargs = {name: value for name, value in kwargs.items() if not (bridged and name in _OF_BRIDGE)}
        bound = registered.bind(args, kwargs)
        bound.apply_defaults()
        by_call = any(bound.arguments.get(name) is not None for name in registered.evaluation)
        args, kwargs = registered.translated(bound, registered.evaluates(module, args, kwargs) if by_call else None)
        return plain(*args, **kwargs)

    return call


def has_plain_call(module: Any, cls: Any = None) -> bool:
    """Whether the call of a layer, or of the class given, is the call of the registered class itself."""
    cls = type(module) if cls is None else cls
    # The class of a layer that `replace` made has another call, which only translates arguments.
    return cls.__call__ is _with_plain_call(module).__call__ or hasattr(cls, "jaxbn_translates")


def set_call(module: Any, call: Callable[..., Any], *members: tuple[str, Any]) -> None:
    """Gives a known layer another call."""
    cls: Any = type(module)
    set_class(module, with_call(cls, _with_plain_call(module), call, *members))


def _with_plain_call(module: Any) -> Any:
    """The class that defines the call of a known layer."""
    return nnx.bridge.ToNNX if isinstance(module, nnx.bridge.ToNNX) else cast(Registered, known(module)).cls


def set_class(module: Any, cls: type) -> None:
    """Changes the class of a module without NNX recording it as an attribute of the graph."""
    object.__setattr__(module, "__class__", cls)
