"""Fine-tuning with frozen BatchNorm layers, on small batches of one class that would spoil the running statistics.

    python examples/recipes/fine_tuning.py

`freeze_layers` makes the layers normalize with their running statistics and keeps these constant, even if the model
passes `train=True`. Scale and bias are parameters, so the optimizer has to leave them out: `affine_mask` selects them.
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


def with_frozen(variables: Any, optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Freezes the scales and biases of the layers and the whole first dense layer; trains all other parameters."""
    frozen = jaxbn.linen.affine_mask(variables, LAYERS)
    frozen |= {"Dense_0": jax.tree.map(lambda _: True, frozen["Dense_0"])}
    return optax.multi_transform({False: optimizer, True: optax.set_to_zero()}, frozen)


def make_step(apply: Callable[..., Any], optimizer: optax.GradientTransformation) -> Step:
    """Makes a training step for `NET.apply`, or for an `apply` with frozen layers."""

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
    """The recipe: the training step stays the same; `apply` and the optimizer are wrapped."""
    optimizer = with_frozen(variables, SLOW)
    return run(make_step(jaxbn.linen.freeze_layers(NET.apply, LAYERS), optimizer), optimizer, variables, batches)


def run(step: Step, optimizer: optax.GradientTransformation, variables: Any, batches: list[Batch]) -> Any:
    """Takes one step per batch and returns the variables."""
    opt_state = optimizer.init(variables["params"])
    for batch in batches:
        variables, opt_state = step(variables, opt_state, batch)
    return variables


def fine_tune_nnx(model: nnx.Module, batches: list[Batch]) -> nnx.Module:
    """The recipe in NNX: `freeze_layers` returns a model, and `"norms"` selects its list of normalization layers."""
    # Frozen layers ignore `train()`, so the small batches below do not touch their statistics.
    model = jaxbn.nnx.freeze_layers(model, "norms")
    frozen = jaxbn.nnx.affine_mask(model, "norms")
    optimizer = nnx.Optimizer(model, optax.chain(SLOW, optax.masked(optax.set_to_zero(), frozen)), wrt=nnx.Param)

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
    """Prints and returns the accuracy on held-out digits of another camera."""
    data, held_out = load()
    variables = trained(data, epochs)
    few, elsewhere = another_camera(take(data, slice(0, 640))), another_camera(held_out)
    batches = one_class_each(few)
    adapted, _ = jaxbn.linen.postproc(predict, variables, in_batches(few))  # estimate first, then freeze
    networks = {
        "before": variables,
        "with the statistics of the new data": adapted,
        "fine-tuned, layers frozen": fine_tune(adapted, batches),
        "fine-tuned, no frozen layers": run(make_step(NET.apply, SLOW), SLOW, adapted, batches),
    }
    return compare({name: predict(network, elsewhere) for name, network in networks.items()}, held_out)


if __name__ == "__main__":
    main()
