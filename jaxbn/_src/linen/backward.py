"""What layers learn from the gradient, for linen: nothing, unless their method has a `backward`."""

from collections.abc import Iterable, Mapping
from typing import Any

import flax
from flax.core import meta
from jax.typing import ArrayLike

from jaxbn._src.framework.layer_paths import LayerPath, method_with
from jaxbn._src.framework.method import learned, loaded
from jaxbn._src.linen.framework import with_states
from jaxbn._src.linen.variables import check_variables, keys, statistics_by_layer


def update_backward(variables: Mapping[str, Any], grads: Any, *, loss_scale: ArrayLike = 1.0) -> dict[str, Any]:
    """Lets the layers of moving average batch normalization learn from a gradient: once after each training call.

    Layers of a method of your own that has a `backward` learn in `make_steps`; elsewhere call it yourself, as the
    variables do not tell the method.

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
    return learn(variables, grads, (), loss_scale)


def learn(variables: Any, grads: Any, known: Iterable[str], loss_scale: ArrayLike = 1.0) -> dict[str, Any]:
    """As `update_backward`, for layers of other methods too if their path knows the method."""
    held = statistics_by_layer(variables)
    transforms = {path: method_with(frozenset(statistics)) for path, statistics in held.items()}
    transforms |= {path: path.method() for path in known if isinstance(path, LayerPath)}
    states = {}
    for path, transform in transforms.items():
        if transform is not None and transform.backward is not None:
            params, state = loaded(transform, _at(variables.get("params", {}), path), held[path])
            states[path] = learned(transform, path, params, state, _at(grads, path), loss_scale)
    return with_states(variables, states) if states else flax.core.unfreeze(variables)


def _at(tree: Any, path: str) -> dict[str, Any]:
    """The params of a layer, or their gradients, by name; empty if there are none."""
    tree = flax.core.unfreeze(meta.unbox(tree))
    for key in keys(path):
        tree = tree.get(key, {})
    return dict(tree)
