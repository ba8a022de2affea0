"""Fine-tuning with frozen layers: small batches of one class each, which would spoil the statistics.

    python examples/recipes/fine_tuning.py

`freeze_layers` holds the statistics of layers and normalizes with them, whatever flag the model passes. Their scale and
bias are parameters, which the optimizer holds: `affine_mask` says which they are.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from shared import NET, Batch, another_camera, compare, in_batches, load, loss_fn, predict, take, trained

import jaxbn.linen
import jaxbn.nnx

LAYERS = ["BatchNorm_0", "BatchNorm_1"]
SLOW = optax.sgd(0.005)

Step = Callable[[Any, Any, Batch], tuple[Any, Any]]


def holding(variables: Any, optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer for all parameters but the scales and biases of the layers, and the first kernel with its bias."""
    held = jaxbn.linen.affine_mask(variables, LAYERS)
    held |= {"Dense_0": jax.tree.map(lambda _: True, held["Dense_0"])}
    return optax.multi_transform({False: optimizer, True: optax.set_to_zero()}, held)


def make_step(apply: Callable[..., Any], optimizer: optax.GradientTransformation) -> Step:
    """A training step of any `apply`."""

    @jax.jit
    def step(variables: Any, opt_state: Any, batch: Batch) -> tuple[Any, Any]:
        def loss(params: Any) -> Any:
            logits, updates = apply(variables | {"params": params}, batch["x"], train=True, mutable=["batch_stats"])
            return loss_fn(logits, batch)[0], updates

        grads, statistics = jax.grad(loss, has_aux=True)(variables["params"])
        updates, opt_state = optimizer.update(grads, opt_state, variables["params"])
        return statistics | {"params": optax.apply_updates(variables["params"], updates)}, opt_state

    return step


def fine_tune(variables: Any, batches: list[Batch]) -> Any:
    """The recipe: the same step with another `apply` and another optimizer."""
    optimizer = holding(variables, SLOW)
    return run(make_step(jaxbn.linen.freeze_layers(NET.apply, LAYERS), optimizer), optimizer, variables, batches)


def run(step: Step, optimizer: optax.GradientTransformation, variables: Any, batches: list[Batch]) -> Any:
    """The variables after a step for each batch."""
    opt_state = optimizer.init(variables["params"])
    for batch in batches:
        variables, opt_state = step(variables, opt_state, batch)
    return variables


def fine_tune_nnx(model: nnx.Module, batches: list[Batch]) -> nnx.Module:
    """The recipe in NNX, where `freeze_layers` gives a model and `"norms"` is the list of all its layers."""
    model = jaxbn.nnx.freeze_layers(model, "norms")
    held = jaxbn.nnx.affine_mask(model, "norms")
    optimizer = nnx.Optimizer(model, optax.chain(SLOW, optax.masked(optax.set_to_zero(), held)), wrt=nnx.Param)

    @nnx.jit
    def step(model: nnx.Module, optimizer: nnx.Optimizer, batch: Batch) -> None:
        optimizer.update(model, nnx.grad(lambda model: loss_fn(model(batch["x"]), batch)[0])(model))

    for batch in batches:
        step(model, optimizer, batch)
    return model


def one_class_each(data: Batch, size: int = 8) -> list[Batch]:
    """Small batches of one digit each, in random order."""
    rows = [np.flatnonzero(data["y"] == digit) for digit in range(10)]
    batches = [batch for digit in rows for batch in in_batches(take(data, digit), size)]
    return [batches[i] for i in np.random.default_rng(0).permutation(len(batches))]


def main(epochs: int = 4) -> dict[str, float]:
    """Prints the accuracy on another camera's held-out digits; returns it."""
    data, held_out = load()
    variables = trained(data, epochs)
    few, elsewhere = another_camera(take(data, slice(0, 640))), another_camera(held_out)
    batches = one_class_each(few)
    adapted, _ = jaxbn.linen.postproc(predict, variables, in_batches(few))  # the statistics to hold
    networks = {
        "before": variables,
        "with the statistics of the new data": adapted,
        "fine-tuned, layers frozen": fine_tune(adapted, batches),
        "fine-tuned, nothing frozen": run(make_step(NET.apply, SLOW), SLOW, adapted, batches),
    }
    return compare({name: predict(network, elsewhere) for name, network in networks.items()}, held_out)


if __name__ == "__main__":
    main()
