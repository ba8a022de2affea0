"""Validation of batches."""

from typing import Any

import jax
import numpy as np

from jaxbn._src import internals as _internals


def check_batch(batch: Any, number: int) -> None:
    """Raises a TypeError that names the first leaf of a batch that is neither an array nor a number."""
    for path, leaf in jax.tree.leaves_with_path(batch):
        if isinstance(leaf, bool | int | float | complex) or _internals.is_array_of_jax(leaf):
            continue
        if hasattr(leaf, "__jax_array__"):
            continue
        kind = type(leaf)
        # JAX takes NumPy arrays as they are, unless it does not know their dtype, such as that of text.
        of = f" of dtype {leaf.dtype}" if isinstance(leaf, np.ndarray) else ""
        what = f"{kind.__module__.split('.')[0]}.{kind.__name__}" if hasattr(leaf, "dtype") else kind.__name__
        fix = (
            "Convert it with np.asarray(...) in the loader"
            if hasattr(leaf, "__array__") and not isinstance(leaf, np.ndarray)
            else "Leave it out, as with ({name: batch[name] for name in wanted} for batch in loader)"
        )
        raise TypeError(
            f"Batch {number} (counted from 0) holds a {what}{of} at batch{jax.tree_util.keystr(path)}, and batches are "
            f"pytrees of arrays and numbers. {fix}."
        )
