r"""Batch Renormalization: batch norm whose training output equals its evaluation output, within bounds.

.. math:: y = \gamma \left( \frac{x - \mu_B}{\sigma_B} r + d \right) + \beta, \qquad
          r = \mathrm{clip}_{[1/r_{max}, r_{max}]} \frac{\sigma_B}{\sigma}, \quad
          d = \mathrm{clip}_{[-d_{max}, d_{max}]} \frac{\mu_B - \mu}{\sigma}

with the running averages :math:`\mu, \sigma` from before the step. The gradient takes r and d as constants. If neither
is clipped, y is exactly :math:`\gamma (x - \mu) / \sigma + \beta`, and gradients still flow through
:math:`\mu_B, \sigma_B`.

Ioffe, Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models, 2017, Algorithm 1.
"""

import functools
import warnings
from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jaxbn._src.methods.batch_norm import averaging_step, batch_norm, count_samples
from jaxbn._src.methods.batch_renorm_schedules import RAMP, Schedule, check_bounds
from jaxbn._src.methods.protocol import NormParams, NormTransform, on_meshes
from jaxbn._src.numerics import averages as _averages
from jaxbn._src.numerics import axes as _axes
from jaxbn._src.numerics import collectives as _collectives
from jaxbn._src.numerics import dtypes as _dtypes
from jaxbn._src.numerics import moments as _moments
from jaxbn._src.numerics import normalize as _normalize
from jaxbn._src.numerics import operands as _operands


class BatchRenormState(NamedTuple):
    """The running averages of batch norm, and the number of steps if the bounds depend on it."""

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
) -> NormTransform[NormParams, BatchRenormState]:
    r"""Batch Renormalization as pure functions: batch norm for small batches.

    Use it if statistics come from 2 to 4 examples, if the examples of a batch resemble each other, and for the critics
    of off-policy reinforcement learning (CrossQ). If a batch holds one class only, use `moving_average_batch_norm`.
    With 8 and more independent examples it has no benefit, and may cost half a point of accuracy. With one value per
    channel no gradient flows to x. Published results on ImageNet: Inception-v3, normalized in sets of 4, has 76.5 %
    accuracy, with batch norm 74.2 % (Ioffe 2017, figure 2). The top-1 error of ResNet-50 with 32, 16, 8, 4 and 2
    examples is 23.6, 24.4, 25.3, 26.9, 30.29 %, with batch norm 23.4, 24.3, 25.5, 27.9, 35.22 % (Yan 2020; all but the
    last read off a figure).

    Evaluation, the statistics pass and checkpoints work as for batch norm: the state has the same `mean` and `var`.
    With the default bounds training starts as plain batch norm, because early averages would make r and d wrong.

    Args:
        momentum: Weight of the OLD running value, in [0, 1); PyTorch's momentum and the paper's alpha are one minus
            this. Or an average made by `constant`, `scheduled`, `cumulative` or `horizon`. If the average drops its
            initial values (`constant(0.99, debias=True)`, `cumulative`, `horizon`), the first step is plain batch norm.
        epsilon: Added to the variance, inside the root; positive.
        r_max: r lies in [1 / r_max, r_max]: a number from 1 (no correction) to `inf` (no bound), or a function of the
            number of training steps so far, such as an optax schedule. `renorm_ramp` and `renorm_switch` return both
            bounds.
        d_max: d lies in [-d_max, d_max]: a number from 0 to `inf`, or a function of the step.
        track_variance: Average the variance, as batch norm does, instead of :math:`\sigma`. Then r is below 1 on
            average: 0.92 for Gaussian batches of 4, 0.80 for batches of 2.
        axis: Feature axis of `x`, or several.
        dtype: Of the output. None: what x, scale, bias and residual promote to.
        use_bias: Learn the bias :math:`\beta`.
        use_scale: Learn the scale :math:`\gamma`.
        axis_name: Axis or axes of the surrounding `shard_map`, `pmap` or `vmap` over which a batch is spread; used in
            training only.
        axis_index_groups: Groups of devices along `axis_name`, of equal size, that share statistics.
        use_fast_variance: As in `batch_norm`.
        activation: Applied to the result, after the residual; as in `batch_norm`.
        allow_single_value: Do not warn about one value per channel in training.
        autodiff: Use JAX's own derivative instead of the hand-written one.

    Returns:
        A `NormTransform` with state `BatchRenormState` and params `NormParams`.

    Raises:
        ValueError: For hyper-parameters outside their range. In `train`, while tracing: for input that does not
            fit, as in `batch_norm`.
        TypeError: For a momentum or activation of the wrong kind. In `train`: for complex input.

    Example:
        >>> brn = jaxbn.batch_renorm(momentum=0.9, r_max=3.0, d_max=5.0)
        >>> params, state = brn.init(1)
        >>> y, state = brn.train(params, state, jnp.array([[1.0], [3.0]]))
        >>> y.round(2).ravel()  # (x - 0) / 1, as the averages were 0 and 1
        Array([1., 3.], dtype=float32)

    References:
        Ioffe, `Batch Renormalization <https://arxiv.org/abs/1702.03275>`_, 2017, Algorithm 1; Yan et al., `Towards
        Stabilizing Batch Statistics <https://arxiv.org/abs/2001.06838>`_, 2020; Bhatt et al., `CrossQ
        <https://arxiv.org/abs/1902.05605>`_, 2024. Deviations from Algorithm 1: the average of :math:`\sigma` is stored
        as the variance :math:`\sigma^2 - \epsilon`, starting from 1, so that everything that reads the statistics of
        batch norm reads these; a channel whose batch is not finite keeps its averages. The paper does not give epsilon;
        the default is the one of TensorFlow and Keras.

        Coming from Keras (`renorm=True`): `renorm_momentum` is `momentum`; `rmax` and `dmax` of `renorm_clipping` are
        `r_max` and `d_max`, and `rmin` is always 1 / r_max here; for no clipping, the default there, pass `inf`. Keras
        keeps separate averages for training and evaluation; here they are the same.
        Coming from PyTorch: it has no such layer; in layers written by others momentum is one minus ours.
        Coming from sbx and CrossQ: `warm_up_steps` is `**renorm_switch(warm_up_steps)`. They average the variance
        (`track_variance=True`), and fold r and d into mean and variance, to which epsilon is added again: a channel
        with a variance of the size of epsilon gets another output, and a constant channel gets the gradient NaN.
        `jaxbn.linen.convert_norms` reads their checkpoints.
    """
    average = _check(_averages.as_averaging(momentum), epsilon, r_max, d_max)
    axis_name = _collectives.static(axis_name)
    groups = _collectives.check_groups(axis_name, axis_index_groups)
    base: NormTransform[NormParams, Any] = batch_norm(  # its `eval`, `measure` and `postproc` serve this state as well
        momentum=average, epsilon=epsilon, axis=axis, dtype=dtype, use_bias=use_bias, use_scale=use_scale,
        axis_name=axis_name, axis_index_groups=groups, use_fast_variance=use_fast_variance, activation=activation,
        allow_single_value=allow_single_value,
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
        # Algorithm 1, in its order: mu_B and sigma_B; r and d from the averages before this step; x_hat; y; averages.
        y, moments = _normalize.batch_normalize(
            spec, measure, operands, state.mean, state.var, limits=bounds(state, x), autodiff=autodiff
        )
        return y, update(state, moments, count_samples(moments, x.shape, axis))

    def bounds(state: BatchRenormState, x: jax.Array) -> _Bounds:
        dtype = _dtypes.statistics(x)
        found = _Bounds(*(_at(bound, state.step, dtype) for bound in (r_max, d_max)))
        if not average.counts or state.count is None:
            return found
        # An average that drops its initial values now holds no information yet: this step is plain batch norm.
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
            # A step without valid values does not count, as in the averages.
            step=None if state.step is None else lax.stop_gradient(state.step + good.any().astype(state.step.dtype)),
        )

    return on_meshes(base._replace(init=init, train=train, update=update), axis)


