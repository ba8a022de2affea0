"""The training loop of an NNX model as pure functions: short enough to read and to copy."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.training import train_state

from jaxbn._src.framework.steps import Steps, arguments, check_synchronized, gradients
from jaxbn._src.inference.frozen import Frozen
from jaxbn._src.inference.pass_steps import pass_steps
from jaxbn._src.nnx.backward import update_backward
from jaxbn._src.nnx.capture import check_model, find_layers, is_frozen
from jaxbn._src.nnx.framework import NNX
from jaxbn._src.nnx.freeze import install_frozen
from jaxbn._src.nnx.registry import as_norm
from jaxbn._src.numerics.collectives import AxisName
from jaxbn._src.statistics.estimators import Estimator, check_estimator, pooled

if TYPE_CHECKING:
    import optax

# The variables that a step may change besides the parameters: statistics, random states and others.
_OTHERS = nnx.Not(nnx.Any(nnx.Param, nnx.Intermediate))


class TrainState(train_state.TrainState):
    """Flax's TrainState for an NNX model: one pytree to donate, replicate and save."""

    others: Any  # `nnx.State` of the variables that are not parameters; `params` is an `nnx.State` too


def make_steps(
    model: nnx.Module,
    loss_fn: Callable[[Any, Any], tuple[jax.Array, dict[str, jax.Array]]],
    optimizer: "optax.GradientTransformation",
    *,
    inputs: Callable[[Any], Any],
    estimator: Estimator = pooled(),  # noqa: B008  a constant: pure functions, made once
    axis_name: AxisName | None = None,
) -> Steps:
    """Makes the functions of a training loop: initialize, train, estimate the population statistics, evaluate.

    :func:`jaxbn.linen.make_steps` describes it in full. In NNX the model provides the initial values. It is not
    changed; copies are set to `train()` and `eval()`.

    Args:
        model: The model, with layers of jaxbn or Flax and with the initial values.
        loss_fn: `(outputs, batch) -> (loss, {name: metric})`: the mean loss over the rows of the batch, and scalars.
        optimizer: Any transformation of optax; it gets the `nnx.Param` variables of the model.
        inputs: `batch -> x`: the argument of the model, or a tuple of several.
        estimator: The estimator of the population statistics.
        axis_name: Axis of the `pmap` or `shard_map` around the steps, over which gradients and metrics are averaged and
            moments merged; layers with running averages need it too. None under `jit` on sharded arrays.

    Returns:
        `Steps`. The state is a `TrainState` of Flax with `others`. `init` reseeds the random streams of the model, such
        as dropout, with `rng`, and keeps them for None. `train_step` uses `rng` for all streams of that step and keeps
        those of the state; pass a different one on each device. For None it uses and advances those of the state.

    Raises:
        TypeError: If `eval_step` gets anything but a `Frozen`.
        ValueError: If the model has no normalization layer, or a layer would keep running averages of its own device
            only; in `finalize`, if the statistics were never estimated, or a batch gave NaN.

    Example:
        >>> model = nnx.Sequential(jaxbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0)), nnx.Linear(3, 1, rngs=nnx.Rngs(1)))
        >>> def loss_fn(outputs, batch):
        ...     return jnp.mean((outputs - batch["y"]) ** 2), {}
        >>> x = 5 + 2 * jax.random.normal(jax.random.key(0), (10, 32, 3))
        >>> batches = [{"x": rows, "y": rows.sum(1, keepdims=True)} for rows in x]
        >>> steps = jaxbn.nnx.make_steps(model, loss_fn, optax.sgd(0.01), inputs=lambda batch: batch["x"])
        >>> train_step = jax.jit(steps.train_step, donate_argnums=0)
        >>> state = steps.init(jax.random.key(0), batches[0])
        >>> for batch in batches:
        ...     state, metrics = train_step(state, batch)
        >>> acc = steps.start(state, batches[0])
        >>> for batch in batches:
        ...     acc = jax.jit(steps.postproc_step)(state, acc, batch)
        >>> frozen, report = steps.finalize(state, acc)
        >>> outputs = steps.eval_step(frozen, {"x": x[0, :1]})
        >>> frozen.info.layer("layers/0")
        LayerInfo(method='batch_norm', epsilon=1e-05, estimator='pooled', rows=320.0)
    """
    check_estimator(estimator)
    check_model(model)
    start_from = nnx.clone(model)
    # Values that an earlier call sowed are not part of the state.
    nnx.pop(start_from, nnx.Intermediate)
    training, evaluating = _mode_of(start_from, "train"), _mode_of(start_from, "eval")
    for path, layer in find_layers(model).items():
        if not is_frozen(layer):
            check_synchronized(path, as_norm(layer), axis_name)

    def init(rng: jax.Array | None, batch: Any) -> TrainState:
        del batch  # linen needs it for the shapes of the parameters
        copy = nnx.clone(start_from)
        _reseed(copy, rng)
        # Copies, because `train_step` may donate them, and the model of the user must stay valid.
        params, others = jax.tree.map(jnp.copy, (nnx.state(copy, nnx.Param), nnx.state(copy, _OTHERS)))
        state = TrainState.create(apply_fn=training.apply, params=params, tx=optimizer, others=others)
        # Flax starts with a Python number, but all leaves of the state are to be arrays.
        return state.replace(step=jnp.zeros((), jnp.int32))

    def train_step(state: TrainState, batch: Any, rng: jax.Array | None = None) -> tuple[TrainState, dict[str, Any]]:
        def loss_of(params: Any) -> tuple[jax.Array, Any]:
            net = nnx.merge(training, params, state.others, copy=True)  # new variables, which this trace may set
            _reseed(net, rng)
            loss, metrics = loss_fn(net(*arguments(inputs, batch)), batch)
            others = nnx.state(net, _OTHERS)
            if rng is not None:  # `rng` differs between devices, but the state must not
                others = nnx.merge_state(others, nnx.filter_state(state.others, nnx.RngState))
            return loss, ({"loss": loss, **metrics}, others)

        grads, metrics, others = gradients(loss_of, state.params, axis_name)
        net = nnx.merge(training, state.params, others, copy=True)
        # Some methods (MABN) learn from the gradient, which is known only after the backward pass.
        update_backward(net, grads)
        others = nnx.state(net, _OTHERS)
        return state.apply_gradients(grads=grads, others=others), metrics

    def eval_step(frozen: Frozen, batch: Any) -> Any:
        return install_frozen(start_from, frozen)(*arguments(inputs, batch))

    steps = pass_steps(
        NNX,
        evaluating,
        lambda net, batch: net(*arguments(inputs, batch)),
        lambda state: nnx.merge_state(state.params, state.others),
        estimator=estimator,
        axis_name=axis_name,
    )
    return Steps(init, train_step, steps.start, steps.postproc_step, steps.finalize, eval_step)


def _mode_of(model: nnx.Module, mode: str) -> Any:
    """The graphdef of the model after `train()` or `eval()`."""
    copy = nnx.clone(model)
    getattr(copy, mode)()
    return nnx.graphdef(copy)


def _reseed(model: nnx.Module, rng: jax.Array | None) -> None:
    """Reseeds each random stream of the model with a different key derived from `rng`; None keeps them."""
    if rng is None:
        return
    # Sorted, so that the key of a stream does not depend on the order in which modules define streams.
    tags = sorted({node.tag for _, node in nnx.iter_graph(model) if isinstance(node, nnx.RngKey)})
    keys: Any = {tag: jax.random.fold_in(rng, position) for position, tag in enumerate(tags)}
    nnx.reseed(model, policy="match_shape", **keys)
