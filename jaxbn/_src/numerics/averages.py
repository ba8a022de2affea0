"""Moving averages of the batch statistics: decay, initial values and debiasing.

Every average is updated as `value <- decay * value + (1 - decay) * new`; they differ only in the decay. A debiased
average stores the debiased value: dividing a zero-initialized average by 1 - a^t is the same as updating with

    decay_t = a (1 - a^(t-1)) / (1 - a^t),      decay_1 = 0

so the stored value can be used at any step, and the initial value does not matter.
"""

import abc
import dataclasses
import warnings
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxbn._src import internals as _internals
from jaxbn._src.numerics import dtypes as _dtypes

# The initial running statistics, as in Flax: a layer that was never trained is the identity.
INITIAL_MEAN = 0.0
INITIAL_VAR = 1.0

# A number of steps after which no average is debiased any more, and which can still be incremented.
LONG = 2**30


@dataclasses.dataclass(frozen=True)
class Averaging(abc.ABC):
    """How a running statistic is updated; create one with `constant`, `scheduled`, `cumulative` or `horizon`.

    `count`, float32 `[]`, is the number of training steps so far, or the number of samples for `horizon`.
    """

    unbiased: bool = dataclasses.field(default=False, kw_only=True)  # average the unbiased variance, n / (n - 1)
    counts: ClassVar[bool] = True  # whether the state holds a count
    counts_samples: ClassVar[bool] = False  # whether the count is in samples

    @abc.abstractmethod
    def decay(self, count: jax.Array, samples: jax.Array) -> jax.Array:
        """Weight of the old value for a batch of `samples` that follows `count`, in the dtype of the arguments."""

    def advance(self, count: jax.Array, samples: jax.Array) -> jax.Array:
        """The count after this batch. Float32 saturates at 2^24 steps; a schedule then keeps its value."""
        del samples
        return count + 1


@dataclasses.dataclass(frozen=True)
class _Constant(Averaging):
    momentum: ArrayLike
    counts: ClassVar[bool] = False

    def decay(self, count: jax.Array, samples: jax.Array) -> jax.Array:
        if isinstance(self.momentum, jax.Array):
            return self.momentum.astype(count.dtype)
        # A NumPy scalar adds no operation to the program, and has the methods of an array.
        number: jax.Array = count.dtype.type(self.momentum)
        return number


@dataclasses.dataclass(frozen=True)
class _Debiased(Averaging):
    momentum: ArrayLike

    def decay(self, count: jax.Array, samples: jax.Array) -> jax.Array:
        a = jnp.asarray(self.momentum, count.dtype)
        # 1 - a^t = -expm1(t log a) keeps its digits for a near 1; a = 0 gives log a = -inf, and decay 0.
        log_a = jnp.log(a)
        # The inner `where` avoids 0 * -inf = NaN at step 0.
        before = jnp.where(count > 0, -jnp.expm1(count * jnp.where(count > 0, log_a, 0)), 0)
        return a * before / -jnp.expm1((count + 1) * log_a)


@dataclasses.dataclass(frozen=True)
class _Scheduled(Averaging):
    schedule: Callable[[jax.Array], ArrayLike]

    def decay(self, count: jax.Array, samples: jax.Array) -> jax.Array:
        return jnp.asarray(self.schedule(count), count.dtype)


@dataclasses.dataclass(frozen=True)
class _Cumulative(Averaging):
    def decay(self, count: jax.Array, samples: jax.Array) -> jax.Array:
        return count / (count + 1)


@dataclasses.dataclass(frozen=True)
class _Horizon(Averaging):
    samples: float
    counts_samples: ClassVar[bool] = True

    def decay(self, count: jax.Array, samples: jax.Array) -> jax.Array:
        # A debiased average in which a sample of age h (in samples) has weight exp(-h / samples).
        kept = jnp.exp(-samples / self.samples)
        seen = -jnp.expm1(-count / self.samples)
        return kept * seen / -jnp.expm1(-(count + samples) / self.samples)

    def advance(self, count: jax.Array, samples: jax.Array) -> jax.Array:
        return count + samples


def constant(momentum: ArrayLike = 0.99, *, debias: bool = False, unbiased: bool = False) -> Averaging:
    """Exponential moving average; `batch_norm(momentum=0.9)` is short for `batch_norm(momentum=constant(0.9))`.

    Args:
        momentum: Weight of the OLD value, in [0, 1). PyTorch's momentum is one minus this. The average is float32: it
            stops changing when an update is below half a float32 step, up to 6e-8 |mean| / (1 - momentum) from the
            true mean. With momentum 0.999 and a mean of 1e5 standard deviations that is 6 standard deviations;
            `diagnose` reports it, and a statistics pass (`postproc`) is exact.
        debias: Remove the initial values 0 and 1 exactly, from the first step on; adds a `count` to the state. There
            is one count for all channels, so a channel that a step skips (fully masked or not finite) keeps a share
            of its initial value. The same holds for `cumulative` and `horizon`.
        unbiased: Average the unbiased variance, n / (n - 1) times that of a batch with n values per channel, as PyTorch
            does: its `momentum=0.1` is `constant(0.9, unbiased=True)`.

    Returns:
        An `Averaging`.

    Raises:
        ValueError: If `momentum` is outside [0, 1).
        TypeError: If `momentum` is not a real number.

    Example:
        >>> bn = jaxbn.batch_norm(momentum=jaxbn.constant(0.99, debias=True))
        >>> params, state = bn.init(1)
        >>> _, state = bn.train(params, state, jnp.array([[1.0], [3.0]]))
        >>> float(state.mean[0]), float(state.var[0])
        (2.0, 1.0)
    """
    _check_momentum(momentum, stacklevel=3)
    return _Debiased(momentum, unbiased=unbiased) if debias else _Constant(momentum, unbiased=unbiased)


