r"""Moving average batch normalization (MABN): statistics of the last W batches, in the gradient as well.

.. math:: y = \gamma\, r\, z + \beta, \qquad z = \frac{x}{\sqrt{V + \epsilon}}, \qquad
          \frac{\partial L}{\partial x} = \frac{g - z \Psi}{\sqrt{V + \epsilon}}, \quad
          g = \gamma\, r\, \frac{\partial L}{\partial y}

V is the mean of :math:`\chi_B^2 = E[x^2]` over the last W batches, :math:`\Psi` the mean of :math:`\psi_B = E[g z]`
over the last W gradients. With constant weights this is the gradient of the W batches together. r compares V with a
long average.

Yan et al., Towards Stabilizing Batch Statistics in Backward Propagation of Batch Normalization, 2020.
"""

import functools
from collections.abc import Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jaxbn._src.methods.batch_norm import averaging_step, batch_norm, count_samples
from jaxbn._src.methods.protocol import BackwardFn, NormParams, NormTransform, on_meshes
from jaxbn._src.numerics import averages as _averages
from jaxbn._src.numerics import axes as _axes
from jaxbn._src.numerics import collectives as _collectives
from jaxbn._src.numerics import explicit_meshes as _explicit_meshes
from jaxbn._src.numerics import moments as _moments
from jaxbn._src.numerics import normalize as _normalize
from jaxbn._src.numerics import operands as _operands
from jaxbn._src.numerics.extra_gradient import add_to_gradient

_PLAIN_STEPS = 1000  # r is 1 in these steps, or in the warm-up if that is longer


class MovingAverageBatchNormState(NamedTuple):
    """The long average of the second moment, and the windows; `eval` reads `mean` and `var` only."""

    mean: jax.Array  # f32[C]: 0, as `var` is a second moment about 0; a mean from a checkpoint decays
    var: jax.Array  # f32[C]: average of V
    square_window: jax.Array  # f32[W, C]: chi^2 of the last W batches, the newest last
    gradient_window: jax.Array  # f32[W, C]: psi of the last W gradients, the newest last; of the unscaled loss
    values: jax.Array  # f32[C]: m, the number of values in the last batch
    step: jax.Array  # f32[]: training steps so far
    gradients: jax.Array  # f32[]: calls of `backward` so far
    loss_scale: jax.Array  # f32[]: factor of the loss in the next step
    # f32[]: steps (samples for a horizon) averaged so far; None if the average needs no count
    count: jax.Array | None = None  # type: ignore[assignment]  # hides tuple.count


