"""How the layers of both frameworks carry a method: its fields, its operands, its variables.

A method may have hyper-parameters, parameters and statistics that no other has. They are the arguments of its factory,
and the leaves of the NamedTuples that its `init` gives, so the layers need no word on them. A field or an operand that
was set and that the method does not take is an error, for it would have no effect.
"""

import functools
import inspect
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, cast

import jax
from jax.typing import ArrayLike

from jaxbn._src.methods.batch_norm import batch_norm
from jaxbn._src.methods.protocol import NormTransform, State

Factory = Callable[..., NormTransform[Any, Any]]
REQUIRED = inspect.Parameter.empty  # stands for the default of an argument that has none
# A factory with its arguments, which makes the functions when they are needed.
Method = functools.partial[NormTransform[Any, Any]]


@functools.cache
def fields_of(factory: Factory) -> Mapping[str, Any]:
    """The arguments of a factory, with their defaults; those of `batch_norm` too, if it passes on whatever it gets."""
    parameters = inspect.signature(factory).parameters.values()
    named = {p.name: p.default for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    passes_on = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return (dict(fields_of(batch_norm)) if passes_on else {}) | named


def inherited_defaults(bases: Iterable[type]) -> dict[str, Any]:
    """The defaults of the arguments of classes of layers, the first class first."""
    made = [vars(base)["__init__"] for base in bases if inspect.isfunction(vars(base).get("__init__"))]
    signatures = [inspect.signature(function).parameters for function in reversed(made)]
    return {name: parameter.default for parameters in signatures for name, parameter in parameters.items()}


@functools.cache
def defaults_of(cls: Hashable) -> Mapping[str, Any]:
    """The defaults of the arguments of a class of layers, those too that it passes on to its bases."""
    return inherited_defaults(cast(type, cls).__mro__)


def defaults_that_differ(factory: Factory, cls: type) -> dict[str, Any]:
    """The arguments of a factory that the bases of a class do not have, or not with this default.

    `REQUIRED` stands for no default.
    """
    known = inherited_defaults(cls.__mro__[1:])
    return {name: given for name, given in fields_of(factory).items() if name not in known or known[name] != given}


def check_leaves(
    layer: Any, base: type, factory: Factory, params: Any, state: State, initializers: Mapping[str, Any]
) -> None:
    """Checks that a layer can hold the params and the statistics of its method beside its fields.

    Args:
        layer: A layer.
        base: The class of all layers of the framework.
        factory: Of the method.
        params: Of the method.
        state: Of the method.
        initializers: What the layer was given for one of the params, such as `scale_init`, by the name of its field.

    Raises:
        ValueError: If a name is taken, or the method does not have that param.
    """
    learned, statistics = params._fields, state._fields
    for name in (*learned, *statistics):
        if name in fields_of(factory) or hasattr(base, name) or (name in learned and name in statistics):
            raise ValueError(
                f"{name_of(factory)} has a parameter or a statistic {name!r}, and its layers have an argument, another "
                f"variable or an attribute of that name, which they hold side by side. Rename it."
            )
    for field, given in initializers.items():
        if field.split("_")[0] not in learned and given != defaults_of(cast(Hashable, type(layer)))[field]:
            raise ValueError(
                f"{type(layer).__name__} was given {field}={given!r}, and its method {name_of(factory)} learns "
                f"{', '.join(learned) or 'nothing'}: it would have no effect. Leave it out."
            )


def name_of(factory: Factory) -> str:
    """The name of a method: that of the function where the factory is a partial of one."""
    while isinstance(factory, functools.partial):
        factory = factory.func
    return getattr(factory, "__name__", type(factory).__name__)


def _fields_of_methods(cls: type) -> set[str]:
    """The fields of a class of layers that are arguments of a method: of batch norm's, and of those of its bases."""
    made = [vars(base)["factory"] for base in cls.__mro__ if "factory" in vars(base)]
    return set().union(*(fields_of(getattr(factory, "__func__", factory)) for factory in (batch_norm, *made)))


def arguments_of(factory: Factory, layer: Any) -> dict[str, Any]:
    """The arguments of a layer's factory, out of the layer's fields.

    Raises:
        ValueError: If a field is set that the method does not take.
    """
    taken, defaults = fields_of(factory), defaults_of(cast(Hashable, type(layer)))
    for name in _fields_of_methods(type(layer)) - taken.keys():
        default = defaults.get(name)
        value = getattr(layer, name, default)
        if value is not default and not (isinstance(value, str | int | float | tuple) and value == default):
            raise ValueError(
                f"{type(layer).__name__} was given {name}={value!r}, and its method {name_of(factory)} does not take "
                f"{name}: it would have no effect. The method takes {', '.join(sorted(taken))}. Leave it out, or add "
                f"the argument to the method."
            )
    return {name: getattr(layer, name) for name in taken}


def for_an_example(method: Method) -> NormTransform[Any, Any]:
    """The functions of a method for a call that only shows or initializes a layer: on one device, of any size."""
    method()  # which checks all arguments
    alone = {"axis_name": None, "axis_index_groups": None, "allow_single_value": True}
    return method(**{name: value for name, value in alone.items() if name in method.keywords})


def operands_for(function: Callable[..., Any], **operands: Any) -> dict[str, Any]:
    """Those operands of a call that are given; a ValueError if the method's function does not take one of them."""
    given = {name: value for name, value in operands.items() if value is not None}
    if given:
        parameters = inspect.signature(function).parameters
        open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        for name in () if open_ended else given.keys() - parameters.keys():
            raise ValueError(
                f"The call was given {name}=, and the method of this layer does not take it: it would have no effect. "
                f"Its function takes {', '.join(list(parameters))}. Leave it out, or add the operand to the method."
            )
    return given


def evaluate(
    transform: NormTransform[Any, Any], params: Any, state: State, x: ArrayLike, *, mask: Any = None, **operands: Any
) -> jax.Array:
    """Normalizes with the statistics of the state. The mask is of training alone: a method's `eval` may do without."""
    if mask is not None and "mask" in inspect.signature(transform.eval).parameters:
        operands["mask"] = mask
    return transform.eval(params, state, x, **operands_for(transform.eval, **operands))


def loaded(
    transform: NormTransform[Any, Any], params: Mapping[str, Any], statistics: Mapping[str, Any]
) -> tuple[Any, State]:
    """The params and the state of a method, out of the variables of a layer by name; None for missing ones."""
    shapes = jax.eval_shape(lambda: transform.init(statistics["mean"].shape))
    held = zip(shapes, (params, statistics), strict=True)
    params, state = (type(tree)(**{name: leaves.get(name) for name in tree._fields}) for tree, leaves in held)
    return params, state


def state_of(transform: NormTransform[Any, Any], statistics: Mapping[str, Any]) -> State:
    """The state of a method, out of the statistics of a layer by name."""
    return loaded(transform, {}, statistics)[1]


def learned(
    transform: NormTransform[Any, Any],
    path: str,
    params: Any,
    state: State,
    grads: Mapping[str, Any],
    loss_scale: ArrayLike,
) -> State:
    """The state of a layer whose method learns from the gradient of its params, which are given by name.

    Raises:
        ValueError: If the gradient of one of the params is not there.
    """
    backward = cast(Callable[..., State], transform.backward)
    held = [name for name, leaf in params._asdict().items() if leaf is not None]
    for name in held:
        if grads.get(name) is None:
            raise ValueError(
                f"There is no gradient of the {name} of {path!r}: pass that of all the params of the model."
            )
    takes = "loss_scale" in inspect.signature(backward).parameters
    scaled = {"loss_scale": loss_scale} if takes else {}
    return backward(params, state, params._replace(**{name: grads[name] for name in held}), **scaled)


def as_affine(method: Method) -> NormTransform[Any, Any]:
    """The functions of a method as an affine map in full precision: without an activation and a dtype."""
    return method(**{name: None for name in ("activation", "dtype") if name in method.keywords})
