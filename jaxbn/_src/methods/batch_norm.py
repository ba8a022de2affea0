r"""Batch normalization: each channel is normalized with the mean and variance of the batch.

.. math:: y = \gamma \frac{x - \mu_B}{\sqrt{\sigma_B^2 + \epsilon}} + \beta

in training, and with the statistics of the population, :math:`E[\mu_B]` and :math:`Var[x]`, in evaluation. Those are
estimated by a running average (Method ONE) or by a pass over the data when training is over (Method TWO).

Ioffe & Szegedy, Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift, 2015,
Algorithm 1 (training) and Algorithm 2 (evaluation).
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jaxbn._src.methods.protocol import NormParams, NormTransform, State, on_meshes
from jaxbn._src.numerics import averages as _averages
from jaxbn._src.numerics import axes as _axes
from jaxbn._src.numerics import collectives as _collectives
from jaxbn._src.numerics import dtypes as _dtypes
from jaxbn._src.numerics import moments as _moments
from jaxbn._src.numerics import normalize as _normalize
from jaxbn._src.numerics import operands as _operands


class BatchNormState(NamedTuple):
    """The statistics of the population, as far as they are known."""

    mean: jax.Array  # f32[C]; complex for complex inputs
    var: jax.Array  # f32[C], biased
    # f32[]: steps (samples for a horizon) averaged so far; None if the average needs no count
    count: jax.Array | None = None  # type: ignore[assignment]  # hides tuple.count


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
) -> NormTransform:
    r"""Batch normalization as pure functions: state in, state out.

    Use it where batches are large (16 or more values per channel) and drawn at random. The statistics do not depend
    on how a batch is spread over devices: nothing needs to be named under `jit` on sharded arrays; under `shard_map`,
    `pmap` and `vmap` give `axis_name`. Where the rows are what is spread, a step costs one collective forward and one
    backward.

    Args:
        momentum: Weight of the OLD running value, in [0, 1). PyTorch's momentum is one minus this. None: training
            keeps no running average, and the statistics come from a postproc pass (Method TWO). Or an average made by
            `constant`, `scheduled`, `cumulative` or `horizon`; `constant` says how exact float32 averages are.
        epsilon: Added to the variance; not negative.
        axis: Feature axis of `x`, or several.
        dtype: Of the output. None: what x, scale, bias and residual promote to.
        use_bias: Learn the bias :math:`\beta`.
        use_scale: Learn the scale :math:`\gamma`.
        axis_name: Axis or axes of the surrounding `shard_map`, `pmap` or `vmap` over which a batch is spread; used in
            training alone.
        axis_index_groups: Groups of devices along `axis_name`, of equal size, that share statistics.
        use_fast_variance: True sums about a shift and reads x once, False centres first and reads it twice. Both are
            numerically safe.
        activation: Applied to the result, after the residual. `jax.nn.relu` and `jax.nn.leaky_relu` share the memory
            traffic of the normalization; any other elementwise function is applied behind it.
        allow_single_value: Accept one value per channel in training, which is an error otherwise: its output is the
            bias, and no gradient passes.
        autodiff: Use JAX's own derivative instead of the hand-written one: same numbers, more memory, and forward
            mode works. Without it JAX says of `jax.jvp` and `jax.jacfwd` that they cannot be applied to a custom_vjp
            function, or that there is no differentiation rule for 'custom_lin'.

    Returns:
        A `NormTransform` with state `BatchNormState` and params `NormParams`.

    Raises:
        ValueError: Here for hyper-parameters outside their range; in `train`, while tracing, for a wrong number of
            features, a mask or residual that does not fit, an empty batch, or one value per channel.
        TypeError: Here for a momentum or activation of the wrong kind; in `train` for a complex mask, or for a complex
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
        Ioffe & Szegedy, `Batch Normalization <https://arxiv.org/abs/1502.03167>`_, 2015, Algorithms 1 and 2. Differs:
        the running variance is the biased one, as in Flax. Step 10 has the unbiased one: `constant(0.9,
        unbiased=True)`, which is also what PyTorch keeps; in a postproc pass it is an estimator.
    """
    average = _averages.as_averaging(momentum)
    axis_name = _collectives.static(axis_name)
    groups = _collectives.check_groups(axis_name, axis_index_groups)
    spec = _operands.Spec(_axes.static(axis), epsilon, activation, dtype, axis_name, groups)
    _operands.check_spec(spec)
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
        return y, move_averages(average, state, moments, samples)

    def evaluate(
        params: NormParams,
        state: BatchNormState,
        x: ArrayLike,
        *,
        mask: ArrayLike | None = None,
        residual: ArrayLike | None = None,
    ) -> jax.Array:
        del mask  # of training alone, as in Flax
        operands = _operands.of_call(spec, params.scale, params.bias, state.mean, x, None, residual)
        # Algorithm 2, step 11: the same affine map, with E[x] and Var[x].
        return _normalize.normalize(spec, operands, *_normalize.as_constants((state.mean, state.var)))

    def measure(x: ArrayLike, *, mask: ArrayLike | None = None) -> _moments.Moments:
        return here(x, mask=mask)

    def postproc(state: BatchNormState, moments: _moments.Moments) -> BatchNormState:
        # Algorithm 2, step 10: E[x] and Var[x], as an estimator found them; a channel that saw nothing, or nothing that
        # the state can hold, keeps what it has.
        found = moments.var
        seen = _fits(state, moments, found)
        mean = jnp.where(seen, moments.mean.astype(state.mean.dtype), state.mean)
        return state._replace(mean=mean, var=jnp.where(seen, found.astype(state.var.dtype), state.var))

    update = None if average is None else functools.partial(move_averages, average)
    return on_meshes(NormTransform(init, train, evaluate, measure, postproc, update=update), axis)


class AveragingStep(NamedTuple):
    """How far the running averages move, and where."""

    decay: jax.Array  # []
    var: jax.Array  # [C]: the new value of the variance, unbiased where the average is one of that
    good: jax.Array  # bool[C]: the channels that saw something, all of it finite in the state's dtype; others stay
    count: jax.Array | None  # type: ignore[assignment]  # hides tuple.count; f32[]: the one of the state, after the step


def averaging_step(
    average: _averages.Averaging, state: State, moments: _moments.Moments, samples: ArrayLike | None
) -> AveragingStep:
    """The next step of the running averages of any state with `mean` and `count`."""
    if average.counts_samples and samples is None:
        raise ValueError(
            "jaxbn.horizon counts examples, which moments do not tell; pass samples=, how many there were."
        )
    if average.counts and state.count is None:
        raise ValueError(
            f"momentum={average} counts steps, but the state has no `count`: it was made for a constant momentum. Add "
            f"state._replace(count=jnp.zeros(())), or initialize anew."
        )
    if jnp.iscomplexobj(moments.mean) and not jnp.iscomplexobj(state.mean):
        raise TypeError(
            f"The mean of a complex input is complex, but the statistics are {state.mean.dtype}. Initialize with a "
            f"complex input (linen), with param_dtype= (NNX), or with init(..., dtype={moments.mean.dtype})."
        )
    var = moments.var * _moments.bessel(moments.count) if average.unbiased else moments.var
    good = _fits(state, moments, var)
    count = jnp.zeros((), jnp.float32) if state.count is None else state.count
    dtype = _dtypes.promote(state.var.dtype, var.dtype, jnp.float32)  # what the average is computed in
    samples = jnp.asarray(0 if samples is None else samples, dtype)
    counted = None
    if state.count is not None:
        after = average.advance(count, samples.astype(count.dtype))
        counted = lax.stop_gradient(jnp.where(good.any(), after, count))
    return AveragingStep(average.decay(count.astype(dtype), samples), var, good, counted)


def _fits(state: State, moments: _moments.Moments, var: jax.Array) -> jax.Array:
    """bool[C]: which channels saw something that is finite, also when it is rounded to the dtype of the state."""
    finite = jnp.isfinite(moments.mean.astype(state.mean.dtype)) & jnp.isfinite(var.astype(state.var.dtype))
    return (moments.count > 0) & finite


def count_samples(moments: _moments.Moments, shape: Sequence[int], axis: _axes.Axis) -> jax.Array:
    """How many rows the moments of an input of this shape were computed from, by its mask and over all devices."""
    return moments.count.max(initial=0) / math.prod(shape[a] for a in _axes.split(len(shape), axis).reduced[1:])


def move_averages(
    average: _averages.Averaging, state: State, moments: _moments.Moments, samples: ArrayLike | None = None
) -> State:
    """The state after one step of the running averages, of its mean and of its variance."""
    step = averaging_step(average, state, moments, samples)
    return state._replace(
        mean=_averages.update(state.mean, moments.mean, step.decay, step.good),
        var=_averages.update(state.var, step.var, step.decay, step.good),
        count=step.count,
    )
