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
    """Says why batch normalization hurts here, and what to do about it.

    Use it when a network is worse in evaluation than in training. Give it batches as training sees them, ten or more:
    of its size, in its order. Each runs through the network twice, normalized with its own statistics and with the
    stored ones; nothing is trained, and the variables are left untouched.

    Args:
        call: Runs the model, for one `lambda variables, batch: net.apply(variables, batch["image"], train=False)`. Give
            the call of training to see as well which layers it never updates: those that it asks for their stored
            statistics, while it asks others for the batch's, run as they are asked to.
        variables: All variables of the model.
        batches: Any iterable of batches, pytrees of arrays whose leading axis is that of the examples. They are all
            read, so pass `itertools.islice(loader, 100)` of a large set. Of several processes all must call this; they
            give global arrays, or each its own, as in `postproc`, and are told the same.
        r_max: Of Batch Renormalization: how often sigma_B / sigma is outside [1 / r_max, r_max] is counted. 1 or more.
        d_max: Likewise for |mu_B - mu| / sigma. Not negative.
        weights: `batch -> [N]`, booleans or real weights of the examples, such as 0 for those that fill up a batch.
            They multiply the mask that the model gives a layer.
        progress: Show a progress bar. None: if this is a terminal.

    Returns:
        A `Diagnosis`: print it. Calls of one layer inside a while loop or a shard_map are seen as one call.

    Raises:
        ValueError: If there are fewer than two batches that are finite, or no normalization layer; or for bounds that
            are none.

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
        are those of all batches together. That batches are not drawn at random is told by a one-way analysis of
        variance of the means of the examples, with Bonferroni's correction for channels and layers.
    """
    return diagnose_model(LINEN, call, variables, batches, r_max=r_max, d_max=d_max, weights=weights, progress=progress)
