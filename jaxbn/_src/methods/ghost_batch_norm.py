r"""Ghost batch norm: a large batch is split into groups, and each group is normalized with its own statistics.

.. math:: y_i = \gamma \frac{x_i - \mu_g}{\sqrt{\sigma_g^2 + \epsilon}} + \beta, \qquad i \in \text{group } g

so that the statistics are as noisy as those of a small batch, however large the optimizer's batch is. For the
arithmetic a group is a feature: a batch [N, .., C] becomes [G, N / G, .., C], with statistics [G, C].

Hoffer, Hubara & Soudry, Train longer, generalize better: closing the generalization gap in large batch training of
neural networks, 2017, Algorithm 1.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jaxbn._src.methods.batch_norm import batch_norm, count_samples, update_averages
from jaxbn._src.methods.protocol import NormParams, NormTransform, on_meshes
from jaxbn._src.numerics import averages as _averages
from jaxbn._src.numerics import axes as _axes
from jaxbn._src.numerics import collectives as _collectives
from jaxbn._src.numerics import dtypes as _dtypes
from jaxbn._src.numerics import moments as _moments
from jaxbn._src.numerics import normalize as _normalize
from jaxbn._src.numerics import operands as _operands


class GhostBatchNormState(NamedTuple):
    """The population statistics, as far as they are known; the same as those of batch norm."""

    mean: jax.Array  # f32[C]; complex for complex inputs
    var: jax.Array  # f32[C]
    # f32[]: steps (samples for a horizon) averaged so far; None if the average needs no count
    count: jax.Array | None = None  # type: ignore[assignment]  # hides tuple.count


class _Plan(NamedTuple):
    """How a batch is split into groups; static."""

    rows: int  # the axis that becomes two axes
    is_new: bool  # whether x has no such axis, because each device holds one example
    pieces: int  # size of the first of the two axes
    groups: int  # number of groups on this device
    axis: tuple[int, ...]  # feature axes of the split batch: the axis of the groups, and the features of x
    position: int  # index of the groups among these axes
    joined: int  # number of devices that share a group
    axis_name: _collectives.AxisName | None  # axis of these devices; None: each group is on one device


class _Measured(NamedTuple):
    """Moments of this device's groups, which normalize x, and moments of the batch for the running averages."""

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count
    mean: jax.Array
    m2: jax.Array
    whole: _moments.Moments | None  # [C]; None if training keeps no averages

    @property
    def var(self) -> jax.Array:
        return _moments.Moments(self.count, self.mean, self.m2).var


