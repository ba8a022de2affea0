"""The layers of the other methods for flax.linen. They only declare fields."""

import dataclasses
from typing import Literal

from jax.typing import ArrayLike

from jaxbn._src.linen.layers import Norm
from jaxbn._src.methods.batch_renorm import batch_renorm
from jaxbn._src.methods.batch_renorm_schedules import RAMP, Schedule
from jaxbn._src.methods.domain_batch_norm import domain_batch_norm
from jaxbn._src.methods.ghost_batch_norm import ghost_batch_norm
from jaxbn._src.methods.moving_average_batch_norm import moving_average_batch_norm
from jaxbn._src.numerics.averages import Averaging


class BatchRenorm(Norm):
    r"""Batch Renormalization: batch norm for small batches, and for batches of similar examples.

    :func:`jaxbn.batch_renorm` describes when to use it and its formulas. The fields that `BatchNorm` does not have are
    arguments of that function. The statistics are `mean`, `var`, and `step` if a bound depends on it.

    Attributes:
        use_running_average: See the call.
        axis: Feature axis, or several.
        momentum: Weight of the OLD running value, in [0, 1), or a :class:`jaxbn.Averaging`.
        epsilon: Added to the variance, inside the root; positive.
        dtype: Dtype of the output; None: the promoted dtype of input and parameters.
        param_dtype: Dtype of the parameters.
        use_bias: Whether to learn a bias.
        use_scale: Whether to learn a scale.
        bias_init: Initializer of the bias.
        scale_init: Initializer of the scale.
        axis_name: Axis of a `shard_map`, `pmap` or `vmap` over which the batch is sharded; not used in evaluation.
        axis_index_groups: Groups of devices that share statistics.
        use_fast_variance: True sums about a shift, False centers first; both are numerically safe.
        force_float32_reductions: Accepted; statistics are float32 anyway.
        activation: Applied to the output; `jax.nn.relu` and `jax.nn.leaky_relu` cost no memory traffic here.
        allow_single_value: Do not warn about one value per channel in training.
        autodiff: Use JAX's own derivative; forward mode needs it.
        r_max: r lies in [1 / r_max, r_max]: a number, or a function of the training step.
        d_max: d lies in [-d_max, d_max]: a number, or a function of the training step.
        track_variance: Average the variance instead of its root.

    Example:
        >>> layer = jaxbn.linen.BatchRenorm(use_running_average=False, **jaxbn.renorm_ramp(warmup=500))
        >>> variables = layer.init(jax.random.key(0), jnp.ones((4, 2)))
        >>> sorted(variables["batch_stats"])
        ['mean', 'step', 'var']

    References:
        Ioffe, `Batch Renormalization <https://arxiv.org/abs/1702.03275>`_, 2017.
    """

    factory = staticmethod(batch_renorm)
    epsilon: float = 1e-3
    _: dataclasses.KW_ONLY
    r_max: float | Schedule = RAMP["r_max"]
    d_max: float | Schedule = RAMP["d_max"]
    track_variance: bool = False


class GhostBatchNorm(Norm):
    r"""Ghost batch norm: normalizes a large batch in groups of `ghost_size` samples, independent of the devices.

    :func:`jaxbn.ghost_batch_norm` describes when to use it and its formulas. The statistics are those of `BatchNorm`.

    Attributes:
        use_running_average: See the call.
        axis: Feature axis, or several.
        momentum: Weight of the OLD running value, in [0, 1); None keeps no running average; or a
            :class:`jaxbn.Averaging`.
        epsilon: Added to the variance.
        dtype: Dtype of the output; None: the promoted dtype of input and parameters.
        param_dtype: Dtype of the parameters.
        use_bias: Whether to learn a bias.
        use_scale: Whether to learn a scale.
        bias_init: Initializer of the bias.
        scale_init: Initializer of the scale.
        axis_name: Axis of a `shard_map`, `pmap` or `vmap` over which the batch is sharded; not used in evaluation.
        axis_index_groups: Must be None.
        use_fast_variance: True sums about a shift, False centers first; both are numerically safe.
        force_float32_reductions: Accepted; statistics are float32 anyway.
        activation: Applied to the output; `jax.nn.relu` and `jax.nn.leaky_relu` cost no memory traffic here.
        allow_single_value: Accept groups of one value per channel in training.
        autodiff: Use JAX's own derivative; forward mode needs it.
        ghost_size: Samples in a group, over all devices; must be given.
        grouping: `"contiguous"` or `"strided"`.
        running: The variance that the running average uses: `"group_mean"` or `"pooled"`.

    Example:
        >>> layer = jaxbn.linen.GhostBatchNorm(ghost_size=2, use_running_average=False)
        >>> x = jnp.array([[1.0], [3.0], [11.0], [13.0]])
        >>> y, _ = layer.apply(layer.init(jax.random.key(0), x), x, mutable=["batch_stats"])
        >>> y.round(2).ravel()
        Array([-1.,  1., -1.,  1.], dtype=float32)

    References:
        Hoffer, Hubara & Soudry, `Train longer, generalize better <https://arxiv.org/abs/1705.08741>`_, 2017.
    """

    factory = staticmethod(ghost_batch_norm)
    _: dataclasses.KW_ONLY
    ghost_size: int
    grouping: Literal["contiguous", "strided"] = "contiguous"
    running: Literal["group_mean", "pooled"] = "group_mean"


