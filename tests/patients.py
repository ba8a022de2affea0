"""Networks whose batches or statistics are well, or ill in one known way, for the tests of the diagnosis.

`patient(disease, seed)` gives a network with random weights, running averages that training left behind, and batches:
of a dense network on rows for even seeds, of a convolutional one on images of random brightness for odd ones, whose
values depend on each other within an image.
"""

import functools

import flax.linen as nn
import jax
import numpy as np

EXAMPLES, BATCHES, CLASSES, STEPS = 32, 20, 10, 150
# Each with its effect size.
DISEASES = {
    "non_iid": "batches of one class each, of ten; the classes differ by 1 std",
    "tiny_batches": "batches of 4 rows, or 2 images",
    "shifted": "contrast 1.5, and brighter by 1 std",
    "stale": "10 steps at momentum 0.9: 35 % of the averages is still the initial value",
    "unestimated": "no step at all",
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
    """(init, step of the running averages, call), compiled once for all patients."""
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


def patient(disease, seed):
    """(call, variables, batches); a healthy one for None."""
    rng, convolutional = np.random.default_rng(seed), bool(seed % 2)
    init, step, call = functions(convolutional)
    draw = make_data(rng, CLASSES, convolutional)
    variables = init(jax.random.key(seed), draw(2))
    kernel, bias = (np.array(variables["params"]["map_1"][name]) for name in ("kernel", "bias"))
    if disease == "dead":
        kernel[..., 5] = 0
    if disease == "huge_mean":
        bias[5] = 1e3
    if disease == "exploding":
        kernel[..., 5] *= 1e6
    variables["params"]["map_1"] = {"kernel": kernel, "bias": bias}
    for _ in range({"stale": 10, "unestimated": 0}.get(disease, STEPS)):
        variables = step(variables, draw(EXAMPLES))
    size = (2 if convolutional else 4) if disease == "tiny_batches" else EXAMPLES
    x = draw(BATCHES * size, in_order=disease == "non_iid")
    x = 1.5 * x + x.std() if disease == "shifted" else x
    return call, variables, x.reshape(BATCHES, size, *x.shape[1:])
