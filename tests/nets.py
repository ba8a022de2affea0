"""One small network in linen and NNX, with equal names, its data, and its results in float64.

Two blocks of a map (a convolution or a dense one), a normalization, relu and dropout, and a head.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx

WIDTHS = (4, 6)
LAYERS = ("norm_0", "norm_1")
# Of the layers, so that a few steps change the averages; of the optimizer, repeated in `trained_in_float64`.
MOMENTUM = 0.9
RATE, INERTIA = 0.05, 0.9
OPTIMIZER = optax.sgd(RATE, momentum=INERTIA)


class LinenNet(nn.Module):
    norm: Callable[..., nn.Module]
    convs: int = 0
    rate: float = 0.0
    dtype: Any = None

    @nn.compact
    def __call__(self, x, train):
        for i, width in enumerate(WIDTHS):
            if i < self.convs:
                x = nn.Conv(width, (3, 3), use_bias=False, dtype=self.dtype, name=f"map_{i}")(x)
            else:
                x = nn.Dense(width, dtype=self.dtype, name=f"map_{i}")(x.mean((1, 2)) if x.ndim == 4 else x)
            x = nn.relu(self.norm(use_running_average=not train, dtype=self.dtype, name=f"norm_{i}")(x))
            x = nn.Dropout(self.rate, deterministic=not train)(x)
        return nn.Dense(1, dtype=self.dtype, name="head")(x)


class NNXNet(nnx.Module):
    def __init__(self, norm, convs=0, rate=0.0, dtype=None):
        rngs = nnx.Rngs(0, dropout=1)
        for i, (before, width) in enumerate(zip((3, *WIDTHS), WIDTHS, strict=False)):
            if i < convs:
                layer = nnx.Conv(before, width, (3, 3), use_bias=False, dtype=dtype, rngs=rngs)
            else:
                layer = nnx.Linear(before, width, dtype=dtype, rngs=rngs)
            setattr(self, f"map_{i}", layer)
            setattr(self, f"norm_{i}", norm(width, dtype=dtype, rngs=rngs))
        self.dropout = nnx.Dropout(rate, rngs=rngs if rate else None)
        self.head = nnx.Linear(WIDTHS[-1], 1, dtype=dtype, rngs=rngs)
        self.convs = convs

    def __call__(self, x):
        for i in range(len(WIDTHS)):
            x = x.mean((1, 2)) if i >= self.convs and x.ndim == 4 else x
            x = self.dropout(nnx.relu(getattr(self, f"norm_{i}")(getattr(self, f"map_{i}")(x))))
        return self.head(x)


class Framework(NamedTuple):
    """The functions and layers of one framework, under common names."""

    name: str
    package: Any  # of jaxbn
    ours: Any
    stock: Any
    net_class: Callable[..., Any]

    def net(self, norm=None, *, convs=0, rate=0.0, dtype=None, **fields):
        """A network of the layer `norm` with these fields; of ours if it is not given."""
        norm = functools.partial(norm or self.ours, **{"momentum": MOMENTUM} | fields)
        return self.net_class(norm, convs=convs, rate=rate, dtype=dtype)

    def steps(self, net, loss_fn=None, optimizer=OPTIMIZER, **options):
        make = self.package.make_steps
        return make(net, loss_fn or squared_error, optimizer, inputs=lambda batch: batch["x"], **options)


LINEN = Framework("linen", jaxbn.linen, jaxbn.linen.BatchNorm, nn.BatchNorm, LinenNet)
NNX = Framework("nnx", jaxbn.nnx, jaxbn.nnx.BatchNorm, nnx.BatchNorm, NNXNet)
every_framework = pytest.mark.parametrize("framework", [LINEN, NNX], ids=["linen", "nnx"])


def started(framework, net):
    """The state of training: linen's variables, or the NNX model itself."""
    return net if framework is NNX else net.init(jax.random.key(0), make_batches(1)[0]["x"], train=True)


def split(moving):
    """(params, the other variables, how to put them together again), for pure functions of them."""
    if isinstance(moving, nnx.Module):
        graph, params, others = nnx.split(moving, nnx.Param, ...)
        return params, others, functools.partial(nnx.merge, graph, copy=True)
    others = {name: collection for name, collection in moving.items() if name != "params"}
    return moving["params"], others, lambda params, others: {"params": params, **others}


def train(net, moving, x):
    """(outputs, the updated state)."""
    if isinstance(moving, nnx.Module):
        return moving(x), moving
    outputs, updates = net.apply(moving, x, train=True, mutable=["batch_stats"])
    return outputs, {**moving, **updates}


