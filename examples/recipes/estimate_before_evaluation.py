"""PreciseBN in a training loop: every few epochs, validate with statistics that are estimated just before.

    python examples/recipes/estimate_before_evaluation.py

With momentum 0.99 the running averages need several hundred steps before they are useful. They lag again after a jump
of the learning rate, and with large batches (Wu & Johnson, Rethinking "Batch" in BatchNorm, 2021, section 3). A few
batches are enough for a good estimate. The pass does not change the training state: parameters, running averages and
optimizer continue as if there had been no evaluation.
"""

from shared import SGD, Batch, Net, accuracy, in_batches, load, make_predict, train

import jaxbn.linen

NET = Net(momentum=0.99)  # Flax's default
BATCHES = 8  # of the pass
EVERY = 2  # epochs between evaluations
predict = make_predict(NET)


def evaluate(state: jaxbn.linen.TrainState, data: Batch, held_out: Batch) -> float:
    """The recipe: held-out accuracy with statistics estimated on a few batches. Does not change the state."""
    variables, _ = jaxbn.linen.postproc(predict, state.variables, in_batches(data)[:BATCHES])
    return accuracy(predict(variables, held_out), held_out)


def main(epochs: int = 8) -> list[tuple[float, float]]:
    """Prints and returns the held-out accuracy every few epochs, with both kinds of statistics."""
    data, held_out = load()
    found, per_epoch = [], len(in_batches(data))
    print(f"epoch   running averages   estimated on {BATCHES} batches")
    for step, state in enumerate(train(SGD, data, epochs, net=NET), 1):
        if step % (EVERY * per_epoch) == 0:
            running = accuracy(predict(state.variables, held_out), held_out)
            found.append((running, evaluate(state, data, held_out)))
            print(f"{step // per_epoch:5}   {found[-1][0]:16.3f}   {found[-1][1]:22.3f}")
    return found


if __name__ == "__main__":
    main()
