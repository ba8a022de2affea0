"""The layers of the other methods for flax.nnx. They only declare arguments."""

from collections.abc import Sequence
from typing import Any, Literal

from jax.typing import ArrayLike

from jaxbn._src.methods.batch_renorm import batch_renorm
from jaxbn._src.methods.batch_renorm_schedules import RAMP, Schedule
from jaxbn._src.methods.domain_batch_norm import domain_batch_norm
from jaxbn._src.methods.ghost_batch_norm import ghost_batch_norm
from jaxbn._src.methods.moving_average_batch_norm import moving_average_batch_norm
from jaxbn._src.nnx.layers import Norm
from jaxbn._src.numerics.averages import Averaging


class BatchRenorm(Norm):
    r"""Batch Renormalization: batch norm for small batches, and for batches of similar examples.

    :func:`jaxbn.batch_renorm` describes when to use it and its formulas. The statistics are `mean`, `var`, and `step`
    if a bound depends on it. `nnx.update(new_layer, nnx.state(old_layer))` copies those of a `BatchNorm`.

    Args:
        num_features: Number of features, or their shape for several feature axes.
        epsilon: Added to the variance, inside the root; positive.
        r_max: r lies in [1 / r_max, r_max]: a number, or a function of the training step.
        d_max: d lies in [-d_max, d_max]: a number, or a function of the training step.
        track_variance: Average the variance instead of its root.
        shared: The other arguments of :class:`BatchNorm`, with the same meaning, including `rngs`. A momentum of
            None is an error; `allow_single_value` silences a warning, where it is an error there.

    Returns:
        A module.

    Example:
        >>> layer = jaxbn.nnx.BatchRenorm(2, **jaxbn.renorm_ramp(warmup=500), rngs=nnx.Rngs(0))
        >>> y = layer(jnp.array([[1.0, 0.0], [3.0, 8.0]]))
        >>> float(layer.step[...])
        1.0

    References:
        Ioffe, `Batch Renormalization <https://arxiv.org/abs/1702.03275>`_, 2017.
    """

    factory = staticmethod(batch_renorm)

    def __init__(
        self,
        num_features: int | Sequence[int],
        *,
        epsilon: float = 1e-3,
        r_max: float | Schedule = RAMP["r_max"],
        d_max: float | Schedule = RAMP["d_max"],
        track_variance: bool = False,
        **shared: Any,
    ):
        super().__init__(
            num_features, epsilon=epsilon, r_max=r_max, d_max=d_max, track_variance=track_variance, **shared
        )


class GhostBatchNorm(Norm):
    r"""Ghost batch norm: normalizes a large batch in groups of `ghost_size` samples, independent of the devices.

    :func:`jaxbn.ghost_batch_norm` describes when to use it and its formulas. The statistics are those of `BatchNorm`.

    Args:
        num_features: Number of features, or their shape for several feature axes.
        ghost_size: Samples in a group, over all devices.
        grouping: `"contiguous"` or `"strided"`.
        running: The variance that the running average uses: `"group_mean"` or `"pooled"`.
        shared: The other arguments of :class:`BatchNorm`, with the same meaning, including `rngs`; except
            `axis_index_groups`, which must be None.

    Returns:
        A module.

    Example:
        >>> layer = jaxbn.nnx.GhostBatchNorm(1, ghost_size=2, rngs=nnx.Rngs(0))
        >>> layer(jnp.array([[1.0], [3.0], [11.0], [13.0]])).round(2).ravel()
        Array([-1.,  1., -1.,  1.], dtype=float32)

    References:
        Hoffer, Hubara & Soudry, `Train longer, generalize better <https://arxiv.org/abs/1705.08741>`_, 2017.
    """

    factory = staticmethod(ghost_batch_norm)

    def __init__(
        self,
        num_features: int | Sequence[int],
        *,
        ghost_size: int,
        grouping: Literal["contiguous", "strided"] = "contiguous",
        running: Literal["group_mean", "pooled"] = "group_mean",
        **shared: Any,
    ):
        super().__init__(num_features, ghost_size=ghost_size, grouping=grouping, running=running, **shared)


class MovingAverageBatchNorm(Norm):
    r"""Moving average batch normalization (MABN): statistics of the last batches, for one to four examples.

    :func:`jaxbn.moving_average_batch_norm` describes when to use it and its formulas. Call
    :func:`jaxbn.nnx.update_backward` after each gradient; `make_steps` does. Use centered kernels in the preceding
    layers.

    Args:
        num_features: Number of features, or their shape for several feature axes.
        momentum: Weight of the OLD running value, in [0, 1), or a :class:`jaxbn.Averaging`.
        window: Number of batches that are averaged.
        warmup: Number of first steps that use batch statistics only.
        r_max: r lies in [1 / r_max, r_max].
        shared: The other arguments of :class:`BatchNorm`, with the same meaning, including `rngs`. `use_scale` must
            be True and `autodiff` False; one value per channel is always accepted.

    Returns:
        A module.

    Example:
        >>> layer = jaxbn.nnx.MovingAverageBatchNorm(3, window=8, rngs=nnx.Rngs(0))
        >>> y = layer(jnp.ones((2, 3)))
        >>> layer.square_window[-1]
        Array([1., 1., 1.], dtype=float32)

    References:
        Yan et al., `Towards Stabilizing Batch Statistics <https://arxiv.org/abs/2001.06838>`_, 2020.
    """

    factory = staticmethod(moving_average_batch_norm)

    def __init__(
        self,
        num_features: int | Sequence[int],
        *,
        momentum: ArrayLike | Averaging | None = 0.98,
        window: int = 16,
        warmup: int = 100,
        r_max: float = 5.0,
        **shared: Any,
    ):
        super().__init__(num_features, momentum=momentum, window=window, warmup=warmup, r_max=r_max, **shared)


class DomainBatchNorm(Norm):
    r"""Batch norm with statistics for each domain: domain-specific, auxiliary (AdvProp) and split batch norm.

    :func:`jaxbn.domain_batch_norm` describes when to use it, the meaning of the ids, and its formulas. The call takes
    `domain=`, the id of each example, integers `[N]`. `jaxbn.nnx.convert_norms` initializes it from a trained
    `BatchNorm`, with a copy for each domain.

    Args:
        num_features: Number of features, or their shape for several feature axes.
        num_domains: Number of domains D; statistics are `[D, C]`.
        share_affine: Learn one scale and bias for all domains, `[C]`, instead of one for each, `[D, C]`.
        shared: The other arguments of :class:`BatchNorm`, with the same meaning, including `rngs`.

    Returns:
        A module.

    Example:
        >>> layer = jaxbn.nnx.DomainBatchNorm(1, num_domains=2, momentum=0.0, rngs=nnx.Rngs(0))
        >>> y = layer(jnp.array([[1.0], [10.0], [3.0], [30.0]]), domain=jnp.array([0, 1, 0, 1]))
        >>> layer.mean[...].ravel()
        Array([ 2., 20.], dtype=float32)

    References:
        Chang et al., `Domain-Specific Batch Normalization <https://arxiv.org/abs/1906.03950>`_, 2019.
    """

    factory = staticmethod(domain_batch_norm)

    def __init__(
        self,
        num_features: int | Sequence[int],
        *,
        num_domains: int,
        share_affine: bool = False,
        **shared: Any,
    ):
        super().__init__(num_features, num_domains=num_domains, share_affine=share_affine, **shared)
