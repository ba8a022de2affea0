r"""Batch Renormalization: batch norm whose output in training is that of evaluation, but for bounds.

.. math:: y = \gamma \left( \frac{x - \mu_B}{\sigma_B} r + d \right) + \beta, \qquad
          r = \mathrm{clip}_{[1/r_{max}, r_{max}]} \frac{\sigma_B}{\sigma}, \quad
          d = \mathrm{clip}_{[-d_{max}, d_{max}]} \frac{\mu_B - \mu}{\sigma}

with the moving averages :math:`\mu, \sigma` from before the step, and r and d as constants: where neither is clipped, y
is exactly :math:`\gamma (x - \mu) / \sigma + \beta`, and yet gradients know that :math:`\mu_B, \sigma_B` depend on x.

Ioffe, Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models, 2017, Algorithm 1.
"""

import functools
import warnings
from collections.abc import Sequence
from numbers import Real
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jaxbn._src.methods.batch_norm import averaging_step, batch_norm, count_samples
from jaxbn._src.methods.protocol import NormParams, NormTransform, on_meshes
from jaxbn._src.methods.schedules import RAMP, Schedule, check_bounds
from jaxbn._src.numerics import averages as _averages
from jaxbn._src.numerics import axes as _axes
from jaxbn._src.numerics import collectives as _collectives
from jaxbn._src.numerics import dtypes as _dtypes
from jaxbn._src.numerics import moments as _moments
from jaxbn._src.numerics import normalize as _normalize
from jaxbn._src.numerics import operands as _operands


class BatchRenormState(NamedTuple):
    """The moving averages: those of batch norm, and the step where the bounds depend on it."""

    mean: jax.Array  # f32[C]
    var: jax.Array  # f32[C]: sigma^2 - epsilon, of the sigma that is averaged
    # f32[]: steps (samples for a horizon) averaged so far; None if the average needs no count
    count: jax.Array | None = None  # type: ignore[assignment]  # hides tuple.count
    step: jax.Array | None = None  # f32[]: training steps so far; None if both bounds are numbers


class _Bounds(NamedTuple):
    r_max: jax.Array  # []
    d_max: jax.Array  # []


