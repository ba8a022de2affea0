"""What files hold of a network: its arrays as the host has them, and what is known of its statistics."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn.core import calls as _calls
from jaxbn.population.frozen import Info, LayerInfo


def check_array(path: Any, leaf: Any) -> None:
    """Raises a TypeError for a leaf that is no array of numbers, which would not come back as it is."""
    is_array = isinstance(leaf, jax.Array | np.ndarray | np.generic)
    # What JAX does not take would not come back as it is: text, and numbers in the byte order of other machines.
    if not is_array or not _calls.is_array_of_jax(leaf) or jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        raise TypeError(
            f"{name_of(path)!r} is {leaf.dtype if is_array else type(leaf)}; a frozen network holds arrays of numbers "
            f"as JAX has them."
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
    """The leaf on the default device, as it was saved."""
    check_dtype(path, array.dtype)
    return jnp.asarray(array)


def check_dtype(path: Any, dtype: np.dtype) -> None:
    """Raises a ValueError for numbers of which JAX, as it is set, would keep half of the bits."""
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(f"{name_of(path)!r} is {dtype}, which JAX would round: set jax_enable_x64 before loading.")


def name_of(path: Any) -> str:
    """The path of a leaf as text."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def describe(info: Info) -> dict[str, Any]:
    """What is known of a network, for a header."""
    return {"layers": {name: layer._asdict() for name, layer in info.layers}, "versions": dict(info.versions)}


def info_of(header: dict[str, Any]) -> Info:
    """What a header says of a network."""
    layers = tuple((name, LayerInfo(**layer)) for name, layer in header["layers"].items())
    return Info(layers, tuple(header["versions"].items()))
