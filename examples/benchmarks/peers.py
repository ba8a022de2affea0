"""One batch normalization layer of each library, in training or in evaluation, for `layers.py`.

All layers get the same input, normalize over all axes except the features, have a scale and a bias, update running
averages with a momentum of 0.99, and keep the dtype of the input. Parameters and statistics are float32, except for the
parameters of Haiku and both of Equinox, which have the dtype of the input. JAX layers are jitted with forward and
backward in one program; as in a network, the backward pass starts only after the output is computed. PyTorch runs in
eager mode with channels last in memory. Equinox runs under `vmap` with channels first, as it requires.
"""

import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from timing import repeat

import jaxbn.linen
import jaxbn.nnx


class Case(NamedTuple):
    """The task of a layer."""

    shape: tuple[int, ...]  # of the input; the features are last
    dtype: str
    relu: bool  # whether a ReLU follows
    train: bool  # True: forward and backward with batch statistics; False: evaluation


class Layer(NamedTuple):
    """A JAX layer as pure functions."""

    train: Callable[..., tuple[jax.Array, Any]]  # (params, state, x) -> y, state
    evaluate: Callable[..., jax.Array]  # (params, state, x) -> y
    params: Any
    state: Any
    fused: bool = False  # whether the ReLU is inside the layer
    channels_first: bool = False


Run = Callable[[int], Any]  # runs the layer the given number of times
Results = Callable[[], tuple[np.ndarray, ...]]  # returns the output, and in training the gradient of the input


class Program(NamedTuple):
    """A layer on a given input."""

    run: Run
    results: Results


def make_program(layer: Layer, case: Case, x: np.ndarray, dy: np.ndarray) -> Program:
    """Makes the program of a JAX layer for an input and a gradient of the output."""
    activation = jax.nn.relu if case.relu and not layer.fused else lambda y: y

    def train(params: Any, state: Any, x: jax.Array, dy: jax.Array) -> Any:
        def forward(params: Any, x: jax.Array) -> Any:
            y, new_state = layer.train(params, state, x)
            return activation(y), new_state

        y, pull, new_state = jax.vjp(forward, params, x, has_aux=True)
        # The barrier makes the backward pass wait for the output, as in a network.
        y, dy = lax.optimization_barrier((y, dy))
        dparams, dx = pull(dy)
        return y, dx, dparams, new_state

    def evaluate(params: Any, state: Any, x: jax.Array) -> Any:
        return (activation(layer.evaluate(params, state, x)),)

    arrays = (x, dy) if case.train else (x,)
    if layer.channels_first:
        # Transpose outside the timed program, so that no library pays for another's layout.
        arrays = tuple(np.moveaxis(array, -1, 1) for array in arrays)
    placed = [jnp.asarray(array, case.dtype) for array in arrays]
    leaves, structure = jax.tree.flatten((layer.params, layer.state, *placed))

    # Flat lists of arrays, so that the time to flatten the pytrees of each library is not measured.
    @jax.jit
    def call(*leaves: jax.Array) -> list[jax.Array]:
        return jax.tree.leaves((train if case.train else evaluate)(*jax.tree.unflatten(structure, leaves)))

    def results() -> tuple[np.ndarray, ...]:
        found = [np.asarray(array, np.float32) for array in call(*leaves)[: len(arrays)]]
        return tuple(np.moveaxis(array, 1, -1) if layer.channels_first else array for array in found)

    return Program(functools.partial(repeat, functools.partial(call, *leaves)), results)


def linen(case: Case, *, norm: Callable[..., Any] = nn.BatchNorm, **fields: Any) -> Layer:
    """A layer with the interface of flax.linen.BatchNorm."""
    make = functools.partial(norm, dtype=case.dtype, **fields)
    training, evaluating = make(use_running_average=False), make(use_running_average=True)
    variables = evaluating.init(jax.random.key(0), jnp.zeros((2, case.shape[-1]), case.dtype))

    def train(params: Any, stats: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        y, updates = training.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])
        return y, updates["batch_stats"]

    def evaluate(params: Any, stats: Any, x: jax.Array) -> jax.Array:
        return evaluating.apply({"params": params, "batch_stats": stats}, x)

    return Layer(train, evaluate, variables["params"], variables["batch_stats"], "activation" in fields)


def in_nnx(case: Case, *, norm: Callable[..., Any] = nnx.BatchNorm, **fields: Any) -> Layer:
    """A layer with the interface of flax.nnx.BatchNorm."""
    layer = norm(case.shape[-1], dtype=case.dtype, rngs=nnx.Rngs(0), **fields)
    graphdef, params, stats = nnx.split(layer, nnx.Param, nnx.BatchStat)

    def train(params: Any, stats: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        layer = nnx.merge(graphdef, params, stats, copy=True)
        y = layer(x, use_running_average=False)
        return y, nnx.state(layer, nnx.BatchStat)

    def evaluate(params: Any, stats: Any, x: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params, stats)(x, use_running_average=True)

    return Layer(train, evaluate, params, stats, "activation" in fields)


def haiku(case: Case) -> Layer:
    """haiku.BatchNorm."""
    import haiku as hk

    def forward(x: jax.Array, train: bool) -> jax.Array:
        return hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=0.99)(x, is_training=train)

    net = hk.without_apply_rng(hk.transform_with_state(forward))
    params, state = net.init(jax.random.key(0), jnp.zeros((2, *case.shape[1:]), case.dtype), True)
    train = functools.partial(net.apply, train=True)
    return Layer(train, lambda *given: net.apply(*given, train=False)[0], params, state)


