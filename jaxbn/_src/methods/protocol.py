"""The protocol of a normalization method: a tuple of pure functions. Read it from top to bottom, then write your own.

A method is a factory: it checks its hyper-parameters once and returns a `NormTransform`. The functions of a transform
take a state and return a new one. They are pure, and `train`, `postproc` and `eval` compile to three programs. The Flax
layers store the params and the state of a transform as variables, and contain no arithmetic.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jaxbn._src.methods.captured import capturable, without_capture
from jaxbn._src.numerics import axes as _axes
from jaxbn._src.numerics import collectives as _collectives
from jaxbn._src.numerics import explicit_meshes as _explicit_meshes
from jaxbn._src.numerics.moments import Moments


class NormParams(NamedTuple):
    """The learned affine map of a normalization; either may be None."""

    scale: jax.Array | None  # f32[C]
    bias: jax.Array | None  # f32[C]


class State(Protocol):
    """The state of a method: a NamedTuple of arrays that has a `mean` and a `var`, and may have more leaves.

    A statistics pass installs `mean` and `var`, reports compare them, and `eval` normalizes with them. Leaves are
    float32 arrays in the shape of the features, and counters are float32 `[]`, so that a state survives `pmean` and
    other averages. A leaf may be None: a layer then has no variable for it.
    """

    @property
    def mean(self) -> jax.Array:
        """The population mean, f32[C]; complex for complex inputs."""

    @property
    def var(self) -> jax.Array:
        """The population variance, f32[C]."""

    @property
    def _fields(self) -> tuple[str, ...]: ...
    def _asdict(self) -> dict[str, Any]: ...
    def _replace(self, *args: Any, **kwargs: Any) -> Any: ...


def is_state(node: Any) -> bool:
    """Whether this is a `State`: a NamedTuple that has a mean and a variance."""
    return isinstance(node, tuple) and {"mean", "var"} <= set(getattr(node, "_fields", ()))


def holds_states(tree: Any) -> bool:
    """Whether there is a state of a method in the tree."""
    return any(map(is_state, jax.tree.leaves(tree, is_leaf=is_state)))


# The params and the state of a method. A type checker wants to know of each function which of them it only takes
# (`In`) and which it only returns (`Out`).
ParamsT = TypeVar("ParamsT")
ParamsIn = TypeVar("ParamsIn", contravariant=True)
ParamsOut = TypeVar("ParamsOut", covariant=True)
StateT = TypeVar("StateT", bound=State)
StateIn = TypeVar("StateIn", bound=State, contravariant=True)
StateOut = TypeVar("StateOut", bound=State, covariant=True)


class InitFn(Protocol[ParamsOut, StateOut]):
    """Creates the params and the state."""

    def __call__(
        self, feature_shape: int | Sequence[int], *, dtype: DTypeLike = jnp.float32
    ) -> tuple[ParamsOut, StateOut]:
        """Creates the params and the state of one layer.

        Args:
            feature_shape: The number of features, or their shape if the feature axis is several axes.
            dtype: Of the params; the state has this dtype or float32, whichever is wider. Complex for complex inputs.

        Returns:
            Two NamedTuples of arrays.
        """


class TrainFn(Protocol[ParamsIn, StateT]):
    """Normalizes with the statistics of the batch and updates the running averages."""

    def __call__(
        self,
        params: ParamsIn,
        state: StateT,
        x: ArrayLike,
        *,
        mask: ArrayLike | None = None,
        residual: ArrayLike | None = None,
    ) -> tuple[jax.Array, StateT]:
        """Normalizes with the statistics of the batch and updates the running averages.

        Args:
            params: What `init` returned, or what an optimizer made of it.
            state: What `init` or the last step returned.
            x: The input, `[..., C]`.
            mask: Booleans or real weights, broadcastable to x, of the values that enter the statistics.
            residual: Added to the normalized input before the activation; in the shape of x.

        Returns:
            The output, in the shape of x, and the new state, with the structure and the dtypes of the old one.
        """


class EvalFn(Protocol[ParamsIn, StateIn]):
    """Normalizes with the statistics of the state."""

    def __call__(
        self,
        params: ParamsIn,
        state: StateIn,
        x: ArrayLike,
        *,
        mask: ArrayLike | None = None,
        residual: ArrayLike | None = None,
    ) -> jax.Array:
        """Normalizes with the statistics of the state.

        Args:
            params: As for `train`.
            state: As for `train`. No gradient flows to it.
            x: The input, `[..., C]`.
            mask: Ignored, so that training and evaluation may be called alike.
            residual: As for `train`.

        Returns:
            The output, in the shape of x.
        """


class MeasureFn(Protocol):
    """Computes the moments of an input, which a statistics pass accumulates."""

    def __call__(self, x: ArrayLike, *, mask: ArrayLike | None = None) -> Moments:
        """Computes the moments of an input on this device; they are not reduced over a named axis.

        Args:
            x: The input, `[..., C]`.
            mask: As for `train`.

        Returns:
            Moments in the shape of the state's mean and variance.
        """


class PostprocFn(Protocol[StateT]):
    """Installs population moments in a state."""

    def __call__(self, state: StateT, moments: Moments) -> StateT:
        """Installs population moments in a state.

        Args:
            state: The state of the layer.
            moments: What an estimator made of the moments that `measure` returned.

        Returns:
            The state with these statistics. A channel that no value reached keeps its old ones, and so does a channel
            whose moments are not finite in the dtype of the state.
        """


class UpdateFn(Protocol[StateT]):
    """Updates the running averages once, with moments that a loop over micro-batches has merged."""

    def __call__(self, state: StateT, moments: Moments, samples: ArrayLike | None = None) -> StateT:
        """Updates the running averages once.

        Args:
            state: The state of the layer.
            moments: The moments of all values that enter this step.
            samples: The number of examples behind the moments; only `jaxbn.horizon` needs it.

        Returns:
            The state after the step.
        """


class BackwardFn(Protocol[ParamsIn, StateT]):
    """Updates the state with the gradient of the params, for methods that keep statistics of the backward pass."""

    def __call__(self, params: ParamsIn, state: StateT, grads: ParamsIn, *, loss_scale: ArrayLike = 1.0) -> StateT:
        """Updates the state with the gradient of the params; call it once after each gradient.

        Args:
            params: The params at which the gradient was taken, before the step of the optimizer.
            state: What the training call returned.
            grads: The gradient of the loss with respect to the params, without the loss scale.
            loss_scale: The factor by which the loss of the next step will be multiplied.

        Returns:
            The new state.
        """


@dataclasses.dataclass(frozen=True, eq=False)  # compared by identity, as functions are; epsilon may be traced
class Settings:
    """The arguments of a method that a capture of its calls needs."""

    axis: _axes.Axis = -1
    epsilon: ArrayLike | None = None
    axis_name: _collectives.AxisName | None = None
    axis_index_groups: Any = None
    allow_single_value: bool = True


class _Functions(NamedTuple, Generic[ParamsT, StateT]):
    init: InitFn[ParamsT, StateT]
    train: TrainFn[ParamsT, StateT]
    eval: EvalFn[ParamsT, StateT]
    measure: MeasureFn
    postproc: PostprocFn[StateT]
    update: UpdateFn[StateT] | None = None
    backward: BackwardFn[ParamsT, StateT] | None = None
    settings: Settings = Settings()


class NormTransform(_Functions[ParamsT, StateT]):
    """A normalization method as pure functions; all of them may be jitted, vmapped and scanned.

    Attributes:
        init: `(feature_shape, *, dtype=float32) -> (params, state)`.
        train: `(params, state, x, *, mask=None, residual=None) -> (y, state)`: normalizes with the statistics of the
            batch, and updates the running averages.
        eval: `(params, state, x, *, mask=None, residual=None) -> y`: normalizes with the statistics of the state.
        measure: `(x, *, mask=None) -> moments`, which a statistics pass accumulates.
        postproc: `(state, moments) -> state`: installs population moments.
        update: `(state, moments, samples=None) -> state`: updates the running averages once. None: there are none.
        backward: `(params, state, grads, *, loss_scale=1.0) -> state`, for methods that keep statistics of gradients.
            None: the state does not depend on gradients.
        settings: What a capture of plain functions needs to know, such as the axes of the devices. `_replace` keeps
            it; pass that of another transform to a `NormTransform` that uses its `measure`.

    `train`, `eval` and `measure` of `domain_batch_norm` take `domain=` as well.

    Three rules hold for every method, and the contract tests check them:

    - The state that comes out has the structure, the dtypes and, on Explicit meshes, the sharding of the state that
      goes in. A factory ends in `on_meshes`, which sees to the sharding.
    - Values that are not finite in the dtype of the state do not enter it.
    - No gradient flows to the state. `eval` stops it with `normalize.as_constants`, or with the `eval` of another
      method. It does not use `lax.stop_gradient`: capture and adapt let `eval` normalize an input with its own
      statistics, and the gradient must flow through those.
    """

    __slots__ = ()

    if not TYPE_CHECKING:  # type checkers see the signature of the NamedTuple

        def __new__(cls, *functions: Any, **named: Any) -> "NormTransform":
            return capturable(super().__new__(cls, *functions, **named))

        @classmethod
        def _make(cls, functions: Any) -> "NormTransform":  # `_replace` calls it
            return cls(*functions)


def on_meshes(transform: NormTransform[ParamsT, StateT], axis: _axes.Axis) -> NormTransform[ParamsT, StateT]:
    """Makes a transform accept params and a state with any sharding on an Explicit mesh.

    Params and state are moved to the devices that hold the channels of x, and each leaf of the new state goes back to
    where the old one was. Gradients follow by themselves. Programs without an Explicit mesh stay as they are.

    Args:
        transform: Functions that need their operands on the same devices.
        axis: The feature axis of x, or several.

    Returns:
        The same functions for operands that lie anywhere.
    """
    transform = without_capture(transform)

    def as_channels_of(x: ArrayLike, tree: Any) -> Any:
        x = jnp.asarray(x)
        return _explicit_meshes.on_channels(tree, x, _axes.split(x.ndim, axis).features)

    def as_moments(moments: Moments, state: StateT) -> StateT:
        return _explicit_meshes.on_channels(state, moments.m2, range(moments.m2.ndim))

    # `wraps` keeps the signatures, in which the layers look up the operands that a method takes, such as domain=.
    @functools.wraps(transform.train)
    def train(params: ParamsT, state: StateT, x: ArrayLike, **operands: Any) -> tuple[jax.Array, StateT]:
        there_params, there_state = as_channels_of(x, (params, state))
        y, after = transform.train(there_params, there_state, x, **operands)
        return y, _explicit_meshes.as_before(after, state)

    @functools.wraps(transform.eval)
    def evaluate(params: ParamsT, state: StateT, x: ArrayLike, **operands: Any) -> jax.Array:
        there_params, there_state = as_channels_of(x, (params, state))
        return transform.eval(there_params, there_state, x, **operands)

    @functools.wraps(transform.postproc)
    def postproc(state: StateT, moments: Moments) -> StateT:
        return _explicit_meshes.as_before(transform.postproc(as_moments(moments, state), moments), state)

    def update(state: StateT, moments: Moments, samples: ArrayLike | None = None) -> StateT:
        assert transform.update is not None
        return _explicit_meshes.as_before(transform.update(as_moments(moments, state), moments, samples), state)

    # `init` and `measure` take neither params nor state. A `backward` must place its operands itself.
    updating = None if transform.update is None else update
    return transform._replace(train=train, eval=evaluate, postproc=postproc, update=updating)
