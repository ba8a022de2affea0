"""The training loop of a linen model as pure functions: short enough to read and to copy."""

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.training import train_state

from jaxbn._src.framework.layers import LayerKind
from jaxbn._src.framework.steps import Steps, arguments, check_synchronized, gradients
from jaxbn._src.inference.frozen import Frozen
from jaxbn._src.inference.pass_steps import pass_steps
from jaxbn._src.linen.backward import learn
from jaxbn._src.linen.capture import is_call_of_layer
from jaxbn._src.linen.framework import LINEN
from jaxbn._src.linen.freeze import apply_frozen
from jaxbn._src.linen.layers import STATISTICS
from jaxbn._src.linen.registry import as_norm
from jaxbn._src.numerics.collectives import AxisName
from jaxbn._src.statistics.estimators import Estimator, check_estimator, pooled

if TYPE_CHECKING:
    import optax


class TrainState(train_state.TrainState):
    """Flax's TrainState with the statistics: one pytree to donate, replicate and save."""

    batch_stats: Any
    kinds: tuple[tuple[str, LayerKind], ...] = flax.struct.field(pytree_node=False)

    @property
    def variables(self) -> dict[str, Any]:
        """All variables of the model, as `apply` takes them."""
        return {"params": self.params, STATISTICS: self.batch_stats}


def make_steps(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], tuple[jax.Array, dict[str, jax.Array]]],
    optimizer: "optax.GradientTransformation",
    *,
    inputs: Callable[[Any], Any],
    estimator: Estimator = pooled(),  # noqa: B008  a constant: pure functions, made once
    axis_name: AxisName | None = None,
) -> Steps:
    """Makes the functions of a training loop: initialize, train, estimate the population statistics, evaluate.

    For ordinary loops. In a special loop, copy from here, or use the layers and `postproc` directly.

    Args:
        model: A module whose call takes `train`, with layers of jaxbn or Flax.
        loss_fn: `(outputs, batch) -> (loss, {name: metric})`: the mean loss over the rows of the batch, and scalars.
        optimizer: Any transformation of optax.
        inputs: `batch -> x`: the argument of the model, or a tuple of several.
        estimator: The estimator of the population statistics.
        axis_name: Axis of the `pmap` or `shard_map` around the steps, over which gradients and metrics are averaged and
            moments merged; layers with running averages need it too. None under `jit` on sharded arrays.

    Returns:
        `Steps`. The state is a `TrainState` of Flax with `batch_stats`. `train_step` uses `rng` for all random streams
        of the model, such as dropout; pass a different one on each device.

    Raises:
        TypeError: If the call of the model does not take `train`, or `eval_step` gets anything but a `Frozen`.
        ValueError: In `init`, if the model has variables other than params and batch_stats, or no normalization layer;
            in `train_step`, if a layer would keep running averages of its own device only; in `finalize`, if the
            statistics were never estimated, or a batch gave NaN.

    Example:
        >>> class Net(flax.linen.Module):
        ...     @flax.linen.compact
        ...     def __call__(self, x, train):
        ...         x = jaxbn.linen.BatchNorm(use_running_average=not train)(x)
        ...         return flax.linen.Dense(1)(x)
        >>> def loss_fn(outputs, batch):
        ...     error = outputs - batch["y"]
        ...     return jnp.mean(error**2), {"largest error": jnp.max(jnp.abs(error))}
        >>> x = 5 + 2 * jax.random.normal(jax.random.key(0), (10, 32, 3))
        >>> batches = [{"x": rows, "y": rows.sum(1, keepdims=True)} for rows in x]
        >>> steps = jaxbn.linen.make_steps(Net(), loss_fn, optax.sgd(0.01), inputs=lambda batch: batch["x"])
        >>> train_step = jax.jit(steps.train_step, donate_argnums=0)
        >>> postproc_step, eval_step = jax.jit(steps.postproc_step), jax.jit(steps.eval_step)
        >>> state = steps.init(jax.random.key(0), batches[0])
        >>> for batch in batches:
        ...     state, metrics = train_step(state, batch)
        >>> acc = steps.start(state, batches[0])
        >>> for batch in batches:
        ...     acc = postproc_step(state, acc, batch)
        >>> frozen, report = steps.finalize(state, acc)
        >>> outputs = eval_step(frozen, {"x": x[0, :1]})
        >>> frozen.info.layer("BatchNorm_0")
        LayerInfo(method='batch_norm', epsilon=1e-05, estimator='pooled', rows=320.0)
    """
    _check_takes_train(model)
    check_estimator(estimator)

    def init(rng: jax.Array, batch: Any) -> TrainState:
        variables = flax.core.unfreeze(model.init(rng, *arguments(inputs, batch), train=True))
        if other := sorted(variables.keys() - {"params", STATISTICS}):
            raise ValueError(
                f"The steps support params and {STATISTICS} only; the model also has {other}. Write the loop yourself."
            )
        # Variables do not name the method of a layer: trace the model once and keep the methods in the state.
        kinds = jax.eval_shape(steps.measure, variables, batch).kinds
        params, stats = variables.get("params", {}), variables[STATISTICS]
        state = TrainState.create(apply_fn=model.apply, params=params, tx=optimizer, batch_stats=stats, kinds=kinds)
        # Flax starts with a Python number, but all leaves of the state are to be arrays.
        return state.replace(step=jnp.zeros((), jnp.int32))

    def train_step(state: TrainState, batch: Any, rng: jax.Array | None = None) -> tuple[TrainState, dict[str, Any]]:
        def loss_of(params: Any) -> tuple[jax.Array, Any]:
            with nn.intercept_methods(check_layers):
                outputs, updates = model.apply(
                    {"params": params, STATISTICS: state.batch_stats},
                    *arguments(inputs, batch),
                    train=True,
                    rngs=rng,
                    mutable=[STATISTICS],
                )
            loss, metrics = loss_fn(outputs, batch)
            return loss, ({"loss": loss, **metrics}, updates[STATISTICS])

        grads, metrics, batch_stats = gradients(loss_of, state.params, axis_name)
        variables = {"params": state.params, STATISTICS: batch_stats}
        # Some methods (MABN) learn from the gradient, which is known only after the backward pass.
        batch_stats = learn(variables, grads, dict(state.kinds))[STATISTICS]
        return state.apply_gradients(grads=grads, batch_stats=batch_stats), metrics

    def eval_step(frozen: Frozen, batch: Any) -> Any:
        return apply_frozen(model.apply, frozen, *arguments(inputs, batch), train=False)

    def check_layers(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if is_call_of_layer(context):
            check_synchronized("/".join(context.module.path), as_norm(context.module), axis_name)
        return call(*args, **kwargs)

    def call(variables: Any, batch: Any) -> Any:
        return model.apply(variables, *arguments(inputs, batch), train=False)

    steps = pass_steps(
        LINEN,
        None,
        call,
        lambda state: state.variables,
        estimator=estimator,
        axis_name=axis_name,
        kinds_of=lambda state: state.kinds,
    )
    return Steps(init, train_step, steps.start, steps.postproc_step, steps.finalize, eval_step)


def _check_takes_train(model: nn.Module) -> None:
    parameters = inspect.signature(type(model).__call__).parameters
    if "train" not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise TypeError(
            f"The call of {type(model).__name__} does not take train; it takes {list(parameters)[1:]}. Wrap it in a "
            f"module that does: def __call__(self, x, train): return Net()(x, use_running_average=not train)."
        )
