r"""Moving average batch normalization (MABN): statistics of the last W batches, in the derivative too.

.. math:: y = \gamma\, r\, z + \beta, \qquad z = \frac{x}{\sqrt{V + \epsilon}}, \qquad
          \frac{\partial L}{\partial x} = \frac{g - z \Psi}{\sqrt{V + \epsilon}}, \quad
          g = \gamma\, r\, \frac{\partial L}{\partial y}

V is the mean of :math:`\chi_B^2 = E[x^2]` over the last W batches, :math:`\Psi` that of :math:`\psi_B = E[g z]` over
the last W gradients: where the weights stand still, the gradient of the joint batch. r compares V with a long average.

Yan et al., Towards Stabilizing Batch Statistics in Backward Propagation of Batch Normalization, 2020.
"""

import functools
from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jaxbn._src.methods.batch_norm import averaging_step, batch_norm, count_samples
from jaxbn._src.methods.protocol import NormParams, NormTransform, on_meshes
from jaxbn._src.numerics import averages as _averages
from jaxbn._src.numerics import axes as _axes
from jaxbn._src.numerics import collectives as _collectives
from jaxbn._src.numerics import explicit_meshes as _explicit_meshes
from jaxbn._src.numerics import moments as _moments
from jaxbn._src.numerics import normalize as _normalize
from jaxbn._src.numerics import operands as _operands

_PLAIN_STEPS = 1000  # in which r is 1, if the warm-up is not longer


class MovingAverageBatchNormState(NamedTuple):
    """The long average of the second moment, and the windows; what `eval` reads are `mean` and `var`."""

    mean: jax.Array  # f32[C]: 0, about which the second moment is; one from elsewhere fades out
    var: jax.Array  # f32[C]: average of V
    square_window: jax.Array  # f32[W, C]: chi^2 of the last W batches, the newest last
    gradient_window: jax.Array  # f32[W, C]: psi of the last W gradients, the newest last; of the unscaled loss
    values: jax.Array  # f32[C]: m, how many values the last batch had
    step: jax.Array  # f32[]: training steps so far
    gradients: jax.Array  # f32[]: gradients that `backward` has seen so far
    loss_scale: jax.Array  # f32[]: what the loss of the next step will be multiplied by
    # f32[]: steps (samples for a horizon) averaged so far; None if the average needs no count
    count: jax.Array | None = None  # type: ignore[assignment]  # hides tuple.count


