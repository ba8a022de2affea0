"""Haiku: a module that normalizes with jaxbn, and the statistics pass of a transform.

    pip install dm-haiku
    python examples/recipes/haiku_transforms.py

The statistics are one state of Haiku, a NamedTuple, which `jaxbn.postproc` finds in the states of the transform.
It takes models with Haiku's own BatchNorm as well.
"""

from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
from shared import Batch, compare, in_batches, load, loss_fn

import jaxbn

bn = jaxbn.batch_norm(activation=jax.nn.relu)


class BatchNorm(hk.Module):
    """Batch normalization over the leading axes."""

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Returns the normalized input."""
        features = x.shape[-1:]
        scale = hk.get_parameter("scale", features, init=jnp.ones)
        params = jaxbn.NormParams(scale, hk.get_parameter("bias", features, init=jnp.zeros))
        state = hk.get_state("norm", features, init=lambda shape, dtype: bn.init(shape)[1])
        if not train:
            return bn.eval(params, state, x)
        y, state = bn.train(params, state, x)
        hk.set_state("norm", state)
        return y


@hk.without_apply_rng
@hk.transform_with_state
def net(x: jax.Array, train: bool) -> jax.Array:
    """The network."""
    for width in (64, 32):
        x = BatchNorm()(hk.Linear(width, with_bias=False)(x), train)
    return hk.Linear(10)(x)


def predict(model: Any, batch: Batch) -> jax.Array:
    """The function that the pass runs; `model` holds the parameters and the states of the transform."""
    return net.apply(*model, batch["x"], False)[0]


@jax.jit
def train_step(params: Any, state: Any, batch: Batch) -> tuple[Any, Any]:
    """One step of gradient descent."""

    def loss(params: Any) -> tuple[jax.Array, Any]:
        logits, new = net.apply(params, state, batch["x"], True)
        return loss_fn(logits, batch)[0], new

    grads, state = jax.grad(loss, has_aux=True)(params)
    return jax.tree.map(lambda param, grad: param - 0.5 * grad, params, grads), state


def main(epochs: int = 2) -> tuple[Any, dict[str, float]]:
    """Prints the accuracy on held-out digits; returns the model with the statistics of a pass, and the accuracy."""
    data, held_out = load()
    params, state = net.init(jax.random.key(0), data["x"][:64], True)
    for batch in in_batches(data) * epochs:
        params, state = train_step(params, state, batch)
    model, _ = jaxbn.postproc(predict, (params, state), in_batches(data))
    logits = {"running averages": predict((params, state), held_out), "statistics pass": predict(model, held_out)}
    return model, compare(logits, held_out)


if __name__ == "__main__":
    main()