def squared_error(outputs, batch):
    error = outputs[:, 0].astype(jnp.float32) - batch["y"]
    return jnp.mean(error**2), {"mean error": jnp.mean(jnp.abs(error))}


def make_batches(count, rows=16, image=()):
    """Batches of rows, or of images, that are far from mean 0 and variance 1."""
    rng = np.random.default_rng(0)
    x = (1 + 2 * rng.standard_normal((count, rows, *image, 3))).astype(np.float32)
    y = np.sin(x.reshape(count, rows, -1)).mean(-1)
    return [{"x": one, "y": other} for one, other in zip(x, y, strict=True)]


def params_of(state):
    """The parameters of a train state, by the names that both frameworks share."""
    return pure(state.params)


def statistics_of(holder):
    """{layer: {"mean": .., "var": ..}} of a train state, a Frozen, or any object with the variables of a framework."""
    if isinstance(holder, nnx.Module):
        holder = nnx.state(holder, nnx.BatchStat)
    elif isinstance(holder, jaxbn.nnx.TrainState):
        holder = holder.others
    elif isinstance(holder, jaxbn.Frozen | jaxbn.linen.TrainState):
        holder = holder.variables
    found = pure(holder)
    found = found.get("batch_stats", found)
    return {
        layer: {key: leaf for key, leaf in found[layer].items() if key in ("mean", "var", "count")} for layer in LAYERS
    }


def assert_same_statistics(found, expected, tolerance=1e-5):
    """Of all layers: means in standard deviations, variances relative to themselves."""
    for layer in LAYERS:
        mean, var = (np.float64(expected[layer][name]) for name in ("mean", "var"))
        np.testing.assert_array_less(np.abs(found[layer]["mean"] - mean) / np.sqrt(var), tolerance, err_msg=layer)
        np.testing.assert_allclose(found[layer]["var"], var, rtol=tolerance, err_msg=layer)


def pure(tree):
    """Nested dicts of arrays, by the names that both frameworks share."""
    return nnx.to_pure_dict(tree) if isinstance(tree, nnx.State) else tree


# --- The dense network as formulas ----------------------------------------------------------------------------------


def forward(params, x, statistics=None, epsilon=1e-5):
    """(outputs, {layer: its input}), normalized with the statistics of the rows, or with these."""
    inputs = {}
    for i, layer in enumerate(LAYERS):
        inputs[layer] = z = x @ params[f"map_{i}"]["kernel"] + params[f"map_{i}"]["bias"][None]
        mean, var = (z.mean(0), z.var(0)) if statistics is None else (statistics[layer][k] for k in ("mean", "var"))
        z = (z - mean[None]) / jnp.sqrt(var[None] + epsilon)
        x = jnp.maximum(z * params[layer]["scale"][None] + params[layer]["bias"][None], 0)
    return x @ params["head"]["kernel"] + params["head"]["bias"][None], inputs


def in_float64(function):
    """The function of arrays, computed in float64."""

    def computed(*arguments):
        with jax.enable_x64(True):
            return jax.tree.map(np.asarray, function(*jax.tree.map(np.float64, arguments)))

    return computed


def moments_of(values):
    return {"mean": values.mean(0), "var": values.var(0)}


def moved(old, new, momentum=MOMENTUM):
    """Running averages after one step."""
    return jax.tree.map(lambda o, n: momentum * o + (1 - momentum) * n, old, new)


@in_float64
def trained_in_float64(params, batches):
    """(params, running averages) after one step of gradient descent with momentum for each batch."""

    def loss(params, batch):
        outputs, inputs = forward(params, batch["x"])
        return ((outputs[:, 0] - batch["y"]) ** 2).mean(), jax.tree.map(moments_of, inputs)

    gradient = jax.jit(jax.grad(loss, has_aux=True))
    averages = {layer: {"mean": np.zeros(n), "var": np.ones(n)} for layer, n in zip(LAYERS, WIDTHS, strict=True)}
    velocity = jax.tree.map(jnp.zeros_like, params)
    for batch in batches:
        grads, found = gradient(params, batch)
        averages = moved(averages, found)
        velocity = jax.tree.map(lambda v, g: INERTIA * v + g, velocity, grads)
        params = jax.tree.map(lambda p, v: p - RATE * v, params, velocity)
    return params, averages


@in_float64
def pooled_in_float64(params, parts):
    """The moments of each layer's inputs over all parts, each of which is normalized by itself."""
    inputs = [forward(params, x)[1] for x in parts]
    return {layer: moments_of(jnp.concatenate([one[layer] for one in inputs])) for layer in LAYERS}
