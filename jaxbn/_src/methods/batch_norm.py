r"""Batch normalization: each channel is normalized with the mean and variance of the batch.

.. math:: y = \gamma \frac{x - \mu_B}{\sqrt{\sigma_B^2 + \epsilon}} + \beta

in training. In evaluation the population statistics take their place, :math:`E[\mu_B]` and :math:`Var[x]`. They are
estimated by running averages (Method ONE), or by a pass over the data after training (Method TWO).

Ioffe & Szegedy, Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift, 2015,
Algorithm 1 (training) and Algorithm 2 (evaluation).
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jaxbn._src.methods.protocol import NormParams, NormTransform, Settings, State, on_meshes
from jaxbn._src.numerics import averages as _averages
from jaxbn._src.numerics import axes as _axes
from jaxbn._src.numerics import collectives as _collectives
from jaxbn._src.numerics import dtypes as _dtypes
from jaxbn._src.numerics import moments as _moments
from jaxbn._src.numerics import normalize as _normalize
from jaxbn._src.numerics import operands as _operands


class BatchNormState(NamedTuple):
    """The population statistics, as far as they are known."""

    mean: jax.Array  # f32[C]; complex for complex inputs
    var: jax.Array  # f32[C], biased
    # f32[]: steps (samples for a horizon) averaged so far; None if the average needs no count
    count: jax.Array | None = None  # type: ignore[assignment]  # hides tuple.count


class CountedState(State, Protocol):
    """A state whose running averages may count their steps; all methods of jaxbn have one."""

    @property
    def count(self) -> jax.Array | None:
        """The number of steps, or of samples for a horizon, f32[]."""


CountedT = TypeVar("CountedT", bound=CountedState)


def batch_norm(
    *,
    momentum: ArrayLike | _averages.Averaging | None = 0.99,
    epsilon: float = 1e-5,
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
) -> NormTransform[NormParams, BatchNormState]:
    r"""Batch normalization as pure functions: state in, state out.

    Use it if batches are large (16 or more values per channel) and drawn at random. The statistics do not depend on how
    a batch is spread over devices: `jit` on sharded arrays needs no axis name; under `shard_map`, `pmap` and `vmap`
    pass `axis_name`. If the rows are spread, a step costs one collective forward (on more than 8
    devices two, of fixed size) and one backward.

    Args:
        momentum: Weight of the OLD running value, in [0, 1). PyTorch's momentum is one minus this. None: training
            keeps no running averages, and a statistics pass (`postproc`) estimates the statistics (Method TWO). Or an
            average made by `constant`, `scheduled`, `cumulative` or `horizon`; see `constant` for the precision of
            float32 averages.
        epsilon: Added to the variance; not negative.
        axis: Feature axis of `x`, or several.
        dtype: Of the output. None: what x, scale, bias and residual promote to.
        use_bias: Learn the bias :math:`\beta`.
        use_scale: Learn the scale :math:`\gamma`.
        axis_name: Axis or axes of the surrounding `shard_map`, `pmap` or `vmap` over which a batch is spread; used in
            training only.
        axis_index_groups: Groups of devices along `axis_name`, of equal size, that share statistics.
        use_fast_variance: True sums about a shift and reads x once; False subtracts the mean first and reads x twice.
            Both are numerically safe.
        activation: Applied to the result, after the residual. `jax.nn.relu` and `jax.nn.leaky_relu` share the memory
            traffic of the normalization; any other elementwise function runs after it.
        allow_single_value: Accept one value per channel in training, which raises an error otherwise: the output is the
            bias, and no gradient flows to x.
        autodiff: Use JAX's own derivative instead of the hand-written one: same numbers, more memory, and forward
            mode works. Without it `jax.jvp` and `jax.jacfwd` raise an error about a custom_vjp function, or about a
            missing differentiation rule for 'custom_lin'.

    Returns:
        A `NormTransform` with state `BatchNormState` and params `NormParams`.

    Raises:
        ValueError: For hyper-parameters outside their range. In `train`, while tracing: for a wrong number of
            features, a mask or residual that does not fit, an empty batch, or one value per channel.
        TypeError: For a momentum or activation of the wrong kind. In `train`: for a complex mask, or for a complex
            input where the statistics are real.

    Example:
        >>> bn = jaxbn.batch_norm(momentum=0.9)
        >>> params, state = bn.init(2)
        >>> y, state = bn.train(params, state, jnp.array([[1.0, 0.0], [3.0, 8.0]]))
        >>> y.round(3)
        Array([[-1., -1.],
               [ 1.,  1.]], dtype=float32)
        >>> state.mean.round(3)
        Array([0.2, 0.4], dtype=float32)

    References:
        Ioffe & Szegedy, `Batch Normalization <https://arxiv.org/abs/1502.03167>`_, 2015, Algorithms 1 and 2. One
        deviation: the running variance is biased, as in Flax. Step 10 of the paper and PyTorch use the unbiased
        variance; `momentum=constant(0.9, unbiased=True)` keeps that one, and a statistics pass has it as an option of
        its estimators.
    """
    average = _averages.as_averaging(momentum)
    axis_name = _collectives.static(axis_name)
    groups = _collectives.check_groups(axis_name, axis_index_groups)
    spec = _operands.Spec(_axes.static(axis), epsilon, activation, dtype, axis_name, groups)
    _operands.check_spec(spec)
    # A statistics pass merges devices by itself, so `measure` does not reduce over the named axis.
    here = functools.partial(_moments.batch_moments, axis=axis, use_fast_variance=use_fast_variance)
    everywhere = functools.partial(here, axis_name=axis_name, axis_index_groups=groups)

    def init(
        feature_shape: int | Sequence[int], *, dtype: DTypeLike = jnp.float32
    ) -> tuple[NormParams, BatchNormState]:
        given = _axes.static(feature_shape)
        shape = given if isinstance(given, tuple) else (given,)
        params = NormParams(
            jnp.ones(shape, dtype) if use_scale else None,
            jnp.zeros(shape, dtype) if use_bias else None,
        )
        # At least float32: in half precision an average would lose small updates.
        mean = jnp.full(shape, _averages.INITIAL_MEAN, _dtypes.promote(jnp.dtype(dtype), jnp.float32))
        var = jnp.full(shape, _averages.INITIAL_VAR, mean.real.dtype)
        count = jnp.zeros((), jnp.float32) if average is not None and average.counts else None
        return params, BatchNormState(mean, var, count)

    def train(
        params: NormParams,
        state: BatchNormState,
        x: ArrayLike,
        *,
        mask: ArrayLike | None = None,
        residual: ArrayLike | None = None,
    ) -> tuple[jax.Array, BatchNormState]:
        operands = _operands.of_call(spec, params.scale, params.bias, state.mean, x, mask, residual)
        x = operands.x
        values = _axes.values_per_channel(x.shape, axis) * _collectives.group_size(axis_name, groups)
        _axes.check_training_batch(x.shape, axis, values, allow_single_value)
        # Algorithm 1: mean and variance of the batch, over all devices; x_hat; y = scale x_hat + bias.
        y, moments = _normalize.batch_normalize(spec, everywhere, operands, state.mean, state.var, autodiff=autodiff)
        if average is None:
            return y, state
        samples = count_samples(moments, x.shape, axis) if average.counts_samples else None
        return y, update_averages(average, state, moments, samples)

    def evaluate(
        params: NormParams,
        state: BatchNormState,
        x: ArrayLike,
        *,
        mask: ArrayLike | None = None,
        residual: ArrayLike | None = None,
    ) -> jax.Array:
        del mask  # a mask concerns training only, as in Flax
        operands = _operands.of_call(spec, params.scale, params.bias, state.mean, x, None, residual)
        # Algorithm 2, step 11: the same affine map, with E[x] and Var[x].
        return _normalize.normalize(spec, operands, *_normalize.as_constants((state.mean, state.var)))

    def measure(x: ArrayLike, *, mask: ArrayLike | None = None) -> _moments.Moments:
        return here(x, mask=mask)

    def postproc(state: BatchNormState, moments: _moments.Moments) -> BatchNormState:
        # Algorithm 2, step 10: E[x] and Var[x], as an estimator found them.
        found = moments.var
        good = _usable(state, moments, found)
        mean = jnp.where(good, moments.mean.astype(state.mean.dtype), state.mean)
        return state._replace(mean=mean, var=jnp.where(good, found.astype(state.var.dtype), state.var))

    update = None if average is None else functools.partial(update_averages, average)
    settings = Settings(spec.axis, epsilon, axis_name, groups, allow_single_value)
    made = NormTransform(init, train, evaluate, measure, postproc, update=update, settings=settings)
    return on_meshes(made, axis)


class AveragingStep(NamedTuple):
    """The weights of one step of the running averages, and the variance that enters it."""

    decay: jax.Array  # []: weight of the old value
    var: jax.Array  # [C]: variance of the batch; unbiased if the average asks for it
    good: jax.Array  # bool[C]: channels with at least one value and finite moments; the others keep their averages
    count: jax.Array | None  # type: ignore[assignment]  # hides tuple.count; f32[]: the count after the step


def averaging_step(
    average: _averages.Averaging, state: CountedState, moments: _moments.Moments, samples: ArrayLike | None
) -> AveragingStep:
    """Prepares the next step of the running averages of a state."""
    if average.counts_samples and samples is None:
        raise ValueError("jaxbn.horizon counts examples, and moments do not contain their number; pass it as samples=.")
    if average.counts and state.count is None:
        raise ValueError(
            f"momentum={average} counts steps, but the state has no `count`: it was made for a constant momentum. Add "
            f"state._replace(count=jnp.zeros(())), or initialize again."
        )
    if jnp.iscomplexobj(moments.mean) and not jnp.iscomplexobj(state.mean):
        raise TypeError(
            f"The mean of a complex input is complex, but the statistics are {state.mean.dtype}. Initialize with a "
            f"complex input (linen), with param_dtype= (NNX), or with init(..., dtype={moments.mean.dtype})."
        )
    var = moments.var * _moments.bessel(moments.count) if average.unbiased else moments.var
    good = _usable(state, moments, var)
    count = jnp.zeros((), jnp.float32) if state.count is None else state.count
    dtype = _dtypes.promote(state.var.dtype, var.dtype, jnp.float32)  # the averages are computed in it
    samples = jnp.asarray(0 if samples is None else samples, dtype)
    counted = None
    if state.count is not None:
        after = average.advance(count, samples.astype(count.dtype))
        counted = lax.stop_gradient(jnp.where(good.any(), after, count))  # a step without any value does not count
    return AveragingStep(average.decay(count.astype(dtype), samples), var, good, counted)


def _usable(state: State, moments: _moments.Moments, var: jax.Array) -> jax.Array:
    """bool[C]: the channels with at least one value whose moments are finite in the dtype of the state."""
    finite = jnp.isfinite(moments.mean.astype(state.mean.dtype)) & jnp.isfinite(var.astype(state.var.dtype))
    return (moments.count > 0) & finite


def count_samples(moments: _moments.Moments, shape: Sequence[int], axis: _axes.Axis) -> jax.Array:
    """The number of rows, over all devices and without masked ones, behind the moments of an input of this shape."""
    # A channel has one value per row and position in space. A mask may drop rows of some channels only.
    return moments.count.max(initial=0) / math.prod(shape[a] for a in _axes.split(len(shape), axis).reduced[1:])


def update_averages(
    average: _averages.Averaging, state: CountedT, moments: _moments.Moments, samples: ArrayLike | None = None
) -> CountedT:
    """Updates the running mean and variance of a state once."""
    step = averaging_step(average, state, moments, samples)
    updated: CountedT = state._replace(
        mean=_averages.update(state.mean, moments.mean, step.decay, step.good),
        var=_averages.update(state.var, step.var, step.decay, step.good),
        count=step.count,
    )
    return updated
