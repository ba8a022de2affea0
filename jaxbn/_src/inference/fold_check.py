"""Checks on an example that a folded model has the outputs of the original."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._src.inference.fold_plan import Plan, Traced
from jaxbn._src.inference.fold_report import FoldReport
from jaxbn._src.tracing.harvest import over_arrays

# Allowed difference of the outputs, relative to the largest: the error of float32 in a deep network, and a few rounding
# steps of the short dtypes, in which each layer rounds its output.
_TOLERANCES = {"float64": 1e-9, "float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}


def checked_report(
    plan: Plan, traced: Traced, tolerance: float | None, before: tuple[Any, ...], after: tuple[Any, ...]
) -> FoldReport:
    """Returns the report if folding did not change the outputs.

    Args:
        plan: The plan that was carried out.
        traced: What it was made for.
        tolerance: Allowed difference of the outputs. None: that of the least precise dtype in the model.
        before: A function, and the arguments with which it runs the original model.
        after: The same for the folded model.

    Returns:
        The report.

    Raises:
        ValueError: If folding changed the outputs.
    """
    tolerance = _tolerance_of(plan, traced) if tolerance is None else tolerance
    error = _difference(_run(*before), _run(*after)) if plan.folds else 0.0
    if not error <= tolerance:  # NaN too
        raise ValueError(
            f"The folded model was rejected: its outputs on the example differ by {error:.2g} of the largest output, "
            f"which is more than tolerance={tolerance:g}. Possible causes are means that are large compared with their "
            f"standard deviations, outputs that are not finite, or a random call. Check the model in float32, and pass "
            f"a larger tolerance= if the difference is acceptable."
        )
    return FoldReport(plan.layers, error, tolerance)


def _tolerance_of(plan: Plan, traced: Traced) -> float:
    """The tolerance of the least precise dtype in the model."""
    found = [_TOLERANCES["float64"]]
    for one in plan.folds:
        dtypes = (*traced.norms[one.norm].dtypes, traced.layers[one.layer].weights.kernel.dtype)
        found += [_TOLERANCES[jnp.finfo(dtype).dtype.name] for dtype in dtypes]
    return max(found)


def _difference(expected: Any, found: Any) -> float:
    """The largest difference of two trees of outputs, each array relative to its largest value in the first."""
    worst = 0.0
    for old, new in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        if jnp.issubdtype(old.dtype, jnp.inexact) and old.size:
            wide = np.complex128 if jnp.iscomplexobj(old) else np.float64
            old, new = np.asarray(old).astype(wide), np.asarray(new).astype(wide)
            size, distance = np.abs(old).max(), np.abs(new - old).max()
            # If all expected values are 0, any difference is infinite. So is NaN, which max() may drop.
            worst = max(worst, float(distance / size) if size else np.inf if distance else 0.0, key=_nan_as_inf)
    return worst


def _nan_as_inf(error: float) -> float:
    return np.inf if np.isnan(error) else error


def _run(call: Callable[..., Any], *arguments: Any) -> Any:
    """Compiles and runs a call; outputs that are not arrays are left out."""
    return jax.jit(lambda inputs: over_arrays(call(*inputs())))(over_arrays(arguments))