class MovingAverageNormTransform(NormTransform[NormParams, MovingAverageBatchNormState]):
    """A `NormTransform` that has a `backward`."""

    if TYPE_CHECKING:  # the field is that of NormTransform; type checkers see that it is not None here

        @property
        def backward(self) -> BackwardFn[NormParams, MovingAverageBatchNormState]: ...


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
) -> MovingAverageNormTransform:
    r"""Moving average batch normalization as pure functions: for batches of one to four examples.

    Use it if memory holds very few examples, or if a batch holds one class only. It does not subtract the mean: use
    centered kernels in the preceding layers (`centralize_kernel`). Published results: the top-1 error of ResNet-50 on
    ImageNet with 32, 16, 8, 4 and 2 examples is 23.5, 23.7, 23.6, 23.7, 23.67 %, with batch norm 23.41, 24.3, 25.5,
    27.9, 35.22 % (all but the last read off a figure). Mask R-CNN on COCO with 2 images per device, from scratch, has
    box AP 36.50, with batch norm 32.38, with batch norm synchronized over 16 images 36.80. Evaluation costs the same
    as for batch norm.

    **After each gradient** call `backward`, or `update_backward` of linen and NNX, as `make_steps` does: the second
    statistic is read off the gradient, :math:`\psi_B = \gamma\, (\partial L / \partial \gamma) / m`. Pass the gradient
    of each training call, before accumulation and clipping, and without the loss scale. Without these calls
    :math:`\Psi` is that of the batch. The loss must be a mean over the rows of a batch; with several devices, the mean
    over each device's rows, with gradients averaged over devices, as by `pmean`. If the loss was averaged over n
    devices before taking the gradient, its loss scale is 1/n.

    Args:
        momentum: Weight of the OLD running value, in [0, 1), or an average made by `constant` or its like.
        epsilon: Added to V, inside the root; positive.
        window: W, the number of batches to average. W batches of b examples imitate one batch of W b examples. With 1
            this is RMS normalization over the batch, with `r`.
        warmup: Before this step, and in the first W steps, the statistics are those of the batch.
        r_max: r lies in [1 / r_max, r_max] after 1000 steps, or after the warm-up if that is longer; r is 1 before.
        axis: Feature axis of `x`, or several.
        dtype: Of the output. None: what x, scale, bias and residual promote to.
        use_bias: Learn the bias :math:`\beta`.
        use_scale: Learn the scale :math:`\gamma`; must be True, as psi is read off its gradient.
        axis_name: Axis or axes of the surrounding `shard_map`, `pmap` or `vmap` over which a batch is spread; used in
            training only. None there: each device keeps its own statistics, as in the paper.
        axis_index_groups: Groups of devices along `axis_name`, of equal size, that share statistics.
        use_fast_variance: As in `batch_norm`.
        activation: Applied to the result, after the residual; as in `batch_norm`.
        allow_single_value: Ignored: one value per channel is always accepted here.
        autodiff: Must be False: the gradient is not the derivative of the output, and forward mode does not exist.

    Returns:
        A `NormTransform` with state `MovingAverageBatchNormState` and params `NormParams`, and with a `backward`.
        `measure` returns moments about 0: the mean is 0 and the variance is the second moment; a statistics pass
        installs these.

    Raises:
        ValueError: For hyper-parameters outside their range. In `train`, while tracing: for input that does not
            fit, as in `batch_norm`.
        TypeError: For a momentum or activation of the wrong kind. In `train`: for complex input.

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
        :math:`\Psi` only. Deviations from that layer: `backward` writes psi, not backpropagation, with the same result,
        as a step reads only the psi of earlier steps; with `axis_name` devices share their statistics; a channel that
        is not finite, or masked entirely, keeps its windows. If a layer is called twice before a gradient, psi is the
        sum for both calls, divided by the number of values of the last one.
    """
    del allow_single_value
    average = _check(_averages.as_averaging(momentum), epsilon, window, warmup, r_max, use_scale, autodiff)
    axis_name = _collectives.static(axis_name)
    groups = _collectives.check_groups(axis_name, axis_index_groups)
    base: NormTransform[NormParams, Any] = batch_norm(  # its `eval` and `postproc` serve this state as well
        momentum=average, epsilon=epsilon, axis=axis, dtype=dtype, use_bias=use_bias, axis_name=axis_name,
        axis_index_groups=groups, use_fast_variance=use_fast_variance, activation=activation, allow_single_value=True,
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
        # A channel without values is normalized with the state, and its gradient has no psi of earlier batches.
        seen = found.count > 0
        mean, var = (jnp.where(seen, 0, known.mean.astype(found.mean.dtype)), known.var.astype(found.var.dtype))
        chi = jnp.where(seen, found.var, var)
        v = lax.stop_gradient(jnp.where(seen, past + share * chi, var))
        r = _correction(v, var, epsilon, jnp.where(known.step < max(_PLAIN_STEPS, warmup), 1, r_max).astype(v.dtype))
        # -z Psi has two parts: add_to_gradient adds the part of the earlier batches, and the part of this batch is the
        # derivative of the term with chi below, whose value is 0.
        # The window holds psi of the unscaled loss, averaged over devices; the gradient here is scaled, not averaged.
        past_psi = jnp.where(seen, past_psi * known.loss_scale.astype(v.dtype) * devices, 0)
        if jnp.issubdtype(x.dtype, jnp.inexact):
            x = add_to_gradient(x, weights, _axes.expand(-past_psi / (v + epsilon), _axes.split(x.ndim, axis)))
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
        averaged = averaging_step(average, state, found, samples)
        past, share = _earlier(state.square_window, state.step, warmup, found.var.dtype)
        return lax.stop_gradient(
            state._replace(
                mean=_averages.update(state.mean, found.mean, averaged.decay, averaged.good),
                var=_averages.update(state.var, past + share * averaged.var, averaged.decay, averaged.good),
                square_window=_push(state.square_window, averaged.var, averaged.good),
                values=jnp.where(averaged.good, found.count.astype(state.values.dtype), state.values),
                step=jnp.where(averaged.good.any(), state.step + 1, state.step),
                count=averaged.count,
            )
        )

    transform = NormTransform(init, train, base.eval, measure, postproc, update, backward, base.settings)
    return MovingAverageNormTransform(*on_meshes(transform, axis))


def backward(
    params: NormParams, state: MovingAverageBatchNormState, grads: NormParams, *, loss_scale: ArrayLike = 1.0
) -> MovingAverageBatchNormState:
    """Appends psi of the last training call to its window; see `BackwardFn`.

    A channel whose gradient is not finite keeps its window. A state with leading axes holds several layers, as under
    `nn.scan` and `nn.vmap`; each of them is updated.
    """

    def learn(before: MovingAverageBatchNormState, scale: Any, dscale: Any) -> MovingAverageBatchNormState:
        state = _explicit_meshes.on_channels(before, scale, range(scale.ndim))
        dtype = state.gradient_window.dtype
        # psi = E[g z]: the gradient of the scale is the sum of r z dL/dy, and g = scale r dL/dy.
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


def _about_zero(moments: _moments.Moments) -> _moments.Moments:
    """Turns moments into moments about 0: the mean is 0, and the variance the second moment."""
    # E[x^2] is the variance plus the square of the mean.
    mean = moments.mean
    return moments._replace(mean=jnp.zeros_like(mean), m2=moments.m2 + moments.count * jnp.square(mean))


def _earlier(window: jax.Array, seen: jax.Array, warmup: int, dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
    """Returns (past, share) such that `past + share * newest` is the mean of the window after the next step.

    As long as the window is not full, or in the warm-up, this is (0, 1): the newest value alone.
    """
    size = len(window)
    counts = (seen >= size) & (seen + 1 >= warmup)
    past = window[1:].astype(dtype).sum(0) / size
    return jnp.where(counts, past, 0), jnp.where(counts, 1 / size, 1).astype(dtype)


def _push(window: jax.Array, newest: jax.Array, where: jax.Array) -> jax.Array:
    """Appends a value to the window in the channels `where`, and drops the oldest one."""
    appended = jnp.concatenate([window[1:], newest[None].astype(window.dtype)])
    return jnp.where(where[None], appended, window)


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
    """Returns the average; raises a ValueError for hyper-parameters that this method does not accept."""
    if not use_scale:
        raise ValueError(
            "use_scale=False: this method reads its second statistic off the gradient of the scale. Keep the scale; "
            "to hold it at 1, exclude it from the optimizer with optax.masked or optax.set_to_zero."
        )
    if autodiff:
        raise ValueError(
            "autodiff=True: the gradient of this method is not the derivative of its output; leave it out."
        )
    if average is None:
        raise ValueError(
            "momentum=None keeps no running average, and r compares with one. Pass a momentum, such as 0.98."
        )
    if average.unbiased:
        raise ValueError("The second moment about 0 has no unbiased form; leave out unbiased=.")
    if isinstance(epsilon, Real) and not epsilon > 0:
        raise ValueError(f"epsilon={epsilon} must be positive: a channel of zeros is divided by its square root.")
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
