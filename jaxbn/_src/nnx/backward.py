"""What layers learn from the gradient, for NNX: nothing, unless their method has a `backward`."""

from typing import Any

from flax import nnx
from jax.typing import ArrayLike

from jaxbn._src.framework.method import learned
from jaxbn._src.nnx.capture import check_model, is_frozen
from jaxbn._src.nnx.modules import Norm


def update_backward(model: Any, grads: Any, *, loss_scale: ArrayLike = 1.0) -> None:
    """Lets the layers of moving average batch normalization learn from a gradient: once after each training call.

    So do layers of methods of your own that have a `backward`.

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
        if isinstance(layer, Norm) and not is_frozen(layer) and layer.transform.backward is not None:
            name, given = "/".join(map(str, path)), _at(found, path)
            learnt[layer] = learned(layer.transform, name, layer.params, layer.state, given, loss_scale)
    for layer, state in learnt.items():
        for name, leaf in state._asdict().items():
            if leaf is not None:
                getattr(layer, name)[...] = leaf


def _at(tree: Any, path: tuple[Any, ...]) -> dict[str, Any]:
    """The part of nested dicts at a path; empty if there is none."""
    for key in path:
        tree = tree.get(key, {}) if isinstance(tree, dict) else {}
    return tree if isinstance(tree, dict) else {}
