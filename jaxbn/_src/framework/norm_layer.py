"""Normalization layers as all frameworks see them: which method a layer has, and the common part of foreign layers.

A layer that is not jaxbn's is a batch_norm, Flax's own and those of registered classes alike.
"""

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxbn._src.framework.called import CalledNorm, Operands
from jaxbn._src.framework.layers import LayerKind
from jaxbn._src.framework.method import Factory, Method, arguments_of, evaluate, loaded
from jaxbn._src.framework.registry import FIELDS, Registered
from jaxbn._src.methods.batch_norm import batch_norm
from jaxbn._src.methods.protocol import NormTransform, State


class NormLayer:
    """The common base of jaxbn's layers in all frameworks.

    A layer names the `factory` of its method, whose arguments are its fields. The derived attributes are properties,
    because `nnx.tabulate` takes every public method for a part of the model.
    """

    factory: ClassVar[Factory]

    @property
    def made_by(self) -> Method:
        """The factory of this layer with its arguments."""
        return Method(self.factory, **arguments_of(self))

    @property
    def transform(self) -> NormTransform[Any, Any]:
        """The pure functions of this layer."""
        return self.made_by()


class ForeignLayer:
    """A layer of a registered class, or of the other framework in a bridge, with the attributes of Flax's layer."""

    def __init__(
        self, module: Any, fields: Any, registered: Registered, bridged: bool, args: Any, kwargs: Mapping[str, Any]
    ):
        self.module, self.fields, self.registered, self.bridged = module, fields, registered, bridged
        # Partial, because `as_norm` also describes layers that are not being called.
        self.bound = registered.signature.bind_partial(*args, **kwargs)
        self.axis, self.epsilon, self.momentum = (registered.field(fields, name) for name in FIELDS)
        self.axis_name = getattr(fields, "axis_name", None)
        self.axis_index_groups = getattr(fields, "axis_index_groups", None)
        self.use_fast_variance = getattr(fields, "use_fast_variance", True)

    def __getattr__(self, name: str) -> Any:
        # `copy` and `pickle` ask a new object for attributes before it has any: looking up `fields` here would recurse.
        if name in ("registered", "fields"):
            raise AttributeError(name)
        return getattr(self.fields, name)  # such as a dtype, if it has one

    @property
    def method(self) -> Method | None:
        """The method of a layer of jaxbn that is in a bridge."""
        return getattr(self.fields, "made_by", None) if self.bridged else None

    def operands(self) -> Operands:
        """As `operands_of` gives them."""
        given = self.bound.arguments
        x = jnp.asarray(given[self.registered.input_name])
        where = {"domain": given["domain"]} if self.method and given.get("domain") is not None else {}
        return Operands(x, given.get("mask"), given.get("residual") if self.method else None, where)

    def call_with(self, x: Any, given: Mapping[str, Any], fields: Mapping[str, Any], flags: Mapping[str, Any]) -> Any:
        """The arguments of this call with another input, and with fields and flags with which it evaluates."""
        bound = copy.copy(self.bound)
        taken = {name for name in given if given[name] is not None} & self.registered.signature.parameters.keys()
        bound.arguments = self.bound.arguments | {name: given[name] for name in taken}
        bound.arguments[self.registered.input_name] = x
        # A flag that is set as a field is left out of the call: many layers refuse a flag that is given twice.
        bound.arguments = {name: value for name, value in bound.arguments.items() if name not in fields} | dict(flags)
        return bound

    def own_names(self, state: State) -> dict[str, Any]:
        """The statistics by the names that they have in the layer."""
        held = state._asdict().items()
        return {self.registered.names.get(name, name): leaf for name, leaf in held if leaf is not None}


def flax_operands(
    x: Any, use_running_average: bool | None = None, *, mask: Any = None, residual: Any = None, domain: Any = None
) -> Operands:
    """The arguments of a call of Flax's layer or jaxbn's; the flag is overruled by the mode of a capture."""
    return Operands(jnp.asarray(x), mask, residual, {} if domain is None else {"domain": domain})


def operands_of(layer: Any, args: Any, kwargs: Any) -> Operands:
    """The arguments of a call of any normalization layer."""
    return layer.operands() if isinstance(layer, ForeignLayer) else flax_operands(*args, **kwargs)


def method_of(layer: Any) -> Method:
    """The method of a layer."""
    own = layer.made_by if isinstance(layer, NormLayer) else layer.method if isinstance(layer, ForeignLayer) else None
    fields = ("axis", "epsilon", "momentum", "use_fast_variance")
    return Method(batch_norm, **{name: getattr(layer, name) for name in fields}) if own is None else own


def evaluating_method(layer: Any) -> Method:
    """The method of a layer; without averages for foreign layers, whose momentum may be one that jaxbn refuses."""
    method = method_of(layer)
    return method if is_ours(layer) else Method(method, momentum=None)


def is_ours(layer: Any) -> bool:
    """Whether it is a layer of jaxbn, in a bridge or not."""
    return isinstance(layer, NormLayer) or (isinstance(layer, ForeignLayer) and layer.method is not None)


def called_norm(
    layer: Any, path: str, params: Mapping[str, Any], statistics: Mapping[str, Any], stock: Callable[..., jax.Array]
) -> CalledNorm:
    """A layer in a call, with its running statistics and its functions.

    Args:
        layer: The layer, with the attributes of Flax's layer.
        path: Its path.
        params: Its learned parameters by name.
        statistics: Its statistics by name.
        stock: How Flax's own layer normalizes: `(layer, state, x, *, mask, residual) -> y`.

    Returns:
        The layer for `captured_call`.
    """
    transform = evaluating_method(layer)()
    learned, running = loaded(transform, params, statistics)
    if isinstance(layer, ForeignLayer):
        normalize = layer.normalize
    elif isinstance(layer, NormLayer):
        normalize = functools.partial(evaluate, transform, learned)
    else:
        normalize = functools.partial(stock, layer)
    return CalledNorm(path, transform, running, normalize, layer.axis, layer.axis_name, layer.axis_index_groups)


def keeps_averages(layer: Any) -> bool:
    """Whether training updates running averages of this layer."""
    # In a registered class, None means that the momentum is not known, not that there are no averages.
    momentum: Any = layer.momentum
    return momentum is not None or not isinstance(layer, NormLayer)


def kind_of(layer: Any) -> LayerKind:
    """The kind of a layer."""
    return LayerKind.of(method_of(layer))
