"""The registry of classes that are batch normalization, with the names of their variables and fields."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from jaxbn._src import internals as _internals
from jaxbn._src.framework.layers import AFFINE, POPULATION

VARIABLES = (*POPULATION, *AFFINE)
FIELDS = ("axis", "epsilon", "momentum")


@dataclasses.dataclass(frozen=True)
class Registered:
    """The description of a registered class."""

    cls: type
    evaluation: Mapping[str, Any]  # arguments of the call, or fields, with which it evaluates
    names: Mapping[str, str]  # mean, var, scale and bias -> the names of the variables
    fields: Mapping[str, Any]  # axis, epsilon and momentum -> the name of a field, or the value

    def field(self, layer: Any, name: str) -> Any:
        """The value of a hyperparameter of a layer."""
        given = self.fields[name]
        if isinstance(given, str) and not hasattr(layer, given):
            raise ValueError(f"A {type(layer).__name__} has no {given!r}: register its class with another {name}=.")
        return getattr(layer, given) if isinstance(given, str) else given

    @functools.cached_property
    def signature(self) -> inspect.Signature:
        """The signature of the call, without `self`."""
        signature = inspect.signature(self.cls.__call__)
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    @property
    def input_name(self) -> str:
        """The name of the first argument of the call."""
        return next(iter(self.signature.parameters))

    def bind(self, args: Any, kwargs: Any) -> inspect.BoundArguments:
        """Binds the arguments of a call to their names."""
        return self.signature.bind(*args, **kwargs)

    def evaluates(self, layer: Any, args: Any, kwargs: Any) -> bool | None:
        """Whether a call normalizes with the running statistics; None: not known."""
        bound = self.bind(args, kwargs)
        bound.apply_defaults()
        # None in the call, or no such argument, means that the field decides, as for the flag of Flax's layer.
        given = {name: bound.arguments.get(name) for name in self.evaluation}
        found = {name: getattr(layer, name, None) if value is None else value for name, value in given.items()}
        if any(value is None or _internals.is_tracer(value) for value in found.values()):
            return None
        return all(bool(found[name] == value) for name, value in self.evaluation.items())

    def translated(self, bound: inspect.BoundArguments, flag: bool | None) -> tuple[tuple[Any], dict[str, Any]]:
        """The arguments of a call as Flax's layer takes them, with `use_running_average` if the flag is known."""
        given = self.signature.bind(*bound.args, **bound.kwargs)
        given.apply_defaults()
        arguments = {"mask": given.arguments["mask"]} if "mask" in given.arguments else {}
        return (given.arguments[self.input_name],), arguments | ({} if flag is None else {"use_running_average": flag})

    def split_evaluation(self, is_field: Callable[[str], bool]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The fields and the arguments of the call with which the layer evaluates.

        A name that may be either is set as a field only, because many layers refuse a flag that is given twice.
        """
        fields: dict[str, Any] = {}
        arguments: dict[str, Any] = {}
        for name, value in self.evaluation.items():
            # A required argument must be part of the call, even if there is a field of that name.
            parameter = self.signature.parameters.get(name)
            required = parameter is not None and parameter.default is parameter.empty
            (fields if is_field(name) and not required else arguments)[name] = value
        return fields, arguments


class Registry:
    """The registered classes of all frameworks, including those of Flax and jaxbn."""

    def __init__(self) -> None:
        self._known: dict[type, Registered] = {}
        self._pairs = {POPULATION: None}  # the names of mean and variance, in the order of registration

    def add(self, registered: Registered) -> None:
        """Registers a class; a ValueError if it is registered with another description."""
        earlier = self._known.setdefault(registered.cls, registered)
        if earlier != registered:
            raise ValueError(f"{registered.cls.__name__} is already registered with other arguments: {_told(earlier)}.")
        self._pairs[registered.names["mean"], registered.names["var"]] = None

    def of(self, cls: type) -> Registered | None:
        """The description of the class or of its nearest registered base."""
        return next((self._known[base] for base in cls.__mro__ if base in self._known), None)

    def names_in(self, variables: Collection[str]) -> dict[str, str]:
        """The names of mean and variance among the variables of a module; empty if it has none."""
        for mean, var in self._pairs:
            if mean in variables and var in variables:
                return {"mean": mean, "var": var}
        return {}

    def names_of(self, statistics: Collection[str], params: Collection[str]) -> Mapping[str, str]:
        """The names of mean, var, scale and bias of a layer with these variables; empty if it is not a known layer."""
        for one in self._known.values():
            # A module that learns anything besides scale and bias is not a layer of this class.
            if {one.names["mean"], one.names["var"]} <= set(statistics) and set(params) <= set(one.names.values()):
                return one.names
        return {}


# One for the process, like the registry of `jax.tree_util`: the meaning of a class does not change from call to call.
REGISTRY = Registry()


def register_flax(*classes: type) -> None:
    """Registers classes with the names and the call of Flax's layer."""
    for cls in classes:
        names, fields = ({name: name for name in part} for part in (VARIABLES, FIELDS))
        REGISTRY.add(Registered(cls, {"use_running_average": True}, names, fields))


def register(
    cls: Any,
    base: type,
    evaluation: Mapping[str, Any],
    names: Sequence[str],
    fields: Sequence[Any],
    known: Collection[str] | None = None,
) -> None:
    """Checks and registers a class of layers; see `jaxbn.linen.register_batch_norm`.

    `names` are in the order of `VARIABLES`, `fields` in that of `FIELDS`. `known` are the fields of the class, or None
    if only its instances have them.
    """
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise TypeError(f"{cls!r} is not a class of layers: pass a subclass of {base.__module__}.{base.__name__}.")
    named, held = dict(zip(VARIABLES, names, strict=True)), dict(zip(FIELDS, fields, strict=True))
    registered = Registered(cls, dict(evaluation), named, held)
    if not evaluation:
        raise ValueError(
            f"evaluation= must say how a call of {cls.__name__} evaluates, such as {{'use_running_average': True}} or "
            f"{{'training': False}}: arguments of its call, or fields."
        )
    # If the fields of the class are not known, any name may be an attribute of its instances.
    both = {*registered.signature.parameters, *(known or evaluation)}
    for name in evaluation.keys() - both:
        raise ValueError(f"evaluation= names {name!r}; {cls.__name__} and its call have {sorted(both)}.")
    for name, given in held.items():
        if known is not None and isinstance(given, str) and given not in known:
            raise ValueError(
                f"{cls.__name__} has no field {given!r}: pass {name}= the name of the field that holds it, or a value."
            )
    REGISTRY.add(registered)


def _told(registered: Registered) -> str:
    parts = {"evaluation": registered.evaluation, **registered.names, **registered.fields}
    return ", ".join(f"{name}={value!r}" for name, value in parts.items())
