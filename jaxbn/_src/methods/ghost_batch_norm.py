r"""Ghost batch norm: a large batch is cut into groups, each of which is normalized with its own statistics.

.. math:: y_i = \gamma \frac{x_i - \mu_g}{\sqrt{\sigma_g^2 + \epsilon}} + \beta, \qquad i \in \text{group } g

so that statistics are as noisy as those of a small batch, whatever the batch of the optimizer is. To the arithmetic a
group is a feature: a batch [N, .., C] becomes [G, N / G, .., C], with statistics [G, C].

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

from jaxbn._src.methods.batch_norm import batch_norm, count_samples, move_averages
from jaxbn._src.methods.protocol import NormParams, NormTransform, on_meshes
from jaxbn._src.numerics import averages as _averages
from jaxbn._src.numerics import axes as _axes
from jaxbn._src.numerics import collectives as _collectives
from jaxbn._src.numerics import dtypes as _dtypes
from jaxbn._src.numerics import moments as _moments
from jaxbn._src.numerics import normalize as _normalize
from jaxbn._src.numerics import operands as _operands


class GhostBatchNormState(NamedTuple):
    """The statistics of the population, as far as they are known; those of batch norm."""

    mean: jax.Array  # f32[C]; complex for complex inputs
    var: jax.Array  # f32[C]
    # f32[]: steps (samples for a horizon) averaged so far; None if the average needs no count
    count: jax.Array | None = None  # type: ignore[assignment]  # hides tuple.count


class _Plan(NamedTuple):
    """How a batch is cut into groups; static."""

    rows: int  # the axis that is cut in two; a new one where the batch lies along an `axis_name` alone
    is_new: bool
    pieces: int  # size of the first of the two axes
    groups: int  # how many this device holds
    axis: tuple[int, ...]  # features of the cut batch: the groups, and the features of the batch
    position: int  # of the groups among these
    joined: int  # how many devices make up a group
    axis_name: _collectives.AxisName | None  # of these devices; None: a group is on one


class _Measured(NamedTuple):
    """Moments of the groups of this device, to normalize with, and of the whole batch, for the running averages."""

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count
    mean: jax.Array
    m2: jax.Array
    whole: _moments.Moments | None  # [C]; None where training keeps no averages

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
) -> NormTransform:
    r"""Ghost batch norm as pure functions: batch norm in groups of `ghost_size` samples, whatever the batch.

    Use it where the batch of the optimizer is large (thousands): the noise of the statistics of small groups
    regularizes. Use it too to keep the statistics of a recipe while the batch or the number of devices changes: a group
    has `ghost_size` samples whatever the devices, which hold several groups each, or several of which make up one.

    Groups that fit on a device are normalized there, with no communication; the running averages, which are the same
    everywhere, cost one collective (none with `momentum=None`). Evaluation is that of batch norm.

    Args:
        ghost_size: Samples (rows) in a group, over all devices. It must divide the batch; a batch of fewer is one
            group.
        grouping: `"contiguous"`: neighbouring samples make a group. `"strided"`: sample i is in group i mod G, as in
            TensorFlow's `virtual_batch_size`; groups then extend over all devices. It matters where samples are sorted.
        running: What the running variance averages, in one step per training step: `"group_mean"`, the mean of the
            variances of the groups, with which training normalizes; or `"pooled"`, the variance of the whole batch,
            which is larger by that of the groups' means, about :math:`\sigma^2 / n` for n values in a group.
        momentum: Weight of the OLD running value, per training step and not per group; as in `batch_norm`.
        epsilon: Added to the variance; not negative.
        axis: Feature axis of `x`, or several. The samples are along the first of the other axes.
        dtype: Of the output. None: what x, scale, bias and residual promote to.
        use_bias: Learn the bias :math:`\beta`.
        use_scale: Learn the scale :math:`\gamma`.
        axis_name: Axis or axes of the surrounding `shard_map`, `pmap` or `vmap` over which a batch is spread; used in
            training alone. Under `jit` on sharded arrays nothing needs to be named.
        axis_index_groups: Must be None, as groups are what `ghost_size` makes.
        use_fast_variance: True sums about a shift and reads x once, False centres first and reads it twice.
        activation: Applied to the result, after the residual; as in `batch_norm`.
        allow_single_value: Accept groups of one value per channel in training.
        autodiff: Use JAX's own derivative instead of the hand-written one.

    Returns:
        A `NormTransform` with state `GhostBatchNormState` and params `NormParams`.

    Raises:
        ValueError: Here for hyper-parameters outside their range; in `train`, while tracing, for a batch that
            `ghost_size` does not divide, groups that devices would hold in part, or input that does not fit.
        TypeError: Here for a momentum, activation or `ghost_size` of the wrong kind.

    Example:
        >>> ghost = jaxbn.ghost_batch_norm(ghost_size=2)
        >>> params, state = ghost.init(1)
        >>> y, state = ghost.train(params, state, jnp.array([[1.0], [3.0], [11.0], [13.0]]))
        >>> y.round(2).ravel()
        Array([-1.,  1., -1.,  1.], dtype=float32)

    References:
        Hoffer, Hubara & Soudry, `Train longer, generalize better <https://arxiv.org/abs/1705.08741>`_, 2017,
        Algorithm 1; Summers & Dinneen, `Four Things Everyone Should Know to Improve Batch Normalization
        <https://arxiv.org/abs/1906.03548>`_, 2020. Differs: the running averages move once per step by the mean over
        the groups, as in TensorFlow, where the paper's move once for each group in turn, so that a momentum means the
        same for any number of groups. A masked group weighs by what is valid in it.

        A pass normalizes with the statistics of its whole batch: give `postproc` batches of `ghost_size`.
    """
    average = _averages.as_averaging(momentum)
    ghost_size = _check(ghost_size, grouping, running, axis_index_groups)
    axis_name = _collectives.static(axis_name)
    base = batch_norm(
        momentum=average, epsilon=epsilon, axis=axis, dtype=dtype, use_bias=use_bias, use_scale=use_scale,
        axis_name=axis_name, use_fast_variance=use_fast_variance, activation=activation,
    )  # fmt: skip
    spec = _operands.Spec(_axes.static(axis), epsilon, activation, dtype)
    # The factor of an unbiased variance is one of the groups: unless they are pooled, it is in the moments already.
    of_groups = average is not None and average.unbiased and running == "group_mean"
    moving = dataclasses.replace(average, unbiased=False) if average is not None and of_groups else average

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
        # Algorithm 1: batch norm, for each group.
        y, measured = _normalize.batch_normalize(
            spec._replace(
                axis=plan.axis,
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
        if moving is None:
            return y, state
        return y, move_averages(moving, state, measured.whole, count_samples(measured.whole, x.shape, axis))

    def measure(plan: _Plan, x: jax.Array, *, mask: jax.Array | None) -> _Measured:
        options: Any = {"axis": plan.axis, "mask": mask, "use_fast_variance": use_fast_variance}
        if plan.axis_name is None:
            own = _moments.batch_moments(x, **options)
            groups = None if moving is None else _moments.gather(_groups_first(own, plan), axis_name)
        else:
            joined = _moments.neighbour_moments(x, **options, axis_name=plan.axis_name, size=plan.joined)
            own = _collectives.own_of_neighbours(joined, plan.axis_name, plan.joined)
            groups = jax.tree.map(jnp.concatenate, jax.vmap(functools.partial(_groups_first, plan=plan))(joined))
        return _Measured(*own, None if groups is None else whole(groups))

    def whole(groups: _moments.Moments) -> _moments.Moments:
        """What the running averages are given, of the moments [G, C] of all groups."""
        union = _moments.pool(groups)
        if running == "pooled":
            return union
        within = groups.m2 * _moments.bessel(groups.count) if of_groups else groups.m2
        return union._replace(m2=within.sum(0))

    return on_meshes(base._replace(init=init, train=train), axis)


def _check(ghost_size: int, grouping: str, running: str, axis_index_groups: None) -> int:
    """The size of a group; an error for hyper-parameters that this method cannot have."""
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
        raise ValueError("axis_index_groups has no place here: ghost_size says how many devices share statistics.")
    return size


def _plan(
    shape: Sequence[int],
    axis: _axes.Axis,
    ghost_size: int,
    grouping: str,
    axis_name: _collectives.AxisName | None,
    allow_single_value: bool,
) -> _Plan:
    """How a batch of this shape on each of the devices is cut; a ValueError if it cannot be."""
    axes, devices = _axes.split(len(shape), axis), _collectives.group_size(axis_name, None)
    is_new = not axes.reduced
    rows, here = (0, 1) if is_new else (axes.rows, shape[axes.rows])
    size = min(ghost_size, here * devices)
    space = math.prod(shape[a] for a in axes.reduced[1:])
    _axes.check_training_batch(shape, axis, size * space, allow_single_value)
    if here * devices % size:
        raise ValueError(
            f"A batch of {here * devices} samples does not divide into groups of ghost_size={ghost_size}. Change one "
            f"of the two, or leave the rest of the batch out."
        )
    if grouping == "strided":
        groups = here * devices // size
        fits, pieces, joined, group_axis = here % groups == 0, here // groups, devices, rows + 1
    else:
        groups = pieces = max(here // size, 1)
        fits, joined, group_axis = here % size == 0 or size % here == 0, max(size // here, 1), rows
    if not fits:
        raise ValueError(
            f"{grouping} groups of ghost_size={ghost_size} do not fit on {devices} devices with {here} samples each: a "
            f"device must hold whole groups, or an equal part of each group that it shares with others."
        )
    features = tuple(a + is_new for a in axes.features)
    cut = (*(a for a in features if a < group_axis), group_axis, *(a + 1 for a in features if a >= group_axis))
    over = axis_name if joined > 1 else None
    return _Plan(rows, is_new, pieces, groups, cut, cut.index(group_axis), joined, over)


def _cut(
    plan: _Plan, operands: _operands.Operands, state: GhostBatchNormState
) -> tuple[_operands.Operands, tuple[jax.Array, jax.Array]]:
    """The operands, and mean and variance, with an axis more, of the groups."""

    def cut(a: jax.Array) -> jax.Array:
        return _collectives.cut(a[None] if plan.is_new else a, plan.rows, plan.pieces)

    def for_groups(stat: jax.Array) -> jax.Array:
        # Not in half precision, in which the gradients of the groups could not be added up.
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
