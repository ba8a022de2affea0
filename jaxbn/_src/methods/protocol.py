"""The protocol of a normalization method: pure functions in a tuple. Read from top to bottom, then write your own.

A method is a factory that checks its hyper-parameters once and returns a `NormTransform`. State goes in and comes out:
nothing is kept, nothing is mutated, and train, postproc and eval compile to three programs. The Flax layers only carry
the variables of a transform; they compute nothing themselves.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxbn._src.numerics import axes as _axes
from jaxbn._src.numerics import explicit_meshes as _explicit_meshes
from jaxbn._src.numerics.moments import Moments

State = Any  # a NamedTuple of float32 arrays in the shape of the features, counters float32 []


class NormParams(NamedTuple):
    """The learned affine map of a normalization; either may be None."""

    scale: jax.Array | None  # f32[C]
    bias: jax.Array | None  # f32[C]


class NormTransform(NamedTuple):
    """What a normalization layer does, as pure functions. All of them may be jitted, vmapped and scanned.

    Shapes: x and residual `[..., C]`, mask broadcastable to x, params and state `[C]`. Structure and dtypes of the
    state that goes in come out, and its sharding on Explicit meshes, for which a factory ends in `on_meshes`. No
    gradient flows through the state: `eval` stops it by `core.normalize.as_constants`, or by the `eval` of another
    method, and not by `lax.stop_gradient`, as capture and adapt differentiate through the statistics of an input with
    which `eval` is to normalize it. What is not finite in the dtype of the state does not enter it. Every state has
    `mean` and `var`: what a pass installs, a report compares and `eval` normalizes with.
    """

    # (feature_shape: int | tuple[int, ...], *, dtype=float32) -> (params, state)
    init: Callable[..., tuple[NormParams, State]]
    # (params, state, x, *, mask=None, residual=None, **where) -> (y, state): normalize with the batch, move the
    # averages. `where` is domain= for domain_batch_norm and nothing else, here and below.
    train: Callable[..., tuple[jax.Array, State]]
    # (params, state, x, *, mask=None, residual=None, **where) -> y: normalize with the stored statistics
    eval: Callable[..., jax.Array]
    # (x, *, mask=None, **where) -> Moments of x, not reduced over a named axis: what a statistics pass accumulates
    measure: Callable[..., Moments]
    # (state, moments) -> state: install the moments of the population
    postproc: Callable[[State, Moments], State]
    # (state, moments, samples=None) -> state: update the averages once, by moments that a loop has put together; None:
    # training keeps none
    update: Callable[..., State] | None = None
    # (params, state, grads) -> state: learn from the gradient of the params; None: the method does not. It may take
    # loss_scale=, that of the next step.
    backward: Callable[..., State] | None = None


def on_meshes(transform: NormTransform, axis: _axes.Axis) -> NormTransform:
    """The transform for params and statistics that lie on an Explicit mesh in another way than the channels of x.

    What comes from x decides: params and state go to the devices that have the channels, and each leaf of the new state
    goes back to where it came from. Gradients follow by themselves. Where no mesh is Explicit nothing is added.
    """

    def there(tree: Any, x: ArrayLike) -> Any:
        x = jnp.asarray(x)
        return _explicit_meshes.on_channels(tree, x, _axes.split(x.ndim, axis).features)

    @functools.wraps(transform.train)
    def train(params: NormParams, state: State, x: ArrayLike, **given: Any) -> tuple[jax.Array, State]:
        y, after = transform.train(*there((params, state), x), x, **given)
        return y, _explicit_meshes.as_before(after, state)

    @functools.wraps(transform.eval)
    def evaluate(params: NormParams, state: State, x: ArrayLike, **given: Any) -> jax.Array:
        return transform.eval(*there((params, state), x), x, **given)

    @functools.wraps(transform.postproc)
    def postproc(state: State, moments: Moments) -> State:
        return _explicit_meshes.as_before(transform.postproc(_beside(state, moments), moments), state)

    def update(state: State, moments: Moments, samples: ArrayLike | None = None) -> State:
        assert transform.update is not None
        return _explicit_meshes.as_before(transform.update(_beside(state, moments), moments, samples), state)

    updating = None if transform.update is None else update
    return transform._replace(train=train, eval=evaluate, postproc=postproc, update=updating)


def _beside(state: State, moments: Moments) -> State:
    return _explicit_meshes.on_channels(state, moments.m2, range(moments.m2.ndim))
