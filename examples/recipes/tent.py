"""TENT: adapt to another domain at test time by gradient steps on scale and bias that minimize the entropy.

    python examples/recipes/tent.py

Layers normalize with the statistics of the test batch: `mode="batch"` does this even if the model passes `train=False`.
All other variables stay constant. Batches must be large (200 in the paper) and contain mixed classes. On this small
problem the batch statistics alone account for almost all of the gain.

Wang et al., Tent: Fully Test-Time Adaptation by Entropy Minimization, 2021, section 3.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from shared import Batch, accuracy, another_camera, in_batches, load, predict, show, trained

import jaxbn.linen
import jaxbn.nnx

LEARNING_RATE = 1e-2  # 1e-3 in the paper, for larger networks


def entropy(logits: jax.Array) -> jax.Array:
    """Mean entropy of the predictions, in nats."""
    return -jnp.mean(jnp.sum(jax.nn.softmax(logits) * jax.nn.log_softmax(logits), -1))


def make_tent(variables: Any, learning_rate: float = LEARNING_RATE) -> tuple[Any, Callable[..., Any]]:
    """The recipe: an optimizer state, and a step that returns new params and the logits of the old ones."""
    mask = jaxbn.linen.affine_mask(variables, "")
    # Only scale and bias of normalization layers learn; all other parameters get zero updates.
    optimizer = optax.multi_transform({True: optax.adam(learning_rate), False: optax.set_to_zero()}, mask)
    in_batch_mode = jaxbn.linen.capture_moments(predict, mode="batch")

    @jax.jit
    def step(params: Any, opt_state: Any, batch: Batch) -> tuple[Any, Any, jax.Array]:
        def loss(params: Any) -> tuple[jax.Array, jax.Array]:
            logits, _ = in_batch_mode(variables | {"params": params}, batch)
            return entropy(logits), logits

        grads, logits = jax.grad(loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, logits

    return optimizer.init(variables["params"]), step


def make_tent_nnx(model: nnx.Module, learning_rate: float = LEARNING_RATE) -> Callable[[Batch], jax.Array]:
    """The recipe in NNX: a filter selects the trainable parameters, and the step updates the model in place."""
    affine = {path for path, found in nnx.to_flat_state(jaxbn.nnx.affine_mask(model, "")) if found}
    # The filter selects the same parameters for the gradient and for the optimizer.
    trainable = nnx.All(nnx.Param, lambda path, _: path in affine)
    optimizer = nnx.Optimizer(model, optax.adam(learning_rate), wrt=trainable)
    in_batch_mode = jaxbn.nnx.capture_moments(lambda model, batch: model(batch["x"]), mode="batch")

    @nnx.jit
    def step(model: nnx.Module, optimizer: nnx.Optimizer, batch: Batch) -> jax.Array:
        def loss(model: nnx.Module) -> tuple[jax.Array, jax.Array]:
            logits, _ = in_batch_mode(model, batch)
            return entropy(logits), logits

        grads, logits = nnx.grad(loss, argnums=nnx.DiffState(0, trainable), has_aux=True)(model)
        optimizer.update(model, grads)
        return logits

    return lambda batch: step(model, optimizer, batch)


def main(epochs: int = 4, passes: int = 5) -> dict[str, float]:
    """Prints accuracy and entropy on held-out digits of another camera; returns the accuracy."""
    data, held_out = load()
    variables = trained(data, epochs)
    unlabelled, elsewhere = another_camera(data), another_camera(held_out)
    params = variables["params"]
    opt_state, step = make_tent(variables)
    for batch in in_batches(unlabelled, 256) * passes:
        params, opt_state, _ = step(params, opt_state, batch)

    in_batch_mode = jaxbn.linen.capture_moments(predict, mode="batch")
    logits = {
        "running statistics": predict(variables, elsewhere),
        "batch statistics": in_batch_mode(variables, elsewhere)[0],
        "TENT": in_batch_mode(variables | {"params": params}, elsewhere)[0],
    }
    found = {name: accuracy(output, held_out) for name, output in logits.items()}
    rows = [[name, f"{value:.3f}", f"{entropy(logits[name]):.3f}"] for name, value in found.items()]
    show(["", "accuracy", "entropy (nats)"], rows)
    return found


if __name__ == "__main__":
    main()