def moving_average_batch_norm(
    *,
    momentum: ArrayLike | _averages.Averaging = 0.98,
    epsilon: float = 1e-5,
    window: int = 16,
    warmup: int = 100,
    r_max: float = 5.0,
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
    r"""Moving average batch normalization as pure functions: for batches of one to four examples.

    Use it where memory holds very few examples, in convolutional networks whose kernels are centralized
    (`centralize_kernel`): nothing else removes the mean. Published, ResNet-50 on ImageNet, top-1 error with 32, 16, 8,
    4 and 2 examples, read off a figure but for the last: 23.5, 23.7, 23.6, 23.7, 23.67 %; batch norm 23.41, 24.3, 25.5,
    27.9, 35.22 %. Mask R-CNN on COCO with 2 images per device, from scratch: box AP 36.50, batch norm 32.38, batch norm
    synchronized over 16 images 36.80. Evaluation costs what that of batch norm costs.

    **After each gradient** call `backward`, or `update_backward` of the hosts, which `make_steps` does: the second
    statistic shows only in the gradient, :math:`\psi_B = \gamma\, (\partial L / \partial \gamma) / m`. Give it the
    gradient of each training call, before it is accumulated or clipped, and without the loss scale. Where it is never
    called, :math:`\Psi` stays that of the batch. The loss is a mean over the rows of a batch; of several devices, the
    mean over the rows of each, with gradients averaged over devices, as by `pmean`. A loss that was averaged over n
    devices before its gradient was taken has the loss scale 1/n.

    Args:
        momentum: Weight of the OLD running value, in [0, 1), or an average made by `constant` or its like.
        epsilon: Added to V, inside the root; positive.
        window: W, the number of batches that are averaged: the batch size that is imitated by that of a batch. With 1
            it is RMS normalization over the batch, with `r`.
        warmup: Before this step the statistics are those of the batch; so they are in the first W steps.
        r_max: r lies in [1 / r_max, r_max] after 1000 steps, or after the warm-up if that is longer; before it is 1.
        axis: Feature axis of `x`, or several.
        dtype: Of the output. None: what x, scale, bias and residual promote to.
        use_bias: Learn the bias :math:`\beta`.
        use_scale: Learn the scale :math:`\gamma`; must be True, as psi is read off its gradient.
        axis_name: Axis or axes of the surrounding `shard_map`, `pmap` or `vmap` over which a batch is spread; used in
            training alone. None there: each device has statistics of its own, as in the paper.
        axis_index_groups: Groups of devices along `axis_name`, of equal size, that share statistics.
        use_fast_variance: True sums about a shift and reads x once, False centres first and reads it twice.
        activation: Applied to the result, after the residual.
        allow_single_value: Accepted, as by other methods; one value per channel is fine here.
        autodiff: Must be False: the gradient is no derivative of the output, and forward mode has none.

    Returns:
        A `NormTransform` with state `MovingAverageBatchNormState` and params `NormParams`. `measure` gives moments
        about 0: the mean is 0, and the variance the second moment, which a pass over the data thus installs. `backward`
        takes one argument more, `loss_scale`: what the loss of the *next* step will be multiplied by, 1 by default.

    Raises:
        ValueError: Here for hyper-parameters outside their range; in `train`, while tracing, for input that does not
            fit, as in `batch_norm`.
        TypeError: Here for a momentum or activation of the wrong kind; in `train` for complex input.

    Example:
        >>> mabn = jaxbn.moving_average_batch_norm(window=8)
        >>> params, state = mabn.init(1)
        >>> def loss_of(params, x):
        ...     y, after = mabn.train(params, state, x)
        ...     return jnp.mean(y**3), after
        >>> grads, state = jax.grad(loss_of, has_aux=True)(params, jnp.array([[1.0], [3.0]]))
        >>> state = mabn.backward(params, state, grads)
        >>> state.square_window[-1], state.gradient_window[-1].round(2)
        (Array([5.], dtype=float32), Array([1.88], dtype=float32))

    References:
        Yan et al., `Towards Stabilizing Batch Statistics in Backward Propagation of Batch Normalization
        <https://arxiv.org/abs/2001.06838>`_, 2020, in the form of their released layer; in the text the window is for
        :math:`\Psi` alone. Differs from that layer: psi is written by `backward` and not during backpropagation, which
        is the same, as a step needs that of others alone; with `axis_name` devices share their statistics; a channel of
        a batch that is not finite, or masked altogether, keeps its windows. A layer that is called twice for one
        gradient finds the sum of both psi, over the values of the last call.
    """
    del allow_single_value
    average = _check(_averages.as_averaging(momentum), epsilon, window, warmup, r_max, use_scale, autodiff)
    axis_name = _collectives.static(axis_name)
    groups = _collectives.check_groups(axis_name, axis_index_groups)
    base = batch_norm(
        momentum=average, epsilon=epsilon, axis=axis, dtype=dtype, use_bias=use_bias, axis_name=axis_name,
        axis_index_groups=groups, use_fast_variance=use_fast_variance, activation=activation,
    )  # fmt: skip
    spec = _operands.Spec(_axes.static(axis), epsilon, activation, dtype, axis_name, groups)
    everywhere = functools.partial(
        _moments.batch_moments, axis=axis, axis_name=axis_name, axis_index_groups=groups,
        use_fast_variance=use_fast_variance,
    )  # fmt: skip

    def init(
        feature_shape: int | Sequence[int], *, dtype: DTypeLike = jnp.float32
    ) -> tuple[NormParams, MovingAverageBatchNormState]:
        params, state = base.init(feature_shape, dtype=dtype)
        windows = jnp.zeros((window, *state.var.shape), state.var.dtype)
        zero, one = jnp.zeros((), jnp.float32), jnp.ones((), jnp.float32)
        return params, MovingAverageBatchNormState(
            state.mean, state.var, 1 + windows, windows, jnp.zeros_like(state.var), zero, zero, one, state.count
        )

    def train(
        params: NormParams,
        state: MovingAverageBatchNormState,
        x: ArrayLike,
        *,
        mask: ArrayLike | None = None,
        residual: ArrayLike | None = None,
    ) -> tuple[jax.Array, MovingAverageBatchNormState]:
        operands = _operands.of_call(spec, params.scale, params.bias, state.mean, x, mask, residual)
        x, weights = operands.x, operands.weights
        _check_batch(x, axis)
        devices = _collectives.group_size(axis_name, groups)
        found, known = _about_zero(everywhere(x, mask=weights)), lax.stop_gradient(state)
        past, share = _earlier(known.square_window, known.step, warmup, found.var.dtype)
        past_psi, share_psi = _earlier(known.gradient_window, known.gradients, warmup, found.var.dtype)
        seen = found.count > 0
        mean, var = (jnp.where(seen, 0, known.mean.astype(found.mean.dtype)), known.var.astype(found.var.dtype))
        chi = jnp.where(seen, found.var, var)
        # V, whose own derivative brings the share of the batch in Psi; _remember brings that of the others.
        v = lax.stop_gradient(jnp.where(seen, past + share * chi, var))
        r = _correction(v, var, epsilon, jnp.where(known.step < max(_PLAIN_STEPS, warmup), 1, r_max).astype(v.dtype))
        past_psi = jnp.where(seen, past_psi * known.loss_scale.astype(v.dtype) * devices, 0)
        if jnp.issubdtype(x.dtype, jnp.inexact):
            x = _remember(x, weights, _axes.expand(-past_psi / (v + epsilon), _axes.split(x.ndim, axis)))
        v += share_psi * (chi - lax.stop_gradient(chi))
        y = _normalize.normalize(spec, operands._replace(x=x), mean, v, constants=(r, jnp.zeros_like(r)))
        return y, update(state, found, count_samples(found, x.shape, axis))

    def measure(x: ArrayLike, *, mask: ArrayLike | None = None) -> _moments.Moments:
        return _about_zero(base.measure(x, mask=mask))

    def postproc(state: MovingAverageBatchNormState, moments: _moments.Moments) -> MovingAverageBatchNormState:
        return base.postproc(state, _about_zero(moments))

    def update(
        state: MovingAverageBatchNormState, moments: _moments.Moments, samples: ArrayLike | None = None
    ) -> MovingAverageBatchNormState:
        found = lax.stop_gradient(_about_zero(moments))
        moved = averaging_step(average, state, found, samples)
        past, share = _earlier(state.square_window, state.step, warmup, found.var.dtype)
        return lax.stop_gradient(
            state._replace(
                mean=_averages.update(state.mean, found.mean, moved.decay, moved.good),
                var=_averages.update(state.var, past + share * moved.var, moved.decay, moved.good),
                square_window=_push(state.square_window, moved.var, moved.good),
                values=jnp.where(moved.good, found.count.astype(state.values.dtype), state.values),
                step=jnp.where(moved.good.any(), state.step + 1, state.step),
                count=moved.count,
            )
        )

    return on_meshes(NormTransform(init, train, base.eval, measure, postproc, update, backward), axis)


def backward(
    params: NormParams, state: MovingAverageBatchNormState, grads: NormParams, *, loss_scale: ArrayLike = 1.0
) -> MovingAverageBatchNormState:
    """Puts psi of the last training call into its window; under `vmap` and `scan` of layers, that of each layer.

    The gradients are those by these params, before the step of the optimizer; where they are not finite, the window
    stays.
    """

    def learn(before: MovingAverageBatchNormState, scale: Any, dscale: Any) -> MovingAverageBatchNormState:
        state = _explicit_meshes.on_channels(before, scale, range(scale.ndim))
        dtype = state.gradient_window.dtype
        psi = scale.astype(dtype) * dscale.astype(dtype) / jnp.where(state.values > 0, state.values, 1)
        good = (state.values > 0) & jnp.isfinite(psi)
        after = state._replace(
            gradient_window=_push(state.gradient_window, psi, good),
            gradients=jnp.where(good.any(), state.gradients + 1, state.gradients),
            loss_scale=jnp.asarray(loss_scale, jnp.float32),
        )
        return _explicit_meshes.as_before(after, before)

    for _ in range(state.gradients.ndim):
        learn = jax.vmap(learn)
    return lax.stop_gradient(learn(state, params.scale, grads.scale))


@jax.custom_vjp
def _remember(x: jax.Array, weights: jax.Array | None, factor: jax.Array) -> jax.Array:
    """Gives x as it is. Its gradient is `weights * x * factor` more than that of what is made of it."""
    del weights, factor
    return x


def _remember_forward(*operands: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return operands[0], operands


def _remember_backward(saved: tuple[jax.Array, ...], dx: jax.Array) -> tuple[jax.Array, None, None]:
    x, weights, factor = saved
    x = x if weights is None else jnp.where(weights > 0, x, 0) * weights.astype(x.dtype)
    return (dx.astype(factor.dtype) + x.astype(factor.dtype) * factor).astype(dx.dtype), None, None


_remember.defvjp(_remember_forward, _remember_backward)


def _about_zero(moments: _moments.Moments) -> _moments.Moments:
    """The moments with 0 in the place of the mean, so that the variance is the second moment."""
    mean = moments.mean
    return moments._replace(mean=jnp.zeros_like(mean), m2=moments.m2 + moments.count * jnp.square(mean))


def _earlier(window: jax.Array, seen: jax.Array, warmup: int, dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
    """What is to be added to the share of the newest value so that it is the mean of the window; and that share.

    0 and 1 as long as the window does not count: the newest value is then on its own.
    """
    size = len(window)
    counts = (seen >= size) & (seen + 1 >= warmup)
    past = window[1:].astype(dtype).sum(0) / size
    return jnp.where(counts, past, 0), jnp.where(counts, 1 / size, 1).astype(dtype)


def _push(window: jax.Array, newest: jax.Array, where: jax.Array) -> jax.Array:
    """The window one step later, in the channels that are to move."""
    moved = jnp.concatenate([window[1:], newest[None].astype(window.dtype)])
    return jnp.where(where[None], moved, window)


def _correction(v: jax.Array, var: jax.Array, epsilon: ArrayLike, r_max: jax.Array) -> jax.Array:
    inside = jnp.asarray(epsilon, v.dtype)
    return jnp.clip(jnp.sqrt((v + inside) / (var + inside)), 1 / r_max, r_max)


def _check(
    average: _averages.Averaging | None,
    epsilon: ArrayLike,
    window: int,
    warmup: int,
    r_max: float,
    use_scale: bool,
    autodiff: bool,
) -> _averages.Averaging:
    """The average; a ValueError for hyper-parameters that this method cannot have."""
    if not use_scale:
        raise ValueError(
            "use_scale=False: this method reads its second statistic off the gradient of the scale. Keep the scale, "
            "and to hold it at 1 keep the optimizer away from it, as optax.masked or optax.set_to_zero do."
        )
    if autodiff:
        raise ValueError("autodiff=True: the gradient of this method is no derivative of its output; leave it out.")
    if average is None:
        raise ValueError("momentum=None keeps no running average, and r compares with one. Give a momentum: 0.98.")
    if average.unbiased:
        raise ValueError("The second moment about 0 has no unbiased form; leave out unbiased=.")
    if isinstance(epsilon, Real) and not epsilon > 0:
        raise ValueError(f"epsilon={epsilon} must be positive: a channel of zeros is divided by its root.")
    if not window >= 1 or not warmup >= 0:
        raise ValueError(f"window={window} must be at least 1 (the batch alone), and warmup={warmup} not negative.")
    if not r_max >= 1:
        raise ValueError(f"r_max={r_max} must be at least 1: r lies in [1 / r_max, r_max]. 1 is no correction.")
    return average


def _check_batch(x: jax.Array, axis: _axes.Axis) -> None:
    if jnp.iscomplexobj(x):
        raise TypeError(f"moving_average_batch_norm takes real input, and this one is {x.dtype}. Use batch_norm.")
    values = _axes.values_per_channel(x.shape, axis)
    _axes.check_training_batch(x.shape, axis, values, allow_single_value=True)