def equinox(case: Case) -> Layer:
    """equinox.nn.BatchNorm with mode="ema", which updates running averages as the other libraries do."""
    import equinox as eqx

    layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(case.shape[-1], "batch", mode="ema", dtype=case.dtype)
    params, static = eqx.partition(layer, eqx.is_inexact_array)
    batched = functools.partial(jax.vmap, axis_name="batch", in_axes=(0, None), out_axes=(0, None))

    def call(params: Any, state: Any, x: jax.Array, inference: bool) -> tuple[jax.Array, Any]:
        return batched(functools.partial(eqx.combine(params, static), inference=inference))(x, state)

    train = functools.partial(call, inference=False)
    return Layer(train, lambda *given: call(*given, True)[0], params, state, channels_first=True)


def keras(case: Case) -> Layer:
    """keras.layers.BatchNormalization on JAX; uses the policy "mixed_bfloat16" for bfloat16."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras

    if keras.backend.backend() != "jax":
        raise ImportError("Keras does not use the JAX backend; set KERAS_BACKEND=jax.")
    policy = "mixed_bfloat16" if case.dtype == "bfloat16" else case.dtype
    layer = keras.layers.BatchNormalization(epsilon=1e-5, dtype=policy)
    layer.build(case.shape)
    params, state = ([v.value for v in vs] for vs in (layer.trainable_variables, layer.non_trainable_variables))

    def evaluate(params: Any, state: Any, x: jax.Array) -> jax.Array:
        return layer.stateless_call(params, state, x, training=False)[0]

    return Layer(functools.partial(layer.stateless_call, training=True), evaluate, params, state)


def torch(case: Case, x: np.ndarray, dy: np.ndarray) -> Program:
    """torch.nn.BatchNorm1d or BatchNorm2d."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # by default, waiting OpenMP threads occupy the cores
    import torch

    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        raise ImportError("This PyTorch has no CUDA.")
    image = len(case.shape) == 4
    layer = (torch.nn.BatchNorm2d if image else torch.nn.BatchNorm1d)(case.shape[-1], momentum=0.01, device=device)
    layer.train(case.train)
    where = {"device": device, "dtype": getattr(torch, case.dtype)}
    where |= {"memory_format": torch.channels_last} if image else {}
    x, dy = (torch.tensor(np.moveaxis(array, -1, 1)).to(**where) for array in (x, dy))
    x.requires_grad_(case.train)

    def call() -> Any:
        y = layer(x)
        return torch.relu(y) if case.relu else y

    def run(count: int) -> tuple[Any, ...]:
        for _ in range(count):
            if case.train:
                x.grad = layer.weight.grad = layer.bias.grad = None
                y = call()
                y.backward(dy)
            else:
                with torch.no_grad():
                    y = call()
        if device == "cuda":
            torch.cuda.synchronize()
        return (y, x.grad) if case.train else (y,)

    def results() -> tuple[np.ndarray, ...]:
        return tuple(np.moveaxis(array.detach().float().cpu().numpy(), 1, -1) for array in run(1))

    return Program(run, results)


RELU = {"activation": jax.nn.relu}
OURS, OURS_NNX = jaxbn.linen.BatchNorm, jaxbn.nnx.BatchNorm
FLAX_FAST, FLAX_SAFE = "flax fast", "flax safe"

# JAX layers. Those of other packages have the name of the module to import.
LAYERS: dict[str, Callable[[Case], Layer]] = {
    FLAX_FAST: linen,
    FLAX_SAFE: functools.partial(linen, use_fast_variance=False),
    "flax NNX": in_nnx,
    "jaxbn": functools.partial(linen, norm=OURS),
    "jaxbn NNX": functools.partial(in_nnx, norm=OURS_NNX),
    "jaxbn fused": functools.partial(linen, norm=OURS, **RELU),
    "jaxbn NNX fused": functools.partial(in_nnx, norm=OURS_NNX, **RELU),
    "haiku": haiku,
    "equinox": equinox,
    "keras": keras,
}
NAMES = [*LAYERS, "torch"]


def program_of(name: str, case: Case, x: np.ndarray, dy: np.ndarray) -> Program | None:
    """The program of a layer; None for a fused layer if the case has no ReLU.

    Raises:
        ImportError: If the package is not installed.
    """
    if "fused" in name and not case.relu:
        return None
    return torch(case, x, dy) if name == "torch" else make_program(LAYERS[name](case), case, x, dy)
