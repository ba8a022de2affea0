"""What layers learn from the gradient, for NNX: nothing, but for those of moving average batch normalization."""

from typing import Any

from flax import nnx
from jax.typing import ArrayLike

from jaxbn.methods.base import NormParams
from jaxbn.nnx.capture import check_model, is_frozen
from jaxbn.nnx.methods import MovingAverageBatchNorm


def update_backward(model: Any, grads: Any, *, loss_scale: ArrayLike = 1.0) -> None:
    """Lets the layers of moving average batch normalization learn from a gradient: once after each training call.

    `make_steps` does it. In a loop of your own call it before `optimizer.update(model, grads)`, as psi is of the
    parameters of which the gradient is. The statistics of the model move, as they do in a call.

    Args:
        model: The model, as the training call left it. Other layers stay as they are.
        grads: What `nnx.grad` gives, by the mean loss over the rows: not accumulated, not clipped, without the loss
            scale; of several devices averaged, as by `pmean`. Where it is not finite the windows stay.
        loss_scale: What the loss of the NEXT step will be multiplied by. Where a scaled step was skipped, call this
            with the statistics that were kept, so that they learn of the new scale.

    Returns:
        Nothing.

    Raises:
        ValueError: If the gradient of a layer is not there.

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
        if isinstance(layer, MovingAverageBatchNorm) and not is_frozen(layer):
            given = NormParams(_leaf(found, path, "scale"), None)
            learnt[layer] = layer.transform.backward(layer.params, layer.state, given, loss_scale=loss_scale)
    for layer, state in learnt.items():
        for name, leaf in state._asdict().items():
            if leaf is not None:
                getattr(layer, name)[...] = leaf


def _leaf(tree: Any, path: tuple[Any, ...], name: str) -> Any:
    for key in (*path, name):
        tree = tree.get(key) if isinstance(tree, dict) else None
    if tree is None:
        path_to = "/".join(map(str, path))
        raise ValueError(f"There is no gradient of the scale of {path_to!r}: pass that of all the params of the model.")
    return tree
