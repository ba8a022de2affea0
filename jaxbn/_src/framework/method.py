"""Fields, operands and variables of the layers of a method, in any framework.

A method may add hyperparameters, parameters and statistics: the arguments of its factory, and the leaves of
the NamedTuples that its `init` returns. The layers derive them. A field or an operand that is given although the method
does not take it is an error, because it would have no effect.
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
REQUIRED = inspect.Parameter.empty  # the default of a required argument
# A factory with its arguments; call it to make the transform.
Method = functools.partial[NormTransform[Any, Any]]


@functools.cache
def fields_of(factory: Factory) -> Mapping[str, Any]:
    """The arguments of a factory with their defaults, and those of `batch_norm` if it takes `**kwargs`."""
    parameters = inspect.signature(factory).parameters.values()
    named = {p.name: p.default for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    passes_on = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return (dict(fields_of(batch_norm)) if passes_on else {}) | named


def inherited_defaults(bases: Iterable[type]) -> dict[str, Any]:
    """The defaults of the arguments of classes of layers; the first class has precedence."""
    # The constructor of a class may name its own arguments only, as in NNX, so those of its bases are read too.
    made = [vars(base)["__init__"] for base in bases if inspect.isfunction(vars(base).get("__init__"))]
    signatures = [inspect.signature(function).parameters for function in reversed(made)]
    # The last value of a key stays in the dict, so the order above is from the last base to the first.
    return {name: parameter.default for parameters in signatures for name, parameter in parameters.items()}


@functools.cache
def defaults_of(cls: Hashable) -> Mapping[str, Any]:
    """The defaults of the arguments of a class of layers, including those of its bases."""
    return inherited_defaults(cast(type, cls).__mro__)


def defaults_that_differ(factory: Factory, cls: type) -> dict[str, Any]:
    """The arguments of a factory that the bases of a class lack or have with another default.

    Required arguments have the default `REQUIRED`.
    """
    known = inherited_defaults(cls.__mro__[1:])
    return {name: given for name, given in fields_of(factory).items() if name not in known or known[name] != given}


def check_leaves(layer: Any, base: type, params: Any, state: State, initializers: Mapping[str, Any]) -> None:
    """Checks that the names of the params and statistics of a method do not clash with the fields of its layer.

    Args:
        layer: A layer.
        base: The class of all layers of the framework.
        params: The params of the method.
        state: The state of the method.
        initializers: The fields that configure a param, such as `scale_init`, by name.

    Raises:
        ValueError: If a name is taken, or the method does not have the param that a field configures.
    """
    factory, learned, statistics = layer.factory, params._fields, state._fields
    for name in (*learned, *statistics):
        if name in fields_of(factory) or hasattr(base, name) or (name in learned and name in statistics):
            raise ValueError(
                f"{name_of(factory)} has a parameter or a statistic {name!r}, and its layers have an argument, another "
                f"variable or an attribute of that name, which they hold side by side. Rename it."
            )
    for field, given in initializers.items():
        # `scale_init` and `scale_metadata` configure the param `scale`.
        if field.split("_")[0] not in learned and given != defaults_of(cast(Hashable, type(layer)))[field]:
            raise ValueError(
                f"{type(layer).__name__} was given {field}={given!r}, and its method {name_of(factory)} learns "
                f"{', '.join(learned) or 'nothing'}: it would have no effect. Leave it out."
            )


def name_of(factory: Factory) -> str:
    """The name of a method, which is the name of its factory or of the function inside a partial."""
    while isinstance(factory, functools.partial):
        factory = factory.func
    return getattr(factory, "__name__", type(factory).__name__)


def _fields_of_methods(cls: type) -> set[str]:
    """The fields of a class of layers that are arguments of batch norm or of a method of its bases."""
    # The dict of a class holds staticmethod objects; their `__func__` is the factory.
    made = [vars(base)["factory"] for base in cls.__mro__ if "factory" in vars(base)]
    return set().union(*(fields_of(getattr(factory, "__func__", factory)) for factory in (batch_norm, *made)))


def arguments_of(layer: Any) -> dict[str, Any]:
    """The arguments of the factory of a layer, taken from its fields.

    Raises:
        ValueError: If a field is set that the method does not take.
    """
    factory: Factory = layer.factory
    taken, defaults = fields_of(factory), defaults_of(cast(Hashable, type(layer)))
    for name in _fields_of_methods(type(layer)) - taken.keys():
        default = defaults.get(name)
        value = getattr(layer, name, default)
        # `==` of arrays gives an array, so only plain values are compared by it.
        if value is not default and not (isinstance(value, str | int | float | tuple) and value == default):
            raise ValueError(
                f"{type(layer).__name__} was given {name}={value!r}, and its method {name_of(factory)} does not take "
                f"{name}: it would have no effect. The method takes {', '.join(sorted(taken))}. Leave it out, or add "
                f"the argument to the method."
            )
    return {name: getattr(layer, name) for name in taken}


def for_an_example(method: Method) -> NormTransform[Any, Any]:
    """The transform for a call that only initializes or displays a layer, on one device with an input of any size."""
    method()  # checks all arguments
    alone = {"axis_name": None, "axis_index_groups": None, "allow_single_value": True}
    return method(**{name: value for name, value in alone.items() if name in method.keywords})


def operands_for(function: Callable[..., Any], **operands: Any) -> dict[str, Any]:
    """The operands of a call that are not None; a ValueError if the function does not take one of them."""
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
    """Normalizes with the statistics of the state. Only training needs a mask, so `eval` may lack that argument."""
    if mask is not None and "mask" in inspect.signature(transform.eval).parameters:
        operands["mask"] = mask
    return transform.eval(params, state, x, **operands_for(transform.eval, **operands))


def loaded(
    transform: NormTransform[Any, Any], params: Mapping[str, Any], statistics: Mapping[str, Any]
) -> tuple[Any, State]:
    """The params and the state of a method from the variables of a layer by name; None for missing variables."""
    # Only the classes of the two NamedTuples are needed, so no arrays are created.
    of_params, of_state = jax.eval_shape(lambda: transform.init(statistics["mean"].shape))
    return filled(type(of_params), params), filled(type(of_state), statistics)


def filled(cls: type[Any], leaves: Mapping[str, Any]) -> Any:
    """A NamedTuple of variables by name; None for missing ones."""
    return cls(**{name: leaves.get(name) for name in cls._fields})


def state_of(transform: NormTransform[Any, Any], statistics: Mapping[str, Any]) -> State:
    """The state of a method from the statistics of a layer by name."""
    return loaded(transform, {}, statistics)[1]


def learned(
    transform: NormTransform[Any, Any],
    path: str,
    params: Any,
    state: State,
    grads: Mapping[str, Any],
    loss_scale: ArrayLike,
) -> State:
    """The new state of a layer whose method uses the gradient of its params, given by name.

    Raises:
        ValueError: If the gradient of one of the params is missing.
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
    """The transform of a method without activation and dtype: an affine map in full precision."""
    return method(**{name: None for name in ("activation", "dtype") if name in method.keywords})