def ghost_batch_norm(
    *,
    ghost_size: int,
    grouping: Literal["contiguous", "strided"] = "contiguous",
    running: Literal["group_mean", "pooled"] = "group_mean",
    momentum: ArrayLike | _averages.Averaging | None = 0.99,
    epsilon: float = 1e-5,
    axis: int | Sequence[int] = -1,
    dtype: DTypeLike | None = None,
    use_bias: bool = True,
    use_scale: bool = True,
    axis_name: str | tuple[str, ...] | None = None,
    axis_index_groups: None = None,
    use_fast_variance: bool = True,
    activation: _operands.Activation | None = None,
    allow_single_value: bool = False,
    autodiff: bool = False,
) -> NormTransform[NormParams, GhostBatchNormState]:
    r"""Ghost batch norm as pure functions: batch norm in groups of `ghost_size` samples, for any batch size.

    Use it if the optimizer's batch is large (thousands): the noise in the statistics of small groups regularizes. Use
    it also to keep a recipe's statistics when the batch size or the number of devices changes: a group always has
    `ghost_size` samples; a device holds several groups, or several devices share one.

    A group on one device needs no communication. The running averages, which are the same on all devices, cost one
    collective (none with `momentum=None`). Evaluation works as in batch norm.

    Args:
        ghost_size: Samples (rows) in a group, over all devices. It must divide the batch size; a smaller batch is one
            group.
        grouping: `"contiguous"`: neighboring samples form a group. `"strided"`: sample i is in group i mod G, as in
            TensorFlow's `virtual_batch_size`; groups then extend over all devices. It matters if samples are sorted.
        running: The variance that the running average takes in at each training step. `"group_mean"`: the mean of the
            groups' variances, which training normalizes with. `"pooled"`: the variance of the whole batch, which also
            contains the variance of the groups' means, about :math:`\sigma^2 / n` for n values in a group.
        momentum: Weight of the OLD running value, per training step (not per group); as in `batch_norm`.
        epsilon: Added to the variance; not negative.
        axis: Feature axis of `x`, or several. The first of the other axes holds the samples.
        dtype: Of the output. None: what x, scale, bias and residual promote to.
        use_bias: Learn the bias :math:`\beta`.
        use_scale: Learn the scale :math:`\gamma`.
        axis_name: Axis or axes of the surrounding `shard_map`, `pmap` or `vmap` over which a batch is spread; used in
            training only. `jit` on sharded arrays needs no axis name.
        axis_index_groups: Must be None: `ghost_size` determines which devices share statistics.
        use_fast_variance: As in `batch_norm`.
        activation: Applied to the result, after the residual; as in `batch_norm`.
        allow_single_value: Accept groups of one value per channel in training.
        autodiff: Use JAX's own derivative instead of the hand-written one.

    Returns:
        A `NormTransform` with state `GhostBatchNormState` and params `NormParams`.

    Raises:
        ValueError: For hyper-parameters outside their range. In `train`, while tracing: for a batch size that
            `ghost_size` does not divide, groups that do not fit on the devices, or input that does not fit.
        TypeError: For a momentum, activation or `ghost_size` of the wrong kind.

    Example:
        >>> ghost = jaxbn.ghost_batch_norm(ghost_size=2)
        >>> params, state = ghost.init(1)
        >>> y, state = ghost.train(params, state, jnp.array([[1.0], [3.0], [11.0], [13.0]]))
        >>> y.round(2).ravel()
        Array([-1.,  1., -1.,  1.], dtype=float32)

    References:
        Hoffer, Hubara & Soudry, `Train longer, generalize better <https://arxiv.org/abs/1705.08741>`_, 2017,
        Algorithm 1; Summers & Dinneen, `Four Things Everyone Should Know to Improve Batch Normalization
        <https://arxiv.org/abs/1906.03548>`_, 2020. One deviation: the running averages are updated once per step, with
        the mean over the groups, as in TensorFlow; the paper updates them for each group in turn. Here a momentum means
        the same for any number of groups. A group with a mask is weighted by its number of valid values.

        A statistics pass does not split its batches: give `postproc` batches of `ghost_size`.
    """
    average = _averages.as_averaging(momentum)
    ghost_size = _check(ghost_size, grouping, running, axis_index_groups)
    axis_name = _collectives.static(axis_name)
    base: NormTransform[NormParams, Any] = batch_norm(  # its `eval`, `measure` and `postproc` serve this state as well
        momentum=average, epsilon=epsilon, axis=axis, dtype=dtype, use_bias=use_bias, use_scale=use_scale,
        axis_name=axis_name, use_fast_variance=use_fast_variance, activation=activation,
        allow_single_value=allow_single_value,
    )  # fmt: skip
    spec = _operands.Spec(_axes.static(axis), epsilon, activation, dtype)
    # An unbiased variance needs the factor n / (n - 1) of a group. Unless groups are pooled, `whole` applies it to each
    # group, and the average must not apply that of the whole batch.
    of_groups = average is not None and average.unbiased and running == "group_mean"
    averaging = dataclasses.replace(average, unbiased=False) if average is not None and of_groups else average

    def init(
        feature_shape: int | Sequence[int], *, dtype: DTypeLike = jnp.float32
    ) -> tuple[NormParams, GhostBatchNormState]:
        params, state = base.init(feature_shape, dtype=dtype)
        return params, GhostBatchNormState(*state)

    def train(
        params: NormParams,
        state: GhostBatchNormState,
        x: ArrayLike,
        *,
        mask: ArrayLike | None = None,
        residual: ArrayLike | None = None,
    ) -> tuple[jax.Array, GhostBatchNormState]:
        operands = _operands.of_call(spec, params.scale, params.bias, state.mean, x, mask, residual)
        x = operands.x
        plan = _plan(x.shape, axis, ghost_size, grouping, axis_name, allow_single_value)
        given, stored = _cut(plan, operands, state)
        # Algorithm 1: batch norm of each group.
        y, measured = _normalize.batch_normalize(
            spec._replace(
                axis=plan.axis,
                # By the original operands: those of the groups are at least float32, and would widen the output.
                dtype=_dtypes.output(spec.dtype, x, params.scale, params.bias, operands.residual),
                axis_name=plan.axis_name,
                axis_index_groups=_collectives.neighbours(plan.axis_name, plan.joined),
            ),
            functools.partial(measure, plan),
            given,
            *stored,
            autodiff=autodiff,
        )
        y = _collectives.uncut(y, x)
        if averaging is None:
            return y, state
        return y, update_averages(averaging, state, measured.whole, count_samples(measured.whole, x.shape, axis))

    def measure(plan: _Plan, x: jax.Array, *, mask: jax.Array | None) -> _Measured:
        options: Any = {"axis": plan.axis, "mask": mask, "use_fast_variance": use_fast_variance}
        if plan.axis_name is None:
            own = _moments.batch_moments(x, **options)
            known = jax.tree.map(lambda part: part[None], own)
        else:
            # One collective serves the groups of this device and, on few devices, the running averages.
            known = _moments.neighbour_moments(x, **options, axis_name=plan.axis_name, size=plan.joined)
            own = _collectives.own_of_neighbours(known, plan.axis_name, plan.joined)
        return _Measured(*own, None if averaging is None else whole(plan, known))

    def whole(plan: _Plan, known: _moments.Moments) -> _moments.Moments:
        """Computes the moments that enter the running averages, from those of groups [K, ..] that this device knows."""
        all_known = len(known.count) * plan.joined == _collectives.group_size(axis_name, None)
        over, copies = (None, 1) if all_known else (axis_name, plan.joined)
        groups = jax.tree.map(jnp.concatenate, jax.vmap(functools.partial(_groups_first, plan=plan))(known))
        # Without the spread between groups. Algorithm 1 instead updates its averages with each group in turn.
        within = groups.m2 * _moments.bessel(groups.count) if of_groups else groups.m2
        union, within = _moments.pool_over(groups, within, over, copies)
        return union if running == "pooled" else union._replace(m2=within)

    return on_meshes(base._replace(init=init, train=train), axis)


