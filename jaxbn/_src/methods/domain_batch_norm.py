r"""Domain batch normalization: each example is normalized with the statistics of its own domain.

.. math:: y_i = \gamma_k \frac{x_i - \mu_k}{\sqrt{\sigma_k^2 + \epsilon}} + \beta_k, \qquad k = \text{domain of } i

Training uses the mean and variance of the values of domain k in the batch, evaluation the population statistics of
domain k. The result is that of batch normalization applied to the examples of each domain separately.

Chang et al., Domain-Specific Batch Normalization for Unsupervised Domain Adaptation, 2019, equations 3 to 6.
"""

import functools
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jaxbn._src.methods.batch_norm import BatchNormState, batch_norm, count_samples
from jaxbn._src.methods.protocol import NormParams, NormTransform, on_meshes
from jaxbn._src.numerics import averages as _averages
from jaxbn._src.numerics import axes as _axes
from jaxbn._src.numerics import collectives as _collectives
from jaxbn._src.numerics import dtypes as _dtypes
from jaxbn._src.numerics import explicit_meshes as _explicit_meshes
from jaxbn._src.numerics import moments as _moments
from jaxbn._src.numerics import normalize as _normalize
from jaxbn._src.numerics import operands as _operands
from jaxbn._src.numerics import segments as _segments


class DomainBatchNormState(NamedTuple):
    """The population statistics of each domain, as far as they are known."""

    mean: jax.Array  # f32[D, C]; complex for complex inputs
    var: jax.Array  # f32[D, C], biased
    # f32[D]: steps (samples for a horizon) with values of the domain so far; None if the average needs no count
    count: jax.Array | None = None  # type: ignore[assignment]  # hides tuple.count


class _TrainFn(Protocol):
    """A `TrainFn` that takes the domain of each example, integers `[N]`."""

    def __call__(
        self,
        params: NormParams,
        state: DomainBatchNormState,
        x: ArrayLike,
        *,
        domain: ArrayLike | None = None,  # required; it has a default so that this is a TrainFn
        mask: ArrayLike | None = None,
        residual: ArrayLike | None = None,
    ) -> tuple[jax.Array, DomainBatchNormState]: ...


class _EvalFn(Protocol):
    """An `EvalFn` that takes the domain of each example."""

    def __call__(
        self,
        params: NormParams,
        state: DomainBatchNormState,
        x: ArrayLike,
        *,
        domain: ArrayLike | None = None,
        mask: ArrayLike | None = None,
        residual: ArrayLike | None = None,
    ) -> jax.Array: ...


class _MeasureFn(Protocol):
    """A `MeasureFn` that takes the domain of each example; its moments are `[D, C]`."""

    def __call__(
        self, x: ArrayLike, *, domain: ArrayLike | None = None, mask: ArrayLike | None = None
    ) -> _moments.Moments: ...


class DomainNormTransform(NormTransform[NormParams, DomainBatchNormState]):
    """A `NormTransform` whose `train`, `eval` and `measure` take `domain=`."""

    if TYPE_CHECKING:  # the fields are those of NormTransform; type checkers see their types here

        @property
        def train(self) -> _TrainFn: ...
        @property
        def eval(self) -> _EvalFn: ...
        @property
        def measure(self) -> _MeasureFn: ...


