"""Updates of linen layers whose method learns from the gradient."""

from collections.abc import Iterable, Mapping
from typing import Any

import flax
from flax.core import meta
from jax.typing import ArrayLike

from jaxbn._src.framework.layer_paths import LayerPath, method_with
from jaxbn._src.framework.method import learned, loaded
from jaxbn._src.linen.framework import with_states
from jaxbn._src.linen.variables import keys, split_by_class


def update_backward(variables: Mapping[str, Any], grads: Any, *, loss_scale: ArrayLike = 1.0) -> dict[str, Any]:
    """Updates the layers of moving average batch normalization with a gradient; call it once after each training call.

    `make_steps` calls it for you. In your own loop, call it before the step of the optimizer, with the parameters that
    the gradient belongs to: `stats = update_backward({"params": state.params, **updates}, grads)["batch_stats"]`. Pure,
    and may be jitted. It returns new variables; its counterpart in NNX updates the model in place, as layers and
    optimizers of NNX do.

    Layers of your own methods with a `backward` are updated by `make_steps` only, because the variables do not tell the
    method.

    Args:
        variables: All variables of the model, with the statistics that the training call returned. Other layers do not
            change.
        grads: The gradient of the mean loss over the rows with respect to the params: not accumulated, not clipped,
            without the loss scale, and averaged over devices, as by `pmean`. Windows are kept where it is not finite.
        loss_scale: The loss scale of the NEXT step. After a skipped step, call this with the statistics that were kept,
            so that they take the new scale into account.

    Returns:
        New variables.

    Raises:
        ValueError: If the gradient of a layer is missing.

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
    return learn(variables, grads, (), loss_scale)


def learn(variables: Any, grads: Any, known: Iterable[str], loss_scale: ArrayLike = 1.0) -> dict[str, Any]:
    """As `update_backward`, and for layers of other methods if their path carries the method."""
    held, _ = split_by_class(variables)
    transforms = {path: method_with(frozenset(statistics)) for path, statistics in held.items()}
    # A LayerPath equals the plain path, so it replaces the method that the names of the statistics suggest.
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
