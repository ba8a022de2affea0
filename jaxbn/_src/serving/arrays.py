"""Serialization of a network: its containers and the information on its statistics as JSON, its arrays as bytes.

In JSON, an array is `[dtype, shape]`, a dict with string keys is an object, and None is null. Other containers have a
tag: `["list", [...]]`, `["tuple", [...]]`, `["items", [[key, ...], ...]]` for a dict with integer keys, and `["frozen",
...]` for Flax's FrozenDict, and the name of its class for a NamedTuple of jaxbn. The bytes of the arrays follow the
header in the order of `jax.tree.leaves`, row-major and little-endian.

The safetensors format has no int2, int4, uint2, uint4, complex128, and not all types of float8 (as of version 0.8.0),
so it cannot hold every network.
"""

import json
import math
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from flax.core import FrozenDict

from jaxbn._src.inference.frozen import Info, LayerInfo
from jaxbn._src.methods.batch_norm import BatchNormState
from jaxbn._src.methods.batch_renorm import BatchRenormState
from jaxbn._src.methods.domain_batch_norm import DomainBatchNormState
from jaxbn._src.methods.ghost_batch_norm import GhostBatchNormState
from jaxbn._src.methods.moving_average_batch_norm import MovingAverageBatchNormState
from jaxbn._src.methods.protocol import NormParams

# The dtypes of JAX. A file with any other dtype, such as that of objects or text, is rejected.
DTYPES = frozenset(
    "bool int2 int4 int8 int16 int32 int64 uint2 uint4 uint8 uint16 uint32 uint64 float4_e2m1fn float8_e3m4 "
    "float8_e4m3 float8_e4m3b11fnuz float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu bfloat16 "
    "float16 float32 float64 complex64 complex128".split()
)
# The NamedTuples in the trees of plain functions. A file cannot name any other class.
NAMED: dict[str, Any] = {
    cls.__name__: cls
    for cls in (
        NormParams, BatchNormState, BatchRenormState, DomainBatchNormState, GhostBatchNormState,
        MovingAverageBatchNormState,
    )
}  # fmt: skip
# The largest product of the non-zero sizes of an array. Larger ones, possible in an empty array, overflow in libraries.
_MOST = 2**40


def check_array(path: Any, leaf: Any) -> None:
    """Raises a TypeError for a leaf that is not an array of numbers, since it would not be restored as it is."""
    is_array = isinstance(leaf, jax.Array | np.ndarray | np.generic)
    if not is_array or leaf.dtype.name not in DTYPES or not np.dtype(leaf.dtype).isnative:
        raise TypeError(
            f"{name_of(path)!r} is {leaf.dtype if is_array else type(leaf)}; a frozen network holds arrays of numbers "
            f"with dtypes of JAX, in dicts, lists, tuples and the NamedTuples of jaxbn."
        )


def to_host(path: Any, leaf: Any) -> np.ndarray:
    """Returns the leaf of a tree as a NumPy array."""
    check_array(path, leaf)
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        raise ValueError(
            f"{name_of(path)!r} is spread over several processes: use jaxbn.serving.save_sharded, or gather the array "
            f"on one process and save it there."
        )
    return np.asarray(leaf)


def to_device(path: Any, array: np.ndarray) -> jax.Array:
    """Copies the leaf to the default device, with the dtype that was saved."""
    check_dtype(path, array.dtype)
    return jax.device_put(array.copy())  # jnp.asarray compiles a program for each shape


def check_dtype(path: Any, dtype: np.dtype) -> None:
    """Raises a ValueError for a 64-bit dtype if JAX is configured for 32 bits."""
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(f"{name_of(path)!r} is {dtype}, which JAX would round: set jax_enable_x64 before loading.")


