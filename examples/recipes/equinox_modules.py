"""Equinox: a module that normalizes with jaxbn, with and without `eqx.nn.State`, and its statistics pass.

    pip install equinox
    python examples/recipes/equinox_modules.py

The statistics are states in the module, or in the `eqx.nn.State`; `jaxbn.postproc` finds them in either.
It takes models with Equinox's own BatchNorm as well.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from shared import Batch, compare, in_batches, load, loss_fn

import jaxbn

bn = jaxbn.batch_norm(activation=jax.nn.relu)


class Net(eqx.Module):
    """A network that holds its own statistics; training returns a new network."""

    first: eqx.nn.Linear
    params: jaxbn.NormParams
    norm: jaxbn.BatchNormState
    last: eqx.nn.Linear

    def __init__(self, key: jax.Array):
        keys = jax.random.split(key)
        self.first, self.last = eqx.nn.Linear(64, 64, key=keys[0]), eqx.nn.Linear(64, 10, key=keys[1])
        self.params, self.norm = bn.init(64)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.vmap(self.last)(bn.eval(self.params, self.norm, jax.vmap(self.first)(x)))

    def train(self, x: jax.Array) -> tuple[jax.Array, "Net"]:
        y, norm = bn.train(self.params, self.norm, jax.vmap(self.first)(x))
        return jax.vmap(self.last)(y), eqx.tree_at(lambda net: net.norm, self, norm)


class StatefulNet(eqx.Module):
    """The same network with its statistics in an `eqx.nn.State`, as Equinox's own layers have it."""

    first: eqx.nn.Linear
    params: jaxbn.NormParams
    norm: eqx.nn.StateIndex
    last: eqx.nn.Linear

    def __init__(self, key: jax.Array):
        keys = jax.random.split(key)
        self.first, self.last = eqx.nn.Linear(64, 64, key=keys[0]), eqx.nn.Linear(64, 10, key=keys[1])
        self.params, norm = bn.init(64)
        self.norm = eqx.nn.StateIndex(norm)

    def __call__(self, x: jax.Array, state: eqx.nn.State, *, train: bool) -> tuple[jax.Array, eqx.nn.State]:
        x, norm = jax.vmap(self.first)(x), state.get(self.norm)
        if train:
            y, norm = bn.train(self.params, norm, x)
            return jax.vmap(self.last)(y), state.set(self.norm, norm)
        return jax.vmap(self.last)(bn.eval(self.params, norm, x)), state


def predict(net: Net, batch: Batch) -> jax.Array:
    """The function that the pass runs."""
    return net(batch["x"])


def predict_stateful(model: tuple[StatefulNet, eqx.nn.State], batch: Batch) -> jax.Array:
    """The same for the network whose statistics are in a state."""
    net, state = model
    return net(batch["x"], state, train=False)[0]


@eqx.filter_jit
def train_step(net: Net, batch: Batch) -> Net:
    """One step of gradient descent."""

    def loss(net: Net) -> tuple[jax.Array, Net]:
        logits, new = net.train(batch["x"])
        return loss_fn(logits, batch)[0], new

    grads, new = eqx.filter_grad(loss, has_aux=True)(net)
    return eqx.apply_updates(new, jax.tree.map(lambda grad: -0.5 * grad, grads))


@eqx.filter_jit
def train_stateful_step(net: StatefulNet, state: eqx.nn.State, batch: Batch) -> tuple[StatefulNet, eqx.nn.State]:
    """The same step for the network whose statistics are in a state."""

    def loss(net: StatefulNet) -> tuple[jax.Array, eqx.nn.State]:
        logits, new = net(batch["x"], state, train=True)
        return loss_fn(logits, batch)[0], new

    grads, new = eqx.filter_grad(loss, has_aux=True)(net)
    return eqx.apply_updates(net, jax.tree.map(lambda grad: -0.5 * grad, grads)), new


def main(epochs: int = 2) -> tuple[Any, Any, dict[str, float]]:
    """Prints the accuracy on held-out digits; returns both networks with the statistics of a pass, and the accuracy."""
    data, held_out = load()
    net = Net(jax.random.key(0))
    stateful, state = eqx.nn.make_with_state(StatefulNet)(jax.random.key(0))
    for batch in in_batches(data) * epochs:
        net = train_step(net, batch)
        stateful, state = train_stateful_step(stateful, state, batch)
    x = jnp.asarray(held_out["x"])
    logits = {"running averages": net(x)}
    net, _ = jaxbn.postproc(predict, net, in_batches(data))
    (stateful, state), _ = jaxbn.postproc(predict_stateful, (stateful, state), in_batches(data))
    logits |= {"statistics pass": net(x), "the same in eqx.nn.State": stateful(x, state, train=False)[0]}
    return net, (stateful, state), compare(logits, held_out)


if __name__ == "__main__":
    main()
