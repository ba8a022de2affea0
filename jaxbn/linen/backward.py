"""What layers learn from the gradient, for linen: nothing, but for those of moving average batch normalization."""

from typing import Any

import flax
from flax.core import meta
from jax.typing import ArrayLike

from jaxbn.linen.capture import check_variables, keys
from jaxbn.linen.modules import STATISTICS
from jaxbn.linen.postproc import statistics_at, with_states
from jaxbn.methods.base import NormParams
from jaxbn.methods.moving_average_batch_norm import moving_average_batch_norm
from jaxbn.population.methods import state_of

_LEAF = "gradient_window"  # by which its statistics are known


def update_backward(variables: Any, grads: Any, *, loss_scale: ArrayLike = 1.0) -> dict[str, Any]:
    """Lets the layers of moving average batch normalization learn from a gradient: once after each training call.

    `make_steps` does it. In a loop of your own, before the optimizer's step, with the parameters of which the gradient
    is: `stats = update_backward({"params": state.params, **updates}, grads)["batch_stats"]`. Pure; may be jitted.

    Args:
        variables: All variables of the model, with the statistics as the training call left them. Other layers stay as
            they are.
        grads: The gradient of the params by the mean loss over the rows: not accumulated, not clipped, without the loss
            scale; of several devices averaged, as by `pmean`. Where it is not finite the windows stay.
        loss_scale: What the loss of the NEXT step will be multiplied by. Where a scaled step was skipped, call this
            with the statistics that were kept, so that they learn of the new scale.

    Returns:
        New variables.

    Raises:
        ValueError: If the gradient of a layer is not there.

    Example:
        >>> layer = jaxbn.linen.MovingAverageBatchNorm(use_running_average=False)
        >>> x = jnp.array([[1.0], [3.0]])
        >>> variables = layer.init(jax.random.key(0), x)
        >>> def loss_of(params):
        ...     y, updates = layer.apply({**variables, "params": params}, x, mutable=["batch_stats"])
        ...     return jnp.mean(y**3), updates
        >>> grads, updates = jax.grad(loss_of, has_aux=True)(variables["params"])
        >>> variables = jaxbn.linen.update_backward({**variables, **updates}, grads)
        >>> variables["batch_stats"]["gradient_window"][-1].round(2)
        Array([1.88], dtype=float32)
    """
    check_variables(variables)
    transform = moving_average_batch_norm()
    flat = flax.traverse_util.flatten_dict(flax.core.unfreeze(variables.get(STATISTICS, {})), sep="/")
    states = {}
    for path in (name.removesuffix(_LEAF).rstrip("/") for name in flat if name.split("/")[-1] == _LEAF):
        params, given = (_affine(tree, path) for tree in (variables.get("params", {}), grads))
        state = state_of(transform, statistics_at(variables, path))
        states[path] = transform.backward(params, state, given, loss_scale=loss_scale)
    return with_states(variables, states) if states else flax.core.unfreeze(variables)


def _affine(tree: Any, path: str) -> NormParams:
    """The scale and bias of a layer, in the params or in their gradient."""
    tree = flax.core.unfreeze(meta.unbox(tree))
    for key in keys(path):
        tree = tree.get(key, {})
    if tree.get("scale") is None:
        raise ValueError(f"There is no scale of {path!r}: pass the gradient of all the params of the model.")
    return NormParams(tree["scale"], tree.get("bias"))
