"""Loops around layers, in every entry point of both frameworks, against the unrolled loop."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax

import jaxbn
import jaxbn.linen
import jaxbn.nnx

TURNS, ROWS, WIDTH = 3, 8, 4


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return x + jnp.tanh(jaxbn.linen.BatchNorm(use_running_average=not train)(nn.Dense(WIDTH)(x)))


class NNXBlock(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.norm = jaxbn.nnx.BatchNorm(WIDTH, rngs=rngs)

    def __call__(self, x):
        return x + jnp.tanh(self.norm(self.dense(x)))


class Linen:
    package = jaxbn.linen

    @staticmethod
    def model(turns=None):
        init = lambda key: LinenBlock().init(key, jnp.ones((ROWS, WIDTH)))
        return init(jax.random.key(0)) if turns is None else jax.vmap(init)(jax.random.split(jax.random.key(0), turns))

    @staticmethod
    def block(variables):
        return partial(LinenBlock().apply, variables)

    @staticmethod
    def over_layers(variables, x):
        axes = {"variable_axes": {"params": 0, "batch_stats": 0}, "split_rngs": {"params": True}}
        stack = nn.scan(lambda block, x, _: (block(x), None), length=TURNS, **axes)
        return nn.apply(lambda block, x: stack(block, x, None)[0], LinenBlock())(variables, x)


class NNX:
    package = jaxbn.nnx

    @staticmethod
    def model(turns=None):
        make = lambda key: NNXBlock(nnx.Rngs(key))
        return make(0) if turns is None else nnx.vmap(make)(jax.random.split(jax.random.key(0), turns))

    @staticmethod
    def block(model):
        return nnx.merge(*nnx.split(model))

    @staticmethod
    def over_layers(model, x):
        return nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, model)


def slices(model, turn):
    take = partial(jax.tree.map, lambda leaf: leaf[turn])
    if not isinstance(model, nnx.Module):
        return take(model)
    graph, state = nnx.split(model)
    return nnx.merge(graph, take(state))


def pure(framework, model):
    """The block as a function of (state, x), as `jax.lax` wants it, and the state."""
    if framework is Linen:
        return LinenBlock().apply, model
    graph, state = nnx.split(model)
    return lambda state, x: nnx.merge(graph, state, copy=True)(x), state  # a copy may be updated inside the loop


def scanned(framework, model, xs):
    run, state = pure(framework, model)
    return lax.scan(lambda total, x: (total + 1, run(state, x)), 0, xs)[1]


def mapped(framework, model, xs):
    run, state = pure(framework, model)
    return lax.map(lambda x: run(state, x), xs)


def repeated(framework, model, x):
    run, state = pure(framework, model)
    return lax.fori_loop(0, TURNS, lambda _, x: run(state, x), x)


def layer_by_layer(framework, model, x):
    for turn in range(TURNS):
        x = framework.block(slices(model, turn))(x)
    return x


def one_by_one(framework, model, xs):
    return jnp.stack([framework.block(model)(x) for x in xs])


def again_and_again(framework, model, x):
    for _ in range(TURNS):
        x = framework.block(model)(x)
    return x


# The loop, the same turns written out, the shape of a batch, and whether each turn has a layer to itself.
LOOPS = {
    "scan of the framework": (lambda f, m, x: f.over_layers(m, x), layer_by_layer, (ROWS, WIDTH), True),
    "lax.scan": (scanned, one_by_one, (TURNS, ROWS, WIDTH), False),
    "lax.map": (mapped, one_by_one, (TURNS, ROWS, WIDTH), False),
    "fori_loop": (repeated, again_and_again, (ROWS, WIDTH), False),
}


def numbers(tree):
    if isinstance(tree, nnx.Module):
        tree = nnx.to_pure_dict(nnx.state(tree))
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def captured(framework, call, model, batches, mode="batch"):
    return framework.package.capture_moments(call, mode=mode)(model, batches[0])


def estimated(framework, call, model, batches, **options):
    if framework is Linen:
        return jaxbn.linen.postproc(call, model, batches, **options)[0]
    return jaxbn.nnx.postproc(model, batches, call=call, **options)[0]


def diagnosed(framework, call, model, batches):
    arguments = (call, model, batches) if framework is Linen else (model, batches)
    return framework.package.diagnose(*arguments, **({} if framework is Linen else {"call": call})).to_dict()


ENTRIES = {
    "capture": captured,
    "capture as called": partial(captured, mode="as_called"),
    "postproc": estimated,
    "consistent": partial(estimated, consistent=True),
    "diagnose": diagnosed,
}
SLOW = {"capture as called", "diagnose"}


@pytest.mark.sample(every=5)
@pytest.mark.parametrize("framework", [Linen, NNX], ids=["linen", "nnx"])
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("entry", [pytest.param(e, marks=pytest.mark.slow) if e in SLOW else e for e in ENTRIES])
def test_loop(entry, loop, framework, rng):
    looping, written_out, shape, stacked = LOOPS[loop]
    model = framework.model(TURNS if stacked else None)
    batches = [jnp.asarray(rng.normal(1, 2, shape), jnp.float32) for _ in range(2)]
    found, expected = (
        numbers(ENTRIES[entry](framework, partial(call, framework), model, batches)) for call in (looping, written_out)
    )
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, str):
            assert found[name] == value
        else:
            np.testing.assert_allclose(found[name], value, rtol=2e-5, atol=2e-5, err_msg=name)


class LinenStack(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        axes = {"variable_axes": {"params": 0, "batch_stats": 0}, "split_rngs": {"params": True}}
        stack = nn.scan(lambda block, x, _: (block(x, train), None), length=TURNS, **axes)
        return stack(LinenBlock(), x, None)[0]


class NNXStack(nnx.Module):
    def __init__(self):
        self.blocks = NNX.model(TURNS)

    def __call__(self, x):
        return NNX.over_layers(self.blocks, x)


@pytest.mark.parametrize("framework", [Linen, NNX], ids=["linen", "nnx"])
def test_steps_of_scanned_layers(framework, rng):
    """Training updates the averages of each layer, and the pass of the steps is that of `postproc`."""
    batches = [jnp.asarray(rng.normal(1, 2, (ROWS, WIDTH)), jnp.float32) for _ in range(2)]
    model = LinenStack() if framework is Linen else NNXStack()
    loss_fn = lambda outputs, batch: (jnp.mean(outputs**2), {})
    steps = framework.package.make_steps(model, loss_fn, optax.sgd(0.1), inputs=lambda batch: batch)
    state = steps.init(jax.random.key(0), batches[0])
    state, _ = jax.jit(steps.train_step)(state, batches[0])
    acc = steps.start(state, batches[0])
    for batch in batches:
        acc = jax.jit(steps.postproc_step)(state, acc, batch)
    frozen, report = steps.finalize(state, acc)
    (change,) = report.layers.values()
    assert (report.batches, change.count) == (2, 2 * ROWS)
    outputs = np.asarray(jax.jit(steps.eval_step)(frozen, batches[0]))
    assert np.isfinite(outputs).all()
    first = np.concatenate(batches).astype(np.float64) @ np.float64(_first_kernel(frozen.variables))
    np.testing.assert_allclose(change.new_mean[0], first.mean(0) + _first_bias(frozen.variables), rtol=1e-4)


def _first_kernel(variables):
    return next(leaf[0] for name, leaf in numbers(variables).items() if "kernel" in name)


def _first_bias(variables):
    return next(leaf[0] for name, leaf in numbers(variables).items() if "bias" in name and "ense" in name)
