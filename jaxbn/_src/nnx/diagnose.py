"""Diagnosis of the statistics of NNX models."""

from collections.abc import Iterable
from typing import Any

from jaxbn._src.diagnostics.diagnose import diagnose_model
from jaxbn._src.diagnostics.diagnosis import Diagnosis
from jaxbn._src.framework.framework import Call
from jaxbn._src.framework.layers import Weights
from jaxbn._src.nnx.capture import run_model
from jaxbn._src.nnx.framework import NNX


def diagnose(
    model: Any,
    batches: Iterable[Any],
    *,
    call: Call | None = None,
    r_max: float = 3.0,
    d_max: float = 5.0,
    weights: Weights | None = None,
    progress: bool | None = None,
) -> Diagnosis:
    """Explains why batch normalization hurts a network, and how to fix it.

    :func:`jaxbn.linen.diagnose` has the details. The model is not changed.

    Args:
        model: The model.
        batches: Any iterable of batches: pytrees of arrays with the examples along the leading axis. All are read, so
            pass `itertools.islice(loader, 100)` for a large data set. With multiple processes, all must call this, with
            global arrays or with local batches as in `postproc`, and all get the same result.
        call: Runs the model; None: `lambda model, batch: model(batch)`. Pass a model in training mode, `model.train()`,
            to also detect layers that training never updates.
        r_max: Batch Renormalization's bound, 1 or more: counts how often sigma_B / sigma is outside
            [1 / r_max, r_max].
        d_max: The same for |mu_B - mu| / sigma; not negative.
        weights: `batch -> [N]`, booleans or real weights of the examples, such as 0 for padding. They multiply the mask
            that the model passes to a layer.
        progress: Show a progress bar. None: only in a terminal.

    Returns:
        A `Diagnosis`: print it.

    Raises:
        ValueError: If there are fewer than two finite batches or no normalization layer, or if a bound is invalid.

    Example:
        >>> model = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
        >>> batches = 7 + jax.random.normal(jax.random.key(0), (10, 32, 4))
        >>> jaxbn.nnx.diagnose(model, batches).findings[0].advice
        'Run postproc, or let training update the running averages.'
    """
    return diagnose_model(
        NNX,
        run_model if call is None else call,
        model,
        batches,
        r_max=r_max,
        d_max=d_max,
        weights=weights,
        progress=progress,
    )
