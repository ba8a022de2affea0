"""Training, postproc and evaluation of an NNX model as pure functions: a page to read, and to copy from."""

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

# What a step may change besides the parameters: statistics, random states, whatever the model keeps.
_OTHERS = nnx.Not(nnx.Any(nnx.Param, nnx.Intermediate))


class TrainState(train_state.TrainState):
    """Flax's TrainState for an NNX model: a pytree of arrays, to be donated, replicated and saved as a whole."""

    others: Any  # the variables that are no parameters, `nnx.State`; params is one too


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

    As :func:`jaxbn.linen.make_steps`, for NNX: the model says what is trained and from where, is set to `train()` and
    `eval()` on copies, and is left untouched.

    Args:
        model: The model, of jaxbn's layers or stock ones, with the values to start from.
        loss_fn: `(outputs, batch) -> (loss, {name: metric})`: the mean loss over the rows of the batch, and scalars.
        optimizer: Any transformation of optax; it is given the `nnx.Param` of the model.
        inputs: `batch -> x`: the argument of the model, or a tuple of several.
        estimator: Of the population statistics.
        axis_name: Axis of the `pmap` or `shard_map` around the steps, over which gradients, metrics and the moments of
            the pass are put together; layers with running averages need it too. Under `jit` on sharded arrays None.

    Returns:
        `Steps`. The state is a `TrainState` of Flax with `others`. `rng` of `init` seeds the random streams of the
        model anew, such as dropout; None leaves them. `rng` of `train_step` serves all of them in that step, and leaves
        those of the state where they are; give each device its own. None uses those of the state, and they go on.

    Raises:
        TypeError: If `eval_step` is given anything but a `Frozen`.
        ValueError: If the model has no normalization, or a layer would keep running averages of its own device; in
            `finalize`, if nothing has estimated the statistics, or a batch gave NaN.

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
    nnx.pop(start_from, nnx.Intermediate)
    training, evaluating = _mode_of(start_from, "train"), _mode_of(start_from, "eval")
    for path, layer in find_layers(model).items():
        if not is_frozen(layer):
            check_synchronized(path, as_norm(layer), axis_name)

    def init(rng: jax.Array | None, batch: Any) -> TrainState:
        del batch  # of whose shapes linen makes the parameters
        copy = nnx.clone(start_from)
        _reseed(copy, rng)
        params, others = jax.tree.map(jnp.copy, (nnx.state(copy, nnx.Param), nnx.state(copy, _OTHERS)))
        state = TrainState.create(apply_fn=training.apply, params=params, tx=optimizer, others=others)
        return state.replace(step=jnp.zeros((), jnp.int32))

    def train_step(state: TrainState, batch: Any, rng: jax.Array | None = None) -> tuple[TrainState, dict[str, Any]]:
        def loss_of(params: Any) -> tuple[jax.Array, Any]:
            net = nnx.merge(training, params, state.others, copy=True)  # variables that may be set in this trace
            _reseed(net, rng)
            loss, metrics = loss_fn(net(*arguments(inputs, batch)), batch)
            others = nnx.state(net, _OTHERS)
            if rng is not None:  # of this device alone, while the state is the same on all
                others = nnx.merge_state(others, nnx.filter_state(state.others, nnx.RngState))
            return loss, ({"loss": loss, **metrics}, others)

        grads, metrics, others = gradients(loss_of, state.params, axis_name)
        net = nnx.merge(training, state.params, others, copy=True)
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
    """The graph of the model in mode "train" or "eval"."""
    copy = nnx.clone(model)
    getattr(copy, mode)()
    return nnx.graphdef(copy)


def _reseed(model: nnx.Module, rng: jax.Array | None) -> None:
    """Gives each random stream of the model a key of its own, made from `rng`; None leaves them."""
    if rng is None:
        return
    tags = sorted({node.tag for _, node in nnx.iter_graph(model) if isinstance(node, nnx.RngKey)})
    keys: Any = {tag: jax.random.fold_in(rng, position) for position, tag in enumerate(tags)}
    nnx.reseed(model, policy="match_shape", **keys)