def batch_renorm(
    *,
    momentum: ArrayLike | _averages.Averaging = 0.99,
    epsilon: float = 1e-3,
    r_max: float | Schedule = RAMP["r_max"],
    d_max: float | Schedule = RAMP["d_max"],
    track_variance: bool = False,
    axis: int | Sequence[int] = -1,
    dtype: DTypeLike | None = None,
    use_bias: bool = True,
    use_scale: bool = True,
    axis_name: str | tuple[str, ...] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    use_fast_variance: bool = True,
    activation: _operands.Activation | None = None,
    allow_single_value: bool = False,
    autodiff: bool = False,
) -> NormTransform:
    r"""Batch Renormalization as pure functions: batch norm for small batches, and for those that are not i.i.d.

    Use it where statistics come from few examples (8 or fewer), where the examples of a batch resemble each other, and
    for the critics of off-policy reinforcement learning (CrossQ). At 16 and more independent examples it gains nothing;
    one value per channel passes no gradient. Published, on ImageNet: Inception-v3, normalized in sets of 4, 76.5 %
    right, batch norm 74.2 % (Ioffe 2017, figure 2). ResNet-50, top-1 error with 32, 16, 8, 4 and 2 examples, read off a
    figure but for the last: 23.6, 24.4, 25.3, 26.9, 30.29 %; batch norm 23.4, 24.3, 25.5, 27.9, 35.22 % (Yan 2020).

    Evaluation, statistics pass and checkpoints are those of batch norm: the state has its `mean` and `var`. Training
    starts as plain batch norm, which the default bounds see to: averages that are still far off make r and d wrong.

    Args:
        momentum: Weight of the OLD running value, in [0, 1); PyTorch's momentum and the paper's alpha are one minus
            this. Or an average made by `constant`, `scheduled`, `cumulative` or `horizon`. With one that drops its
            initial values (`constant(0.99, debias=True)`, `cumulative`, `horizon`) the first step, which has nothing to
            compare with, is plain batch norm.
        epsilon: Added to the variance, inside the root; positive.
        r_max: r lies in [1 / r_max, r_max]: a number from 1 (no correction) to `inf` (no bound), or a function of the
            number of training steps so far, such as an optax schedule. See `renorm_ramp` and `renorm_switch`, which
            give both bounds.
        d_max: d lies in [-d_max, d_max]: a number from 0 to `inf`, or a function of the step.
        track_variance: Average the variance, as batch norm does, and not :math:`\sigma`. Then r is below 1 on average:
            0.92 for Gaussian batches of 4, 0.80 for those of 2.
        axis: Feature axis of `x`, or several.
        dtype: Of the output. None: what x, scale, bias and residual promote to.
        use_bias: Learn the bias :math:`\beta`.
        use_scale: Learn the scale :math:`\gamma`.
        axis_name: Axis or axes of the surrounding `shard_map`, `pmap` or `vmap` over which a batch is spread; used in
            training alone.
        axis_index_groups: Groups of devices along `axis_name`, of equal size, that share statistics.
        use_fast_variance: True sums about a shift and reads x once, False centres first and reads it twice. Both are
            numerically safe.
        activation: Applied to the result, after the residual; as in `batch_norm`.
        allow_single_value: Do not warn of one value per channel in training.
        autodiff: Use JAX's own derivative instead of the hand-written one.

    Returns:
        A `NormTransform` with state `BatchRenormState` and params `NormParams`.

    Raises:
        ValueError: Here for hyper-parameters outside their range; in `train`, while tracing, for input that does not
            fit, as in `batch_norm`.
        TypeError: Here for a momentum or activation of the wrong kind; in `train` for complex input.

    Example:
        >>> brn = jaxbn.batch_renorm(momentum=0.9, r_max=3.0, d_max=5.0)
        >>> params, state = brn.init(1)
        >>> y, state = brn.train(params, state, jnp.array([[1.0], [3.0]]))
        >>> y.round(2).ravel()  # (x - 0) / 1, as the averages were 0 and 1
        Array([1., 3.], dtype=float32)

    References:
        Ioffe, `Batch Renormalization <https://arxiv.org/abs/1702.03275>`_, 2017, Algorithm 1; Yan et al., `Towards
        Stabilizing Batch Statistics <https://arxiv.org/abs/2001.06838>`_, 2020; Bhatt et al., `CrossQ
        <https://arxiv.org/abs/1902.05605>`_, 2024. Differs from Algorithm 1: :math:`\sigma` is averaged, and kept as
        the variance :math:`\sigma^2 - \epsilon`, which starts from 1, so that all that reads statistics of batch norm
        reads these; a channel whose batch is not finite keeps its averages. Epsilon, whose value the paper leaves open,
        is that of TensorFlow and Keras.

        Coming from Keras (`renorm=True`): `renorm_momentum` is `momentum`; `renorm_clipping` has `rmax`, `dmax` for
        `r_max`, `d_max`, and its `rmin`, of its own there, is 1 / r_max here; without clipping, its default, pass
        `inf`. Keras keeps two pairs of averages, for training and for evaluation; they are one pair here.
        From PyTorch: there is no such layer; momentum is one minus ours in those that others wrote.
        From sbx and CrossQ: `warm_up_steps` is `**renorm_switch(warm_up_steps)`; they average the variance
        (`track_variance=True`), and fold r and d into mean and variance, where epsilon is added once more: a channel
        whose variance is of the size of epsilon gets another output, and a constant one the gradient NaN.
        `jaxbn.linen.convert_norms` reads their checkpoints.
    """
    average = _check(_averages.as_averaging(momentum), epsilon, r_max, d_max)
    axis_name = _collectives.static(axis_name)
    groups = _collectives.check_groups(axis_name, axis_index_groups)
    base = batch_norm(
        momentum=average, epsilon=epsilon, axis=axis, dtype=dtype, use_bias=use_bias, use_scale=use_scale,
        axis_name=axis_name, axis_index_groups=groups, use_fast_variance=use_fast_variance, activation=activation,
    )  # fmt: skip
    spec = _operands.Spec(_axes.static(axis), epsilon, activation, dtype, axis_name, groups, _correction)
    measure = functools.partial(
        _moments.batch_moments,
        axis=axis,
        axis_name=axis_name,
        axis_index_groups=groups,
        use_fast_variance=use_fast_variance,
    )

    def init(
        feature_shape: int | Sequence[int], *, dtype: DTypeLike = jnp.float32
    ) -> tuple[NormParams, BatchRenormState]:
        params, state = base.init(feature_shape, dtype=dtype)
        step = jnp.zeros((), jnp.float32) if callable(r_max) or callable(d_max) else None
        return params, BatchRenormState(**state._asdict(), step=step)

    def train(
        params: NormParams,
        state: BatchRenormState,
        x: ArrayLike,
        *,
        mask: ArrayLike | None = None,
        residual: ArrayLike | None = None,
    ) -> tuple[jax.Array, BatchRenormState]:
        operands = _operands.of_call(spec, params.scale, params.bias, state.mean, x, mask, residual)
        x = operands.x
        values = _axes.values_per_channel(x.shape, axis) * _collectives.group_size(axis_name, groups)
        _check_batch(x, axis, values, allow_single_value)
        # Algorithm 1: mu_B and sigma_B; r and d of the averages before this step; x_hat; y. Then the averages move.
        y, moments = _normalize.batch_normalize(
            spec, measure, operands, state.mean, state.var, limits=bounds(state, x), autodiff=autodiff
        )
        return y, update(state, moments, count_samples(moments, x.shape, axis))

    def bounds(state: BatchRenormState, x: jax.Array) -> _Bounds:
        dtype = _dtypes.statistics(x)
        found = _Bounds(*(_at(bound, state.step, dtype) for bound in (r_max, d_max)))
        if not average.counts or state.count is None:
            return found
        # An average that is about to drop all that it holds has nothing to compare a batch with.
        fresh = (state.count == 0) & (average.decay(state.count, jnp.ones_like(state.count)) == 0)
        return _Bounds(jnp.where(fresh, 1, found.r_max), jnp.where(fresh, 0, found.d_max))

    def update(
        state: BatchRenormState, moments: _moments.Moments, samples: ArrayLike | None = None
    ) -> BatchRenormState:
        counted = averaging_step(average, state, moments, samples)
        decay, good = counted.decay, counted.good
        updated_var = _averages.update if track_variance else functools.partial(_update_sigma, epsilon)
        return BatchRenormState(
            mean=_averages.update(state.mean, moments.mean, decay, good),
            var=updated_var(state.var, counted.var, decay, good),
            count=counted.count,
            step=None if state.step is None else lax.stop_gradient(state.step + good.any().astype(state.step.dtype)),
        )

    return on_meshes(base._replace(init=init, train=train, update=update), axis)