def name_of(path: Any) -> str:
    """Returns the path of a leaf as text."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


# --- The containers ---------------------------------------------------------------------------------------------------


def describe_tree(tree: Any) -> Any:
    """Returns the containers, dtypes and shapes of a tree of arrays as JSON; a TypeError names unsupported nodes."""
    found = _describe((), tree)
    given: Any = jax.tree.structure(tree)
    back: Any = jax.tree.structure(shapes_of(json.loads(json.dumps(found))))
    if given != back:  # an error now is better than a wrong network after loading
        raise TypeError(f"{given} would be restored as {back}.")
    return found


def shapes_of(described: Any) -> Any:
    """Inverts `describe_tree`: returns a tree of shapes and dtypes. Raises errors of any type for other JSON."""
    if described is None:
        return None
    if isinstance(described, dict):
        return {key: shapes_of(value) for key, value in described.items()}
    tag, content = described
    if tag in ("list", "tuple"):
        return {"list": list, "tuple": tuple}[tag](shapes_of(value) for value in content)
    if tag in NAMED:
        return NAMED[tag](*(shapes_of(value) for value in _checked(content, list)))
    if tag == "items":
        items = {_checked(key, int): shapes_of(value) for key, value in content}
        # If a key is repeated, the dict has fewer items, and a leaf of the file would be lost.
        return _checked(items, dict, len(items) == len(content))
    if tag == "frozen":
        return FrozenDict(_checked(shapes_of(content), dict))
    shape = tuple(_checked(size, int, size >= 0) for size in _checked(content, list))
    _checked(tag, str, tag in DTYPES and math.prod(size or 1 for size in shape) < _MOST)
    return jax.ShapeDtypeStruct(shape, np.dtype(tag))


def _describe(path: Any, node: Any) -> Any:
    if node is None:
        return None
    # Exact types only: loading would restore a subclass, such as another NamedTuple, as its base class.
    if type(node) is dict and all(type(key) is str for key in node):
        return {key: _describe((*path, jax.tree_util.DictKey(key)), value) for key, value in node.items()}
    if type(node) is dict and all(type(key) is int for key in node):
        # The keys of a JSON object are strings, so integer keys need a list of pairs.
        return ["items", [[key, _describe((*path, jax.tree_util.DictKey(key)), node[key])] for key in node]]
    if type(node) is FrozenDict:
        return ["frozen", _describe(path, node.unfreeze())]
    if type(node) in (list, tuple):
        values = [_describe((*path, jax.tree_util.SequenceKey(i)), value) for i, value in enumerate(node)]
        return [type(node).__name__, values]
    if NAMED.get(type(node).__name__) is type(node):
        named = ((*path, jax.tree_util.GetAttrKey(name)) for name in node._fields)
        return [type(node).__name__, [_describe(name, value) for name, value in zip(named, node, strict=True)]]
    check_array(path, node)
    return [node.dtype.name, list(node.shape)]


def _checked(value: Any, kind: type | tuple[type, ...], holds: bool = True) -> Any:
    """Returns the value; raises a ValueError if it has another type (a bool is not a number) or `holds` is false."""
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool) or not holds:
        raise ValueError(f"unexpected value {str(value)[:80]!r}.")
    return value


# --- The numbers ------------------------------------------------------------------------------------------------------


def size_of(leaf: Any) -> int:
    """Returns the number of bytes of an array in a file; a value of fewer than 8 bits takes a byte."""
    return math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize


def pack(arrays: Iterable[np.ndarray]) -> list[memoryview]:
    """Returns the bytes of each array."""
    # View as uint8 first: the buffer protocol does not support the dtypes of ml_dtypes, such as bfloat16.
    return [array.reshape(-1).view(np.uint8).data for array in arrays]


def unpack(shapes: Any, body: bytes | memoryview) -> Any:
    """Returns the arrays of a tree of shapes, as views of the bytes; a ValueError if their sizes do not match."""
    leaves, structure = jax.tree.flatten(shapes)
    sizes = [size_of(leaf) for leaf in leaves]
    if sum(sizes) != len(body):
        raise ValueError(f"its arrays take {sum(sizes)} bytes, but it holds {len(body)}.")
    ends, body = np.cumsum([0, *sizes]).tolist(), memoryview(body)  # slices of a memoryview are not copies
    arrays = [from_bytes(leaf, body[start:end]) for leaf, start, end in zip(leaves, ends, ends[1:], strict=False)]
    return jax.tree.unflatten(structure, arrays)


def from_bytes(leaf: Any, content: bytes | memoryview) -> np.ndarray:
    """Returns the array of this shape and dtype as a view of the bytes."""
    if leaf.dtype == bool and np.any(np.frombuffer(content, np.uint8) > 1):
        raise ValueError("a boolean value is neither 0 nor 1.")
    return np.frombuffer(content, leaf.dtype).reshape(leaf.shape)


# --- The information --------------------------------------------------------------------------------------------------


def describe(info: Info) -> dict[str, Any]:
    """Returns the information on a network as JSON."""
    return {"layers": {name: layer._asdict() for name, layer in info.layers}, "versions": dict(info.versions)}


def info_of(header: dict[str, Any]) -> Info:
    """Inverts `describe`. Raises errors of any type for other JSON."""
    layers = tuple((name, _layer(**layer)) for name, layer in header["layers"].items())
    return Info(layers, tuple((name, _checked(version, str)) for name, version in header["versions"].items()))


def _layer(method: Any, epsilon: Any, estimator: Any, rows: Any) -> LayerInfo:
    number = (int, float)
    return LayerInfo(
        method if method is None else _checked(method, str),
        epsilon if epsilon is None else _checked(epsilon, number),
        _checked(estimator, str),
        rows if rows is None else _checked(rows, number),
    )