class MovingAverageBatchNorm(Norm):
    r"""Moving average batch normalization (MABN): statistics of the last batches, for one to four examples.

    :func:`jaxbn.moving_average_batch_norm` describes when to use it and its formulas. Call
    :func:`jaxbn.linen.update_backward` after each gradient; `make_steps` does. Use centered kernels in the preceding
    layers.

    Attributes:
        use_running_average: See the call.
        axis: Feature axis, or several.
        momentum: Weight of the OLD running value, in [0, 1), or a :class:`jaxbn.Averaging`.
        epsilon: Added to the second moment, inside the root; positive.
        dtype: Dtype of the output; None: the promoted dtype of input and parameters.
        param_dtype: Dtype of the parameters.
        use_bias: Whether to learn a bias.
        use_scale: Must be True.
        bias_init: Initializer of the bias.
        scale_init: Initializer of the scale.
        axis_name: Axis of a `shard_map`, `pmap` or `vmap` over which the batch is sharded; not used in evaluation.
        axis_index_groups: Groups of devices that share statistics.
        use_fast_variance: True sums about a shift, False centers first; both are numerically safe.
        force_float32_reductions: Accepted; statistics are float32 anyway.
        activation: Applied to the output.
        allow_single_value: Accepted; one value per channel is fine here.
        autodiff: Must be False.
        window: Number of batches that are averaged.
        warmup: Number of first steps that use batch statistics only.
        r_max: r lies in [1 / r_max, r_max].

    Example:
        >>> layer = jaxbn.linen.MovingAverageBatchNorm(use_running_average=False, window=8)
        >>> variables = layer.init(jax.random.key(0), jnp.ones((2, 3)))
        >>> variables["batch_stats"]["square_window"].shape
        (8, 3)

    References:
        Yan et al., `Towards Stabilizing Batch Statistics <https://arxiv.org/abs/2001.06838>`_, 2020.
    """

    factory = staticmethod(moving_average_batch_norm)
    momentum: ArrayLike | Averaging | None = 0.98
    _: dataclasses.KW_ONLY
    window: int = 16
    warmup: int = 100
    r_max: float = 5.0


class DomainBatchNorm(Norm):
    r"""Batch norm with statistics for each domain: domain-specific, auxiliary (AdvProp) and split batch norm.

    :func:`jaxbn.domain_batch_norm` describes when to use it, the meaning of the ids, and its formulas. The call takes
    `domain=`, the id of each example, integers `[N]`. `jaxbn.linen.convert_norms` initializes it from a trained
    `BatchNorm`, with a copy for each domain.

    Attributes:
        use_running_average: See the call.
        axis: Feature axis, or several; not the leading one.
        momentum: Weight of the OLD running value, in [0, 1); None keeps no running average; or a
            :class:`jaxbn.Averaging`.
        epsilon: Added to the variance.
        dtype: Dtype of the output; None: the promoted dtype of input and parameters.
        param_dtype: Dtype of the parameters.
        use_bias: Whether to learn a bias.
        use_scale: Whether to learn a scale.
        bias_init: Initializer of the bias.
        scale_init: Initializer of the scale.
        axis_name: Axis of a `shard_map`, `pmap` or `vmap` over which the batch is sharded; not used in evaluation.
        axis_index_groups: Groups of devices that share statistics.
        use_fast_variance: Accepted; domains are always centered first.
        force_float32_reductions: Accepted; statistics are float32 anyway.
        activation: Applied to the output; `jax.nn.relu` and `jax.nn.leaky_relu` cost no memory traffic here.
        allow_single_value: Accept one value per channel in training.
        autodiff: Use JAX's own derivative; forward mode needs it.
        num_domains: Number of domains D; statistics are `[D, C]`.
        share_affine: Learn one scale and bias for all domains, `[C]`, instead of one for each, `[D, C]`.

    Example:
        >>> layer = jaxbn.linen.DomainBatchNorm(use_running_average=False, num_domains=2, momentum=0.0)
        >>> x, domain = jnp.array([[1.0], [10.0], [3.0], [30.0]]), jnp.array([0, 1, 0, 1])
        >>> variables = layer.init(jax.random.key(0), x, domain=domain)
        >>> y, updates = layer.apply(variables, x, domain=domain, mutable=["batch_stats"])
        >>> updates["batch_stats"]["mean"].ravel()
        Array([ 2., 20.], dtype=float32)

    References:
        Chang et al., `Domain-Specific Batch Normalization <https://arxiv.org/abs/1906.03950>`_, 2019.
    """

    factory = staticmethod(domain_batch_norm)
    _: dataclasses.KW_ONLY
    num_domains: int
    share_affine: bool = False