def domain_batch_norm(
    *,
    num_domains: int,
    share_affine: bool = False,
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
) -> DomainNormTransform:
    r"""Batch normalization with separate statistics for each domain, as pure functions; batches may mix domains.

    Use it if one network sees inputs from several distributions. Pass the domain of each example,
    `train(params, state, x, domain=ids)`, as integers `[N]`, traced or not:

    - Domain-specific batch norm (Chang 2019): id 0 for the source, 1 for the target; `share_affine=False`.
    - AdvProp's auxiliary batch norm (Xie 2020): id 0 for clean examples, 1 for adversarial ones; evaluate with 0.
    - Split batch norm: id 0 for weakly augmented examples, other ids for the rest; evaluate with 0.
      `jnp.arange(N) * D // N` splits a batch into equal parts, as timm does.
    - Detection heads shared by the levels of a pyramid: the id is the level, with `share_affine=True`. Published AP of
      RetinaNet on COCO: 39.1, the same as with separate heads; 34.1 if the levels share population statistics, and 2.1
      if they share the statistics in training only (Wu & Johnson 2021, table 5).

    A domain without examples in a batch keeps its state. As in batch norm, statistics of few examples are noisy; a
    domain with one value per channel in a batch has variance 0, and tracing cannot detect that. The sums over space
    are computed first, so that for images the cost of a step hardly depends on D; for inputs without space a step
    computes D sums of the whole input.

    Args:
        num_domains: Number of domains, D.
        share_affine: Learn one scale and bias for all domains, `[C]`, instead of one for each, `[D, C]`.
        momentum: Weight of the OLD running value, in [0, 1); PyTorch's momentum is one minus this. None: training
            keeps no running averages. Or an average made by `constant`, `scheduled`, `cumulative` or `horizon`, which
            counts the steps of each domain separately.
        epsilon: Added to the variance; not negative.
        axis: Feature axis of `x`, or several; not the leading axis, which holds the examples.
        dtype: Of the output. None: what x, scale, bias and residual promote to.
        use_bias: Learn the bias :math:`\beta`.
        use_scale: Learn the scale :math:`\gamma`.
        axis_name: Axis or axes of the surrounding `shard_map`, `pmap` or `vmap` over which a batch is spread; used in
            training only. Domains may be spread unevenly, and a device may lack some.
        axis_index_groups: Groups of devices along `axis_name`, of equal size, that share statistics.
        use_fast_variance: Accepted, as by `batch_norm`; the mean of a domain is always subtracted first.
        activation: Applied to the result, after the residual; as in `batch_norm`.
        allow_single_value: Accept one value per channel in the whole batch in training; an error otherwise.
        autodiff: Use JAX's own derivative instead of the hand-written one.

    Returns:
        A `NormTransform` with state `DomainBatchNormState` and params `NormParams`. `train`, `eval` and `measure` take
        `domain=`; moments are `[D, C]`. An example whose id is outside [0, D) enters no statistics, and its output is
        NaN.

    Raises:
        ValueError: For hyper-parameters outside their range. While tracing, in `train`, `eval` or `measure`: for
            domains that are missing or not `[N]`, and for input that does not fit, as in `batch_norm`.
        TypeError: For domains that are not integers; otherwise as in `batch_norm`.

    Example:
        >>> bn = jaxbn.domain_batch_norm(num_domains=2, momentum=0.0)
        >>> params, state = bn.init(1)
        >>> x = jnp.array([[1.0], [10.0], [3.0], [30.0]])
        >>> y, state = bn.train(params, state, x, domain=jnp.array([0, 1, 0, 1]))
        >>> y.round(2).ravel()
        Array([-1., -1.,  1.,  1.], dtype=float32)
        >>> state.mean.ravel()
        Array([ 2., 20.], dtype=float32)

    References:
        Chang et al., `Domain-Specific Batch Normalization <https://arxiv.org/abs/1906.03950>`_, 2019, equations 3 to 6;
        Xie et al., `Adversarial Examples Improve Image Recognition <https://arxiv.org/abs/1911.09665>`_, 2020; Wu &
        Johnson, `Rethinking "Batch" in BatchNorm <https://arxiv.org/abs/2105.07576>`_, 2021. One deviation: each
        example has its own domain, where these papers use one domain for a whole batch.
    """
    num_domains = _check_num_domains(num_domains)
    base: NormTransform[NormParams, Any] = batch_norm(  # its `postproc` serves this state as well
        momentum=momentum, epsilon=epsilon, axis=axis, dtype=dtype, use_bias=use_bias, use_scale=use_scale,
        axis_name=axis_name, axis_index_groups=axis_index_groups, use_fast_variance=use_fast_variance,
        activation=activation, allow_single_value=allow_single_value, autodiff=autodiff,
    )  # fmt: skip
    params_axis = None if share_affine else 0  # axis of the params that holds the domains
    axis_name = _collectives.static(axis_name)
    groups = _collectives.check_groups(axis_name, axis_index_groups)
    spec = _operands.Spec(_axes.static(axis), epsilon, activation, dtype, axis_name, groups)
    here = functools.partial(_segments.domain_moments, axis=axis)
    everywhere = functools.partial(here, axis_name=axis_name, axis_index_groups=groups)

    def init(
        feature_shape: int | Sequence[int], *, dtype: DTypeLike = jnp.float32
    ) -> tuple[NormParams, DomainBatchNormState]:
        params, state = base.init(feature_shape, dtype=dtype)
        copies = _copies(num_domains, state)
        return params if share_affine else _copies(num_domains, params), DomainBatchNormState(*copies)

    def train(
        params: NormParams,
        state: DomainBatchNormState,
        x: ArrayLike,
        *,
        domain: ArrayLike | None = None,
        mask: ArrayLike | None = None,
        residual: ArrayLike | None = None,
    ) -> tuple[jax.Array, DomainBatchNormState]:
        _check_state(state, num_domains)
        scale, bias = (for_domains(p) for p in params)
        # The features are those of a single domain, [C].
        operands = _operands.of_call(spec, scale, bias, state.mean[0], x, mask, residual)
        x = operands.x
        members = _members(x, domain, num_domains, axis)
        values = _axes.values_per_channel(x.shape, axis) * _collectives.group_size(axis_name, groups)
        _axes.check_training_batch(x.shape, axis, values, allow_single_value)
        # Equations 3 to 6: mean and variance of each domain, over all devices; x_hat and y, with those of its domain.
        operands = operands._replace(members=members)
        y, moments = _normalize.batch_normalize(spec, everywhere, operands, state.mean, state.var, autodiff=autodiff)
        # An id outside [0, D) selects zeros as statistics and scale, and must not look like a valid output.
        y = jnp.where(members.any(1).reshape(-1, *(1,) * (x.ndim - 1)), y, jnp.nan)
        if base.update is None:
            return y, state
        return y, update(state, moments, jax.vmap(lambda one: count_samples(one, x.shape, axis))(moments))

    def for_domains(param: jax.Array | None) -> jax.Array | None:
        return jnp.broadcast_to(param, (num_domains, *param.shape)) if share_affine and param is not None else param

    def evaluate(
        params: NormParams,
        state: DomainBatchNormState,
        x: ArrayLike,
        *,
        domain: ArrayLike | None = None,
        mask: ArrayLike | None = None,
        residual: ArrayLike | None = None,
    ) -> jax.Array:
        del mask  # a mask concerns training only, as in Flax
        x = jnp.asarray(x)
        _check_state(state, num_domains)
        ids = _check_domain(x, domain, num_domains, axis)
        _check_residual(x, residual)

        # Each example is evaluated as a batch of one, because `base.eval` takes the statistics of one domain.
        def normalize_one(
            params: NormParams, state: DomainBatchNormState, x: jax.Array, residual: jax.Array | None
        ) -> jax.Array:
            residual = None if residual is None else residual[None]
            return base.eval(params, BatchNormState(*state), x[None], residual=residual)[0]

        def gather(tree: Any) -> Any:  # the leaves of each example's domain; NaN for an id that is none
            return jax.tree.map(lambda leaf: _explicit_meshes.rows(leaf, ids, x), tree)

        params = params if share_affine else gather(params)
        residual = None if residual is None else _explicit_meshes.on_values(jnp.asarray(residual), x)
        return jax.vmap(normalize_one, in_axes=(params_axis, 0, 0, 0))(params, gather(state), x, residual)

    def measure(x: ArrayLike, *, domain: ArrayLike | None = None, mask: ArrayLike | None = None) -> _moments.Moments:
        x = jnp.asarray(x)
        return here(x, members=_members(x, domain, num_domains, axis), mask=mask)

    def update(
        state: DomainBatchNormState, moments: _moments.Moments, samples: ArrayLike | None = None
    ) -> DomainBatchNormState:
        assert base.update is not None
        samples = None if samples is None else jnp.broadcast_to(jnp.asarray(samples), (num_domains,))
        return DomainBatchNormState(*jax.vmap(base.update)(BatchNormState(*state), moments, samples))

    updating = None if base.update is None else update
    made = base._replace(init=init, train=train, eval=evaluate, measure=measure, update=updating)
    return DomainNormTransform(*on_meshes(made, axis))


