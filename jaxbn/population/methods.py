"""How the layers of both frameworks carry a method: its fields, its operands, its variables, and who knows it.

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

from jaxbn.core import calls as _calls
from jaxbn.methods.base import NormTransform, State
from jaxbn.methods.batch_norm import BatchNormState, batch_norm
from jaxbn.methods.batch_renorm import BatchRenormState, batch_renorm
from jaxbn.methods.domain_batch_norm import DomainBatchNormState
from jaxbn.methods.ghost_batch_norm import GhostBatchNormState
from jaxbn.methods.moving_average_batch_norm import MovingAverageBatchNormState, moving_average_batch_norm

Factory = Callable[..., NormTransform]
REQUIRED = inspect.Parameter.empty  # stands for the default of an argument that has none
# A factory with its arguments, which makes the functions when they are needed.
Method = functools.partial[NormTransform]

# Installs means and variances as they are, as those from before a pass are put back, whatever the layer's method is.
AS_THEY_ARE: Method = functools.partial(batch_norm)


class LayerPath(str):
    """The path of a layer, as a key of moments, that knows the method of the layer.

    Variables of linen do not tell by which method they are used, so what is measured says it. It equals the plain path,
    and survives whatever keeps the keys of a dict: jit, `jax.tree.map`, comprehensions. Pickled, it is a plain path.
    """

    method: Method

    def __new__(cls, path: str, method: Method) -> "LayerPath":
        """The path with a method."""
        made = super().__new__(cls, path)
        made.method = method
        return made

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (str(self),)


def as_key(path: str, method: Method | None) -> str:
    """The path as a key of moments; a plain one for an unknown method, or one whose arguments are being traced."""
    if method is None or any(map(_calls.is_tracer, jax.tree.leaves(method.keywords))):
        return path
    return LayerPath(path, method)


@functools.cache
def fields_of(factory: Factory) -> Mapping[str, Any]:
    """The arguments of a factory, with their defaults; those of `batch_norm` too, if it passes on whatever it gets."""
    parameters = inspect.signature(factory).parameters.values()
    named = {p.name: p.default for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    passes_on = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return (dict(fields_of(batch_norm)) if passes_on else {}) | named


@functools.cache
def defaults_of(cls: Hashable) -> Mapping[str, Any]:
    """The defaults of the arguments of a class of layers, those too that it passes on to its bases."""
    bases: Any = reversed(getattr(cls, "__mro__", ()))
    signatures = [inspect.signature(vars(base)["__init__"]) for base in bases if "__init__" in vars(base)]
    return {name: p.default for signature in signatures for name, p in signature.parameters.items()}


def defaults_that_differ(factory: Factory, cls: Hashable) -> dict[str, Any]:
    """The arguments of a factory that the class does not have, or not with this default; `REQUIRED` for no default."""
    known = defaults_of(cls)
    return {name: given for name, given in fields_of(factory).items() if name not in known or known[name] != given}


def arguments_of(factory: Factory, layer: Any) -> dict[str, Any]:
    """The arguments of a layer's factory, out of the layer's fields.

    Raises:
        ValueError: If a field is set that the method does not take.
    """
    taken, cls = fields_of(factory), cast(Hashable, type(layer))
    defaults = defaults_of(cls)
    for name in fields_of(batch_norm).keys() - taken.keys():
        value, default = getattr(layer, name), defaults.get(name)
        if value is not default and not (isinstance(value, str | int | float | tuple) and value == default):
            raise ValueError(
                f"{type(layer).__name__} was given {name}={value!r}, and its method {factory.__name__} does not take "
                f"{name}: it would have no effect. The method takes {', '.join(sorted(taken))}. Leave it out, or add "
                f"the argument to the method."
            )
    return {name: getattr(layer, name) for name in taken}


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
    transform: NormTransform, params: Any, state: State, x: ArrayLike, *, mask: Any = None, **operands: Any
) -> jax.Array:
    """Normalizes with the statistics of the state. The mask is of training alone: a method's `eval` may do without."""
    if mask is not None and "mask" in inspect.signature(transform.eval).parameters:
        operands["mask"] = mask
    return transform.eval(params, state, x, **operands_for(transform.eval, **operands))


def loaded(transform: NormTransform, params: Mapping[str, Any], statistics: Mapping[str, Any]) -> tuple[Any, State]:
    """The params and the state of a method, out of the variables of a layer by name; None for one that is not there."""
    initial, _ = jax.eval_shape(lambda: transform.init(statistics["mean"].shape))
    return type(initial)(**{name: params.get(name) for name in initial._fields}), state_of(transform, statistics)


def state_of(transform: NormTransform, statistics: Mapping[str, Any]) -> State:
    """The state of a method, out of the statistics of a layer by name."""
    _, initial = jax.eval_shape(lambda: transform.init(statistics["mean"].shape))
    return type(initial)(**{name: statistics.get(name) for name in initial._fields})


def of_stock(layer: Any, **changes: Any) -> Method:
    """The method of a layer of Flax, which is batch norm."""
    fields = {name: getattr(layer, name) for name in ("axis", "epsilon", "momentum", "use_fast_variance")}
    return Method(batch_norm, **fields | changes)


def method_at(path: str, names: Iterable[str]) -> NormTransform:
    """The functions of the method of a layer, by the key of its moments, or else by the names of its statistics.

    Raises:
        ValueError: If neither tells.
    """
    if isinstance(path, LayerPath):
        return path.method()
    held = set(names)
    if held <= set(BatchNormState._fields):
        return batch_norm()
    if held <= set(BatchRenormState._fields):
        return batch_renorm()
    if held <= set(MovingAverageBatchNormState._fields):
        return moving_average_batch_norm()
    raise ValueError(
        f"The statistics of {path!r} are {', '.join(sorted(held))}: they are of no method of jaxbn, and its moments do "
        f"not say which it is, as their key is a plain string. Use the keys of the moments that capture_moments gives."
    )


def averaging_method(path: str, names: Iterable[str], momentum: Any) -> NormTransform:
    """The functions by which the running averages of a layer are updated; see `jaxbn.linen.move_averages`.

    Raises:
        ValueError: If it is not known how the layer averages, or the momentum is not that of its method.
    """
    if isinstance(momentum, NormTransform):
        return momentum
    known = method_at(path, names)
    if momentum is None:
        if not isinstance(path, LayerPath):
            raise ValueError(
                f"It is not known how {path!r} averages, as the key of its moments is a plain string. Pass momentum=, "
                f"or use the keys of the moments that capture_moments gives."
            )
        return known
    _, state = jax.eval_shape(lambda: known.init(1))
    if type(state) not in (BatchNormState, GhostBatchNormState, DomainBatchNormState):
        raise ValueError(
            f"momentum={momentum!r} says how batch norm averages, and the statistics of {path!r} are of another "
            f"method, a {type(state).__name__}. Leave momentum out, for moments under the keys that capture_moments "
            f"gives; or pass the transform of the method, such as jaxbn.batch_renorm()."
        )
    return batch_norm(momentum=momentum)
