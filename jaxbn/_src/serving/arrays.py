"""What files hold of a network: its arrays and the containers they are in, and what is known of its statistics.

The header of a file has the containers as JSON. An array is `[dtype, shape]`, a dict with string keys is an object,
None is null; other containers carry a tag: `["list", [...]]`, `["tuple", [...]]`, `["items", [[key, ...], ...]]` for a
dict with integer keys, `["frozen", ...]` for Flax's FrozenDict. The numbers follow the header, array after array in the
order of `jax.tree.leaves`, row-major and little-endian.
"""

import json
import math
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from flax.core import FrozenDict

from jaxbn._src.inference.frozen import Info, LayerInfo

# The numbers that JAX has. A file that names any other dtype, such as that of objects or text, is refused.
DTYPES = frozenset(
    "bool int2 int4 int8 int16 int32 int64 uint2 uint4 uint8 uint16 uint32 uint64 float4_e2m1fn float8_e3m4 "
    "float8_e4m3 float8_e4m3b11fnuz float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu bfloat16 "
    "float16 float32 float64 complex64 complex128".split()
)
# Numbers along the axes of an array that has none in all: sizes beyond any memory, of which libraries overflow.
_MOST = 2**40


def check_array(path: Any, leaf: Any) -> None:
    """Raises a TypeError for a leaf that is no array of numbers, which would not come back as it is."""
    is_array = isinstance(leaf, jax.Array | np.ndarray | np.generic)
    if not is_array or leaf.dtype.name not in DTYPES or not np.dtype(leaf.dtype).isnative:
        raise TypeError(
            f"{name_of(path)!r} is {leaf.dtype if is_array else type(leaf)}; a frozen network holds arrays of numbers "
            f"as JAX has them, in dicts, lists and tuples."
        )


def to_host(path: Any, leaf: Any) -> np.ndarray:
    """The leaf of a tree in the memory of this process."""
    check_array(path, leaf)
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        raise ValueError(
            f"{name_of(path)!r} lies on several processes: save it with jaxbn.serving.save_sharded, or gather it on "
            f"one and save it there."
        )
    return np.asarray(leaf)


def to_device(path: Any, array: np.ndarray) -> jax.Array:
    """A copy of the leaf on the default device, as it was saved."""
    check_dtype(path, array.dtype)
    return jax.device_put(array.copy())  # jnp.asarray compiles a program for each shape


def check_dtype(path: Any, dtype: np.dtype) -> None:
    """Raises a ValueError for numbers of which JAX, as it is set, would keep half of the bits."""
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(f"{name_of(path)!r} is {dtype}, which JAX would round: set jax_enable_x64 before loading.")


def name_of(path: Any) -> str:
    """The path of a leaf as text."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


# --- The containers ---------------------------------------------------------------------------------------------------


def describe_tree(tree: Any) -> Any:
    """The containers, dtypes and shapes of a tree of arrays, as JSON; a TypeError names what cannot be written."""
    found = _describe((), tree)
    given: Any = jax.tree.structure(tree)
    back: Any = jax.tree.structure(shapes_of(json.loads(json.dumps(found))))
    if given != back:  # it is better known before anything is lost
        raise TypeError(f"{given} would come back as {back}.")
    return found


def shapes_of(described: Any) -> Any:
    """The tree that `describe_tree` has described, of shapes and dtypes; an error of any type if it has not."""
    if described is None:
        return None
    if isinstance(described, dict):
        return {key: shapes_of(value) for key, value in described.items()}
    tag, content = described
    if tag in ("list", "tuple"):
        return {"list": list, "tuple": tuple}[tag](shapes_of(value) for value in content)
    if tag == "items":
        items = {_checked(key, int): shapes_of(value) for key, value in content}
        return _checked(items, dict, len(items) == len(content))
    if tag == "frozen":
        return FrozenDict(_checked(shapes_of(content), dict))
    shape = tuple(_checked(size, int, size >= 0) for size in _checked(content, list))
    _checked(tag, str, tag in DTYPES and math.prod(size or 1 for size in shape) < _MOST)
    return jax.ShapeDtypeStruct(shape, np.dtype(tag))


def _describe(path: Any, node: Any) -> Any:
    if node is None:
        return None
    if type(node) is dict and all(type(key) is str for key in node):
        return {key: _describe((*path, jax.tree_util.DictKey(key)), value) for key, value in node.items()}
    if type(node) is dict and all(type(key) is int for key in node):
        return ["items", [[key, _describe((*path, jax.tree_util.DictKey(key)), node[key])] for key in node]]
    if type(node) is FrozenDict:
        return ["frozen", _describe(path, node.unfreeze())]
    if type(node) in (list, tuple):
        values = [_describe((*path, jax.tree_util.SequenceKey(i)), value) for i, value in enumerate(node)]
        return [type(node).__name__, values]
    check_array(path, node)
    return [node.dtype.name, list(node.shape)]


def _checked(value: Any, kind: type | tuple[type, ...], holds: bool = True) -> Any:
    """The value; a ValueError if it is of another type, of which a bool is one where a number is wanted, or wrong."""
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool) or not holds:
        raise ValueError(f"{str(value)[:80]!r} cannot be there.")
    return value


# --- The numbers ------------------------------------------------------------------------------------------------------


def size_of(leaf: Any) -> int:
    """The bytes of an array in a file; a number of less than a byte takes one."""
    return math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize


def pack(arrays: Iterable[np.ndarray]) -> list[memoryview]:
    """The bytes of each array."""
    return [array.reshape(-1).view(np.uint8).data for array in arrays]


def unpack(shapes: Any, body: bytes | memoryview) -> Any:
    """The arrays of a tree of shapes, as parts of the bytes; a ValueError if the bytes are not as many."""
    leaves, structure = jax.tree.flatten(shapes)
    sizes = [size_of(leaf) for leaf in leaves]
    if sum(sizes) != len(body):
        raise ValueError(f"its arrays take {sum(sizes)} bytes, and it holds {len(body)}.")
    ends, body = np.cumsum([0, *sizes]).tolist(), memoryview(body)  # of which parts are no copies
    arrays = [from_bytes(leaf, body[start:end]) for leaf, start, end in zip(leaves, ends, ends[1:], strict=False)]
    return jax.tree.unflatten(structure, arrays)


def from_bytes(leaf: Any, content: bytes | memoryview) -> np.ndarray:
    """The array of this shape and dtype out of its bytes."""
    if leaf.dtype == bool and np.any(np.frombuffer(content, np.uint8) > 1):
        raise ValueError("one of its truth values is neither true nor false.")
    return np.frombuffer(content, leaf.dtype).reshape(leaf.shape)


# --- What is known ----------------------------------------------------------------------------------------------------


def describe(info: Info) -> dict[str, Any]:
    """What is known of a network, for a header."""
    return {"layers": {name: layer._asdict() for name, layer in info.layers}, "versions": dict(info.versions)}


def info_of(header: dict[str, Any]) -> Info:
    """What a header says of a network; an error of any type if it says something else."""
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
