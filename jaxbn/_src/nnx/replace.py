"""Replacement of normalization layers in an NNX model."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import jax.numpy as jnp
from flax import nnx

from jaxbn._src.framework.conversion import as_partial, carried
from jaxbn._src.framework.norm_layer import evaluating_method
from jaxbn._src.framework.registry import Registered
from jaxbn._src.nnx.capture import find_layers, select_layers
from jaxbn._src.nnx.convert import convert_norms
from jaxbn._src.nnx.layers import Norm
from jaxbn._src.nnx.registry import Adapted, as_norm, has_plain_call, known, set_class, translation, with_call

Model = TypeVar("Model")


def replace(model: Model, layer: Callable[..., nnx.Module], paths: str | Sequence[str] = "") -> Model:
    """Replaces the normalization layers of a model without changes to its source.

    The new layers get the attributes that all methods share: momentum, epsilon, axes, dtypes, synchronization. Paths,
    parameters and statistics are kept; further statistics of the method start anew, see :func:`convert_norms`. Pass
    `nnx.BatchNorm` to go back.

    Args:
        model: The model; it is not changed.
        layer: A class, such as `jaxbn.nnx.BatchRenorm`, or a `functools.partial` of one, whose arguments take
            precedence over the attributes of the old layer.
        paths: One or several paths of layers, or of modules to replace all their layers, such as `"backbone"` or
            `"blocks/0/norm"`. `""` is the whole model.

    Returns:
        A new model. `jaxbn.nnx.summary` lists its layers.

    Raises:
        TypeError: If `layer` is not a normalization layer.
        ValueError: If there is no layer at a path or below it, the class of one overrides the call, or one has an
            activation, which `layer` does not support.

    Example:
        >>> model = nnx.Sequential(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.BatchNorm(2, rngs=nnx.Rngs(1)))
        >>> print(jaxbn.nnx.summary(jaxbn.nnx.replace(model, jaxbn.nnx.BatchRenorm)))
        1 normalization layer, 2 channels
        layer     channels  learns       method        epsilon  statistics      rows
        layers/1         2  scale, bias  batch_renorm  1e-05    initial values     -
    """
    bound = as_partial(layer, (Norm, nnx.BatchNorm))
    copy = nnx.clone(model)
    layers = find_layers(copy)
    made = {path: _make(path, layers[path], bound) for path in select_layers(copy, paths)}
    for path, new in made.items():  # in the same object, so that all references to the layer see the new one
        set_class(layers[path], _class_for(layers[path], type(new)))
        vars(layers[path]).clear()
        vars(layers[path]).update(vars(new))
    converted: Model = convert_norms(model, like=copy)
    return converted


def _make(path: str, old: Any, layer: functools.partial[Any]) -> Any:
    """The new layer, with initial statistics."""
    if not has_plain_call(old):
        raise ValueError(
            f"{path!r} is a {type(old).__name__}, whose call is its own and would be lost. Name other layers with "
            f"paths=; freeze layers after they are replaced."
        )
    cls: Any = layer.func
    shared = Norm if issubclass(cls, Norm) else nnx.BatchNorm
    names = set(inspect.signature(shared.__init__).parameters)
    if isinstance(as_norm(old), Adapted) and as_norm(old).momentum is None:
        # The momentum of the old layer is not known, so the new layer uses its default.
        names -= {"momentum"}
    metadata = {f"{name}_metadata": _metadata(getattr(as_norm(old), name)) for name in ("scale", "bias")}
    arguments = {**metadata, **carried(path, as_norm(old), names, layer.keywords)}
    # The seed does not matter: `convert_norms` copies scale and bias from the old layer.
    return _stacked(cls(**arguments, rngs=nnx.Rngs(0)), old)


def _class_for(old: Any, new: Any) -> Any:
    """The class of the new layer, with a call that takes the arguments of the old layer."""
    cls, registered = cast(Any, type(old)), cast(Registered, known(old))
    translates, input_name = (getattr(cls, name, None) for name in ("jaxbn_translates", "jaxbn_input"))
    if isinstance(as_norm(old), Adapted):
        # The model still calls the layer with the arguments of the registered class.
        inner: Any = registered.cls
        translates, input_name = translation(inner, isinstance(old, nnx.bridge.ToNNX)), registered.input_name
    if translates is None:
        return new
    base = Norm if issubclass(new, Norm) else nnx.BatchNorm
    return with_call(new, base, translates, ("jaxbn_translates", translates), ("jaxbn_input", input_name))


def _metadata(variable: nnx.Param[Any] | None) -> dict[str, Any]:
    return {} if variable is None else variable.get_metadata()


def _stacked(new: Any, old: Any) -> Any:
    """The layer with its variables repeated along the leading axes that the old layer has, as from `nnx.vmap`."""
    old = as_norm(old)
    _, initial = evaluating_method(old)().init(old.num_features)
    leading = old.mean.shape[: old.mean.ndim - initial.mean.ndim]
    for _, variable in nnx.to_flat_state(nnx.state(new)):
        variable.set_value(jnp.broadcast_to(variable[...], (*leading, *variable.shape)))
    return new
