"""Plain JAX: a network of functions that normalizes with `bn.train` and `bn.eval`, and its statistics pass.

    python examples/recipes/plain_functions.py

The statistics are states in a pytree of your own. `jaxbn.postproc`, `diagnose`, `freeze` and `summary` find them there.
"""

from typing import Any

import jax
import optax
from shared import SGD, Batch, compare, in_batches, load, loss_fn

import jaxbn

WIDTHS = (64, 64, 32)
bn = jaxbn.batch_norm(activation=jax.nn.relu)


def init(key: jax.Array) -> tuple[Any, Any]:
    """Returns the parameters, and the states of the normalization layers."""
    make, keys = jax.nn.initializers.lecun_normal(), jax.random.split(key, len(WIDTHS))
    kernels = [
        make(k, shape) for k, shape in zip(keys, [*zip(WIDTHS, WIDTHS[1:], strict=False), (32, 10)], strict=True)
    ]
    affine, states = zip(*map(bn.init, WIDTHS[1:]), strict=True)
    return {"kernels": kernels, "affine": affine}, {f"norm_{i}": state for i, state in enumerate(states)}


def net(params: Any, states: Any, x: jax.Array, *, train: bool) -> tuple[jax.Array, Any]:
    """Returns the logits and the new states."""
    *kernels, head = params["kernels"]
    new = dict(states)
    for (name, state), affine, kernel in zip(states.items(), params["affine"], kernels, strict=True):
        if train:
            x, new[name] = bn.train(affine, state, x @ kernel)
        else:
            x = bn.eval(affine, state, x @ kernel)
    return x @ head, new


def predict(model: Any, batch: Batch) -> jax.Array:
    """The function that the pass runs; `model` holds parameters and states."""
    return net(*model, batch["x"], train=False)[0]


@jax.jit
def train_step(params: Any, states: Any, moments: Any, batch: Batch) -> tuple[Any, Any, Any]:
    """One step of gradient descent."""

    def loss(params: Any) -> tuple[jax.Array, Any]:
        logits, new = net(params, states, batch["x"], train=True)
        return loss_fn(logits, batch)[0], new

    grads, states = jax.grad(loss, has_aux=True)(params)
    updates, moments = SGD.update(grads, moments)
    return optax.apply_updates(params, updates), states, moments


def main(epochs: int = 3) -> tuple[Any, dict[str, float]]:
    """Prints the table of layers and the accuracy on held-out digits; returns the model and the latter."""
    data, held_out = load()
    params, states = init(jax.random.key(0))
    moments = SGD.init(params)
    for batch in in_batches(data) * epochs:
        params, states, moments = train_step(params, states, moments, batch)
    model, report = jaxbn.postproc(predict, (params, states), in_batches(data))
    frozen = jaxbn.freeze(model, report)
    print(jaxbn.summary(frozen))
    logits = {
        "running averages": predict((params, states), held_out),
        "statistics pass": predict(frozen.variables, held_out),
    }
    return model, compare(logits, held_out)


if __name__ == "__main__":
    main()
