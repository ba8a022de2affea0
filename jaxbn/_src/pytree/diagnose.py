"""Diagnosis of the statistics of models of plain functions."""

from collections.abc import Iterable
from typing import Any

from jaxbn._src.diagnostics.diagnose import diagnose_model
from jaxbn._src.diagnostics.diagnosis import Diagnosis
from jaxbn._src.framework.framework import Call
from jaxbn._src.framework.layers import Weights
from jaxbn._src.pytree.framework import PYTREE


def diagnose(
    call: Call,
    state: Any,
    batches: Iterable[Any],
    *,
    r_max: float = 3.0,
    d_max: float = 5.0,
    weights: Weights | None = None,
    progress: bool | None = None,
) -> Diagnosis:
    """Explains why batch normalization hurts a model of plain functions, and how to fix it.

    Use it if a network is worse in evaluation than in training. Pass ten or more batches as in training, with the same
    size and order. :func:`jaxbn.linen.diagnose` describes it in full, and is the one for Flax.

    Args:
        call: Runs the model, `(state, batch) -> outputs`, see :func:`jaxbn.postproc`. Pass the call of training to also
            detect layers that training never updates.
        state: A pytree that holds states of methods; it is not changed.
        batches: Any iterable of batches: pytrees of arrays with the examples along the leading axis.
        r_max: Batch Renormalization's bound, 1 or more: counts how often sigma_B / sigma is outside
            [1 / r_max, r_max].
        d_max: The same for |mu_B - mu| / sigma; not negative.
        weights: `batch -> [N]`, booleans or real weights of the examples, such as 0 for padding. They multiply the mask
            that the model passes to a layer.
        progress: Show a progress bar. None: only in a terminal.

    Returns:
        A `Diagnosis`: print it.

    Raises:
        ValueError: If there are fewer than two finite batches or no state of a method, or if a bound is invalid.

    Example:
        >>> bn = jaxbn.batch_norm()
        >>> params, state = bn.init(4)
        >>> rows = jax.random.normal(jax.random.key(1), (320, 4))
        >>> in_order = jnp.sort(rows, axis=0).reshape(10, 32, 4)
        >>> found = jaxbn.diagnose(lambda state, x: bn.eval(params, state, x), state, in_order)
        >>> found.findings[0].name, found.findings[0].advice[:21]
        ('non_iid', 'Shuffle the examples.')
    """
    return diagnose_model(PYTREE, call, state, batches, r_max=r_max, d_max=d_max, weights=weights, progress=progress)
