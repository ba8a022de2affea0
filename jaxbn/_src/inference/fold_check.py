"""Whether a folded model still gives what it gave, on an example."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._src.inference.fold_plan import Layer, Norm, Plan
from jaxbn._src.inference.fold_report import FoldReport
from jaxbn._src.tracing.harvest import over_arrays

# How far outputs may differ, relative to the largest: float32 in a deep network, and a few times the rounding of one
# value for the short dtypes, in which every layer rounds its output.
_TOLERANCES = {"float64": 1e-9, "float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}


def checked_report(
    plan: Plan,
    norms: Mapping[str, Norm],
    layers: Mapping[str, Layer],
    tolerance: float | None,
    before: tuple[Any, ...],
    after: tuple[Any, ...],
) -> FoldReport:
    """What was folded, if outputs are still what they were.

    Args:
        plan: What was folded.
        norms: The normalizations.
        layers: The linear layers.
        tolerance: How far outputs may differ; None: what the least precise of the dtypes at hand allows.
        before: A function, and the arguments with which it runs the model as it was.
        after: The same for the folded model.

    Returns:
        The report.

    Raises:
        ValueError: If folding changed the outputs.
    """
    tolerance = _tolerance_of(plan, norms, layers) if tolerance is None else tolerance
    error = _difference(_run(*before), _run(*after)) if plan.folds else 0.0
    if not error <= tolerance:  # NaN too
        raise ValueError(
            f"The folded model differs from the one given by {error:.2g} of its largest output on the example, and "
            f"tolerance={tolerance:g}; nothing was folded. Means that are large next to their standard deviations do "
            f"this, or an example on which outputs are not finite, or a call that is random: look at it in float32, "
            f"and give tolerance= if the difference is fine."
        )
    return FoldReport(plan.layers, error, tolerance)


def _tolerance_of(plan: Plan, norms: Mapping[str, Norm], layers: Mapping[str, Layer]) -> float:
    """What the least precise of the dtypes at hand allows."""
    found = [_TOLERANCES["float64"]]
    for one in plan.folds:
        dtypes = (*norms[one.norm].dtypes, layers[one.layer].weights.kernel.dtype)
        found += [_TOLERANCES[jnp.finfo(dtype).dtype.name] for dtype in dtypes]
    return max(found)


def _difference(expected: Any, found: Any) -> float:
    """The largest difference of two trees of outputs, relative to the largest value of each array of the first."""
    worst = 0.0
    for old, new in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        if jnp.issubdtype(old.dtype, jnp.inexact) and old.size:
            wide = np.complex128 if jnp.iscomplexobj(old) else np.float64
            old, new = np.asarray(old).astype(wide), np.asarray(new).astype(wide)
            size, distance = np.abs(old).max(), np.abs(new - old).max()
            worst = max(worst, float(distance / size) if size else np.inf if distance else 0.0, key=_nan_as_inf)
    return worst


def _nan_as_inf(error: float) -> float:
    return np.inf if np.isnan(error) else error


def _run(call: Callable[..., Any], *arguments: Any) -> Any:
    """The arrays that a call gives, compiled; other outputs are left out."""
    return jax.jit(lambda inputs: over_arrays(call(*inputs())))(over_arrays(arguments))
