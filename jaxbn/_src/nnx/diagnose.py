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
    """Says why batch normalization hurts here, and what to do about it.

    :func:`jaxbn.linen.diagnose` describes it in full. The model is not changed.

    Args:
        model: The model.
        batches: Any iterable of batches, pytrees of arrays whose leading axis is that of the examples. They are all
            read, so pass `itertools.islice(loader, 100)` of a large set. Of several processes all must call this; they
            give global arrays, or each its own, as in `postproc`, and are told the same.
        call: Runs the model; None: `lambda model, batch: model(batch)`. Give a model in training mode, `model.train()`,
            to see as well which layers training never updates.
        r_max: Of Batch Renormalization: how often sigma_B / sigma is outside [1 / r_max, r_max] is counted. 1 or more.
        d_max: Likewise for |mu_B - mu| / sigma. Not negative.
        weights: `batch -> [N]`, booleans or real weights of the examples, such as 0 for those that fill up a batch.
            They multiply the mask that the model gives a layer.
        progress: Show a progress bar. None: if this is a terminal.

    Returns:
        A `Diagnosis`: print it.

    Raises:
        ValueError: If there are fewer than two batches that are finite, or no normalization layer; or for bounds that
            are none.

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