def _check(ghost_size: int, grouping: str, running: str, axis_index_groups: None) -> int:
    """Returns the size of a group; raises for hyper-parameters that this method does not accept."""
    try:
        size = operator.index(ghost_size)
    except TypeError:
        raise TypeError(f"ghost_size={ghost_size!r} must be a number of samples, such as 32.") from None
    if size < 1:
        raise ValueError(f"ghost_size={ghost_size} must be positive: it is the number of samples in a group.")
    for name, value, allowed in (
        ("grouping", grouping, ("contiguous", "strided")),
        ("running", running, ("group_mean", "pooled")),
    ):
        if value not in allowed:
            raise ValueError(f"{name}={value!r} is none of {', '.join(map(repr, allowed))}.")
    if axis_index_groups is not None:
        raise ValueError(
            "ghost_batch_norm takes no axis_index_groups: ghost_size determines which devices share statistics."
        )
    return size


def _plan(
    shape: Sequence[int],
    axis: _axes.Axis,
    ghost_size: int,
    grouping: str,
    axis_name: _collectives.AxisName | None,
    allow_single_value: bool,
) -> _Plan:
    """Plans how to split a batch of this shape on each device; raises a ValueError if it does not fit."""
    axes, devices = _axes.split(len(shape), axis), _collectives.group_size(axis_name, None)
    is_new = not axes.reduced
    rows, here = (0, 1) if is_new else (axes.rows, shape[axes.rows])
    size = min(ghost_size, here * devices)
    space = math.prod(shape[a] for a in axes.reduced[1:])
    _axes.check_training_batch(shape, axis, size * space, allow_single_value)
    if here * devices % size:
        raise ValueError(
            f"A batch of {here * devices} samples does not divide into groups of ghost_size={ghost_size}. Change one "
            f"of the two, or drop the last samples of the batch."
        )
    if grouping == "strided":
        # Sample i is in group i mod G: in [pieces, G] the second axis numbers the groups.
        groups = here * devices // size
        fits, pieces, joined, group_axis = here % groups == 0, here // groups, devices, rows + 1
    else:
        # Neighbors form a group: in [groups, size] the first axis numbers the groups.
        groups = pieces = max(here // size, 1)
        fits, joined, group_axis = here % size == 0 or size % here == 0, max(size // here, 1), rows
    if not fits:
        raise ValueError(
            f"{grouping} groups of ghost_size={ghost_size} do not fit on {devices} devices with {here} samples each: a "
            f"device must hold whole groups, or an equal part of each group that it shares with others."
        )
    features = tuple(a + is_new for a in axes.features)
    # The cut adds an axis, which moves the later ones by one.
    cut = (*(a for a in features if a < group_axis), group_axis, *(a + 1 for a in features if a >= group_axis))
    over = axis_name if joined > 1 else None
    return _Plan(rows, is_new, pieces, groups, cut, cut.index(group_axis), joined, over)


def _cut(
    plan: _Plan, operands: _operands.Operands, state: GhostBatchNormState
) -> tuple[_operands.Operands, tuple[jax.Array, jax.Array]]:
    """Adds the axis of the groups to the operands, and to mean and variance."""

    def cut(a: jax.Array) -> jax.Array:
        return _collectives.cut(a[None] if plan.is_new else a, plan.rows, plan.pieces)

    def for_groups(stat: jax.Array) -> jax.Array:
        # At least float32: half precision loses digits when the gradients of the groups are added up.
        return _collectives.repeat(stat.astype(_dtypes.compute(stat)), plan.position, x, plan.axis[plan.position])

    x = cut(operands.x)
    _, scale, bias, residual, weights, _ = operands
    given = _operands.Operands(
        x,
        None if scale is None else for_groups(scale),
        None if bias is None else for_groups(bias),
        None if residual is None else cut(residual),
        None if weights is None else cut(weights),
    )
    return given, (for_groups(state.mean), for_groups(state.var))


def _groups_first(moments: _moments.Moments, plan: _Plan) -> _moments.Moments:
    return jax.tree.map(lambda part: jnp.moveaxis(part, plan.position, 0), moments)
