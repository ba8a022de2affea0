"""Diagnosis of the statistics of linen models."""

from collections.abc import Iterable, Mapping
from typing import Any

from jaxbn._src.diagnostics.diagnose import diagnose_model
from jaxbn._src.diagnostics.diagnosis import Diagnosis
from jaxbn._src.framework.layers import Weights
from jaxbn._src.linen.framework import LINEN
from jaxbn._src.linen.variables import Call


def diagnose(
    call: Call,
    variables: Mapping[str, Any],
    batches: Iterable[Any],
    *,
    r_max: float = 3.0,
    d_max: float = 5.0,
    weights: Weights | None = None,
    progress: bool | None = None,
) -> Diagnosis:
    """Explains why batch normalization hurts a network, and how to fix it.

    Use it if a network is worse in evaluation than in training. Pass ten or more batches as in training, with the same
    size and order. Each batch runs twice: with batch statistics and with running statistics. There is no training, and
    the variables are not changed.

    Args:
        call: Runs the model, for example `lambda variables, batch: net.apply(variables, batch["image"], train=False)`.
            Pass the call of training to also detect layers that training never updates: layers that this call runs
            with running statistics while it runs others with batch statistics keep them in both runs.
        variables: All variables of the model.
        batches: Any iterable of batches: pytrees of arrays with the examples along the leading axis. All are read, so
            pass `itertools.islice(loader, 100)` for a large data set. With multiple processes, all must call this, with
            global arrays or with local batches as in `postproc`, and all get the same result.
        r_max: Batch Renormalization's bound, 1 or more: counts how often sigma_B / sigma is outside
            [1 / r_max, r_max].
        d_max: The same for |mu_B - mu| / sigma; not negative.
        weights: `batch -> [N]`, booleans or real weights of the examples, such as 0 for padding. They multiply the mask
            that the model passes to a layer.
        progress: Show a progress bar. None: only in a terminal.

    Returns:
        A `Diagnosis`: print it. Calls of one layer inside a while loop or a shard_map count as one call.

    Raises:
        ValueError: If there are fewer than two finite batches or no normalization layer, or if a bound is invalid.

    Example:
        >>> net = jaxbn.linen.BatchNorm(use_running_average=True)
        >>> variables = net.init(jax.random.key(0), jnp.zeros((1, 4)))
        >>> rows = jax.random.normal(jax.random.key(1), (320, 4))
        >>> in_order = jnp.sort(rows, axis=0).reshape(10, 32, 4)
        >>> found = jaxbn.linen.diagnose(net.apply, variables, in_order)
        >>> found.findings[0].name, found.findings[0].advice[:21]
        ('non_iid', 'Shuffle the examples.')

    References:
        r and d: Ioffe, `Batch Renormalization <https://arxiv.org/abs/1702.03275>`_, 2017, section 3; here mu and sigma
        are those of all batches together. Batches that are not random draws are detected by a one-way analysis of
        variance of the example means, with Bonferroni's correction for channels and layers.
    """
    return diagnose_model(LINEN, call, variables, batches, r_max=r_max, d_max=d_max, weights=weights, progress=progress)
