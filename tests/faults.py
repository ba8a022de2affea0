"""Networks with and without a known fault in their batches or statistics, for the tests of the diagnosis.

`make_case(fault, seed)` returns a network with random weights, running averages and batches: a dense network on rows
for even seeds, and a convolutional network on images of random brightness for odd seeds. The values within an image
depend on each other.
"""

import functools

import flax.linen as nn
import jax
import numpy as np

EXAMPLES, BATCHES, CLASSES, STEPS = 32, 20, 10, 150
# With their effect sizes.
FAULTS = {
    "non_iid": "batches of one class each, of ten; the classes differ by 1 std",
    "tiny_batches": "batches of 4 rows, or 2 images",
    "shifted": "contrast 1.5, and brighter by 1 std",
    "stale": "10 steps at momentum 0.9: 35 % of the averages is still the initial value",
    "unestimated": "no training step",
    "dead": "one channel of 24 whose weights are 0",
    "huge_mean": "one channel whose mean is about 1000 std",
    "exploding": "weights of one channel times 1e6",
}


class Net(nn.Module):
    """Three blocks of a map, a normalization and relu; dense, or convolutions."""

    convolutional: bool

    @nn.compact
    def __call__(self, x, train):
        for number, width in enumerate((16, 24, 16)):
            name = f"map_{number}"
            x = nn.Conv(width, (3, 3), name=name)(x) if self.convolutional else nn.Dense(width, name=name)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, name=f"norm_{number}")(x))
        return nn.Dense(CLASSES)(x.mean((1, 2)) if self.convolutional else x)


@functools.cache
def functions(convolutional):
    """(init, step of the running averages, call), compiled once for all cases."""
    net = Net(convolutional)

    def step(variables, x):
        return variables | net.apply(variables, x, True, mutable=["batch_stats"])[1]

    return (
        jax.jit(lambda key, x: net.init(key, x, True)),
        jax.jit(step),
        lambda variables, x: net.apply(variables, x, False),
    )


def make_data(rng, classes, convolutional):
    """`draw(count, in_order=False)`: examples of random classes, or of one class after the other."""
    shape = (6, 6, 3) if convolutional else (12,)
    centers = rng.standard_normal((classes, shape[-1]))

    def draw(count, in_order=False):
        labels = rng.integers(0, classes, count)
        x = centers[np.sort(labels) if in_order else labels]
        if convolutional:
            x = x[:, None, None] + rng.standard_normal((count, 1, 1, 1))
        return (x + rng.standard_normal((count, *shape))).astype(np.float32)

    return draw


def make_case(fault, seed):
    """(call, variables, batches); without a fault for None."""
    rng, convolutional = np.random.default_rng(seed), bool(seed % 2)
    init, step, call = functions(convolutional)
    draw = make_data(rng, CLASSES, convolutional)
    variables = init(jax.random.key(seed), draw(2))
    kernel, bias = (np.array(variables["params"]["map_1"][name]) for name in ("kernel", "bias"))
    if fault == "dead":
        kernel[..., 5] = 0
    if fault == "huge_mean":
        bias[5] = 1e3
    if fault == "exploding":
        kernel[..., 5] *= 1e6
    variables["params"]["map_1"] = {"kernel": kernel, "bias": bias}
    for _ in range({"stale": 10, "unestimated": 0}.get(fault, STEPS)):
        variables = step(variables, draw(EXAMPLES))
    size = (2 if convolutional else 4) if fault == "tiny_batches" else EXAMPLES
    x = draw(BATCHES * size, in_order=fault == "non_iid")
    x = 1.5 * x + x.std() if fault == "shifted" else x
    return call, variables, x.reshape(BATCHES, size, *x.shape[1:])
