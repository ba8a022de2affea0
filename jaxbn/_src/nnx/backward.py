"""Updates of NNX layers whose method learns from the gradient."""

from typing import Any

from flax import nnx
from jax.typing import ArrayLike

from jaxbn._src.framework.method import learned
from jaxbn._src.nnx.capture import check_model, is_frozen
from jaxbn._src.nnx.layers import Norm


def update_backward(model: Any, grads: Any, *, loss_scale: ArrayLike = 1.0) -> None:
    """Updates the layers of moving average batch normalization with a gradient; call it once after each training call.

    `make_steps` calls it for you. In your own loop, call it before `optimizer.update(model, grads)`, with the
    parameters that the gradient belongs to. Layers of your own methods with a `backward` are updated too.

    The rule in this package: functions that belong to a training step change the model in place, as a call of a layer
    and `optimizer.update` do; all functions of the statistics pass and of inference return a new model.

    Args:
        model: The model after the training call; it is changed in place. Other layers do not change.
        grads: The result of `nnx.grad` of the mean loss over the rows: not accumulated, not clipped, without the loss
            scale, and averaged over devices, as by `pmean`. Windows are kept where it is not finite.
        loss_scale: The loss scale of the NEXT step. After a skipped step, call this with the statistics that were kept,
            so that they take the new scale into account.

    Returns:
        None.

    Raises:
        ValueError: If the gradient of a layer is missing.

    Example:
        >>> model = jaxbn.nnx.MovingAverageBatchNorm(1, rngs=nnx.Rngs(0))
        >>> grads = nnx.grad(lambda model, x: jnp.mean(model(x) ** 3))(model, jnp.array([[1.0], [3.0]]))
        >>> jaxbn.nnx.update_backward(model, grads)
        >>> model.gradient_window[-1].round(2)
        Array([1.88], dtype=float32)
    """
    check_model(model)
    found = nnx.to_pure_dict(grads)
    learnt = {}
    for path, layer in nnx.iter_modules(model):
        if isinstance(layer, Norm) and not is_frozen(layer) and layer.transform.backward is not None:
            name, given = "/".join(map(str, path)), _at(found, path)
            learnt[layer] = learned(layer.transform, name, layer.params, layer.state, given, loss_scale)
    # All gradients were checked above, so an error leaves the model as it was.
    for layer, state in learnt.items():
        for name, leaf in state._asdict().items():
            if leaf is not None:
                getattr(layer, name)[...] = leaf


def _at(tree: Any, path: tuple[Any, ...]) -> dict[str, Any]:
    """The part of nested dicts at a path; empty if there is none."""
    for key in path:
        tree = tree.get(key, {}) if isinstance(tree, dict) else {}
    return tree if isinstance(tree, dict) else {}
