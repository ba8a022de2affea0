"""The arrays of linen variables, NNX models and PyTorch state dicts, as one list of layers.

A layer has a kernel, an embedding, or the scale and statistics of a normalization; a parameter outside of these forms
a layer by itself. All arrays are compared and converted in PyTorch's names and layout:

    Conv           kernel [*k, I/g, O]  <->  weight [O, I/g, *k]
    ConvTranspose  kernel [*k, I, O]    <->  weight [I, O, *k], flipped in space, because PyTorch's operation flips it
                   kernel [*k, O, I]    <->  weight [I, O, *k], with transpose_kernel=True, which also flips it
    Dense          kernel [I, O]        <->  weight [O, I]
"""

import secrets
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from flax import core, nnx, traverse_util
from flax.core import meta

from jaxbn._src.linen.capture import set_flags
from jaxbn._src.linen.layers import STATISTICS
from jaxbn._src.linen.layers import Norm as LinenNorm
from jaxbn._src.nnx.framework import SAVED
from jaxbn._src.nnx.layers import Norm

Key = tuple[Any, ...]

CONV, DENSE, EMBED, NORM, ARRAY = "conv", "dense", "embed", "norm", "array"
CONV_TRANSPOSE, CONV_TRANSPOSE_FLIPPED = "conv_transpose", "conv_transpose_flipped"

_CLASSES: dict[str, tuple[type, ...]] = {
    CONV: (nn.Conv, nnx.Conv),
    CONV_TRANSPOSE: (nn.ConvTranspose, nnx.ConvTranspose),
    DENSE: (nn.Dense, nnx.Linear),
    EMBED: (nn.Embed, nnx.Embed),
    NORM: (
        *(nn.BatchNorm, LinenNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.InstanceNorm),
        *(nnx.BatchNorm, Norm, nnx.LayerNorm, nnx.GroupNorm, nnx.RMSNorm, nnx.InstanceNorm),
    ),
}
# PyTorch's names. Other arrays of a layer, such as counters, are not used to tell layers apart.
_TORCH = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}
_TORCH |= {"mean": "running_mean", "var": "running_var"}
_COUNTS = {"count": "num_batches_tracked"}


class Layer(NamedTuple):
    """A part of a model that holds arrays directly, not only in its parts."""

    path: str
    kind: str
    keys: dict[str, Key]  # slot -> key of the array in the model
    shapes: dict[str, tuple[int, ...]]  # slot -> shape in PyTorch's layout; only slots that every such layer has

    @property
    def signature(self) -> frozenset[Any]:
        """The shapes that a layer of another model must have to be its counterpart."""
        return frozenset(self.shapes.items())


class Model(NamedTuple):
    """A model as an ordered list of layers, with functions that flatten and update values of such a model."""

    kind: str  # "linen", "nnx" or "torch"
    layers: list[Layer]
    given: Any
    flatten: Callable[[Any], dict[Key, Any]]
    # (values, {key: array}) -> the values with these arrays replaced
    update: Callable[[Any, Mapping[Key, Any]], Any]

    def read(self, flat: Mapping[Key, Any], layer: Layer) -> dict[str, np.ndarray]:
        """The arrays of a layer by slot, in PyTorch's layout, from flattened values."""
        return {slot: to_torch(layer.kind, slot, _as_array(flat[key])) for slot, key in layer.keys.items()}

    def write(self, values: Any, arrays: Mapping[str, Mapping[str, np.ndarray]]) -> Any:
        """The values with these arrays, given by layer and slot in PyTorch's layout."""
        updates = {}
        for layer in self.layers:
            for slot, array in arrays.get(layer.path, {}).items():
                updates[layer.keys[slot]] = from_torch(layer.kind, slot, array)
        return self.update(values, updates)


def to_torch(kind: str, slot: str, array: np.ndarray) -> np.ndarray:
    """Converts an array of a Flax layer to PyTorch's layout."""
    if slot != "weight":
        return array
    if kind == CONV_TRANSPOSE:
        return np.moveaxis(np.flip(array, tuple(range(array.ndim - 2))), (-2, -1), (0, 1))
    if kind in (CONV, CONV_TRANSPOSE_FLIPPED):
        return np.moveaxis(array, (-1, -2), (0, 1))
    return np.swapaxes(array, -1, -2) if kind == DENSE else array