def _copies(num_domains: int, tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (num_domains, *leaf.shape)), tree)


def _members(x: jax.Array, domain: ArrayLike | None, num_domains: int, axis: _axes.Axis) -> jax.Array:
    """Finds the examples of each domain, bool[N, D]."""
    ids = _check_domain(x, domain, num_domains, axis)
    return ids[:, None] == jnp.arange(num_domains, dtype=ids.dtype)[None]


def _check_domain(x: jax.Array, domain: ArrayLike | None, num_domains: int, axis: _axes.Axis) -> jax.Array:
    """Checks the ids and returns them as i32[N], with num_domains in the place of ids outside [0, D)."""
    if domain is None:
        raise ValueError("domain_batch_norm needs domain=, the ids of the examples, integers [N] from 0 to D - 1.")
    ids = jnp.asarray(domain)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"domain= must hold integers, one id for each example, but it is {ids.dtype}.")
    if x.ndim < 2 or 0 in _axes.split(x.ndim, axis).features:
        raise ValueError(f"The leading axis of the input {x.shape} must hold examples; axis={axis} must not name it.")
    if ids.shape != x.shape[:1]:
        raise ValueError(
            f"domain= of shape {ids.shape} must be one id for each example of the input {x.shape}: {x.shape[:1]}. For "
            f"a batch of one domain pass jnp.full({x.shape[:1]}, domain)."
        )
    # num_domains may not fit into a short integer. `explicit_meshes.rows` returns NaN for it, whereas a negative id
    # would count from the end.
    ids = ids.astype(_dtypes.promote(ids.dtype, jnp.int32))
    return _explicit_meshes.on_values(
        jnp.where((ids >= 0) & (ids < num_domains), ids, num_domains).astype(jnp.int32), x
    )


def _check_state(state: DomainBatchNormState, num_domains: int) -> None:
    if state.mean.shape[:1] != (num_domains,):
        raise ValueError(
            f"The statistics {state.mean.shape} must have a row for each of num_domains={num_domains} domains."
        )


def _check_residual(x: jax.Array, residual: ArrayLike | None) -> None:
    if residual is not None and jnp.shape(residual) != x.shape:
        raise ValueError(f"residual {jnp.shape(residual)} must have the shape of the input, {x.shape}.")


def _check_num_domains(num_domains: int) -> int:
    number = operator.index(num_domains)
    if number < 1:
        raise ValueError(f"num_domains={number} must be positive: it is the number of domains.")
    return number