def scheduled(schedule: Callable[[jax.Array], ArrayLike], *, unbiased: bool = False) -> Averaging:
    """Moving average with a decay that depends on the step; adds a `count` to the state.

    Args:
        schedule: Maps the number of steps so far, float32 `[]`, to the weight of the old value in [0, 1). Any optax
            schedule works. Return 0 at step 0 to drop the initial values.
        unbiased: Average the unbiased variance; see `constant`.

    Returns:
        An `Averaging`.

    Raises:
        TypeError: If `schedule` cannot be called.

    Example:
        >>> warm_up = jaxbn.scheduled(lambda step: jnp.minimum(step / (step + 1), 0.99))
        >>> jaxbn.batch_norm(momentum=warm_up).init(4)[1].count
        Array(0., dtype=float32)
    """
    if not callable(schedule):
        raise TypeError(f"scheduled() takes a function of the step; given: {schedule!r}. For a number use constant().")
    return _Scheduled(schedule, unbiased=unbiased)


def cumulative(*, unbiased: bool = False) -> Averaging:
    """Plain average of all steps with equal weight, as PyTorch's `momentum=None`.

    The count is float32, as are all counters in a state, and saturates at 2^24 steps; the average stops changing there,
    or earlier if means are large (see `constant`). A statistics pass (`postproc`) has no such limit.

    Args:
        unbiased: Average the unbiased variance; see `constant`.

    Returns:
        An `Averaging`.

    Example:
        >>> bn = jaxbn.batch_norm(momentum=jaxbn.cumulative())
        >>> params, state = bn.init(1)
        >>> for v in (1.0, 2.0, 6.0):
        ...     _, state = bn.train(params, state, jnp.full((2, 1), v))
        >>> round(float(state.mean[0]), 5)
        3.0
    """
    return _Cumulative(unbiased=unbiased)


def horizon(samples: float, *, unbiased: bool = False) -> Averaging:
    """Debiased moving average that decays per sample instead of per step, so it does not depend on the batch size.

    A sample of age h (in samples) has weight exp(-h / samples), however the samples were batched and sharded.

    Args:
        samples: Examples (rows, over all devices) after which the weight has decayed to 1/e; positive. 64 / (1 - 0.99)
            = 6400 is about momentum 0.99 at batch size 64.
        unbiased: Average the unbiased variance; see `constant`.

    Returns:
        An `Averaging`.

    Raises:
        ValueError: If `samples` is not positive.

    Example:
        >>> bn = jaxbn.batch_norm(momentum=jaxbn.horizon(6400))
        >>> _, state = bn.train(*bn.init(1), jnp.array([[1.0], [3.0]]))
        >>> float(state.mean[0]), float(state.count)
        (2.0, 2.0)
    """
    if not samples > 0:
        raise ValueError(f"horizon() takes a positive number of samples; given: {samples}.")
    return _Horizon(float(samples), unbiased=unbiased)


def as_averaging(momentum: "ArrayLike | Averaging | None") -> Averaging | None:
    """Converts a `momentum=` argument: a number means `constant`, None means no running average."""
    if momentum is None or isinstance(momentum, Averaging):
        return momentum
    if callable(momentum):
        raise TypeError(f"momentum={momentum!r} is a function; write momentum=jaxbn.scheduled(...).")
    _check_momentum(momentum, stacklevel=4)
    return _Constant(momentum)


def _check_momentum(momentum: ArrayLike, stacklevel: int) -> None:
    """Raises outside [0, 1) and warns about values that look like PyTorch's. Traced numbers are not checked."""
    if _internals.is_tracer(momentum):
        return
    if isinstance(momentum, str) or np.ndim(momentum) or not np.isrealobj(momentum):
        raise TypeError(f"momentum={momentum!r} must be a number, None, or an average such as jaxbn.cumulative().")
    number = float(momentum)  # type: ignore[arg-type]  # a real scalar, checked above
    if not 0 <= number < 1:
        raise ValueError(
            f"momentum={number:g} is outside [0, 1): it is the weight of the OLD value, 0.99 by default. For training "
            f"without running averages pass momentum=None; for the plain average of all steps jaxbn.cumulative()."
        )
    # Such a number passes the check above, since it is below 1 in float64.
    if np.float32(number) == 1:
        raise ValueError(
            f"momentum={number!r} rounds to 1 in float32, and the averages would stay at their initial values. Give "
            f"0.9999999 or less, jaxbn.cumulative(), or momentum=None and postproc."
        )
    if 0 < number < 0.5:
        warnings.warn(
            f"momentum={number:g} is the weight of the OLD value. PyTorch's momentum is the weight of the new one: if "
            f"this number comes from PyTorch, pass {1 - number:g}.",
            stacklevel=stacklevel,
        )


def update(value: jax.Array, new: jax.Array, decay: jax.Array, where: jax.Array) -> jax.Array:
    """Updates the average where `where` is true. Keeps the dtype of `value`; no gradient flows."""
    dtype = _dtypes.promote(value.dtype, new.dtype)
    decay = decay.astype(dtype)
    updated = decay * value.astype(dtype) + (1 - decay) * new.astype(dtype)
    return jax.lax.stop_gradient(jnp.where(where, updated.astype(value.dtype), value))