def from_torch(kind: str, slot: str, array: np.ndarray) -> np.ndarray:
    """Converts an array in PyTorch's layout to that of the Flax layer."""
    if slot != "weight":
        return array
    if kind == CONV_TRANSPOSE:
        return np.flip(np.moveaxis(array, (0, 1), (-2, -1)), tuple(range(array.ndim - 2)))
    if kind in (CONV, CONV_TRANSPOSE_FLIPPED):
        return np.moveaxis(array, (0, 1), (-1, -2))
    return np.swapaxes(array, -1, -2) if kind == DENSE else array


def layout(model: Any) -> Model:
    """Reads a model of any of the three libraries."""
    if isinstance(model, nnx.Module):
        return _of_nnx(model)
    if isinstance(model, Mapping) and all(isinstance(value, Mapping) for value in model.values()):
        raise TypeError(
            "Variables of a linen model do not hold the order and types of its layers: pass the function that makes "
            "them, not jitted, lambda: net.init(key, x). From a checkpoint of PyTorch, pass the state dict alone."
        )
    if isinstance(model, Mapping):
        return _of_torch(model)
    if callable(model) and not isinstance(model, nn.Module) and not hasattr(model, "state_dict"):
        return _of_linen(model)
    raise TypeError(
        f"{type(model).__name__} is not a model that jaxbn can match: pass lambda: net.init(key, x) for linen, a "
        f"model for NNX, model.state_dict() for PyTorch."
    )


def _of_torch(state_dict: Mapping[str, Any]) -> Model:
    layers: dict[str, Layer] = {}
    given = dict(state_dict)
    for key, array in state_dict.items():
        if not hasattr(array, "shape"):
            raise TypeError(f"{key!r} of the state dict is not an array. From a checkpoint, pass the state dict alone.")
        path, _, slot = key.rpartition(".")
        if slot not in (*_TORCH.values(), *_COUNTS.values()):
            path, slot = key, ""
        layer = layers.setdefault(path, Layer(path, ARRAY, {}, {}))
        layer.keys[slot] = (key,)
        if slot in _COUNTS.values():
            given[key] = _as_given(array, None)  # a copy, since training increments counters in place
        else:
            layer.shapes[slot] = tuple(array.shape)

    def flatten(values: Any) -> dict[Key, Any]:
        return {(name,): array for name, array in values.items()}

    def update(values: Any, updates: Mapping[Key, Any]) -> dict[str, Any]:
        return {name: _as_given(old, updates.get((name,))) for name, old in values.items()}

    return Model("torch", list(layers.values()), given, flatten, update)


def _of_linen(init: Callable[[], Any]) -> Model:
    variables, kinds = _followed(init)
    flat = {key: leaf for key, leaf in _flat(variables).items() if key[0] in ("params", STATISTICS)}
    lost = ["/".join(key) for key in flat if key[1:-1] not in kinds]
    if lost:
        raise ValueError(f"{lost[0]!r} comes from a call that cannot be traced: pass the init itself, not jitted.")
    # Variables of one module keep their order, since `sorted` is stable.
    order = {path: position for position, path in enumerate(kinds)}
    keys = sorted(flat, key=lambda key: order[key[1:-1]])

    def flatten(variables: Any) -> dict[Key, Any]:
        return {key: meta.unbox(leaf) for key, leaf in _flat(variables).items()}

    def update(variables: Any, updates: Mapping[Key, Any]) -> Any:
        flat = _flat(variables)
        flat |= {key: meta.replace_boxed(flat[key], _like(key, flat[key], array)) for key, array in updates.items()}
        missing = [key for key, leaf in flat.items() if isinstance(meta.unbox(leaf), jax.ShapeDtypeStruct)]
        # Arrays that only the target has come from its init, compiled so that the rest is not computed.
        if missing:
            flat |= jax.jit(lambda: {key: leaf for key, leaf in _flat(init()).items() if key in missing})()
        return traverse_util.unflatten_dict(flat)

    layers = _layers({key: meta.unbox(flat[key]) for key in keys}, lambda key: key[1:-1], kinds)
    return Model("linen", layers, variables, flatten, update)


