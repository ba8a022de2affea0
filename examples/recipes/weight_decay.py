"""Weight decay with BatchNorm: decay kernels towards zero and scales towards one; do not decay biases.

    python examples/recipes/weight_decay.py

`optax.add_decayed_weights` decays every parameter towards zero. For the scale of a normalization layer that switches
the channel off, whereas a scale of one leaves the normalized values unchanged (Summers & Dinneen, Four Things Everyone
Should Know to Improve Batch Normalization, 2020; they also decay biases towards zero).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from shared import NET, SGD, load, show, train

import jaxbn.linen


def decay_towards_one(rate: float) -> optax.GradientTransformation:
    """Adds the gradient of the penalty rate / 2 * (parameter - 1)^2."""

    def update(updates: Any, params: Any) -> Any:
        return jax.tree.map(lambda u, p: u + rate * (p - 1), updates, params)

    return optax.stateless(update)


def masks(variables: Any) -> tuple[Any, Any]:
    """Masks like `variables["params"]` that select the scales of normalization layers, and the kernels."""
    of_layers = jaxbn.linen.affine_mask(variables, "")
    scales = traverse_util.path_aware_map(lambda path, affine: affine and path[-1] == "scale", of_layers)
    return scales, traverse_util.path_aware_map(lambda path, _: path[-1] == "kernel", of_layers)


def make_optimizer(
    variables: Any, rate: float, optimizer: optax.GradientTransformation
) -> optax.GradientTransformation:
    """The recipe, before the optimizer. For decoupled decay, as in AdamW, put it after `optax.scale_by_adam`."""
    scales, kernels = masks(variables)
    return optax.chain(
        optax.masked(optax.add_decayed_weights(rate), kernels),
        # Biases are in neither mask, so they do not decay.
        optax.masked(decay_towards_one(rate), scales),
        optimizer,
    )


def main(epochs: int = 4, rate: float = 0.02) -> dict[str, float]:
    """Prints the final scales for each kind of decay; returns their means."""
    data, _ = load()
    variables = jax.eval_shape(lambda: NET.init(jax.random.key(0), jnp.asarray(data["x"][:2]), train=False))
    optimizers = {
        "none": SGD,
        "all towards zero": optax.chain(optax.add_decayed_weights(rate), SGD),
        "scales towards one": make_optimizer(variables, rate, SGD),
    }
    found, rows = {}, []
    for name, optimizer in optimizers.items():
        *_, state = train(optimizer, data, epochs)
        scales = np.concatenate([v["scale"] for name, v in state.params.items() if name.startswith("BatchNorm")])
        found[name] = float(scales.mean())
        rows.append([name, f"{found[name]:.3f}", f"{np.abs(scales - 1).max():.3f}"])
    show([f"weight decay {rate}", "mean scale", "largest distance from one"], rows)
    return found


if __name__ == "__main__":
    main()