def _correction(running: _operands.Running, mean: jax.Array, var: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes r and d, lines 3 and 4 of Algorithm 1."""
    dtype = var.dtype
    sigma = jnp.sqrt(running.var.astype(dtype) + running.epsilon)
    r = jnp.sqrt(var + running.epsilon) / sigma
    d = (mean - running.mean.astype(dtype)) / sigma
    r_max, d_max = running.limits
    return jnp.clip(r, 1 / r_max, r_max), jnp.clip(d, -d_max, d_max)


def _update_sigma(epsilon: ArrayLike, var: jax.Array, new: jax.Array, decay: jax.Array, where: jax.Array) -> jax.Array:
    """Updates the average of sigma = sqrt(var + epsilon), and returns it as a variance."""
    dtype = _dtypes.promote(var.dtype, new.dtype)
    inside = jnp.asarray(epsilon, dtype)
    before, batch = (jnp.sqrt(v.astype(dtype) + inside) for v in (var, new))
    # Algorithm 1 averages sigma, not the variance. Rounding may put its square slightly below epsilon.
    sigma = _averages.update(before, batch, decay, where)
    updated = jnp.maximum(jnp.square(sigma) - inside, 0)
    # The root and the square round, so channels without an update return their old variance itself.
    return lax.stop_gradient(jnp.where(where, updated.astype(var.dtype), var))


def _at(bound: float | Schedule, step: jax.Array | None, dtype: DTypeLike) -> jax.Array:
    """Evaluates a bound at this step."""
    if not callable(bound):
        return jnp.asarray(bound, dtype)
    if step is None:
        raise ValueError(
            "A bound depends on the step, but the state has no `step`: it was made for bounds that are numbers. Add "
            "state._replace(step=jnp.zeros(())), or initialize again."
        )
    return lax.stop_gradient(jnp.asarray(bound(step.astype(dtype)), dtype))


def _check(
    average: _averages.Averaging | None, epsilon: ArrayLike, r_max: float | Schedule, d_max: float | Schedule
) -> _averages.Averaging:
    """Returns the average; raises a ValueError for hyper-parameters that batch norm accepts and this one does not."""
    if average is None:
        raise ValueError(
            "momentum=None keeps no running averages, and batch_renorm trains with them. Pass a momentum, such as 0.99."
        )
    if average.unbiased:
        raise ValueError("batch_renorm compares its average with the biased variance of a batch; leave out unbiased=.")
    if isinstance(epsilon, Real) and not epsilon > 0:
        raise ValueError(f"epsilon={epsilon} must be positive: r and d are divided by the root of variance + epsilon.")
    check_bounds(r_max, d_max)
    return average


def _check_batch(x: jax.Array, axis: _axes.Axis, values: int, allow_single_value: bool) -> None:
    """Raises for an input that has no real statistics, and warns if no gradient flows to the layers before."""
    if jnp.iscomplexobj(x):
        raise TypeError(
            f"batch_renorm takes real input, and this one is {x.dtype}. Use batch_norm, or real and imaginary part."
        )
    _axes.check_training_batch(x.shape, axis, values, allow_single_value=True)
    if values == 1 and not allow_single_value:
        warnings.warn(
            f"The input {x.shape} has one value per channel along axis={axis}: its output depends only on "
            f"the averages, and no gradient flows to the layers before. Use a larger batch, synchronize over devices "
            f"with axis_name=, freeze the layer, or pass allow_single_value=True if this is intended.",
            stacklevel=5,  # the caller of train
        )