def _followed(init: Callable[[], Any]) -> tuple[Any, dict[Key, str]]:
    """The shapes of the variables, and the kinds of the modules by path, in the order of their calls."""
    kinds: dict[Key, str] = {}
    anew = {"jaxbn_followed": secrets.token_hex()}  # a new attribute, so that nn.jit does not use its cache

    def follow(next_call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if context.module.scope is not None:
            set_flags(context.module, anew)
            kinds.setdefault(context.module.path, _kind_of(context.module))
        return next_call(*args, **kwargs)

    with nn.intercept_methods(follow):
        return jax.eval_shape(lambda: init()), kinds  # a new function, so that it is traced again


def _flat(variables: Any) -> dict[Key, Any]:
    flat: dict[Key, Any] = traverse_util.flatten_dict(core.unfreeze(variables))
    return flat


def _of_nnx(model: Any) -> Model:
    kinds = {path: _kind_of(module) for path, module in nnx.iter_modules(model)}

    def flatten(model: Any) -> dict[Key, Any]:
        return {path: variable.get_value() for path, variable in nnx.to_flat_state(nnx.state(model, SAVED))}

    def update(model: Any, updates: Mapping[Key, Any]) -> Any:
        # NNX models are mutable, and callers expect the given one to stay unchanged.
        copy = nnx.clone(model)
        for path, variable in nnx.to_flat_state(nnx.state(copy, SAVED)):
            if path in updates:
                variable.set_value(_like(path, variable.get_value(), updates[path]))
        return copy

    flat = flatten(model)
    keys = sorted(flat, key=lambda path: _position(model, path))
    return Model("nnx", _layers({key: flat[key] for key in keys}, lambda key: key[:-1], kinds), model, flatten, update)


def _layers(flat: Mapping[Key, Any], module_of: Callable[[Key], Key], kinds: Mapping[Key, str]) -> list[Layer]:
    """The arrays of a Flax model as layers, in the same order."""
    layers: dict[str, Layer] = {}
    for key, leaf in flat.items():
        parts, name = module_of(key), str(key[-1])
        kind, slot = kinds.get(parts, ARRAY), (_TORCH | _COUNTS).get(name, name)
        if kind == ARRAY:
            # An array outside of the known layers forms a layer by itself.
            parts, slot = (*parts, key[-1]), ""
        path = "/".join(map(str, parts))
        layer = layers.setdefault(path, Layer(path, kind, {}, {}))
        layer.keys[slot] = key
        if slot in ("", *_TORCH.values()):
            # Broadcast of a scalar: the shape is computed without allocating the array.
            layer.shapes[slot] = to_torch(kind, slot, np.broadcast_to(np.zeros(()), leaf.shape)).shape
    return list(layers.values())


def _kind_of(module: Any) -> str:
    kind = next((kind for kind, classes in _CLASSES.items() if isinstance(module, classes)), ARRAY)
    return CONV_TRANSPOSE_FLIPPED if kind == CONV_TRANSPOSE and module.transpose_kernel else kind


def _position(model: Any, path: Key) -> list[int]:
    """Position of a variable in the order in which attributes were assigned."""
    node, found = model, []
    for part in path[:-1]:
        if not isinstance(node, Mapping):
            node = vars(node) if hasattr(node, "__dict__") else dict(enumerate(node))
        name = part if part in node else str(part)  # nnx.List stores its elements under their numbers
        found.append(list(node).index(name))
        node = node[name]
    return found


def _like(key: Key, old: Any, array: np.ndarray) -> jax.Array:
    """The array in the dtype of the array that it replaces."""
    old = meta.unbox(old)
    if array.shape != old.shape:
        raise ValueError(f"{'/'.join(map(str, key))!r} is {array.shape} in one model and {old.shape} in the other.")
    return jax.numpy.array(np.ascontiguousarray(array), old.dtype, copy=True)


def _as_given(old: Any, array: np.ndarray | None) -> Any:
    """A copy of the array (None: of the old one) in the type of the old one; a tensor stays on its device."""
    if not hasattr(old, "detach"):
        return np.array(old if array is None else array, np.asarray(old).dtype)
    return old.detach().clone() if array is None else old.detach().new_tensor(np.array(array))


def _as_array(value: Any) -> np.ndarray:
    """A value as a NumPy array; handles PyTorch tensors without importing PyTorch."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        # NumPy has no bfloat16; float32 holds its values exactly.
        value = (value.float() if "bfloat16" in str(value.dtype) else value).numpy()
    return np.asarray(value)