def _correction(stored: _operands.Stored, mean: jax.Array, var: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The constants r and d, lines 3 and 4 of Algorithm 1."""
    dtype = var.dtype
    sigma = jnp.sqrt(stored.var.astype(dtype) + stored.epsilon)
    r = jnp.sqrt(var + stored.epsilon) / sigma
    d = (mean - stored.mean.astype(dtype)) / sigma
    r_max, d_max = stored.limits
    return jnp.clip(r, 1 / r_max, r_max), jnp.clip(d, -d_max, d_max)


def _update_sigma(epsilon: ArrayLike, var: jax.Array, new: jax.Array, decay: jax.Array, where: jax.Array) -> jax.Array:
    """The variance of which sigma is the average: sigma moves, with epsilon inside the root."""
    dtype = _dtypes.promote(var.dtype, new.dtype)
    inside = jnp.asarray(epsilon, dtype)
    before, batch = (jnp.sqrt(v.astype(dtype) + inside) for v in (var, new))
    sigma = _averages.update(before, batch, decay, where)
    moved = jnp.maximum(jnp.square(sigma) - inside, 0)
    return lax.stop_gradient(jnp.where(where, moved.astype(var.dtype), var))


def _at(bound: float | Schedule, step: jax.Array | None, dtype: DTypeLike) -> jax.Array:
    """The value of a bound in this step."""
    if not callable(bound):
        return jnp.asarray(bound, dtype)
    if step is None:
        raise ValueError(
            "A bound depends on the step, but the state has no `step`: it was made for bounds that are numbers. Add "
            "state._replace(step=jnp.zeros(())), or initialize anew."
        )
    return lax.stop_gradient(jnp.asarray(bound(step.astype(dtype)), dtype))


def _check(
    average: _averages.Averaging | None, epsilon: ArrayLike, r_max: float | Schedule, d_max: float | Schedule
) -> _averages.Averaging:
    """The average; a ValueError for hyper-parameters that batch norm can have and this method cannot."""
    if average is None:
        raise ValueError(
            "momentum=None keeps no running averages, and batch_renorm trains with them. Give a momentum, such as 0.99."
        )
    if average.unbiased:
        raise ValueError("batch_renorm compares its average with the biased variance of a batch; leave out unbiased=.")
    if isinstance(epsilon, Real) and not epsilon > 0:
        raise ValueError(f"epsilon={epsilon} must be positive: r and d are divided by the root of variance + epsilon.")
    check_bounds(r_max, d_max)
    return average


def _check_batch(x: jax.Array, axis: _axes.Axis, values: int, allow_single_value: bool) -> None:
    """Refuses what has no mean, and warns of a batch that teaches nothing to the layers before."""
    if jnp.iscomplexobj(x):
        raise TypeError(f"batch_renorm takes real input, and this one is {x.dtype}. Use batch_norm, or real and imag.")
    _axes.check_training_batch(x.shape, axis, values, allow_single_value=True)
    if values == 1 and not allow_single_value:
        warnings.warn(
            f"The input {x.shape} has one value per channel along axis={axis}: its output depends on the averages "
            f"alone, and no gradient passes to the layers before. Use a larger batch, synchronize over devices with "
            f"axis_name=, freeze the layer, or pass allow_single_value=True if this is meant.",
            stacklevel=4,  # the caller of train
        )
